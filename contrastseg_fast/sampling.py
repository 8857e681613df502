"""Which vectors of a feature map take part (Algorithm 1), and how they are taken out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contrastseg_fast import _checks
from contrastseg_fast.ops import gather as _gather_op

SAMPLERS = ("grid", "random", "raster")


def sample_grid(
    spatial_shape: Sequence[int], num_samples: int | None, *, device: torch.device | str | None = None
) -> Tensor:
    """Indices of a regular grid, spread evenly over all axes.

    The steps along all axes are as equal as the shape allows, so a flat map such as (4, 128, 128) gets few
    points along its short axis. The number of points is at most `num_samples` and as near to it as such a
    grid comes.

    Args:
        spatial_shape: extent of the feature map along each axis, in vectors.
        num_samples: how many vectors to take at most; None takes all of them.
        device: where the indices are made.

    Returns:
        int64 indices `(N, D)`, in raster order.

    Raises:
        TypeError, ValueError: `spatial_shape` or `num_samples` is not made of integers, or is out of range.

    Example:
        >>> sample_grid((8, 8), 4)
        tensor([[2, 2],
                [2, 6],
                [6, 2],
                [6, 6]])
    """
    _check(spatial_shape, num_samples)
    counts = _grid_counts(spatial_shape, num_samples)
    axes = [
        (2 * torch.arange(count, device=device) + 1) * extent // (2 * max(count, 1))
        for count, extent in zip(counts, spatial_shape, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def sample_random(
    spatial_shape: Sequence[int],
    num_samples: int | None,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Indices drawn at random without repetition; one draw serves all images of a batch.

    Args:
        spatial_shape: extent of the feature map along each axis, in vectors.
        num_samples: how many vectors to take at most; None takes all of them.
        generator: source of randomness, on any device; None takes torch's own on `device`.
        device: where the indices are made.

    Returns:
        int64 indices `(N, D)` with N = min(`num_samples`, vectors in the map).

    Raises:
        TypeError, ValueError: `spatial_shape` or `num_samples` is not made of integers, or is out of range.

    Example:
        >>> sample_random((8, 8), 4, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 2])
    """
    _check(spatial_shape, num_samples)
    drawn_on = device if generator is None else generator.device
    order = torch.randperm(math.prod(spatial_shape), generator=generator, device=drawn_on)
    return _unravel(order[:num_samples].to(device), spatial_shape)


def sample_raster(
    spatial_shape: Sequence[int], num_samples: int | None, *, device: torch.device | str | None = None
) -> Tensor:
    """Indices at equal steps along the raster (row after row) order of the map.

    Args:
        spatial_shape: extent of the feature map along each axis, in vectors.
        num_samples: how many vectors to take at most; None takes all of them.
        device: where the indices are made.

    Returns:
        int64 indices `(N, D)` with N = min(`num_samples`, vectors in the map).

    Raises:
        TypeError, ValueError: `spatial_shape` or `num_samples` is not made of integers, or is out of range.

    Example:
        >>> sample_raster((2, 4), 4)
        tensor([[0, 1],
                [0, 3],
                [1, 1],
                [1, 3]])
    """
    _check(spatial_shape, num_samples)
    total = math.prod(spatial_shape)
    count = total if num_samples is None else min(num_samples, total)
    positions = (2 * torch.arange(count, device=device) + 1) * total // (2 * max(count, 1))
    return _unravel(positions, spatial_shape)


def sample(
    sampler: str,
    spatial_shape: Sequence[int],
    num_samples: int | None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Indices `(N, D)` by the sampler of that name, one of `SAMPLERS`; None as `num_samples` takes all.

    Example:
        >>> sample("raster", (1, 3), None)
        tensor([[0, 0],
                [0, 1],
                [0, 2]])
    """
    _checks.one_of("sampler", sampler, SAMPLERS)
    match sampler:
        case "grid":
            return sample_grid(spatial_shape, num_samples, device=device)
        case "random" if num_samples is not None:
            return sample_random(spatial_shape, num_samples, generator=generator, device=device)
        case _:
            return sample_raster(spatial_shape, num_samples, device=device)


def gather_vectors(features: Tensor, indices: Tensor) -> Tensor:
    """The hidden vectors of a feature map at the given indices.

    Autograd keeps the indices, not the map.

    Args:
        features: feature map `(B, C, *spatial)`, any dtype and memory format.
        indices: int64 indices `(N, D)`, on the device of `features`.

    Returns:
        vectors `(B, N, C)` in the dtype of `features`.

    Example:
        >>> gather_vectors(torch.arange(6.).view(1, 1, 2, 3), torch.tensor([[0, 2], [1, 0]]))
        tensor([[[2.],
                 [3.]]])
    """
    position = indices[:, 0]
    for axis, extent in enumerate(features.shape[3:], start=1):
        position = position * extent + indices[:, axis]
    return _gather_op.gather_vectors(features, position)


def _check(spatial_shape: Sequence[int], num_samples: int | None) -> None:
    for extent in spatial_shape:
        _checks.integer("spatial_shape", extent, 0)
    if num_samples is not None:
        _checks.integer("num_samples", num_samples, 1)


def _unravel(positions: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    axes = []
    for extent in reversed(spatial_shape):
        axes.append(positions % max(extent, 1))
        positions = positions // max(extent, 1)
    return torch.stack(axes[::-1], -1)


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
