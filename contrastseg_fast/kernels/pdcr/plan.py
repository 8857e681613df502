"""What the kernels of PDCR are launched with: tiles by card and width, and the terms of an affinity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from contrastseg_fast.affinity import Affinity
from contrastseg_fast.kernels._common import processors, sm_table
from contrastseg_fast.kernels._tuning import Launch, tuned

PADDING = 128  # rows are padded to a multiple of it, and so of every BLOCK_I and BLOCK_J
NARROWEST_FUSED, WIDEST_FUSED = 32, 256  # channels; of fewer, no thread would copy 16 bytes of a tile
_UNROLLED_CLASSES = 8
_LARGEST_EXPONENT = 85.0  # of e; sums of that many exponentials stay finite in fp32


class RowLaunch(NamedTuple):
    """What one program of the kernels over rows takes."""

    block_n: int
    block_c: int
    num_warps: int


# By compute capability; then whether the kernel takes the fewest registers (plain exponents, at most two
# classes, no logarithms); then by padded channels: the next larger entry serves.
FORWARD = {
    80: {
        True: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
        False: {64: Launch(128, 64, 8, 3), 256: Launch(64, 64, 4, 2)},
    },
    90: {
        True: {64: Launch(128, 128, 8, 3), 256: Launch(128, 128, 8, 2)},
        False: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
    },
    100: {
        True: {64: Launch(128, 128, 8, 3), 256: Launch(128, 128, 8, 2)},
        False: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
    },
}
BACKWARD = {
    80: {
        True: {64: Launch(128, 64, 8, 3), 128: Launch(64, 64, 4, 2), 256: Launch(64, 64, 8, 2)},
        False: {256: Launch(64, 64, 8, 2)},
    },
    90: {
        True: {64: Launch(128, 128, 8, 3), 128: Launch(128, 128, 8, 2), 256: Launch(128, 64, 8, 3)},
        False: {128: Launch(128, 64, 8, 2), 256: Launch(128, 32, 8, 2)},
    },
    100: {
        True: {128: Launch(128, 64, 8, 2), 256: Launch(128, 64, 8, 2)},
        False: {128: Launch(128, 64, 8, 2), 256: Launch(128, 64, 8, 2)},
    },
}
# What tuning tries, for every shape.
CANDIDATES = [
    Launch(block_i, block_j, num_warps, num_stages)
    for block_i, block_j in ((128, 128), (128, 64), (128, 32), (64, 64), (64, 32))
    for num_warps in (4, 8)
    for num_stages in (2, 3, 4)
]
SLAB_FORWARD = Launch(32, 128, 4, 1)
SLAB_PAIRS = Launch(32, 128, 4, 1)
ROWS = RowLaunch(16, 128, 4)


class Terms(NamedTuple):
    """What the kernels take of an affinity. Dictionaries are by the names of the kernels' arguments."""

    plain: bool  # t = x d log2(e) / tau, with log2(e) / tau in the packed ratios
    bounded: bool  # no sum of exponentials can leave the range of fp32
    phi_scale: float  # of the packed ratios
    modes: dict[str, Any]  # constexprs of all kernels over tiles
    exponent: dict[str, float]  # t and d, in all kernels over tiles
    pair_weight: dict[str, float]  # the bracket of g
    loss: dict[str, float]
    gradient: dict[str, float]


