"""Which backends can run here, and why the others cannot. What a call takes is picked in ops/_dispatch.py."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os

import torch

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

_LEAST_TRITON = (3, 6)
_LEAST_CAPABILITY = (8, 0)  # of the card, for the Triton and CUDA kernels

try:
    importlib.import_module("contrastseg_fast._C")  # registers the CPU kernels
    _CPU_ERROR: str | None = None
except ImportError as error:
    _CPU_ERROR = str(error)


def has_cpu_extension() -> bool:
    """Whether the C++ kernels are installed."""
    return _CPU_ERROR is None


def cpu_error() -> str | None:
    """Why the C++ kernels are not installed, or None."""
    return _CPU_ERROR


def interpreting() -> bool:
    """Whether Triton kernels are interpreted, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _find_cuda_library() -> str | None:
    """Register the CUDA kernels where torch finds a device; why that cannot be, or None."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        importlib.import_module("contrastseg_fast._C_cuda")
    except ImportError as error:
        return str(error)
    return None


def _find_triton() -> str | None:
    """Why Triton cannot be used, or None; Triton itself is not imported."""
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA cards"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < _LEAST_TRITON:
        return f"Triton {'.'.join(map(str, _LEAST_TRITON))} or later is needed, {version} is installed"
    return None


# Found once, here: torch.compile does not follow imports inside what it compiles.
_CUDA_LIBRARY_ERROR = _find_cuda_library()
_TRITON_ERROR = _find_triton()


@functools.cache
def card_error(index: int) -> str | None:
    """Why the card of this index cannot run the GPU kernels, or None."""
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        needed, found = (".".join(map(str, pair)) for pair in (_LEAST_CAPABILITY, capability))
        return (
            f"compute capability {needed} or later is needed, {torch.cuda.get_device_name(index)} has {found}"
        )
    return None


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why the `"triton"` or `"cuda"` kernels cannot run on a CUDA device, or None if they can.

    Interpreted Triton kernels run on the CPU.
    """
    missing = _TRITON_ERROR if backend == "triton" else _CUDA_LIBRARY_ERROR
    if missing is not None or device.type == "cpu":
        return missing
    return card_error(torch.cuda.current_device() if device.index is None else device.index)
