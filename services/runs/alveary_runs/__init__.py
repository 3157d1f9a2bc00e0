"""Run submission and run history. Writes the aggregate `run`."""
