"""Records what the package launches on a GPU, specialised as the JIT would, on a machine without one.

    python -O tests/dry_jit.py CAPABILITY OUT SOURCE...

runs calls of the package on CPU tensors through the code that serves CUDA tensors. Every Triton launch is
bound and specialised as on a card of that compute capability (divisibility by 16, equality to 1, dtypes,
options), but nothing is launched. Results are uninitialised memory; only the recorded launches have a
meaning. OUT is a pickled `Recording`. SOURCE is one of

    tables       calls that take every entry of the launch tables of that card, in two modes
    modes        the same calls in other modes
    tests        the calls of tests/gpu at the sizes of a GPU
    benchmarks   the calls of the GPU cases of benchmarks/registry.py
    counts       `CALLS`, whose launches are counted
    overlapped   on sm_90, backward launches of no table whose products overlap with other instructions

With `-O`, assertions about results do not end a test before its last call. `ahead_of_time.py` compiles.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import math
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PROCESSORS = {80: 108, 90: 132, 100: 148}
# Channels, classes and columns of a tile for the overlapped kernels.
OVERLAPPED = (
    *((128, 2, 128), (128, 5, 64), (128, 8, 64)),
    *((256, 2, 64), (256, 3, 64), (256, 5, 32), (256, 8, 32)),
)
LARGEST_GRID = (2**31 - 1, 65535, 65535)
SOURCES = ("tables", "modes", "tests", "benchmarks", "counts", "overlapped")
_ROOT = Path(__file__).resolve().parent.parent
_OPERATORS = {  # with Triton kernels, by file of ops/; `<operator>_on_cuda` there serves CUDA tensors
    "pdcr": ("pdcr_forward", "pdcr_backward"),
    "pdcr_call": ("pdcr_call_forward", "pdcr_call_backward"),
    "foreground_ratio": ("foreground_ratio",),
    "gather": ("gather_vectors", "gather_vectors_backward"),
    "entropy_gate": ("entropy_gate_forward", "entropy_gate_backward"),
}


def serve_cpu_tensors() -> None:
    """Send CPU tensors to the Triton kernels as if they were CUDA tensors, for the rest of this process."""
    from contrastseg_fast import _backend, _checks

    _backend.unavailable = lambda backend, _device: None if backend == "triton" else "only Triton is tried"
    _checks.warn_once = lambda *_: None
    _LIBRARIES.append(library := torch.library.Library("contrastseg_fast", "IMPL"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for operator, function in _on_cuda():
            library.impl(operator, function, "CPU", allow_override=True)


def _on_cuda() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The operators, and the functions that serve CUDA tensors."""
    for file, operators in _OPERATORS.items():
        module = importlib.import_module(f"contrastseg_fast.ops.{file}")
        for operator in operators:
            yield operator, getattr(module, f"{operator}_on_cuda")


_Mode = tuple[torch.dtype, int, float]  # dtype, classes, temperature
_LIBRARIES: list[torch.library.Library] = []  # registrations end with their library


class Variant(NamedTuple):
    """One kernel as the JIT specialises it: what `triton.compiler.ASTSource` and `triton.compile` take."""

    module: str
    kernel: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Any, Any], ...]
    attributes: tuple[tuple[Any, Any], ...]
    options: tuple[tuple[str, Any], ...]

    def constant(self, name: str) -> Any:
        """The value of a constexpr argument."""
        names = [argument for argument, _ in self.signature]
        return next((value for path, value in self.constants if names[path[0]] == name), None)

    def is_divisible(self, name: str) -> bool:
        """Whether an argument is known to be a multiple of 16, of a tuple every element."""
        names = [argument for argument, _ in self.signature]
        attributes = [attribute for path, attribute in self.attributes if names[path[0]] == name]
        return bool(attributes) and all(attributes)

    def option(self, name: str) -> Any:
        """`num_warps`, `num_stages` and so on."""
        return dict(self.options)[name]

    def in_bf16(self) -> Variant:
        """The same with bf16 in place of fp16."""

        def in_bf16(kind: Any) -> Any:
            return tuple(map(in_bf16, kind)) if isinstance(kind, tuple) else kind.replace("fp16", "bf16")

        bf16 = ((name, in_bf16(kind)) for name, kind in self.signature)
        return self._replace(signature=tuple(bf16))

    def describe(self) -> str:
        """The variant in words, for the message of a failing test."""
        names = [argument for argument, _ in self.signature]
        constants = ", ".join(f"{names[path[0]]}={value}" for path, value in self.constants)
        types = ", ".join(f"{name}: {kind}" for name, kind in self.signature if kind != "constexpr")
        warps, stages = self.option("num_warps"), self.option("num_stages")
        return f"{self.kernel}({types}; {constants}; num_warps={warps}, num_stages={stages})"


