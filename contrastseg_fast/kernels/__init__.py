"""Triton kernels, a file or a folder for each operation; imported when one first gets a CUDA tensor."""
