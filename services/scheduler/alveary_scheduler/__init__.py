"""Compute targets, nodes, the queue, placements. Writes `target`, `node` and `placement`."""
