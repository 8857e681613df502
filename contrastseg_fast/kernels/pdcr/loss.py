"""The losses of images from their sums, log Z of every vector, and what the backward pass needs besides.

The last program that adds to an image's sums goes on and computes its loss. Of images with many vectors, a
kernel of its own spreads that over several programs. All sums are of fp64, in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import dot_add
from contrastseg_fast.kernels._launch import launch as run_kernel
from contrastseg_fast.kernels.pdcr import layout, plan
from contrastseg_fast.kernels.pdcr.groups import GROUPS, LEFT_OUT, load_cores
from contrastseg_fast.kernels.pdcr.layout import (
    BLOCKS,
    CORES,
    COUNT,
    COUNTER,
    GROUP_SUMS,
    LOG_Z,
    LOG_Z_OF_ROWS,
    LOSS,
    LOSS_ITEM,
    PADDED,
    PART_SUMS,
    PARTIAL,
    PARTS,
    RECORD,
    ROWS,
    ROWS_OF_VECTORS,
    SCALE,
    STATS,
    SUMS,
    UNIT_SUM,
    VALID,
    WIDTH,
    Z,
)
from contrastseg_fast.kernels.pdcr.rows import Packed
from contrastseg_fast.kernels.pdcr.tiles import LN_2, is_excluded
from contrastseg_fast.problems import Call

_ROWS_OF_PART = tl.constexpr(32)  # of a tile, and parts: what a program reads at once
_PARTS_AT_ONCE = tl.constexpr(32)


@triton.jit
def count_program(counter_ptr):
    """Counts a program that has stored its results; returns how many were counted before it."""
    tl.debug_barrier()  # all threads have stored before one of them counts
    return tl.atomic_add(counter_ptr, 1)


@triton.jit
def _share(number, part, parts):
    """Where part `part` of `number` things begins."""
    return number * part // parts


@triton.jit
def _sum_part(
    record_ptr,
    part,
    rows_ptr,  # unless GROUPED, None
    floats_ptr,
    z_ptr,
    log_z_ptr,
    scratch_ptr,
    attraction_ptr,
    partials_ptr,
    attraction_begin,
    attraction_end,
    SYMMETRIC: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One part's sums of log Z, weighted similarities, valid vectors and unit vectors.

    With grouped rows, a part is a tile, so that no two groups' cores share one.
    """
    count = tl.load(record_ptr + COUNT)
    parts = tl.load(record_ptr + PARTS)
    scale_ptr = floats_ptr + tl.load(record_ptr + SCALE)
    total = tl.zeros([BLOCK], tl.float64)
    valid = tl.zeros([BLOCK], tl.float32)
    for first in tl.static_range(0, ROWS_AT_ONCE, BLOCK):
        n = part * ROWS_AT_ONCE + first + tl.arange(0, BLOCK)
        inside = n < count
        row = n
        if GROUPED:
            row = tl.load(floats_ptr + tl.load(record_ptr + ROWS_OF_VECTORS) + n, inside, 0.0).to(tl.int64)
        included = inside & ~is_excluded(tl.load(scale_ptr + row, inside, 0.0))
        z = tl.load(z_ptr + row, included, 1.0, cache_modifier=".cg")  # other programs added to it
        log_z = tl.log(z) if SYMMETRIC else z * LN_2
        log_z = tl.where(included, log_z, 0.0)
        tl.store(log_z_ptr + n, log_z, inside)
        total += log_z.to(tl.float64)
        if GROUPED:
            tl.store(floats_ptr + tl.load(record_ptr + LOG_Z_OF_ROWS) + row, log_z, inside)
            valid += tl.where(included, 1.0, 0.0)
    attraction = tl.zeros([BLOCK], tl.float64)
    number = attraction_end - attraction_begin
    stop = attraction_begin + _share(number, part + 1, parts)
    for first in range(attraction_begin + _share(number, part, parts), stop, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        values = tl.load(attraction_ptr + slot, slot < stop, 0.0, cache_modifier=".cg")
        attraction += values.to(tl.float64)
    width = tl.load(record_ptr + WIDTH)
    c = tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_C], tl.float32)
    if GROUPED:
        rows_ptr += tl.multiple_of(tl.load(record_ptr + ROWS), 64)
        for first in range(0, ROWS_AT_ONCE, _ROWS_OF_PART):
            own_row = part * ROWS_AT_ONCE + first + tl.arange(0, _ROWS_OF_PART)
            scale = tl.load(scale_ptr + own_row)
            ptrs = rows_ptr + (own_row * tl.multiple_of(width, 8))[:, None] + c[None, :]
            packed = tl.load(ptrs, (c < width)[None, :], 0.0).to(tl.float32)  # [_ROWS_OF_PART, BLOCK_C]
            sums += tl.sum(packed * scale[:, None], 0)
    else:
        blocks = tl.load(record_ptr + BLOCKS)
        first_block = _share(blocks, part, parts)
        last_block = _share(blocks, part + 1, parts)
        for first in range(first_block, last_block, BLOCK):
            block = first + tl.arange(0, BLOCK)
            valid += tl.load(scratch_ptr + tl.load(record_ptr + VALID) + block, block < last_block, 0.0)
        for block in range(first_block, last_block):
            sums += tl.load(scratch_ptr + tl.load(record_ptr + SUMS) + block * width + c, c < width, 0.0)
    tl.store(scratch_ptr + tl.load(record_ptr + PART_SUMS) + part * width + c, sums, c < width)
    partials_ptr += tl.load(record_ptr + PARTIAL) + 3 * part
    tl.store(partials_ptr, tl.sum(total, 0))
    tl.store(partials_ptr + 1, tl.sum(attraction, 0))
    tl.store(partials_ptr + 2, tl.sum(valid.to(tl.float64), 0))


