"""The ratios of patches, from the words of their pixels or from running sums of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels.foreground_ratio import plan
from contrastseg_fast.kernels.foreground_ratio.words import COUNTING, class_words

_UNSPECIALIZED = (
    *COUNTING,
    *("num_words", "first_word", "num_patches", "area"),
    *("extent_z", "extent_y", "extent_x", "size_z", "size_y", "size_x"),
    *(f"source_stride_{axis}" for axis in "bwzyx"),
    *(f"starts_stride_{axis}" for axis in "bnd"),
)


@triton.jit
def _part_inside(starts_ptrs, present, extent, size):
    """Where patches begin and end in the image along an axis."""
    start = tl.load(starts_ptrs, present, 0).to(tl.int64)
    size = size.to(tl.int64)
    start = tl.minimum(tl.maximum(start, -size), extent.to(tl.int64))
    begin = tl.maximum(start, 0)
    end = tl.maximum(tl.minimum(start + size, extent), begin)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _term(number, begin, end, SUMMED: tl.constexpr):
    """The coordinate of a term of a sum along an axis, whether it exists, and whether it is subtracted."""
    if SUMMED:
        coordinate = tl.where(number == 0, end, begin) - 1
        return coordinate, (number < 2) & (coordinate >= 0), number == 1
    coordinate = begin + number
    return coordinate, coordinate < end, number < 0


@triton.jit
def _ratio(numerator, denominator, BELOW_2_24: tl.constexpr):
    """The quotient of doubles in fp32, with the bits of IEEE division; 0 where the denominator is 0."""
    positive = denominator > 0
    denominator = tl.where(positive, denominator, 1.0)
    if BELOW_2_24:
        # Quotients of integers this small lie at least 2^-49 (relative) off the fp32 rounding boundaries, and
        # two Newton steps are within 2^-51. They take far fewer registers than the division.
        reciprocal = (1.0 / denominator.to(tl.float32)).to(tl.float64)
        reciprocal += reciprocal * (1.0 - denominator * reciprocal)
        reciprocal += reciprocal * (1.0 - denominator * reciprocal)
        quotient = (numerator * reciprocal).to(tl.float32)
    else:
        quotient = (numerator / denominator).to(tl.float32)
    return tl.where(positive, quotient, 0.0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def patch_ratio_kernel(
    source_ptr,  # labels (B, Z, Y, X), any strides; or words (B, W, Z, Y, X)
    starts_ptr,  # (B, N, D), any strides
    ratios_ptr,  # (B, N, M)
    valid_fraction_ptr,  # (B, N)
    inside_ratios_ptr,  # (B, N, M) or None
    num_patches,
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
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Ratios and valid fractions of patches; source holds labels unless SOFT or some axis is SUMMED."""
    SUMMED_Z: tl.constexpr = DIMS == 3 and SUMMED >= 1
    SUMMED_Y: tl.constexpr = DIMS >= 2 and DIMS - 2 < SUMMED
    SUMMED_X: tl.constexpr = DIMS - 1 < SUMMED
    blocks = tl.cdiv(num_patches, BLOCK_PATCHES)
    layer = (tl.program_id(0) // blocks).to(tl.int64)
    image = layer // num_words
    source_word = layer % num_words
    word = first_word + source_word
    first_patch = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_PATCHES
    patch = first_patch + tl.arange(0, BLOCK_PATCHES)  # [BLOCK_PATCHES]
    present = patch < num_patches
    starts_ptrs = starts_ptr + image * starts_stride_b + patch * starts_stride_n
    begin_z = tl.zeros([BLOCK_PATCHES], tl.int32)
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
    sums = tl.zeros([BLOCK_PATCHES, BLOCK_Y, BLOCK_X], WORD)
    ignored_sums = sums
    for number_z in range(terms_z):
        z, has_z, minus_z = _term(number_z, begin_z, end_z, SUMMED_Z)  # [BLOCK_PATCHES]
        has_z = has_z & present
        planes_ptr = source_ptr + z.to(tl.int64) * source_stride_z
        for first_y in range(0, terms_y, BLOCK_Y):
            number_y = (first_y + tl.arange(0, BLOCK_Y))[None, :]
            y, has_y, minus_y = _term(number_y, begin_y[:, None], end_y[:, None], SUMMED_Y)
            has_y = has_y & has_z[:, None]  # [BLOCK_PATCHES, BLOCK_Y]
            minus_y = minus_y ^ minus_z if SUMMED_Z else minus_y
            rows_ptr = planes_ptr[:, None] + y.to(tl.int64) * source_stride_y
            for first_x in range(0, terms_x, BLOCK_X):
                number_x = (first_x + tl.arange(0, BLOCK_X))[None, :]
                x, has_x, minus_x = _term(number_x, begin_x[:, None], end_x[:, None], SUMMED_X)
                inside = has_y[:, :, None] & has_x[:, None, :]  # [BLOCK_PATCHES, BLOCK_Y, BLOCK_X]
                ptrs = rows_ptr[:, :, None] + (x.to(tl.int64) * source_stride_x)[:, None, :]
                if SOFT or SUMMED > 0:
                    words = tl.load(ptrs + source_word * source_stride_w, inside, 0)
                else:
                    labels = tl.load(ptrs, inside, 0)
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
                if SUMMED > 0:
                    minus = minus_y[:, :, None] ^ minus_x[:, None, :]
                    words = tl.where(minus, -words, words)
                sums += words
                if SOFT and HAS_IGNORE:
                    words = tl.load(ptrs + num_classes.to(tl.int64) * source_stride_w, inside, 0)
                    if SUMMED > 0:
                        words = tl.where(minus, -words, words)
                    ignored_sums += words

    total = tl.sum(tl.sum(sums, 2), 1)[:, None]  # [BLOCK_PATCHES, 1]
    area = area.to(tl.float64)
    inside_area = ((end_z - begin_z).to(tl.float64) * (end_y - begin_y) * (end_x - begin_x))[:, None]
    ignored = tl.zeros([BLOCK_PATCHES, 1], tl.float64)
    field = tl.arange(0, FIELDS)[None, :]  # those of the classes, and one more for the valid fraction
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
    of_class = field < classes_per_word
    valid = inside_area - ignored
    result = (image * num_patches + patch)[:, None]
    present = present[:, None]
    ratio_offsets = result * num_classes + index
    has_ratio = present & of_class & (index < num_classes)
    counted = pixels
    if BORDER == "background":
        pixels += tl.where(index == 0, area - inside_area, 0.0)  # [BLOCK_PATCHES, FIELDS]
    numerator = tl.where(of_class, pixels, valid)
    denominator = tl.where(of_class, valid if BORDER == "clip" else area - ignored, inside_area)
    ratio = _ratio(numerator, denominator, BELOW_2_24)
    tl.store(ratios_ptr + ratio_offsets, ratio, has_ratio)
    if inside_ratios_ptr is not None:
        inside_ratio = ratio if BORDER == "clip" else _ratio(counted, valid, BELOW_2_24)
        tl.store(inside_ratios_ptr + ratio_offsets, inside_ratio, has_ratio)
    if word == 0:
        tl.store(valid_fraction_ptr + result + field * 0, ratio, present & (field == classes_per_word))


def write_ratios(
    source: Tensor,
    starts: Tensor,
    size: Sequence[int],
    border: str,
    results: tuple[Tensor, Tensor, Tensor],
    *,
    fields: plan.Fields,
    first_word: int,
    num_words: int,
    unit: float,
    soft: bool,
    summed_axes: int,
    counting: dict[str, Any],
) -> None:
    """Fill the ratios of the classes in some words, and with the first word the valid fractions.

    Args:
        source: labels `(B, *spatial)`, or words `(B, num_words, *spatial)` if soft or summed up.
        results: ratios, valid fractions, and ratios inside the image; the last may be empty.
        unit: what a count of one means.
        counting: what `counting_arguments` gives.
    """
    ratios, valid_fraction, inside_ratios = results
    dims = len(size)
    images, num_patches, extents = source.shape[0], starts.shape[-2], source.shape[-dims:]
    block_patches, block_y, block_x = plan.patch_tile(extents, size, summed_axes)
    patch_ratio_kernel[(plan.cdiv(num_patches, block_patches) * images * num_words,)](
        source_ptr=source,
        starts_ptr=starts,
        ratios_ptr=ratios,
        valid_fraction_ptr=valid_fraction,
        inside_ratios_ptr=inside_ratios if inside_ratios.numel() > 0 else None,
        num_patches=num_patches,
        num_words=num_words,
        first_word=first_word,
        unit=unit,
        area=math.prod(size),
        **plan.named("extent", "zyx", plan.three(extents, 1)),
        **plan.named("size", "zyx", plan.three(size, 1)),
        **plan.named("source_stride", "bwzyx", plan.strides(source, dims)),
        **plan.named("starts_stride", "bnd", (*(0,) * (3 - starts.ndim), *starts.stride())),
        **counting,
        DIMS=dims,
        SUMMED=summed_axes,
        SOFT=soft,
        BELOW_2_24=math.prod(size) < 1 << 24 and not soft,
        BORDER=border,
        BLOCK_PATCHES=block_patches,
        BLOCK_Y=block_y,
        BLOCK_X=block_x,
        FIELDS=plan.next_power_of_2(fields.classes_per_word + 1),
        num_warps=plan.PATCH_WARPS,
        enable_fp_fusion=True,
    )
