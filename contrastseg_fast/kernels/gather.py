"""Gathers vectors from feature maps on a GPU, and writes the dense gradient of a map.

A map is a tensor `(B, C, S)` with S positions: contiguous (positions are neighbours in memory) or
channels-last (channels are). Tiles are read and written along the axis whose elements are neighbours.

The gradient is written once, zeros included. The vector at a position follows from the plan. Of given
positions, each first gets the first and the last of its vectors, by integer atomics whose order does not
matter. Vectors between these two that share the position are found by checking all vectors between. The
library's samplers never repeat a position, so this rarely happens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import narrow, on
from contrastseg_fast.kernels._device_table import Table
from contrastseg_fast.kernels._launch import launch as run_kernel
from contrastseg_fast.kernels.sample_plan import fits, planned_position, planned_vector
from contrastseg_fast.sample_plan import SamplePlan


class Launch(NamedTuple):
    """What one program moves, with four warps."""

    block_positions: int  # or vectors
    block_channels: int
    steps: int = 1  # tiles


# By whether channels are neighbours in memory. All tiles of a program that scatters have the same positions,
# whose vectors it finds once.
GATHER = {False: Launch(32, 32), True: Launch(16, 64)}
SCATTER = {False: Launch(128, 32, 4), True: Launch(32, 64, 4)}
LOCATE = 256  # vectors
MOST_LAYERS = 8  # in one launch, whose code grows with them


class _Record(NamedTuple):
    """The numbers of a map whose gradient is written."""

    images: int
    num_vectors: int
    channels: int
    num_positions: int
    extent_z: int  # of the map along the axes of the plan, and the numbers of vectors along them
    extent_y: int
    extent_x: int
    count_z: int
    count_y: int
    count_x: int


_RECORD = tl.constexpr(len(_Record._fields))
_IMAGES, _NUM_VECTORS, _CHANNELS, _NUM_POSITIONS, _PLAN_AT = (tl.constexpr(k) for k in range(5))

# Sizes may still be specialised for being multiples of 16: rows are then aligned, and written in wide words.
_STRIDES = tuple(f"features_stride_{axis}" for axis in "bcs")
_PLAN = tuple(f"{name}_{axis}" for name in ("extent", "count") for axis in "zyx")


@triton.jit(do_not_specialize=("num_vectors", "num_positions", *_STRIDES, *_PLAN))
def gather_kernel(
    features_ptr,  # (B, C, S), any strides
    positions_ptr,  # (N), or None: planned
    vectors_ptr,  # (B, N, C)
    num_vectors,
    num_positions,
    channels,
    features_stride_b,
    features_stride_c,
    features_stride_s,
    extent_z,
    extent_y,
    extent_x,
    count_z,
    count_y,
    count_x,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copies tiles of vectors. It reads along the positions unless channels are neighbours."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks = tl.cdiv(num_vectors, BLOCK_N) * blocks_c
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    n = (block // blocks_c).to(tl.int64 if WIDE else tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    c = (block % blocks_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    if positions_ptr is None:
        position = planned_position(n, extent_z, extent_y, extent_x, count_z, count_y, count_x).to(tl.int64)
        inside = n < num_vectors
    else:
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


def _numbers(plan: SamplePlan | None) -> tuple[int, ...]:
    """What kernels take of a plan: the numbers of three axes."""
    return (1,) * 6 if plan is None else tuple(plan.three().numbers)


def gather_vectors(features: Tensor, positions: Tensor | None, plan: Sequence[int]) -> Tensor:
    """As the op."""
    made = SamplePlan.from_numbers(plan) if positions is None else None
    flat = features.flatten(2)  # a view of contiguous and channels-last maps
    images, channels, num_positions = flat.shape
    num_vectors = made.num_vectors if positions is None else positions.shape[0]  # type: ignore[union-attr]
    vectors = features.new_empty((images, num_vectors, channels))
    channels_last = flat.stride(1) == 1 and flat.stride(2) != 1
    launch = GATHER[channels_last]
    blocks = triton.cdiv(num_vectors, launch.block_positions) * triton.cdiv(channels, launch.block_channels)
    if images * blocks > 0:
        with on(features):
            run_kernel(
                gather_kernel,
                (images * blocks,),
                (flat, None if positions is None else positions.contiguous(), vectors),
                (num_vectors, num_positions, channels, *flat.stride(), *_numbers(made)),
                {
                    "WIDE": made is not None and not fits(made),
                    "CHANNELS_LAST": channels_last,
                    "BLOCK_N": launch.block_positions,
                    "BLOCK_C": launch.block_channels,
                    "num_warps": 4,
                    "enable_fp_fusion": True,
                },
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
        run_kernel(
            locate_kernel,
            (triton.cdiv(num_vectors, LOCATE),),
            (positions, found),
            (num_vectors, num_positions),
            {"BLOCK_N": LOCATE, "num_warps": 4, "enable_fp_fusion": True},
        )
    return found


@triton.jit
def _grad_tile(grad_ptr, n, c, channels, present, CHANNELS_LAST: tl.constexpr):
    """The gradients of one vector for every position of a tile."""
    rows = n.to(tl.int64) * channels
    if CHANNELS_LAST:
        ptrs = grad_ptr + rows[:, None] + c[None, :]  # [BLOCK_S, BLOCK_C]
        mask = present[:, None] & (c < channels)[None, :]
    else:
        ptrs = grad_ptr + rows[None, :] + c[:, None]  # [BLOCK_C, BLOCK_S]
        mask = (c < channels)[:, None] & present[None, :]
    return tl.load(ptrs, mask, 0)


@triton.jit
def _scatter(
    program,
    grad_ptr,  # (B, N, C)
    positions_ptr,  # (N), or None: planned
    found_ptr,  # (2, S), or None: planned
    grad_features_ptr,  # (B, C, S), or (B, S, C) if CHANNELS_LAST
    record_ptr,
    num_positions,
    channels,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Writes some tiles of the dense gradient, all of the same positions."""
    DTYPE: tl.constexpr = grad_features_ptr.dtype.element_ty
    ACCUMULATION: tl.constexpr = tl.float64 if DTYPE.primitive_bitwidth == 64 else tl.float32
    INTEGER: tl.constexpr = tl.int64 if WIDE else tl.int32
    images = tl.load(record_ptr + _IMAGES).to(tl.int32)
    num_vectors = tl.load(record_ptr + _NUM_VECTORS).to(tl.int32)
    blocks_s = tl.cdiv(num_positions, BLOCK_S)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    s = (program % blocks_s).to(INTEGER) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    inside = s < num_positions
    if found_ptr is None:
        first = planned_vector(
            s,
            tl.load(record_ptr + _PLAN_AT).to(INTEGER),
            tl.load(record_ptr + _PLAN_AT + 1).to(INTEGER),
            tl.load(record_ptr + _PLAN_AT + 2).to(INTEGER),
            tl.load(record_ptr + _PLAN_AT + 3).to(INTEGER),
            tl.load(record_ptr + _PLAN_AT + 4).to(INTEGER),
            tl.load(record_ptr + _PLAN_AT + 5).to(INTEGER),
        )
        present = inside & (first >= 0)
    else:
        last = tl.load(found_ptr + s, inside, -1)
        first = num_vectors - 1 - tl.load(found_ptr + num_positions + s, inside, -1)
        present = last >= 0
        repeated = first < last
        begin = tl.min(tl.where(repeated, first, num_vectors)) + 1
        end = tl.max(tl.where(repeated, last, -1)) + 1
    begin_tile = program // blocks_s * STEPS
    for tile_number in range(begin_tile, min(begin_tile + STEPS, images * blocks_c)):
        image = (tile_number // blocks_c).to(tl.int64)
        c = tile_number % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        ptr = grad_ptr + image * num_vectors * channels
        tile = _grad_tile(ptr, first, c, channels, present, CHANNELS_LAST)
        if found_ptr is not None:
            tile = tile.to(ACCUMULATION)
            for n in range(begin, end):
                again = repeated & (n > first) & (tl.load(positions_ptr + n) == s)
                vector = tl.zeros([BLOCK_S], tl.int32) + n
                tile += _grad_tile(ptr, vector, c, channels, again, CHANNELS_LAST)
            tile = narrow(tile, DTYPE)
        out = grad_features_ptr + image * num_positions * channels
        if CHANNELS_LAST:
            ptrs = out + (s.to(tl.int64) * channels)[:, None] + c[None, :]
            tl.store(ptrs, tile, inside[:, None] & (c < channels)[None, :])
        else:
            ptrs = out + (c.to(tl.int64) * num_positions)[:, None] + s[None, :]
            tl.store(ptrs, tile, (c < channels)[:, None] & inside[None, :])


@triton.jit
def gather_bwd_kernel(
    grad_ptrs,  # each a tuple with an entry for every layer, which `_scatter` takes
    positions_ptrs,
    found_ptrs,
    grad_features_ptrs,
    records_ptr,  # one `_Record` for every layer
    WORDS: tl.constexpr,  # for every layer: whether rows of the gradient begin at multiples of 16 elements
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Writes the dense gradients of several maps, those of one after those of another."""
    program = tl.program_id(0)
    for layer in tl.static_range(len(WIDE)):
        record_ptr = records_ptr + layer * _RECORD
        num_positions = tl.load(record_ptr + _NUM_POSITIONS).to(tl.int64 if WIDE[layer] else tl.int32)
        channels = tl.load(record_ptr + _CHANNELS).to(tl.int32)
        if WORDS[layer]:
            num_positions, channels = tl.multiple_of(num_positions, 16), tl.multiple_of(channels, 16)
        tiles = tl.load(record_ptr + _IMAGES).to(tl.int32) * tl.cdiv(channels, BLOCK_C[layer])
        programs = (tl.cdiv(num_positions, BLOCK_S[layer]) * tl.cdiv(tiles, STEPS[layer])).to(tl.int32)
        if (program >= 0) & (program < programs):
            _scatter(
                program,
                grad_ptrs[layer],
                positions_ptrs[layer],
                found_ptrs[layer],
                grad_features_ptrs[layer],
                record_ptr,
                num_positions,
                channels,
                WIDE[layer],
                CHANNELS_LAST[layer],
                BLOCK_S[layer],
                BLOCK_C[layer],
                STEPS[layer],
            )
        program -= programs


class _Layer(NamedTuple):
    grad: Tensor
    positions: Tensor | None
    plan: SamplePlan | None
    channels_last: bool
    grad_features: Tensor

    @property
    def launch(self) -> Launch:
        return SCATTER[self.channels_last]

    @property
    def num_positions(self) -> int:
        return math.prod(self.grad_features.shape[2:])

    @property
    def programs(self) -> int:
        tiles = self.grad.shape[0] * triton.cdiv(self.grad.shape[2], self.launch.block_channels)
        return triton.cdiv(self.num_positions, self.launch.block_positions) * triton.cdiv(
            tiles, self.launch.steps
        )

    @property
    def is_wide(self) -> bool:
        """Whether positions are counted in int64."""
        return self.num_positions >= 2**30 or (self.plan is not None and not fits(self.plan))

    @property
    def in_words(self) -> bool:
        return self.num_positions % 16 == 0 and self.grad.shape[2] % 16 == 0

    @property
    def record(self) -> _Record:
        images, num_vectors, channels = self.grad.shape
        return _Record(images, num_vectors, channels, self.num_positions, *_numbers(self.plan))


@functools.lru_cache(maxsize=1024)
def _records(records: tuple[_Record, ...]) -> Table:
    return Table(records)


def scatter_gradients(
    grads: Sequence[Tensor],
    positions: Sequence[Tensor | None],
    plans: Sequence[SamplePlan | None],
    shapes: Sequence[Sequence[int]],
    channels_last: Sequence[bool],
) -> list[Tensor]:
    """The dense gradients of several maps, in one launch.

    Args:
        grads: of the vectors of each map `(B, N, C)`, contiguous.
        positions: of the vectors of each map `(N,)`, or None where they are planned.
        plans: the plan of each map, or None where positions are given.
        shapes: of each map `(B, C, *spatial)`.
        channels_last: whether the gradient of each map is to be channels-last.

    Returns:
        for each map its gradient, in the dtype of the vectors' gradient.
    """
    results, layers = [], []
    for grad, given, plan, shape, last in zip(grads, positions, plans, shapes, channels_last, strict=True):
        images, channels, *spatial = shape
        if last:
            result = grad.new_empty((images, *spatial, channels)).movedim(-1, 1)
        else:
            result = grad.new_empty(shape)
        results.append(result)
        if result.numel() > 0:
            given = None if given is None else given.contiguous()
            layers.append(_Layer(grad, given, plan, last, result))
    for begin in range(0, len(layers), MOST_LAYERS):
        _launch(layers[begin : begin + MOST_LAYERS])
    return results


def _launch(layers: list[_Layer]) -> None:
    with on(layers[0].grad):
        found = [
            None if layer.positions is None else _locate(layer.positions, layer.num_positions)
            for layer in layers
        ]
        run_kernel(
            gather_bwd_kernel,
            (sum(layer.programs for layer in layers),),
            (
                tuple(layer.grad for layer in layers),
                tuple(layer.positions for layer in layers),
                tuple(found),
                tuple(layer.grad_features for layer in layers),
                _records(tuple(layer.record for layer in layers)).on(layers[0].grad.device),
            ),
            (),
            {
                "WORDS": tuple(layer.in_words for layer in layers),
                "WIDE": tuple(layer.is_wide for layer in layers),
                "CHANNELS_LAST": tuple(layer.channels_last for layer in layers),
                "BLOCK_S": tuple(layer.launch.block_positions for layer in layers),
                "BLOCK_C": tuple(layer.launch.block_channels for layer in layers),
                "STEPS": tuple(layer.launch.steps for layer in layers),
                "num_warps": 4,
                "enable_fp_fusion": True,
            },
        )


def gather_vectors_backward(
    grad: Tensor, positions: Tensor | None, plan: Sequence[int], shape: Sequence[int], channels_last: bool
) -> Tensor:
    """As the op."""
    made = SamplePlan.from_numbers(plan) if positions is None else None
    return scatter_gradients([grad.contiguous()], [positions], [made], [shape], [channels_last])[0]
