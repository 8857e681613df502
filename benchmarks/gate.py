"""`entropy_gate` (Eqs. 8 to 10), forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from benchmarks.operation import OURS, Implementation, Inputs, Operation, Result, Run, Work
from contrastseg_fast import functional, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Gate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Features of this shape, and logits of `classes` in their place."""

    shape: tuple[int, ...] = (2, 256, 128, 128)
    classes: int = 2
    dtype: str = "fp32"
    channels_last: bool = False

    def __str__(self) -> str:
        layout = ",channels_last" if self.channels_last else ""
        return f"{'x'.join(map(str, self.shape))},M={self.classes},{self.dtype}{layout}"

    @property
    def feature_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def _inputs(size: Size, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    batch, channels, *spatial = size.shape
    tensors = [
        torch.randn(batch, depth, *spatial, generator=generator, device=device).to(DTYPES[size.dtype])
        for depth in (channels, size.classes, channels)
    ]
    if size.channels_last:
        layout = torch.channels_last if len(spatial) == 2 else torch.channels_last_3d
        tensors = [each.contiguous(memory_format=layout) for each in tensors]
    return tuple(tensors)


def _with_gradients(gate: Gate) -> Callable[[Size, Inputs], Run]:
    def prepare(_size: Size, inputs: Inputs) -> Run:
        features, logits, grad = inputs

        def run() -> Result:
            leaves = features.detach().requires_grad_(), logits.detach().requires_grad_()
            gated = gate(*leaves)
            return gated.detach(), *torch.autograd.grad(gated, leaves, grad)

        return run

    return prepare


def _compiled(size: Size, inputs: Inputs) -> Run:
    gate = torch.compile(reference.entropy_gate, dynamic=False, fullgraph=True)
    return _with_gradients(gate)(size, inputs)


def _copies(_size: Size, inputs: Inputs) -> Run:
    """The bytes that must move: H in and out forward; H, its gradient in and out backward."""
    features, _, grad = inputs
    gated, grad_features = torch.empty_like(features), torch.empty_like(features)

    def run() -> Result:
        gated.copy_(features)
        torch.mul(features, grad, out=grad_features)
        return ()

    return run


def _work(size: Size, inputs: Inputs) -> Work:
    """H and logits in and Hhat out; then both, and Hhat's gradient, in, and two gradients out."""
    features, logits, _ = inputs
    return Work(bytes=5 * features.nbytes + 3 * logits.nbytes)


def _oracle(size: Size, inputs: Inputs) -> Result:
    return _with_gradients(reference.entropy_gate)(size, tuple(each.double() for each in inputs))()


def _cut(size: Size, channels: int, extent: int) -> Size:
    batch, depth, *spatial = size.shape
    return replace(size, shape=(batch, min(depth, channels), *(min(each, extent) for each in spatial)))


OPERATION = Operation(
    name="entropy_gate",
    make_inputs=_inputs,
    oracle=_oracle,
    checked=lambda size: size,
    tiny=lambda size: _cut(size, 5, 7),
    tolerance=lambda size: 1e-5 if size.dtype == "fp32" else 1e-2,
    work=_work,
    implementations=(
        Implementation(OURS, _with_gradients(functional.entropy_gate)),
        Implementation(
            "reference",
            _with_gradients(reference.entropy_gate),
            bytes_needed=lambda size: 3 * size.feature_bytes,
        ),
        Implementation(
            "torch.compile", _compiled, bytes_needed=lambda size: 2 * size.feature_bytes, compiles=True
        ),
        Implementation(
            "ours in CUDA",
            _with_gradients(partial(functional.entropy_gate, backend="cuda")),
            devices=("cuda",),
        ),
        Implementation("copying the bytes that must move", _copies, yardstick=True, weighed=False),
    ),
)
