"""UAFS gates put behind the layers of a model, and taken out again."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from contrastseg_fast import _checks
from contrastseg_fast.attach.extended import (
    GATE,
    Gate,
    check_extensible,
    gate_of,
    is_observed,
    put_gate,
    take_gate,
)
from contrastseg_fast.attach.layers import select_layers, select_stages, trace
from contrastseg_fast.attach.model_checks import check_example, check_model

VIEW = "uafs"  # the attribute of a model that shows its gates


class Gates(Mapping[str, Gate]):
    """The gates in a model, by the names of their layers. After `insert_uafs` it is `model.uafs`.

    This is a view: each gate is the child `uafs` of its layer. `del model.uafs[layer]` takes a gate out.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> model = insert_uafs(model, ["0", "1"], num_classes=2, example_input=torch.zeros(1, 1, 16, 16))
        >>> del model.uafs["0"]
        >>> model.uafs
        Gates(['1'])
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # which holds the view

    def __getitem__(self, layer: str) -> Gate:
        try:
            gate = gate_of(self._layer(layer))  # by any name, if the layer has several
        except AttributeError:
            gate = None
        if gate is None:
            raise KeyError(layer)
        return gate

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers())

    def __len__(self) -> int:
        return len(self._layers())

    def __delitem__(self, layer: str) -> None:
        _ = self[layer]  # raises if there is none
        take_gate(self._layer(layer))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all gates."""
        for gate in self.values():
            yield from gate.parameters()

    def __repr__(self) -> str:
        return f"Gates({list(self)})"

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])

    def _layers(self) -> list[str]:
        model = self._model()
        return (
            [name for name, module in model.named_modules() if gate_of(module)] if model is not None else []
        )

    def _layer(self, name: str) -> nn.Module:
        model = self._model()
        if model is None:
            raise KeyError(name)
        return model.get_submodule(name)


def insert_uafs(
    model: nn.Module,
    layers: str | Sequence[str],
    num_classes: int,
    *,
    example_input: Tensor,
    **options: Any,
) -> nn.Module:
    """Put an uncertainty-aware gate behind layers of a model (Eqs. 8 to 10), in place.

    A gate becomes the child `uafs` of its layer. Gates are trained, moved, copied and saved with their
    layers, also where a part of the model is used or saved alone. The new keys of the state dict are
    `<layer>.uafs.*`, and all other keys stay the same. Weights saved without gates load with `strict=False`.
    `model.uafs` shows the gates of the model by the names of their layers. In an `nn.Sequential` the gate is
    the last child: `len` and indexing count it, and a layer that is appended later runs after it. Forward
    hooks of a layer see the gated output, and what they change is not gated.

    Insert gates before you make the optimizer, and before you attach PDCR: PDCR then uses the gated features
    and the receptive fields that include the gates. `contrastseg_fast.remove_uafs` takes the gates out again.

    A layer with a gate may be replaced later. If the new layer gets the children of the old one, as in
    `nn.SyncBatchNorm.convert_sync_batchnorm`, or contains the old one, the gate stays at work. Otherwise
    replacing the layer raises a RuntimeError.

    Args:
        model: a module. Wrap it (in DistributedDataParallel) and compile it afterwards. A model that was
            compiled in place, with `model.compile()`, is accepted.
        layers: names of layers as in `model.named_modules()`, or patterns such as `"encoder.*.conv2"`. The
            output of a layer, or the first tensor in it, is a feature map `(B, C, *spatial)`; only this
            tensor is gated. If a pattern matches a layer and also layers inside it, only the outer one is
            used. `"auto"` puts a gate behind every stage of the encoder and the decoder. A stage is the
            outermost layer that gives the last feature map of a resolution, on the way down and again on the
            way up. Layers with as many channels as the model's output are not used. `list(model.uafs)` shows
            the layers.
        num_classes: number of classes that the gates predict, at least 2.
        example_input: an input `(B, C, *spatial)` of the model. Only its shape and dtype are used.
        options: other arguments of `UAFS`: `hidden_channels`, `norm`, `backend`.

    Returns:
        the model.

    Raises:
        TypeError: `model` is not a module, is compiled, or contains DataParallel, DistributedDataParallel or
            sharded modules; `layers` is not a name or an iterable of names, or names a scripted or traced
            module; `example_input` is not a tensor; or an option has the wrong type.
        ValueError: `layers` is empty; or a layer is unknown, does not run, is the model itself, returns no
            feature map, has a gate or another attribute `uafs`, is parametrized, has a replaced `forward`, or
            runs all of its children itself. Also if `layers` is `"auto"` and the model has gates or no
            stages; if `model` has another attribute `uafs`; if `example_input` is not 4- or 5-dimensional; or
            if `num_classes` or an option has a wrong value.
        RuntimeError: the model does not run on an input without data, with the gates or without them.

    Warns:
        UserWarning: PDCR is attached already and keeps the receptive fields of the model without these gates.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> model = insert_uafs(model, ["1"], num_classes=2, example_input=torch.zeros(1, 1, 16, 16))
        >>> model.uafs["1"].in_channels
        8
        >>> [key for key in model.state_dict() if key.startswith("1.")][:2]
        ['1.uafs.head.0.weight', '1.uafs.head.0.bias']
    """
    check_model(model)
    example = check_example(example_input)
    view = getattr(model, VIEW, None)
    if view is not None and not isinstance(view, Gates):
        _checks.fail("model", f"no attribute {VIEW!r}, which shows its gates", type(view).__name__)
    has_gates = len(Gates(model)) > 0
    if layers == "auto" and has_gates:
        _checks.fail("layers", "names, as the model has gates already (remove_uafs takes them out)", "'auto'")
    selection = select_stages(model, example) if layers == "auto" else select_layers(model, layers, example)
    made: dict[str, Gate] = {}
    for name in selection.names:
        run = selection.runs[name]
        layer = model.get_submodule(name)
        if name == "":
            _checks.fail("layers", "layers inside the model", "'', the model itself")
        if gate_of(layer) is not None:
            _checks.fail("layers", "layers without a gate", f"{name!r}, which has one; use remove_uafs first")
        run.check_map()
        check_extensible(layer, f"layers ({name!r})", by_gate=True)
        gate = Gate(len(run.shape) - 2, run.shape[1], num_classes, **options)
        made[name] = gate.to(run.device, run.dtype).train(model.training)
    if any(map(is_observed, model.modules())):
        _checks.warn(
            "PDCR was attached before these gates and does not know that they widen receptive fields; insert "
            "gates first, then attach PDCR"
        )
    for name, gate in made.items():
        put_gate(model.get_submodule(name), gate)
    _keep_only_gates_that_act_once(model, example, list(made), strict=layers != "auto")
    model.__dict__[VIEW] = Gates(model)
    return model


def _keep_only_gates_that_act_once(
    model: nn.Module, example: Tensor, layers: Sequence[str], strict: bool
) -> None:
    """Take out gates that do not run as often as their layers; if `strict`, take out all of them and raise.

    Some layers run all of their children, so that they would run a gate as one of these.
    """
    gates = {name: f"{name}.{GATE}" for name in layers}
    try:
        runs = trace(model, example, [*gates, *gates.values()])
    except RuntimeError:  # a layer runs with different numbers of channels, for example
        for name in gates:
            take_gate(model.get_submodule(name))
        raise
    wrong = [name for name, gate in gates.items() if gate not in runs or runs[gate].times != runs[name].times]
    for name in gates if strict and wrong else wrong:
        take_gate(model.get_submodule(name))
    if strict and wrong:
        got = f"{', '.join(map(repr, wrong))}; name other layers, or wrap them"
        _checks.fail("layers", "layers whose forward pass does not run all of their children", got)


def remove_uafs(model: nn.Module, layers: str | Sequence[str] | None = None) -> nn.Module:
    """Take gates that `insert_uafs` put into a model out again, in place.

    If PDCR was attached after the gates were inserted, attach it anew: it keeps the receptive fields that
    include the gates.

    Args:
        model: the model passed to `insert_uafs`, or a part of it.
        layers: the names of layers with a gate, as `list(model.uafs)` shows them, or patterns of these names.
            None means all.

    Returns:
        the model. Without gates it has the classes, attributes and state dict that it had before.

    Raises:
        TypeError: `layers` is not a name or an iterable of names.
        ValueError: the model has no gates, or a name or pattern in `layers` matches none of them.

    Warns:
        UserWarning: PDCR is attached and keeps the receptive fields that include these gates.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> model = insert_uafs(model, "auto", num_classes=2, example_input=torch.zeros(1, 1, 16, 16))
        >>> list(remove_uafs(model).state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    gates = Gates(model)
    if not gates:
        _checks.fail("model", "one that insert_uafs put gates into", f"{type(model).__name__} without")
    chosen = list(gates) if layers is None else _matches(layers, gates)
    if any(map(is_observed, model.modules())):
        _checks.warn(
            "PDCR was attached with these gates and keeps the receptive fields that include them; attach it "
            "again"
        )
    for name in chosen:
        del gates[name]
    if not gates and isinstance(model.__dict__.get(VIEW), Gates):
        del model.__dict__[VIEW]
    return model


def _matches(layers: str | Sequence[str], gates: Gates) -> list[str]:
    """The layers with a gate that names and patterns stand for."""
    if not isinstance(layers, (str, Sequence)) or not all(isinstance(layer, str) for layer in layers):
        _checks.fail_type("layers", "names of layers", type(layers).__name__)
    found: dict[str, None] = {}
    for layer in [layers] if isinstance(layers, str) else layers:
        matches = [layer] if layer in gates else fnmatch.filter(gates, layer)
        if not matches:
            _checks.fail("layers", f"some of the layers with a gate, {list(gates)}", repr(layer))
        found.update(dict.fromkeys(matches))
    return list(found)
