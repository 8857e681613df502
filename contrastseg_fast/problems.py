"""What a call of PDCR computes, as plain integers: where vectors come from, and which of them make pairs.

A call has sources and problems. A source is a tensor that vectors are taken from: `(B, N, C)`, or a feature
map and the positions of its samples. A problem is a set of images, each with the vectors that make pairs with
each other. It is made of segments: all vectors of a source, as rows that follow each other in every image.
`CallPlan` (call_plan.py) says what a call of `PDCRLoss` asks for; `Call` says what the kernels compute of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from contrastseg_fast.affinity import Affinity

PADDING = 128  # rows of an image are padded to a multiple of it, and so of every tile
NARROWEST_FUSED, WIDEST_FUSED = 32, 256  # channels; of fewer, no thread would copy 16 bytes of a tile
NUM_GROUPS = 16  # of vectors; the last two are of those without equal ratios, and of those that make no pairs
# Vectors of an image: fewer take longer with groups, if all ratios differ, by more than 1 % of a call
# (benchmarks/model.py); of more, pairs of tiles are no longer exact as fp32 numbers.
FEWEST_GROUPED, MOST_GROUPED = 10 << 10, 1 << 19
_ALIGNMENT = 64  # numbers: every array in a shared tensor begins at a multiple of it


class Source(NamedTuple):
    """A tensor that vectors are taken from, `(B, N, C)` or a map with its spatial axes flattened."""

    images: int
    num_vectors: int  # of an image
    channels: int
    strides: tuple[int, int, int]  # of images, of vectors (or of positions in a map), of channels
    extents: tuple[int, int, int]  # of the plan of its samples, see `sample_plan.py`
    counts: tuple[int, int, int]
    positions_at: int = -1  # where its positions begin among those that are given; -1 if they follow the plan

    @classmethod
    def dense(cls, shape: Sequence[int], strides: Sequence[int]) -> Source:
        """Vectors `(B, N, C)`."""
        images, count, channels = shape
        of_images, of_vectors, of_channels = strides
        axes = (1, 1, count)
        return cls(images, count, channels, (of_images, of_vectors, of_channels), axes, axes)

    @property
    def in_words(self) -> bool:
        """Whether all vectors begin and end at whole words of 32 bytes, with 16-bit channels side by side."""
        return self.strides[2] == 1 and all(number % 16 == 0 for number in (*self.strides[:2], self.channels))


class Segment(NamedTuple):
    """The vectors of one source as rows of a problem."""

    source: int
    ratios_at: int  # where its ratios or categories begin
    ratios_stride: int  # of images
    valid_at: int  # where it begins to say which vectors are valid
    valid_stride: int


class Problem(NamedTuple):
    """Vectors that make pairs: all segments' of an image, or (merged) of all images."""

    segments: tuple[Segment, ...]
    merged: bool = False


class Call(NamedTuple):
    """Everything about a call that does not change with the numbers in its tensors."""

    sources: tuple[Source, ...]
    problems: tuple[Problem, ...]
    num_compared: int  # M, or 1 category
    fused: bool  # whether the fused kernels multiply, see `packed_width`
    grouped: bool = False  # whether pairs of vectors with equal ratios are skipped

    @classmethod
    def make(
        cls,
        sources: Iterable[Source],
        problems: Iterable[Problem],
        num_compared: int,
        dtype: torch.dtype,
        affinity: Affinity,
    ) -> Call:
        """The call of sources of this dtype."""
        sources = tuple(sources)
        widest = max(source.channels for source in sources)
        call = cls(sources, tuple(problems), num_compared, is_fused(dtype, widest))
        if not (call.fused and affinity.is_plain):
            return call
        return call._replace(grouped=FEWEST_GROUPED <= max(map(call.count, call.problems)) <= MOST_GROUPED)

    def images(self, problem: Problem) -> int:
        """Images of a problem."""
        return 1 if problem.merged else self.sources[problem.segments[0].source].images

    def count(self, problem: Problem) -> int:
        """Vectors in each image of a problem."""
        sources = [self.sources[segment.source] for segment in problem.segments]
        count = sum(source.num_vectors for source in sources)
        return count * sources[0].images if problem.merged else count

    def width(self, problem: Problem) -> int:
        """Channels of a problem's packed rows."""
        return packed_width(self.sources[problem.segments[0].source].channels, self.fused)

    def saved_sizes(self) -> tuple[int, int]:
        """Numbers in rows and in floats, which the backward pass takes from the forward pass."""
        rows = floats = 0
        for problem in self.problems:
            images, count, width = self.images(problem), self.count(problem), self.width(problem)
            rows += images * padded(count) * width
            floats += images * saved_floats(count, width, self.num_compared, self.grouped)
        return rows, floats


def padded(count: int) -> int:
    """Rows of an image of `count` vectors."""
    return PADDING * -(-count // PADDING)


def is_fused(dtype: torch.dtype, channels: int) -> bool:
    """Whether the fused kernels take vectors of this many channels; else they go through slabs."""
    return dtype in (torch.float16, torch.bfloat16) and channels <= WIDEST_FUSED


def packed_width(channels: int, fused: bool) -> int:
    """Channels of packed rows: a power of two for the fused kernels, a multiple of 8 for all others."""
    if fused:
        return max(NARROWEST_FUSED, 1 << (channels - 1).bit_length())
    return 8 * -(-channels // 8)


def aligned(numbers: int) -> int:
    """`numbers` rounded up to whole pieces of memory."""
    return _ALIGNMENT * -(-numbers // _ALIGNMENT)


def saved_floats(count: int, width: int, num_compared: int, grouped: bool) -> int:
    """What the backward pass needs of an image besides its rows and log Z, in fp32.

    These are scales, inverse lengths and ratios of its rows, the sum of its unit vectors, its number of valid
    vectors and its weight. Of grouped rows, these are also the row of every vector, log Z of every row, where
    the groups lie, and the sums of their unit vectors.
    """
    floats = padded(count) * (2 + num_compared) + aligned(width) + _ALIGNMENT
    return floats + (2 * padded(count) + _ALIGNMENT + NUM_GROUPS * width if grouped else 0)
