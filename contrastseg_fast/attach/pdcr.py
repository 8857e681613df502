"""PDCR and UAFS for any model, by the names of its layers and without changing its code."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from contrastseg_fast import _checks
from contrastseg_fast.modules import UAFS, LayerSamples, PDCRLoss, finest, submodule_name
from contrastseg_fast.receptive_field import LayerRun, ReceptiveField, trace_layers, unknown_layer

_AUTO_STRIDES = (2, 4, 8)
_LEAST_AUTO_SIZE = 5  # pixels
_GATES = "uafs"  # the attribute that holds the gates
_BARE = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def attach_pdcr(
    model: nn.Module,
    layers: str | Sequence[str],
    num_classes: int,
    *,
    example_input: Tensor | None = None,
    receptive_fields: Mapping[str, ReceptiveField] | None = None,
    **options: Any,
) -> AttachedPDCR:
    """Collect the features of a model's layers as it trains, and return the regularizer on them.

        pdcr = attach_pdcr(model, ["encoder.1", "encoder.2"], num_classes=3, example_input=x)
        loss = criterion(model(x), y) + 0.01 * pdcr(y)

    Vectors are sampled while the model runs, right after each layer, so operations in place behind it do no
    harm and no feature map is kept alive. The model's code, outputs and state dict stay as they are.

    Args:
        model: a module, called as a whole in training. Wrap it (in DistributedDataParallel) and compile it
            afterwards. DataParallel is refused: its replicas would collect over each other.
        layers: names as in `model.named_modules()`, or patterns such as `"encoder.*.conv2"`, of layers whose
            output (or its first tensor) is a feature map `(B, C, *spatial)`. Of the layers that a pattern
            matches, those inside others of them do not count. Or `"auto"`: for each of the strides 2, 4 and 8
            the last of the outermost encoder layers whose receptive field has at least 5 pixels and at most
            half of the image. `print(pdcr)` shows the choice.
        num_classes: number of classes, as for `PDCRLoss`.
        example_input: an input `(B, C, *spatial)` as in training; only its shape and dtype count.
        receptive_fields: fields by layer to use instead of finding them, where the field found is infinite or
            none can be found.
        options: everything else that `PDCRLoss` takes: `num_samples`, `temperature`, `patch_size`, ... The
            `in_channels` of a `projection` are found like the fields; its parameters are `pdcr.loss`'s, to be
            optimized, saved and moved along with the model's.

    Returns:
        the regularizer. Of the outputs of a layer that runs several times in a pass the last counts.

    Raises:
        TypeError, ValueError: an argument does not fit, there is no such layer, or the receptive field of one
            is infinite.
        RuntimeError: the model does not run on the example input without data, or reads values of tensors.

    Warns:
        UserWarning: boxes that cover more than half of the image along every axis, whose ratios are nearly
            alike.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> x, y = torch.randn(2, 1, 32, 32), torch.randint(2, (2, 32, 32))
        >>> pdcr = attach_pdcr(model, ["0"], num_classes=2, example_input=x)
        >>> loss = model(x).mean() + 0.01 * pdcr(y)
        >>> loss.backward()
    """
    _check_model(model)
    fields = dict(receptive_fields or {})
    runs: dict[str, LayerRun] = {}
    if layers == "auto":
        runs = {run.name: run for run in _auto_layers(model, _required(example_input))}
        names = list(dict.fromkeys([*fields, *runs]))
    else:
        names = find_layers(model, layers, None if fields else example_input)
        if unknown := set(fields) - set(names):
            _checks.fail("receptive_fields", f"some of the layers {names}", sorted(unknown))
        wants_channels = options.get("projection") is not None and options.get("in_channels") is None
        if missing := [name for name in names if wants_channels or name not in fields]:
            runs = _trace(model, _required(example_input), missing)
    fields = {name: run.receptive_field for name, run in runs.items()} | fields
    if options.get("projection") is not None and set(names) <= set(runs):
        options = {"in_channels": {name: runs[name].shape[1] for name in names}, **options}
    loss = PDCRLoss({name: fields[name] for name in names}, num_classes, **options)
    if runs:
        loss = loss.to(next(iter(runs.values())).device)
    if example_input is not None and loss.affinity == "ratio":
        _warn_of_large_boxes(loss, tuple(example_input.shape[2:]))
    return AttachedPDCR(model, loss)


class AttachedPDCR:
    """The PDCR regularizer of a model, made by `attach_pdcr`; takes the labels of the last forward pass.

    Of several passes the last counts, and it counts once. In eval mode and under `torch.no_grad()` nothing
    is collected and the regularizer is 0. Non-reentrant checkpointing is fine; a layer inside a reentrant
    checkpoint runs without gradients and cannot be used. A copied or pickled model takes its regularizer
    along, without what it has collected.

    Attributes:
        loss: the `PDCRLoss`, with the layers' `receptive_fields`.
    """

    def __init__(self, model: nn.Module, loss: PDCRLoss) -> None:
        self.loss = loss
        self._model = model
        self._samples: dict[str, LayerSamples] = {}
        self._paused = 0
        self._layers = [str(name) for name in loss.receptive_fields]
        self._handles = [model.register_forward_pre_hook(self._begin_pass)]
        for name in self._layers:
            hook = partial(self._collect, name)
            self._handles.append(model.get_submodule(name).register_forward_hook(hook))

    def __call__(self, labels: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The regularization of the last forward pass.

        Args:
            labels, mask: as for `PDCRLoss`.

        Returns:
            the loss; in eval mode or without gradients a 0 connected to nothing.

        Raises:
            TypeError, ValueError: an argument does not fit.
            RuntimeError: in training mode, nothing was collected since the last call.
        """
        if not (self._model.training and torch.is_grad_enabled()):
            return torch.zeros((), device=finest(labels).device)
        loss = self.loss.loss(self._collected(), labels, mask)
        self._samples.clear()
        return loss

    def repelled_fraction(self, labels: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The share of pairs that the loss of the last forward pass drives apart; near 0, vectors collapse.

        To be called before the regularizer itself, which takes what was collected.

        Args:
            labels, mask: as for `PDCRLoss`.

        Returns:
            the fractions `(B, layers)`, fp32, without gradient, as `PDCRLoss.repelled_fraction`.

        Raises:
            TypeError, ValueError: an argument does not fit.
            RuntimeError: nothing was collected since the last call of the regularizer.
        """
        return self.loss.repelled_fraction(self._collected(), labels, mask)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pass over the forward passes inside: `with pdcr.paused(): teacher = model(x)`."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def remove(self) -> None:
        """Take the regularizer off its model."""
        for handle in self._handles:
            handle.remove()
        self._samples.clear()

    def _begin_pass(self, module: nn.Module, inputs: object) -> None:
        _refuse_replicas(module)
        if not (self._paused or _is_rehearsal(inputs)):
            self._samples.clear()

    def _collected(self) -> list[LayerSamples]:
        missing = [name for name in self._layers if name not in self._samples]
        if missing:
            raise RuntimeError(
                "pdcr: expected a forward pass of the model in training mode before each call, got none "
                f"with gradients through the layers {missing}; passes that are paused, in eval mode or under "
                "no_grad do not count, nor do layers inside a reentrant checkpoint (use use_reentrant=False)"
            )
        return [self._samples[name] for name in self._layers]

    def _collect(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        training = self._model.training and torch.is_grad_enabled()
        if self._paused or not training or _is_rehearsal(output):
            return
        features = _first_tensor(name, output)
        if torch.compiler.is_compiling():
            self._samples[name] = self.loss.sample(features, name)
        else:
            # What a checkpoint would save here it would miss when it recomputes the layer, without sampling.
            with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
                self._samples[name] = self.loss.sample(features, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": {}}

    def __repr__(self) -> str:
        return f"AttachedPDCR({self.loss!r})"


def insert_uafs(
    model: nn.Module,
    layers: str | Sequence[str],
    num_classes: int,
    *,
    example_input: Tensor,
    **options: Any,
) -> nn.Module:
    """Put an uncertainty-aware gate behind layers of a model (Eqs. 8 to 10), in place.

    The gates become the submodule `model.uafs`, so they train, move and save with the model; every other key
    of the state dict stays as it was, and weights saved before load with `strict=False`. Make the optimizer
    afterwards, and attach PDCR afterwards too: it then sees gated features, with the gates' receptive fields.
    `contrastseg_fast.attach.remove_uafs(model)` takes the gates out again.

    Args:
        model: a module. Wrap it (in DistributedDataParallel) and compile it afterwards.
        layers: names as in `model.named_modules()`, or patterns such as `"encoder.*.conv2"`, of layers whose
            output (or its first tensor, which alone is gated) is a feature map `(B, C, *spatial)`. Of the
            layers that a pattern matches, those inside others of them do not count. Or `"auto"`: behind
            every encoder and decoder stage, which is the outermost layer that ends each resolution on the way
            down and again on the way up, layers with as many channels as the output apart.
            `list(model.uafs)` shows the choice, with slashes for dots.
        num_classes: classes that the gates predict, at least 2.
        example_input: an input `(B, C, *spatial)` of the model; only its shape and dtype count.
        options: everything else that `UAFS` takes: `hidden_channels`, `norm`, `backend`.

    Returns:
        the model.

    Raises:
        TypeError, ValueError: an argument does not fit, there is no such layer, or it has a gate already;
            with `"auto"`, any layer has.
        RuntimeError: the model does not run on the example input without data.

    Warns:
        UserWarning: PDCR is attached already, with the receptive fields of a model without these gates.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> model = insert_uafs(model, ["1"], num_classes=2, example_input=torch.zeros(1, 1, 16, 16))
        >>> model.uafs["1"].in_channels
        8
    """
    _check_model(model)
    example = _required(example_input)
    gates = getattr(model, _GATES, None)
    if gates is not None and not isinstance(gates, _Gates):
        _checks.fail(
            "model", f"no attribute {_GATES!r}, the name of the gates' submodule", type(gates).__name__
        )
    if layers == "auto" and gates is not None:
        _checks.fail("layers", "names, as the model has gates already (remove_uafs takes them out)", "'auto'")
    names = _auto_stages(model, example) if layers == "auto" else find_layers(model, layers, example)
    made: dict[str, UAFS] = {}
    for name, run in _trace(model, example, names).items():
        if name == "" or (gates is not None and submodule_name(name) in gates):
            _checks.fail("layers", "layers inside the model that have no gate yet", repr(name))
        _ = run.receptive_field  # raises unless the output is a feature map
        gate = UAFS(len(run.shape) - 2, run.shape[1], num_classes, **options)
        made[name] = gate.to(run.device, run.dtype).train(model.training)
    if _has_pdcr(model):
        warnings.warn(
            "contrastseg_fast: gates inserted after PDCR was attached widen receptive fields that it goes on "
            "taking as they were; insert gates first, then attach PDCR",
            stacklevel=2,
        )
    if gates is None:
        gates = _Gates()
        model.add_module(_GATES, gates)
    for name, gate in made.items():
        gates[submodule_name(name)] = gate
        gates.handles.append(model.get_submodule(name).register_forward_hook(_GateHook(gate)))
    return model


def remove_uafs(model: nn.Module) -> nn.Module:
    """Take all gates that `insert_uafs` put into a model out again, in place.

    A PDCR regularizer attached meanwhile keeps the receptive fields of the gated layers: attach it anew.

    Args:
        model: the model handed to `insert_uafs`.

    Returns:
        the model, with the layers, hooks and state dict that it had before.

    Raises:
        ValueError: the model has no gates.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> model = insert_uafs(model, "auto", num_classes=2, example_input=torch.zeros(1, 1, 16, 16))
        >>> list(remove_uafs(model).state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    gates = getattr(model, _GATES, None)
    if not isinstance(gates, _Gates):
        _checks.fail("model", "one that insert_uafs put gates into", f"{type(model).__name__} without")
    for handle in gates.handles:
        handle.remove()
    delattr(model, _GATES)
    return model


class _Gates(nn.ModuleDict):
    """The gates by layer; as a step of an `nn.Sequential` they pass on what they get.

    Attributes:
        handles: take the gates' hooks off.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[RemovableHandle] = []

    def forward(self, x: Any) -> Any:
        return x


class _GateHook:
    """Replaces a layer's output by the gated one; a class, to be copied and pickled with its gate."""

    def __init__(self, gate: UAFS) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, inputs: object, output: Any) -> Any:
        _refuse_replicas(module)
        leaves, structure = tree_flatten(output)
        position = next(k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        leaves[position] = self.gate(leaves[position])
        return tree_unflatten(leaves, structure)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        _checks.fail_type("model", "an nn.Module", type(model).__name__)
    if hasattr(model, "_orig_mod"):
        _checks.fail_type("model", "one to be compiled afterwards", f"a compiled {type(model).__name__}")
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        _checks.fail_type("model", f"one without {_NO_REPLICAS}", "nn.DataParallel")


def _refuse_replicas(module: nn.Module) -> None:
    if getattr(module, "_is_replica", False):
        raise RuntimeError(f"model: expected one process per device, got {_NO_REPLICAS}")


_NO_REPLICAS = "DataParallel, whose replicas share hooks (use DistributedDataParallel)"


def _required(example_input: Tensor | None) -> Tensor:
    if not isinstance(example_input, Tensor):
        _checks.fail_type("example_input", "a tensor (B, C, *spatial)", type(example_input).__name__)
    if example_input.ndim not in (4, 5):
        _checks.fail("example_input", "a tensor (B, C, *spatial)", f"shape {tuple(example_input.shape)}")
    return example_input


def _trace(model: nn.Module, example: Tensor, names: Sequence[str] | None) -> dict[str, LayerRun]:
    return trace_layers(model, example.shape, names, dtype=example.dtype)


def find_layers(
    model: nn.Module, layers: str | Sequence[str], example_input: Tensor | None = None
) -> list[str]:
    """The layers that names and patterns stand for, in the order given, each once.

    Of the layers that a pattern matches the outermost count; gates never do, nor, if there is an example
    input, what does not run as a whole, such as a list of layers.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()), nn.Conv2d(8, 2, 1))
        >>> find_layers(model, ["1", "*"])
        ['1', '0']
    """
    known = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, str] = {}
    if isinstance(layers, nn.Module) or not isinstance(layers, Iterable):
        _checks.fail_type("layers", "names of layers", type(layers).__name__)
    wanted = [layers] if isinstance(layers, str) else list(layers)
    for name in wanted:
        if not isinstance(name, str):
            _checks.fail_type("layers", "names of layers", type(name).__name__)
        if name not in known and not fnmatch.filter(known, name):
            raise ValueError(unknown_layer(name, known))
    candidates = [] if set(wanted) <= set(known) else _candidates(model, example_input)
    for name in wanted:
        matches = [name] if name in known else _outermost(fnmatch.filter(candidates, name))
        if not matches:
            raise ValueError(unknown_layer(name, known))
        for match in matches:
            found.setdefault(known[match], match)
    if not found:
        _checks.fail("layers", "at least one layer", layers)
    return list(found.values())


def _candidates(model: nn.Module, example_input: Tensor | None) -> list[str]:
    """The layers that patterns may take, by their first names: what runs on its own, without gates."""
    in_gates = _names_in_gates(model)
    names = [name for name, _ in model.named_modules() if name and name not in in_gates]
    if example_input is None:
        return names
    running = _trace(model, example_input, None)
    return [name for name in names if name in running]


def _outermost(names: Sequence[str]) -> list[str]:
    """The names of layers that lie inside no other of them."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _names_in_gates(model: nn.Module) -> set[str]:
    """The names of gates and of what they are made of."""
    inside: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _Gates):
            inside.update(name for name, _ in module.named_modules(prefix=prefix, remove_duplicate=False))
    return inside


def _auto_layers(model: nn.Module, example: Tensor) -> list[LayerRun]:
    """The encoder layer of each stride whose field is neither tiny nor most of the image."""
    fitting: list[tuple[int, _Candidate]] = []
    for candidate in _encoder_and_decoder(model, example)[0]:
        field = candidate.run.receptive_field
        stride = max(field.stride)
        fits = all(size <= extent / 2 for size, extent in zip(field.size, example.shape[2:], strict=True))
        if stride in _AUTO_STRIDES and max(field.size) >= _LEAST_AUTO_SIZE and fits:
            fitting.append((int(stride), candidate))
    if not fitting:
        _checks.fail(
            "layers",
            f"an encoder with layers of stride {_AUTO_STRIDES} whose receptive field has at least "
            f"{_LEAST_AUTO_SIZE} pixels and at most half of the image",
            "none for 'auto' to choose; name them",
        )
    return _last_outermost(model, fitting)


def _auto_stages(model: nn.Module, example: Tensor) -> list[str]:
    """The layer of each resolution on the way down, and of each on the way up."""
    stages: list[str] = []
    for half in _encoder_and_decoder(model, example):
        chosen = _last_outermost(model, [(_scale(each.run, example), each) for each in half])
        stages += [run.name for run in chosen]
    if not stages:
        _checks.fail("layers", "a model with feature maps inside", "none for 'auto' to choose; name them")
    return stages


class _Candidate(NamedTuple):
    """A layer for `"auto"` to choose, whose features are whole or `half_made`."""

    run: LayerRun
    half_made: bool


def _last_outermost(model: nn.Module, candidates: Sequence[tuple[int, _Candidate]]) -> list[LayerRun]:
    """For each stride the layer inside fewest others, and of several the one that runs last.

    Half-made features are taken only where there are no others.
    """
    chosen: dict[int, tuple[bool, int, LayerRun]] = {}
    for stride, (run, half_made) in candidates:
        rank = (half_made, _depth(model, run.name))
        if stride not in chosen or rank <= chosen[stride][:2]:
            chosen[stride] = (*rank, run)
    return [run for _, _, run in chosen.values()]


def _depth(model: nn.Module, name: str) -> int:
    """How many modules a layer is part of, lists of modules apart."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:k])) for k in range(1, len(parts)))
    return sum(not isinstance(module, (nn.ModuleList, nn.ModuleDict)) for module in around)


def _encoder_and_decoder(model: nn.Module, example: Tensor) -> tuple[list[_Candidate], list[_Candidate]]:
    """The layers that give one feature map a pass, in the order they run, up to the deepest and after it.

    Of layers that pass on the same tensor the one that made it counts, or the outermost around that. From the
    deepest layers on, those with as many channels as the model's output count as outputs and are left out.
    Half-made are what convolutions and normalisations give, without the activation behind them, and in the
    decoder what skip connections join, not mixed yet.
    """
    runs = _trace(model, example, None)
    in_gates = _names_in_gates(model)
    makers: dict[tuple[int, int], LayerRun] = {}
    not_activated: set[tuple[int, int]] = set()
    for run in runs.values():
        key = (id(run.output), run.version)
        if run.name and _is_bare(model.get_submodule(run.name)):
            not_activated.add(key)
        maker = makers.get(key)
        if run.name in in_gates:  # the gated layer passes on what its gate made
            continue
        if run.name and run.is_single and (maker is None or maker.name.startswith(f"{run.name}.")):
            makers[key] = run
    maps = [(key, run) for key, run in makers.items() if run.times == 1 and _is_map(run, example)]
    deepest = max((_scale(run, example) for _, run in maps), default=0)
    encoder: list[_Candidate] = []
    decoder: list[_Candidate] = []
    at_the_bottom = False
    for key, run in maps:
        scale = _scale(run, example)
        at_the_bottom |= scale == deepest
        if at_the_bottom and run.shape[1:2] == runs[""].shape[1:2]:
            continue
        if decoder or (at_the_bottom and scale < deepest):
            decoder.append(_Candidate(run, key in not_activated or run.is_join))
        else:
            encoder.append(_Candidate(run, key in not_activated))
    return encoder, decoder


def _is_bare(module: nn.Module) -> bool:
    """Whether a module is a convolution or normalisation of torch's, and nothing else besides."""
    return isinstance(module, _BARE) and type(module).__module__.startswith("torch.nn.")


def _is_map(run: LayerRun, example: Tensor) -> bool:
    """Whether a layer gives a map `(B, C, *spatial)`, neither pooled to a point nor of the image's pixels."""
    if len(run.shape) != example.ndim or run.shape[0] != example.shape[0]:
        return False
    try:
        field = run.receptive_field
        return not (field.is_infinite and 1 in run.shape[2:]) and max(field.size) > 1
    except ValueError:
        return False


def _scale(run: LayerRun, example: Tensor) -> int:
    """How much smaller a map is than the image along its most reduced axis, in halvings."""
    ratios = (extent / small for extent, small in zip(example.shape[2:], run.shape[2:], strict=True))
    return round(math.log2(max(ratios)))


def _warn_of_large_boxes(loss: PDCRLoss, extents: tuple[int, ...]) -> None:
    """Warn of boxes that cover more than half of the image along every axis."""
    large = [
        (layer, tuple(box.size))
        for boxes in loss.boxes_by_size
        for layer, box in boxes.items()
        if all(size > extent / 2 for size, extent in zip(box.size, extents, strict=True))
    ]
    if large:
        warnings.warn(
            f"contrastseg_fast: boxes of more than half of the {extents} pixels of an image hold nearly the "
            f"same mixtures, so that PDCR hardly repels: {large}; give these layers a patch_size",
            stacklevel=3,
        )


def _has_pdcr(model: nn.Module) -> bool:
    """Whether a regularizer collects from the model or a part of it."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), AttachedPDCR) for hook in hooks)


def _first_tensor(name: str, output: object) -> Tensor:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    _checks.fail_type("layers", f"layers that return tensors, {name!r} included", type(output).__name__)


def _is_rehearsal(values: object) -> bool:
    """Whether a model runs without data, or again in the backward pass, as checkpoints do."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._current_graph_task_id() != -1:
        return True
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(values))


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
