"""Foreground ratios (Eq. 4) on a GPU: exact counts in boxes, from the labels or from running sums of them.

A pixel becomes a word of integer fields, one for each of some classes, with a one in the field of its class:
the sum of a box's words holds the counts of these classes, because a field has room for all pixels of a box.
Differences of sums are exact even where the sums themselves wrap around. Soft labels are words of their own,
in fixed point (`_fraction_bits` in contrastseg_fast/ops/foreground_ratio.py).

Small boxes are read pixel by pixel, in one launch. Where boxes are large or many, words are first summed up
along the leading one, two or three axes, a launch each; along a summed axis, a box then needs two words
instead of all. `choose_summed_axes` decides by shapes alone. All sums are of integers: no order shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import on

BORDERS = ("full", "clip", "background")
_MOST_FIELDS = 16  # of a word
_WIDEST_FIELD = 31  # bits
_TABLE_BYTES = 1 << 28  # running sums held at a time; more words come in several rounds
_ROUND = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52: behind it, a double has no bits for a fraction

# What `choose_summed_axes` weighs launches by: estimates from an H100's clock, caches and latencies.
_ELEMENTS_PER_US = 0.8e6  # pixels turned into words, or words added
_BYTES_PER_US = 2.0e6
_STEP_US = 0.8  # a load that the next one waits for
_LAUNCH_US = 2.0

BOX_ELEMENTS, BOX_WARPS = 1024, 4  # of a program
_MOST_BOXES = 32  # of a program
FIXED_POINT_ELEMENTS, FIXED_POINT_WARPS = 512, 4


class SumLaunch(NamedTuple):
    """What one program sums up: some lines, a part of their length at a time."""

    block_lines: int
    block_length: int
    num_warps: int


# By the length of the lines (the last entry serves all longer ones).
SUM_DOWN = {32: SumLaunch(32, 32, 4), 256: SumLaunch(16, 128, 8)}
SUM_ALONG_ROWS = {32: SumLaunch(32, 32, 4), 256: SumLaunch(4, 256, 4)}

_UNSPECIALIZED = (
    *("num_pixels", "num_classes", "num_lines", "columns", "length", "num_words", "first_word"),
    *("classes_per_word", "field_bits", "ignore_index", "num_boxes", "area"),
    *("extent_z", "extent_y", "extent_x", "size_z", "size_y", "size_x"),
    *(f"{name}_stride_{axis}" for name in ("labels", "source") for axis in "bwmzyxlrc"),
    *(f"starts_stride_{axis}" for axis in "bnd"),
    *(f"words_stride_{axis}" for axis in "lrc"),
)


@triton.jit
def _class_words(
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
    """Soft labels as integers; the layer behind them has ones where all channels are ignored."""
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
            words = _class_words(
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


@triton.jit
def _part_inside(starts_ptrs, present, extent, size):
    """Where boxes begin and end in the image along an axis."""
    start = tl.load(starts_ptrs, present, 0).to(tl.int64)
    size = size.to(tl.int64)
    start = tl.minimum(tl.maximum(start, -size), extent.to(tl.int64))
    begin = tl.maximum(start, 0)
    end = tl.maximum(tl.minimum(start + size, extent), begin)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _term(number, begin, end, SUMMED: tl.constexpr):
    """The coordinate of a term of a box's sum along an axis, whether it is there, and whether subtracted."""
    if SUMMED:
        coordinate = tl.where(number == 0, end, begin) - 1
        return coordinate, (number < 2) & (coordinate >= 0), number == 1
    coordinate = begin + number
    return coordinate, coordinate < end, number < 0


