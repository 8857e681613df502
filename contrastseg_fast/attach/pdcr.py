"""PDCR attached to a model: vectors are sampled while the model runs, the loss takes them afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from contrastseg_fast import _checks
from contrastseg_fast.affinity import compares_ratios
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
    **options: Any,
) -> AttachedPDCR:
    """Sample vectors from layers of a model as it trains, and return the regularizer that uses them.

        pdcr = attach_pdcr(model, ["encoder.1", "encoder.2"], num_classes=3, example_input=x)
        loss = criterion(model(x), y) + 0.01 * pdcr(y)

    Vectors are sampled right after each layer runs. Later in-place operations do not change them, and no
    feature map is kept alive. The code and the outputs of the model stay the same, and so does its state
    dict if there is no `projection`. With one, the projection heads become the submodule `model.pdcr`, with
    keys such as `pdcr.encoder/1.weight`. They are trained, moved, copied and saved with the model. Weights
    saved without heads load with `strict=False`. DistributedDataParallel expects gradients of the heads in
    every step, so call the regularizer in every step, with weight 0 if need be, or use `static_graph=True`.

    Args:
        model: a module that is called as a whole in training. Make the optimizer, wrap the model (in
            DistributedDataParallel, without `find_unused_parameters` if there is a `projection`) and compile
            it afterwards. DataParallel is not supported, because its replicas would share the samples.
        layers: names of layers as in `model.named_modules()`, or patterns such as `"encoder.*.conv2"`. The
            output of a layer, or the first tensor in it, is a feature map `(B, C, *spatial)`. If a pattern
            matches a layer and also layers inside it, only the outer one is used. `"auto"` chooses one
            encoder layer for each of the strides 2, 4 and 8: the outermost one, and if there are several the
            one that runs last. It considers only layers whose receptive field has at least 5 pixels and at
            most half of the image. `print(pdcr)` shows the layers.
        num_classes: number of classes, as for `PDCRLoss`.
        example_input: an input `(B, C, *spatial)` with the shape and the dtype of inputs in training. Its
            values are not used. It may be None if `receptive_fields` gives the field of every layer, and
            `in_channels` is given if there is a `projection`.
        receptive_fields: receptive fields by layer that replace those found from `example_input`, for layers
            whose field is infinite or cannot be found. The model does not run if all are given, and patterns
            then match layers by name only.
        options: other arguments of `PDCRLoss`: `num_samples`, `temperature`, `patch_size`, ... With a
            `projection`, `in_channels` is found from `example_input` unless it is given. The heads get the
            device and the dtype of the model's first floating-point parameter.

    Returns:
        the regularizer. If a layer runs several times in a forward pass, its last output is used.

    Raises:
        TypeError: `model` is not a module, is compiled, or contains DataParallel; `layers` is not a name or
            an iterable of names; `example_input` is needed and is not a tensor; or an option has the wrong
            type.
        ValueError: `layers` is empty, or names a layer that the model does not have, that does not run, or
            whose output is not a feature map; the receptive field of a layer is infinite; `"auto"` finds no
            layer; `receptive_fields` names a layer that is not used; there is a `projection` and `model` has
            an attribute `pdcr` already; `example_input` is not 4- or 5-dimensional; or `num_classes` or an
            option has a wrong value.
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
    fields = {name: given[name] if name in given else runs[name].receptive_field for name in names}
    if needs_channels:
        options["in_channels"] = {name: runs[name].shape[1] for name in names}
    loss = PDCRLoss(fields, num_classes, **options)
    if loss.projections is not None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        loss.projections.to(like.device, like.dtype).train(model.training)
    if example_input is not None and compares_ratios(loss.affinity):
        _warn_of_large_patches(loss, tuple(example_input.shape[2:]))
    return AttachedPDCR(model, loss)


