"""Log streaming and archive. Writes the aggregate `log`."""
