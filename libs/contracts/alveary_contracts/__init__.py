"""The contracts: code generated from protos/ (`make generate`), and the few rules that the protos state in prose."""
