"""The reference pages of the docs site, generated from code and protos."""
