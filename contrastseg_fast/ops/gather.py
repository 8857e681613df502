"""Vectors of a feature map at given positions, and the dense gradient of the map.

    vectors[b, n, c] = features[b, c, positions[n]]        positions in raster order

Positions are given, or None and those of a plan, by the numbers of its `SamplePlan`. The gradient is
contiguous, or channels-last where features are. Vectors at the same position add up in it, in fp32 for 16-bit
dtypes. Autograd keeps the given positions, not the map. Both operators can be differentiated again.

The kernels below are plain PyTorch. The Triton kernels (kernels/gather.py) replace them on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from contrastseg_fast.ops._dispatch import Operation, pick
from contrastseg_fast.ops._library import define, register_autograd
from contrastseg_fast.sample_plan import SamplePlan

OPERATION = Operation("gather_vectors", on_cpu=())


def is_channels_last(features: Tensor) -> bool:
    return not features.is_contiguous() and features.movedim(1, -1).is_contiguous()


def _gather(
    features: Tensor, positions: Tensor | None, plan: Sequence[int], _backend: str = "auto"
) -> Tensor:
    if positions is None:
        positions = SamplePlan.from_numbers(plan).positions(features.device)
    if is_channels_last(features):
        return features.movedim(1, -1).flatten(1, -2).index_select(1, positions)
    index = positions.expand(*features.shape[:2], -1)
    return features.flatten(2).gather(2, index).mT.contiguous()


def _backward(
    grad: Tensor,
    positions: Tensor | None,
    plan: Sequence[int],
    shape: Sequence[int],
    channels_last: bool,
    _backend: str = "auto",
) -> Tensor:
    if positions is None:
        positions = SamplePlan.from_numbers(plan).positions(grad.device)
    batch, channels, *spatial = shape
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if channels_last:
        flat = grad.new_zeros((batch, math.prod(spatial), channels), dtype=dtype)
        flat = flat.index_add_(1, positions, grad.to(dtype)).to(grad.dtype)
        return flat.view(batch, *spatial, channels).movedim(-1, 1)
    flat = grad.new_zeros((batch, channels, math.prod(spatial)), dtype=dtype)
    index = positions.expand(batch, channels, -1)
    return flat.scatter_add_(2, index, grad.mT.to(dtype)).to(grad.dtype).view(*shape)


def gather_vectors_on_cuda(
    features: Tensor, positions: Tensor | None, plan: Sequence[int], backend: str
) -> Tensor:
    if pick(OPERATION, backend, features) != "triton":
        return _gather(features, positions, plan)
    from contrastseg_fast.kernels import gather as kernels

    return kernels.gather_vectors(features, positions, plan)


def gather_vectors_backward_on_cuda(
    grad: Tensor,
    positions: Tensor | None,
    plan: Sequence[int],
    shape: Sequence[int],
    channels_last: bool,
    backend: str,
) -> Tensor:
    if pick(OPERATION, backend, grad) != "triton":
        return _backward(grad, positions, plan, shape, channels_last)
    from contrastseg_fast.kernels import gather as kernels

    return kernels.gather_vectors_backward(grad, positions, plan, shape, channels_last)


def _gather_fake(features: Tensor, positions: Tensor | None, plan: Sequence[int], _backend: str) -> Tensor:
    count = SamplePlan.from_numbers(plan).num_vectors if positions is None else positions.shape[0]
    return features.new_empty((features.shape[0], count, features.shape[1]))


def _backward_fake(
    grad: Tensor,
    _positions: Tensor | None,
    _plan: Sequence[int],
    shape: Sequence[int],
    channels_last: bool,
    _backend: str,
) -> Tensor:
    if channels_last:
        batch, channels, *spatial = shape
        return grad.new_empty((batch, *spatial, channels)).movedim(-1, 1)
    return grad.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, positions, ctx.plan, ctx.backend = inputs
    ctx.save_for_backward(positions)
    ctx.shape = features.shape
    ctx.channels_last = is_channels_last(features)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    grad_features = gather_vectors_backward(
        grad, positions, ctx.plan, ctx.shape, ctx.channels_last, ctx.backend
    )
    return grad_features, None, None, None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, ctx.plan, _, _, ctx.backend = inputs
    ctx.save_for_backward(positions)


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    return gather_vectors(grad, positions, ctx.plan, ctx.backend), None, None, None, None, None


gather_vectors = define(
    "gather_vectors(Tensor features, Tensor? positions, SymInt[] plan, str backend) -> Tensor",
    _gather,
    _gather_fake,
    gather_vectors_on_cuda,
)
gather_vectors_backward = define(
    "gather_vectors_backward(Tensor grad, Tensor? positions, SymInt[] plan, SymInt[] shape, "
    "bool channels_last, str backend) -> Tensor",
    _backward,
    _backward_fake,
    gather_vectors_backward_on_cuda,
)
register_autograd(gather_vectors, OPERATION.name, _differentiate, _setup_context)
register_autograd(gather_vectors_backward, OPERATION.name, _differentiate_backward, _setup_backward_context)
