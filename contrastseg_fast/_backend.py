"""Which implementations of an op can run here, and why the others cannot."""

from __future__ import annotations

import importlib

import torch

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

try:
    importlib.import_module("contrastseg_fast._C")  # registers the CPU kernels
    _CPU_ERROR: str | None = None
except ImportError as error:
    _CPU_ERROR = str(error)


def has_cpu_extension() -> bool:
    """Whether the C++ kernels are installed."""
    return _CPU_ERROR is None


def check(op: str, backend: str, device: torch.device) -> None:
    """Raise unless `backend` can run `op` on tensors of `device`; `"auto"` always can.

    Raises:
        ValueError: `backend` is unknown, or does not serve `device`.
        RuntimeError: `backend` serves `device` but is not installed.
    """
    match backend:
        case "auto" | "reference":
            return
        case "cpu":
            if device.type != "cpu":
                raise ValueError(
                    f"backend: {op} with backend='cpu' expects CPU tensors, got {device.type} tensors"
                )
            if _CPU_ERROR is not None:
                raise RuntimeError(
                    f"backend: {op} with backend='cpu' needs the C++ extension, which is not installed "
                    f"({_CPU_ERROR}); reinstall with a C++ compiler, or use backend='auto'"
                )
        case "triton" | "cuda":
            if device.type != "cuda":
                raise ValueError(
                    f"backend: {op} with backend={backend!r} expects CUDA tensors, got {device.type} tensors"
                )
            raise RuntimeError(
                f"backend: {op} has no {backend!r} kernels in this version; use backend='auto'"
            )
        case _:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
