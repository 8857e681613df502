"""The operators: schema, fake kernel, autograd formula and default implementation, one file an op."""