@triton.jit
def _sum_cores(cores_ptr, part_sums_ptr, parts, width, BLOCK_C: tl.constexpr):
    """The sums of the unit vectors of every core, [GROUPS, BLOCK_C]; those of no core's in the last row."""
    first_tile, num_tiles = load_cores(cores_ptr)
    groups = tl.arange(0, GROUPS)
    c = tl.arange(0, BLOCK_C)
    sums = tl.zeros([GROUPS, BLOCK_C], tl.float32)
    for first in range(0, parts, _PARTS_AT_ONCE):
        part = first + tl.arange(0, _PARTS_AT_ONCE)
        ptrs = part_sums_ptr + (part * width)[:, None] + c[None, :]
        inside = (part < parts)[:, None] & (c < width)[None, :]
        of_parts = tl.load(ptrs, inside, 0.0, cache_modifier=".cg")  # [_PARTS_AT_ONCE, BLOCK_C]
        is_of = (first_tile[:, None] <= part[None, :]) & (part[None, :] < (first_tile + num_tiles)[:, None])
        in_none = tl.sum(is_of.to(tl.int32), 0) == 0
        is_of = is_of | ((groups == LEFT_OUT)[:, None] & in_none[None, :])  # [GROUPS, _PARTS_AT_ONCE]
        sums = dot_add(is_of.to(tl.float32), of_parts, sums)
    return sums


@triton.jit
def loss_of_sums(n, log_z, attraction, square, inverse_temperature, num_bias, attraction_scale, shift):
    """The loss of an image in fp64, from its sums of log Z and weighted similarities, and |S|^2."""
    weights = num_bias * (square - shift * n * n) + attraction_scale * attraction
    return tl.where(n > 0, (n * log_z - inverse_temperature * weights) / tl.maximum(n * n, 1.0), 0.0)


