"""Gathers vectors from feature maps on a GPU, and writes the dense gradient of a map.

A map is a tensor `(B, C, S)` with S positions: contiguous (positions are neighbours in memory) or
channels-last (channels are). Tiles are read and written along the axis whose elements are neighbours.

The gradient is written once, zeros included. Each position first gets the first and the last of its vectors,
by integer atomics whose order does not matter. Vectors between these two that share the position are found by
checking all vectors between. The library's samplers never repeat a position, so this rarely happens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import narrow, on


class Launch(NamedTuple):
    """What one program moves."""

    block_positions: int  # or vectors
    block_channels: int
    num_warps: int


# By whether channels are neighbours in memory.
GATHER = {False: Launch(32, 32, 4), True: Launch(16, 64, 4)}
SCATTER = {False: Launch(64, 32, 4), True: Launch(16, 64, 4)}
LOCATE = Launch(256, 1, 4)  # it reads positions alone

# Sizes may still be specialised for being multiples of 16: rows are then aligned, and written in wide words.
_STRIDES = (
    *(f"features_stride_{axis}" for axis in "bcs"),
    *(f"grad_stride_{axis}" for axis in "bnc"),
)


@triton.jit(do_not_specialize=("num_vectors", "num_positions", *_STRIDES))
def gather_kernel(
    features_ptr,  # (B, C, S), any strides
    positions_ptr,  # (N)
    vectors_ptr,  # (B, N, C)
    num_vectors,
    num_positions,
    channels,
    features_stride_b,
    features_stride_c,
    features_stride_s,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copies tiles of vectors. It reads along the positions unless channels are neighbours."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks = tl.cdiv(num_vectors, BLOCK_N) * blocks_c
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    n = (block // blocks_c).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    c = (block % blocks_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    position = tl.load(positions_ptr + n, n < num_vectors, -1)
    inside = (position >= 0) & (position < num_positions)
    features_ptr += image * features_stride_b
    if CHANNELS_LAST:
        ptrs = features_ptr + (position * features_stride_s)[:, None] + c[None, :]
        tile = tl.load(ptrs, inside[:, None] & (c < channels)[None, :], 0)  # [BLOCK_N, BLOCK_C]
    else:
        ptrs = features_ptr + (c * features_stride_c)[:, None] + (position * features_stride_s)[None, :]
        tile = tl.trans(tl.load(ptrs, (c < channels)[:, None] & inside[None, :], 0))
    vector_ptrs = vectors_ptr + (image * num_vectors + n)[:, None] * channels + c[None, :]
    tl.store(vector_ptrs, tile, (n < num_vectors)[:, None] & (c < channels)[None, :])


def gather_vectors(features: Tensor, positions: Tensor) -> Tensor:
    """As the op."""
    flat = features.flatten(2)  # a view of contiguous and channels-last maps
    images, channels, num_positions = flat.shape
    num_vectors = positions.shape[0]
    vectors = features.new_empty(images, num_vectors, channels)
    channels_last = flat.stride(1) == 1 and flat.stride(2) != 1
    launch = GATHER[channels_last]
    blocks = triton.cdiv(num_vectors, launch.block_positions) * triton.cdiv(channels, launch.block_channels)
    if images * blocks > 0:
        with on(features):
            gather_kernel[(images * blocks,)](
                features_ptr=flat,
                positions_ptr=positions.contiguous(),
                vectors_ptr=vectors,
                num_vectors=num_vectors,
                num_positions=num_positions,
                channels=channels,
                features_stride_b=flat.stride(0),
                features_stride_c=flat.stride(1),
                features_stride_s=flat.stride(2),
                CHANNELS_LAST=channels_last,
                BLOCK_N=launch.block_positions,
                BLOCK_C=launch.block_channels,
                num_warps=launch.num_warps,
                enable_fp_fusion=True,
            )
    return vectors


@triton.jit(do_not_specialize=("num_vectors", "num_positions"))
def locate_kernel(
    positions_ptr,  # (N)
    found_ptr,  # (2, S), -1 everywhere
    num_vectors,
    num_positions,
    BLOCK_N: tl.constexpr,
):
    """The last vector at each position, and the first one counted from behind; -1 where there is none."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    position = tl.load(positions_ptr + n, n < num_vectors, -1)
    inside = (position >= 0) & (position < num_positions)
    tl.atomic_max(found_ptr + position, n, inside, sem="relaxed")
    tl.atomic_max(found_ptr + num_positions + position, num_vectors - 1 - n, inside, sem="relaxed")