@triton.jit
def _quotient(numerator, denominator, BELOW_2_24: tl.constexpr):
    """The quotient of doubles in fp32, with the bits of IEEE division."""
    if BELOW_2_24:
        # Quotients of integers this small lie at least 2^-49 (relative) off the fp32 rounding boundaries, and
        # two Newton steps are within 2^-51. They take far fewer registers than the division.
        inverse = (1.0 / denominator.to(tl.float32)).to(tl.float64)
        inverse += inverse * (1.0 - denominator * inverse)
        inverse += inverse * (1.0 - denominator * inverse)
        return (numerator * inverse).to(tl.float32)
    return (numerator / denominator).to(tl.float32)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def box_ratio_kernel(
    source_ptr,  # labels (B, Z, Y, X), any strides; or words (B, W, Z, Y, X)
    starts_ptr,  # (B, N, D), any strides
    ratios_ptr,  # (B, N, M)
    valid_ptr,  # (B, N)
    num_boxes,
    num_words,
    first_word,
    unit,
    area,
    extent_z,
    extent_y,
    extent_x,
    size_z,
    size_y,
    size_x,
    source_stride_b,
    source_stride_w,
    source_stride_z,
    source_stride_y,
    source_stride_x,
    starts_stride_b,
    starts_stride_n,
    starts_stride_d,
    classes_per_word,
    num_classes,
    field_bits,
    ignore_index,
    DIMS: tl.constexpr,
    SUMMED: tl.constexpr,
    SOFT: tl.constexpr,
    BELOW_2_24: tl.constexpr,  # whether all counts are integers below 2^24
    BORDER: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    LABEL: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK_BOXES: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Ratios and valid fractions of boxes; source holds labels if it is not SOFT and no axis is SUMMED."""
    SUMMED_Z: tl.constexpr = DIMS == 3 and SUMMED >= 1
    SUMMED_Y: tl.constexpr = DIMS >= 2 and DIMS - 2 < SUMMED
    SUMMED_X: tl.constexpr = DIMS - 1 < SUMMED
    blocks = tl.cdiv(num_boxes, BLOCK_BOXES)
    layer = (tl.program_id(0) // blocks).to(tl.int64)
    image = layer // num_words
    source_word = layer % num_words
    word = first_word + source_word
    box = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_BOXES + tl.arange(0, BLOCK_BOXES)  # [BLOCK_BOXES]
    present = box < num_boxes
    starts_ptrs = starts_ptr + image * starts_stride_b + box * starts_stride_n
    begin_z = tl.zeros([BLOCK_BOXES], tl.int32)
    end_z = begin_z + 1
    begin_y = begin_z
    end_y = end_z
    if DIMS == 3:
        begin_z, end_z = _part_inside(starts_ptrs, present, extent_z, size_z)
    if DIMS >= 2:
        begin_y, end_y = _part_inside(starts_ptrs + (DIMS - 2) * starts_stride_d, present, extent_y, size_y)
    begin_x, end_x = _part_inside(starts_ptrs + (DIMS - 1) * starts_stride_d, present, extent_x, size_x)

    terms_z = 2 if SUMMED_Z else tl.minimum(size_z, extent_z).to(tl.int32)
    terms_y = 2 if SUMMED_Y else tl.minimum(size_y, extent_y).to(tl.int32)
    terms_x = 2 if SUMMED_X else tl.minimum(size_x, extent_x).to(tl.int32)
    source_ptr += image * source_stride_b
    sums = tl.zeros([BLOCK_BOXES, BLOCK_Y, BLOCK_X], WORD)
    ignored_sums = sums
    for number_z in range(terms_z):
        z, has_z, minus_z = _term(number_z, begin_z, end_z, SUMMED_Z)  # [BLOCK_BOXES]
        has_z = has_z & present
        planes_ptr = source_ptr + z.to(tl.int64) * source_stride_z
        for first_y in range(0, terms_y, BLOCK_Y):
            number_y = (first_y + tl.arange(0, BLOCK_Y))[None, :]
            y, has_y, minus_y = _term(number_y, begin_y[:, None], end_y[:, None], SUMMED_Y)
            has_y = has_y & has_z[:, None]  # [BLOCK_BOXES, BLOCK_Y]
            minus_y = minus_y ^ minus_z if SUMMED_Z else minus_y
            rows_ptr = planes_ptr[:, None] + y.to(tl.int64) * source_stride_y
            for first_x in range(0, terms_x, BLOCK_X):
                number_x = (first_x + tl.arange(0, BLOCK_X))[None, :]
                x, has_x, minus_x = _term(number_x, begin_x[:, None], end_x[:, None], SUMMED_X)
                inside = has_y[:, :, None] & has_x[:, None, :]  # [BLOCK_BOXES, BLOCK_Y, BLOCK_X]
                ptrs = rows_ptr[:, :, None] + (x.to(tl.int64) * source_stride_x)[:, None, :]
                if SOFT or SUMMED > 0:
                    words = tl.load(ptrs + source_word * source_stride_w, inside, 0)
                else:
                    labels = tl.load(ptrs, inside, 0)
                    words = _class_words(
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
                if SUMMED > 0:
                    minus = minus_y[:, :, None] ^ minus_x[:, None, :]
                    words = tl.where(minus, -words, words)
                sums += words
                if SOFT and HAS_IGNORE:
                    words = tl.load(ptrs + num_classes.to(tl.int64) * source_stride_w, inside, 0)
                    if SUMMED > 0:
                        words = tl.where(minus, -words, words)
                    ignored_sums += words

    total = tl.sum(tl.sum(sums, 2), 1)[:, None]  # [BLOCK_BOXES, 1]
    area = area.to(tl.float64)
    inside_area = ((end_z - begin_z).to(tl.float64) * (end_y - begin_y) * (end_x - begin_x))[:, None]
    ignored = tl.zeros([BLOCK_BOXES, 1], tl.float64)
    field = tl.arange(0, FIELDS)[None, :]  # those of classes, and one behind them for the valid fraction
    index = word * classes_per_word + field
    if SOFT:
        pixels = total.to(tl.float64) * unit
        if HAS_IGNORE:
            ignored = tl.sum(tl.sum(ignored_sums, 2), 1)[:, None].to(tl.float64)
    else:
        one = tl.full([1, 1], 1, WORD)
        room = (one << field_bits.to(WORD)) - 1
        shift = tl.minimum(field, classes_per_word - 1)
        if HAS_IGNORE:
            ignored = (total & room).to(tl.float64)
            shift += 1
        pixels = (total >> (shift * field_bits).to(WORD) & room).to(tl.float64)
    if BORDER == "background":
        pixels += tl.where(index == 0, area - inside_area, 0.0)  # [BLOCK_BOXES, FIELDS]
    of_class = field < classes_per_word
    valid = inside_area - ignored
    numerator = tl.where(of_class, pixels, valid)
    denominator = tl.where(of_class, valid if BORDER == "clip" else area - ignored, inside_area)
    positive = denominator > 0
    quotient = _quotient(numerator, tl.where(positive, denominator, 1.0), BELOW_2_24)
    quotient = tl.where(positive, quotient, 0.0)
    result = (image * num_boxes + box)[:, None]
    present = present[:, None]
    tl.store(ratios_ptr + result * num_classes + index, quotient, present & of_class & (index < num_classes))
    if word == 0:
        tl.store(valid_ptr + result + field * 0, quotient, present & (field == classes_per_word))


class _Fields(NamedTuple):
    """How words count classes."""

    bits: int
    classes_per_word: int
    num_words: int
    dtype: torch.dtype


def _fields(num_classes: int, has_ignore: bool, area: int) -> _Fields:
    """Words of as many classes as fit, 32 bits wide if that is enough for all; the sign bit stays free."""
    bits = max(1, area.bit_length())
    fields = num_classes + has_ignore
    if fields <= min(_MOST_FIELDS, 31 // bits):
        return _Fields(bits, num_classes, 1, torch.int32)
    classes_per_word = min(num_classes, min(_MOST_FIELDS, 63 // bits) - has_ignore)
    return _Fields(bits, classes_per_word, triton.cdiv(num_classes, classes_per_word), torch.int64)


def can_count(labels: Tensor, size: Sequence[int]) -> bool:
    """Whether a field has room for the pixels of a box, and coordinates and areas for their types."""
    extents = labels.shape[-len(size) :]
    area = math.prod(min(pair) for pair in zip(extents, size, strict=True))
    return area.bit_length() <= _WIDEST_FIELD and max(extents) < 1 << 31 and math.prod(size) < 1 << 63


def _block(terms: int) -> int:
    """The part of an axis that a program takes at once: a power of two that leaves few lanes idle."""
    if terms <= 8:
        return triton.next_power_of_2(max(terms, 1))
    return min((32, 16, 8), key=lambda block: triton.cdiv(terms, block) * block)


def _terms(extents: Sequence[int], size: Sequence[int], summed: int) -> list[int]:
    """Terms of a box's sum along planes, rows and columns; as many leading axes are summed up."""
    terms = [2 if axis < summed else min(pair) for axis, pair in enumerate(zip(extents, size, strict=True))]
    return [1] * (3 - len(terms)) + terms


def box_tile(extents: Sequence[int], size: Sequence[int], summed: int) -> tuple[int, int, int]:
    """Boxes, rows and columns that a program takes at once."""
    _, rows, columns = _terms(extents, size, summed)
    block_y, block_x = _block(rows), _block(columns)
    return max(1, min(_MOST_BOXES, BOX_ELEMENTS // (block_y * block_x))), block_y, block_x


def sum_launch(length: int, along_rows: bool) -> SumLaunch:
    """The launch that sums lines of this length up."""
    table = SUM_ALONG_ROWS if along_rows else SUM_DOWN
    return table[min((limit for limit in table if limit >= length), default=max(table))]


def choose_summed_axes(
    images: int, num_boxes: int, num_words: int, extents: Sequence[int], size: Sequence[int], label_bytes: int
) -> int:
    """How many leading axes to sum up before boxes are read: the estimated times decide.

    Example:
        >>> choose_summed_axes(8, 1024, 1, (512, 512), (11, 11), label_bytes=8)
        0
        >>> choose_summed_axes(8, 16384, 1, (512, 512), (91, 91), label_bytes=8)
        2
    """
    pixels = math.prod(extents)

    def time(summed: int) -> float:
        total = _LAUNCH_US
        for axis in range(summed):
            read = label_bytes if axis == 0 else 8
            steps = triton.cdiv(
                extents[axis], sum_launch(extents[axis], axis == len(extents) - 1).block_length
            )
            total += _LAUNCH_US + steps * 2 * _STEP_US
            total += images * num_words * pixels * (read + 8) / _BYTES_PER_US
        terms = _terms(extents, size, summed)
        steps = [
            triton.cdiv(number, block)
            for number, block in zip(terms, (1, *map(_block, terms[1:])), strict=True)
        ]
        lanes = math.prod(steps) * _block(terms[1]) * _block(terms[2])
        total += images * num_words * num_boxes * lanes / _ELEMENTS_PER_US
        return total + math.prod(steps) * _STEP_US

    return min(range(len(extents) + 1), key=time) if pixels > 0 else 0


def _comparison_type(dtype: torch.dtype) -> tl.dtype:
    """The type that labels are compared in, by value."""
    if dtype == torch.float64:
        return tl.float64
    if dtype.is_floating_point:
        return tl.float32
    return tl.int64 if dtype in (torch.int64, torch.uint32) else tl.int32


def _can_be(value: int, dtype: torch.dtype) -> bool:
    """Whether labels of this dtype can have this value."""
    if dtype.is_floating_point:
        return torch.tensor(float(value), dtype=dtype).item() == value
    return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _three(values: Sequence[int], filler: int) -> list[int]:
    """Of planes, rows and columns: `filler` stands for axes that are not there."""
    return [filler] * (3 - len(values)) + list(values)


def _strides(x: Tensor, dims: int) -> tuple[int, ...]:
    """Strides of images, channels, planes, rows and columns; 0 for axes that are not there."""
    strides = x.stride()
    channels = strides[1 : x.ndim - dims] or (0,)
    return (strides[0], *channels, *_three(strides[x.ndim - dims :], 0))


def _named(name: str, axes: str, values: Sequence[int]) -> dict[str, int]:
    """Arguments of a kernel by name, one per axis: `source_stride_b` and so on."""
    return {f"{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def _fixed_point(
    labels: Tensor, extents: Sequence[int], num_classes: int, ignore_index: int | None, scale: float
) -> Tensor:
    """Words `(B, layers, *spatial)` of soft labels; with `ignore_index` the last marks what it ignores."""
    has_ignore = ignore_index is not None
    words = labels.new_empty((labels.shape[0], num_classes + has_ignore, *extents), dtype=torch.int64)
    pixels = math.prod(extents)
    grid = triton.cdiv(pixels, FIXED_POINT_ELEMENTS) * labels.shape[0]
    if grid > 0:
        fixed_point_kernel[(grid,)](
            labels_ptr=labels,
            words_ptr=words,
            num_pixels=pixels,
            scale=scale,
            **_named("extent", "yx", _three(extents, 1)[1:]),
            **_named("labels_stride", "bmzyx", _strides(labels, len(extents))),
            num_classes=num_classes,
            ignore_index=ignore_index or 0,
            LABEL=_comparison_type(labels.dtype),
            HAS_IGNORE=has_ignore,
            BLOCK=FIXED_POINT_ELEMENTS,
            num_warps=FIXED_POINT_WARPS,
            enable_fp_fusion=True,
        )
    return words


def _sum_up(
    labels: Tensor | None, words: Tensor, axis: int, first_word: int, counting: dict[str, Any]
) -> None:
    """Running sums of words `(B, W, *spatial)` along an axis, in place, or of the labels' words."""
    extents = words.shape[2:]
    others = [other for other in range(len(extents)) if other != axis]
    along_rows = axis == len(extents) - 1

    def lines(strides: Sequence[int]) -> list[int]:
        return [*_three([strides[other] for other in others], 0)[1:], strides[axis]]

    label_strides = (0, 0, 0, 0) if labels is None else (labels.stride(0), *lines(labels.stride()[1:]))
    launch = sum_launch(extents[axis], along_rows)
    num_lines = math.prod(extents[other] for other in others)
    running_sum_kernel[(triton.cdiv(num_lines, launch.block_lines) * words.shape[0] * words.shape[1],)](
        labels_ptr=labels,
        words_ptr=words,
        num_words=words.shape[1],
        first_word=first_word,
        num_pixels=math.prod(extents),
        num_lines=num_lines,
        columns=extents[others[-1]] if others else 1,
        length=extents[axis],
        **_named("labels_stride", "brcl", label_strides),
        **_named("words_stride", "rcl", lines(words.stride()[2:])),
        **counting,
        ALONG_ROWS=along_rows,
        BLOCK_LINES=launch.block_lines,
        BLOCK_LENGTH=launch.block_length,
        num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )


def foreground_ratio(
    labels: Tensor,
    starts: Tensor,
    size: Sequence[int],
    num_classes: int,
    border: str,
    ignore_index: int | None,
    summed_axes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As the op; `summed_axes` overrides how many axes are summed up."""
    dims = len(size)
    soft = labels.ndim == dims + 2
    if labels.dtype in (torch.bool, torch.uint64):  # a uint64 beyond int64 wraps around, as in the default
        labels = labels.view(torch.uint8 if labels.dtype == torch.bool else torch.int64)
    if ignore_index is not None and not _can_be(ignore_index, labels.dtype):
        ignore_index = None
    has_ignore = ignore_index is not None
    images, num_boxes, extents = labels.shape[0], starts.shape[-2], labels.shape[-dims:]
    ratios = labels.new_empty((images, num_boxes, num_classes), dtype=torch.float32)
    valid_fraction = labels.new_empty((images, num_boxes), dtype=torch.float32)
    if images == 0 or num_boxes == 0:
        return ratios, valid_fraction

    area = math.prod(_terms(extents, size, 0))
    scale = 2.0 ** min(40, 52 - area.bit_length()) if soft else 1.0
    fields = _Fields(1, 1, num_classes, torch.int64) if soft else _fields(num_classes, has_ignore, area)
    if summed_axes is None:
        label_bytes = 8 if soft else labels.element_size()
        summed_axes = choose_summed_axes(images, num_boxes, fields.num_words, extents, size, label_bytes)
    words_at_once = fields.num_words
    if summed_axes > 0 and not soft:
        word_bytes = images * math.prod(extents) * fields.dtype.itemsize
        words_at_once = max(1, min(words_at_once, _TABLE_BYTES // word_bytes))
    block_boxes, block_y, block_x = box_tile(extents, size, summed_axes)
    counting = {
        "classes_per_word": fields.classes_per_word,
        "num_classes": num_classes,
        "field_bits": fields.bits,
        "ignore_index": ignore_index or 0,
        "LABEL": _comparison_type(labels.dtype),
        "WORD": tl.int32 if fields.dtype == torch.int32 else tl.int64,
        "HAS_IGNORE": has_ignore,
    }
    with on(labels):
        source = _fixed_point(labels, extents, num_classes, ignore_index, scale) if soft else labels
        for first_word in range(0, fields.num_words, words_at_once):
            num_words = min(words_at_once, fields.num_words - first_word)
            if summed_axes > 0 and not soft:
                source = labels.new_empty((images, num_words, *extents), dtype=fields.dtype)
            for axis in range(summed_axes):
                _sum_up(labels if axis == 0 and not soft else None, source, axis, first_word, counting)
            box_ratio_kernel[(triton.cdiv(num_boxes, block_boxes) * images * num_words,)](
                source_ptr=source,
                starts_ptr=starts,
                ratios_ptr=ratios,
                valid_ptr=valid_fraction,
                num_boxes=num_boxes,
                num_words=num_words,
                first_word=first_word,
                unit=1 / scale,
                area=math.prod(size),
                **_named("extent", "zyx", _three(extents, 1)),
                **_named("size", "zyx", _three(size, 1)),
                **_named("source_stride", "bwzyx", _strides(source, dims)),
                **_named("starts_stride", "bnd", (*(0,) * (3 - starts.ndim), *starts.stride())),
                **counting,
                DIMS=dims,
                SUMMED=summed_axes,
                SOFT=soft,
                BELOW_2_24=math.prod(size) < 1 << 24 and not soft,
                BORDER=border,
                BLOCK_BOXES=block_boxes,
                BLOCK_Y=block_y,
                BLOCK_X=block_x,
                FIELDS=triton.next_power_of_2(fields.classes_per_word + 1),
                num_warps=BOX_WARPS,
                enable_fp_fusion=True,
            )
    return ratios, valid_fraction
