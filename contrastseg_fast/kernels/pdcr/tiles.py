"""What the kernels of PDCR share: excluded rows, tiles of rows, distances and exponents of pairs."""

from __future__ import annotations

import math

import triton
import triton.language as tl

EXCLUDED = tl.constexpr(-1.0)  # the scale of an excluded row; all others are at least 0
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def is_excluded(scale):
    """Whether rows are excluded from all pairs, told by their scales."""
    return scale < 0


@triton.jit
def load_rows(rows_ptr, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of packed rows, [BLOCK, WIDTH]."""
    first = tl.cast(tile, tl.int64) * (BLOCK * WIDTH)
    return tl.load(rows_ptr + first + tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _add_distance(distance, phi_ptr, i, j):
    """The distances of one class added to those of others."""
    phi_i = tl.load(phi_ptr + i)  # [BLOCK_I]
    phi_j = tl.load(phi_ptr + j)  # [BLOCK_J]
    return distance + tl.abs(phi_i[:, None] - phi_j[None, :])


@triton.jit
def distances(
    phi_ptr,
    i,
    j,
    padded,
    num_classes,
    unequal,  # the distance of different categories
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
):
    """Scaled class distances of a tile. Classes after the first `CLASSES` take a loop at run time."""
    if CATEGORICAL:
        differ = tl.load(phi_ptr + i)[:, None] != tl.load(phi_ptr + j)[None, :]  # [BLOCK_I, BLOCK_J]
        return tl.where(differ, unequal, 0.0)
    distance = tl.abs(tl.load(phi_ptr + i)[:, None] - tl.load(phi_ptr + j)[None, :])
    for m in tl.static_range(1, CLASSES):
        distance = _add_distance(distance, phi_ptr + m * padded, i, j)
    if MORE_CLASSES:  # noqa: SIM102
        # Always true; but where a loop stands directly within the loop over tiles, nothing is copied ahead.
        if num_classes > CLASSES:
            for further in range(CLASSES, num_classes):
                distance = _add_distance(distance, phi_ptr + further * padded, i, j)
    return distance


@triton.jit
def exponents(similarity, distance, bias, slope, shift):
    """t of a tile, and x d, unless exponents are plain."""
    x = similarity - shift
    return x * (bias + slope * distance), x * distance
