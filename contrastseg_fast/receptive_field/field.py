"""The receptive field of a feature map, and the formula for plain stacks of layers (Eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Rational
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from contrastseg_fast import _checks

Index = TypeVar("Index", int, np.ndarray, Tensor)


class AxisGrid(NamedTuple):
    """Where the receptive fields of a feature map start along one axis, in integers.

    The field at index i starts at pixel `floor((start + i * stride) / unit)`.
    """

    # Integers, since not every version of torch.compile follows a `Fraction`.
    stride: int
    start: int
    unit: int

    def first_pixel(self, index: Index) -> Index:
        """The first pixel of the field at an index, or at each of an int64 array or tensor of indices.

        Example:
            >>> grid = AxisGrid(stride=3, start=-5, unit=2)
            >>> [grid.first_pixel(index) for index in range(4)]
            [-3, -1, 0, 2]
            >>> grid.first_pixel(torch.arange(4))
            tensor([-3, -1,  0,  2])
        """
        return (index * self.stride + self.start) // self.unit


@dataclass(frozen=True, repr=False)
class ReceptiveField:
    """The pixels that each vector of a feature map sees.

    Along each axis, the field of the vector at index i starts at pixel `floor(start + i * stride)` and has
    `size` pixels. It may extend beyond the image, into the padding. A size of `math.inf` means that every
    vector sees the whole axis, or that it cannot be known how much of the axis it sees.

    Args:
        size: extent of a field along each axis, in pixels; an integer or `math.inf`.
        stride: pixels from one field to the next; an integer or a `fractions.Fraction`.
        start: first pixel of field 0; an integer or a `fractions.Fraction`, often negative.
        reason: for infinite fields, the operators that made them infinite. It is shown, and not compared.
        location: for infinite fields, the finite field of the same vectors without these operators, as far as
            it is known. It says where the vectors lie, and patches are centred in it. It is not compared.

    Attributes:
        grids: for each axis its `AxisGrid`, the integers from which `starts` is computed; empty if the field
            is infinite along any axis.

    Raises:
        TypeError: `size`, `stride` or `start` is not a tuple or list, a finite size is not an integer, a
            stride or start is neither an integer nor a `Fraction`, or `location` is not a ReceptiveField.
            Along an axis of infinite size, `stride` and `start` are not looked at.
        ValueError: `size`, `stride` and `start` differ in length or are empty, a size is less than 1, or
            `location` is infinite, has another number of axes, or is given for a finite field.

    Example:
        >>> field = ReceptiveField(size=(11, 11), stride=(4, 4), start=(-5, -5))
        >>> field.starts(torch.tensor([[0, 0], [2, 3]]))
        tensor([[-5, -5],
                [ 3,  7]])
        >>> field.centred(5)
        ReceptiveField(size=(5, 5), stride=(4, 4), start=(-2, -2))
    """

    size: tuple[int | float, ...]
    stride: tuple[int | Fraction, ...]
    start: tuple[int | Fraction | float, ...]
    reason: str = field(default="", compare=False)
    location: ReceptiveField | None = field(default=None, compare=False)
    grids: tuple[AxisGrid, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("size", "stride", "start"):
            if isinstance(value := getattr(self, name), str) or not isinstance(value, Sequence):
                _checks.fail_type(name, "a tuple with one number per axis", type(value).__name__)
            if not value or len(value) != len(self.size):
                _checks.fail(name, f"one number per axis, {max(len(self.size), 1)} in all", value)
        infinite = [extent == math.inf for extent in self.size]
        for extent, unbounded in zip(self.size, infinite, strict=True):
            if not unbounded:
                _checks.integer("size", extent, 1)
        stride = [0 if u else _rational("stride", x) for x, u in zip(self.stride, infinite, strict=True)]
        start = [-math.inf if u else _rational("start", x) for x, u in zip(self.start, infinite, strict=True)]
        grids = () if any(infinite) else map(_axis_grid, stride, start)
        if self.location is not None:
            self._check_location(self.location)
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "stride", tuple(stride))
        object.__setattr__(self, "start", tuple(start))
        object.__setattr__(self, "grids", tuple(grids))

    @property
    def spatial_dims(self) -> int:
        """Number of axes."""
        return len(self.size)

    @property
    def is_infinite(self) -> bool:
        """Whether the field is infinite along any axis."""
        return math.inf in self.size

    def starts(self, indices: Tensor) -> Tensor:
        """The first pixels of the fields of the given vectors.

        Args:
            indices: integer indices into the feature map `(N, D)`, one column per axis.

        Returns:
            the first pixel of each field along each axis, int64 `(N, D)`, on the device of `indices`.

        Raises:
            TypeError: `indices` is not a tensor, or its dtype is not an integer one.
            ValueError: `indices` is not of shape `(N, D)`, or the field is infinite along any axis.
        """
        _checks.tensor("indices", indices, (2,), "(N, D)")
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            _checks.fail_type("indices", "an integer dtype", indices.dtype)
        _checks.shape("indices", indices, (indices.shape[0], self.spatial_dims), "D axes of the field")
        self._require_finite("starts")
        columns = [grid.first_pixel(indices[:, axis].long()) for axis, grid in enumerate(self.grids)]
        return torch.stack(columns, 1)

    def centred(self, patch_size: int | Sequence[int]) -> ReceptiveField:
        """Patches of `patch_size` pixels around the centres of the fields, the pixels `start + size // 2`.

        If the field is infinite, the centres are those of its `location`.

        Args:
            patch_size: extent of the patches, in pixels; one number for all axes, or one per axis.

        Returns:
            the patches, as a field of that size with the same stride.

        Raises:
            TypeError: an entry of `patch_size` is not an integer.
            ValueError: `patch_size` has not one entry per axis or an entry is less than 1, or the field is
                infinite along any axis and has no `location`.
        """
        patch = (patch_size,) * self.spatial_dims if isinstance(patch_size, int) else tuple(patch_size)
        if len(patch) != self.spatial_dims:
            _checks.fail("patch_size", f"one integer, or {self.spatial_dims}, one per axis", patch_size)
        for extent in patch:
            _checks.integer("patch_size", extent, 1)
        field = self.location or self
        field._require_finite("centred")
        shift = [int(extent) // 2 - small // 2 for extent, small in zip(field.size, patch, strict=True)]
        start = tuple(first + offset for first, offset in zip(field.start, shift, strict=True))
        return ReceptiveField(patch, field.stride, start)

    def _require_finite(self, name: str) -> None:
        if self.is_infinite:
            raise ValueError(f"{name}: expected a finite receptive field, got {self}")

    def _check_location(self, location: object) -> None:
        if not isinstance(location, ReceptiveField):
            _checks.fail_type("location", "a ReceptiveField or None", type(location).__name__)
        if not self.is_infinite:
            _checks.fail("location", "None for a finite field", location)
        if location.is_infinite or location.spatial_dims != self.spatial_dims:
            _checks.fail("location", f"a finite field with {self.spatial_dims} axes", location)

    def __repr__(self) -> str:
        def show(values: Sequence[object]) -> str:
            return f"({', '.join(map(str, values))}{',' if len(values) == 1 else ''})"

        text = f"size={show(self.size)}, stride={show(self.stride)}, start={show(self.start)}"
        if self.is_infinite:
            axes = [str(axis) for axis, extent in enumerate(self.size) if extent == math.inf]
            because = f", because of {self.reason}" if self.reason else ""
            text += f"; INFINITE along axis {', '.join(axes)}{because}"
        return f"ReceptiveField({text})"


def stack_receptive_field(
    kernel_size: Sequence[int | Sequence[int]],
    stride: Sequence[int | Sequence[int]] | None = None,
    padding: Sequence[int | Sequence[int]] | None = None,
    dilation: Sequence[int | Sequence[int]] | None = None,
    *,
    spatial_dims: int = 2,
) -> ReceptiveField:
    """The receptive field behind a plain stack of convolutions and poolings (Eq. 5, with dilation).

        size = 1 + sum_l dilation_l (kernel_l - 1) prod_{k<l} stride_k        stride = prod_l stride_l
        start = -sum_l padding_l prod_{k<l} stride_k

    Args:
        kernel_size: the kernel of each layer, from the first to the last: an integer, or one per axis.
        stride: the same for strides; None means 1 for all layers.
        padding: the same for the padding before the first pixel; None means 0 for all layers.
        dilation: the same for dilations; None means 1 for all layers.
        spatial_dims: number of axes.

    Returns:
        the field of the last layer's output, in pixels of the first layer's input.

    Raises:
        TypeError: `spatial_dims` or a kernel, stride, padding or dilation is not an integer.
        ValueError: `stride`, `padding` or `dilation` has not as many entries as `kernel_size`, an entry has
            not one number per axis, or a number is too small: less than 0 for a padding, else less than 1.

    Example:
        >>> stack_receptive_field([3, 3, 3], stride=[2, 2, 1], padding=[1, 1, 1])
        ReceptiveField(size=(15, 15), stride=(4, 4), start=(-7, -7))
    """
    _checks.integer("spatial_dims", spatial_dims, 1)
    layers = len(kernel_size)
    kernels = _per_layer("kernel_size", kernel_size, layers, spatial_dims, minimum=1)
    strides = _per_layer("stride", stride or [1] * layers, layers, spatial_dims, minimum=1)
    paddings = _per_layer("padding", padding or [0] * layers, layers, spatial_dims, minimum=0)
    dilations = _per_layer("dilation", dilation or [1] * layers, layers, spatial_dims, minimum=1)
    size, jump, start = [1] * spatial_dims, [1] * spatial_dims, [0] * spatial_dims
    for layer in range(layers):
        for axis in range(spatial_dims):
            size[axis] += dilations[layer][axis] * (kernels[layer][axis] - 1) * jump[axis]
            start[axis] -= paddings[layer][axis] * jump[axis]
            jump[axis] *= strides[layer][axis]
    return ReceptiveField(tuple(size), tuple(jump), tuple(start))


def _per_layer(
    name: str, values: Sequence[int | Sequence[int]], layers: int, spatial_dims: int, *, minimum: int
) -> list[tuple[int, ...]]:
    if not isinstance(values, Sequence) or len(values) != layers:
        _checks.fail(name, f"one entry per layer, {layers} in all", values)
    rows = [(value,) * spatial_dims if isinstance(value, int) else tuple(value) for value in values]
    for row in rows:
        if len(row) != spatial_dims:
            _checks.fail(name, f"an integer, or {spatial_dims}, one per axis, for each layer", row)
        for value in row:
            _checks.integer(name, value, minimum)
    return rows


def _rational(name: str, value: object) -> int | Fraction:
    if isinstance(value, bool) or not isinstance(value, Rational):
        _checks.fail_type(name, "integers or fractions.Fraction", repr(value))
    exact = Fraction(value)
    return int(exact) if exact.denominator == 1 else exact


def _axis_grid(stride: int | Fraction, start: int | Fraction | float) -> AxisGrid:
    exact_start = Fraction(start)
    unit = math.lcm(stride.denominator, exact_start.denominator)
    return AxisGrid(int(stride * unit), int(exact_start * unit), unit)
