"""PDCR attached to a model: vectors are sampled while the model runs, the loss takes them afterwards."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from contrastseg_fast import _checks
from contrastseg_fast.affinity import compares_ratios
from contrastseg_fast.attach.extended import check_extensible, observe_inputs, observe_output, stop_observing
from contrastseg_fast.attach.layers import find_layers, select_encoder_layers, select_layers, trace
from contrastseg_fast.attach.model_checks import check_example, check_model, refuse_replica
from contrastseg_fast.patches import first_label_map
from contrastseg_fast.pdcr_loss import PDCRLoss
from contrastseg_fast.pdcr_options import LayerSamples
from contrastseg_fast.receptive_field import LayerRun, ReceptiveField

HEADS = "pdcr"  # the name of the projection heads' submodule in a model


def attach_pdcr(
    model: nn.Module,
    layers: str | Sequence[str],
    num_classes: int,
    *,
    example_input: Tensor | None = None,
    receptive_fields: Mapping[str, ReceptiveField] | None = None,
    label_size: Sequence[int] | None = None,
    **options: Any,
) -> AttachedPDCR:
    """Sample vectors from layers of a model as it trains, and return the regularizer that uses them.

        pdcr = attach_pdcr(model, ["encoder.1", "encoder.2"], num_classes=3, example_input=x)
        loss = criterion(model(x), y) + 0.01 * pdcr(y)

    Vectors are sampled right after each layer runs. Later in-place operations do not change them, and no
    feature map is kept alive. The code and the outputs of the model stay the same, and so does its state
    dict if there is no `projection`. The classes of the model and of the layers become subclasses with the
    same names, so that torch.compile does not take the model for another one that it compiled before.

    With a `projection`, the projection heads become the submodule `model.pdcr`, with keys such as
    `pdcr.encoder/1.weight`. They are trained, moved, copied and saved with the model. Weights saved without
    heads load with `strict=False`. DistributedDataParallel expects gradients of the heads in every step, so
    call the regularizer in every step, with weight 0 if need be, or use `static_graph=True`.

    Args:
        model: a module that is called as a whole in training: what runs outside of its forward pass is not
            sampled. Make the optimizer, wrap the model (in
            DistributedDataParallel, without `find_unused_parameters` if there is a `projection`) and compile
            it afterwards. DataParallel is not supported, because its replicas would share the samples.
        layers: names of layers as in `model.named_modules()`, or patterns such as `"encoder.*.conv2"`. The
            output of a layer, or the first tensor in it, is a feature map `(B, C, *spatial)`. If a pattern
            matches a layer and also layers inside it, only the outer one is used. `"auto"` chooses one
            encoder layer for each of the strides 2, 4 and 8: the outermost one, and if there are several the
            one that runs last. It considers only layers whose receptive field has at least 5 pixels and at
            most half of the image. Layers with an infinite receptive field must be named, and need a
            `patch_size`. `print(pdcr)` shows the layers.
        num_classes: number of classes, as for `PDCRLoss`.
        example_input: an input `(B, C, *spatial)` with the shape and the dtype of inputs in training. Its
            values are not used. It may be None if `receptive_fields` gives the field of every layer, and
            `in_channels` is given if there is a `projection`.
        receptive_fields: receptive fields by layer that replace those found from `example_input`, for layers
            whose field is infinite or cannot be found. The model does not run if all are given, and patterns
            then match layers by name only. They are in pixels of the labels.
        label_size: the spatial shape of the labels, for a model that resizes its input and is trained with
            labels of the new size. None means the spatial shape of the model's input, the first argument of
            the forward pass that is a tensor `(B, C, *spatial)`. With `label_size`, the receptive fields
            found from `example_input` are scaled from its shape to that of the labels.
        options: other arguments of `PDCRLoss`: `num_samples`, `temperature`, `patch_size`, ... With a
            `projection`, `in_channels` is found from `example_input` unless it is given. The heads get the
            device and the dtype of the model's first floating-point parameter.

    Returns:
        the regularizer. If a layer runs several times in a forward pass, its last output is used.

    Raises:
        TypeError: `model` is not a module, is compiled, or contains DataParallel, DistributedDataParallel or
            sharded modules; `layers` is not a name or an iterable of names; the model or a layer is scripted
            or traced; `example_input` is needed and is not a tensor; or `label_size` or an option has the
            wrong type.
        ValueError: `layers` is empty, or names a layer that the model does not have, that does not run, or
            whose output is not a feature map; the model or a layer is parametrized, or its `forward` was
            replaced; `label_size` has not one positive entry per axis; the receptive field of a layer is
            infinite and it has no `patch_size`; `"auto"` finds no layer; `receptive_fields` names a layer
            that is not used; there is a `projection` and `model` has an attribute `pdcr` already;
            `example_input` is not 4- or 5-dimensional; or `num_classes` or an option has a wrong value.
        RuntimeError: the model does not run on an input without data, for example because it branches on the
            values of tensors.

    Warns:
        UserWarning: patches cover more than half of the image along every axis. Their ratios are then nearly
            equal.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> x, y = torch.randn(2, 1, 32, 32), torch.randint(2, (2, 32, 32))
        >>> pdcr = attach_pdcr(model, ["0"], num_classes=2, example_input=x)
        >>> loss = model(x).mean() + 0.01 * pdcr(y)
        >>> loss.backward()
    """
    check_model(model)
    check_extensible(model, "model")
    has_heads = options.get("projection") is not None
    if has_heads and hasattr(model, HEADS):
        got = f"one of type {type(getattr(model, HEADS)).__name__}"
        _checks.fail("model", f"no attribute {HEADS!r}, the name of the projection heads' submodule", got)
    needs_channels = has_heads and options.get("in_channels") is None
    given = dict(receptive_fields or {})
    runs: dict[str, LayerRun] = {}
    if layers == "auto":
        if unknown := set(given) - {name for name, _ in model.named_modules(remove_duplicate=False)}:
            _checks.fail("receptive_fields", "layers of the model", sorted(unknown))
        also = list(given) if needs_channels else []
        chosen, runs = select_encoder_layers(model, check_example(example_input), also)
        names = list(dict.fromkeys([*given, *chosen]))
    elif given:
        names = find_layers(model, layers)
        if unknown := set(given) - set(names):
            _checks.fail("receptive_fields", f"some of the layers {names}", sorted(unknown))
        if missing := [name for name in names if needs_channels or name not in given]:
            runs = trace(model, check_example(example_input), missing, required=missing)
    else:
        names, runs = select_layers(model, layers, example_input)
    for name in names:
        check_extensible(model.get_submodule(name), f"layers ({name!r})")
    fields = {name: given[name] if name in given else runs[name].receptive_field for name in names}
    if label_size is not None:
        label_size = _checked_size(label_size, len(fields[names[0]].size))
        if example_input is not None:
            found = [name for name in names if name not in given]
            factors = [Fraction(*pair) for pair in zip(label_size, example_input.shape[2:], strict=True)]
            fields.update({name: _scaled(fields[name], factors) for name in found})
    if needs_channels:
        options["in_channels"] = {name: runs[name].shape[1] for name in names}
    loss = PDCRLoss(fields, num_classes, **options)
    if loss.projections is not None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        loss.projections.to(like.device, like.dtype).train(model.training)
    if example_input is not None and compares_ratios(loss.affinity):
        _warn_of_large_patches(loss, tuple(label_size or example_input.shape[2:]))
    return AttachedPDCR(model, loss, label_size)


class AttachedPDCR:
    """The PDCR regularizer of a model, made by `attach_pdcr`. Call it with the labels of each forward pass.

    Only the latest forward pass is used, and only once. In eval mode and under `torch.no_grad()` nothing is
    sampled and the regularizer is 0. Such a pass discards the samples of the pass before, unless it is
    paused. The mode of the model decides, not that of its layers. Non-reentrant
    checkpointing is supported. A layer inside a reentrant checkpoint runs without gradients and cannot be
    used.

    The regularizer is not a module, so it may be an attribute of one: the parameters of the model, the
    projection heads among them, are not registered a second time. A copied or pickled model gets its own
    regularizer, which uses the heads of the copy and starts without samples. A layer that is copied or
    pickled without the model samples nothing, and the model does not come along.

    Each regularizer warns once if it is without effect where that may be a mistake: the model is in eval mode
    but computes gradients, vectors have no gradient because their layers are frozen, or vectors of a second
    forward pass replaced those of a first one. To turn PDCR off on purpose, run the forward pass, and call
    the regularizer, inside `with pdcr.paused():`. If a batch also holds images without labels, fill their
    labels with `ignore_index`.

    Attributes:
        loss: the `PDCRLoss`, with the layers' `receptive_fields` and `projections`.
        label_size: the spatial shape that labels must have; None means that of the model's input.
    """

    def __init__(self, model: nn.Module, loss: PDCRLoss, label_size: tuple[int, ...] | None = None) -> None:
        self.loss = loss
        self.label_size = label_size
        self._model = model
        self._samples: dict[str, LayerSamples] = {}  # of the latest pass, until the regularizer is called
        self._used_samples: dict[str, LayerSamples] = {}  # the same from then on, detached
        self._input_size: tuple[int, ...] | None = None  # of the latest pass
        self._replaced_samples = False  # whether those of a pass were replaced before they were used
        self._ran_in_eval = False  # whether the latest pass ran in eval mode with gradients
        self._in_pass = False
        self._warned: set[str] = set()
        self._paused = 0
        self._collectors = [_Collector(str(name)) for name in loss.receptive_fields]
        self._own_collectors()
        observe_inputs(model, self._begin_pass)
        for collector in self._collectors:
            observe_output(model.get_submodule(collector.layer), collector)
        observe_output(model, self._end_pass)
        if loss.projections is not None:
            model.add_module(HEADS, loss.projections)

    def __call__(self, labels: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The regularization of the latest forward pass.

        Args:
            labels, mask: as for `PDCRLoss`. The labels have the spatial shape of the model's input, or
                `label_size`.

        Returns:
            the loss. It is a 0 without a graph in eval mode, without gradients, and inside `paused` if no
            vectors were sampled since the last call.

        Raises:
            TypeError, ValueError: under the conditions of `PDCRLoss.loss`, or the labels have another spatial
                shape.
            RuntimeError: the model is in training mode, and no vectors were sampled since the last call.

        Warns:
            UserWarning: once each, the model is in eval mode but ran with gradients; vectors have no
                gradient; or more than one forward pass was sampled since the last call.
        """
        nothing_sampled = self._paused and not self._samples
        if nothing_sampled or not (self._model.training and torch.is_grad_enabled()):
            if self._ran_in_eval and torch.is_grad_enabled() and not self._paused:
                self._warn(
                    "the model is in eval mode, so PDCR is 0, but it ran with gradients; to train it, call "
                    "model.train(), and eval() for single layers afterwards; to evaluate it, use "
                    "torch.no_grad() or `with pdcr.paused():`"
                )
            return torch.zeros((), device=first_label_map(labels).device)
        samples = self._of_all_layers(self._samples)
        self._check_size(labels)
        loss = self.loss.loss(samples, labels, mask)
        if self._replaced_samples:
            self._warn(
                "the model ran more than once in training mode since the last call, and PDCR uses the latest "
                "forward pass only; run the others inside `with pdcr.paused():`"
            )
        if frozen := [sample.layer for sample in samples if not sample.vectors.requires_grad]:
            self._warn(
                f"PDCR has no gradient at the layers {frozen}, because all that they depend on is frozen; "
                "attach it to layers that train, or, to turn it off for a while, run the model and call the "
                "regularizer inside `with pdcr.paused():`"
            )
        self._used_samples = {name: _detached(samples) for name, samples in self._samples.items()}
        self._samples = {}
        self._replaced_samples = False
        return loss

    def repelled_fraction(self, labels: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The share of pairs in the latest forward pass that the loss repels; near 0, vectors collapse.

        It may be called before or after the regularizer itself. The sampled vectors are kept until the next
        forward pass begins. After the regularizer is called they are kept without their graph.

        Args:
            labels, mask: as for the regularizer itself.

        Returns:
            the fractions `(B, layers)`, fp32, without gradient, as `PDCRLoss.repelled_fraction`.

        Raises:
            TypeError, ValueError: under the conditions of `PDCRLoss.loss`, or the labels have another spatial
                shape.
            RuntimeError: no vectors were sampled in the latest forward pass.
        """
        samples = self._of_all_layers({**self._used_samples, **self._samples})
        self._check_size(labels)
        return self.loss.repelled_fraction(samples, labels, mask)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore the forward passes inside: `with pdcr.paused(): teacher = model(x)`."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def remove(self) -> None:
        """Detach the regularizer from its model, and take the projection heads out of the model."""
        stop_observing(self._model, self._begin_pass)
        stop_observing(self._model, self._end_pass)
        for module in self._model.modules():
            for collector in self._collectors:
                stop_observing(module, collector)
        heads = self.loss.projections
        if heads is not None and getattr(self._model, HEADS, None) is heads:
            delattr(self._model, HEADS)
        self._forget()

    def _own_collectors(self) -> None:
        for collector in self._collectors:
            collector.owner = weakref.ref(self)

    def _forget(self) -> None:
        self._samples = {}
        self._used_samples = {}

    def _begin_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_replica(model)
        collects = model.training and torch.is_grad_enabled()
        self._ran_in_eval = torch.is_grad_enabled() and not model.training
        if self._paused or not (collects or self._samples or self._used_samples):
            return
        if _is_recomputed_or_without_data((args, kwargs)):
            return
        if collects and self._samples and not self._in_pass:  # else the pass before has failed
            self._replaced_samples = True
        self._forget()
        self._in_pass = collects
        self._input_size = _image_size((*args, *kwargs.values()), self.loss.spatial_dims)

    def _end_pass(self, model: nn.Module, output: object) -> None:
        if self._in_pass and not _is_recomputed_or_without_data(output):
            self._in_pass = False

    def _collect(self, name: str, output: object) -> None:
        collects = self._in_pass and torch.is_grad_enabled()
        if self._paused or not collects or _is_recomputed_or_without_data(output):
            return
        features = _first_tensor(name, output)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            self._samples[name] = self.loss.sample(features, name)
        else:
            # A checkpoint must not count what is saved here, as nothing is sampled when it recomputes.
            with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
                self._samples[name] = self.loss.sample(features, name)

    def _of_all_layers(self, samples: Mapping[str, LayerSamples]) -> list[LayerSamples]:
        layers = [collector.layer for collector in self._collectors]
        if missing := [name for name in layers if name not in samples]:
            raise RuntimeError(
                "pdcr: expected a forward pass of the model in training mode before each call, got none "
                f"that sampled the layers {missing}. A later pass in eval mode or under no_grad discards the "
                "samples: run it before, or inside `with pdcr.paused():`. Nothing is sampled after "
                "pdcr.remove(), in layers that were replaced after attach_pdcr, and in reentrant checkpoints "
                "(use use_reentrant=False)"
            )
        return [samples[name] for name in layers]

    def _check_size(self, labels: Tensor | Sequence[Tensor]) -> None:
        expected = self.label_size or self._input_size
        first = first_label_map(labels)
        if expected is None or not isinstance(first, Tensor):
            return
        if tuple(first.shape[-len(expected) :]) != expected:
            source = "label_size"
            if self.label_size is None:
                source = (
                    "that of the model's input; for a model that resizes it, attach_pdcr takes label_size"
                )
            _checks.fail("labels", f"spatial shape {expected} ({source})", f"shape {tuple(first.shape)}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _checks.warn(message)

    def __getstate__(self) -> dict[str, Any]:
        flags = dict.fromkeys(("_replaced_samples", "_ran_in_eval", "_in_pass"), False)
        return {**self.__dict__, **flags, "_samples": {}, "_used_samples": {}, "_paused": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own_collectors()

    def __repr__(self) -> str:
        return f"AttachedPDCR({self.loss!r})"


class _Collector:
    """Observes the output of a layer for the regularizer that owns it.

    It does not keep its owner alive, and a copy has none until the owner was copied too.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.owner: Callable[[], AttachedPDCR | None] = _nobody

    def __call__(self, module: nn.Module, output: object) -> None:
        refuse_replica(module)
        owner = self.owner()
        if owner is not None:
            owner._collect(self.layer, output)

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "owner": _nobody}


