"""How foreground ratios are counted: fields of words, summed axes, tiles. Imports torch only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_FIELDS = 16  # of a word
_TABLE_BYTES = 1 << 28  # running sums held at a time; more words come in several rounds

# What `choose_summed_axes` weighs launches by: estimates from an H100's clock, caches and latencies.
_ELEMENTS_PER_US = 0.8e6  # pixels turned into words, or words added
_BYTES_PER_US = 2.0e6
_STEP_US = 0.8  # a load that the next one waits for
_LAUNCH_US = 2.0

PATCH_ELEMENTS, PATCH_WARPS = 1024, 4  # of a program
_MOST_PATCHES = 32  # of a program
FIXED_POINT_ELEMENTS, FIXED_POINT_WARPS = 512, 4


class SumLaunch(NamedTuple):
    """What one program sums up: some lines, a part of their length at a time."""

    block_lines: int
    block_length: int
    num_warps: int


# By the length of the lines (the last entry serves all longer ones).
SUM_DOWN = {32: SumLaunch(32, 32, 4), 256: SumLaunch(16, 128, 8)}
SUM_ALONG_ROWS = {32: SumLaunch(32, 32, 4), 256: SumLaunch(4, 256, 4)}


class Fields(NamedTuple):
    """How words count classes."""

    bits: int
    classes_per_word: int
    num_words: int
    dtype: torch.dtype


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


def fixed_point_scale(extents: Sequence[int], size: Sequence[int]) -> float:
    """What soft labels are multiplied by: 2^40, or less so that the sum of a patch fits into 52 bits."""
    return 2.0 ** min(40, 52 - most_pixels(extents, size).bit_length())


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
    return max(1, min(fields.num_words, _TABLE_BYTES // (num_pixels * fields.dtype.itemsize)))


def _block(terms: int) -> int:
    """The part of an axis that a program takes at once: a power of two that leaves few lanes idle."""
    if terms <= 8:
        return next_power_of_2(max(terms, 1))
    return min((32, 16, 8), key=lambda block: cdiv(terms, block) * block)


def _terms(extents: Sequence[int], size: Sequence[int], summed: int) -> list[int]:
    """Terms of a patch's sum along planes, rows and columns; as many leading axes are summed up."""
    terms = [2 if axis < summed else min(pair) for axis, pair in enumerate(zip(extents, size, strict=True))]
    return three(terms, 1)


def patch_tile(extents: Sequence[int], size: Sequence[int], summed: int) -> tuple[int, int, int]:
    """Patches, rows and columns that a program takes at once."""
    _, rows, columns = _terms(extents, size, summed)
    block_y, block_x = _block(rows), _block(columns)
    return max(1, min(_MOST_PATCHES, PATCH_ELEMENTS // (block_y * block_x))), block_y, block_x


def sum_launch(length: int, along_rows: bool) -> SumLaunch:
    """The launch that sums lines of this length up."""
    table = SUM_ALONG_ROWS if along_rows else SUM_DOWN
    return table[min((limit for limit in table if limit >= length), default=max(table))]


def choose_summed_axes(
    images: int,
    num_patches: int,
    num_words: int,
    extents: Sequence[int],
    size: Sequence[int],
    label_bytes: int,
) -> int:
    """How many leading axes to sum up before patches are read: the estimated times decide.

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
            steps = cdiv(extents[axis], sum_launch(extents[axis], axis == len(extents) - 1).block_length)
            total += _LAUNCH_US + steps * 2 * _STEP_US
            total += images * num_words * pixels * (read + 8) / _BYTES_PER_US
        terms = _terms(extents, size, summed)
        blocks = (1, *map(_block, terms[1:]))
        patch_steps = math.prod(cdiv(number, block) for number, block in zip(terms, blocks, strict=True))
        lanes = patch_steps * math.prod(blocks)
        total += images * num_words * num_patches * lanes / _ELEMENTS_PER_US
        return total + patch_steps * _STEP_US

    return min(range(len(extents) + 1), key=time) if pixels > 0 else 0


def three(values: Sequence[int], filler: int) -> list[int]:
    """Values of planes, rows and columns: `filler` stands for axes that the image does not have."""
    return [filler] * (3 - len(values)) + list(values)


def named(name: str, axes: str, values: Sequence[int]) -> dict[str, int]:
    """Arguments of a kernel by name, one per axis: `source_stride_b` and so on."""
    return {f"{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def strides(x: Tensor, dims: int) -> tuple[int, ...]:
    """Strides of images, channels, planes, rows and columns; 0 for axes that `x` does not have."""
    channels = x.stride()[1 : x.ndim - dims] or (0,)
    return (x.stride(0), *channels, *three(x.stride()[x.ndim - dims :], 0))
