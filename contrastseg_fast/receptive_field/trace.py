"""Receptive fields of the layers of any network, from one run without data."""

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
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._pytree import tree_leaves

from contrastseg_fast import _checks
from contrastseg_fast.receptive_field.algebra import Intervals, Lost
from contrastseg_fast.receptive_field.field import ReceptiveField
from contrastseg_fast.receptive_field.positions import Field, Positions
from contrastseg_fast.receptive_field.tracker import CircularPaddingAsZeros, FieldTracker


def receptive_fields(
    model: nn.Module, input_shape: Sequence[int], layers: str | Sequence[str]
) -> dict[str, ReceptiveField]:
    """The receptive fields of the named layers of any model, without computing any values.

    Runs the model in eval mode on a tensor without data and follows what every operator does to receptive
    fields: dilated and transposed convolutions, pooling, up-sampling, padding, cropping, concatenation, skip
    connections (the smallest field that contains both), reshaping. Behind up-sampling, neighbouring vectors
    see different numbers of pixels; the result is then the smallest field of one size and stride that
    contains what every vector sees. The model is left as it was.

    Conventions: normalisation layers count as elementwise, though instance and group norm take the mean over
    the whole map. All channels of a tensor share one field. Padding of any kind (zero, reflected, circular)
    lies outside the image, and fields may extend into it.

    A field is infinite along an axis if a vector sees the whole axis, or if it cannot be known how much of it
    the vector sees: behind attention, a shift of windows by `roll`, global or adaptive pooling, linear layers
    over space, FFT, or an operator of another library. `reason` names the operator. A squeeze-and-excitation
    block makes all fields behind it infinite. The `location` of an infinite field says where the vectors lie,
    so that patches of a `patch_size` can be taken around them. Windows, class tokens and reshaping to tokens
    and back keep it. Sorting, indexing, recurrent layers and operators of another library lose it.

    Args:
        model: a module that takes one tensor.
        input_shape: `(1, C, *spatial)`. Fields behind resizing to a given size depend on it.
        layers: one name or several, as in `model.named_modules()`. The output of each layer is a feature map
            `(B, C, *spatial)`, or a tuple, list or dict whose first tensor is one. If a layer runs several
            times, its last run is taken.

    Returns:
        the field of each layer, in pixels of the input.

    Raises:
        TypeError: an entry of `input_shape` is not an integer, or a layer is scripted or traced.
        ValueError: `input_shape` is not a sequence of at least three positive integers; the model has lazy
            parameters; it has no layer of that name (the message lists similar names); or the layer does not
            run, does not depend on the input, or is known not to return a feature map, as the axes of the
            input lie along other dimensions of its output.
        RuntimeError: the model does not run on an input of that shape without data, or it reads values of
            tensors, for example to branch on them.

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
    """The last run of a layer in a traced model.

    Attributes:
        name: the layer's name.
        output: the first tensor of the layer's output, without data.
        version: how often that tensor had been written to in place when the layer returned it.
        field: what the elements of that tensor see of the input.
        is_single: whether that tensor is the layer's whole output.
        is_join: whether it is two maps concatenated along the channels, as at a skip connection.
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
    def why_no_map(self) -> str:
        """Why the output is not a feature map `(B, C, *spatial)` with the axes of the input; "" if it is one.

        In a feature map, each axis of the input lies along its own spatial dimension, in order, and along no
        other dimension. This is known from the operators that made the map. Its shape does not count.
        """
        if self.field.is_constant:
            return "does not depend on the model's input"
        if not self._misplaced:
            return ""
        return f"of shape {self.shape} is not: {self._whereabouts}"

    def check_map(self) -> None:
        """Check that the output is a feature map.

        Raises:
            ValueError: it is not; the message says why.
        """
        if self.field.is_constant:
            raise ValueError(f"layers: the output of {self.name!r} {self.why_no_map}")
        if self._misplaced:
            _checks.fail(
                "layers",
                "layers whose output is a feature map (B, C, *spatial) with the axes of the input",
                f"{self.name!r}, whose output {self.why_no_map}",
            )

    @property
    def receptive_field(self) -> ReceptiveField:
        """The receptive field of an output `(B, C, *spatial)`.

        The `location` of an infinite one says where the vectors lie. It has none if this is not known along
        some axis; then its `reason` also says why.

        Raises:
            ValueError: the output does not depend on the model's input, or an axis of the input is known not
                to lie along its own spatial dimension alone, in order.
        """
        misplaced = self._misplaced
        if self.field.is_constant or (misplaced and any(map(self.field.layout.places, misplaced))):
            self.check_map()
        seen = self.field.reach.as_map().seen
        grids = [
            intervals.grid(self.shape[2 + axis])
            if isinstance(intervals, Intervals)
            else (math.inf, 0, -math.inf)
            for axis, intervals in enumerate(seen)
        ]
        size, stride, start = zip(*grids, strict=True)
        reason = " and ".join(dict.fromkeys(lost.reason for lost in seen if isinstance(lost, Lost)))
        if misplaced:
            return ReceptiveField(size, stride, start, f"{reason} ({self._whereabouts})")
        return ReceptiveField(size, stride, start, reason, self._location if math.inf in size else None)

    @property
    def _location(self) -> ReceptiveField:
        """Where the vectors of a feature map lie."""
        grids = []
        for axis, intervals in enumerate(self._layout.seen):
            assert isinstance(intervals, Intervals)
            # Whole patterns, since windows of attention are centred on their vectors only as wholes.
            length = len(intervals.pattern)
            grids.append(intervals.grid(-(-self.shape[2 + axis] // length) * length))
        size, stride, start = zip(*grids, strict=True)
        return ReceptiveField(size, stride, start)

    @cached_property
    def _layout(self) -> Positions:
        """Where the elements of the output lie, in the form of a feature map."""
        return self.field.layout.as_map()

    @property
    def _misplaced(self) -> list[int]:
        """The axes that do not lie along their own spatial dimension alone, or of which this is not known."""
        layout = self._layout
        axes = range(len(layout.seen))
        has_axes = len(layout.dims) == len(axes) + 2
        return [axis for axis in axes if not has_axes or layout.places(axis) != {2 + axis}]

    @property
    def _whereabouts(self) -> str:
        """Where the axes of the input lie in the output, in words."""
        layout = self.field.layout
        words = []
        for axis, seen in enumerate(layout.seen):
            places = sorted(self._layout.places(axis)) or sorted(layout.places(axis))
            order = "" if self._layout.places(axis) else "not in order "
            along = f"dimension {places[0]}" if len(places) == 1 else f"dimensions {places}"
            if places:
                words.append(f"axis {axis} of the image lies {order}along {along}")
            elif isinstance(seen, Lost):
                words.append(f"{seen.reason} hid where axis {axis} of the image lies")
            else:
                words.append(f"it does not depend on axis {axis} of the image")
        return ", ".join(words)


def trace_layers(
    model: nn.Module,
    input_shape: Sequence[int],
    names: Sequence[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    required: Sequence[str] | None = None,
) -> dict[str, LayerRun]:
    """Run a model once, in eval mode and without data, and record the last run of each watched layer.

    The model is left as it was.

    Args:
        model: a module that takes one tensor.
        input_shape: `(B, C, *spatial)`.
        names: the layers to watch; None watches every layer, under its first name. A layer may be watched
            under each of the names that it has in `model.named_modules(remove_duplicate=False)`.
        dtype: dtype of the input; None takes that of the model's first floating-point parameter or buffer.
            The input is always on the device of that one.
        required: layers that must run and return a tensor. They are watched as well. None means all of
            `names`. The others are left out of the result if they do not run or return no tensor.

    Returns:
        the run of each watched layer by its name, in the order of these runs.

    Raises:
        TypeError: a required layer is scripted or traced.
        ValueError: the model has no layer of a name in `names` or `required`, it has lazy parameters, or a
            required layer did not run or returned no tensor.
        RuntimeError: the model does not run on an input of that shape without data, or it reads values of
            tensors, for example to branch on them.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
        >>> {name: run.shape for name, run in trace_layers(model, (1, 1, 8, 8)).items()}
        {'0': (1, 8, 6, 6), '1': (1, 8, 6, 6), '': (1, 8, 6, 6)}
    """
    if required is None:
        required = names or ()
    known = dict(model.named_modules(remove_duplicate=False))
    watched = dict(model.named_modules()) if names is None else {}
    for name in (*(names or ()), *required):
        if name not in known:
            raise ValueError(unknown_layer(name, known))
        watched[name] = known[name]
    for name in [name for name, module in watched.items() if isinstance(module, torch.jit.ScriptModule)]:
        if name in required:
            _checks.fail_type(
                "layers", "layers whose forward pass is Python code", f"{name!r}, a ScriptModule"
            )
        del watched[name]  # it takes no hooks
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
        for name, module in watched.items():
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
                    f"instance, got {error}; attach_pdcr can take receptive_fields instead"
                ) from error
            except (RuntimeError, ValueError) as error:
                raise RuntimeError(
                    f"model: expected one that runs without data on an input of shape {tuple(input_shape)} "
                    f"(example_input or input_shape), got {type(error).__name__}: {error}"
                ) from error
    for name in required:
        if name not in runs:
            _checks.fail("layers", "layers that run and return tensors", f"{name!r}, which did not")
    return runs


def unknown_layer(name: str, known: Iterable[str]) -> str:
    """The message of the error that a model has no layer of a name; it lists similar names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    near += [other for other in known if other and other.endswith("." + name) and other not in near][:5]
    hint = f"; near names: {', '.join(map(repr, near))}" if near else f"; first names: {known[1:6]}"
    return f"layers: expected names of layers as in model.named_modules(), got {name!r}{hint}"


_READS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)


@contextmanager
def _silenced(logger: str) -> Iterator[None]:
    """Keep a logger from reporting an error that is raised anyway."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules, containers in them, hooks, and the state of random generators.

    Inside, compiled parts run uncompiled and warnings are ignored; the model's real runs give them.
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
