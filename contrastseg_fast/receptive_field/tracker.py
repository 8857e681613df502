"""Follows receptive fields through a running model, without computing any values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from contrastseg_fast.receptive_field import rules
from contrastseg_fast.receptive_field.positions import Field

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
Geometry = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass
class _View:
    field: Field
    parent: Geometry | None = None  # the tensor it is a view of; None for the first tensor of a storage
    forward: rules.Move | None = None
    backward: rules.Move | None = None


@dataclass
class _Storage:
    """The tensors that share one storage; a view comes after the tensor it was made from."""

    keep: torch.UntypedStorage  # keeps the address from being used again
    views: dict[Geometry, _View] = field(default_factory=dict)


class FieldTracker(TorchDispatchMode):
    """Records what every tensor that is made under this mode sees of an image. Works on fake tensors.

    Fields are kept by storage, because writing to a view changes what all tensors of its storage see.
    """

    def __init__(self, fake_mode: FakeTensorMode, axes: int) -> None:
        super().__init__()
        self._fake_mode = fake_mode
        self._axes = axes
        self._storages: dict[int, _Storage] = {}
        self._joins: set[tuple[int, int, Geometry]] = set()  # storages, versions, and what of them

    def see_image(self, image: Tensor) -> None:
        """Take a fake tensor `(B, C, *spatial)` as the image."""
        self._register(image, _View(Field.image(image.shape)))

    def field_of(self, tensor: Tensor) -> Field:
        """What a tensor sees of the image; a tensor not made under this mode sees nothing."""
        nothing = Field.constant(tensor.shape, self._axes)
        if tensor.layout != torch.strided:
            return nothing.lose(range(self._axes)).with_reason(str(tensor.layout))
        storage = self._storages.get(_address(tensor))
        if storage is None or tensor.numel() == 0:
            return nothing
        view = storage.views.get(_geometry(tensor))
        return view.field if view else next(iter(storage.views.values())).field.unknown(tensor.shape)

    def is_join(self, tensor: Tensor, version: int) -> bool:
        """Whether a map is two others concatenated along the channels, as at a skip connection."""
        return (
            tensor.layout == torch.strided and (_address(tensor), version, _geometry(tensor)) in self._joins
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs or {}))
        if func.namespace == "prim":  # for example asks for the device of a tensor
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):
            with self:  # composed of other operators, but not decomposed in inference mode
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace != "aten":
            name = f"{func.namespace}.{name}"
        elementwise = rules.is_elementwise(func)
        known = {id(tensor): self.field_of(tensor) for tensor in _tensors((args, kwargs))}
        bound, written = _bind(func, args, kwargs)
        source = bound.get("self")
        parent = _geometry(source) if isinstance(source, Tensor) else None

        result = func(*args, **kwargs)
        outputs = _tensors(result)

        def get(tensor: Tensor) -> Field:
            return known[id(tensor)] if id(tensor) in known else self.field_of(tensor)

        if torch.Tag.inplace_view in func.tags:
            written = []
        for tensor in written:
            made = self._combined(known.values(), tensor.shape, elementwise)
            self._write(tensor, made, str(func))
        fresh = [tensor for tensor in outputs if not any(tensor is other for other in written)]
        if name in rules.MOVES and isinstance(source, Tensor):
            moves = rules.MOVES[name](source, outputs, **bound)
            backs = rules.write_back(name, source, outputs, bound)
            for tensor, move, back in zip(fresh, moves, backs, strict=True):
                made = move(get(source)).with_reason(str(func))
                self._register(tensor, _View(made, parent, move, back), _address(source))
            return result
        for tensor in fresh:
            if rules.makes_constant(name) or all(seen.is_constant for seen in known.values()):
                made = Field.constant(tensor.shape, self._axes)
            elif name in rules.RULES:
                made = rules.RULES[name](name, get, tensor, **bound)
            else:
                made = self._combined(known.values(), tensor.shape, elementwise)
            if made.shape != tensor.shape:
                made = made.unknown(tensor.shape)
            self._register(tensor, _View(made.with_reason(str(func))))
            if name == "cat" and bound["dim"] == 1 and len(bound["tensors"]) == 2:
                self._joins.add((_address(tensor), 0, _geometry(tensor)))  # version 0: nothing written since
        return result

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake_mode.from_tensor(tensor)

    def _combined(self, fields: Any, shape: Sequence[int], elementwise: bool) -> Field:
        if elementwise:
            return rules.elementwise(fields, shape, self._axes)
        return rules.elementwise([field.unknown(shape) for field in fields], shape, self._axes)

    def _register(self, tensor: Tensor, view: _View, address_of_parent: int | None = None) -> None:
        if tensor.layout != torch.strided:
            return
        address, geometry = _address(tensor), _geometry(tensor)
        storage = self._storages.setdefault(address, _Storage(tensor.untyped_storage()))
        if geometry in storage.views:
            return
        if storage.views and address != address_of_parent:
            view = _View(view.field.unknown(tensor.shape))
        elif not storage.views:
            view = _View(view.field)
        storage.views[geometry] = view

    def _write(self, tensor: Tensor, made: Field, reason: str) -> None:
        if tensor.layout != torch.strided:
            return
        self._register(tensor, _View(self.field_of(tensor)))
        views = self._storages[_address(tensor)].views
        view = views[_geometry(tensor)]
        if view.field.union(made) == view.field:
            return
        while view.parent is not None:
            parent = views[view.parent]
            made = view.backward(made) if view.backward else made.unknown(parent.field.shape)
            view = parent
        view.field = view.field.union(made).with_reason(reason)
        for view in views.values():
            if view.parent is not None and view.forward is not None:
                view.field = view.forward(views[view.parent].field).with_reason(reason)


class CircularPaddingAsZeros(TorchFunctionMode):
    """Pads with zeros where a model pads circularly; padding lies outside the image either way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.pad and "circular" in (*args[2:3], kwargs.get("mode")):
            args, kwargs = args[:2], {**kwargs, "mode": "constant"}
        return func(*args, **kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bind(func: Any, args: Any, kwargs: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """An operator's arguments by name, and the tensors among them that it writes to."""
    schema = func._schema.arguments
    bound = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    bound.update(zip((argument.name for argument in schema), args, strict=False))
    bound.update(kwargs)
    names = [argument.name for argument in schema if argument.alias_info and argument.alias_info.is_write]
    return bound, _tensors([bound.get(name) for name in names])


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _geometry(tensor: Tensor) -> Geometry:
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
