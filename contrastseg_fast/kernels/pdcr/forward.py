"""The forward pass of PDCR: sums of exponentials of all rows, and the loss of every image."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import dot
from contrastseg_fast.kernels._launch import launch as run_kernel
from contrastseg_fast.kernels._tuning import Launch
from contrastseg_fast.kernels.pdcr import layout, plan, slabs
from contrastseg_fast.kernels.pdcr.groups import left_of_columns
from contrastseg_fast.kernels.pdcr.layout import (
    CORES,
    PADDED,
    PHI,
    RECORD,
    ROWS,
    SCALE,
    TILE_IMAGE,
    TILE_ITEM,
    TILE_OUT,
    TILE_ROW_TILE,
    TILE_START,
    TILE_STOP,
    TILE_WIDTH,
    Z,
)
from contrastseg_fast.kernels.pdcr.loss import Losses, finish_after_tiles, write_loss
from contrastseg_fast.kernels.pdcr.rows import Packed
from contrastseg_fast.kernels.pdcr.tiles import distances, exponents, is_excluded, load_rows
from contrastseg_fast.problems import Call


@triton.jit
def _add_pairs(
    product,  # [BLOCK_J, BLOCK_I]: of the column tile's rows with the row tile's
    distance,
    scale_i,
    scale_j,
    z_ptrs,  # of the column tile's rows
    is_above,  # whether the column tile lies above the diagonal, so that it stands for two tiles
    total,
    attraction,
    bias,
    slope,
    shift,
    PLAIN: tl.constexpr,
):
    """Adds a tile to the sums of its row tile, and to those of its columns.

    Sums over the row tile's rows stay within a thread, but for a few lanes. Sums over the columns are left in
    `total` [BLOCK_J, BLOCK_I] until the last tile.
    """
    counts_i = tl.where(is_excluded(scale_i), 0.0, 1.0)  # [BLOCK_I]
    counts_j = tl.where(is_excluded(scale_j), 0.0, 1.0)  # [BLOCK_J]
    if PLAIN:
        t = (product * scale_j[:, None]) * (scale_i[None, :] * distance)
        sums = tl.sum(t, 1)  # of excluded rows, all t are 0
    else:
        similarity = product * scale_j[:, None] * scale_i[None, :]
        t, weighted = exponents(similarity, distance, bias, slope, shift)
        sums = tl.sum(weighted * counts_i[None, :], 1) * counts_j
    exponentials = tl.exp2(t)
    total += exponentials * counts_j[:, None]
    if is_above:
        tl.atomic_add(z_ptrs, tl.sum(exponentials * counts_i[None, :], 1), sem="relaxed")
    return total, attraction + tl.where(is_above, 2 * sums, sums)


@triton.jit
def add_pairs_in_order(
    product,  # [BLOCK_I, BLOCK_J]
    distance,
    scale_i,
    scale_j,
    total,
    highest,
    attraction,
    bias,
    slope,
    shift,
    PLAIN: tl.constexpr,
):
    """Adds a tile to the sums of its row tile alone, [BLOCK_I] each, below the highest exponent so far."""
    similarity = product * scale_i[:, None] * scale_j[None, :]
    if PLAIN:
        t = similarity * distance
        weighted = t
    else:
        t, weighted = exponents(similarity, distance, bias, slope, shift)
    counts_j = tl.where(is_excluded(scale_j), 0.0, 1.0)  # [BLOCK_J]
    t = tl.where(counts_j[None, :] > 0, t, float("-inf"))
    reached = tl.maximum(highest, tl.max(t, 1))
    base = tl.where(reached == float("-inf"), 0.0, reached)
    total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(t - base[:, None]), 1)
    return total, reached, attraction + tl.sum(weighted * counts_j[None, :], 1)


@triton.jit
def _sum_row_tile(
    rows_ptr,  # None if products are loaded
    slab_ptrs,  # [BLOCK_I], from column 0; None if products are computed
    scale_ptr,
    phi_ptr,
    z_ptr,
    attraction_ptr,
    cores_ptr,  # None if all pairs are computed
    tile,
    start,
    stop,
    padded,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """The sums of a row tile with some column tiles."""
    skip_first, num_skipped = 0, 0
    if cores_ptr is not None:
        skip_first, num_skipped, start, stop = left_of_columns(
            cores_ptr, tile * BLOCK_I, start, stop, BLOCK_J
        )
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    scale_i = tl.load(scale_ptr + i)  # [BLOCK_I]
    if rows_ptr is not None:
        rows_i = load_rows(rows_ptr, tile, WIDTH, BLOCK_I)  # [BLOCK_I, WIDTH]
        columns_i = tl.trans(rows_i)  # within the loop, it would be stored to shared memory every time
    if SYMMETRIC:
        total = tl.zeros([BLOCK_J, BLOCK_I], tl.float32)
        attraction = tl.zeros([BLOCK_J], tl.float32)
    else:
        total = tl.load(z_ptr + i)  # [BLOCK_I]: of skipped pairs, whose exponents are 0
        attraction = tl.zeros([BLOCK_I], tl.float32)
        highest = tl.where(total > 0, 0.0, float("-inf"))
    for step in range(start, stop):
        column_tile = step + tl.where(step >= skip_first, num_skipped, 0)
        j = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        scale_j = tl.load(scale_ptr + j)  # [BLOCK_J]
        if rows_ptr is not None:
            rows_j = load_rows(rows_ptr, column_tile, WIDTH, BLOCK_J)  # [BLOCK_J, WIDTH]
        if SYMMETRIC:
            if rows_ptr is not None:
                product = dot(rows_j, columns_i)
            else:
                product = tl.load(slab_ptrs[None, :] + j[:, None])
            distance = distances(
                phi_ptr, j, i, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL
            )
            is_above = column_tile * BLOCK_J >= (tile + 1) * BLOCK_I
            total, attraction = _add_pairs(
                product,
                distance,
                scale_i,
                scale_j,
                z_ptr + j,
                is_above,
                total,
                attraction,
                bias,
                slope,
                shift,
                PLAIN,
            )
        else:
            if rows_ptr is not None:
                product = dot(rows_i, tl.trans(rows_j))
            else:
                product = tl.load(slab_ptrs[:, None] + j[None, :])
            distance = distances(
                phi_ptr, i, j, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL
            )
            total, highest, attraction = add_pairs_in_order(
                product, distance, scale_i, scale_j, total, highest, attraction, bias, slope, shift, PLAIN
            )
    if SYMMETRIC:
        tl.atomic_add(z_ptr + i, tl.sum(total, 0), sem="relaxed")
    else:
        tl.store(z_ptr + i, highest + tl.log2(total))
        attraction = tl.where(is_excluded(scale_i), 0.0, attraction)
    tl.store(attraction_ptr, tl.sum(attraction, 0))


@triton.jit(do_not_specialize=["num_classes", "num_images", "num_problems"])
def pdcr_fwd_kernel(
    items_ptr,
    records_ptr,
    rows_ptr,
    floats_ptr,
    scratch_ptr,
    attraction_ptr,  # (items)
    problems_ptr,  # this and what follows: as for `pdcr_loss_kernel`
    spans_ptr,
    partials_ptr,
    log_z_ptr,
    loss_ptr,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    num_images,
    num_problems,
    inverse_temperature,
    num_bias,
    attraction_scale,
    loss_shift,
    WITH_LOSS: tl.constexpr,  # whether the last program of an image computes its loss
    REDUCTION: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTHS: tl.constexpr,  # of the problems, in ascending order
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    GROUPED: tl.constexpr,  # whether pairs within cores are skipped (groups.py)
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Sums of exponentials and weighted similarities of a row tile with some column tiles, of one image."""
    item_ptr = items_ptr + tl.program_id(0) * TILE_ITEM
    image = tl.load(item_ptr + TILE_IMAGE)
    record_ptr = records_ptr + image * RECORD
    width_number = tl.load(item_ptr + TILE_WIDTH)
    padded = tl.load(record_ptr + PADDED).to(tl.int32)
    rows_ptr += tl.multiple_of(tl.load(record_ptr + ROWS), 64)
    for number in tl.static_range(len(WIDTHS)):
        if width_number == number:
            _sum_row_tile(
                rows_ptr,
                None,
                floats_ptr + tl.multiple_of(tl.load(record_ptr + SCALE), 64),
                floats_ptr + tl.multiple_of(tl.load(record_ptr + PHI), 64),
                scratch_ptr + tl.multiple_of(tl.load(record_ptr + Z), 64),
                attraction_ptr + tl.load(item_ptr + TILE_OUT),
                floats_ptr + tl.load(record_ptr + CORES) if GROUPED else None,
                tl.load(item_ptr + TILE_ROW_TILE).to(tl.int32),
                tl.load(item_ptr + TILE_START).to(tl.int32),
                tl.load(item_ptr + TILE_STOP).to(tl.int32),
                padded,
                num_classes,
                bias,
                slope,
                shift,
                unequal,
                WIDTHS[number],
                CLASSES,
                MORE_CLASSES,
                CATEGORICAL,
                PLAIN,
                SYMMETRIC,
                BLOCK_I,
                BLOCK_J,
            )
    if WITH_LOSS:
        finish_after_tiles(
            image,
            records_ptr,
            problems_ptr,
            spans_ptr,
            floats_ptr,
            scratch_ptr,
            attraction_ptr,
            partials_ptr,
            log_z_ptr,
            loss_ptr,
            num_images,
            num_problems,
            inverse_temperature,
            num_bias,
            attraction_scale,
            loss_shift,
            SYMMETRIC,
            REDUCTION,
            ROWS_AT_ONCE,
            BLOCK,
            BLOCK_C,
        )


