"""Which vectors of a feature map are sampled (Algorithm 1), and how they are taken out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from contrastseg_fast import _checks, equations
from contrastseg_fast.ops import _dispatch
from contrastseg_fast.ops import gather as _gather_op
from contrastseg_fast.receptive_field import ReceptiveField
from contrastseg_fast.sample_plan import SamplePlan, coordinates

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
    return unravel(SamplePlan.make("grid", spatial_shape, num_samples).positions(device), spatial_shape)


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
    return unravel(SamplePlan.make("raster", spatial_shape, num_samples).positions(device), spatial_shape)


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
    """Where vectors lie in a map. A plan takes the place of their positions, which it computes where needed.

    Attributes:
        spatial_shape: of the map.
        device: of the map.
        plan: of the grid or the raster sampler, else None.
        given: the positions `(N,)` in raster order, int64, where there is no plan, else None.
    """

    spatial_shape: tuple[int, ...]
    device: torch.device
    plan: SamplePlan | None
    given: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """The positions in raster order `(N,)`, int64."""
        return self.given if self.plan is None else self.plan.positions(self.device)  # type: ignore[return-value]

    @property
    def indices(self) -> Tensor:
        """The positions as indices `(N, D)`."""
        return unravel(self.positions, self.spatial_shape)

    def starts(self, field: ReceptiveField) -> Tensor:
        """The first pixels `(N, D)` of the vectors' receptive fields or patches."""
        if self.plan is None:
            return field.starts(self.indices)
        return self.plan.starts(self.spatial_shape, field.grids, self.device)


def place(
    sampler: str,
    spatial_shape: tuple[int, ...],
    num_samples: int | None,
    generator: torch.Generator | None,
    device: torch.device,
) -> Places:
    """The places of the sampler of that name, one of `SAMPLERS`. Arguments are not checked."""
    if sampler == "random" and num_samples is not None:
        return Places(spatial_shape, device, None, _draw(spatial_shape, num_samples, generator, device))
    plan = SamplePlan.make("raster" if sampler == "random" else sampler, spatial_shape, num_samples)
    return Places(spatial_shape, device, plan)


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
    positions = indices[:, 0]
    for axis, extent in enumerate(features.shape[3:], start=1):
        positions = positions * extent + indices[:, axis]
    return gather_at(features, Places(tuple(features.shape[2:]), features.device, None, positions), backend)


def gather_at(features: Tensor, places: Places, backend: str) -> Tensor:
    """`gather_vectors` at places of the map. The backend is not checked."""
    if backend == "reference":
        return equations.gather_vectors(features, places.positions)
    plan = [] if places.plan is None else places.plan.numbers
    return _gather_op.gather_vectors(features, places.given, plan, backend)


def unravel(positions: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    """Indices `(N, D)` of positions `(N,)` in raster order."""
    return torch.stack(coordinates(positions, spatial_shape), -1)


def _check(spatial_shape: Sequence[int], num_samples: int | None) -> None:
    for extent in spatial_shape:
        _checks.integer("spatial_shape", extent, 0)
    if num_samples is not None:
        _checks.integer("num_samples", num_samples, 1)


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
