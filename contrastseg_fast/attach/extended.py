"""Modules whose class is extended, so that calling them also runs what is attached to them.

An extended module has a subclass of its own class, with the same name. The forward pass of the subclass calls
observers of the inputs, then the module's own forward pass, then the gate, then observers of the output.
Hooks would do the same, but torch.compile does not guard hooks: a model that is compiled after another one of
its class could run without them. It guards classes. Gates are children of their layers, so that they are
copied, saved, moved, sharded and used alone together with their layers.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten, tree_unflatten

from contrastseg_fast import _checks
from contrastseg_fast.attach.model_checks import ORDER, refuse_replica
from contrastseg_fast.uafs import UAFS

GATE = "uafs"  # the name of a gate among the children of its layer
BEFORE, AFTER = "_observers_of_inputs", "_observers_of_output"  # attributes of extended modules
GATED = "_has_wrapped_gate"  # where the child is a wrapper of the gate

Observer = Callable[..., None]


class Gate(UAFS):
    """A `UAFS` behind a layer, whose child it is. It gates the first tensor of the layer's output."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _watch_registrations()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _watch_registrations()

    def forward(self, x: Any) -> Any:
        """The gated output of the layer, a feature map `(B, C, *spatial)` or a container of tensors."""
        refuse_replica(self)
        if isinstance(x, Tensor):
            return super().forward(x)
        leaves, structure = tree_flatten(x)
        position = next((k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
        if position is None:
            _checks.fail_type("x", "a layer's output with a tensor in it", type(x).__name__)
        leaves[position] = super().forward(leaves[position])
        return tree_unflatten(leaves, structure)


def gate_of(module: nn.Module) -> Gate | None:
    """The gate behind a module, if there is one."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    child = module._modules.get(GATE)
    within = child.modules() if child is not None else ()  # the child may be a wrapper of the gate
    return next((each for each in within if isinstance(each, Gate)), None)


def put_gate(module: nn.Module, gate: Gate) -> None:
    """Put a gate behind a module."""
    module.add_module(GATE, gate)  # which extends the module, see `_on_registration`


def take_gate(module: nn.Module) -> None:
    """Take the gate behind a module out again."""
    delattr(module, GATE)
    module.__dict__.pop(GATED, None)
    _restore_class(module)


def observe_inputs(module: nn.Module, observer: Observer) -> None:
    """Have `observer(module, args, kwargs)` called at the beginning of each forward pass of a module."""
    _observe(module, BEFORE, observer)


def observe_output(module: nn.Module, observer: Observer) -> None:
    """Have `observer(module, output)` called at the end of each forward pass of a module, after its gate."""
    _observe(module, AFTER, observer)


def stop_observing(module: nn.Module, observer: Observer) -> None:
    """Undo `observe_inputs` or `observe_output`."""
    for slot in (BEFORE, AFTER):
        kept = tuple(other for other in module.__dict__.get(slot, ()) if other != observer)
        module.__dict__[slot] = kept
        if not kept:
            del module.__dict__[slot]
    _restore_class(module)


def check_extensible(module: nn.Module, name: str, *, by_gate: bool = False) -> None:
    """Check that the class of a module can be extended, by a gate or by observers.

    Raises:
        TypeError: the module is scripted, or an `fx.GraphModule`.
        ValueError: the module's `forward` was replaced, or the module is compiled or parametrized; or, for a
            gate, the module has another attribute `uafs`.
    """
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        kind = "a ScriptModule" if isinstance(module, torch.jit.ScriptModule) else "an fx.GraphModule"
        _checks.fail_type(name, "modules whose forward pass is Python code, not generated", kind)
    if "_orig_mod" in module._modules:
        _checks.fail(name, "modules that are not compiled", "a compiled one; name the '_orig_mod' inside it")
    if "forward" in module.__dict__:
        got = f"a {type(module).__name__} whose forward was replaced, by accelerate for example; {ORDER}"
        _checks.fail(name, "modules whose forward pass is that of their class", got)
    if is_parametrized(module) and not is_extended(module):
        got = f"a {type(module).__name__}; parametrize it (spectral_norm, weight_norm) afterwards"
        _checks.fail(name, "modules that are not parametrized yet", got)
    if by_gate and (GATE in {**module.__dict__, **module._modules} or hasattr(type(module), GATE)):
        got = f"a {type(module).__name__} with a {type(getattr(module, GATE)).__name__}"
        _checks.fail(name, f"layers without an attribute {GATE!r}, the name of their gate", got)


def runs_children(cls: type[nn.Module]) -> bool:
    """Whether modules of a class run all of their children in order, a gate as the last."""
    return cls.forward is nn.Sequential.forward and cls.__iter__ is nn.Sequential.__iter__  # type: ignore[attr-defined]


def is_observed(module: nn.Module) -> bool:
    """Whether anything observes the inputs or outputs of a module."""
    return BEFORE in module.__dict__ or AFTER in module.__dict__


def is_extended(module: nn.Module) -> bool:
    """Whether the class of a module is extended."""
    return hasattr(type(module), "_extends")


def _observe(module: nn.Module, slot: str, observer: Observer) -> None:
    _extend(module)
    module.__dict__[slot] = (*module.__dict__.get(slot, ()), observer)


def _extend(module: nn.Module) -> None:
    if not is_extended(module):
        check_extensible(module, type(module).__name__)
        module.__class__ = _extended_class(type(module))  # type: ignore[arg-type]  # a class is hashable


def _restore_class(module: nn.Module) -> None:
    """Give a module its own class again, if nothing is attached to it."""
    cls = type(module)
    in_use = is_observed(module) or gate_of(module) is not None
    if "_extends" in vars(cls) and not in_use:  # not where another library has extended the class again
        module.__class__ = vars(cls)["_extends"]


@functools.cache
def _extended_class(cls: type[nn.Module]) -> type[nn.Module]:
    runs_gate = runs_children(cls)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for observer in self.__dict__.get(BEFORE, ()):
            observer(self, args, kwargs)
        output = cls.forward(self, *args, **kwargs)
        if not runs_gate:
            gate = self._modules.get(GATE)
            if isinstance(gate, Gate) or (gate is not None and GATED in self.__dict__):
                output = gate(output)
        for observer in self.__dict__.get(AFTER, ()):
            observer(self, output)
        return output

    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = cls.__reduce_ex__(self, protocol)
        function, arguments, *rest = reduced
        plain, *arguments = (cls if each is extended else each for each in (function, *arguments))
        return _make_extended, (plain, arguments), *rest

    # torch.compile counts its recompilations by code object, so each class needs one of its own.
    code = forward.__code__.replace()
    own_forward = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    own_forward.__wrapped__ = cls.forward  # type: ignore[attr-defined]  # for its signature
    own_forward.__doc__ = cls.forward.__doc__
    namespace: dict[str, Any] = {
        "forward": own_forward,
        "_extends": cls,
        "__reduce_ex__": reduce_ex,
        "__prepare_scriptable__": _refuse_scripting,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    if not runs_gate:
        namespace |= _without_gate(cls)
    extended: type[nn.Module] = type(cls.__name__, (_Unregistered, cls), namespace)
    return extended


class _Unregistered:
    """Keeps a class from being told of its subclass, which it might register."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def _make_extended(function: Callable[..., nn.Module], arguments: Sequence[Any]) -> nn.Module:
    """Make a copy or an unpickled module, which gets its attributes afterwards."""
    module = function(*arguments)
    if not is_extended(module):
        module.__class__ = _extended_class(type(module))  # type: ignore[arg-type]
    return module


def _refuse_scripting(module: nn.Module) -> NoReturn:
    raise RuntimeError(
        f"torch.jit.script does not support {type(module).__name__} with a UAFS gate or PDCR attached; take "
        "these out (remove_uafs, pdcr.remove), or use torch.export or torch.jit.trace"
    )


def _without_gate(cls: type[nn.Module]) -> dict[str, Any]:
    """The methods of a container that leave out the gate, for containers with a forward pass of their own."""
    for container, methods in (
        (nn.Sequential, {"__iter__": _iterate, "__len__": _count, "__getitem__": _at(nn.Sequential)}),
        (nn.ModuleList, {"__iter__": _iterate, "__len__": _count, "__getitem__": _at(nn.ModuleList)}),
        (
            nn.ModuleDict,
            {"__iter__": _keys, "__len__": _count, "keys": _keys, "values": _values, "items": _items},
        ),
    ):
        if issubclass(cls, container):  # methods of its own stay
            return {n: m for n, m in methods.items() if getattr(cls, n) is getattr(container, n)}
    return {}


def _children(container: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in container._modules.items() if name != GATE}  # type: ignore[misc]


def _iterate(self: nn.Module) -> Iterator[nn.Module]:
    return iter(_children(self).values())


def _count(self: nn.Module) -> int:
    return len(_children(self))


def _keys(self: nn.Module) -> Iterator[str]:
    return iter(_children(self).keys())


def _values(self: nn.Module) -> Any:
    return _children(self).values()


def _items(self: nn.Module) -> Any:
    return _children(self).items()


def _at(cls: Any) -> Callable[..., Any]:
    def getitem(self: nn.Module, index: Any) -> Any:
        return (
            list(_children(self).values())[index] if isinstance(index, int) else cls.__getitem__(self, index)
        )

    return getitem


@functools.cache
def _watch_registrations() -> None:
    register_module_module_registration_hook(_on_registration)


def _on_registration(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Called for every module that becomes a child: gates must not be lost, nor idle.

    Converters such as `nn.SyncBatchNorm.convert_sync_batchnorm` make a new layer and give it the children of
    the old one, so that the gate acts behind the new layer. Where they drop the gate, this raises.
    """
    old = parent.__dict__.get("_modules", {}).get(name)
    if old is None or old is new or (new is not None and new in old.modules()):  # what a wrapper held is back
        lost = set()
    else:
        lost = _gates_in(old) - _gates_in(new)
    if lost:
        kind = "nothing" if new is None else f"a {type(new).__name__}"
        raise RuntimeError(
            f"{type(parent).__name__}.{name}: expected a layer that keeps the {len(lost)} UAFS gate(s) of "
            f"the {type(old).__name__} that it replaces, got {kind}; call remove_uafs before and insert_uafs "
            "afterwards"
        )
    if name == GATE:
        parent.__dict__.pop(GATED, None)
        if _gates_in(new) and not runs_children(type(parent)):
            _extend(parent)
            parent.__dict__[GATED] = True


def _gates_in(module: nn.Module | None) -> set[Gate]:
    return set() if module is None else {each for each in module.modules() if isinstance(each, Gate)}
