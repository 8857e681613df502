"""What `scripts/gpu_check.py` times: few cases, those of the README's table, each from replayed graphs."""

from __future__ import annotations

from typing import Any

from benchmarks import call, gate, pdcr, ratios
from benchmarks.operation import OURS, Case, Operation
from benchmarks.registry import TARGETS as OF_REGISTRY
from benchmarks.registry import Target


def _case(operation: Operation, size: Any, *peers: str, graph: bool = True, weighed: bool = False) -> Case:
    """Ours beside the named peers."""
    names = [each.name for each in operation.implementations]
    without = tuple(name for name in names if name not in (OURS, *peers))
    return Case(operation, size, "cuda", without=without, graph=graph, weighed=weighed)


_PRODUCTS = ("forward alone", "three products")
_COMPILED = (*_PRODUCTS, "torch.compile")
_COPY = ("ours in Triton", "copying the bytes that must move")

_SMALL = tuple(  # the sizes that people use
    _case(pdcr.OPERATION, pdcr.Size(count, channels, classes=classes, dtype="bf16", batch=batch), *_COMPILED)
    for count, channels, classes, batch in (
        (128, 64, 2, 1),
        (256, 256, 2, 1),
        (1024, 64, 2, 1),
        (1024, 256, 2, 1),
        (128, 64, 2, 8),
        (1024, 64, 2, 8),
        (1024, 256, 4, 8),
        (4096, 256, 2, 1),
    )
)
_RANDOM = _case(pdcr.OPERATION, pdcr.Size(16384, dtype="bf16"), *_COMPILED)
_MASKS = tuple(
    _case(pdcr.OPERATION, pdcr.Size(16384, ratios="mask", classes=classes, dtype="bf16"), *_PRODUCTS)
    for classes in (2, 5)
)
_CALLS = tuple(_case(call.OPERATION, call.Size(samples), "torch.compile") for samples in (1024, 256))
_RATIOS = tuple(
    _case(ratios.OPERATION, size, "one read of the labels")
    for size in (ratios.Size(), ratios.Size(batch=1, extent=0, classes=5, places="random"))
)
_GATES = {  # and the share of the copy bandwidth to reach
    _case(gate.OPERATION, gate.Size(shape, classes, "bf16", channels_last), *_COPY): share
    for shape, classes, channels_last, share in (
        ((2, 64, 128, 128, 128), 5, False, 0.93),  # 537 MB
        ((8, 256, 128, 128), 4, True, 0.85),  # 67 MB
        ((8, 64, 128, 128), 4, False, 0.85),  # 17 MB
    )
}
_FULL_PRECISION = tuple(_case(pdcr.OPERATION, pdcr.Size(count), *_PRODUCTS) for count in (4096, 16384))

# In order of worth: what the time does not reach is recorded as skipped.
NINE_MINUTES: tuple[Case, ...] = (
    *(*_SMALL, _RANDOM, *_MASKS, *_CALLS, *_RATIOS),
    *(*_GATES, *_FULL_PRECISION),
)
LARGEST: tuple[Case, ...] = (
    _case(pdcr.OPERATION, pdcr.Size(131072, dtype="bf16"), "three products", graph=False, weighed=True),
)
PARTS = {"nine-minutes": NINE_MINUTES, "largest": LARGEST}

# What the sweep launches in many ways.
SWEEP: tuple[pdcr.Size, ...] = (
    pdcr.Size(1024, 64, dtype="bf16", batch=8),
    pdcr.Size(1024, 256, dtype="bf16", batch=8),
    pdcr.Size(1024, 256, classes=4, dtype="bf16", batch=8),
    pdcr.Size(4096, 256, dtype="bf16"),
    pdcr.Size(16384, 256, dtype="bf16"),
    pdcr.Size(16384, 256, "mask", dtype="bf16"),
    pdcr.Size(16384, 256, "mask", 5, "bf16"),
)

_OF_GRAPHS: tuple[Target, ...] = (
    *(Target("PDCR on a GPU, in a graph", case, ("torch.compile",), "at least", 1.5) for case in _SMALL),
    Target("PDCR on a GPU, random ratios, in a graph", _RANDOM, ("three products",), "at most", 0.95),
    *(
        Target("PDCR on a GPU, ratios of a mask, in a graph", case, ("three products",), "at most", 0.6)
        for case in _MASKS
    ),
    *(
        Target("PDCR from features and labels, in a graph", case, ("torch.compile",), "at least", 3)
        for case in _CALLS
    ),
    *(
        Target("Foreground ratios on a GPU, in a graph", case, ("one read of the labels",), "at most", 2)
        for case in _RATIOS[:1]
    ),
    *(
        Target("Entropy gate on a GPU, in a graph", case, _COPY[1:], "at most", round(1 / share, 3))
        for case, share in _GATES.items()
    ),
)
_KNOWN = {(target.case.id, target.against, target.sense) for target in OF_REGISTRY}
# The registry's, which count where both have one.
TARGETS: tuple[Target, ...] = (
    *OF_REGISTRY,
    *(each for each in _OF_GRAPHS if (each.case.id, each.against, each.sense) not in _KNOWN),
)
