"""The gradients of vectors from g, of all problems that they belong to."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import narrow
from contrastseg_fast.kernels._launch import launch as run_kernel
from contrastseg_fast.kernels.pdcr import layout, plan
from contrastseg_fast.kernels.pdcr.backward import PairSums
from contrastseg_fast.kernels.pdcr.groups import core_of_rows, parts_of_rows
from contrastseg_fast.kernels.pdcr.layout import (
    CHANNELS,
    CORES,
    GRAD_FIRST_USE,
    GRAD_OUT,
    GRAD_SOURCE,
    GRAD_STOP_USE,
    GRAD_VECTOR,
    GRAD_VECTORS,
    GRADIENT_ITEM,
    GROUP_SUMS,
    INVERSE_LENGTH,
    LOSS,
    PADDED,
    RECORD,
    ROWS,
    ROWS_OF_VECTORS,
    SCALE,
    SOURCE,
    STATS,
    UNIT_SUM,
    USE,
    USE_IMAGE,
    USE_ROW,
    WIDTH,
)
from contrastseg_fast.kernels.pdcr.rows import Packed
from contrastseg_fast.problems import Call


@triton.jit
def gradient_factor(record_ptr, floats_ptr, grad_ptr, grad_stride, inverse_temperature):
    """What the gradients of an image's vectors are multiplied by, from that of the loss."""
    grad = tl.load(grad_ptr + tl.load(record_ptr + LOSS) * grad_stride).to(tl.float32)
    return grad * inverse_temperature * tl.load(floats_ptr + tl.load(record_ptr + STATS) + 1)


@triton.jit
def projected_gradient(g, unit, unit_sum, separate_bias, factor, inverse_length):
    """The gradients of vectors from g: the part along u is removed, the rest is divided by |v|."""
    g = g - 2 * separate_bias * unit_sum[None, :]
    along = tl.sum(g * unit, 1)
    return (g - along[:, None] * unit) * factor * inverse_length[:, None]


@triton.jit
def _gradient(
    record_ptr,
    span_ptr,
    row,
    inside,
    c,
    rows_ptr,
    floats_ptr,
    g_ptr,
    grad_ptr,
    grad_stride,
    separate_bias,
    pair_bias,
    g_scale,
    inverse_temperature,
    BLOCK_I: tl.constexpr,
):
    """The gradients [BLOCK_N, BLOCK_C] of some rows of one image, in fp32."""
    if BLOCK_I > 0:
        row = tl.load(floats_ptr + tl.load(record_ptr + ROWS_OF_VECTORS) + row, inside, 0.0).to(tl.int64)
    width = tl.multiple_of(tl.load(record_ptr + WIDTH), 8)
    in_width = c < width
    mask = inside[:, None] & in_width[None, :]
    offsets = (row * width)[:, None] + c[None, :]
    scale = tl.load(floats_ptr + tl.load(record_ptr + SCALE) + row, inside, 0.0)
    inverse_length = tl.load(floats_ptr + tl.load(record_ptr + INVERSE_LENGTH) + row, inside, 0.0)
    unit = (
        tl.load(rows_ptr + tl.multiple_of(tl.load(record_ptr + ROWS), 64) + offsets, mask, 0).to(tl.float32)
        * scale[:, None]
    )
    unit_sum = tl.load(floats_ptr + tl.load(record_ptr + UNIT_SUM) + c, in_width, 0.0)
    part_ptr = g_ptr + tl.multiple_of(tl.load(span_ptr), 64)
    undo = g_scale * tl.where(scale > 0, 1 / tl.where(scale > 0, scale, 1.0), 0.0)
    g = tl.zeros(mask.shape, tl.float32)
    if BLOCK_I > 0:
        cores_ptr = floats_ptr + tl.load(record_ptr + CORES)
        first, parts = parts_of_rows(
            cores_ptr, row.to(tl.int32), tl.load(span_ptr + 1), tl.load(span_ptr + 2), BLOCK_I
        )
        row_ptrs = part_ptr + (row % BLOCK_I * width)[:, None] + c[None, :]
        for part in range(tl.max(tl.where(inside, parts, 0), 0)):
            part_mask = mask & (part < parts)[:, None]
            g += tl.load(row_ptrs + ((first + part) * (BLOCK_I * width))[:, None], part_mask, 0.0)
        core, in_core = core_of_rows(cores_ptr, row)
        core_ptrs = floats_ptr + tl.load(record_ptr + GROUP_SUMS) + (core * width)[:, None] + c[None, :]
        skipped = tl.load(core_ptrs, mask & in_core[:, None], 0.0)
        g = g * undo[:, None] - 2 * pair_bias * skipped
    else:
        part_size = tl.multiple_of(tl.load(record_ptr + PADDED) * width, 64)
        for _ in range(tl.load(span_ptr + 1)):
            g += tl.load(part_ptr + offsets, mask, 0.0)
            part_ptr += part_size
        g = g * undo[:, None]
    factor = gradient_factor(record_ptr, floats_ptr, grad_ptr, grad_stride, inverse_temperature)
    return projected_gradient(g, unit, unit_sum, separate_bias, factor, inverse_length)


