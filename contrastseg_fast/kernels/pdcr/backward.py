"""The backward pass over pairs: g of every row, from the weights of all pairs, without its constant part."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast import _backend
from contrastseg_fast.kernels._common import capability, dot, dot_add, narrow
from contrastseg_fast.kernels._launch import launch as run_kernel
from contrastseg_fast.kernels._tuning import Launch
from contrastseg_fast.kernels.pdcr import layout, plan, slabs
from contrastseg_fast.kernels.pdcr.groups import TILE, core_around, first_step, next_row_tile
from contrastseg_fast.kernels.pdcr.layout import (
    CORES,
    COUNT,
    LOG_Z,
    LOG_Z_OF_ROWS,
    PADDED,
    PHI,
    RECORD,
    ROWS,
    SCALE,
    SHARE_IMAGE,
    SHARE_ITEM,
    SHARE_NUMBER,
    SHARE_OUT,
    SHARE_WIDTH,
    STATS,
    TILE_IMAGE,
    TILE_ITEM,
    TILE_OUT,
    TILE_ROW_TILE,
    TILE_START,
    TILE_STOP,
    TILE_WIDTH,
)
from contrastseg_fast.kernels.pdcr.rows import Packed
from contrastseg_fast.kernels.pdcr.tiles import distances, load_rows, pair_weight, z_term
from contrastseg_fast.problems import Call


class PairSums(NamedTuple):
    """g times the scale of its row, in parts that are still to be added."""

    g: Tensor  # fp32
    spans: Tensor  # (images, 2): where the parts `(parts, P, width)` of an image begin, and how many they are
    block_i: int = 0  # of grouped rows: the height of parts, whose spans are `layout.shares`


@triton.jit
def multiply_row_tile(
    rows_ptr,
    scale_ptr,
    phi_ptr,
    log_z_ptr,
    stats_ptr,
    tile,
    start,  # column tiles, counted without those that are skipped
    stop,
    skip_first,
    num_skipped,
    padded,
    count,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    log_weight_scale,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One part of g of a row tile from some column tiles; also the rows of the row tile and their scales."""
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    rows_i = load_rows(rows_ptr, tile, WIDTH, BLOCK_I)  # [BLOCK_I, WIDTH]
    scale_i = tl.load(scale_ptr + i)  # [BLOCK_I]
    z_term_i = z_term(log_z_ptr, stats_ptr, i, count, scale_i, log_weight_scale, BOUNDED)  # [BLOCK_I]
    g = tl.zeros([BLOCK_I, WIDTH], tl.float32)
    for step in range(start, stop):
        column_tile = step + tl.where(step >= skip_first, num_skipped, 0)
        j = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        scale_j = tl.load(scale_ptr + j)  # [BLOCK_J]
        z_term_j = z_term(log_z_ptr, stats_ptr, j, count, scale_j, log_weight_scale, BOUNDED)  # [BLOCK_J]
        rows_j = load_rows(rows_ptr, column_tile, WIDTH, BLOCK_J)  # [BLOCK_J, WIDTH]
        product = dot(rows_i, tl.trans(rows_j))  # [BLOCK_I, BLOCK_J]
        distance = distances(phi_ptr, i, j, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL)
        weight = pair_weight(
            product,
            distance,
            scale_i,
            scale_j,
            z_term_i,
            z_term_j,
            bias,
            slope,
            shift,
            pull,
            offset,
            PLAIN,
            BOUNDED,
        )
        g = dot_add(narrow(weight, rows_ptr.dtype.element_ty), rows_j, g)
    return g, rows_i, scale_i


@triton.jit
def _store_part(g_ptr, g, scale):
    """Stores a part of g [BLOCK_I, WIDTH], times the scales of its rows."""
    offsets = tl.arange(0, g.shape[0])[:, None] * g.shape[1] + tl.arange(0, g.shape[1])[None, :]
    tl.store(g_ptr + offsets, g * scale[:, None])


