"""Which pixels a hidden vector sees: receptive fields of plain stacks (Eq. 5) and of any model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Rational

import torch
from torch import Tensor

from contrastseg_fast import _checks


@dataclass(frozen=True, repr=False)
class ReceptiveField:
    """The boxes of pixels that the vectors of a feature map see.

    Along each axis the box of the feature at index i starts at pixel `floor(start + i * stride)` and has `size`
    pixels. It may hang over the image, as zero padding does. A size of infinity means that every feature sees the
    whole axis, or that how much it sees cannot be known.

    Args:
        size: extent of a box along each axis, in pixels; an integer or `math.inf`.
        stride: pixels from one box to the next; an integer or a `fractions.Fraction`.
        start: first pixel of box 0; an integer or a `fractions.Fraction`, often negative.
        reason: for infinite fields, what made them so; shown, not compared.

    Raises:
        TypeError, ValueError: the tuples differ in length, or an entry is not such a number.

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
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "stride", tuple(stride))
        object.__setattr__(self, "start", tuple(start))

    @property
    def spatial_dims(self) -> int:
        """Number of axes."""
        return len(self.size)

    @property
    def is_infinite(self) -> bool:
        """Whether the field is infinite along any axis."""
        return math.inf in self.size

    def starts(self, indices: Tensor) -> Tensor:
        """The first pixel of the boxes of the given features.

        Args:
            indices: integer indices into the feature map `(N, D)`.

        Returns:
            int64 corners `(N, D)`, in pixels, on the device of `indices`.

        Raises:
            TypeError, ValueError: `indices` does not fit, or the field is infinite.
        """
        _checks.tensor("indices", indices, (2,), "(N, D)")
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            _checks.fail_type("indices", "an integer dtype", indices.dtype)
        _checks.shape("indices", indices, (indices.shape[0], self.spatial_dims), "D axes of the field")
        self._require_finite("starts")
        corners = []
        for axis in range(self.spatial_dims):
            stride, start = Fraction(self.stride[axis]), Fraction(self.start[axis])
            unit = math.lcm(stride.denominator, start.denominator)
            position = indices[:, axis].long() * int(stride * unit) + int(start * unit)
            corners.append(position.div(unit, rounding_mode="floor"))
        return torch.stack(corners, 1)

    def centred(self, patch_size: int | Sequence[int]) -> ReceptiveField:
        """Boxes of `patch_size` pixels around the centres of these, the pixels `start + size // 2`.

        Args:
            patch_size: extent of the new boxes, in pixels; one number for all axes, or one per axis.

        Returns:
            a field of that size and the same stride.

        Raises:
            TypeError, ValueError: `patch_size` does not fit, or the field is infinite and has no centre.
        """
        patch = (patch_size,) * self.spatial_dims if isinstance(patch_size, int) else tuple(patch_size)
        if len(patch) != self.spatial_dims:
            _checks.fail("patch_size", f"one integer, or {self.spatial_dims}, one per axis", patch_size)
        for extent in patch:
            _checks.integer("patch_size", extent, 1)
        self._require_finite("centred")
        shift = [int(extent) // 2 - small // 2 for extent, small in zip(self.size, patch, strict=True)]
        start = tuple(first + offset for first, offset in zip(self.start, shift, strict=True))
        return ReceptiveField(patch, self.stride, start)

    def _require_finite(self, name: str) -> None:
        if self.is_infinite:
            raise ValueError(f"{name}: expected a finite receptive field, got {self}")

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
        kernel_size: for each layer, first to last, its kernel: an integer, or one per axis.
        stride: the same for strides; None means 1 throughout.
        padding: the same for the padding before the first pixel; None means 0 throughout.
        dilation: the same for dilations; None means 1 throughout.
        spatial_dims: number of axes.

    Returns:
        the field of the last layer's features, in pixels of the first layer's input.

    Raises:
        TypeError, ValueError: an argument does not fit.

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
