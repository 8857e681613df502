"""Calls of few vectors: one kernel forward and one backward, as their launches take longer than their work.

A program owns a row tile of an image, and meets all columns. Forward, it reads all vectors of the image where
they lie, so that rows need no kernel before; log Z of its rows is complete, so that no sums are added up in
memory. Backward, its g is complete, so that gradients need no kernel after. `plan.py` says which calls are
small. Either pass takes or leaves the same numbers in memory as the other kernels, so that each of them is
chosen alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import dot, narrow
from contrastseg_fast.kernels._counters import zero_counter
from contrastseg_fast.kernels._launch import launch as run_kernel
from contrastseg_fast.kernels.pdcr import layout, plan
from contrastseg_fast.kernels.pdcr.backward import multiply_row_tile
from contrastseg_fast.kernels.pdcr.forward import add_pairs_in_order
from contrastseg_fast.kernels.pdcr.gradient import gradient_factor, projected_gradient
from contrastseg_fast.kernels.pdcr.layout import (
    CHANNELS,
    COUNT,
    INVERSE_LENGTH,
    LOG_Z,
    LOSS,
    PADDED,
    PHI,
    RECORD,
    ROW_FIRST,
    ROW_IMAGE,
    ROW_ITEM,
    ROW_RATIOS,
    ROW_SOURCE,
    ROW_SOURCE_IMAGE,
    ROW_VALID,
    ROWS,
    SCALE,
    SOURCE,
    STATS,
    UNIT_SUM,
)
from contrastseg_fast.kernels.pdcr.loss import Losses, count_program, loss_of_sums, reduce_images
from contrastseg_fast.kernels.pdcr.rows import (
    BY_WORD,
    Inputs,
    Packed,
    load_vectors,
    place_of,
    positions_of,
    shorten,
    store_rows,
)
from contrastseg_fast.kernels.pdcr.tiles import EXCLUDED, LN_2, are_valid, distances, is_excluded
from contrastseg_fast.problems import Call

_IMAGES_AT_ONCE = 32  # whose losses the last program reduces together


@triton.jit
def _load_tile(
    source_ptr,
    source_record_ptr,
    positions_ptr,
    valid_ptr,
    item_ptr,
    n,
    count,
    c,
    least_valid,
    PLACE: tl.constexpr,
):
    """Vectors of an image as they are, [BLOCK, WIDTH], and which of them make pairs."""
    included = are_valid(valid_ptr, tl.load(item_ptr + ROW_VALID), n, n < count, least_valid)
    position = positions_of(source_record_ptr, positions_ptr, n, included, PLACE)
    image = tl.load(item_ptr + ROW_SOURCE_IMAGE)
    v = load_vectors(source_ptr, source_record_ptr, image, position, c, included, BY_WORD)
    return v, included


@triton.jit
def _sum_small_row_tile(
    source_ptr,
    source_record_ptr,
    ratios_ptr,
    valid_ptr,
    positions_ptr,
    item_ptr,
    record_ptr,
    rows_ptr,
    floats_ptr,
    log_z_ptr,
    result_ptr,
    num_classes,
    ratios_stride_n,
    ratios_stride_m,
    phi_scale,
    least_valid,
    bias,
    slope,
    shift,
    unequal,
    inverse_temperature,
    num_bias,
    attraction_scale,
    PLACE: tl.constexpr,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Packs a row tile, and computes log Z of its rows and its part of the image's loss."""
    count = tl.load(record_ptr + COUNT).to(tl.int32)
    first = tl.load(item_ptr + ROW_FIRST).to(tl.int32)
    c = tl.arange(0, WIDTH)
    i = first + tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    v_i, included_i = _load_tile(
        source_ptr, source_record_ptr, positions_ptr, valid_ptr, item_ptr, i, count, c, least_valid,
        PLACE,
    )  # fmt: skip
    v_j, included_j = _load_tile(
        source_ptr, source_record_ptr, positions_ptr, valid_ptr, item_ptr, j, count, c, least_valid,
        PLACE,
    )  # fmt: skip
    packed_i, scale_i, inverse_length = shorten(v_i.to(tl.float32))
    store_rows(
        packed_i,
        scale_i,
        inverse_length,
        included_i,
        tl.full([BLOCK_I], True, tl.int1),
        i,
        i,
        c,
        item_ptr,
        record_ptr,
        ratios_ptr,
        rows_ptr,
        floats_ptr,
        num_classes,
        ratios_stride_n,
        ratios_stride_m,
        phi_scale,
    )
    rows_i = narrow(packed_i, rows_ptr.dtype.element_ty)
    scale_i = tl.where(included_i, scale_i, EXCLUDED)
    total = tl.zeros([BLOCK_I], tl.float32)
    attraction = tl.zeros([BLOCK_I], tl.float32)
    highest = tl.full([BLOCK_I], float("-inf"), tl.float32)
    unit_sum = tl.zeros([WIDTH], tl.float32)
    num_valid = tl.zeros([BLOCK_J], tl.float32)
    for column_tile in range(tl.cdiv(count, BLOCK_J)):
        j = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        distance = distances(
            ratios_ptr + tl.load(item_ptr + ROW_RATIOS),
            i,
            j,
            ratios_stride_m,
            num_classes,
            unequal,
            CLASSES,
            MORE_CLASSES,
            CATEGORICAL,
            ratios_stride_n,
            included_i,
            included_j,
            phi_scale,
        )
        next_v_j, next_included_j = _load_tile(  # while this tile is multiplied
            source_ptr, source_record_ptr, positions_ptr, valid_ptr, item_ptr, j + BLOCK_J, count, c,
            least_valid, PLACE,
        )  # fmt: skip
        packed_j, scale_j, _ = shorten(v_j.to(tl.float32))
        unit_sum += tl.sum(packed_j * scale_j[:, None], 0)
        num_valid += tl.where(included_j, 1.0, 0.0)
        scale_j = tl.where(included_j, scale_j, EXCLUDED)
        product = dot(rows_i, tl.trans(narrow(packed_j, rows_ptr.dtype.element_ty)))  # [BLOCK_I, BLOCK_J]
        total, highest, attraction = add_pairs_in_order(
            product, distance, scale_i, scale_j, total, highest, attraction, bias, slope, shift, PLAIN
        )
        v_j, included_j = next_v_j, next_included_j
    log_z = tl.where(included_i, (highest + tl.log2(total)) * LN_2, 0.0)
    tl.store(log_z_ptr + tl.load(record_ptr + LOG_Z) + i, log_z, i < count)
    attraction = tl.where(is_excluded(scale_i), 0.0, attraction)
    n = tl.sum(num_valid, 0)
    is_first = first == 0
    if is_first:
        tl.store(floats_ptr + tl.load(record_ptr + UNIT_SUM) + c, unit_sum)
        tl.store(floats_ptr + tl.load(record_ptr + STATS), n)
    result = loss_of_sums(
        n.to(tl.float64),
        tl.sum(log_z.to(tl.float64), 0),
        tl.sum(attraction.to(tl.float64), 0),
        tl.sum(unit_sum.to(tl.float64) * unit_sum.to(tl.float64), 0),
        inverse_temperature,
        tl.where(is_first, num_bias, 0.0),  # the part of |S|^2 belongs to no row
        attraction_scale,
        shift,
    )
    tl.store(result_ptr + first // BLOCK_I, result)


@triton.jit(do_not_specialize=["num_classes", "ratios_stride_n", "ratios_stride_m", "num_problems"])
def pdcr_small_fwd_kernel(
    sources,  # as for `pdcr_rows_kernel`, and what follows
    ratios_ptr,
    valid_ptr,
    positions_ptr,
    items_ptr,
    source_records_ptr,
    records_ptr,
    problems_ptr,
    rows_ptr,
    floats_ptr,
    log_z_ptr,
    results_ptr,  # (images, PARTS), fp64: parts of the losses of images
    loss_ptr,
    counter_ptr,  # 0 before and after
    num_classes,
    ratios_stride_n,
    ratios_stride_m,
    phi_scale,
    least_valid,
    bias,
    slope,
    shift,
    unequal,
    num_problems,
    inverse_temperature,
    num_bias,
    attraction_scale,
    PLACES: tl.constexpr,  # this and the next: of the sources
    WIDTHS: tl.constexpr,
    REDUCTION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """The whole forward pass of a row tile of one image; the last program of all reduces their parts."""
    item_ptr = items_ptr + tl.program_id(0) * ROW_ITEM
    record_ptr = records_ptr + tl.load(item_ptr + ROW_IMAGE) * RECORD
    source = tl.load(item_ptr + ROW_SOURCE)
    for number in tl.static_range(len(WIDTHS)):
        if source == number:
            _sum_small_row_tile(
                sources[number],
                source_records_ptr + source * SOURCE,
                ratios_ptr,
                valid_ptr,
                positions_ptr,
                item_ptr,
                record_ptr,
                rows_ptr,
                floats_ptr,
                log_z_ptr,
                results_ptr + tl.load(record_ptr + LOSS) * PARTS,
                num_classes,
                ratios_stride_n,
                ratios_stride_m,
                phi_scale,
                least_valid,
                bias,
                slope,
                shift,
                unequal,
                inverse_temperature,
                num_bias,
                attraction_scale,
                PLACES[number],
                WIDTHS[number],
                CLASSES,
                MORE_CLASSES,
                CATEGORICAL,
                PLAIN,
                BLOCK_I,
                BLOCK_J,
            )
    if count_program(counter_ptr) == tl.num_programs(0) - 1:
        tl.store(counter_ptr, 0)
        reduce_images(
            records_ptr,
            problems_ptr,
            floats_ptr,
            results_ptr,
            loss_ptr,
            num_problems,
            REDUCTION,
            PARTS,
            BLOCK_I,
            BLOCK,
        )


@triton.jit(do_not_specialize=["num_classes", "grad_stride"])
def pdcr_small_bwd_kernel(
    outs,  # tuple of (B, N, C), one for every source
    items_ptr,
    source_records_ptr,
    records_ptr,
    rows_ptr,
    floats_ptr,
    log_z_ptr,
    grad_ptr,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    log_weight_scale,
    grad_stride,
    separate_bias,
    g_scale,
    inverse_temperature,
    WORDS: tl.constexpr,  # whether all sources have a multiple of 16 channels
    WIDTHS: tl.constexpr,  # of the sources
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """The gradients of the vectors of a row tile of one image."""
    item_ptr = items_ptr + tl.program_id(0) * ROW_ITEM
    record_ptr = records_ptr + tl.load(item_ptr + ROW_IMAGE) * RECORD
    source = tl.load(item_ptr + ROW_SOURCE)
    first = tl.load(item_ptr + ROW_FIRST)
    count = tl.load(record_ptr + COUNT)
    i = first + tl.arange(0, BLOCK_I)
    channels = tl.load(source_records_ptr + source * SOURCE + CHANNELS)
    if WORDS:
        channels = tl.multiple_of(channels, 16)
    first_vector = tl.load(item_ptr + ROW_SOURCE_IMAGE) * count
    inverse_length = tl.load(floats_ptr + tl.load(record_ptr + INVERSE_LENGTH) + i)
    factor = gradient_factor(record_ptr, floats_ptr, grad_ptr, grad_stride, inverse_temperature)
    rows_ptr += tl.multiple_of(tl.load(record_ptr + ROWS), 64)
    for number in tl.static_range(len(WIDTHS)):
        if source == number:
            g, rows_i, scale_i = multiply_row_tile(
                rows_ptr,
                floats_ptr + tl.multiple_of(tl.load(record_ptr + SCALE), 64),
                floats_ptr + tl.multiple_of(tl.load(record_ptr + PHI), 64),
                log_z_ptr + tl.load(record_ptr + LOG_Z),
                floats_ptr + tl.load(record_ptr + STATS),
                (first // BLOCK_I).to(tl.int32),
                0,
                tl.cdiv(count, BLOCK_J).to(tl.int32),
                0,
                0,
                tl.load(record_ptr + PADDED).to(tl.int32),
                count.to(tl.int32),
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
            c = tl.arange(0, WIDTHS[number])
            unit = rows_i.to(tl.float32) * scale_i[:, None]
            unit_sum = tl.load(floats_ptr + tl.load(record_ptr + UNIT_SUM) + c)
            gradient = projected_gradient(g * g_scale, unit, unit_sum, separate_bias, factor, inverse_length)
            offsets = ((first_vector + i) * channels)[:, None] + c[None, :]
            mask = (i < count)[:, None] & (c < channels)[None, :]
            tl.store(outs[number] + offsets, narrow(gradient, outs[number].dtype.element_ty), mask)


def _widths(call: Call) -> tuple[int, ...]:
    """The widths of the rows of every source."""
    widths = {problem.segments[0].source: call.width(problem) for problem in call.problems}
    return tuple(widths[number] for number in range(len(call.sources)))


def sum_small(call: Call, inputs: Inputs, packed: Packed, losses: Losses, terms: plan.Terms) -> None:
    """Fill the packed rows of a call and its losses."""
    laid_out, device = layout.lay_out(call, plan.ROWS), packed.rows.device
    launch = plan.small_launch(plan.SMALL_FORWARD, call)
    items = layout.small_items(call, launch.block_i)
    parts = triton.next_power_of_2(max(image.padded for image in laid_out.images) // launch.block_i)
    results = packed.floats.new_empty((len(laid_out.images) * parts,), dtype=torch.float64)
    run_kernel(
        pdcr_small_fwd_kernel,
        (len(items),),
        (
            inputs.sources,
            inputs.ratios,
            inputs.valid_bytes,
            inputs.positions,
            items.on(device),
            laid_out.sources.on(device),
            laid_out.records.on(device),
            laid_out.problem_images.on(device),
            packed.rows,
            packed.floats,
            losses.log_z,
            results,
            losses.loss,
            zero_counter(device),
        ),
        (
            call.num_compared,
            *inputs.ratios_strides,
            terms.phi_scale,
            inputs.least_valid,
            *terms.exponent.values(),
            len(call.problems),
            *list(terms.loss.values())[:3],
        ),
        {
            "PLACES": tuple(map(place_of, call.sources)),
            "WIDTHS": _widths(call),
            "REDUCTION": losses.constants["REDUCTION"],
            "PARTS": parts,
            "BLOCK": _IMAGES_AT_ONCE,
            **plan.small_modes(terms),
            **plan.tile_options(launch),
        },
    )


def differentiate_small(
    call: Call, packed: Packed, log_z: Tensor, terms: plan.Terms, grad: Tensor, outs: tuple[Tensor, ...]
) -> None:
    """Fill the gradients of a call."""
    laid_out, device = layout.lay_out(call, plan.ROWS), log_z.device
    launch = plan.small_launch(plan.SMALL_BACKWARD, call)
    items = layout.small_items(call, launch.block_i)
    run_kernel(
        pdcr_small_bwd_kernel,
        (len(items),),
        (
            outs,
            items.on(device),
            laid_out.sources.on(device),
            laid_out.records.on(device),
            packed.rows,
            packed.floats,
            log_z,
            grad,
        ),
        (
            call.num_compared,
            *terms.exponent.values(),
            *terms.pair_weight.values(),
            grad.stride(0) if grad.ndim else 0,
            *(terms.gradient[name] for name in ("separate_bias", "g_scale", "inverse_temperature")),
        ),
        {
            "WORDS": all(source.channels % 16 == 0 for source in call.sources),
            "WIDTHS": _widths(call),
            **plan.small_modes(terms),
            "BOUNDED": terms.bounded,
            **plan.tile_options(launch),
        },
    )
