"""What a benchmark is made of: an operation, its implementations, and a size they all run at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Inputs = tuple[Tensor, ...]
Result = tuple[Tensor, ...]
Run = Callable[[], Result]

OURS = "ours"


class Unavailable(Exception):
    """An implementation cannot run here; the message says why."""


@dataclass(frozen=True)
class Work:
    """What any implementation must at least do: the roofline of an operation at a size."""

    bytes: float  # read and written once
    flops: float = 0.0  # of matrix products
    exponentials: float = 0.0
    dtype: str = "fp32"  # of the products' factors


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    `prepare(size, inputs)` gives what is timed. A yardstick does other work than the operation, so its
    results are not compared with the oracle's.
    """

    name: str
    prepare: Callable[[Any, Inputs], Run]
    bytes_needed: Callable[[Any], float] = lambda _size: 0  # at its peak, beyond the inputs
    refuse: Callable[[Any, str], str | None] = lambda _size, _device: (
        None
    )  # why a size is out of the question
    devices: tuple[str, ...] = ("cpu", "cuda")
    yardstick: bool = False
    weighed: bool = True  # whether its peak memory is measured
    compiles: bool = False  # in its first call at a size


@dataclass(frozen=True)
class Operation:
    """What is computed, from which inputs, and the float64 result that every implementation must match.

    A size is a frozen dataclass whose `str` names it. Results are compared at the size that `checked` gives,
    which the float64 reference can hold; `tiny` serves tests and first calls.
    """

    name: str
    make_inputs: Callable[[Any, str], Inputs]  # of a size, on a device
    oracle: Callable[[Any, Inputs], Result]
    checked: Callable[[Any], Any]
    tiny: Callable[[Any], Any]
    tolerance: Callable[[Any], float]  # of the normwise error of each result
    implementations: tuple[Implementation, ...]
    memory_unit: Callable[[Any], int] | None = None  # the bytes that extra memory is compared with
    work: Callable[[Any, Inputs], Work] | None = None
    rotates: bool = True  # whether calls may take turns over equal inputs in different memory

    def implementation(self, name: str) -> Implementation:
        return next(each for each in self.implementations if each.name == name)


@dataclass(frozen=True)
class Case:
    """An operation at one size. With `rounds` it runs exactly so often, without a first call to warm up.

    With `graph`, on CUDA, replays of a captured graph are timed, and beside them how long the host takes for
    the call itself and how many launches it is. Without `weighed` no memory is measured.
    """

    operation: Operation
    size: Any
    device: str = "cpu"
    rounds: int | None = None
    without: tuple[str, ...] = ()
    graph: bool = False
    weighed: bool = True

    @property
    def id(self) -> str:
        where = "" if self.device == "cpu" else f"@{self.device}"
        return f"{self.operation.name}/{self.size}{where}{',graph' if self.graph else ''}"

    @property
    def implementations(self) -> list[Implementation]:
        return [
            each
            for each in self.operation.implementations
            if each.name not in self.without and self.device in each.devices
        ]