def _locate(positions: Tensor, num_positions: int) -> Tensor:
    """`(2, S)`: what `locate_kernel` finds at each position."""
    found = torch.full((2, num_positions), -1, dtype=torch.int32, device=positions.device)
    num_vectors = positions.shape[0]
    if num_vectors > 0:
        locate_kernel[(triton.cdiv(num_vectors, LOCATE.block_positions),)](
            positions_ptr=positions,
            found_ptr=found,
            num_vectors=num_vectors,
            num_positions=num_positions,
            BLOCK_N=LOCATE.block_positions,
            num_warps=LOCATE.num_warps,
            enable_fp_fusion=True,
        )
    return found


@triton.jit
def _grad_tile(grad_ptr, n, c, channels, present, grad_stride_n, grad_stride_c, CHANNELS_LAST: tl.constexpr):
    """The gradients of one vector for every position of a tile, in the accumulation dtype."""
    DTYPE: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = n.to(tl.int64) * grad_stride_n
    columns = c * grad_stride_c
    if CHANNELS_LAST:
        ptrs = grad_ptr + rows[:, None] + columns[None, :]  # [BLOCK_S, BLOCK_C]
        mask = present[:, None] & (c < channels)[None, :]
    else:
        ptrs = grad_ptr + rows[None, :] + columns[:, None]  # [BLOCK_C, BLOCK_S]
        mask = present[None, :] & (c < channels)[:, None]
    return tl.load(ptrs, mask, 0).to(DTYPE)


@triton.jit(do_not_specialize=("num_vectors", *_STRIDES))
def gather_bwd_kernel(
    grad_ptr,  # (B, N, C), any strides
    positions_ptr,  # (N)
    found_ptr,  # (2, S)
    grad_features_ptr,  # (B, C, S), or (B, S, C) if CHANNELS_LAST
    num_vectors,
    num_positions,
    channels,
    grad_stride_b,
    grad_stride_n,
    grad_stride_c,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes tiles of the dense gradient."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks = tl.cdiv(num_positions, BLOCK_S) * blocks_c
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    s = (block // blocks_c).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    c = (block % blocks_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = s < num_positions
    last = tl.load(found_ptr + s, inside, -1)
    first = num_vectors - 1 - tl.load(found_ptr + num_positions + s, inside, -1)
    grad_ptr += image * grad_stride_b
    tile = _grad_tile(grad_ptr, first, c, channels, last >= 0, grad_stride_n, grad_stride_c, CHANNELS_LAST)
    repeated = first < last
    begin = tl.min(tl.where(repeated, first, num_vectors)) + 1
    end = tl.max(tl.where(repeated, last, -1)) + 1
    for n in range(begin, end):
        again = repeated & (n > first) & (tl.load(positions_ptr + n) == s)
        vector = tl.zeros([BLOCK_S], tl.int32) + n
        tile += _grad_tile(grad_ptr, vector, c, channels, again, grad_stride_n, grad_stride_c, CHANNELS_LAST)
    tile = narrow(tile, grad_features_ptr.dtype.element_ty)
    if CHANNELS_LAST:
        ptrs = grad_features_ptr + (image * num_positions + s)[:, None] * channels + c[None, :]
        tl.store(ptrs, tile, inside[:, None] & (c < channels)[None, :])
    else:
        ptrs = grad_features_ptr + (image * channels + c)[:, None] * num_positions + s[None, :]
        tl.store(ptrs, tile, (c < channels)[:, None] & inside[None, :])


def gather_vectors_backward(
    grad: Tensor, positions: Tensor, shape: Sequence[int], channels_last: bool
) -> Tensor:
    """As the op."""
    images, channels, *spatial = shape
    num_vectors, num_positions = positions.shape[0], math.prod(spatial)
    if channels_last:
        grad_features = grad.new_empty(images, *spatial, channels).movedim(-1, 1)
    else:
        grad_features = grad.new_empty(*shape)
    launch = SCATTER[channels_last]
    blocks = triton.cdiv(num_positions, launch.block_positions) * triton.cdiv(channels, launch.block_channels)
    if images * blocks == 0:
        return grad_features
    positions = positions.contiguous()
    with on(grad):
        found = _locate(positions, num_positions)
        gather_bwd_kernel[(images * blocks,)](
            grad_ptr=grad,
            positions_ptr=positions,
            found_ptr=found,
            grad_features_ptr=grad_features,
            num_vectors=num_vectors,
            num_positions=num_positions,
            channels=channels,
            grad_stride_b=grad.stride(0),
            grad_stride_n=grad.stride(1),
            grad_stride_c=grad.stride(2),
            CHANNELS_LAST=channels_last,
            BLOCK_S=launch.block_positions,
            BLOCK_C=launch.block_channels,
            num_warps=launch.num_warps,
            enable_fp_fusion=True,
        )
    return grad_features
