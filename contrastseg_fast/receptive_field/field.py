"""Which pixels a hidden vector sees: receptive fields of plain stacks (Eq. 5) and of any model."""

from __future__ import annotations

import copy
import difflib
import logging
import math
import random
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from numbers import Rational
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._pytree import tree_leaves

from contrastseg_fast import _checks
from contrastseg_fast.receptive_field.algebra import Boxes, Field, Unbounded
from contrastseg_fast.receptive_field.tracker import CircularPaddingAsZeros, FieldTracker


class BoxGrid(NamedTuple):
    """Where boxes lie along an axis: box i starts at `floor((start + i * stride) / unit)`.

    Integers, since a call may be compiled, and torch.compile does not follow a `Fraction` in every version.
    """

    stride: int
    start: int
    unit: int


@dataclass(frozen=True, repr=False)
class ReceptiveField:
    """The boxes of pixels that the vectors of a feature map see.

    Along each axis the box of the feature at index i starts at pixel `floor(start + i * stride)` and has
    `size` pixels. It may hang over the image, as zero padding does. A size of infinity means that every
    feature sees the whole axis, or that how much it sees cannot be known.

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
    grids: tuple[BoxGrid, ...] = field(init=False, compare=False)  # one per axis; none in an infinite field

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
        grids = () if any(infinite) else map(_grid, stride, start)
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
        for axis, grid in enumerate(self.grids):
            position = indices[:, axis].long() * grid.stride + grid.start
            corners.append(position.div(grid.unit, rounding_mode="floor"))
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


def receptive_fields(
    model: nn.Module, input_shape: Sequence[int], layers: str | Sequence[str]
) -> dict[str, ReceptiveField]:
    """The receptive fields of the named layers of any model, without computing any values.

    Runs the model in eval mode on a tensor without data, and follows what every operator does to the boxes:
    skip connections (the union of boxes), dilated and transposed convolutions, pooling, up-sampling, padding,
    cropping, concatenation, reshaping. Behind up-sampling, where neighbouring features see boxes of different
    sizes, the field is the smallest grid of equal boxes that holds them all. The model is left as it was.

    Conventions: a normalisation layer counts as elementwise, though instance and group norm take their mean
    over the whole map; all channels of a tensor share one box; padding of any kind (zeros, reflected,
    circular) counts as lying outside the image, where boxes may reach.

    A field is infinite along an axis of which a feature sees everything, or nobody knows how much: behind
    attention, global or adaptive pooling, linear layers over space, FFT, an operator of another library. Its
    `reason` names the operator. A squeeze-and-excitation block makes all fields behind it infinite.

    Args:
        model: a module that takes one tensor.
        input_shape: `(1, C, *spatial)`. Fields behind resizing to a given size depend on it.
        layers: names as in `model.named_modules()`. The output of each is a feature map `(B, C, *spatial)`,
            or a tuple, list or dict whose first tensor is. If a layer runs several times its last run counts.

    Returns:
        the field of each layer, in pixels of the input.

    Raises:
        ValueError: there is no such layer (the message lists near names), it does not run, does not depend on
            the input, or its output is not a feature map.
        RuntimeError: the model reads values of tensors, to branch on them for instance.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))
        >>> receptive_fields(model, (1, 3, 64, 64), ["0", "2"])["2"]
        ReceptiveField(size=(8, 8), stride=(2, 2), start=(-1, -1))
    """
    if not isinstance(input_shape, Sequence) or len(input_shape) < 3:
        _checks.fail("input_shape", "(1, C, *spatial)", input_shape)
    for extent in input_shape:
        _checks.integer("input_shape", extent, 1)
    names = [layers] if isinstance(layers, str) else list(layers)
    runs = trace_layers(model, input_shape, names)
    return {name: runs[name].receptive_field for name in names}


@dataclass(frozen=True)
class LayerRun:
    """The last run of a layer without data: its name, its output without data, and what that sees.

    Attributes:
        output: the first tensor of the output, `is_single` if that is all of it; `version` as it was then.
        is_join: whether the output is two maps one after the other, as at a skip connection.
        times: how often the layer ran.
    """

    name: str
    output: Tensor
    version: int
    field: Field
    is_single: bool
    is_join: bool
    times: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return tuple(self.output.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the output."""
        return self.output.dtype

    @property
    def device(self) -> torch.device:
        """The device of the output."""
        return self.output.device

    @property
    def receptive_field(self) -> ReceptiveField:
        """The field of an output `(B, C, *spatial)`; a ValueError if the output is not a feature map."""
        if self.field.is_constant:
            raise ValueError(f"layers: the output of {self.name!r} does not depend on the model's input")
        field = _as_map(self.field)
        grids: list[tuple[Any, Any, Any]] = []
        for axis, seen in enumerate(field.seen):
            if isinstance(seen, Boxes):
                if len(field.dims) != len(field.seen) + 2 or field.places(axis) != {2 + axis}:
                    _checks.fail(
                        "layers",
                        "layers whose output is a feature map (B, C, *spatial) with the axes of the input",
                        f"{self.name!r}, whose output of shape {self.shape} is not",
                    )
                grids.append(seen.grid(self.shape[2 + axis]))
            else:
                grids.append((math.inf, 0, -math.inf))
        size, stride, start = zip(*grids, strict=True)
        reasons = dict.fromkeys(seen.reason for seen in field.seen if isinstance(seen, Unbounded))
        return ReceptiveField(size, stride, start, " and ".join(reasons))


