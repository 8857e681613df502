"""UAFS gates put behind the layers of a model, and taken out again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from contrastseg_fast import _checks
from contrastseg_fast.attach.gates import GATES, GateHook, Gates
from contrastseg_fast.attach.layers import select_layers, select_stages
from contrastseg_fast.attach.model_checks import check_example, check_model
from contrastseg_fast.attach.pdcr import AttachedPDCR
from contrastseg_fast.projection import submodule_name
from contrastseg_fast.uafs import UAFS


def insert_uafs(
    model: nn.Module,
    layers: str | Sequence[str],
    num_classes: int,
    *,
    example_input: Tensor,
    **options: Any,
) -> nn.Module:
    """Put an uncertainty-aware gate behind layers of a model (Eqs. 8 to 10), in place.

    The gates become the submodule `model.uafs`. They are trained, moved and saved with the model. All other
    keys of the state dict stay the same. Weights saved without gates load with `strict=False`.

    Insert gates before you make the optimizer, and before you attach PDCR: PDCR then uses the gated features
    and the receptive fields that include the gates. `contrastseg_fast.remove_uafs` takes the gates out again.

    Args:
        model: a module. Wrap it (in DistributedDataParallel) and compile it afterwards.
        layers: names of layers as in `model.named_modules()`, or patterns such as `"encoder.*.conv2"`. The
            output of a layer, or the first tensor in it, is a feature map `(B, C, *spatial)`; only this
            tensor is gated. If a pattern matches a layer and also layers inside it, only the outer one is
            used. `"auto"` puts a gate behind every stage of the encoder and the decoder. A stage is the
            outermost layer that gives the last feature map of a resolution, on the way down and again on the
            way up. Layers with as many channels as the model's output are not used. `list(model.uafs)` shows
            the layers, with slashes in place of dots.
        num_classes: number of classes that the gates predict, at least 2.
        example_input: an input `(B, C, *spatial)` of the model. Only its shape and dtype are used.
        options: other arguments of `UAFS`: `hidden_channels`, `norm`, `backend`.

    Returns:
        the model.

    Raises:
        TypeError: `model` is not a module, is compiled, or contains DataParallel; `layers` is not a name or
            an iterable of names; `example_input` is not a tensor; or an option has the wrong type.
        ValueError: `layers` is empty, or names a layer that the model does not have, that does not run, that
            has a gate already, whose output is not a feature map, or the model itself; `layers` is `"auto"`
            and the model has gates already or has no stages; `model` has another attribute `uafs`;
            `example_input` is not 4- or 5-dimensional; or `num_classes` or an option has a wrong value.
        RuntimeError: the model does not run on an input without data.

    Warns:
        UserWarning: PDCR is attached already and keeps the receptive fields of the model without these gates.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> model = insert_uafs(model, ["1"], num_classes=2, example_input=torch.zeros(1, 1, 16, 16))
        >>> model.uafs["1"].in_channels
        8
    """
    check_model(model)
    example = check_example(example_input)
    gates = getattr(model, GATES, None)
    if gates is not None and not isinstance(gates, Gates):
        _checks.fail(
            "model", f"no attribute {GATES!r}, the name of the gates' submodule", type(gates).__name__
        )
    if layers == "auto" and gates is not None:
        _checks.fail("layers", "names, as the model has gates already (remove_uafs takes them out)", "'auto'")
    selection = select_stages(model, example) if layers == "auto" else select_layers(model, layers, example)
    made: dict[str, UAFS] = {}
    for name, run in selection.runs.items():  # in the order in which the layers run
        if name not in selection.names:
            continue
        if name == "" or (gates is not None and submodule_name(name) in gates):
            _checks.fail("layers", "layers inside the model that have no gate yet", repr(name))
        _ = run.receptive_field  # raises if the output is not a feature map
        gate = UAFS(len(run.shape) - 2, run.shape[1], num_classes, **options)
        made[name] = gate.to(run.device, run.dtype).train(model.training)
    if _has_pdcr(model):
        warnings.warn(
            "contrastseg_fast: PDCR was attached before these gates and does not know that they widen "
            "receptive fields; insert gates first, then attach PDCR",
            stacklevel=2,
        )
    if gates is None:
        gates = Gates()
        model.add_module(GATES, gates)
    for name, gate in made.items():
        gates[submodule_name(name)] = gate
        gates.handles.append(model.get_submodule(name).register_forward_hook(GateHook(gate)))
    return model


def remove_uafs(model: nn.Module) -> nn.Module:
    """Take all gates that `insert_uafs` put into a model out again, in place.

    If PDCR was attached after the gates were inserted, attach it anew: it keeps the receptive fields that
    include the gates.

    Args:
        model: the model passed to `insert_uafs`.

    Returns:
        the model, with the layers, hooks and state dict that it had before.

    Raises:
        ValueError: the model has no gates.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> model = insert_uafs(model, "auto", num_classes=2, example_input=torch.zeros(1, 1, 16, 16))
        >>> list(remove_uafs(model).state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    gates = getattr(model, GATES, None)
    if not isinstance(gates, Gates):
        _checks.fail("model", "one that insert_uafs put gates into", f"{type(model).__name__} without")
    for handle in gates.handles:
        handle.remove()
    delattr(model, GATES)
    return model


def _has_pdcr(model: nn.Module) -> bool:
    """Whether PDCR is attached to a model or to a module inside it."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), AttachedPDCR) for hook in hooks)
