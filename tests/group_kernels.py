"""Kernels that mark which tiles of pairs the programs of PDCR compute, when rows are grouped."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels.pdcr.groups import (
    TILE,
    core_around,
    first_step,
    left_of_columns,
    next_row_tile,
    parts_of_rows,
)
from contrastseg_fast.kernels.pdcr.layout import SHARE_ITEM, SHARE_LEAST, SHARE_NUMBER, SHARE_SHARES


@triton.jit
def _mark(counts_ptr, tile, start, stop, skip_first, num_skipped, columns):
    step = start + tl.arange(0, 256)
    column = step + tl.where(step >= skip_first, num_skipped, 0)
    ptrs = counts_ptr + tile * columns + column
    tl.store(ptrs, tl.load(ptrs, step < stop, 0) + 1, step < stop)


@triton.jit
def _backward_kernel(items_ptr, cores_ptr, counts_ptr, parts_ptr, columns, BLOCK_I: tl.constexpr,
                     BLOCK_J: tl.constexpr):  # fmt: skip
    item_ptr = items_ptr + tl.program_id(0) * SHARE_ITEM
    COLUMNS: tl.constexpr = TILE // BLOCK_J
    step = first_step(item_ptr, cores_ptr, BLOCK_I)
    while step >= 0:
        tile, begin, end, following = next_row_tile(item_ptr, cores_ptr, step, BLOCK_I)
        first, number = core_around(cores_ptr, tile * BLOCK_I)
        _mark(
            counts_ptr, tile, (step - begin) * COLUMNS, (end - begin) * COLUMNS,
            first // BLOCK_J, number // BLOCK_J, columns,
        )  # fmt: skip
        ptr = parts_ptr + tl.load(item_ptr + SHARE_NUMBER) + tile
        tl.store(
            ptr, tl.where(tl.load(ptr) < 0, tile.to(tl.int64), 1 << 20)
        )  # two programs must not share one
        step = following


@triton.jit
def _parts_kernel(
    items_ptr, cores_ptr, first_ptr, number_ptr, tiles, BLOCK_I: tl.constexpr, BLOCK: tl.constexpr
):
    tile = tl.arange(0, BLOCK)
    shares, least = tl.load(items_ptr + SHARE_SHARES), tl.load(items_ptr + SHARE_LEAST)
    first, number = parts_of_rows(cores_ptr, tile * BLOCK_I, shares, least, BLOCK_I)
    tl.store(first_ptr + tile, first, tile < tiles)
    tl.store(number_ptr + tile, number, tile < tiles)


@triton.jit
def _forward_kernel(
    cores_ptr, counts_ptr, columns, per_program, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    tile = tl.program_id(0)
    diagonal = tile * BLOCK_I // BLOCK_J
    for chunk in range(diagonal, columns, per_program):
        last = tl.minimum(chunk + per_program, columns)
        first, number, start, stop = left_of_columns(cores_ptr, tile * BLOCK_I, chunk, last, BLOCK_J)
        _mark(counts_ptr, tile, start, stop, first, number, columns)


def mark_backward(
    items: Tensor, cores: Tensor, counts: Tensor, parts: Tensor, block_i: int, block_j: int
) -> None:
    """Add 1 to the counts `(row tiles, column tiles)` of what shares compute; store row tiles at parts."""
    _backward_kernel[(items.numel() // SHARE_ITEM.value,)](
        items, cores, counts, parts, counts.shape[1], block_i, block_j
    )


def parts_of_row_tiles(items: Tensor, cores: Tensor, tiles: int, block_i: int) -> tuple[Tensor, Tensor]:
    """The first part of every row tile, and the number of its parts."""
    first, number = items.new_zeros(tiles), items.new_zeros(tiles)
    _parts_kernel[(1,)](items, cores, first, number, tiles, block_i, triton.next_power_of_2(tiles))
    return first, number


def mark_forward(cores: Tensor, counts: Tensor, per_program: int, block_i: int, block_j: int) -> None:
    """Add 1 to the counts `(row tiles, column tiles)` of what the symmetric forward pass computes."""
    _forward_kernel[(len(counts),)](cores, counts, counts.shape[1], per_program, block_i, block_j)
