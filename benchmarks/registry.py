"""Which operations are measured at which sizes, and the targets they are held to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks import call, gate, pdcr, ratios, step
from benchmarks.operation import Case, Operation

OPERATIONS: tuple[Operation, ...] = (
    pdcr.OPERATION,
    ratios.OPERATION,
    gate.OPERATION,
    call.OPERATION,
    step.OPERATION,
)


def _pdcr(size: pdcr.Size, *without: str, rounds: int | None = None) -> Case:
    return Case(pdcr.OPERATION, size, rounds=rounds, without=(*pdcr.TILE_PRODUCTS, *without))


_IMAGES = {2: (4, 256), 3: (1, 96)}  # batch and extent by spatial axes

PDCR_RANDOM = Case(pdcr.OPERATION, pdcr.Size(4096))
PDCR_MASK = _pdcr(pdcr.Size(4096, ratios="mask", classes=5), "KeOps", "released")
PDCR_TWO_CLASS_MASK = _pdcr(pdcr.Size(4096, ratios="mask"), "KeOps", "released")
PDCR_SMALL = tuple(
    _pdcr(pdcr.Size(count, channels=64, batch=4), "KeOps", "released") for count in (128, 512, 1024)
)
PDCR_LARGE = _pdcr(pdcr.Size(65536), "chunked", rounds=1)
RATIOS = Case(ratios.OPERATION, ratios.Size())
GATE = Case(gate.OPERATION, gate.Size())
CALL = Case(call.OPERATION, call.Size(batch=2, dtype="fp32"), without=(call.COMPILED_LOSSES,))
SMALL_CALL = Case(
    call.OPERATION, call.Size(256, batch=4, dtype="fp32"), without=("reference", "torch.compile")
)
STEP = Case(step.OPERATION, step.Size(1024))

DEFAULT: tuple[Case, ...] = (
    PDCR_RANDOM,
    PDCR_MASK,
    PDCR_TWO_CLASS_MASK,
    *PDCR_SMALL,
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
    CALL,
    SMALL_CALL,
    STEP,
)
QUICK: tuple[Case, ...] = (
    _pdcr(pdcr.Size(512, channels=64), "KeOps"),
    _pdcr(pdcr.Size(484, channels=64, ratios="mask", classes=5), "KeOps", "torch.compile"),
    Case(ratios.OPERATION, ratios.Size(batch=2, extent=128, count=256)),
    Case(gate.OPERATION, gate.Size(shape=(1, 32, 32, 32))),
    Case(
        call.OPERATION,
        call.Size(samples=64, batch=1, extent=256, dtype="fp32"),
        without=("torch.compile", call.COMPILED_LOSSES),
    ),
    Case(step.OPERATION, step.Size(samples=64, batch=2, extent=64)),
)
LARGE: tuple[Case, ...] = (PDCR_LARGE,)


def _networks(device: str, samples: tuple[int, ...], **changed: Any) -> tuple[Case, ...]:
    """A step of every network at its usual input size, with few images on the CPU."""
    cases = []
    for name, network in step.NETWORKS.items():
        batch, extent = _IMAGES[network.spatial_dims]
        size = step.Size(batch=batch if device == "cpu" else 4 * batch, extent=extent, network=name)
        for count in samples:
            cases.append(Case(step.OPERATION, replace(size, samples=count, **changed), device))
    return tuple(cases)


NETWORKS: tuple[Case, ...] = tuple(
    replace(case, without=("reference, cumsum ratios", "PDCR alone", "UAFS alone"), weighed=False)
    for case in _networks("cpu", (256,))
)


def _on_gpu(
    size: pdcr.Size, *without: str, flex: bool = False, keops: bool = False, compiled: bool = False
) -> Case:
    """PDCR on CUDA in a graph, beside the peers that are quick to get ready, and those asked for.

    Without a graph, what the host takes to launch the kernels would be measured up to thousands of vectors.
    """
    is_16_bit = size.dtype != "fp32"
    wanted = {
        "FlexAttention, log Z alone": flex,
        "KeOps": keops,
        "torch.compile": compiled and not is_16_bit,
        pdcr.COMPILED_16_BIT: compiled and is_16_bit,
    }
    left_out = [name for name, want in wanted.items() if not want]
    return Case(pdcr.OPERATION, size, "cuda", without=("released", *left_out, *without), graph=True)


def _sizes(counts: tuple[int, ...]) -> tuple[Case, ...]:
    """bf16 vectors and random ratios at every width, the most peers at 256 channels."""
    return tuple(
        _on_gpu(
            pdcr.Size(count, channels, dtype="bf16"),
            *([] if channels == 256 or count < 65536 else ["chunked"]),
            compiled=channels == 256,
            flex=channels in (64, 256) and count >= 1024,
        )
        for count in counts
        for channels in (32, 64, 256, 728, 2048)
    )


def _not_among(cases: tuple[Case, ...], others: tuple[Case, ...]) -> tuple[Case, ...]:
    """The cases that the others do not hold."""
    known = {case.id for case in others}
    return tuple(case for case in cases if case.id not in known)


GPU_SMALL = tuple(
    _on_gpu(pdcr.Size(count, channels, classes=classes, dtype="bf16", batch=batch), compiled=True)
    for count, channels, classes, batch in (
        *((count, 64, 2, batch) for count in (128, 256, 1024) for batch in (1, 8)),
        *((count, 256, 2, batch) for count in (1024, 4096) for batch in (1, 8)),
        (1024, 256, 4, 8),
    )
)
GPU_RANDOM = _on_gpu(pdcr.Size(16384, dtype="bf16"), compiled=True, flex=True)
GPU_MASK = _on_gpu(pdcr.Size(16384, ratios="mask", classes=5, dtype="bf16"), compiled=True)
GPU_TWO_CLASS_MASK = _on_gpu(pdcr.Size(16384, ratios="mask", dtype="bf16"))
GPU_LARGE = _on_gpu(pdcr.Size(131072, dtype="bf16"), compiled=True, flex=True)
GPU_CALLS = tuple(
    Case(call.OPERATION, call.Size(samples), "cuda", without=("torch.compile",), graph=True)
    for samples in (1024, 256, 128)
)
GPU_RATIOS = Case(ratios.OPERATION, ratios.Size(), "cuda", graph=True)


def _gate_on_gpu(
    shape: tuple[int, ...], classes: int, dtype: str, channels_last: bool = False, compiled: bool = False
) -> Case:
    without = () if compiled else ("torch.compile",)
    size = gate.Size(shape, classes, dtype, channels_last)
    return Case(gate.OPERATION, size, "cuda", without=without, graph=True)


GPU_GATES = (
    _gate_on_gpu((2, 64, 128, 128, 128), 5, "bf16", compiled=True),  # 537 MB
    _gate_on_gpu((2, 64, 128, 128, 128), 5, "bf16", channels_last=True, compiled=True),
    _gate_on_gpu((2, 64, 128, 128, 128), 5, "fp32", compiled=True),  # 1074 MB
    _gate_on_gpu((16, 256, 256, 256), 2, "bf16", compiled=True),  # 537 MB
    _gate_on_gpu((16, 256, 256, 256), 2, "bf16", channels_last=True, compiled=True),
)
GPU_MEDIUM_GATES = (
    _gate_on_gpu((8, 256, 128, 128), 4, "bf16", compiled=True),  # 67 MB
    _gate_on_gpu((8, 256, 128, 128), 4, "bf16", channels_last=True, compiled=True),
)
GPU_STEPS = tuple(
    Case(step.OPERATION, step.Size(samples, 16, 512, dtype="bf16"), "cuda") for samples in (256, 1024)
)

# What `python -m benchmarks --part NAME` measures on a GPU, in parts of a few minutes each.
PARTS: dict[str, tuple[Case, ...]] = {
    "pdcr-small": (*GPU_SMALL, *_not_among(_sizes((128, 256, 512, 1024, 2048)), GPU_SMALL)),
    "pdcr-large": (
        GPU_RANDOM,
        *_not_among(_sizes((4096, 8192, 16384)), (GPU_RANDOM, *GPU_SMALL)),
    ),
    "pdcr-huge": (GPU_LARGE, *_not_among(_sizes((131072, 65536, 32768)), (GPU_LARGE,))),
    "pdcr-mask": (
        GPU_MASK,
        GPU_TWO_CLASS_MASK,
        *(
            _on_gpu(pdcr.Size(count, channels, "mask", classes, "bf16"))
            for count in (128, 256, 512, 1024, 2048, 4096, 8192, 32768, 65536, 131072)
            for channels, classes in ((64, 5), (256, 5), (256, 2))
        ),
    ),
    "pdcr-dtypes": tuple(
        _on_gpu(
            pdcr.Size(count, channels, dtype=dtype, batch=batch),
            keops=channels == 64 and dtype == "fp32",
            compiled=batch > 1,
        )
        for dtype in ("fp32", "fp16")
        for count, channels, batch in (
            (1024, 64, 8),
            (256, 256, 1),
            (1024, 256, 1),
            (4096, 64, 1),
            (4096, 256, 1),
            (16384, 256, 1),
        )
    ),
    "call": GPU_CALLS,
    "ratios": (
        GPU_RATIOS,
        Case(ratios.OPERATION, ratios.Size(places="random"), "cuda", graph=True),
        Case(
            ratios.OPERATION,
            ratios.Size(batch=8, classes=19),
            "cuda",
            without=("torch.compile",),
            graph=True,
        ),
        *(
            Case(
                ratios.OPERATION,
                ratios.Size(batch=1, extent=0, classes=5, places="random", count=count),
                "cuda",
                graph=True,
            )
            for count in (256, 1024, 16384)
        ),
    ),
    "gate": (
        *GPU_GATES,
        *GPU_MEDIUM_GATES,
        _gate_on_gpu((8, 64, 256, 256), 4, "fp32"),  # 134 MB
        _gate_on_gpu((2, 256, 128, 128), 2, "fp32"),  # 34 MB: within the cache of large cards
        _gate_on_gpu((8, 32, 128, 128), 4, "bf16"),  # 8 MB
        *(
            _gate_on_gpu(shape, classes, dtype)
            for shape, classes in (
                ((16, 32, 256, 256), 2),  # U-Net
                ((16, 256, 32, 32), 2),
                ((8, 256, 128, 128), 5),  # DeepLabV3+
                ((8, 2048, 32, 32), 5),
                ((2, 32, 128, 128, 128), 5),  # nnU-Net
                ((2, 320, 8, 8, 8), 5),
            )
            for dtype in ("bf16", "fp32")
        ),
    ),
    "step": GPU_STEPS,
    "step-networks": _networks("cuda", (256, 1024), dtype="bf16"),
}


def _every_case() -> tuple[Case, ...]:
    return (*DEFAULT, *QUICK, *LARGE, *NETWORKS, *(case for part in PARTS.values() for case in part))


def find(case_id: str) -> Case:
    """The case of that id."""
    return next(case for case in _every_case() if case.id == case_id)


def trial(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The cases of a part at tiny sizes on the CPU, without what must be compiled: to try the commands."""
    small = {
        case.id: case
        for case in (
            replace(each, size=each.operation.tiny(each.size), device="cpu", graph=False) for each in cases
        )
    }
    slow = ("KeOps", *pdcr.TILE_PRODUCTS)
    return tuple(
        replace(
            case,
            without=(*case.without, *slow, *(each.name for each in case.implementations if each.compiles)),
        )
        for case in small.values()
    )


