"""Which vectors of a feature map are sampled (Algorithm 1), and how they are taken out of it.

What the grid and the raster sampler give depends on the shape of the map alone. On the CPU it is computed
once for a shape and kept as arrays of plain integers: a kept tensor breaks under `torch.inference_mode` and
fake tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contrastseg_fast import _checks, equations
from contrastseg_fast.ops import _dispatch
from contrastseg_fast.ops import gather as _gather_op
from contrastseg_fast.receptive_field import ReceptiveField

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
        TypeError: an extent or `num_samples` is not an integer.
        ValueError: an extent is below 0, or `num_samples` is below 1.

    Example:
        >>> sample_grid((8, 8), 4)
        tensor([[2, 2],
                [2, 6],
                [6, 2],
                [6, 6]])
    """
    _check(spatial_shape, num_samples)
    return _torch_indices("grid", spatial_shape, num_samples, device)


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
        TypeError: an extent or `num_samples` is not an integer.
        ValueError: an extent is below 0, or `num_samples` is below 1.

    Example:
        >>> sample_random((8, 8), 4, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 2])
    """
    _check(spatial_shape, num_samples)
    return unravel(_draw(spatial_shape, num_samples, generator, device), spatial_shape)


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
        TypeError: an extent or `num_samples` is not an integer.
        ValueError: an extent is below 0, or `num_samples` is below 1.

    Example:
        >>> sample_raster((2, 4), 4)
        tensor([[0, 1],
                [0, 3],
                [1, 1],
                [1, 3]])
    """
    _check(spatial_shape, num_samples)
    return _torch_indices("raster", spatial_shape, num_samples, device)


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
        case "raster" | "random":
            return sample_raster(spatial_shape, num_samples, device=device)
        case _:
            raise NotImplementedError(sampler)


class Places(NamedTuple):
    """Where vectors lie in a map.

    Attributes:
        positions: in raster order `(N,)`, int64.
        spatial_shape: of the map.
        planned: the sampler and `num_samples`, where these and the shape decide; None for a random sample.
        computed: the positions as indices `(N, D)`, where they were computed before; `indices` has them.
    """

    positions: Tensor
    spatial_shape: tuple[int, ...]
    planned: tuple[str, int | None] | None
    computed: Tensor | None = None

    @property
    def indices(self) -> Tensor:
        """The positions as indices `(N, D)`."""
        if self.computed is not None:
            return self.computed
        return unravel(self.positions, self.spatial_shape)

    def starts(self, field: ReceptiveField) -> Tensor:
        """The first pixels `(N, D)` of the vectors' receptive fields or patches."""
        if self.planned is not None and self.computed is None and not torch.compiler.is_compiling():
            kept = _kept_starts(*self.planned, self.spatial_shape, field.grids)
            return torch.tensor(kept, device=self.positions.device)
        return field.starts(self.indices)


def place(
    sampler: str,
    spatial_shape: tuple[int, ...],
    num_samples: int | None,
    generator: torch.Generator | None,
    device: torch.device,
) -> Places:
    """The places of the sampler of that name, one of `SAMPLERS`. Arguments are not checked."""
    if sampler == "random" and num_samples is not None:
        return Places(_draw(spatial_shape, num_samples, generator, device), spatial_shape, None)
    sampler = "raster" if sampler == "random" else sampler
    planned = (sampler, num_samples)
    if _is_kept(spatial_shape, device):
        positions = torch.tensor(_kept_positions(*planned, spatial_shape), device=device)
        return Places(positions, spatial_shape, planned)
    indices = _torch_indices(sampler, spatial_shape, num_samples, device)
    return Places(ravel(indices, spatial_shape), spatial_shape, planned, indices)


def gather_vectors(features: Tensor, indices: Tensor, *, backend: str = "auto") -> Tensor:
    """The hidden vectors of a feature map at the given indices.

    Autograd keeps the indices, not the map.

    Args:
        features: feature map `(B, C, *spatial)`, any dtype and memory format.
        indices: int64 indices `(N, D)`, on the device of `features`.
        backend: `"auto"`, `"reference"` or `"triton"`. An explicit backend runs or raises; only `"auto"`
            chooses.

    Returns:
        vectors `(B, N, C)` in the dtype of `features`.

    Raises:
        ValueError: the backend is unknown, or does not serve the device of `features`.
        RuntimeError: the backend is not installed. Also a derivative in forward mode, or one within
            `torch.func.grad`, `vjp` or `jacrev`; only `backend="reference"` has these.

    Example:
        >>> gather_vectors(torch.arange(6.).view(1, 1, 2, 3), torch.tensor([[0, 2], [1, 0]]))
        tensor([[[2.],
                 [3.]]])
    """
    _dispatch.check(_gather_op.OPERATION, backend, features)
    return gather_at(features, ravel(indices, features.shape[2:]), backend)


