"""A second copy of the event log and of the metrics, written behind into the object store."""
