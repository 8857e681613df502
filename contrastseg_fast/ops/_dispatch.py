"""Which kernels an operator takes. This is the only place that picks a backend.

`check` runs before an operator, in `functional`: an explicit backend that cannot run raises there, before any
kernel. `pick` runs inside an operator, for CUDA tensors. CPU tensors take the C++ kernels where these are
installed, else plain PyTorch: the dispatcher of torch does that by itself.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from contrastseg_fast import _backend, _checks


class Operation(NamedTuple):
    """One operation and the backends that have kernels for it, besides `"auto"` and `"reference"`."""

    name: str  # of its public function
    on_cpu: tuple[str, ...] = ("cpu",)
    on_cuda: tuple[str, ...] = ("triton",)  # in the order in which "auto" prefers them

    @property
    def words(self) -> tuple[str, ...]:
        """What the argument `backend` may be."""
        return ("auto", "reference", *self.on_cpu, *self.on_cuda)


def check(operation: Operation, backend: str, tensor: Tensor, refused: str | None = None) -> None:
    """Raise unless `backend` can run `operation` on `tensor`. Tensors without data run nothing, and pass.

    Args:
        refused: the error for arguments that the Triton kernels do not take, None if they take them.

    Raises:
        ValueError: `backend` is unknown, has no kernel for this operation, does not serve the tensor's
            device, or does not take these arguments.
        RuntimeError: `backend` serves the device but is not installed, or the card is too old.
    """
    if backend in ("auto", "reference"):
        return
    if backend not in _backend.BACKENDS:
        raise ValueError(f"backend: expected one of {_backend.BACKENDS}, got {backend!r}")
    if isinstance(tensor, FakeTensor):
        return
    kind = "cpu" if backend == "cpu" else "cuda"
    if tensor.device.type != kind:
        raise ValueError(
            f"backend: {operation.name} with backend={backend!r} expects {kind.upper()} tensors, got "
            f"{tensor.device.type} tensors"
        )
    if backend not in operation.words:
        raise ValueError(f"backend: {operation.name} expects one of {operation.words}, got {backend!r}")
    if backend == "cpu" and not _backend.has_cpu_extension():
        raise RuntimeError(
            f"backend: {operation.name} with backend='cpu' needs the C++ extension, which is not installed "
            f"({_backend.cpu_error()}); reinstall with a C++ compiler, or use backend='auto'"
        )
    if kind == "cuda":
        _require(operation, backend, tensor, refused)


def pick(operation: Operation, backend: str, tensor: Tensor, refused: str | None = None) -> str:
    """The kernels that run `operation` on a CUDA tensor: `"cuda"`, `"triton"` or `"plain"` (plain PyTorch).

    An explicit backend runs or raises, as in `check`. `"auto"` takes the first that can run, and warns once
    where that is not the one it prefers. It skips Triton if Triton does not take the arguments.
    """
    if backend in operation.on_cuda:
        _require(operation, backend, tensor, refused)
        return backend
    if backend != "auto":
        check(operation, backend, tensor)
        return "plain"
    missing = ""
    for choice in operation.on_cuda:
        if choice == "triton" and refused is not None:
            continue
        reason = _backend.unavailable(choice, tensor.device)
        if reason is None:
            break
        missing = missing or f"the {_KERNELS[choice]} cannot run: {reason}"
    else:
        choice = "plain"
    if missing:
        instead = _KERNELS.get(choice, "plain PyTorch")
        _checks.warn_once(f"{operation.name} runs in {instead}, as {missing}", RuntimeWarning)
    return choice


_KERNELS = {"cuda": "CUDA kernels", "triton": "Triton kernels"}


def _require(operation: Operation, backend: str, tensor: Tensor, refused: str | None) -> None:
    """Raise unless a backend for CUDA tensors is there and takes the arguments."""
    if backend == "triton" and refused is not None:
        raise ValueError(refused)
    if (reason := _backend.unavailable(backend, tensor.device)) is not None:
        called = f"{operation.name} with backend={backend!r}"
        raise RuntimeError(f"backend: {called} cannot run: {reason}; use backend='auto'")
