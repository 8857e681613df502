"""How foreground ratios are counted: fields of words, tables of sums, tiles. Triton is not imported."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from contrastseg_fast.kernels._device_table import Table

_MOST_FIELDS = 16  # of a word
_TABLE_BYTES = 1 << 28  # of a table held at a time; more words come in several rounds

# What `choose_sums` weighs launches by, from times measured on an H100.
_LAUNCH_US = 2.2  # within a graph
_BYTES_PER_US = 1.85e6  # a sum of 16.8 MB of labels takes 9.1 us beside its launch
_ROW_BYTES = 64  # read in vain, since rows of patches begin and end anywhere in what is read at once
_ELEMENTS_PER_US = 1.6e6  # pixels turned into words, or words added
_SHUFFLED_PER_US = 0.4e6  # words summed up across the lanes of a warp: an estimate
_STEP_US = 0.3  # a load that the next one waits for

PATCH_ELEMENTS, PATCH_WARPS = 1024, 4  # of a program
_MOST_PATCHES = 32  # of a program
FIXED_POINT_ELEMENTS, FIXED_POINT_WARPS = 512, 4

# Lanes of a warp lie along rows. A thread holds all words of a segment along other axes, 64 at most, which
# are its loads in flight: sums along these axes take no shuffles.
SUM_LANES, SUM_WARPS = 32, 1
# Lengths of segments to choose from, by the number of axes and how many of them are summed.
_SEGMENTS = {
    (1, 1): ((256,),),
    (2, 1): ((32,), (64,)),
    (2, 2): ((32, 32), (64, 32)),
    (3, 1): ((16,), (32,), (64,)),
    (3, 2): ((8, 8),),
    (3, 3): ((8, 8, 32),),
}


class PatchSet(NamedTuple):
    """Patches of one size, and where they start: at `starts`, or as the vectors of a sample lie in a map.

    Vector n of a planned sample lies at step `i = unravel(n, counts)` of a grid over the map, at coordinate
    `floor((2 i + 1) * extents / (2 * counts))` along each axis of the grid. With one axis, the grid runs
    along the raster order of the map.

    Attributes:
        size: of a patch along each of the D axes, in pixels.
        starts: the first pixels `(N, D)` or `(B, N, D)`, any integer dtype and strides; None if planned.
        spatial_shape: of the map, D extents.
        extents: of the map along each axis of the grid: `spatial_shape`, or the product of it.
        counts: points of the grid along each of its axes.
        grids: for each of the D axes `(stride, start, unit)`: the patch at coordinate i of the map begins at
            pixel `floor((i * stride + start) / unit)`.
    """

    size: tuple[int, ...]
    starts: Tensor | None = None
    spatial_shape: tuple[int, ...] = ()
    extents: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return math.prod(self.counts) if self.starts is None else self.starts.shape[-2]

    @property
    def is_wide(self) -> bool:
        """Whether computing the starts of planned patches takes 64-bit integers."""
        steps = [2 * count * extent for count, extent in zip(self.counts, self.extents, strict=True)]
        pixels = [
            extent * abs(stride) + abs(start) + unit
            for extent, (stride, start, unit) in zip(self.spatial_shape, self.grids, strict=True)
        ]
        return max(*steps, *pixels, math.prod(self.extents)) >= 1 << 31


class Boxes(NamedTuple):
    """The patches of a set as far as the plan needs them."""

    size: tuple[int, ...]
    num_patches: int  # in an image


class Fields(NamedTuple):
    """How words count classes."""

    bits: int
    classes_per_word: int
    num_words: int
    dtype: torch.dtype


class Sums(NamedTuple):
    """A table of words, summed up along leading axes within segments, and which sets of patches use it."""

    segments: tuple[int, ...]  # the length along each summed axis, a power of two
    used: tuple[bool, ...]


class Tile(NamedTuple):
    """What a program of the patch kernel takes at once, and from where."""

    from_table: bool
    wide_words: bool  # int64, else int32
    block_patches: int
    block_y: int
    block_x: int


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below `n`, which is positive."""
    return 1 << (n - 1).bit_length()


def can_be(value: int, dtype: torch.dtype) -> bool:
    """Whether labels of this dtype can have this value."""
    if dtype.is_floating_point:
        return torch.tensor(float(value), dtype=dtype).item() == value
    return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def most_pixels(extents: Sequence[int], size: Sequence[int]) -> int:
    """The most pixels of the image that a patch can hold."""
    return math.prod(min(pair) for pair in zip(extents, size, strict=True))


def fixed_point_scale(area: int) -> float:
    """What soft labels are multiplied by: 2^40, or less so that the sum of a patch fits into 52 bits.

    Args:
        area: the most pixels that a patch can hold.
    """
    return 2.0 ** min(40, 52 - area.bit_length())


