"""Triton kernels, one file an op; imported when an op first meets a CUDA tensor."""