@triton.jit(do_not_specialize=["num_classes"])
def pdcr_bwd_kernel(
    items_ptr,
    records_ptr,
    rows_ptr,
    floats_ptr,
    log_z_ptr,
    g_ptr,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    log_weight_scale,  # to base 2, of what scales the pair weights before they are rounded
    WIDTHS: tl.constexpr,  # of the problems, in ascending order
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One part of g times the scale of its row, for a row tile of one image over some column tiles."""
    item_ptr = items_ptr + tl.program_id(0) * TILE_ITEM
    record_ptr = records_ptr + tl.load(item_ptr + TILE_IMAGE) * RECORD
    width_number = tl.load(item_ptr + TILE_WIDTH)
    rows_ptr += tl.multiple_of(tl.load(record_ptr + ROWS), 64)
    for number in tl.static_range(len(WIDTHS)):
        if width_number == number:
            g, _, scale = multiply_row_tile(
                rows_ptr,
                floats_ptr + tl.multiple_of(tl.load(record_ptr + SCALE), 64),
                floats_ptr + tl.multiple_of(tl.load(record_ptr + PHI), 64),
                log_z_ptr + tl.load(record_ptr + LOG_Z),
                floats_ptr + tl.load(record_ptr + STATS),
                tl.load(item_ptr + TILE_ROW_TILE).to(tl.int32),
                tl.load(item_ptr + TILE_START).to(tl.int32),
                tl.load(item_ptr + TILE_STOP).to(tl.int32),
                0,
                0,
                tl.load(record_ptr + PADDED).to(tl.int32),
                tl.load(record_ptr + COUNT).to(tl.int32),
                num_classes,
                bias,
                slope,
                shift,
                unequal,
                pull,
                offset,
                log_weight_scale,
                WIDTHS[number],
                CLASSES,
                MORE_CLASSES,
                CATEGORICAL,
                PLAIN,
                BOUNDED,
                BLOCK_I,
                BLOCK_J,
            )
            _store_part(g_ptr + tl.multiple_of(tl.load(item_ptr + TILE_OUT), 64), g, scale)


@triton.jit
def _multiply_share(
    item_ptr,
    record_ptr,
    rows_ptr,
    floats_ptr,
    g_ptr,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    log_weight_scale,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """The parts of g of all row tiles that a share has steps of.

    Everything is loaded again for every row tile: the products need the registers.
    """
    COLUMNS: tl.constexpr = TILE // BLOCK_J  # of a step
    step = first_step(item_ptr, floats_ptr + tl.load(record_ptr + CORES), BLOCK_I)
    while step >= 0:
        cores_ptr = floats_ptr + tl.load(record_ptr + CORES)
        tile, begin, end, following = next_row_tile(item_ptr, cores_ptr, step, BLOCK_I)
        skip_first, num_skipped = core_around(cores_ptr, tile * BLOCK_I)
        part = (tl.load(item_ptr + SHARE_NUMBER) + tile) * (BLOCK_I * WIDTH)
        g, _, scale = multiply_row_tile(
            rows_ptr + tl.multiple_of(tl.load(record_ptr + ROWS), 64),
            floats_ptr + tl.multiple_of(tl.load(record_ptr + SCALE), 64),
            floats_ptr + tl.multiple_of(tl.load(record_ptr + PHI), 64),
            floats_ptr + tl.load(record_ptr + LOG_Z_OF_ROWS),
            floats_ptr + tl.load(record_ptr + STATS),
            tile,
            (step - begin) * COLUMNS,
            (end - begin) * COLUMNS,
            skip_first // BLOCK_J,
            num_skipped // BLOCK_J,
            tl.load(record_ptr + PADDED).to(tl.int32),
            tl.load(record_ptr + COUNT).to(tl.int32),
            num_classes,
            bias,
            slope,
            shift,
            unequal,
            pull,
            offset,
            log_weight_scale,
            WIDTH,
            CLASSES,
            MORE_CLASSES,
            CATEGORICAL,
            PLAIN,
            BOUNDED,
            BLOCK_I,
            BLOCK_J,
        )
        _store_part(g_ptr + tl.multiple_of(tl.load(item_ptr + SHARE_OUT), 64) + part, g, scale)
        step = following


@triton.jit(do_not_specialize=["num_classes"])
def pdcr_bwd_groups_kernel(
    items_ptr,
    records_ptr,
    rows_ptr,
    floats_ptr,
    g_ptr,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    log_weight_scale,
    WIDTHS: tl.constexpr,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """As `pdcr_bwd_kernel`, for a share of the steps of an image whose rows are grouped (groups.py)."""
    item_ptr = items_ptr + tl.program_id(0) * SHARE_ITEM
    record_ptr = records_ptr + tl.load(item_ptr + SHARE_IMAGE) * RECORD
    width_number = tl.load(item_ptr + SHARE_WIDTH)
    for number in tl.static_range(len(WIDTHS)):
        if width_number == number:
            _multiply_share(
                item_ptr,
                record_ptr,
                rows_ptr,
                floats_ptr,
                g_ptr,
                num_classes,
                bias,
                slope,
                shift,
                unequal,
                pull,
                offset,
                log_weight_scale,
                WIDTHS[number],
                CLASSES,
                MORE_CLASSES,
                CATEGORICAL,
                PLAIN,
                BOUNDED,
                BLOCK_I,
                BLOCK_J,
            )


@functools.cache
def overlapped_kernels() -> ModuleType | None:
    """The kernels in Gluon; None where this Triton does not have all that they need, or interprets."""
    if _backend.interpreting():
        return None
    try:
        from contrastseg_fast.kernels.pdcr import hopper
    except (ImportError, AttributeError):  # a Triton without Gluon, or with other names in it
        return None
    return hopper


def _fused_kernel(call: Call, packed: Packed, terms: plan.Terms, launch: Launch) -> Any:
    """The kernel that an overlapped launch names if it serves the call on this card, else Triton's."""
    if (
        launch.overlapped
        and capability(packed.rows) == 90
        and layout.fused_widths(call) in ((128,), (256,))
        and terms.plain
        and terms.bounded
        and not terms.modes["MORE_CLASSES"]
    ):
        kernels = overlapped_kernels()
        if kernels is not None:
            return kernels.pdcr_bwd_groups_hopper_kernel if call.grouped else kernels.pdcr_bwd_hopper_kernel
    return pdcr_bwd_groups_kernel if call.grouped else pdcr_bwd_kernel


def _multiply_tiles(call: Call, packed: Packed, log_z: Tensor, terms: plan.Terms, launch: Launch) -> PairSums:
    """By the fused kernel; of grouped rows, without the pairs that they skip."""
    device = packed.rows.device
    if call.grouped:
        tiles = layout.shares(call, plan.ROWS, launch, plan.one_wave(call, launch, packed.rows))
    else:
        per_program = plan.columns_per_program("backward", call, launch, packed.rows)
        tiles = layout.backward_tiles(call, plan.ROWS, launch, per_program)
    g = packed.floats.new_empty((tiles.numbers,))
    run_kernel(
        _fused_kernel(call, packed, terms, launch),
        (len(tiles.items),),
        (
            tiles.items.on(device),
            layout.lay_out(call, plan.ROWS).records.on(device),
            packed.rows,
            packed.floats,
            *(() if call.grouped else (log_z,)),  # that of grouped rows is in floats, in their order
            g,
        ),
        (
            call.num_compared,
            *terms.exponent.values(),
            *terms.pair_weight.values(),
        ),
        {
            "WIDTHS": layout.fused_widths(call),
            **terms.modes,
            "BOUNDED": terms.bounded,
            **plan.tile_options(launch),
        },
    )
    return PairSums(g, tiles.spans.on(device), launch.block_i if call.grouped else 0)


@triton.jit(do_not_specialize=["first_image", "num_classes"])
def pdcr_pairs_kernel(
    slab_ptr,  # (B, slab rows, P - first_row), products of packed rows
    weights_ptr,  # the same shape; may be slab_ptr
    records_ptr,
    floats_ptr,
    log_z_ptr,
    first_image,  # of the problem
    first_row,
    slab_stride_b,
    slab_stride_n,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    log_weight_scale,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A slab's pair weights times the scales of both rows; its columns begin at its first row."""
    tile = tl.program_id(1)
    column_tile = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    record_ptr = records_ptr + (first_image + image) * RECORD
    padded = tl.load(record_ptr + PADDED).to(tl.int32)
    count = tl.load(record_ptr + COUNT).to(tl.int32)
    scale_ptr = floats_ptr + tl.multiple_of(tl.load(record_ptr + SCALE), 64)
    phi_ptr = floats_ptr + tl.multiple_of(tl.load(record_ptr + PHI), 64)
    log_z_ptr += tl.load(record_ptr + LOG_Z)
    stats_ptr = floats_ptr + tl.load(record_ptr + STATS)
    row = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    column = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
    offsets = image * slab_stride_b + row.to(tl.int64)[:, None] * slab_stride_n + column[None, :]
    i, j = first_row + row, first_row + column
    inside = (j < padded)[None, :]
    j = tl.minimum(j, padded - 1)
    scale_i, scale_j = tl.load(scale_ptr + i), tl.load(scale_ptr + j)
    product = tl.load(slab_ptr + offsets, inside, 0.0)  # [BLOCK_I, BLOCK_J]
    distance = distances(phi_ptr, i, j, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL)
    weight = pair_weight(
        product,
        distance,
        scale_i,
        scale_j,
        z_term(log_z_ptr, stats_ptr, i, count, scale_i, log_weight_scale, BOUNDED),
        z_term(log_z_ptr, stats_ptr, j, count, scale_j, log_weight_scale, BOUNDED),
        bias,
        slope,
        shift,
        pull,
        offset,
        PLAIN,
        BOUNDED,
    )
    weight = weight * scale_i[:, None]
    tl.store(weights_ptr + offsets, narrow(weight, weights_ptr.dtype.element_ty), inside)


def _multiply_slabs(call: Call, packed: Packed, log_z: Tensor, terms: plan.Terms) -> PairSums:
    """From slabs, whose products are written by cuBLAS."""
    laid_out, device = layout.lay_out(call, plan.ROWS), log_z.device
    g = torch.zeros_like(packed.rows, dtype=torch.float32)  # where packed rows lie
    launch = plan.SLAB_PAIRS
    for (first_image, rows), (_, sums) in zip(
        slabs.problem_rows(laid_out, packed.rows), slabs.problem_rows(laid_out, g), strict=True
    ):
        for first, _, slab in slabs.similarities(rows, lambda first_row: first_row):
            height, columns = slab.shape[1:]
            weights = slab if rows.dtype == torch.float32 else torch.empty_like(slab, dtype=rows.dtype)
            run_kernel(
                pdcr_pairs_kernel,
                (triton.cdiv(columns, launch.block_j), height // launch.block_i, len(rows)),
                (
                    slab,
                    weights,
                    laid_out.records.on(device),
                    packed.floats,
                    log_z,
                ),
                (
                    first_image,
                    first,
                    slab.stride(0),
                    slab.stride(1),
                    call.num_compared,
                    *terms.exponent.values(),
                    *terms.pair_weight.values(),
                ),
                {**terms.modes, "BOUNDED": terms.bounded, **plan.tile_options(launch)},
            )
            last = first + height
            slabs.add_product(sums[:, first:last], weights, rows[:, first:])
            if columns > height:
                slabs.add_product(sums[:, last:], weights[:, :, height:].mT, rows[:, first:last])
    return PairSums(g, layout.whole_rows(call, plan.ROWS).on(device))


def multiply_pairs(call: Call, packed: Packed, log_z: Tensor, terms: plan.Terms) -> PairSums:
    """g of all rows, from their pair weights."""
    if not call.fused:
        return _multiply_slabs(call, packed, log_z, terms)
    multiply = functools.partial(_multiply_tiles, call, packed, log_z, terms)
    return multiply(
        plan.choose_launch("backward", call, packed.rows, terms.plain, not terms.bounded, multiply)
    )
