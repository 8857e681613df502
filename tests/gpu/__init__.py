"""Tests of the GPU kernels; `--device cpu` runs those that make sense there with whatever backend it has."""
