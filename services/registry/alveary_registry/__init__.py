"""Models and datasets. Writes the aggregates `model` and `dataset`."""
