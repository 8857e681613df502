"""Packed rows: vectors as the kernels multiply them, and what goes with each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import narrow
from contrastseg_fast.kernels._launch import launch as run_kernel
from contrastseg_fast.kernels.pdcr import layout, plan
from contrastseg_fast.kernels.pdcr.groups import (
    find_places,
    load_vector_numbers,
    pdcr_groups_kernel,
    store_cores,
)
from contrastseg_fast.kernels.pdcr.layout import (
    CHANNELS,
    CORES,
    COUNT_X,
    COUNT_Y,
    COUNT_Z,
    EXTENT_X,
    EXTENT_Y,
    EXTENT_Z,
    INVERSE_LENGTH,
    PADDED,
    PHI,
    POSITIONS_AT,
    RECORD,
    ROW_FIRST,
    ROW_GROUP_BLOCK,
    ROW_IMAGE,
    ROW_ITEM,
    ROW_RATIOS,
    ROW_SOURCE,
    ROW_SOURCE_IMAGE,
    ROW_SUMS,
    ROW_VALID_SUM,
    ROWS,
    ROWS_OF_VECTORS,
    SCALE,
    SOURCE,
    STRIDE_B,
    STRIDE_C,
    STRIDE_N,
    WIDTH,
    Z,
)
from contrastseg_fast.kernels.pdcr.tiles import EXCLUDED, load_phi
from contrastseg_fast.kernels.sample_plan import fits, planned_position
from contrastseg_fast.problems import Call, Source
from contrastseg_fast.sample_plan import SamplePlan

# How vectors lie in a source: neighbours in memory are positions, channels, or channels in whole words;
# and where: one after another, by a plan (in 32 bits, in 64), or where positions say.
BY_POSITION, BY_CHANNEL, BY_WORD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
DENSE, PLANNED, PLANNED_FAR, PLACED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


class Inputs(NamedTuple):
    """The tensors of a call, and how they are read."""

    sources: tuple[Tensor, ...]  # of one dtype
    ratios: Tensor  # of all segments, or categories
    ratios_strides: tuple[int, int]  # of vectors, of classes
    valid: Tensor | None  # bool, or fp32 fractions that are valid from `least_valid` on
    positions: Tensor | None = None  # int64, of the sources that follow no plan
    least_valid: float = 0.0

    @property
    def valid_bytes(self) -> Tensor | None:
        """`valid` as the kernels take it."""
        if self.valid is not None and self.valid.dtype == torch.bool:
            return self.valid.view(torch.uint8)
        return self.valid


class Packed(NamedTuple):
    """What the forward pass leaves for the backward pass; layout.py says what lies where."""

    rows: Tensor
    floats: Tensor


@triton.jit
def positions_of(source_record_ptr, positions_ptr, n, included, PLACE: tl.constexpr):
    """Where vectors lie in a source, in int64."""
    if PLACE == DENSE:
        return n.to(tl.int64)
    if PLACE == PLACED:
        return tl.load(positions_ptr + tl.load(source_record_ptr + POSITIONS_AT) + n, included, 0)
    INTEGER: tl.constexpr = tl.int32 if PLACE == PLANNED else tl.int64
    position = planned_position(
        n.to(INTEGER),
        tl.load(source_record_ptr + EXTENT_Z).to(INTEGER),
        tl.load(source_record_ptr + EXTENT_Y).to(INTEGER),
        tl.load(source_record_ptr + EXTENT_X).to(INTEGER),
        tl.load(source_record_ptr + COUNT_Z).to(INTEGER),
        tl.load(source_record_ptr + COUNT_Y).to(INTEGER),
        tl.load(source_record_ptr + COUNT_X).to(INTEGER),
    )
    return position.to(tl.int64)


@triton.jit
def load_vectors(source_ptr, source_record_ptr, image, position, c, included, ORDER: tl.constexpr):
    """Vectors [BLOCK_N, BLOCK_C] as they are, read along what are neighbours in memory.

    Each source reads its numbers itself, since `multiple_of` marks an operation: not the caller's.
    """
    stride_b = tl.load(source_record_ptr + STRIDE_B)
    stride_n = tl.load(source_record_ptr + STRIDE_N)
    channels = tl.load(source_record_ptr + CHANNELS)
    if ORDER == BY_POSITION:
        stride_c = tl.load(source_record_ptr + STRIDE_C)
        ptrs = source_ptr + image * stride_b + (c * stride_c)[:, None] + (position * stride_n)[None, :]
        return tl.trans(tl.load(ptrs, (c < channels)[:, None] & included[None, :], 0))
    if ORDER == BY_WORD:
        stride_b = tl.multiple_of(stride_b, 16)
        stride_n = tl.multiple_of(stride_n, 16)
        channels = tl.multiple_of(channels, 16)
    ptrs = source_ptr + image * stride_b + (position * stride_n)[:, None] + c[None, :]
    return tl.load(ptrs, included[:, None] & (c < channels)[None, :], 0)


@triton.jit
def shorten(v):
    """`v'' = v 2^-k` with 1 <= |v''| < 2, 1 / |v''| and 1 / |v| of vectors in fp32; 0 for zero vectors."""
    largest = tl.max(tl.abs(v), 1)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    shrink = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)  # 2^-k: |entries| < 4
    v = v * shrink[:, None]
    square = tl.sum(v * v, 1)
    half = ((square.to(tl.int32, bitcast=True) >> 23) - 127) >> 1
    shrink_more = ((127 - half) << 23).to(tl.float32, bitcast=True)  # 1 <= |v''| < 2
    square *= shrink_more * shrink_more
    scale = tl.rsqrt(square)
    scale = tl.where(square > 0, scale * (1.5 - 0.5 * square * scale * scale), 0.0)  # rounded once
    inverse_length = tl.where(square > 0, scale * (shrink * shrink_more), 0.0)
    return v * shrink_more[:, None], scale, inverse_length


@triton.jit
def store_rows(
    packed,  # [BLOCK_N, BLOCK_C]
    scale,
    inverse_length,
    included,
    in_image,
    row,
    n,
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
):
    """Stores packed rows of an image, and what goes with each."""
    padded = tl.load(record_ptr + PADDED)
    width = tl.multiple_of(tl.load(record_ptr + WIDTH), 8)
    row_ptrs = rows_ptr + tl.multiple_of(tl.load(record_ptr + ROWS), 64) + (row * width)[:, None] + c[None, :]
    tl.store(row_ptrs, narrow(packed, rows_ptr.dtype.element_ty), in_image[:, None] & (c < width)[None, :])
    tl.store(floats_ptr + tl.load(record_ptr + SCALE) + row, tl.where(included, scale, EXCLUDED), in_image)
    inverse_length = tl.where(included, inverse_length, 0.0)
    tl.store(floats_ptr + tl.load(record_ptr + INVERSE_LENGTH) + row, inverse_length, in_image)
    ratio_ptr = ratios_ptr + tl.load(item_ptr + ROW_RATIOS)
    phi_ptr = floats_ptr + tl.load(record_ptr + PHI)
    for _ in range(num_classes):
        tl.store(phi_ptr + row, load_phi(ratio_ptr, n, ratios_stride_n, included, phi_scale), in_image)
        ratio_ptr += ratios_stride_m
        phi_ptr += padded


@triton.jit(do_not_specialize=["num_classes", "ratios_stride_n", "ratios_stride_m", "num_counters"])
def pdcr_rows_kernel(
    sources,  # tuple of (B, N, C) or maps
    ratios_ptr,
    valid_ptr,  # bytes, fp32, or None
    positions_ptr,  # or None
    items_ptr,
    source_records_ptr,
    records_ptr,
    keys_ptr,  # unless GROUPED, None
    rows_ptr,
    floats_ptr,
    scratch_ptr,
    partials_ptr,
    num_classes,
    ratios_stride_n,
    ratios_stride_m,
    num_counters,
    phi_scale,
    least_valid,
    UNIT: tl.constexpr,  # whether to pack v / |v|, with scale 1
    ORDERS: tl.constexpr,  # of the sources
    PLACES: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Packs some rows of an image and sums their unit vectors. What later kernels add to is initialised.

    Grouped rows lie where their group does, and the loss kernel sums their unit vectors.
    """
    item_ptr = items_ptr + tl.program_id(0) * ROW_ITEM
    record_ptr = records_ptr + tl.load(item_ptr + ROW_IMAGE) * RECORD
    source = tl.load(item_ptr + ROW_SOURCE)
    source_record_ptr = source_records_ptr + source * SOURCE
    first_row = tl.load(item_ptr + ROW_FIRST)
    in_image, n, included = load_vector_numbers(item_ptr, valid_ptr, least_valid, BLOCK_N)  # [BLOCK_N]
    step = tl.arange(0, BLOCK_N)
    row = first_row + step
    num_skipped = tl.zeros([BLOCK_N], tl.int32)
    if GROUPED:
        block = tl.load(item_ptr + ROW_GROUP_BLOCK)
        place, num_skipped, first_tile, num_tiles, valid_tiles = find_places(
            record_ptr, keys_ptr, block, row, in_image
        )
        tl.store(floats_ptr + tl.load(record_ptr + ROWS_OF_VECTORS) + row, place.to(tl.float32), in_image)
        if first_row == 0:
            cores_ptr = floats_ptr + tl.load(record_ptr + CORES)
            store_cores(cores_ptr, first_tile, num_tiles, valid_tiles)
        row = place.to(tl.int64)

    c = tl.arange(0, BLOCK_C)
    image = tl.load(item_ptr + ROW_SOURCE_IMAGE)
    v = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for number in tl.static_range(len(ORDERS)):
        if source == number:
            position = positions_of(source_record_ptr, positions_ptr, n, included, PLACES[number])
            v = load_vectors(
                sources[number], source_record_ptr, image, position, c, included, ORDERS[number]
            ).to(tl.float32)

    packed, scale, inverse_length = shorten(v)
    unit = packed * scale[:, None]
    width = tl.load(record_ptr + WIDTH)
    if not GROUPED:
        tl.store(scratch_ptr + tl.load(item_ptr + ROW_SUMS) + c, tl.sum(unit, 0), c < width)
        tl.store(scratch_ptr + tl.load(item_ptr + ROW_VALID_SUM), tl.sum(included.to(tl.float32), 0))
    tl.store(scratch_ptr + tl.load(record_ptr + Z) + row, num_skipped.to(tl.float32), in_image)
    if UNIT:
        packed = unit
        scale = tl.where(scale == 0, 0.0, 1.0)
    store_rows(
        packed,
        scale,
        inverse_length,
        included,
        in_image,
        row,
        n,
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
    if tl.program_id(0) == 0:
        for first in range(0, num_counters, BLOCK_N):
            tl.store(partials_ptr + first + step, 0.0, first + step < num_counters)


def _order(source: Source) -> int:
    """How vectors lie in a source."""
    if source.strides[2] != 1:
        return BY_POSITION.value
    return (BY_WORD if source.in_words else BY_CHANNEL).value


def place_of(source: Source) -> int:
    """Where vectors lie in a source."""
    if source.positions_at >= 0:
        return PLACED.value
    if source.extents == source.counts:
        return DENSE.value
    return (PLANNED if fits(SamplePlan(source.extents, source.counts)) else PLANNED_FAR).value


def new_packed(call: Call, first: Tensor) -> Packed:
    """What is packed of a call, to fill; `first` is one of its sources."""
    num_rows, num_floats = call.saved_sizes()
    return Packed(first.new_empty((num_rows,)), first.new_empty((num_floats,), dtype=torch.float32))


def pack(call: Call, inputs: Inputs, packed: Packed, terms: plan.Terms) -> tuple[Tensor, Tensor]:
    """Fill the packed rows of a call; scratch and partials, which `layout.py` describes."""
    laid_out = layout.lay_out(call, plan.ROWS)
    first, sizes = inputs.sources[0], laid_out.sizes
    scratch = packed.floats.new_empty((sizes.scratch,))
    partials = first.new_empty((sizes.partials,), dtype=torch.float64)
    valid = inputs.valid
    if valid is not None and valid.dtype == torch.bool:
        valid = valid.view(torch.uint8)
    keys = None
    if call.grouped:
        keys = first.new_empty((sizes.keys,), dtype=torch.int32)
        run_kernel(
            pdcr_groups_kernel,
            (len(laid_out.group_items),),
            (
                inputs.ratios,
                valid,
                laid_out.group_items.on(first.device),
                laid_out.records.on(first.device),
                keys,
            ),
            (call.num_compared, *inputs.ratios_strides, inputs.least_valid),
            {
                "CATEGORICAL": terms.modes["CATEGORICAL"],
                "BLOCK_N": laid_out.group_n,
                "num_warps": plan.ROWS.num_warps,
                "enable_fp_fusion": True,
            },
        )
    run_kernel(
        pdcr_rows_kernel,
        (len(laid_out.row_items),),
        (
            inputs.sources,
            inputs.ratios,
            inputs.valid_bytes,
            inputs.positions,
            laid_out.row_items.on(first.device),
            laid_out.sources.on(first.device),
            laid_out.records.on(first.device),
            keys,
            packed.rows,
            packed.floats,
            scratch,
            partials,
        ),
        (
            call.num_compared,
            inputs.ratios_strides[0],
            inputs.ratios_strides[1],
            sizes.counters,
            terms.phi_scale,
            inputs.least_valid,
        ),
        {
            "UNIT": first.dtype == torch.float32,
            "ORDERS": tuple(map(_order, call.sources)),
            "PLACES": tuple(map(place_of, call.sources)),
            "GROUPED": call.grouped,
            "BLOCK_N": laid_out.block_n,
            "BLOCK_C": laid_out.block_c,
            "num_warps": plan.ROWS.num_warps,
            "enable_fp_fusion": True,
        },
    )
    return scratch, partials