@triton.jit(do_not_specialize=["grad_stride"])
def pdcr_grad_kernel(
    outs,  # tuple of (B, N, C), one for every source
    items_ptr,
    uses_ptr,
    source_records_ptr,
    records_ptr,
    spans_ptr,
    rows_ptr,
    floats_ptr,
    g_ptr,
    grad_ptr,
    grad_stride,
    separate_bias,  # of the numerator's weights
    pair_bias,  # the rest of num_bias, which is in the pair weights
    g_scale,  # what undoes the weight_scale of the pair weights, but for log2(e) / tau
    inverse_temperature,
    NUM_SOURCES: tl.constexpr,
    WORDS: tl.constexpr,  # whether all sources have a multiple of 16 channels
    BLOCK_I: tl.constexpr,  # of the parts of grouped rows, else 0
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of some vectors: the part along u is removed, the rest is divided by |v|."""
    item_ptr = items_ptr + tl.program_id(0) * GRADIENT_ITEM
    source = tl.load(item_ptr + GRAD_SOURCE)
    n = tl.load(item_ptr + GRAD_VECTOR) + tl.arange(0, BLOCK_N)
    inside = n < tl.load(item_ptr + GRAD_VECTORS)  # [BLOCK_N]
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for use in range(tl.load(item_ptr + GRAD_FIRST_USE), tl.load(item_ptr + GRAD_STOP_USE)):
        image = tl.load(uses_ptr + use * USE + USE_IMAGE)
        total += _gradient(
            records_ptr + image * RECORD,
            spans_ptr + (3 if BLOCK_I > 0 else 2) * image,
            tl.load(uses_ptr + use * USE + USE_ROW) + n,
            inside,
            c,
            rows_ptr,
            floats_ptr,
            g_ptr,
            grad_ptr,
            grad_stride,
            separate_bias,
            pair_bias,
            g_scale,
            inverse_temperature,
            BLOCK_I,
        )
    channels = tl.load(source_records_ptr + source * SOURCE + CHANNELS)
    first = tl.load(item_ptr + GRAD_OUT)
    if WORDS:
        channels, first = tl.multiple_of(channels, 16), tl.multiple_of(first, 16)
    offsets = first + (tl.arange(0, BLOCK_N) * channels)[:, None] + c[None, :]
    for number in tl.static_range(NUM_SOURCES):
        if source == number:
            out = narrow(total, outs[number].dtype.element_ty)
            tl.store(outs[number] + offsets, out, inside[:, None] & (c < channels)[None, :])


def write_gradients(
    call: Call, packed: Packed, sums: PairSums, terms: plan.Terms, grad: Tensor, outs: tuple[Tensor, ...]
) -> None:
    """Fill `outs` `(B, N, C)`, one for every source; `grad` is that of the loss of the forward pass."""
    laid_out, device = layout.lay_out(call, plan.ROWS), grad.device
    items, uses = layout.gradient_items(call, plan.ROWS)
    run_kernel(
        pdcr_grad_kernel,
        (len(items),),
        (
            outs,
            items.on(device),
            uses.on(device),
            laid_out.sources.on(device),
            laid_out.records.on(device),
            sums.spans,
            packed.rows,
            packed.floats,
            sums.g,
            grad,
        ),
        (
            grad.stride(0) if grad.ndim else 0,
            *terms.gradient.values(),
        ),
        {
            "NUM_SOURCES": len(outs),
            "WORDS": all(source.channels % 16 == 0 for source in call.sources),
            "BLOCK_I": sums.block_i,
            "BLOCK_N": laid_out.block_n,
            "BLOCK_C": laid_out.block_c,
            "num_warps": plan.ROWS.num_warps,
            "enable_fp_fusion": True,
        },
    )
