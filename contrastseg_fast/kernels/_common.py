"""What the Triton kernels share."""

from __future__ import annotations

import contextlib
import functools
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast import _backend

_Entry = TypeVar("_Entry")

INTERPRETING = tl.constexpr(_backend.interpreting())


def on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's device, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's card, 90 for 9.0; 90 for interpreted kernels."""
    return _properties(tensor.get_device())[0] if tensor.is_cuda else 90


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's card; 4 for interpreted kernels, so that they take several programs."""
    return _properties(tensor.get_device())[1] if tensor.is_cuda else 4


def sm_table(table: dict[int, _Entry], tensor: Tensor) -> _Entry:
    """The entry of a launch table, keyed by compute capability, for the card or the next older one."""
    card = capability(tensor)
    return table[max((key for key in table if key <= card), default=min(table))]


@triton.jit
def dot(a, b):
    """Matrix product in fp32. The interpreter multiplies the bits of bf16, so it gets fp32."""
    if INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_add(a, b, sum):
    """`sum` and the matrix product of `a` and `b`, in fp32."""
    if INTERPRETING:
        return sum + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 rounded to a narrower type. The interpreter cuts bf16 off, so it gets rounded bits."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits & -65536).to(tl.float32, bitcast=True).to(dtype)
    return x.to(dtype)