@triton.jit
def _finish_image(
    record_ptr,
    floats_ptr,
    scratch_ptr,
    partials_ptr,
    loss_ptr,
    num_images,
    inverse_temperature,
    num_bias,
    attraction_scale,
    shift,
    REDUCTION: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The loss of an image from the sums of its parts, in fp64."""
    parts = tl.load(record_ptr + PARTS)
    width = tl.load(record_ptr + WIDTH)
    total = tl.zeros([BLOCK], tl.float64)
    attraction = tl.zeros([BLOCK], tl.float64)
    valid = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        ptrs = partials_ptr + tl.load(record_ptr + PARTIAL) + 3 * part
        total += tl.load(ptrs, part < parts, 0.0, cache_modifier=".cg")
        attraction += tl.load(ptrs + 1, part < parts, 0.0, cache_modifier=".cg")
        valid += tl.load(ptrs + 2, part < parts, 0.0, cache_modifier=".cg")
    c = tl.arange(0, BLOCK_C)
    part_sums_ptr = scratch_ptr + tl.load(record_ptr + PART_SUMS)
    unit_sum = tl.zeros([BLOCK_C], tl.float32)
    if GROUPED:
        cores_ptr = floats_ptr + tl.load(record_ptr + CORES)
        sums = _sum_cores(cores_ptr, part_sums_ptr, parts, width, BLOCK_C)
        ptrs = floats_ptr + tl.load(record_ptr + GROUP_SUMS) + (tl.arange(0, GROUPS) * width)[:, None]
        tl.store(ptrs + c[None, :], sums, (c < width)[None, :])
        unit_sum = tl.sum(sums, 0)
    else:
        for part in range(parts):
            unit_sum += tl.load(part_sums_ptr + part * width + c, c < width, 0.0, cache_modifier=".cg")
    tl.store(floats_ptr + tl.load(record_ptr + UNIT_SUM) + c, unit_sum, c < width)
    n = tl.sum(valid, 0)
    square = tl.sum(unit_sum.to(tl.float64) * unit_sum.to(tl.float64), 0)
    loss = loss_of_sums(
        n,
        tl.sum(total, 0),
        tl.sum(attraction, 0),
        square,
        inverse_temperature,
        num_bias,
        attraction_scale,
        shift,
    )
    stats_ptr = floats_ptr + tl.load(record_ptr + STATS)
    tl.store(stats_ptr, n.to(tl.float32))
    if REDUCTION == "none":
        tl.store(stats_ptr + 1, (1 / tl.maximum(n * n, 1.0)).to(tl.float32))
        tl.store(loss_ptr + tl.load(record_ptr + LOSS), loss.to(tl.float32))
    else:
        tl.store(partials_ptr + 1 + num_images + tl.load(record_ptr + LOSS), loss)


@triton.jit
def reduce_images(
    records_ptr,
    problems_ptr,
    floats_ptr,
    results_ptr,  # (images, PARTS), fp64
    loss_ptr,
    num_problems,
    REDUCTION: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two
    PART_ROWS: tl.constexpr,  # rows of an image for every part that it has
    BLOCK: tl.constexpr,
):
    """One loss from the parts of those of all images, averaged over problems; or that of every image.

    Also the weights of images in it.
    """
    total = tl.zeros([BLOCK], tl.float64)
    part = tl.arange(0, PARTS)[None, :]
    for problem in range(num_problems):
        begin = tl.load(problems_ptr + 2 * problem)
        end = tl.load(problems_ptr + 2 * problem + 1)
        with_vectors = tl.zeros([BLOCK], tl.float64)
        of_problem = tl.zeros([BLOCK], tl.float64)
        for first in range(begin, end, BLOCK):
            image = first + tl.arange(0, BLOCK)
            record_ptrs = records_ptr + image * RECORD
            inside = image < end
            has_part = part * PART_ROWS < tl.load(record_ptrs + PADDED, inside, 0)[:, None]
            parts = tl.load(results_ptr + image[:, None] * PARTS + part, has_part, 0.0, cache_modifier=".cg")
            loss = tl.sum(parts, 1)
            n = tl.load(
                floats_ptr + tl.load(record_ptrs + STATS, inside, 0), inside, 0.0, cache_modifier=".cg"
            )
            n = n.to(tl.float64)
            with_vectors += tl.where(n > 0, 1.0, 0.0)
            of_problem += loss * n * n if REDUCTION == "sum" else loss
            if REDUCTION == "none":
                tl.store(loss_ptr + image, loss.to(tl.float32), inside)
        divisor = (tl.maximum(tl.sum(with_vectors, 0), 1.0) if REDUCTION == "mean" else 1.0) * num_problems
        for first in range(begin, end, BLOCK):
            image = first + tl.arange(0, BLOCK)
            inside = image < end
            stats_ptrs = floats_ptr + tl.load(records_ptr + image * RECORD + STATS, inside, 0)
            n = tl.load(stats_ptrs, inside, 0.0, cache_modifier=".cg").to(tl.float64)
            pairs = tl.maximum(n * n, 1.0)
            if REDUCTION == "mean":
                weight = 1 / (pairs * divisor)
            elif REDUCTION == "sum":
                weight = 1 / divisor + n * 0
            else:
                weight = 1 / pairs
            tl.store(stats_ptrs + 1, weight.to(tl.float32), inside)
        total += of_problem / divisor
    if REDUCTION != "none":
        tl.store(loss_ptr, tl.sum(total, 0).to(tl.float32))


@triton.jit
def _finish(
    record_ptr,
    records_ptr,
    problems_ptr,
    floats_ptr,
    scratch_ptr,
    partials_ptr,
    loss_ptr,
    num_images,
    num_problems,
    inverse_temperature,
    num_bias,
    attraction_scale,
    shift,
    REDUCTION: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The loss of an image whose parts are finished; and of the call, if this is its last image."""
    _finish_image(
        record_ptr,
        floats_ptr,
        scratch_ptr,
        partials_ptr,
        loss_ptr,
        num_images,
        inverse_temperature,
        num_bias,
        attraction_scale,
        shift,
        REDUCTION,
        GROUPED,
        BLOCK,
        BLOCK_C,
    )
    if REDUCTION != "none":
        finished = count_program(partials_ptr)
        if finished == num_images - 1:
            reduce_images(
                records_ptr,
                problems_ptr,
                floats_ptr,
                partials_ptr + 1 + num_images,
                loss_ptr,
                num_problems,
                REDUCTION,
                1,
                1,
                BLOCK,
            )


@triton.jit
def finish_after_tiles(
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
    SYMMETRIC: tl.constexpr,
    REDUCTION: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The end of a program over tiles: an image's last one computes the loss of the image."""
    record_ptr = records_ptr + image * RECORD
    begin = tl.load(spans_ptr + 2 * image)
    end = tl.load(spans_ptr + 2 * image + 1)
    finished = count_program(partials_ptr + tl.load(record_ptr + COUNTER))
    if finished == end - begin - 1:
        for part in range(tl.load(record_ptr + PARTS)):
            _sum_part(
                record_ptr,
                part,
                None,
                floats_ptr,
                scratch_ptr + tl.load(record_ptr + Z),
                log_z_ptr + tl.load(record_ptr + LOG_Z),
                scratch_ptr,
                attraction_ptr,
                partials_ptr,
                begin,
                end,
                SYMMETRIC,
                False,
                ROWS_AT_ONCE,
                BLOCK,
                BLOCK_C,
            )
        tl.debug_barrier()  # `_finish` reads what other threads have stored
        _finish(
            record_ptr,
            records_ptr,
            problems_ptr,
            floats_ptr,
            scratch_ptr,
            partials_ptr,
            loss_ptr,
            num_images,
            num_problems,
            inverse_temperature,
            num_bias,
            attraction_scale,
            loss_shift,
            REDUCTION,
            False,
            BLOCK,
            BLOCK_C,
        )


@triton.jit(do_not_specialize=["num_images", "num_problems"])
def pdcr_loss_kernel(
    items_ptr,
    records_ptr,
    problems_ptr,
    spans_ptr,
    rows_ptr,  # unless GROUPED, None
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
    shift,
    SYMMETRIC: tl.constexpr,  # whether z holds the sums, else their log2
    GROUPED: tl.constexpr,
    REDUCTION: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """log Z of some vectors; the last program of an image computes its loss, the last of all reduces them."""
    item_ptr = items_ptr + tl.program_id(0) * LOSS_ITEM
    image = tl.load(item_ptr)
    record_ptr = records_ptr + image * RECORD
    _sum_part(
        record_ptr,
        tl.load(item_ptr + 1),
        rows_ptr,
        floats_ptr,
        scratch_ptr + tl.load(record_ptr + Z),
        log_z_ptr + tl.load(record_ptr + LOG_Z),
        scratch_ptr,
        attraction_ptr,
        partials_ptr,
        tl.load(spans_ptr + 2 * image),
        tl.load(spans_ptr + 2 * image + 1),
        SYMMETRIC,
        GROUPED,
        ROWS_AT_ONCE,
        BLOCK,
        BLOCK_C,
    )
    finished = count_program(partials_ptr + tl.load(record_ptr + COUNTER))
    if finished == tl.load(record_ptr + PARTS) - 1:
        _finish(
            record_ptr,
            records_ptr,
            problems_ptr,
            floats_ptr,
            scratch_ptr,
            partials_ptr,
            loss_ptr,
            num_images,
            num_problems,
            inverse_temperature,
            num_bias,
            attraction_scale,
            shift,
            REDUCTION,
            GROUPED,
            BLOCK,
            BLOCK_C,
        )


class Losses(NamedTuple):
    """What the forward pass returns, and how it is computed."""

    loss: Tensor
    log_z: Tensor
    numbers: tuple[float, ...]  # of images and problems, and the terms of the loss
    constants: dict[str, Any]


def new_losses(call: Call, packed: Packed, terms: plan.Terms, symmetric: bool, reduction: str) -> Losses:
    """Results to fill: a scalar, or a loss for every image of every problem; and log Z of all vectors."""
    laid_out = layout.lay_out(call, plan.ROWS)
    return Losses(
        packed.floats.new_empty((laid_out.sizes.losses,) if reduction == "none" else ()),
        packed.floats.new_empty((laid_out.sizes.log_z,)),
        (len(laid_out.images), len(call.problems), *terms.loss.values()),
        {
            "SYMMETRIC": symmetric,
            "GROUPED": call.grouped,
            "REDUCTION": reduction,
            "ROWS_AT_ONCE": laid_out.loss_n,
            "BLOCK": min(plan.LOSS_BLOCK, laid_out.loss_n),
            "BLOCK_C": laid_out.block_c,
        },
    )


def write_loss(
    call: Call,
    packed: Packed,
    scratch: Tensor,
    partials: Tensor,
    attraction: Tensor,
    spans: Tensor,
    losses: Losses,
) -> None:
    """Fill the losses after all tiles, where their last programs did not."""
    laid_out = layout.lay_out(call, plan.ROWS)
    device = scratch.device
    run_kernel(
        pdcr_loss_kernel,
        (len(laid_out.loss_items),),
        (
            laid_out.loss_items.on(device),
            laid_out.records.on(device),
            laid_out.problem_images.on(device),
            spans,
            packed.rows if call.grouped else None,
            packed.floats,
            scratch,
            attraction,
            partials,
            losses.log_z,
            losses.loss,
        ),
        losses.numbers,
        {**losses.constants, "num_warps": 8 if call.grouped else 4, "enable_fp_fusion": True},
    )
