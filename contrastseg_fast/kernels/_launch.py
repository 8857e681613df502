"""Launching a kernel again without Triton's binding of its arguments, which takes longer than the launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

Pointers = Sequence["Tensor | tuple[Tensor | None, ...] | None"]


def _is_known(version: str) -> bool:
    """Whether `JITFunction.run` of this Triton ends in the call that `launch` makes."""
    return (3, 6) <= tuple(int(part) for part in version.split(".")[:2]) <= (3, 9)


_IS_KNOWN = _is_known(triton.__version__)


class _Compiled(NamedTuple):
    """What Triton compiled for one kind of arguments."""

    binary: Any
    constants: tuple[Any, ...]  # those of the kernel's signature, in its order


class _Kernel(NamedTuple):
    """A kernel that was launched before."""

    kernel: Any  # keeps its id from being another's
    specialised: tuple[bool, ...]  # for every argument, whether a number's value matters
    compiled: dict[Any, _Compiled]


_kernels: dict[int, _Kernel] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Pointers,
    scalars: Sequence[float | None],
    constants: dict[str, Any],
) -> None:
    """As `kernel[grid](*tensors, *scalars, **constants)`, on the current device and stream.

    The first launch of a kind of arguments goes through Triton. Further ones hand the addresses to what was
    compiled. A kind is made of everything that Triton compiles for: device, dtypes, which pointers are None,
    which are multiples of 16, the values of integers as far as they are specialised, and the constants. With
    hooks, interpreted kernels, backends other than CUDA and unknown versions of Triton, every launch binds.

    Args:
        grid: one to three sizes.
        tensors: the first arguments of the kernel: pointers, None, or tuples of these.
        scalars: the arguments after them: Python's numbers, or None.
        constants: the constexpr arguments, which are the last, and options such as `num_warps`; hashable.
    """
    runtime = knobs.runtime
    if (
        not _IS_KNOWN
        or getattr(type(kernel), "run", None) is not JITFunction.run  # in Triton or Gluon, not interpreted
        or kernel.pre_run_hooks
        or _is_set(runtime.launch_enter_hook)
        or _is_set(runtime.launch_exit_hook)
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
    ):
        kernel[grid](*tensors, *scalars, **constants)
        return
    known = _kernels.get(id(kernel)) or _remember(kernel)
    active = driver.active
    device = active.get_current_device()
    addresses, kinds = _pointers(tensors)
    kinds += map(_kind, scalars, known.specialised[len(tensors) :])
    values = tuple(constants.values())
    modes = (runtime.debug, knobs.compilation.instrumentation_mode)
    key = (device, *kinds, *constants, values, modes)
    compiled = known.compiled.get(key)
    if compiled is None:
        binary = kernel[grid](*tensors, *scalars, **constants)
        if _is_cuda(binary):
            known.compiled[key] = _Compiled(binary, _in_order(kernel, len(kinds), constants))
        return
    binary = compiled.binary
    width, height, depth = (*grid, 1, 1)[:3]
    binary.run(
        width,
        height,
        depth,
        active.get_current_stream(device),
        binary.function,
        binary.packed_metadata,
        None,  # for hooks, as are the next two
        None,
        None,
        *addresses,
        *scalars,
        *compiled.constants,
    )


def _is_set(hook: Any) -> bool:
    return bool(getattr(hook, "calls", hook))  # a chain of hooks, None, or one of a user's own


def _remember(kernel: Any) -> _Kernel:
    specialised = tuple(not parameter.do_not_specialize for parameter in kernel.params)
    return _kernels.setdefault(id(kernel), _Kernel(kernel, specialised, {}))


def _pointers(tensors: Pointers) -> tuple[list[Any], list[Any]]:
    """Addresses, which Triton takes in place of tensors, and what is compiled for each of them."""
    addresses: list[Any] = []
    kinds: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            addresses.append(None)
            kinds.append(None)
        elif isinstance(tensor, tuple):
            inner, inner_kinds = _pointers(tensor)
            addresses.append(tuple(inner))
            kinds.append(tuple(inner_kinds))
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            kinds.append((tensor.dtype, "unaligned") if address % 16 else tensor.dtype)
    return addresses, kinds


def _kind(value: float | None, specialised: bool) -> Any:
    """What is compiled for a number: its type, and of integers the width, 1, and multiples of 16."""
    if type(value) is not int:
        return type(value)
    width = 32 if -(1 << 31) <= value < 1 << 31 else 64 if value < 1 << 63 else 65
    if not specialised:
        return width
    return 1 if value == 1 else (width, value % 16 == 0)


def _is_cuda(binary: Any) -> bool:
    """Whether a launch gave a kernel that the call in `launch` is made for."""
    target = getattr(getattr(binary, "metadata", None), "target", None)
    return getattr(target, "backend", None) == "cuda"


def _in_order(kernel: Any, first: int, constants: dict[str, Any]) -> tuple[Any, ...]:
    """The values of the kernel's arguments from number `first`, which are all constants."""
    return tuple(constants.get(parameter.name, parameter.default) for parameter in kernel.params[first:])