def terms_of(affinity: Affinity, vectors: Tensor, num_classes: int) -> Terms:
    """The terms of an affinity for vectors `(B, N, C)` with ratios of M classes."""
    num_vectors = vectors.shape[1]
    temperature, distance_scale, categorical, num_bias, num_slope, den_bias, den_slope, shift = affinity
    factor = math.log2(math.e) / temperature
    farthest = 1.0 if categorical else distance_scale * num_classes
    weight = max(abs(den_bias), abs(den_bias + den_slope * farthest))
    largest = weight * (1 + abs(shift)) / temperature + math.log(max(num_vectors, 1))
    plain = den_bias == 0 and den_slope == 1 and shift == 0
    unit = factor if plain else 1.0  # what the kernels' distances are multiples of
    separate_bias = 0.0  # the part of num_bias that stays out of the pair weights
    if plain and not categorical:  # most categories are unlike: their weights are smallest with all of it
        separate_bias = num_bias / 4  # by trial
    exponent = {"bias": den_bias * factor, "slope": den_slope * factor, "shift": shift, "unequal": unit}
    bits = _surplus_bits(vectors.dtype, exponent, factor, num_vectors)
    return Terms(
        plain=plain,
        bounded=largest <= _LARGEST_EXPONENT,
        phi_scale=1.0 if categorical else distance_scale * unit,
        modes={
            "CLASSES": num_classes if num_classes <= _UNROLLED_CLASSES else 1,
            "MORE_CLASSES": num_classes > _UNROLLED_CLASSES,
            "CATEGORICAL": categorical,
            "PLAIN": plain,
        },
        exponent=exponent,
        pair_weight={
            "pull": -2 * num_slope * (1.0 if plain else factor),
            "offset": -2 * (num_bias - separate_bias) * factor,
            "weight_scale": 2.0**-bits / factor,
        },
        loss={
            "inverse_temperature": 1 / temperature,
            "num_bias": num_bias,
            "attraction_scale": num_slope / unit,
            "shift": shift,
        },
        gradient={
            "separate_bias": separate_bias,
            "g_scale": 2.0**bits,
            "inverse_temperature": 1 / temperature,
        },
    )


def _surplus_bits(dtype: torch.dtype, exponent: dict[str, float], factor: float, num_vectors: int) -> int:
    """The power of two that pair weights are divided by before they are rounded, so that fp16 holds them."""
    if dtype != torch.float16:
        return 0
    bias, slope = exponent["bias"], exponent["slope"]
    largest = 2 * num_vectors * max(abs(bias), abs(bias + slope), factor) / factor
    return max(0, math.ceil(math.log2(max(largest, 1)) - 14))


def is_fused(vectors: Tensor) -> bool:
    """Whether the fused kernels take these vectors; else they go through slabs."""
    return vectors.dtype in (torch.float16, torch.bfloat16) and vectors.shape[2] <= WIDEST_FUSED


def packed_shape(vectors: Tensor) -> tuple[int, int, int]:
    """B, P and width of the packed rows."""
    batch, num_vectors, channels = vectors.shape
    width = 8 * triton.cdiv(channels, 8)
    if is_fused(vectors):
        width = max(NARROWEST_FUSED, triton.next_power_of_2(channels))
    return batch, PADDING * triton.cdiv(num_vectors, PADDING), width


def choose_launch(
    table: dict[int, dict[bool, dict[int, Launch]]],
    rows: Tensor,
    num_classes: int,
    plain: bool,
    logged: bool,
    run: Callable[[Launch], object],
) -> Launch:
    """The table's entry for packed rows `(B, P, width)`, or the fastest launch if tuning is requested.

    Args:
        table: `FORWARD` or `BACKWARD`.
        logged: whether the kernel works with logarithms of sums of exponentials.
        run: as for `tuned`.
    """
    width = rows.shape[2]
    by_width = sm_table(table, rows)[plain and num_classes <= 2 and not logged]
    entry = by_width[min(entry for entry in by_width if entry >= width)]
    name = "pdcr_fwd" if table is FORWARD else "pdcr_bwd"
    classes = min(num_classes, _UNROLLED_CLASSES + 1)
    family = f"{name} {rows.dtype} width {width} classes {classes} {plain=} {logged=}"
    return tuned(family, entry, CANDIDATES, rows, run)


def tiles_per_program(rows: Tensor, launch: Launch, symmetric: bool) -> int:
    """Column tiles that a program of the forward pass sums up, of packed rows `(B, P, width)`."""
    batch, padded, _ = rows.shape
    row_tiles, column_tiles = padded // launch.block_i, padded // launch.block_j
    if not symmetric:
        return column_tiles
    pairs = batch * row_tiles * (column_tiles + 1) // 2
    return min(max(pairs // (8 * processors(rows)), 1), 16)


def tile_options(launch: Launch) -> dict[str, Any]:
    """Constexprs and options of a kernel over tiles."""
    return {
        "BLOCK_I": launch.block_i,
        "BLOCK_J": launch.block_j,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }


def row_options() -> dict[str, Any]:
    """Constexprs and options of a kernel over rows."""
    return {
        "BLOCK_N": ROWS.block_n,
        "BLOCK_C": ROWS.block_c,
        "num_warps": ROWS.num_warps,
        "enable_fp_fusion": True,
    }