def _sum_tiles(
    call: Call,
    packed: Packed,
    scratch: Tensor,
    partials: Tensor,
    losses: Losses,
    terms: plan.Terms,
    symmetric: bool,
    launch: Launch,
    with_loss: bool = False,
) -> tuple[Tensor, Tensor]:
    """Adds to z in scratch; the sums of weighted similarities, and a table of which are an image's."""
    device = scratch.device
    laid_out = layout.lay_out(call, plan.ROWS)
    per_program = plan.columns_per_program("forward", call, launch, packed.rows)
    tiles = layout.forward_tiles(call, plan.ROWS, launch, symmetric, per_program)
    attraction, spans = scratch.new_empty((tiles.numbers,)), tiles.spans.on(device)
    run_kernel(
        pdcr_fwd_kernel,
        (len(tiles.items),),
        (
            tiles.items.on(device),
            laid_out.records.on(device),
            packed.rows,
            packed.floats,
            scratch,
            attraction,
            laid_out.problem_images.on(device),
            spans,
            partials,
            losses.log_z,
            losses.loss,
        ),
        (call.num_compared, *terms.exponent.values(), *losses.numbers),
        {
            "WITH_LOSS": with_loss,
            **losses.constants,
            "WIDTHS": layout.fused_widths(call),
            **terms.modes,
            **plan.tile_options(launch),
        },
    )
    return attraction, spans