def choose_fields(num_classes: int, has_ignore: bool, area: int, soft: bool = False) -> Fields:
    """Words of as many classes as fit, 32 bits wide if that is enough for all; the sign bit stays free.

    Args:
        area: the most pixels that a field must have room for.
        soft: every class of soft labels has a word of its own.
    """
    if soft:
        return Fields(1, 1, num_classes, torch.int64)
    bits = max(1, area.bit_length())
    if num_classes + has_ignore <= min(_MOST_FIELDS, 31 // bits):
        return Fields(bits, num_classes, 1, torch.int32)
    classes_per_word = min(num_classes, min(_MOST_FIELDS, 63 // bits) - has_ignore)
    return Fields(bits, classes_per_word, cdiv(num_classes, classes_per_word), torch.int64)


def words_at_once(fields: Fields, num_pixels: int) -> int:
    """How many words per pixel are summed up at a time, so that the sums fit into `_TABLE_BYTES`."""
    return max(1, min(fields.num_words, _TABLE_BYTES // max(num_pixels * fields.dtype.itemsize, 1)))


def _block(terms: int) -> int:
    """The part of an axis that a program takes at once: a power of two that leaves few lanes idle."""
    if terms <= 8:
        return next_power_of_2(max(terms, 1))
    return min((32, 16, 8), key=lambda block: cdiv(terms, block) * block)


def _segments_passed(length: int, segment: int, extent: int) -> int:
    """The most segments that a run of pixels can touch."""
    return min((length + segment - 2) // segment + 1, cdiv(extent, segment))


def terms(extents: Sequence[int], size: Sequence[int], segments: Sequence[int]) -> list[int]:
    """The most terms of a patch's sum along planes, rows and columns.

    Along an axis that is summed up within segments, these are the totals of the segments that a patch
    touches, the last up to the patch's end, and the sum before its begin.

    Example:
        >>> terms((512, 512), (91, 91), (64,))
        [1, 4, 91]
    """
    lengths = [min(pair) for pair in zip(extents, size, strict=True)]
    for axis, segment in enumerate(segments):
        lengths[axis] = _segments_passed(lengths[axis], segment, extents[axis]) + 1
    return three(lengths, 1)


def patch_tile(numbers: Sequence[int]) -> tuple[int, int, int]:
    """Patches, rows and columns that a program takes at once, by the numbers of `terms`."""
    block_y, block_x = _block(numbers[1]), _block(numbers[2])
    return max(1, min(_MOST_PATCHES, PATCH_ELEMENTS // (block_y * block_x))), block_y, block_x


def _steps(numbers: Sequence[int]) -> int:
    """How often a program of the patch kernel loads."""
    _, block_y, block_x = patch_tile(numbers)
    return numbers[0] * cdiv(numbers[1], block_y) * cdiv(numbers[2], block_x)


def _lanes(numbers: Sequence[int]) -> int:
    """Terms of a patch's sum, idle lanes counted."""
    _, block_y, block_x = patch_tile(numbers)
    return _steps(numbers) * block_y * block_x


class Request(NamedTuple):
    """What a call counts, as far as the plan needs it."""

    images: int
    extents: tuple[int, ...]
    num_classes: int
    has_ignore: bool
    label_bytes: int
    soft: bool
    boxes: tuple[Boxes, ...]

    @property
    def pixels(self) -> int:
        """Of an image."""
        return math.prod(self.extents)

    def fields(self, sets: Sequence[int]) -> Fields:
        """The fields of words that serve these sets."""
        area = max(most_pixels(self.extents, self.boxes[k].size) for k in sets)
        return choose_fields(self.num_classes, self.has_ignore, area, self.soft)

    def scale(self, k: int) -> float:
        """What labels are multiplied by for a set."""
        return fixed_point_scale(most_pixels(self.extents, self.boxes[k].size)) if self.soft else 1.0


def launched_together(request: Request) -> list[list[int]]:
    """The sets that have patches, those of a launch together: soft labels have one scale in a launch."""
    groups: dict[float, list[int]] = {}
    for k, boxes in enumerate(request.boxes):
        if boxes.num_patches > 0 and request.images > 0:
            groups.setdefault(request.scale(k), []).append(k)
    return list(groups.values())


def _patch_us(request: Request, sets: Sequence[int], sums: Sums) -> float:
    """The predicted time of the patch kernel for some sets."""
    moved, added, steps = 0.0, 0.0, 0
    for k in sets:
        boxes, used = request.boxes[k], sums.used[k]
        numbers = terms(request.extents, boxes.size, sums.segments if used else ())
        together = [other for other in sets if sums.used[other]] if used else [k]
        patches = request.images * boxes.num_patches * request.fields(together).num_words
        added += patches * _lanes(numbers)
        steps = max(steps, _steps(numbers))
        if not used:
            row = numbers[2] * request.label_bytes + _ROW_BYTES
            moved += request.images * boxes.num_patches * numbers[0] * numbers[1] * row
    moved = min(moved, request.images * request.pixels * request.label_bytes)  # then they lie in the cache
    return _LAUNCH_US + max(moved / _BYTES_PER_US, added / _ELEMENTS_PER_US, steps * _STEP_US)


def _table_us(request: Request, sets: Sequence[int], sums: Sums) -> float:
    """The predicted time of the table of some sets; 0 if none of them uses it."""
    users = [k for k in sets if sums.used[k]]
    if not users:
        return 0.0
    fields = request.fields(users)
    words = request.images * request.pixels * fields.num_words
    rounds = cdiv(fields.num_words, words_at_once(fields, request.images * request.pixels))
    read = words * 8 if request.soft else request.images * request.pixels * request.label_bytes
    time = (1 if request.soft else rounds) * _LAUNCH_US + (
        read + words * fields.dtype.itemsize
    ) / _BYTES_PER_US
    if len(sums.segments) == len(request.extents):
        time += words / _SHUFFLED_PER_US
    return time


def predicted_us(request: Request, sums: Sums) -> float:
    """The predicted time of a call of class labels; of soft labels, without turning them into words."""
    groups = launched_together(request)
    return sum(_table_us(request, sets, sums) + _patch_us(request, sets, sums) for sets in groups)


def _choices(request: Request) -> Iterator[Sums]:
    """Tables to weigh, and for each the sets that gain by using it."""
    dims, count = len(request.extents), len(request.boxes)
    direct = Sums((), (False,) * count)
    yield direct
    for summed in range(1, dims + 1):
        for segments in _SEGMENTS[dims, summed]:
            table = Sums(segments, (True,) * count)
            alone = [(_patch_us(request, [k], table), _patch_us(request, [k], direct)) for k in range(count)]
            yield Sums(segments, tuple(summed_us < direct_us for summed_us, direct_us in alone))
            yield table


@functools.lru_cache(maxsize=1024)
def choose_sums(request: Request) -> Sums:
    """Which leading axes to sum up before patches are read, and for which sets: predicted times decide.

    Example:
        >>> request = Request(8, (512, 512), 2, False, 8, False, (Boxes((11, 11), 1024),))
        >>> choose_sums(request)
        Sums(segments=(), used=(False,))
        >>> choose_sums(request._replace(boxes=(Boxes((11, 11), 1024), Boxes((91, 91), 1024))))
        Sums(segments=(64,), used=(True, True))
    """
    if request.pixels == 0 or not launched_together(request):
        return Sums((), (False,) * len(request.boxes))
    return min(_choices(request), key=functools.partial(predicted_us, request))


def sums_along(request: Request, summed_axes: int) -> Sums:
    """The table of that many summed axes for all sets, or none."""
    if summed_axes == 0:
        return Sums((), (False,) * len(request.boxes))
    tables = [
        Sums(segments, (True,) * len(request.boxes))
        for segments in _SEGMENTS[len(request.extents), summed_axes]
    ]
    return min(tables, key=functools.partial(predicted_us, request))


class Counted(NamedTuple):
    """A set of patches in a launch."""

    number: int  # among all sets
    fields: Fields
    first_word: int
    num_words: int
    from_table: bool


def rounds(request: Request, sets: Sequence[int], sums: Sums) -> list[list[Counted]]:
    """The launches of the patch kernel for some sets: a table of many words is made a part at a time."""
    direct = []
    for k in sets:
        if not sums.used[k]:
            fields = request.fields([k])
            direct.append(Counted(k, fields, 0, fields.num_words, False))
    users = [k for k in sets if sums.used[k]]
    if not users:
        return [direct]
    fields = request.fields(users)
    most = fields.num_words if request.soft else words_at_once(fields, request.images * request.pixels)
    found = []
    for first in range(0, fields.num_words, most):
        words = min(most, fields.num_words - first)
        found.append([*direct, *(Counted(k, fields, first, words, True) for k in users)])
        direct = []
    return found


class Record(NamedTuple):
    """What the patch kernel reads about a set of patches."""

    first_program: int
    tile: int  # its number among the tiles of the launch
    num_patches: int
    first_patch: int  # patches of an image in the sets before
    first_word: int
    num_words: int
    classes_per_word: int
    field_bits: int
    area: int
    given: int  # the number of its starts among those that are given; -1 if they are planned
    # Three integers each, of planes, rows and columns unless said.
    size: Sequence[int]
    terms: Sequence[int]
    starts_strides: Sequence[int]  # of images, patches and axes
    shape: Sequence[int]
    extents: Sequence[int]
    counts: Sequence[int]
    grid_strides: Sequence[int]
    grid_starts: Sequence[int]
    grid_units: Sequence[int]

    def integers(self) -> list[int]:
        """All in a row."""
        parts = [(part,) if isinstance(part, int) else part for part in self]
        return list(itertools.chain.from_iterable(parts))


_SCALARS = Record._fields.index("size")
RECORD = _SCALARS + 3 * (len(Record._fields) - _SCALARS)  # integers
_NO_PROGRAM = 1 << 62


def place(name: str) -> int:
    """Where a field of a record begins among its integers."""
    index = Record._fields.index(name)
    return min(index, _SCALARS) + 3 * max(index - _SCALARS, 0)


class PatchLaunch(NamedTuple):
    """A launch of the patch kernel.

    Attributes:
        records: of the sets, a power of two of them.
        tiles: what programs take at once; records say which.
        programs: how many there are.
    """

    records: Table
    tiles: tuple[Tile, ...]
    programs: int


def patch_launch(
    request: Request, patch_sets: Sequence[PatchSet], counted: Sequence[Counted], segments: Sequence[int]
) -> PatchLaunch:
    """What the patch kernel is told about the sets of a launch; those whose programs take long come first."""
    launched = [patch_sets[each.number] for each in counted]
    strides = tuple(_starts_strides(patches.starts) for patches in launched)
    shapes = tuple(patches._replace(starts=None) for patches in launched)
    return _patch_launch(request, shapes, strides, tuple(counted), tuple(segments))


@functools.lru_cache(maxsize=1024)
def _patch_launch(
    request: Request,
    patch_sets: tuple[PatchSet, ...],  # without starts
    starts_strides: tuple[tuple[int, ...] | None, ...],  # None where starts are planned
    counted: tuple[Counted, ...],
    segments: tuple[int, ...],
) -> PatchLaunch:
    first_patches = [0, *itertools.accumulate(boxes.num_patches for boxes in request.boxes)]
    given = itertools.count()
    ready: list[tuple[Tile, Record, int]] = []
    for each, patches, strides in zip(counted, patch_sets, starts_strides, strict=True):
        count = request.boxes[each.number].num_patches
        numbers = terms(request.extents, patches.size, segments if each.from_table else ())
        tile = Tile(each.from_table, each.fields.dtype == torch.int64, *patch_tile(numbers))
        record = Record(
            first_program=0,
            tile=0,
            num_patches=count,
            first_patch=first_patches[each.number],
            first_word=each.first_word,
            num_words=each.num_words,
            classes_per_word=each.fields.classes_per_word,
            field_bits=each.fields.bits,
            area=math.prod(patches.size),
            given=-1 if strides is None else next(given),
            size=three(patches.size, 1),
            terms=numbers,
            starts_strides=strides or (0, 0, 0),
            shape=three(patches.spatial_shape, 1),
            extents=three(patches.extents, 1),
            counts=three(patches.counts, 1),
            grid_strides=three([stride for stride, _, _ in patches.grids], 0),
            grid_starts=three([start for _, start, _ in patches.grids], 0),
            grid_units=three([unit for _, _, unit in patches.grids], 1),
        )
        ready.append((tile, record, cdiv(count, tile.block_patches) * request.images * each.num_words))
    ready.sort(key=lambda entry: _steps(entry[1].terms), reverse=True)
    tiles = sorted({tile for tile, _, _ in ready})
    rows: list[list[int]] = []
    programs = 0
    for tile, record, more in ready:
        rows.append(record._replace(first_program=programs, tile=tiles.index(tile)).integers())
        programs += more
    missing = next_power_of_2(len(ready)) - len(ready)
    rows += missing * [[_NO_PROGRAM, *(RECORD - 1) * [0]]]
    return PatchLaunch(Table(rows), tuple(tiles), programs)


def _starts_strides(starts: Tensor | None) -> tuple[int, ...] | None:
    return None if starts is None else (*(0,) * (3 - starts.ndim), *starts.stride())


def three(values: Sequence[int], filler: int) -> list[int]:
    """Values of planes, rows and columns: `filler` stands for axes that the image does not have."""
    return [filler] * (3 - len(values)) + list(values)


def strides(x: Tensor, dims: int) -> tuple[int, ...]:
    """Strides of images, channels, planes, rows and columns; 0 for axes that `x` does not have."""
    channels = x.stride()[1 : x.ndim - dims] or (0,)
    return (x.stride(0), *channels, *three(x.stride()[x.ndim - dims :], 0))
