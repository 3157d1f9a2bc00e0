"""Environments become images. Writes the aggregate `image`."""