class AttachedPDCR:
    """The PDCR regularizer of a model, made by `attach_pdcr`. Call it with the labels of each forward pass.

    Only the latest forward pass is used, and only once. In eval mode and under `torch.no_grad()` nothing is
    sampled and the regularizer is 0. Non-reentrant checkpointing is supported. A layer inside a reentrant
    checkpoint runs without gradients and cannot be used.

    The regularizer is not a module, so it may be an attribute of one: the parameters of the model, the
    projection heads among them, are not registered a second time. A copied or pickled model gets its own
    regularizer, which uses the heads of the copy and starts without samples.

    Attributes:
        loss: the `PDCRLoss`, with the layers' `receptive_fields` and `projections`.
    """

    def __init__(self, model: nn.Module, loss: PDCRLoss) -> None:
        self.loss = loss
        self._model = model
        self._samples: dict[str, LayerSamples] = {}  # of the latest pass, until the regularizer is called
        self._used_samples: dict[str, LayerSamples] = {}  # the same from then on, detached
        self._paused = 0
        self._layers = [str(name) for name in loss.receptive_fields]
        self._handles = [model.register_forward_pre_hook(self._begin_pass)]
        for name in self._layers:
            hook = partial(self._sample, name)
            self._handles.append(model.get_submodule(name).register_forward_hook(hook))
        if loss.projections is not None:
            model.add_module(HEADS, loss.projections)

    def __call__(self, labels: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The regularization of the latest forward pass.

        Args:
            labels, mask: as for `PDCRLoss`.

        Returns:
            the loss. In eval mode or without gradients it is a 0 without a graph.

        Raises:
            TypeError, ValueError: under the conditions of `PDCRLoss.loss`.
            RuntimeError: the model is in training mode, and no vectors were sampled since the last call.
        """
        if not (self._model.training and torch.is_grad_enabled()):
            return torch.zeros((), device=first_label_map(labels).device)
        loss = self.loss.loss(self._of_all_layers(self._samples), labels, mask)
        self._used_samples = {name: _detached(samples) for name, samples in self._samples.items()}
        self._samples = {}
        return loss

    def repelled_fraction(self, labels: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The share of pairs in the latest forward pass that the loss repels; near 0, vectors collapse.

        It may be called before or after the regularizer itself. The sampled vectors are kept until the next
        forward pass begins. After the regularizer is called they are kept without their graph.

        Args:
            labels, mask: as for `PDCRLoss`.

        Returns:
            the fractions `(B, layers)`, fp32, without gradient, as `PDCRLoss.repelled_fraction`.

        Raises:
            TypeError, ValueError: under the conditions of `PDCRLoss.loss`.
            RuntimeError: no vectors were sampled in the latest forward pass.
        """
        samples = self._of_all_layers({**self._used_samples, **self._samples})
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
        for handle in self._handles:
            handle.remove()
        heads = self.loss.projections
        if heads is not None and getattr(self._model, HEADS, None) is heads:
            delattr(self._model, HEADS)
        self._forget()

    def _forget(self) -> None:
        self._samples = {}
        self._used_samples = {}

    def _begin_pass(self, module: nn.Module, inputs: object) -> None:
        refuse_replica(module)
        if not (self._paused or _is_recomputation_or_fake(inputs)):
            self._forget()

    def _of_all_layers(self, samples: Mapping[str, LayerSamples]) -> list[LayerSamples]:
        missing = [name for name in self._layers if name not in samples]
        if missing:
            raise RuntimeError(
                "pdcr: expected a forward pass of the model in training mode before each call, got none "
                f"with gradients through the layers {missing}; passes that are paused, in eval mode or under "
                "no_grad do not count, nor do layers inside a reentrant checkpoint (use use_reentrant=False)"
            )
        return [samples[name] for name in self._layers]

    def _sample(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        training = self._model.training and torch.is_grad_enabled()
        if self._paused or not training or _is_recomputation_or_fake(output):
            return
        features = _first_tensor(name, output)
        if torch.compiler.is_compiling():
            self._samples[name] = self.loss.sample(features, name)
        else:
            # A checkpoint must not count what is saved here, as nothing is sampled when it recomputes.
            with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
                self._samples[name] = self.loss.sample(features, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": {}, "_used_samples": {}}

    def __repr__(self) -> str:
        return f"AttachedPDCR({self.loss!r})"


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


def _is_recomputation_or_fake(values: object) -> bool:
    """Whether a checkpoint runs the model again in the backward pass, or the model runs without data."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._current_graph_task_id() != -1:
        return True
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(values))


def _detached(samples: LayerSamples) -> LayerSamples:
    return samples._replace(vectors=samples.vectors.detach())


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