class Call(NamedTuple):
    """Where a launch comes from."""

    source: str
    name: str


class Count(NamedTuple):
    """The launches of one call, forward and backward."""

    triton: dict[str, int]  # by kernel
    aten: dict[str, int]  # by operator; a call that launches several kernels counts once


class Recording(NamedTuple):
    """What a run of the sources launched."""

    variants: dict[Variant, Call]  # and the first call that launched it
    counts: dict[str, Count]  # by name of `CALLS`
    refused: list[str]  # launches that no card takes


class Recorder:
    """Replaces the driver of a card, and records what is launched on it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.variants: dict[Variant, Call] = {}
        self.launches: collections.Counter[str] = collections.Counter()
        self.counts: dict[str, Count] = {}
        self.refused: list[str] = []
        self.call = Call("", "")

    def recording(self) -> Recording:
        return Recording(self.variants, self.counts, self.refused)

    def install(self) -> None:
        """Record what CPU tensors would launch as CUDA tensors, for the rest of this process."""
        from triton.runtime import jit
        from triton.runtime.driver import driver

        driver.set_active(_driver(self.capability))
        run = jit.JITFunction.run

        def run_dry(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            self._launch(kernel.fn.__name__, grid)
            return run(kernel, *args, grid=grid, warmup=True, **options)

        def keep(kernel: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attrs: Any,
                 _warmup: bool) -> str:  # fmt: skip
            variant = Variant(
                kernel.fn.__module__,
                kernel.fn.__name__,
                tuple(signature.items()),
                tuple(constants.items()),
                tuple((path, tuple(map(tuple, attr))) for path, attr in attrs.items()),
                tuple(sorted(options.__dict__.items())),
            )
            self.variants.setdefault(variant, self.call)
            kernel.device_caches[device][0][key] = "never launched"
            return "never launched"

        jit.JITFunction.run = run_dry
        jit.JITFunction._do_compile = keep
        serve_cpu_tensors()
        self._skip_what_needs_a_card()

    def _launch(self, kernel: str, grid: Any) -> None:
        self.launches[kernel] += 1
        for size, largest in zip(grid, LARGEST_GRID, strict=False):
            if not 0 < size <= largest:
                self.refused.append(f"{self.call.name}: {kernel} with grid {grid}")

    def _skip_what_needs_a_card(self) -> None:
        from contrastseg_fast import functional, sample_plan
        from contrastseg_fast.kernels import _common, entropy_gate
        from contrastseg_fast.kernels.pdcr import plan, slabs

        backward = importlib.import_module("contrastseg_fast.kernels.pdcr.backward")
        for module in (_common, plan, backward):
            module.capability = lambda _tensor: self.capability
        for module in (_common, plan, entropy_gate):
            module.processors = lambda _tensor: PROCESSORS[self.capability]
        slabs.product = lambda a, b: a.new_empty((*a.shape[:2], b.shape[2]), dtype=torch.float32)
        slabs.add_product = lambda total, a, b: None
        functional._check_ratio_range = lambda *_: None  # only those of CPU tensors are checked
        sample_plan.SamplePlan._is_kept = lambda *_: False  # nor are positions kept for a card


def _driver(capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import ty_to_cpp

    class Driver:
        """The part of Triton's driver that binding arguments needs."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, kind: str) -> str:
            return ty_to_cpp(kind)

    return Driver()


