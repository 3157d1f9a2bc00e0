"""Processes, environments, machine."""
