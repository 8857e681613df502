"""Vectors of a feature map at given positions, and the dense gradient of the map.

    vectors[b, n, c] = features[b, c, position[n]]        positions in raster order

The gradient is contiguous, or channels-last where features are. Vectors at the same position add up in it, in
fp32 for 16-bit dtypes. Autograd keeps the positions, not the map; both ops can be differentiated again.

The default kernels below are plain PyTorch; on CUDA, Triton kernels replace them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from contrastseg_fast import _backend
from contrastseg_fast.ops._library import LIBRARY, accumulation_dtype, define


def _is_channels_last(features: Tensor) -> bool:
    return not features.is_contiguous() and features.movedim(1, -1).is_contiguous()


def _gather(features: Tensor, position: Tensor) -> Tensor:
    if _is_channels_last(features):
        return features.movedim(1, -1).flatten(1, -2).index_select(1, position)
    index = position.expand(*features.shape[:2], -1)
    return features.flatten(2).gather(2, index).mT.contiguous()


def _backward(grad: Tensor, position: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    batch, channels, *spatial = shape
    dtype = accumulation_dtype(grad.dtype)
    if channels_last:
        flat = grad.new_zeros(batch, math.prod(spatial), channels, dtype=dtype)
        flat = flat.index_add_(1, position, grad.to(dtype)).to(grad.dtype)
        return flat.view(batch, *spatial, channels).movedim(-1, 1)
    flat = grad.new_zeros(batch, channels, math.prod(spatial), dtype=dtype)
    index = position.expand(batch, channels, -1)
    return flat.scatter_add_(2, index, grad.mT.to(dtype)).to(grad.dtype).view(*shape)


_OTHERWISE = "gather_vectors runs in plain PyTorch"


def _gather_cuda(features: Tensor, position: Tensor) -> Tensor:
    if not _backend.has_triton(_OTHERWISE, features.device):
        return _gather(features, position)
    from contrastseg_fast.kernels import gather as kernels

    return kernels.gather_vectors(features, position)


def _backward_cuda(grad: Tensor, position: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    if not _backend.has_triton(_OTHERWISE, grad.device):
        return _backward(grad, position, shape, channels_last)
    from contrastseg_fast.kernels import gather as kernels

    return kernels.gather_vectors_backward(grad, position, shape, channels_last)


def _gather_fake(features: Tensor, position: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], position.shape[0], features.shape[1])


def _backward_fake(grad: Tensor, _position: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    if channels_last:
        batch, channels, *spatial = shape
        return grad.new_empty(batch, *spatial, channels).movedim(-1, 1)
    return grad.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    features, position = inputs
    ctx.save_for_backward(position)
    ctx.shape = features.shape
    ctx.channels_last = _is_channels_last(features)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (position,) = ctx.saved_tensors
    return gather_vectors_backward(grad, position, ctx.shape, ctx.channels_last), None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (position,) = ctx.saved_tensors
    return gather_vectors(grad, position), None, None, None


_GATHER = define("gather_vectors(Tensor features, Tensor position) -> Tensor", _gather, _gather_fake)
_BACKWARD = define(
    "gather_vectors_backward(Tensor grad, Tensor position, SymInt[] shape, bool channels_last) -> Tensor",
    _backward,
    _backward_fake,
)
torch.library.impl(_GATHER, "CUDA", lib=LIBRARY)(_gather_cuda)
torch.library.impl(_BACKWARD, "CUDA", lib=LIBRARY)(_backward_cuda)
torch.library.register_autograd(_GATHER, _differentiate, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    _BACKWARD, _differentiate_backward, setup_context=_setup_backward_context, lib=LIBRARY
)

gather_vectors = torch.ops.contrastseg_fast.gather_vectors.default
gather_vectors_backward = torch.ops.contrastseg_fast.gather_vectors_backward.default
