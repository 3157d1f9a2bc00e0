"""The node agent. Stages, launches, supervises, streams, stores, reports. Writes the aggregate `attempt`."""
