"""Words of pixels: from class labels, from soft labels in fixed point, and sums of them within segments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._launch import launch
from contrastseg_fast.kernels.foreground_ratio import plan

_ROUND = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52: behind it, a double has no bits for a fraction

# Strides of columns may be specialised for being 1: lanes then lie along columns in every Triton.
_UNSPECIALIZED = (
    *("classes_per_word", "num_classes", "field_bits", "ignore_index", "num_words", "first_word"),
    *("num_pixels", "extent_y", "extent_x", "planes", "rows", "columns", "width"),
    *(f"labels_stride_{axis}" for axis in "bmzyxprl"),
)


def comparison_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which labels are compared by value."""
    if dtype == torch.float64:
        return tl.float64
    if dtype.is_floating_point:
        return tl.float32
    return tl.int64 if dtype in (torch.int64, torch.uint32) else tl.int32


def word_type(dtype: torch.dtype) -> tl.dtype:
    """The type of words in kernels."""
    return tl.int32 if dtype == torch.int32 else tl.int64


@triton.jit
def class_words(
    labels,
    inside,
    word,
    classes_per_word,
    num_classes,
    field_bits,
    ignore_index,
    LABEL: tl.constexpr,
    WORD: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
):
    """Words of labels: a one in the field of their class, in the first field if ignored, or 0."""
    labels = labels.to(LABEL)
    index = labels
    if LABEL.is_floating():
        in_range = (labels >= 0) & (labels < num_classes)
        index = tl.where(in_range, labels, -1.0).to(tl.int32)
        index = tl.where(index.to(LABEL) == labels, index, -1)
    first = word * classes_per_word
    known = (index >= first) & (index < tl.minimum(first + classes_per_word, num_classes))
    field = tl.where(known, index - first, 0).to(tl.int32)
    if HAS_IGNORE:
        ignored = labels == ignore_index.to(LABEL)
        field = tl.where(ignored, 0, field + 1)
        known = known | ignored
    one = tl.full(field.shape, 1, WORD)
    return tl.where(known & inside, one << (field * field_bits).to(WORD), 0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def fixed_point_kernel(
    labels_ptr,  # (B, M, Z, Y, X), any strides
    words_ptr,  # (B, M, Z, Y, X), or with HAS_IGNORE (B, M + 1, Z, Y, X)
    num_pixels,
    scale,
    extent_y,
    extent_x,
    labels_stride_b,
    labels_stride_m,
    labels_stride_z,
    labels_stride_y,
    labels_stride_x,
    num_classes,
    ignore_index,
    LABEL: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Soft labels as integers; the last layer has ones where all channels are ignored."""
    blocks = tl.cdiv(num_pixels, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = pixel < num_pixels
    row = pixel // extent_x
    labels_ptrs = labels_ptr + image * labels_stride_b + pixel % extent_x * labels_stride_x
    labels_ptrs += row // extent_y * labels_stride_z + row % extent_y * labels_stride_y
    counted = inside
    num_layers = num_classes.to(tl.int64)
    if HAS_IGNORE:
        num_layers += 1
    words_ptrs = words_ptr + image * num_layers * num_pixels + pixel
    if HAS_IGNORE:
        ignored = inside
        channel_ptrs = labels_ptrs
        for _ in range(num_classes):
            ignored = ignored & (tl.load(channel_ptrs, inside, 0).to(LABEL) == ignore_index.to(LABEL))
            channel_ptrs += labels_stride_m
        tl.store(words_ptrs + (num_layers - 1) * num_pixels, ignored.to(tl.int64), inside)
        counted = inside & (ignored == 0)
    for _ in range(num_classes):
        labels = tl.load(labels_ptrs, inside, 0).to(tl.float64)
        rounded = (labels * scale + _ROUND) - _ROUND
        tl.store(words_ptrs, tl.where(counted, rounded, 0.0).to(tl.int64), inside)
        labels_ptrs += labels_stride_m
        words_ptrs += num_pixels


def fixed_point(
    labels: Tensor, extents: Sequence[int], num_classes: int, ignore_index: int | None, scale: float
) -> Tensor:
    """Words `(B, layers, *spatial)` of soft labels; with `ignore_index` the last marks what it ignores."""
    has_ignore = ignore_index is not None
    words = labels.new_empty((labels.shape[0], num_classes + has_ignore, *extents), dtype=torch.int64)
    pixels = math.prod(extents)
    grid = plan.cdiv(pixels, plan.FIXED_POINT_ELEMENTS) * labels.shape[0]
    if grid > 0:
        launch(
            fixed_point_kernel,
            (grid,),
            (labels, words),
            (
                pixels,
                scale,
                *plan.three(extents, 1)[1:],
                *plan.strides(labels, len(extents)),
                num_classes,
                ignore_index or 0,
            ),
            {
                "LABEL": comparison_type(labels.dtype),
                "HAS_IGNORE": has_ignore,
                "BLOCK": plan.FIXED_POINT_ELEMENTS,
                "num_warps": plan.FIXED_POINT_WARPS,
                "enable_fp_fusion": True,
            },
        )
    return words


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def segment_sum_kernel(
    labels_ptr,  # (B, planes, rows, columns), any strides; or None: words are summed
    words_ptr,  # (B, W, planes, rows, columns) or None; may be the table
    table_ptr,  # (B, W, planes, rows, columns)
    num_words,
    first_word,
    planes,
    rows,
    columns,
    width,
    labels_stride_b,
    labels_stride_p,
    labels_stride_r,
    labels_stride_l,
    labels_stride_c,
    classes_per_word,
    num_classes,
    field_bits,
    ignore_index,
    LABEL: tl.constexpr,
    WORD: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    HAS_LINES: tl.constexpr,  # whether columns lie in lines
    SUM_PLANES: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    BLOCK_PLANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sums of words up to each pixel, from where the segments that it lies in begin along the summed axes.

    A program sums one segment. Columns lie in lines of `width` columns where they are two axes of labels that
    cannot be taken for one.
    """
    word = tl.program_id(0) % num_words  # programs side by side read the same labels
    block = tl.program_id(0) // num_words
    blocks_columns = tl.cdiv(columns, BLOCK_COLUMNS)
    blocks_rows = tl.cdiv(rows, BLOCK_ROWS)
    blocks_planes = tl.cdiv(planes, BLOCK_PLANES)
    first_column = (block % blocks_columns).to(tl.int64) * BLOCK_COLUMNS
    first_row = (block // blocks_columns % blocks_rows).to(tl.int64) * BLOCK_ROWS
    block = block // blocks_columns // blocks_rows
    first_plane = (block % blocks_planes).to(tl.int64) * BLOCK_PLANES
    image = (block // blocks_planes).to(tl.int64)
    plane = tl.arange(0, BLOCK_PLANES)[:, None]
    row = tl.arange(0, BLOCK_ROWS)[None, :]
    column = tl.arange(0, BLOCK_COLUMNS)[None, None, :]
    inside = (plane < planes - first_plane) & (row < rows - first_row)  # [BLOCK_PLANES, BLOCK_ROWS]
    inside = inside[:, :, None] & (column < columns - first_column)
    offsets = ((plane.to(tl.int64) * rows + row) * columns)[:, :, None] + column
    layer = image * num_words + word
    first_offset = ((layer * planes + first_plane) * rows + first_row) * columns + first_column
    table_ptrs = table_ptr + first_offset + offsets  # [BLOCK_PLANES, BLOCK_ROWS, BLOCK_COLUMNS]
    if labels_ptr is not None:
        labels_ptr += image * labels_stride_b + first_plane * labels_stride_p + first_row * labels_stride_r
        label_rows = plane.to(tl.int64) * labels_stride_p + row.to(tl.int64) * labels_stride_r
        column += first_column
        if HAS_LINES:
            columns_ptrs = labels_ptr + column // width * labels_stride_l + column % width * labels_stride_c
        else:
            columns_ptrs = labels_ptr + column * labels_stride_c
        words = class_words(
            tl.load(columns_ptrs + label_rows[:, :, None], inside, 0),
            inside,
            first_word + word,
            classes_per_word,
            num_classes,
            field_bits,
            ignore_index,
            LABEL,
            WORD,
            HAS_IGNORE,
        )
    else:
        words = tl.load(words_ptr + first_offset + offsets, inside, 0)
    if SUM_PLANES:
        words = tl.cumsum(words, 0)
    if SUM_ROWS:
        words = tl.cumsum(words, 1)
    if SUM_COLUMNS:
        words = tl.cumsum(words, 2)
    tl.store(table_ptrs, words, inside)


def sum_segments(
    labels: Tensor | None,
    words: Tensor | None,
    table: Tensor,
    segments: Sequence[int],
    first_word: int,
    fields: plan.Fields,
    num_classes: int,
    ignore_index: int | None,
) -> None:
    """Fill a table `(B, W, *spatial)` with sums along the leading axes.

    Args:
        labels: `(B, *spatial)`, or None.
        words: where there are no labels, `(B, W, *spatial)`, contiguous; it may be the table.
        segments: the segments' length along each summed axis.
        first_word: the word of the labels that comes first.
    """
    extents = table.shape[2:]
    dims, summed = len(extents), len(segments)
    # One axis that is not summed, or two as one, are the columns.
    leading = summed if summed < dims else dims - 1
    planes, rows = plan.three(extents[:leading], 1)[1:]
    width, columns = extents[-1], math.prod(extents[leading:])
    blocks = plan.three((*segments, *([] if summed == dims else [plan.SUM_LANES])), 1)
    programs = table.shape[0] * table.shape[1]
    programs *= math.prod(map(plan.cdiv, (planes, rows, columns), blocks))
    strides, has_lines = [0] * 5, False
    if labels is not None:
        outer = labels.stride()[1 : 1 + leading]
        lines = labels.stride(-2) if dims - leading == 2 else 0
        strides = [labels.stride(0), *plan.three(outer, 0)[1:], lines, labels.stride(-1)]
        has_lines = dims - leading == 2 and lines != width * labels.stride(-1)
    is_summed = plan.three([True] * summed + [False] * (summed < dims), False)
    launch(
        segment_sum_kernel,
        (programs,),
        (labels, words, table),
        (
            table.shape[1],
            first_word,
            planes,
            rows,
            columns,
            width,
            *strides,
            fields.classes_per_word,
            num_classes,
            fields.bits,
            ignore_index or 0,
        ),
        {
            "LABEL": comparison_type((labels if labels is not None else table).dtype),
            "WORD": word_type(table.dtype),
            "HAS_IGNORE": ignore_index is not None,
            "HAS_LINES": has_lines,
            **dict(zip(("SUM_PLANES", "SUM_ROWS", "SUM_COLUMNS"), is_summed, strict=True)),
            "BLOCK_PLANES": blocks[0],
            "BLOCK_ROWS": blocks[1],
            "BLOCK_COLUMNS": blocks[2],
            "num_warps": plan.SUM_WARPS,
            "enable_fp_fusion": True,
        },
    )
