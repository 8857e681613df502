"""A call of `PDCRLoss` without its tensors.

The operator takes it as a list of integers (`SymInt[]`), so that it is the same on every device and in
compiled graphs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from contrastseg_fast.affinity import AFFINITIES, CLASS_DISTANCES, Affinity, select_compared
from contrastseg_fast.problems import Call, Problem, Segment, Source
from contrastseg_fast.receptive_field.field import AxisGrid
from contrastseg_fast.sample_plan import SamplePlan, first_pixels

BORDERS = ("full", "clip", "background")
REDUCTIONS = ("none", "mean", "sum")


class LayerPlan(NamedTuple):
    """Where the vectors of a layer come from.

    Attributes:
        spatial_shape: of the layer's map.
        samples: the positions of its vectors; None if these are given.
        is_map: whether the map is given, `(B, C, *spatial)`, or its sampled vectors are, `(B, N, C)`.
    """

    spatial_shape: tuple[int, ...]
    samples: SamplePlan | None
    is_map: bool


class Patches(NamedTuple):
    """The patches of a layer's vectors: their extent in pixels, and where they begin."""

    size: tuple[int, ...]
    grids: tuple[AxisGrid, ...]


class PatchContents(NamedTuple):
    """What the labels hold in the patches of a layer's vectors.

    Attributes:
        ratios: `(B, N, M)`.
        valid: which vectors make pairs `(B, N)`, bool.
        inside: the ratios over the patches' parts inside the image `(B, N, M)`, where these are needed, else
            `ratios`.
    """

    ratios: Tensor
    valid: Tensor
    inside: Tensor


class Compared(NamedTuple):
    """What vectors are compared by, ratios `(B, N, M)` or categories `(B, N, 1)`, and which are valid."""

    compared: Tensor
    valid: Tensor


class LayerShape(NamedTuple):
    """The sampled vectors of a layer, and whether its map, if that is given, is channels-last."""

    batch: int
    num_vectors: int
    channels: int
    channels_last: bool


class CallPlan(NamedTuple):
    """The whole call.

    Attributes:
        layers: of the features, in their order.
        patches: of every layer, for each size.
        sets: the layers whose vectors make pairs with each other.
        merged: whether the vectors of all images make pairs.
        num_classes: M, at least 2.
        border, ignore_index: as for `foreground_ratio`.
        skip_homogeneous: whether images whose valid patches all look alike are left out.
        affinity: what is compared of the ratios, a word.
        include_background: whether class 0 is compared.
        reduction: as for `pdcr_loss`, over the images; losses of sizes and of sets are averaged.
        checked_distance: the class distance whose ratios are checked to sum to at most 1; `"mean"` checks
            nothing.
    """

    layers: tuple[LayerPlan, ...]
    patches: tuple[tuple[Patches, ...], ...]
    sets: tuple[tuple[int, ...], ...]
    merged: bool
    num_classes: int
    border: str
    ignore_index: int | None
    skip_homogeneous: bool
    affinity: str
    include_background: bool
    reduction: str
    checked_distance: str

    @property
    def needs_inside(self) -> bool:
        """Whether the ratios inside the image are needed besides those of the border."""
        return self.skip_homogeneous and self.border != "clip"

    @property
    def num_problems(self) -> int:
        """Losses of each image, or of all: one for every set and size, in this order."""
        return len(self.sets) * len(self.patches)

    def num_compared(self, categorical: bool) -> int:
        """Numbers that are compared of each vector: one category, or the ratios of the classes that count."""
        return 1 if categorical else self.num_classes - (not self.include_background)

    def joined_problems(self, shapes: Sequence[LayerShape], num_compared: int) -> list[Problem]:
        """The problems, with what is compared and what is valid joined: one problem after another."""
        problems, first = [], 0
        for layers in self.sets:
            count, batch = sum(shapes[layer].num_vectors for layer in layers), shapes[layers[0]].batch
            for _ in self.patches:
                segments, row = [], first
                for layer in layers:
                    segments.append(Segment(layer, row * num_compared, count * num_compared, row, count))
                    row += shapes[layer].num_vectors
                problems.append(Problem(tuple(segments), self.merged))
                first += batch * count
        return problems

    def sizes(self, shapes: Sequence[LayerShape], affinity: Affinity, dtype: torch.dtype) -> Call:
        """The call without where its inputs lie: enough for the backward pass, which reads none of them."""
        num_compared = self.num_compared(affinity.categorical)
        sources = [Source.dense(shape[:3], (0, 0, 1)) for shape in shapes]
        return Call.make(sources, self.joined_problems(shapes, num_compared), num_compared, dtype, affinity)

    def starts(self, layer: int, patches: Patches, positions: Tensor) -> Tensor:
        """The first pixels `(N, D)` of a layer's patches; positions are those given, if it has no plan."""
        own = self.layers[layer]
        if own.samples is not None:
            return own.samples.starts(own.spatial_shape, patches.grids, positions.device)
        return first_pixels(positions, own.spatial_shape, patches.grids)

    def compare(self, contents: Sequence[Sequence[PatchContents]]) -> list[Compared]:
        """What the problems compare, from the contents of the patches of every size and layer."""
        problems = []
        for layers in self.sets:
            for of_layers in contents:
                parts = [of_layers[layer] for layer in layers]
                if len(parts) == 1 and not self.merged:
                    ratios, valid, inside = parts[0]
                else:
                    ratios, valid, inside = map(self.merge, zip(*parts, strict=True))
                if self.skip_homogeneous:
                    valid = without_homogeneous(valid, inside)
                compared = select_compared(ratios, self.affinity, self.include_background)
                problems.append(Compared(compared, valid))
        return problems

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """One set of `(B, N, ...)` of several layers' parts, and of all images as if they were one."""
        joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
        return joined.flatten(0, 1)[None] if self.merged else joined

    def split(self, joined: Tensor, counts: Sequence[int], batch: int) -> tuple[Tensor, ...]:
        """The parts of a set of `(B, N, ...)`, as `merge` got them."""
        if self.merged:
            joined = joined.view(batch, sum(counts), *joined.shape[2:])
        return joined.split(list(counts), 1)

    @property
    def numbers(self) -> list[int]:
        """The plan as an operator takes it."""
        numbers = [
            *(len(self.layers), len(self.patches), len(self.sets), len(self.layers[0].spatial_shape)),
            *(int(self.merged), self.num_classes, BORDERS.index(self.border)),
            *(int(self.ignore_index is not None), self.ignore_index or 0, int(self.skip_homogeneous)),
            *(AFFINITIES.index(self.affinity), int(self.include_background)),
            *(REDUCTIONS.index(self.reduction), CLASS_DISTANCES.index(self.checked_distance)),
        ]
        for spatial_shape, samples, is_map in self.layers:
            own = [] if samples is None else samples.numbers
            numbers += [*spatial_shape, int(is_map), len(own), *own]
        for of_size in self.patches:
            for size, grids in of_size:
                numbers += [*size]
                for grid in grids:
                    numbers += [*grid]
        for layers in self.sets:
            numbers += [len(layers), *layers]
        return numbers

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> CallPlan:
        """The plan that an operator got as a list of numbers."""
        if set(map(type, numbers)) == {int}:
            return _kept_plan(tuple(numbers))
        return _from_numbers(numbers)


def without_homogeneous(valid: Tensor, inside: Tensor) -> Tensor:
    """`valid` without the images whose valid patches all look alike.

    Only the parts inside the image are compared: a patch at the rim may differ from one in the middle by what
    lies outside alone.
    """
    if valid.shape[1] == 0:
        return valid
    least = inside.masked_fill(~valid[..., None], math.inf).amin(1)
    most = inside.masked_fill(~valid[..., None], -math.inf).amax(1)
    return valid & (least < most).any(-1, keepdim=True)


def _from_numbers(numbers: Sequence[int]) -> CallPlan:
    left = iter(numbers)
    num_layers, num_sizes, num_sets, axes, merged, num_classes, border = _next(left, 7)
    has_ignore, ignore_index, skip_homogeneous, affinity = _next(left, 4)
    include_background, reduction, class_distance = _next(left, 3)
    layers = []
    for _ in range(num_layers):
        spatial_shape = _next(left, axes)
        is_map, length = _next(left, 2)
        samples = SamplePlan.from_numbers(_next(left, length)) if length else None
        layers.append(LayerPlan(spatial_shape, samples, bool(is_map)))
    patches = [
        tuple(
            Patches(_next(left, axes), tuple(AxisGrid(*_next(left, 3)) for _ in range(axes)))
            for _ in range(num_layers)
        )
        for _ in range(num_sizes)
    ]
    return CallPlan(
        tuple(layers),
        tuple(patches),
        tuple(_next(left, next(left)) for _ in range(num_sets)),
        bool(merged),
        num_classes,
        BORDERS[border],
        ignore_index if has_ignore else None,
        bool(skip_homogeneous),
        AFFINITIES[affinity],
        bool(include_background),
        REDUCTIONS[reduction],
        CLASS_DISTANCES[class_distance],
    )


_kept_plan = functools.lru_cache(maxsize=256)(_from_numbers)


def _next(left: Iterator[int], count: int) -> tuple[int, ...]:
    return tuple(next(left) for _ in range(count))
