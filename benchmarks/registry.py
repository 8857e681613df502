"""Which operations are measured at which sizes, and the targets they are held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks import gate, pdcr, ratios, step
from benchmarks.operation import Case, Operation

OPERATIONS: tuple[Operation, ...] = (pdcr.OPERATION, ratios.OPERATION, gate.OPERATION, step.OPERATION)


def _pdcr(size: pdcr.Size, *without: str, rounds: int | None = None) -> Case:
    return Case(pdcr.OPERATION, size, rounds=rounds, without=(*pdcr.TILE_PRODUCTS, *without))


PDCR_RANDOM = Case(pdcr.OPERATION, pdcr.Size(4096))
PDCR_MASK = _pdcr(pdcr.Size(4096, ratios="mask", classes=5), "KeOps", "released")
PDCR_TWO_CLASS_MASK = _pdcr(pdcr.Size(4096, ratios="mask"), "KeOps", "released")
PDCR_LARGE = _pdcr(pdcr.Size(65536), "chunked", rounds=1)
RATIOS = Case(ratios.OPERATION, ratios.Size())
GATE = Case(gate.OPERATION, gate.Size())
STEPS = tuple(Case(step.OPERATION, step.Size(samples)) for samples in (256, 1024))

DEFAULT: tuple[Case, ...] = (
    PDCR_RANDOM,
    PDCR_MASK,
    PDCR_TWO_CLASS_MASK,
    *(_pdcr(pdcr.Size(count)) for count in (128, 256, 512, 1024, 2048, 8192, 16384)),
    _pdcr(pdcr.Size(16384, ratios="mask", classes=5), "KeOps", "released", "chunked"),
    _pdcr(pdcr.Size(4096, channels=32), "KeOps", "released"),
    _pdcr(pdcr.Size(4096, channels=64), "KeOps", "released"),
    _pdcr(pdcr.Size(4096, dtype="bf16"), "KeOps", "released"),
    _pdcr(pdcr.Size(1024, channels=64, ratios="mask", classes=5, batch=8), "KeOps", "released"),
    RATIOS,
    Case(ratios.OPERATION, ratios.Size(places="random")),
    Case(ratios.OPERATION, ratios.Size(batch=1, extent=0, classes=5, places="random")),
    GATE,
    Case(gate.OPERATION, gate.Size(channels_last=True)),
    Case(gate.OPERATION, gate.Size(dtype="bf16")),
    Case(gate.OPERATION, gate.Size(shape=(1, 64, 48, 96, 96), classes=5)),
    *STEPS,
)
QUICK: tuple[Case, ...] = (
    _pdcr(pdcr.Size(512, channels=64), "KeOps"),
    _pdcr(pdcr.Size(484, channels=64, ratios="mask", classes=5), "KeOps", "torch.compile"),
    Case(ratios.OPERATION, ratios.Size(batch=2, extent=128, count=256)),
    Case(gate.OPERATION, gate.Size(shape=(1, 32, 32, 32))),
    Case(step.OPERATION, step.Size(samples=64, batch=2, extent=64)),
)
LARGE: tuple[Case, ...] = (PDCR_LARGE,)


def find(case_id: str) -> Case:
    """The case of that id."""
    return next(case for case in (*DEFAULT, *QUICK, *LARGE) if case.id == case_id)


@dataclass(frozen=True)
class Target:
    """What ours must reach in one case.

    `"at most"` bounds our time over that of `against`, of several the fastest, and `"at least"` its inverse;
    `"memory"` bounds our extra memory over the operation's `memory_unit`; `"added"` tells how much longer
    than `against` ours takes, without a bound.
    """

    what: str
    case: Case
    against: tuple[str, ...]
    sense: Literal["at most", "at least", "memory", "added"]
    bound: float = float("inf")


_THREE = ("three products",)

TARGETS: tuple[Target, ...] = (
    Target("PDCR, random ratios", PDCR_RANDOM, _THREE, "at most", 0.55),
    Target("PDCR, ratios of a mask at stride 4, 5 classes", PDCR_MASK, _THREE, "at most", 0.35),
    Target("PDCR, ratios of a mask at stride 4, 2 classes", PDCR_TWO_CLASS_MASK, _THREE, "at most", 0.35),
    Target("PDCR, random ratios, analysis", PDCR_RANDOM, pdcr.TILE_PRODUCTS, "at most", 1.15),
    Target("PDCR, random ratios", PDCR_RANDOM, ("torch.compile",), "at least", 4),
    Target("PDCR, random ratios", PDCR_RANDOM, ("reference",), "at least", 15),
    Target("PDCR, extra memory", PDCR_RANDOM, ("the sampled vectors in fp32",), "memory", 4),
    Target("PDCR, extra memory", PDCR_LARGE, ("the sampled vectors in fp32",), "memory", 4),
    Target("Foreground ratios", RATIOS, ("one-hot + cumsum",), "at least", 80),
    Target("Entropy gate", GATE, ("torch.compile",), "at least", 3),
    *(Target("PDCR at three layers + UAFS", case, ("baseline",), "added") for case in STEPS),
)
