"""What `scripts/gpu_check.py` times: the GPU cases that matter most, beside the peers that targets name."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import pdcr, registry
from benchmarks.operation import OURS, Case

_PEERS = (
    *("forward alone", "three products", pdcr.COMPILED_16_BIT),
    *("ours in CUDA", "one read of the labels"),
)


def _narrowed(case: Case, *, weighed: bool = False) -> Case:
    """The case with few peers, since each costs seconds."""
    left_out = (each.name for each in case.implementations if each.name not in (OURS, *_PEERS))
    return replace(case, without=(*case.without, *left_out), weighed=weighed)


_FULL_PRECISION = [
    case for case in registry.PARTS["pdcr-dtypes"] if case.size in (pdcr.Size(4096), pdcr.Size(16384))
]

# In order of worth: what the time does not reach is recorded as skipped.
NINE_MINUTES: tuple[Case, ...] = tuple(
    _narrowed(case)
    for case in (
        *registry.GPU_SMALL,
        *(registry.GPU_RANDOM, registry.GPU_TWO_CLASS_MASK, registry.GPU_MASK),
        *registry.GPU_CALLS,
        registry.GPU_RATIOS,
        *(registry.GPU_GATES[0], *registry.GPU_MEDIUM_GATES),
        *_FULL_PRECISION,
    )
)
LARGEST: tuple[Case, ...] = (_narrowed(replace(registry.GPU_LARGE, graph=False), weighed=True),)
PARTS = {"nine-minutes": NINE_MINUTES, "largest": LARGEST}

# What the sweep launches in many ways. Small calls have one launch.
SWEEP: tuple[pdcr.Size, ...] = tuple(
    pdcr.Size(count, channels, dtype="bf16", batch=batch)
    for channels in (64, 256)
    for count, batch in ((512, 1), (1024, 1), (1024, 8), (4096, 1), (16384, 1))
)
