"""Words of pixels: from class labels, from soft labels in fixed point, and running sums of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels.foreground_ratio import plan

_ROUND = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52: behind it, a double has no bits for a fraction

COUNTING = ("classes_per_word", "num_classes", "field_bits", "ignore_index")
_UNSPECIALIZED = (
    *COUNTING,
    *("num_pixels", "num_lines", "columns", "length", "num_words", "first_word", "extent_y", "extent_x"),
    *(f"labels_stride_{axis}" for axis in "bmzyxlrc"),
    *(f"words_stride_{axis}" for axis in "lrc"),
)


def comparison_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which labels are compared by value."""
    if dtype == torch.float64:
        return tl.float64
    if dtype.is_floating_point:
        return tl.float32
    return tl.int64 if dtype in (torch.int64, torch.uint32) else tl.int32


def counting_arguments(
    labels: Tensor, fields: plan.Fields, num_classes: int, ignore_index: int | None
) -> dict[str, Any]:
    """What the kernels that make words of labels or read them take, by the names of their arguments."""
    return {
        "classes_per_word": fields.classes_per_word,
        "num_classes": num_classes,
        "field_bits": fields.bits,
        "ignore_index": ignore_index or 0,
        "LABEL": comparison_type(labels.dtype),
        "WORD": tl.int32 if fields.dtype == torch.int32 else tl.int64,
        "HAS_IGNORE": ignore_index is not None,
    }


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
    field = tl.where(known, index - first, 0).to(WORD)
    if HAS_IGNORE:
        ignored = labels == ignore_index.to(LABEL)
        field = tl.where(ignored, 0, field + 1)
        known = known | ignored
    one = tl.full(field.shape, 1, WORD)
    return tl.where(known & inside, one << (field * field_bits.to(WORD)), 0)


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
        fixed_point_kernel[(grid,)](
            labels_ptr=labels,
            words_ptr=words,
            num_pixels=pixels,
            scale=scale,
            **plan.named("extent", "yx", plan.three(extents, 1)[1:]),
            **plan.named("labels_stride", "bmzyx", plan.strides(labels, len(extents))),
            num_classes=num_classes,
            ignore_index=ignore_index or 0,
            LABEL=comparison_type(labels.dtype),
            HAS_IGNORE=has_ignore,
            BLOCK=plan.FIXED_POINT_ELEMENTS,
            num_warps=plan.FIXED_POINT_WARPS,
            enable_fp_fusion=True,
        )
    return words


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def running_sum_kernel(
    labels_ptr,  # (B, Z, Y, X), any strides; or None: words are summed in place
    words_ptr,  # (B, W, Z, Y, X)
    num_words,
    first_word,
    num_pixels,
    num_lines,
    columns,
    length,
    labels_stride_b,
    labels_stride_r,
    labels_stride_c,
    labels_stride_l,
    words_stride_r,
    words_stride_c,
    words_stride_l,
    classes_per_word,
    num_classes,
    field_bits,
    ignore_index,
    LABEL: tl.constexpr,
    WORD: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    """Running sums along one axis. Its lines stand in rows and columns, those of the other two axes."""
    blocks = tl.cdiv(num_lines, BLOCK_LINES)
    layer = (tl.program_id(0) // blocks).to(tl.int64)
    line = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)  # [BLOCK_LINES]
    row = line // columns
    column = line % columns
    lines_ptr = words_ptr + layer * num_pixels + row * words_stride_r + column * words_stride_c
    lines_inside = line < num_lines
    if labels_ptr is not None:
        word = first_word + layer % num_words
        label_lines_ptr = labels_ptr + layer // num_words * labels_stride_b
        label_lines_ptr += row * labels_stride_r + column * labels_stride_c
    total = tl.zeros([BLOCK_LINES], WORD)
    for first in tl.range(0, length, BLOCK_LENGTH, num_stages=3):  # the next loads are under way
        step = (first + tl.arange(0, BLOCK_LENGTH)).to(tl.int64)  # [BLOCK_LENGTH]
        if ALONG_ROWS:
            inside = lines_inside[:, None] & (step < length)[None, :]  # [BLOCK_LINES, BLOCK_LENGTH]
            ptrs = lines_ptr[:, None] + step[None, :]
        else:
            inside = (step < length)[:, None] & lines_inside[None, :]  # [BLOCK_LENGTH, BLOCK_LINES]
            ptrs = lines_ptr[None, :] + (step * words_stride_l)[:, None]
        if labels_ptr is not None:
            if ALONG_ROWS:
                label_ptrs = label_lines_ptr[:, None] + (step * labels_stride_l)[None, :]
            else:
                label_ptrs = label_lines_ptr[None, :] + (step * labels_stride_l)[:, None]
            labels = tl.load(label_ptrs, inside, 0)
            words = class_words(
                labels,
                inside,
                word,
                classes_per_word,
                num_classes,
                field_bits,
                ignore_index,
                LABEL,
                WORD,
                HAS_IGNORE,
            )
        else:
            words = tl.load(ptrs, inside, 0)
        if ALONG_ROWS:
            tl.store(ptrs, tl.cumsum(words, 1) + total[:, None], inside)
            total += tl.sum(words, 1)
        else:
            tl.store(ptrs, tl.cumsum(words, 0) + total[None, :], inside)
            total += tl.sum(words, 0)


def sum_up(
    labels: Tensor | None, words: Tensor, axis: int, first_word: int, counting: dict[str, Any]
) -> None:
    """Running sums of words `(B, W, *spatial)` along an axis, in place, or of the labels' words."""
    extents = words.shape[2:]
    others = [other for other in range(len(extents)) if other != axis]
    along_rows = axis == len(extents) - 1

    def lines(strides: Sequence[int]) -> list[int]:
        return [*plan.three([strides[other] for other in others], 0)[1:], strides[axis]]

    label_strides = (0, 0, 0, 0) if labels is None else (labels.stride(0), *lines(labels.stride()[1:]))
    launch = plan.sum_launch(extents[axis], along_rows)
    num_lines = math.prod(extents[other] for other in others)
    running_sum_kernel[(plan.cdiv(num_lines, launch.block_lines) * words.shape[0] * words.shape[1],)](
        labels_ptr=labels,
        words_ptr=words,
        num_words=words.shape[1],
        first_word=first_word,
        num_pixels=math.prod(extents),
        num_lines=num_lines,
        columns=extents[others[-1]] if others else 1,
        length=extents[axis],
        **plan.named("labels_stride", "brcl", label_strides),
        **plan.named("words_stride", "rcl", lines(words.stride()[2:])),
        **counting,
        ALONG_ROWS=along_rows,
        BLOCK_LINES=launch.block_lines,
        BLOCK_LENGTH=launch.block_length,
        num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )
