"""Where the grid and the raster sampler take vectors: a few integers, which the shape of the map decides.

Vector n has indices i_a, its place among counts_a points along each axis a, n = ravel(i, counts). It lies at

    coordinate_a = (2 i_a + 1) extents_a // (2 counts_a)        the middle of one of counts_a equal steps

and so at position ravel(coordinate, extents) of the map. The grid sampler has the axes of the map, the raster
sampler one axis of all positions. GPU kernels compute positions themselves (kernels/sample_plan.py). On the
CPU they are computed once for a plan and kept as arrays of plain integers: a kept tensor breaks under
`torch.inference_mode` and fake tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contrastseg_fast.receptive_field.field import AxisGrid


class SamplePlan(NamedTuple):
    """The integers of the formula above. Operators take them as `SymInt[]`."""

    extents: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def make(cls, sampler: str, spatial_shape: Sequence[int], num_samples: int | None) -> SamplePlan:
        """The plan of the sampler `"grid"` or `"raster"`; None as `num_samples` takes all vectors."""
        if torch.compiler.is_compiling() or set(map(type, spatial_shape)) - {int}:  # symbols
            return _make(sampler, spatial_shape, num_samples)
        return _kept_plan(sampler, tuple(spatial_shape), num_samples)

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> SamplePlan:
        """The plan that an operator got as a list of numbers."""
        axes = len(numbers) // 2
        return cls(tuple(numbers[:axes]), tuple(numbers[axes:]))

    @property
    def numbers(self) -> list[int]:
        """The extents, then the counts."""
        return [*self.extents, *self.counts]

    @property
    def num_vectors(self) -> int:
        """N."""
        return math.prod(self.counts)

    def three(self) -> SamplePlan:
        """The same positions by three axes, for kernels; the first ones have a single index."""
        ones = (1,) * (3 - len(self.counts))
        return SamplePlan(ones + self.extents, ones + self.counts)

    def positions(self, device: torch.device | str | None) -> Tensor:
        """Positions in raster order `(N,)`, int64."""
        if self._is_kept(device):
            return torch.tensor(_kept_positions(self), device=device)
        return _positions(self, functools.partial(torch.arange, device=device))

    def starts(
        self, spatial_shape: tuple[int, ...], grids: tuple[AxisGrid, ...], device: torch.device
    ) -> Tensor:
        """The first pixels `(N, D)` of patches that start as `grids` say along each axis, int64."""
        if self._is_kept(device):
            return torch.tensor(_kept_starts(self, spatial_shape, grids), device=device)
        return first_pixels(self.positions(device), spatial_shape, grids)

    def _is_kept(self, device: torch.device | str | None) -> bool:
        """Whether arrays are kept: not for a GPU, where copying them would wait, nor in a compiled graph."""
        return (
            not torch.compiler.is_compiling()
            and isinstance(device, torch.device)
            and device.type == "cpu"
            and not set(map(type, self.extents + self.counts)) - {int}  # symbols
            and math.prod(self.extents) <= _MOST_KEPT
        )


def _make(sampler: str, spatial_shape: Sequence[int], num_samples: int | None) -> SamplePlan:
    if sampler == "grid":
        return SamplePlan(tuple(spatial_shape), tuple(_grid_counts(spatial_shape, num_samples)))
    total = math.prod(spatial_shape)
    return SamplePlan((total,), (total if num_samples is None else min(num_samples, total),))


_kept_plan = functools.lru_cache(maxsize=256)(_make)
_MOST_KEPT = 1 << 20  # vectors in the maps whose positions are kept


def coordinates(positions: Any, extents: Sequence[int]) -> list[Any]:
    """Along each axis, the coordinates of positions in raster order, a tensor or an array."""
    axes = []
    for extent in reversed(extents):
        axes.append(positions % max(extent, 1))
        positions = positions // max(extent, 1)
    return axes[::-1]


def first_pixels(positions: Tensor, spatial_shape: Sequence[int], grids: Sequence[AxisGrid]) -> Tensor:
    """The first pixels `(N, D)` of the patches of vectors at these positions of a map."""
    axes = coordinates(positions, spatial_shape)
    return torch.stack([grid.first_pixel(axis) for grid, axis in zip(grids, axes, strict=True)], -1)


def _positions(plan: SamplePlan, arange: Callable[[int], Any]) -> Any:
    """The positions `(N,)`: one formula for tensors and arrays."""
    positions = arange(1)
    for extent, count in zip(plan.extents, plan.counts, strict=True):
        coordinate = (2 * arange(count) + 1) * extent // (2 * max(count, 1))
        positions = (positions[:, None] * extent + coordinate).reshape(-1)
    return positions


@functools.lru_cache(maxsize=64)
def _kept_positions(plan: SamplePlan) -> np.ndarray:
    return _positions(plan, functools.partial(np.arange, dtype=np.int64))


@functools.lru_cache(maxsize=256)
def _kept_starts(plan: SamplePlan, spatial_shape: tuple[int, ...], grids: tuple[Any, ...]) -> np.ndarray:
    axes = coordinates(_kept_positions(plan), spatial_shape)
    return np.stack([grid.first_pixel(axis) for grid, axis in zip(grids, axes, strict=True)], -1)


def _grid_counts(spatial_shape: Sequence[int], num_samples: int | None) -> list[int]:
    """Points along each axis: the axis with the widest step gets one more while the product allows it."""
    total = math.prod(spatial_shape)
    if num_samples is None or total <= num_samples:
        return list(spatial_shape)
    counts = [1] * len(spatial_shape)
    while True:
        product = math.prod(counts)
        room = [
            axis
            for axis, extent in enumerate(spatial_shape)
            if counts[axis] < extent and product // counts[axis] * (counts[axis] + 1) <= num_samples
        ]
        if not room:
            return counts
        widest = room[0]
        for axis in room[1:]:  # torch.compile with dynamic shapes follows no max with a key
            if spatial_shape[axis] * counts[widest] > spatial_shape[widest] * counts[axis]:
                widest = axis
        counts[widest] += 1