class CountATen(TorchDispatchMode):
    """Counts the ATen calls that would launch something on a GPU: not views, not allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        ours = torch.ops.contrastseg_fast
        self._functions = {getattr(ours, operator).default: function for operator, function in _on_cuda()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._functions:
            with self:  # what the operator does counts too
                return self._functions[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        allocates = func._schema.name.split("::")[1] in _ALLOCATIONS
        if func.namespace == "aten" and not func.is_view and not allocates and _numel(result) > 0:
            self.calls[func._schema.name.removeprefix("aten::")] += 1
        return result


_ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh")


def _numel(result: Any) -> int:
    tensors = result if isinstance(result, tuple | list) else [result]
    return sum(each.numel() for each in tensors if isinstance(each, Tensor))


class _CheapRandom(TorchFunctionMode):
    """Gives constants in place of random numbers: drawing gigabytes takes longer than all else."""

    _VALUES = {torch.randn: 0.0, torch.rand: 0.5, torch.randint: 0}  # noqa: RUF012

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in self._VALUES:
            return func(*args, **kwargs)
        kwargs.pop("generator", None)
        if func is torch.randint:
            args = args[-1:] if "size" not in kwargs else (kwargs.pop("size"),)
            kwargs.setdefault("dtype", torch.int64)
            for bound in ("low", "high"):
                kwargs.pop(bound, None)
        value = self._VALUES[func]
        shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
        return torch.full(tuple(shape), value, **kwargs) if value else torch.zeros(tuple(shape), **kwargs)


def _run_tests(recorder: Recorder) -> None:
    """The calls of tests/gpu. Zeros replace the reference, so the assertions do not hold."""
    import pytest

    class Calls:
        def pytest_collection(self) -> None:
            _replace_references()

        def pytest_runtest_setup(self, item: pytest.Item) -> None:
            recorder.call = Call("tests", item.nodeid)

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
            torch.utils.deterministic.fill_uninitialized_memory = False  # nothing is written either
            with _CheapRandom(), contextlib.suppress(AssertionError):  # of torch.testing, about results
                yield

    options = [
        "-q",
        "--no-header",
        "--assert=plain",
        "-p",
        "no:cacheprovider",
        "--device",
        "launches",
    ]
    if os.environ.get("CONTRASTSEG_FAST_AOT") != "all":
        options += ["-k", "not compiled"]  # by torch.compile, which takes long: eager calls launch the same
    if pytest.main([str(_ROOT / "tests" / "gpu"), *options], plugins=[Calls()]) != 0:
        raise SystemExit("a test did not make all its calls")


def _replace_references() -> None:
    """Zeros of the right shapes for what the tests compare with, which takes long and launches nothing."""
    from gpu import oracle

    from contrastseg_fast import equations, reference, unchecked

    fast_loss, fast_fraction, fast_ratio = (
        unchecked.pdcr_loss,
        unchecked.repelled_fraction,
        unchecked.foreground_ratio,
    )

    def pdcr_loss(vectors: Tensor, *others: Any) -> Tensor:
        *_, reduction, backend = others
        if backend != "reference":
            return fast_loss(vectors, *others)
        loss = 0 * vectors.sum((1, 2))
        return loss if reduction == "none" else loss.mean()

    def repelled_fraction(vectors: Tensor, *others: Any) -> Tensor:
        return torch.zeros(len(vectors)) if others[-1] == "reference" else fast_fraction(vectors, *others)

    def foreground_ratio(
        labels: Tensor, starts: Tensor, size: Any, num_classes: int, *others: Any, **options: Any
    ) -> tuple[Tensor, ...]:
        backend = options.get("backend", others[-1] if others else "reference")
        if backend != "reference":
            return fast_ratio(labels, starts, size, num_classes, *others, **options)
        ratios = torch.zeros(labels.shape[0], starts.shape[-2], num_classes)
        return ratios, ratios[..., 0], ratios[..., :0]

    def entropy_gate(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        uncertainty = 0 * logits.sum(1, keepdim=True)
        return features * (2 - uncertainty).to(features.dtype), uncertainty

    def sampled_rows(vectors: Tensor, _ratios: Tensor, rows: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
        return vectors.new_zeros((), dtype=torch.float64), torch.zeros(len(rows), vectors.shape[1])

    unchecked.pdcr_loss = pdcr_loss
    unchecked.repelled_fraction = repelled_fraction
    unchecked.foreground_ratio = foreground_ratio
    equations.entropy_gate = entropy_gate
    reference.foreground_ratio = lambda *arguments, **_options: foreground_ratio(*arguments)[:2]
    oracle.sampled_rows = sampled_rows


def _run_benchmarks(recorder: Recorder) -> None:
    from benchmarks import call, gate, pdcr, ratios, registry
    from benchmarks.operation import OURS

    kernels = (pdcr.OPERATION, ratios.OPERATION, gate.OPERATION, call.OPERATION)
    for part in registry.PARTS.values():
        for case in part:
            if case.operation in kernels:
                recorder.call = Call("benchmarks", case.id)
                with _CheapRandom():
                    inputs = case.operation.make_inputs(case.size, "cpu")
                    case.operation.implementation(OURS).prepare(case.size, inputs)()


_FEW_CLASSES, _MORE_CLASSES = (torch.bfloat16, 2, 0.5), (torch.bfloat16, 5, 0.5)
_OTHER_MODES = [
    *((torch.bfloat16, classes, 0.5) for classes in (4, 8, 12)),
    *((torch.bfloat16, 2, 0.001), (torch.float16, 2, 0.5)),
]


def _run_tables(recorder: Recorder) -> None:
    _run_sizes(recorder, {16: [_FEW_CLASSES]}, [_FEW_CLASSES, _MORE_CLASSES])


def _run_modes(recorder: Recorder) -> None:
    _, eight, twelve, low, half = _OTHER_MODES
    _run_sizes(recorder, {16: [eight, low], 128: [twelve, half]}, _OTHER_MODES)


def _run_sizes(recorder: Recorder, of_small: dict[int, list[_Mode]], modes: list[_Mode]) -> None:
    """Small calls, few tiles, many and groups, at all widths that they serve, and several at once."""
    from contrastseg_fast.functional import pdcr_loss

    for batch, count in ((1, 16), (1, 128), (1, 512), (8, 1024), (1, 16384)):  # the last with groups
        for dtype, classes, temperature in of_small.get(count, modes):
            size = f"{batch} x {count} vectors, {classes} classes, temperature {temperature}, {dtype}"
            for width in (32, 64, 128, 256):
                recorder.call = Call("tables", f"{width} channels, {size}")
                vectors = torch.zeros(batch, count, width, dtype=dtype, requires_grad=True)
                loss = pdcr_loss(vectors, torch.zeros(batch, count, classes), temperature=temperature)
                torch.autograd.grad(loss, vectors)
            if count != 128:
                recorder.call = Call("tables", f"three layers, {size}")
                layout = torch.channels_last if count == 16 else torch.contiguous_format
                _three_layers(batch, count, classes, temperature, dtype, layout)


def _run_overlapped(recorder: Recorder) -> None:
    """Rows as they are, and grouped."""
    from contrastseg_fast.functional import pdcr_loss
    from contrastseg_fast.kernels._tuning import Launch, forced
    from contrastseg_fast.problems import FEWEST_GROUPED

    for width, classes, block_j in OVERLAPPED if recorder.capability == 90 else ():
        for count in (1024, FEWEST_GROUPED):
            recorder.call = Call("overlapped", f"{width} channels, {count} vectors, {classes} classes")
            vectors = torch.zeros(1, count, width, dtype=torch.bfloat16, requires_grad=True)
            with forced("pdcr_backward ", Launch(128, block_j, 8, 3, overlapped=True)):
                torch.autograd.grad(pdcr_loss(vectors, torch.zeros(1, count, classes)), vectors)


def _three_layers(
    batch: int,
    count: int,
    classes: int,
    temperature: float,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    """A loss of vectors of three widths, and its gradient."""
    from contrastseg_fast import PDCRLoss, ReceptiveField

    shape = math.isqrt(count), math.isqrt(count)
    maps = [
        torch.zeros(batch, channels, *shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        for channels in (64, 128, 256)
    ]
    field = ReceptiveField((1, 1), (1, 1), (0, 0))
    pdcr = PDCRLoss([field] * 3, classes, num_samples=count, temperature=temperature)
    torch.autograd.grad(pdcr(maps, torch.zeros(batch, *shape, dtype=torch.int64)), maps)


def _pair_loss(batch: int, count: int, channels: int, dtype: torch.dtype) -> Callable[[], object]:
    from contrastseg_fast.functional import pdcr_loss

    vectors = torch.zeros(batch, count, channels, dtype=dtype, requires_grad=True)
    ratios = torch.zeros(batch, count, 2)
    return lambda: torch.autograd.grad(pdcr_loss(vectors, ratios), vectors)


def _gate(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Callable[[], object]:
    from contrastseg_fast.functional import entropy_gate

    def make(channels: int) -> Tensor:
        x = torch.zeros(shape[0], channels, *shape[2:], dtype=dtype).contiguous(memory_format=layout)
        return x.requires_grad_()

    features, logits, grad = make(shape[1]), make(4), make(shape[1]).detach()
    return lambda: torch.autograd.grad(entropy_gate(features, logits), (features, logits), grad)


def _whole_call() -> Callable[[], object]:
    from benchmarks import call
    from benchmarks.operation import OURS

    size = call.Size()
    with _CheapRandom():
        inputs = call.OPERATION.make_inputs(size, "cpu")
    return call.OPERATION.implementation(OURS).prepare(size, inputs)


CALLS: dict[str, Callable[[], Callable[[], object]]] = {
    "pdcr_loss, N=128, C=64, bf16": lambda: _pair_loss(1, 128, 64, torch.bfloat16),
    "pdcr_loss, N=1024, C=256, bf16": lambda: _pair_loss(1, 1024, 256, torch.bfloat16),
    "pdcr_loss, N=16384, C=256, bf16": lambda: _pair_loss(1, 16384, 256, torch.bfloat16),
    "pdcr_loss, N=1024, C=256, fp32": lambda: _pair_loss(1, 1024, 256, torch.float32),
    "PDCRLoss, three layers, B=8, N=1024": _whole_call,
    "entropy_gate, fp32": lambda: _gate((2, 16, 32, 32), torch.float32, torch.contiguous_format),
    "entropy_gate, bf16, channels_last": lambda: _gate((2, 16, 32, 32), torch.bfloat16, torch.channels_last),
}


def _run_counts(recorder: Recorder) -> None:
    from contrastseg_fast import functional

    functional.check_label_range = lambda *_: None  # only those of CPU tensors are checked
    for name, prepare in CALLS.items():
        call = prepare()
        call()  # what is made once is made here
        recorder.call = Call("counts", name)
        recorder.launches.clear()
        with CountATen() as aten:
            call()
        recorder.counts[name] = Count(dict(recorder.launches), dict(aten.calls))


_RUNS = {
    "tables": _run_tables,
    "modes": _run_modes,
    "tests": _run_tests,
    "benchmarks": _run_benchmarks,
    "counts": _run_counts,
    "overlapped": _run_overlapped,
}


def main(capability: int, out: Path, sources: list[str]) -> None:
    sys.path[:0] = [str(_ROOT), str(Path(__file__).parent)]
    with contextlib.chdir(_ROOT):
        recorder = Recorder(capability)
        recorder.install()
        for source in sources:
            _RUNS[source](recorder)
        out.write_bytes(pickle.dumps(recorder.recording()))


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    from dry_jit import main as run  # so that what is pickled belongs to a module that others can import

    run(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
