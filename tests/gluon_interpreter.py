"""Runs kernels in Gluon on CPU tensors, program by program, with what is asynchronous as late as can be.

Gluon has no interpreter of its own. This one knows the functions that `kernels/pdcr/hopper.py` uses. Layouts
are ignored. Copies to shared memory and products take effect at the wait that covers them, and not before:

- a copied buffer is NaN until the wait for its group; products may read it after a fence and a barrier;
- a product reads its operands at its wait, so none may be written until then, nor before a barrier, behind
  which the other warps have waited too;
- a result that was not waited for is NaN.

What a card would do at another time than the kernel relies on raises `Race`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.language import constexpr

_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Race(RuntimeError):
    """The result would depend on when something asynchronous happens."""


class _Pointed(NamedTuple):
    element_ty: torch.dtype


class Pointer:
    """Addresses of elements of a tensor."""

    def __init__(self, elements: Tensor, offset: Any = 0) -> None:
        self.elements, self.offset = elements, offset
        self.dtype = _Pointed(elements.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.elements, self.offset + offset)

    def indices(self) -> Tensor:
        indices = torch.as_tensor(self.offset, dtype=torch.int64)
        if indices.min() < 0 or indices.max() >= len(self.elements):
            raise IndexError(f"element {indices.min()} to {indices.max()} of {len(self.elements)}")
        return indices


class Shared:
    """A buffer in shared memory, or a view of it."""

    def __init__(self, elements: Tensor) -> None:
        self.elements = elements
        self.shape = tuple(elements.shape)

    def index(self, number: Any) -> Shared:
        return Shared(self.elements[int(number)])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.elements.permute(*order))

    def store(self, value: Tensor) -> None:
        self.elements.copy_(value)

    def load(self, _layout: object) -> Tensor:
        return self.elements.clone()

    def place(self) -> tuple[int, int]:
        """Its first and last address."""
        first = self.elements.data_ptr()
        return first, first + self.elements.numel() * self.elements.element_size() - 1

    def overlaps(self, other: Shared) -> bool:
        (a, b), (c, d) = self.place(), other.place()
        return a <= d and c <= b


class Product:
    """`a @ b + sum`, computed when it is waited for."""

    def __init__(self, a: Any, b: Shared, total: Tensor) -> None:
        self.a, self.b, self.total = a, b, total
        self.done = False

    def reads(self) -> list[Shared]:
        return [each for each in (self.a, self.b) if isinstance(each, Shared)]

    def finish(self) -> None:
        a = self.a.elements if isinstance(self.a, Shared) else self.a
        self.total = self.total + a.float() @ self.b.elements.float()
        self.done = True


class Copy(NamedTuple):
    """Elements on their way to shared memory."""

    buffer: Shared
    source: Pointer


class Interpreter:
    """The functions of Gluon that a kernel calls, and what is under way in the program that runs."""

    int32, int64, float32 = torch.int32, torch.int64, torch.float32
    constexpr = constexpr
    static_range = range

    def __init__(self) -> None:
        self._plain: dict[Callable[..., Any], Callable[..., Any]] = {}
        for name in ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout",
                     "SwizzledSharedLayout"):  # fmt: skip
            setattr(self, name, lambda *_: None)
        self.NVMMASharedLayout = types.SimpleNamespace(get_default_for=lambda *_: None)
        self._begin(0, 1)

    def _begin(self, program: int, warps: int) -> None:
        self._program, self._warps = program, warps
        self._issued: list[Copy] = []  # of the group that is not committed
        self._groups: list[list[Copy]] = []
        self._arrived: list[Shared] = []  # waited for
        self._fenced: list[Shared] = []  # and fenced, but for other warps not there yet
        self._products: list[Product] = []
        self._read: list[Shared] = []  # by products that other warps may not have waited for

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        tensors: Sequence[Tensor],
        scalars: Sequence[float],
        constants: dict[str, Any],
    ) -> None:
        """As `contrastseg_fast.kernels._launch.launch`, for a kernel in Gluon."""
        arguments = [Pointer(tensor.view(-1)) for tensor in tensors]
        named = {name: value for name, value in constants.items() if name not in _OPTIONS}
        function = self.plain(kernel.fn)
        for program in range(grid[0]):
            self._begin(program, constants["num_warps"])
            function(*arguments, *scalars, **named)
            if self._issued or any(self._groups) or self._products:
                raise Race("a program ends before what it began")

    def plain(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The Python function of a kernel, which calls this interpreter where it called Triton."""
        if function not in self._plain:
            known = function.__globals__
            used = {name: self._replaced(known[name]) for name in function.__code__.co_names if name in known}
            self._plain[function] = types.FunctionType(
                function.__code__, {**used, "__builtins__": __builtins__}, None, function.__defaults__
            )
        return self._plain[function]

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, constexpr):
            return value.value
        if isinstance(value, types.ModuleType) and value.__name__.startswith("triton."):
            return self
        if isinstance(getattr(value, "fn", None), types.FunctionType):
            return self.plain(value.fn)
        if getattr(value, "__module__", "").startswith("triton.experimental.gluon."):
            return getattr(self, value.__name__)
        return value

    # Numbers.

    def program_id(self, _axis: int) -> int:
        return self._program

    def num_warps(self) -> int:
        return self._warps

    def static_assert(self, condition: bool) -> None:
        assert condition

    def arange(self, start: int, stop: int, _layout: object = None) -> Tensor:
        return torch.arange(start, stop, dtype=torch.int32)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, _layout: object) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def load(self, pointer: Pointer, mask: Any = True, other: float = 0) -> Tensor:
        mask = torch.as_tensor(mask)
        values = pointer.elements[Pointer(pointer.elements, pointer.offset * mask).indices()]
        return values if mask.all() else torch.where(mask, values, other)

    def store(self, pointer: Pointer, value: Tensor) -> None:
        pointer.elements[pointer.indices()] = value

    def multiple_of(self, value: Tensor, divisor: int) -> Tensor:
        assert value % divisor == 0
        return value

    def convert_layout(self, value: Tensor, _layout: object) -> Tensor:
        return value

    def where(self, condition: Any, a: Any, b: Any) -> Tensor:
        return torch.where(torch.as_tensor(condition), a, b)

    def minimum(self, a: Any, b: Any) -> Tensor:
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    def maximum(self, a: Any, b: Any) -> Tensor:
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))

    def sum(self, value: Tensor, axis: int) -> Tensor:
        return value.sum(axis, dtype=value.dtype)

    def max(self, value: Tensor, axis: int) -> Tensor:
        return value.amax(axis)

    def min(self, value: Tensor, axis: int) -> Tensor:
        return value.amin(axis)

    abs, exp2, log2 = (staticmethod(each) for each in (torch.abs, torch.exp2, torch.log2))

    # Shared memory.

    def allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], _layout: object) -> Shared:
        return Shared(torch.full(tuple(shape), torch.nan, dtype=dtype))

    def _copy(self, buffer: Shared, source: Pointer) -> None:
        if any(buffer.overlaps(read) for product in self._products for read in product.reads()):
            raise Race("a copy overwrites what a product reads")
        if any(map(buffer.overlaps, self._read)):
            raise Race("a copy overwrites what products of other warps may still read")
        if any(buffer.overlaps(copy.buffer) for group in (*self._groups, self._issued) for copy in group):
            raise Race("two copies to one place are under way")
        buffer.elements.fill_(torch.nan)
        self._issued.append(Copy(buffer, source))

    async_load = async_copy_global_to_shared = _copy

    def commit_group(self) -> None:
        self._groups.append(self._issued)
        self._issued = []

    def wait_group(self, outstanding: int) -> None:
        while len(self._groups) > outstanding:
            for copy in self._groups.pop(0):
                copy.buffer.elements.copy_(copy.source.elements[copy.source.indices()])
                self._arrived.append(copy.buffer)

    def fence_async_shared(self) -> None:
        self._fenced += self._arrived
        self._arrived = []

    def _barrier(self) -> None:
        self._fenced.clear()
        self._read.clear()

    barrier = thread_barrier = _barrier

    # Products.

    def warpgroup_mma(
        self, a: Any, b: Shared, total: Any, *, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        if isinstance(total, Product):
            if not total.done:
                raise Race("a product adds to another that is under way")
            total = total.total
        if not use_acc:
            total = torch.zeros_like(total)
        product = Product(a, b, total)
        under_way = [copy.buffer for group in (*self._groups, self._issued) for copy in group]
        for buffer in (*under_way, *self._arrived, *self._fenced):
            if any(map(buffer.overlaps, product.reads())):
                raise Race("a product reads a copy before its wait, fence and barrier")
        self._products.append(product)
        if not is_async:
            self.warpgroup_mma_wait(0, deps=[product])
        return product

    def warpgroup_mma_init(self, value: Tensor) -> Product:
        ready = Product(None, Shared(value), value)
        ready.done = True
        return ready

    def warpgroup_mma_wait(self, outstanding: int, deps: Sequence[Any]) -> Any:
        while len(self._products) > outstanding:
            product = self._products.pop(0)
            product.finish()
            self._read += product.reads()
        values = [self._value(each) if isinstance(each, Product) else each for each in deps]
        return values[0] if len(values) == 1 else tuple(values)

    def _value(self, product: Product) -> Tensor:
        return product.total if product.done else torch.full_like(product.total, torch.nan)
