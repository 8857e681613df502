"""The ratios of sets of patches in one launch, from the words of their pixels or from sums of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._launch import launch as run_kernel
from contrastseg_fast.kernels.foreground_ratio import plan
from contrastseg_fast.kernels.foreground_ratio.words import class_words, comparison_type
from contrastseg_fast.kernels.sample_plan import planned_position

# Strides of columns may be specialised for being 1: lanes then lie along columns in every Triton.
_UNSPECIALIZED = (
    *("images", "num_classes", "ignore_index", "extent_z", "extent_y", "extent_x"),
    *(f"source_stride_{axis}" for axis in "bwzy"),
    *(f"table_stride_{axis}" for axis in "bw"),
)


class Ratios(NamedTuple):
    """The results of sets of patches, one set after another in flat fp32 tensors.

    Attributes:
        ratios: of set k, `(B, N_k, M)`.
        valid_fraction: of set k, `(B, N_k)`.
        inside: of set k, `(B, N_k, M)`; empty if not wanted.
    """

    ratios: Tensor
    valid_fraction: Tensor
    inside: Tensor


# Where the integers of a record lie.
_RECORD = tl.constexpr(plan.RECORD)
_TILE = tl.constexpr(plan.place("tile"))
_NUM_PATCHES = tl.constexpr(plan.place("num_patches"))
_FIRST_PATCH = tl.constexpr(plan.place("first_patch"))
_FIRST_WORD = tl.constexpr(plan.place("first_word"))
_NUM_WORDS = tl.constexpr(plan.place("num_words"))
_CLASSES_PER_WORD = tl.constexpr(plan.place("classes_per_word"))
_FIELD_BITS = tl.constexpr(plan.place("field_bits"))
_AREA = tl.constexpr(plan.place("area"))
_GIVEN = tl.constexpr(plan.place("given"))
_SIZE = tl.constexpr(plan.place("size"))
_TERMS = tl.constexpr(plan.place("terms"))
_STARTS_STRIDES = tl.constexpr(plan.place("starts_strides"))
_SHAPE = tl.constexpr(plan.place("shape"))
_EXTENTS = tl.constexpr(plan.place("extents"))
_COUNTS = tl.constexpr(plan.place("counts"))
_GRID_STRIDES = tl.constexpr(plan.place("grid_strides"))
_GRID_STARTS = tl.constexpr(plan.place("grid_starts"))
_GRID_UNITS = tl.constexpr(plan.place("grid_units"))


@triton.jit
def _three(record_ptr, PLACE: tl.constexpr):
    """Three integers of a record, of planes, rows and columns."""
    return tl.load(record_ptr + PLACE), tl.load(record_ptr + PLACE + 1), tl.load(record_ptr + PLACE + 2)


@triton.jit
def _given_starts(
    starts_ptrs, record_ptr, image, patch, present, DIMS: tl.constexpr, NUM_GIVEN: tl.constexpr
):
    """Where patches begin along the axes of the image, from one of several tensors."""
    given = tl.load(record_ptr + _GIVEN)
    stride_b, stride_n, stride_d = _three(record_ptr, _STARTS_STRIDES)
    offsets = image * stride_b + patch * stride_n
    start_z = tl.zeros(patch.shape, tl.int64)
    start_y = start_z
    start_x = start_z
    for k in tl.static_range(NUM_GIVEN):
        if given == k:
            ptrs = starts_ptrs[k] + offsets
            if DIMS == 3:
                start_z = tl.load(ptrs, present, 0).to(tl.int64)
            if DIMS >= 2:
                start_y = tl.load(ptrs + (DIMS - 2) * stride_d, present, 0).to(tl.int64)
            start_x = tl.load(ptrs + (DIMS - 1) * stride_d, present, 0).to(tl.int64)
    return start_z, start_y, start_x


@triton.jit
def _first_pixel(coordinate, stride, start, unit):
    """`floor((coordinate * stride + start) / unit)`, of which the number divided may be negative."""
    number = coordinate * stride.to(coordinate.dtype) + start.to(coordinate.dtype)
    unit = unit.to(coordinate.dtype)
    rest = number % unit  # of the sign of the number
    return ((number - tl.where(rest < 0, rest + unit, rest)) // unit).to(tl.int64)


@triton.jit
def _planned_starts(record_ptr, patch, INDEX: tl.constexpr):
    """Where patches begin along planes, rows and columns, from where their vectors lie in the map."""
    extent_z, extent_y, extent_x = _three(record_ptr, _EXTENTS)
    count_z, count_y, count_x = _three(record_ptr, _COUNTS)
    _, shape_y, shape_x = _three(record_ptr, _SHAPE)
    stride_z, stride_y, stride_x = _three(record_ptr, _GRID_STRIDES)
    start_z, start_y, start_x = _three(record_ptr, _GRID_STARTS)
    unit_z, unit_y, unit_x = _three(record_ptr, _GRID_UNITS)
    shape_y, shape_x = shape_y.to(INDEX), shape_x.to(INDEX)
    position = planned_position(patch.to(INDEX), extent_z, extent_y, extent_x, count_z, count_y, count_x)
    row = position // shape_x
    return (
        _first_pixel(row // shape_y, stride_z, start_z, unit_z),
        _first_pixel(row % shape_y, stride_y, start_y, unit_y),
        _first_pixel(position % shape_x, stride_x, start_x, unit_x),
    )


@triton.jit
def _part_inside(start, extent, size):
    """Where patches begin and end in the image along an axis."""
    start = tl.minimum(tl.maximum(start, -size), extent.to(tl.int64))
    begin = tl.maximum(start, 0)
    end = tl.maximum(tl.minimum(start + size, extent), begin)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _term(number, begin, end, SEGMENT: tl.constexpr):
    """The coordinate of a term of a sum along an axis, whether it exists, and whether it is subtracted.

    In segments, term 0 is the sum before the begin. The others are the totals of the segments that the patch
    touches, up to its end.
    """
    if SEGMENT > 0:
        first = begin // SEGMENT
        offset = (first + number - 1) * SEGMENT
        coordinate = tl.where(number == 0, begin, offset + tl.minimum(end - offset, SEGMENT)) - 1
        touched = number <= (end - 1) // SEGMENT - first + 1
        return coordinate, tl.where(number == 0, begin % SEGMENT > 0, touched) & (begin < end), number == 0
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


@triton.jit
def _write_ratios(
    source_ptr,
    source_stride_w,
    source_stride_z,
    source_stride_y,
    source_stride_x,
    record_ptr,
    image,
    source_word,
    patch,
    present,
    start_z,
    start_y,
    start_x,
    ratios_ptr,
    valid_fraction_ptr,
    inside_ratios_ptr,
    unit,
    num_classes,
    ignore_index,
    extent_z,
    extent_y,
    extent_x,
    DIMS: tl.constexpr,
    SEGMENT_Z: tl.constexpr,
    SEGMENT_Y: tl.constexpr,
    SEGMENT_X: tl.constexpr,
    SOFT: tl.constexpr,
    BELOW_2_24: tl.constexpr,
    BORDER: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    LABEL: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Ratios and valid fractions of some patches of a set, for the classes of a word of its source."""
    SUMMED: tl.constexpr = SEGMENT_Z + SEGMENT_Y + SEGMENT_X > 0
    size_z, size_y, size_x = _three(record_ptr, _SIZE)
    begin_z = tl.zeros([BLOCK_PATCHES], tl.int32)
    end_z = begin_z + 1
    begin_y = begin_z
    end_y = end_z
    if DIMS == 3:
        begin_z, end_z = _part_inside(start_z, extent_z, size_z)
    if DIMS >= 2:
        begin_y, end_y = _part_inside(start_y, extent_y, size_y)
    begin_x, end_x = _part_inside(start_x, extent_x, size_x)

    word = tl.load(record_ptr + _FIRST_WORD).to(tl.int32) + source_word
    classes_per_word = tl.load(record_ptr + _CLASSES_PER_WORD).to(tl.int32)
    field_bits = tl.load(record_ptr + _FIELD_BITS).to(tl.int32)
    terms_z, terms_y, terms_x = _three(record_ptr, _TERMS)
    terms_z, terms_y, terms_x = terms_z.to(tl.int32), terms_y.to(tl.int32), terms_x.to(tl.int32)
    sums = tl.zeros([BLOCK_PATCHES, BLOCK_Y, BLOCK_X], WORD)
    ignored_sums = sums
    for number_z in range(terms_z):
        z, has_z, minus_z = _term(number_z, begin_z, end_z, SEGMENT_Z)  # [BLOCK_PATCHES]
        has_z = has_z & present
        planes_ptr = source_ptr + z.to(tl.int64) * source_stride_z
        for first_y in range(0, terms_y, BLOCK_Y):
            number_y = (first_y + tl.arange(0, BLOCK_Y))[None, :]
            y, has_y, minus_y = _term(number_y, begin_y[:, None], end_y[:, None], SEGMENT_Y)
            has_y = has_y & has_z[:, None]  # [BLOCK_PATCHES, BLOCK_Y]
            minus_y = minus_y ^ minus_z if SEGMENT_Z > 0 else minus_y
            rows_ptr = planes_ptr[:, None] + y.to(tl.int64) * source_stride_y
            for first_x in range(0, terms_x, BLOCK_X):
                number_x = (first_x + tl.arange(0, BLOCK_X))[None, :]
                x, has_x, minus_x = _term(number_x, begin_x[:, None], end_x[:, None], SEGMENT_X)
                inside = has_y[:, :, None] & has_x[:, None, :]  # [BLOCK_PATCHES, BLOCK_Y, BLOCK_X]
                ptrs = rows_ptr[:, :, None] + (x.to(tl.int64) * source_stride_x)[:, None, :]
                if SOFT or SUMMED:
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
                if SUMMED:
                    minus = minus_y[:, :, None] ^ minus_x[:, None, :]
                    words = tl.where(minus, -words, words)
                sums += words
                if SOFT and HAS_IGNORE:
                    words = tl.load(ptrs + num_classes.to(tl.int64) * source_stride_w, inside, 0)
                    if SUMMED:
                        words = tl.where(minus, -words, words)
                    ignored_sums += words

    total = tl.sum(tl.sum(sums, 2), 1)[:, None]  # [BLOCK_PATCHES, 1]
    area = tl.load(record_ptr + _AREA).to(tl.float64)
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
    result = (image * tl.load(record_ptr + _NUM_PATCHES) + patch)[:, None]
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


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def patch_ratio_kernel(
    source_ptr,  # labels (B, Z, Y, X), any strides; or words (B, W, Z, Y, X)
    table_ptr,  # sums of words (B, W, Z, Y, X), contiguous; or None
    starts_ptrs,  # of the sets whose starts are given, each (B, N_k, D), any strides
    records_ptr,  # (SETS, RECORD), by first_program; those of no set begin beyond the last program
    ratios_ptr,  # of each set (B, N_k, M)
    valid_fraction_ptr,  # of each set (B, N_k)
    inside_ratios_ptr,  # of each set (B, N_k, M), or None
    images,
    unit,
    num_classes,
    ignore_index,
    extent_z,
    extent_y,
    extent_x,
    source_stride_b,
    source_stride_w,
    source_stride_z,
    source_stride_y,
    source_stride_x,
    table_stride_b,
    table_stride_w,
    DIMS: tl.constexpr,
    SEGMENT_Z: tl.constexpr,  # of the table; 0 along axes that are not summed
    SEGMENT_Y: tl.constexpr,
    SEGMENT_X: tl.constexpr,
    SOFT: tl.constexpr,
    BELOW_2_24: tl.constexpr,  # whether all counts are integers below 2^24
    BORDER: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    LABEL: tl.constexpr,
    TILES: tl.constexpr,  # `plan.Tile`s
    NUM_TILES: tl.constexpr,
    NUM_GIVEN: tl.constexpr,
    HAS_PLANNED: tl.constexpr,
    INDEX: tl.constexpr,  # in which starts are planned
    SETS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Ratios and valid fractions of several sets of patches. Each program takes some patches of one set."""
    program = tl.program_id(0)
    if SETS > 1:
        first_programs = tl.load(records_ptr + tl.arange(0, SETS) * _RECORD)
        earlier = first_programs <= program
        records_ptr += (tl.sum(earlier.to(tl.int32)) - 1) * _RECORD
        program -= tl.max(tl.where(earlier, first_programs, 0)).to(tl.int32)
    tile = tl.load(records_ptr + _TILE)
    num_patches = tl.load(records_ptr + _NUM_PATCHES)
    num_words = tl.load(records_ptr + _NUM_WORDS).to(tl.int32)
    first_result = tl.load(records_ptr + _FIRST_PATCH) * images
    for k in tl.static_range(NUM_TILES):
        if tile == k:
            FROM_TABLE: tl.constexpr = TILES[k][0]
            BLOCK_PATCHES: tl.constexpr = TILES[k][2]
            blocks = tl.cdiv(num_patches, BLOCK_PATCHES).to(tl.int32)
            layer = program // blocks
            image = (layer // num_words).to(tl.int64)
            patch = (program % blocks).to(tl.int64) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
            present = patch < num_patches  # [BLOCK_PATCHES]
            start_z, start_y, start_x = _given_starts(
                starts_ptrs, records_ptr, image, patch, present, DIMS, NUM_GIVEN
            )
            if HAS_PLANNED:
                planned = tl.load(records_ptr + _GIVEN) < 0
                if planned:
                    start_z, start_y, start_x = _planned_starts(records_ptr, patch, INDEX)
            _write_ratios(
                table_ptr + image * table_stride_b if FROM_TABLE else source_ptr + image * source_stride_b,
                table_stride_w if FROM_TABLE else source_stride_w,
                tl.cast(extent_y, tl.int64) * extent_x if FROM_TABLE else source_stride_z,
                extent_x if FROM_TABLE else source_stride_y,
                1 if FROM_TABLE else source_stride_x,
                records_ptr,
                image,
                layer % num_words,
                patch,
                present,
                start_z,
                start_y,
                start_x,
                ratios_ptr + first_result * num_classes,
                valid_fraction_ptr + first_result,
                inside_ratios_ptr + first_result * num_classes if inside_ratios_ptr is not None else None,
                unit,
                num_classes,
                ignore_index,
                extent_z,
                extent_y,
                extent_x,
                DIMS,
                SEGMENT_Z if FROM_TABLE else 0,
                SEGMENT_Y if FROM_TABLE else 0,
                SEGMENT_X if FROM_TABLE else 0,
                SOFT,
                BELOW_2_24,
                BORDER,
                HAS_IGNORE,
                LABEL,
                tl.int64 if TILES[k][1] else tl.int32,
                BLOCK_PATCHES,
                TILES[k][3],
                TILES[k][4],
                FIELDS,
            )


def write_ratios(
    source: Tensor,
    table: Tensor | None,
    request: plan.Request,
    patch_sets: Sequence[plan.PatchSet],
    counted: Sequence[plan.Counted],
    segments: Sequence[int],
    results: Ratios,
    border: str,
    ignore_index: int | None,
    unit: float,
) -> None:
    """Fill the ratios of the classes in some words of sets, and with word 0 the valid fractions.

    Args:
        source: labels `(B, *spatial)`, or words `(B, W, *spatial)` if soft.
        table: sums of the words, if any set is counted from it.
        patch_sets: all sets of the call.
        counted: those of this launch.
        segments: of the table, the segments' length along each summed axis.
        unit: what a count of one means.
    """
    dims = len(request.extents)
    launch = plan.patch_launch(request, patch_sets, counted, segments)
    launched = [patch_sets[each.number] for each in counted]
    given = tuple(patches.starts for patches in launched if patches.starts is not None)
    planned = [patches for patches in launched if patches.starts is None]
    below_2_24 = all(math.prod(patches.size) < 1 << 24 for patches in launched)
    segment = plan.three((*segments, *(0,) * (dims - len(segments))), 0)
    run_kernel(
        patch_ratio_kernel,
        (launch.programs,),
        (
            source,
            table,
            given,
            launch.records.on(source.device),
            results.ratios,
            results.valid_fraction,
            results.inside if results.inside.numel() > 0 else None,
        ),
        (
            request.images,
            unit,
            request.num_classes,
            ignore_index or 0,
            *plan.three(request.extents, 1),
            *plan.strides(source, dims),
            *((0, 0) if table is None else table.stride()[:2]),
        ),
        {
            "DIMS": dims,
            **dict(zip(("SEGMENT_Z", "SEGMENT_Y", "SEGMENT_X"), segment, strict=True)),
            "SOFT": request.soft,
            "BELOW_2_24": below_2_24 and not request.soft,
            "BORDER": border,
            "HAS_IGNORE": ignore_index is not None,
            "LABEL": comparison_type(source.dtype),
            "TILES": tuple(map(tuple, launch.tiles)),
            "NUM_TILES": len(launch.tiles),
            "NUM_GIVEN": len(given),
            "HAS_PLANNED": len(planned) > 0,
            "INDEX": tl.int64 if any(patches.is_wide for patches in planned) else tl.int32,
            "SETS": len(launch.records),
            "FIELDS": plan.next_power_of_2(max(each.fields.classes_per_word for each in counted) + 1),
            "num_warps": plan.PATCH_WARPS,
            "enable_fp_fusion": True,
        },
    )