def trace_layers(
    model: nn.Module,
    input_shape: Sequence[int],
    names: Sequence[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, LayerRun]:
    """Run a model without data and watch the named layers, or all: the last run of each, in that order.

    The input is on the device of the model's first floating parameter, and of its dtype unless one is given.
    """
    modules = dict(model.named_modules(remove_duplicate=names is None))
    if names is not None:
        for name in names:
            if name not in modules:
                raise ValueError(unknown_layer(name, modules))
        modules = {name: modules[name] for name in names}
    parameters = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(parameter) for parameter in parameters):
        raise ValueError("model: expected initialised parameters, got lazy ones; run the model once before")
    like = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    runs: dict[str, LayerRun] = {}
    fake_mode = fake_tensor.FakeTensorMode()
    tracker = FieldTracker(fake_mode, len(input_shape) - 2)

    def watch(name: str, module: nn.Module, inputs: object, output: object) -> None:
        first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if first is not None:
            before = runs.pop(name, None)
            times = before.times + 1 if before else 1
            version = 0 if first.is_inference() else first._version
            is_join = tracker.is_join(first, version)
            field = tracker.field_of(first)
            runs[name] = LayerRun(name, first, version, field, first is output, is_join, times)

    with _left_as_it_was(model), torch.inference_mode(False), torch.no_grad(), CircularPaddingAsZeros():
        for module in model.modules():
            module.training = False
        for name, module in modules.items():
            module.register_forward_hook(partial(watch, name))
        with fake_mode:
            image = torch.empty(tuple(input_shape), dtype=dtype or like.dtype, device=like.device)
            tracker.see_image(image)
            try:
                with tracker, _silenced("torch._subclasses.fake_tensor"):
                    model(image)
            except _READS_VALUES as error:
                raise RuntimeError(
                    "model: expected one that does not read values of tensors, to branch on them for "
                    f"instance, got {error}; give the ReceptiveField of its layers by hand"
                ) from error
            except (RuntimeError, ValueError) as error:
                raise RuntimeError(
                    f"model: expected one that runs without data on an input of shape {tuple(input_shape)} "
                    f"(example_input or input_shape), got {type(error).__name__}: {error}"
                ) from error
    for name in names or ():
        if name not in runs:
            _checks.fail("layers", "layers that run and return tensors", f"{name!r}, which did not")
    return runs


def unknown_layer(name: str, known: Iterable[str]) -> str:
    """The message about a layer that a model does not have, with the names that come near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    near += [other for other in known if other and other.endswith("." + name) and other not in near][:5]
    hint = f"; near names: {', '.join(map(repr, near))}" if near else f"; first names: {known[1:6]}"
    return f"layers: expected names of layers as in model.named_modules(), got {name!r}{hint}"


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


def _grid(stride: int | Fraction, start: int | Fraction | float) -> BoxGrid:
    exact_start = Fraction(start)
    unit = math.lcm(stride.denominator, exact_start.denominator)
    return BoxGrid(int(stride * unit), int(exact_start * unit), unit)


_READS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)


def _as_map(field: Field) -> Field:
    """The field of a map with one factor along each spatial dimension and none along batch and channels."""
    axes = range(len(field.seen))
    if len(field.dims) != len(axes) + 2:
        return field
    for dim in (0, 1):
        if all(axis in field.axes_of(2 + axis) for axis in field.axes_of(dim)):
            field = field.mixed(dim)
    for axis in axes:
        if field.axes_of(2 + axis) == {axis}:
            field = field.plain(2 + axis)
    return field


@contextmanager
def _silenced(logger: str) -> Iterator[None]:
    """Keep a logger from telling of an error that is raised anyway."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back attributes, containers in them, hooks and random generators.

    Meanwhile compiled parts run uncompiled, and warnings are left to the model's real runs.
    """
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    containers = {id(c): (c, copy.copy(c)) for _, values in attributes for c in _containers(values, set())}
    python_random, numpy_random = random.getstate(), np.random.get_state()  # noqa: NPY002
    dynamo = sys.modules.get("torch._dynamo")
    uncompiled = dynamo.set_stance("force_eager") if dynamo else nullcontext()
    with torch.random.fork_rng(devices=[]), uncompiled, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for container, content in containers.values():
                if _members(container) != _members(content):
                    container.clear()
                    (container.extend if isinstance(container, (list, deque)) else container.update)(content)
            for module, values in attributes:
                module.__dict__.clear()
                module.__dict__.update(values)
            random.setstate(python_random)
            np.random.set_state(numpy_random)  # noqa: NPY002


def _containers(value: Any, visited: set[int]) -> Iterator[Any]:
    """The mutable containers within a value, itself included."""
    if id(value) in visited or not isinstance(value, (dict, list, tuple, set, deque)):
        return
    visited.add(id(value))
    if not isinstance(value, tuple):
        yield value
    for part in value.values() if isinstance(value, dict) else value:
        yield from _containers(part, visited)


def _members(container: Any) -> list[int]:
    parts = [*container, *container.values()] if isinstance(container, dict) else container
    return [id(part) for part in parts]