def _nobody() -> None:
    return None


def _warn_of_large_patches(loss: PDCRLoss, extents: tuple[int, ...]) -> None:
    """Warn of patches that cover more than half of the image along every axis."""
    large = [
        (layer, tuple(patch.size))
        for patches in loss.patches_by_size
        for layer, patch in patches.items()
        if all(size > extent / 2 for size, extent in zip(patch.size, extents, strict=True))
    ]
    if large:
        warnings.warn(
            f"contrastseg_fast: patches of more than half of the {extents} pixels of an image have nearly "
            f"equal ratios, so that PDCR repels few pairs: {large}; give these layers a patch_size",
            stacklevel=3,
        )


def _first_tensor(name: str, output: object) -> Tensor:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    _checks.fail_type("layers", f"layers that return tensors, {name!r} included", type(output).__name__)


def _checked_size(label_size: Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    if isinstance(label_size, str) or not isinstance(label_size, Sequence):
        _checks.fail_type("label_size", "one integer per axis", type(label_size).__name__)
    if len(label_size) != spatial_dims:
        _checks.fail("label_size", f"{spatial_dims} integers, one per axis", tuple(label_size))
    for extent in label_size:
        _checks.integer("label_size", extent, 1)
    return tuple(label_size)


def _scaled(field: ReceptiveField, factors: Sequence[Fraction]) -> ReceptiveField:
    """A receptive field in the pixels of a resized image."""
    if field.is_infinite:
        location = None if field.location is None else _scaled(field.location, factors)
        return replace(field, location=location)
    size = [math.ceil(extent * factor) for extent, factor in zip(field.size, factors, strict=True)]
    stride = [step * factor for step, factor in zip(field.stride, factors, strict=True)]
    start = [first * factor for first, factor in zip(field.start, factors, strict=True)]
    return ReceptiveField(tuple(size), tuple(stride), tuple(start))


def _image_size(values: Iterable[object], spatial_dims: int) -> tuple[int, ...] | None:
    """The spatial shape of the first tensor `(B, C, *spatial)`."""
    for value in values:
        if isinstance(value, Tensor) and value.ndim == spatial_dims + 2:
            return tuple(value.shape[2:])
    return None


def _is_recomputed_or_without_data(values: object) -> bool:
    """Whether a checkpoint runs the model again in the backward pass, or it is exported or has no data."""
    if torch.compiler.is_compiling():  # Dynamo takes `is_exporting()` for true in torch 2.11
        return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if torch._C._current_graph_task_id() != -1:
        return True
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(values))


def _detached(samples: LayerSamples) -> LayerSamples:
    return samples._replace(vectors=samples.vectors.detach())


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