def gather_at(features: Tensor, positions: Tensor, backend: str) -> Tensor:
    """`gather_vectors` at positions `(N,)` in raster order. The backend is not checked."""
    if backend == "reference":
        return equations.gather_vectors(features, positions)
    return _gather_op.gather_vectors(features, positions, backend)


def ravel(indices: Any, spatial_shape: Sequence[int]) -> Any:
    """Positions `(N,)` in raster order of indices `(N, D)`, both tensors or both arrays."""
    positions = indices[:, 0]
    for axis, extent in enumerate(spatial_shape[1:], start=1):
        positions = positions * extent + indices[:, axis]
    return positions


def unravel(positions: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    """Indices `(N, D)` of positions `(N,)` in raster order."""
    return torch.stack(_coordinates(positions, spatial_shape), -1)


def _check(spatial_shape: Sequence[int], num_samples: int | None) -> None:
    for extent in spatial_shape:
        _checks.integer("spatial_shape", extent, 0)
    if num_samples is not None:
        _checks.integer("num_samples", num_samples, 1)


def _coordinates(positions: Any, spatial_shape: Sequence[int]) -> list[Any]:
    axes = []
    for extent in reversed(spatial_shape):
        axes.append(positions % max(extent, 1))
        positions = positions // max(extent, 1)
    return axes[::-1]


def _axes(
    sampler: str, spatial_shape: Sequence[int], num_samples: int | None, arange: Callable[[int], Any]
) -> list[Any]:
    """The samples' coordinates along each axis, which together are `(N, D)` or broadcast to it.

    One formula for tensors and arrays: points lie in the middle of equal steps.
    """
    if sampler == "raster":
        total = math.prod(spatial_shape)
        count = total if num_samples is None else min(num_samples, total)
        return _coordinates((2 * arange(count) + 1) * total // (2 * max(count, 1)), spatial_shape)
    return [
        (2 * arange(count) + 1) * extent // (2 * max(count, 1))
        for count, extent in zip(_grid_counts(spatial_shape, num_samples), spatial_shape, strict=True)
    ]


def _torch_indices(
    sampler: str,
    spatial_shape: Sequence[int],
    num_samples: int | None,
    device: torch.device | str | None,
) -> Tensor:
    axes = _axes(sampler, spatial_shape, num_samples, functools.partial(torch.arange, device=device))
    if sampler == "grid":
        axes = list(torch.meshgrid(*axes, indexing="ij"))
    return torch.stack(axes, -1).flatten(0, -2)


_MOST_KEPT = 1 << 20  # vectors in the maps whose places are kept


def _is_kept(spatial_shape: Sequence[int], device: torch.device) -> bool:
    """Whether places are kept: not on a GPU, where copying them would wait, nor in a graph of any shape."""
    return (
        device.type == "cpu"
        and not torch.compiler.is_compiling()
        and set(map(type, spatial_shape)) <= {int}  # no symbols
        and math.prod(spatial_shape) <= _MOST_KEPT
    )


@functools.lru_cache(maxsize=64)
def _kept_indices(sampler: str, num_samples: int | None, spatial_shape: tuple[int, ...]) -> np.ndarray:
    axes = _axes(sampler, spatial_shape, num_samples, np.arange)
    if sampler == "grid":
        axes = list(np.meshgrid(*axes, indexing="ij"))
    return np.stack(axes, -1).reshape(-1, len(spatial_shape)).astype(np.int64)


@functools.lru_cache(maxsize=64)
def _kept_positions(sampler: str, num_samples: int | None, spatial_shape: tuple[int, ...]) -> np.ndarray:
    return ravel(_kept_indices(sampler, num_samples, spatial_shape), spatial_shape)


@functools.lru_cache(maxsize=256)
def _kept_starts(
    sampler: str, num_samples: int | None, spatial_shape: tuple[int, ...], grids: tuple[Any, ...]
) -> np.ndarray:
    indices = _kept_indices(sampler, num_samples, spatial_shape)
    return np.stack([grid.first_pixel(indices[:, axis]) for axis, grid in enumerate(grids)], -1)


def _draw(
    spatial_shape: Sequence[int],
    num_samples: int | None,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> Tensor:
    """Positions `(N,)` drawn without repetition."""
    drawn_on = device if generator is None else generator.device
    order = torch.randperm(math.prod(spatial_shape), generator=generator, device=drawn_on)
    return order[:num_samples].to(device)


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