@dataclass(frozen=True)
class Target:
    """What ours must reach in one case.

    `"at most"` bounds our time over that of `against`, of several the fastest, and `"at least"` its inverse;
    `of` says which time. `"memory"` bounds our extra memory over the operation's `memory_unit`; `"added"` how
    much longer than `against` ours takes, as a share of it; `"share"` the floor's part of our time, at least;
    `"launches"` how many kernels, copies and fills a call launches, at most.
    """

    what: str
    case: Case
    against: tuple[str, ...]
    sense: Literal["at most", "at least", "memory", "added", "share", "launches"]
    bound: float = float("inf")
    of: Literal["seconds", "uncaptured_host_seconds"] = "seconds"


_THREE = ("three products",)
_VECTORS = ("the sampled vectors in fp32",)
_COMPILED = ("torch.compile", pdcr.COMPILED_16_BIT)
# The multiplications of the gates' own networks, as a share of the network's, where they are above 3 %.
_GATES_SHARE = {"U-Net": 0.106, "U-Net 3D": 0.167}


def _compiled_in(case: Case) -> tuple[str, ...]:
    return tuple(each.name for each in case.implementations if each.name in _COMPILED)


TARGETS: tuple[Target, ...] = (
    Target("PDCR, random ratios", PDCR_RANDOM, _THREE, "at most", 0.5),
    Target("PDCR, ratios of a mask at stride 4, 5 classes", PDCR_MASK, _THREE, "at most", 0.25),
    Target("PDCR, ratios of a mask at stride 4, 2 classes", PDCR_TWO_CLASS_MASK, _THREE, "at most", 0.25),
    *(
        Target("PDCR, few vectors", case, ("torch.compile",), "at least", bound)
        for case, bound in zip(PDCR_SMALL, (2, 3, 3.5), strict=True)
    ),
    Target("PDCR from features and labels", SMALL_CALL, (call.COMPILED_LOSSES,), "at least", 3),
    Target("PDCR, extra memory", PDCR_RANDOM, _VECTORS, "memory", 4),
    Target("PDCR, extra memory", PDCR_LARGE, _VECTORS, "memory", 4),
    Target("Foreground ratios", RATIOS, ("one-hot + cumsum",), "at least", 80),
    Target("Entropy gate", GATE, ("torch.compile",), "at least", 2.5),
    Target("PDCR at three layers + UAFS", STEP, ("baseline",), "added"),
    *(
        Target(
            "PDCR at three layers + UAFS",
            case,
            ("baseline",),
            "added",
            0.1 + _GATES_SHARE.get(case.size.network, 0),
        )
        for case in NETWORKS
    ),
    *(Target("PDCR on a GPU, in a graph", case, _compiled_in(case), "at least", 1.5) for case in GPU_SMALL),
    Target("PDCR on a GPU, random ratios", GPU_RANDOM, _THREE, "at most", 0.95),
    Target("PDCR on a GPU, ratios of a mask, 5 classes", GPU_MASK, _THREE, "at most", 0.6),
    Target("PDCR on a GPU, ratios of a mask, 2 classes", GPU_TWO_CLASS_MASK, _THREE, "at most", 0.6),
    Target("PDCR on a GPU, extra memory", GPU_RANDOM, _VECTORS, "memory", 4),
    Target("PDCR on a GPU, extra memory", GPU_LARGE, _VECTORS, "memory", 4),
    *(
        target
        for case in GPU_CALLS
        for target in (
            Target("PDCR from features and labels, in a graph", case, _compiled_in(case), "at least", 3),
            Target("the same, launches", case, ("launches",), "launches", 25),
            Target(
                "the same, host time without a graph",
                case,
                _compiled_in(case),
                "at most",
                1,
                "uncaptured_host_seconds",
            ),
        )
    ),
    Target("Foreground ratios on a GPU", GPU_RATIOS, ("one read of the labels",), "at most", 2),
    *(
        Target("Entropy gate on a GPU, 512 MB and more", case, ("the floor",), "share", 0.93)
        for case in GPU_GATES
    ),
    *(
        Target("Entropy gate on a GPU, 67 MB", case, ("the floor",), "share", 0.85)
        for case in GPU_MEDIUM_GATES
    ),
    *(
        Target("PDCR at three layers + UAFS on a GPU", case, ("baseline",), "added", 0.05)
        for case in GPU_STEPS
    ),
)