@triton.jit(do_not_specialize=["first_image", "first_tile", "first_slot", "num_classes", "tiles_per_program"])
def pdcr_fwd_slab_kernel(
    slab_ptr,  # (B, slab rows, P - first_column): products of packed rows
    records_ptr,
    floats_ptr,
    scratch_ptr,
    attraction_ptr,  # (B, row tiles, chunks)
    first_image,  # of the problem
    first_tile,  # of the slab
    first_column,  # of the slab, a multiple of BLOCK_J
    first_slot,  # of the problem
    slab_stride_b,
    slab_stride_n,
    num_classes,
    tiles_per_program,
    bias,
    slope,
    shift,
    unequal,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """As `pdcr_fwd_kernel`, for the row tiles of a slab of products."""
    tile = tl.program_id(0) + first_tile
    chunk = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    record_ptr = records_ptr + (first_image + image) * RECORD
    padded = tl.load(record_ptr + PADDED).to(tl.int32)
    start = chunk * tiles_per_program
    if SYMMETRIC:
        start += tile * BLOCK_I // BLOCK_J
    stop = tl.minimum(padded // BLOCK_J, start + tiles_per_program)
    slab_row = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    slab_ptrs = slab_ptr + image * slab_stride_b + slab_row.to(tl.int64) * slab_stride_n - first_column
    slot = (image * (padded // BLOCK_I) + tile) * tl.num_programs(1) + chunk
    _sum_row_tile(
        None,
        slab_ptrs,
        floats_ptr + tl.multiple_of(tl.load(record_ptr + SCALE), 64),
        floats_ptr + tl.multiple_of(tl.load(record_ptr + PHI), 64),
        scratch_ptr + tl.multiple_of(tl.load(record_ptr + Z), 64),
        attraction_ptr + first_slot + slot,
        None,
        tile,
        start,
        stop,
        padded,
        num_classes,
        bias,
        slope,
        shift,
        unequal,
        0,
        CLASSES,
        MORE_CLASSES,
        CATEGORICAL,
        PLAIN,
        SYMMETRIC,
        BLOCK_I,
        BLOCK_J,
    )


def _sum_slabs(
    call: Call, packed: Packed, scratch: Tensor, terms: plan.Terms, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """As `_sum_tiles`, from slabs."""
    launch, device = plan.SLAB_FORWARD, scratch.device
    laid_out = layout.lay_out(call, plan.ROWS)
    per_program = plan.columns_per_program("forward", call, launch, packed.rows) if symmetric else 1 << 30
    spans, num_sums = layout.slab_spans(call, plan.ROWS, launch, per_program)
    attraction = scratch.new_empty((num_sums,))

    def first_column(first_row: int) -> int:
        return first_row // launch.block_j * launch.block_j if symmetric else 0

    for first_image, rows in slabs.problem_rows(laid_out, packed.rows):
        first_slot, end = spans.numbers[first_image].tolist()
        chunks = (end - first_slot) * launch.block_i // rows.shape[1]
        for first, column, slab in slabs.similarities(rows, first_column):
            run_kernel(
                pdcr_fwd_slab_kernel,
                (slab.shape[1] // launch.block_i, chunks, len(rows)),
                (
                    slab,
                    laid_out.records.on(device),
                    packed.floats,
                    scratch,
                    attraction,
                ),
                (
                    first_image,
                    first // launch.block_i,
                    column,
                    first_slot,
                    slab.stride(0),
                    slab.stride(1),
                    call.num_compared,
                    per_program,
                    *terms.exponent.values(),
                ),
                {**terms.modes, "SYMMETRIC": symmetric, **plan.tile_options(launch)},
            )
    return attraction, spans.on(device)


def sum_pairs(
    call: Call,
    packed: Packed,
    scratch: Tensor,
    partials: Tensor,
    losses: Losses,
    terms: plan.Terms,
    symmetric: bool,
) -> None:
    """Fill the losses: from the exponentials of all pairs, which add up in scratch."""
    if call.fused:
        sum_tiles = functools.partial(_sum_tiles, call, packed)

        def try_launch(launch: Launch) -> None:
            sum_tiles(scratch.clone(), partials, losses, terms, symmetric, launch)

        launch = plan.choose_launch("forward", call, packed.rows, terms.plain, not symmetric, try_launch)
        most_rows = max(map(call.count, call.problems))
        with_loss = not call.grouped and most_rows <= plan.MOST_ROWS_WITH_LOSS
        sums = sum_tiles(scratch, partials, losses, terms, symmetric, launch, with_loss)
        if with_loss:
            return
    else:
        sums = _sum_slabs(call, packed, scratch, terms, symmetric)
    write_loss(call, packed, scratch, partials, *sums, losses)
