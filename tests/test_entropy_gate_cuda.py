"""The entropy gate's CUDA kernels: run on the CPU thread by thread, and compiled and read.

On the CPU, tests/entropy_gate_cuda.cpp stands in for the launch alone: the op's own preparation, its checks,
the choice of blocks and what every thread does are those of a card.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_entropy_gate import (
    FLOATS,
    SHAPES,
    assert_as_exact_as_plain,
    by_gate,
    by_reference,
    channels_last,
    extreme_logits,
    make_inputs,
    strided,
)
from torch import Tensor

from contrastseg_fast import _backend
from contrastseg_fast.functional import entropy_gate
from contrastseg_fast.ops import entropy_gate as op

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX", "c++").split()[0]


def forward(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return op.entropy_gate_forward_on_cuda(features, logits, "cuda")


def backward(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    return op.entropy_gate_backward_on_cuda(*inputs, "cuda")


CUDA = (forward, backward)
LAYOUTS = [torch.clone, channels_last]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


class Plan(ctypes.Structure):
    """As in csrc/cuda/entropy_gate.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("vector", "tile", "lanes", "held", "shared_bytes")] + [
        (name, ctypes.c_int64) for name in ("tiles_per_image", "blocks")
    ]


class Emulation:
    """Launches on the CPU: how many processors the card has, and how the last launch was cut."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._processors = ctypes.c_int.in_dll(library, "processors")
        self.plan = Plan.in_dll(library, "last_plan")

    def set_processors(self, count: int) -> None:
        self._processors.value = count


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER})")
    library = tmp_path_factory.mktemp("emulation") / "entropy_gate_cuda.so"
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", STABLE_ABI]
    command += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(TORCH / "include"), str(ROOT / "tests" / "entropy_gate_cuda.cpp")]
    command += [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def emulation(emulated_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Emulation:
    monkeypatch.setattr(_backend, "unavailable", lambda *_: None)
    emulation = Emulation(emulated_library)
    emulation.set_processors(4)
    return emulation


@pytest.fixture
def operators(emulation: Emulation) -> Iterator[None]:
    """Let the operators take the emulated kernels."""
    library = torch.library.Library("contrastseg_fast", "IMPL")
    library.impl("entropy_gate_forward", op.entropy_gate_forward_on_cuda, "CPU", allow_override=True)
    library.impl("entropy_gate_backward", op.entropy_gate_backward_on_cuda, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.fixture(params=[0, 4, 1000], ids=["largest tiles", "tiles", "smallest tiles"])
def any_card(request: pytest.FixtureRequest, emulation: Emulation) -> Emulation:
    """Cards without processors to fill up to more than there is work for."""
    emulation.set_processors(request.param)
    return emulation


@pytest.mark.usefixtures("any_card")
@pytest.mark.parametrize("shape", [s for name, s in SHAPES.items() if name != "long rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_against_the_reference(dtype: torch.dtype, layout, shape: tuple[int, ...]) -> None:
    inputs = tuple(layout(x) for x in make_inputs(shape, dtype=dtype))
    actual = by_gate(CUDA, *inputs)
    assert_as_exact_as_plain(actual, inputs)
    for result, like in zip(actual, (inputs[0], inputs[3], inputs[0], inputs[1]), strict=True):
        assert result.is_contiguous() == like.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_vectors_of_16_bytes(any_card: Emulation, dtype: torch.dtype, layout) -> None:
    """Moved where all rows begin at multiples of 16 bytes; element by element elsewhere."""
    inputs = tuple(layout(x) for x in make_inputs((2, 72, 4, 88), 2, dtype))
    assert_as_exact_as_plain(by_gate(CUDA, *inputs), inputs)
    assert any_card.plan.vector == 16 // dtype.itemsize
    longer = [torch.nn.functional.pad(x, (1, 0)) for x in inputs]  # memory that begins one element later
    shifted = [x.flatten()[1 : 1 + y.numel()].view(y.shape) for x, y in zip(longer, inputs, strict=True)]
    if layout is torch.clone:
        assert_as_exact_as_plain(by_gate(CUDA, *shifted), tuple(shifted))
        assert any_card.plan.vector == 1


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("classes", [2, 4, 5, 19, 128])
def test_numbers_of_classes(classes: int) -> None:
    """More than shared memory holds, too."""
    for layout in LAYOUTS:
        inputs = tuple(layout(x) for x in make_inputs((2, 6, 7, 9), classes))
        assert_as_exact_as_plain(by_gate(CUDA, *inputs), inputs)


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 31, 64, 300])
def test_numbers_of_channels(any_card: Emulation, channels: int) -> None:
    for layout in LAYOUTS:
        inputs = tuple(layout(x) for x in make_inputs((1, channels, 3, 12), 2))
        assert_as_exact_as_plain(by_gate(CUDA, *inputs), inputs)
    assert any_card.plan.lanes <= 32


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("logit_dtype", FLOATS)
@pytest.mark.parametrize("feature_dtype", FLOATS)
def test_mixed_dtypes(feature_dtype: torch.dtype, logit_dtype: torch.dtype) -> None:
    features, logits, grad_gated, grad_uncertainty = make_inputs((2, 9, 5, 8))
    features, grad_gated = features.to(feature_dtype), grad_gated.to(feature_dtype)
    logits = logits.to(logit_dtype)
    inputs = (features, logits, grad_gated, grad_uncertainty.to(op._accumulation_dtype(features, logits)))
    assert_as_exact_as_plain(by_gate(CUDA, *inputs), inputs)


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_logits(dtype: torch.dtype) -> None:
    logits = extreme_logits(dtype)
    features, grad_gated = torch.randn(2, 1, 5, 13, dtype=torch.float64).to(dtype)
    gated, u = CUDA[0](features, logits)
    expected_gated, expected_u = op._forward(features, logits)
    torch.testing.assert_close(u, expected_u, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(gated, expected_gated, equal_nan=True)
    grad_features, grad_logits = CUDA[1](grad_gated, None, features, logits)
    torch.testing.assert_close(grad_features, (grad_gated * (2 - u)).to(dtype), equal_nan=True)
    torch.testing.assert_close(grad_logits[..., :9], torch.zeros_like(logits[..., :9]), rtol=0, atol=1e-5)
    assert grad_logits[..., 9:].isnan().any(1).all()


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_strides(layout) -> None:
    inputs = tuple(layout(x) for x in make_inputs((2, 8, 4, 8), 4))
    expected = by_gate(CUDA, *inputs)
    for position in range(4):
        for kind, other in strided(inputs[position]).items():
            actual = by_gate(CUDA, *inputs[:position], other, *inputs[position + 1 :])
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, msg=f"input {position} {kind}")


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_expanded_and_missing_gradients(layout) -> None:
    features, logits, grad_gated, grad_uncertainty = (layout(x) for x in make_inputs((2, 6, 4, 5), 4))
    one = torch.tensor(0.5)
    for gated_grad in (one.expand(2, 6, 4, 5), grad_gated, None):
        for uncertainty_grad in (one.expand(2, 1, 4, 5), grad_uncertainty, None):
            dense = [
                torch.zeros(2, channels, 4, 5) if grad is None else grad.contiguous()
                for channels, grad in ((6, gated_grad), (1, uncertainty_grad))
            ]
            actual = CUDA[1](gated_grad, uncertainty_grad, features, logits)
            for a, e in zip(actual, by_reference(features, logits, *dense)[2:], strict=True):
                torch.testing.assert_close(a, e.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0, 3), (0, 0, 0)])
def test_nothing_to_gate(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(shape)
    for a, e in zip(by_gate(CUDA, *inputs), by_reference(*inputs), strict=True):
        torch.testing.assert_close(a, e.float())


@pytest.mark.usefixtures("operators")
def test_gradients_flow_and_second_derivatives_raise() -> None:
    features, logits, _, _ = (x.requires_grad_() for x in make_inputs((1, 3, 2, 4), dtype=torch.float64))
    assert torch.autograd.gradcheck(op.entropy_gate_forward, (features, logits, "cuda"))
    gated, _ = op.entropy_gate_forward(features, logits, "cuda")
    (grad,) = torch.autograd.grad(gated.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


@pytest.mark.usefixtures("operators")
def test_opcheck() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares runs, poisoned memory has no part in it
    features, logits, grad_gated, grad_uncertainty = make_inputs((2, 5, 4, 3))
    torch.library.opcheck(
        op.entropy_gate_forward, (features.requires_grad_(), logits.requires_grad_(), "cuda")
    )
    inputs = (grad_gated, grad_uncertainty, features.detach(), logits.detach(), "cuda")
    torch.library.opcheck(op.entropy_gate_backward, inputs)


@pytest.mark.usefixtures("emulation")
def test_tensors_that_do_not_fit_are_refused() -> None:
    launch = torch.ops.contrastseg_fast.entropy_gate_forward_launch
    x, z, u = torch.randn(2, 4, 6), torch.randn(2, 3, 6), torch.empty(2, 1, 6)
    y = torch.empty_like(x)
    launch(x, z, False, y, u)
    wrong = {
        "fp32, bf16 or fp16": [(x.double(), z, False, y, u), (x.long(), z, False, y, u)],
        "expected features": [(x, z[:1], False, y, u), (x, z[:, :1], False, y, u), (x[0], z, False, y, u)],
        "wrong dtype, shape or strides": [
            (x, z, True, y, u),
            (x, z, False, y.half(), u),
            (x, z, False, y[:, :2], u),
            (x, z, False, y, u.double()),
            (x.mT.contiguous().mT, z, False, y, u),
        ],
    }
    for message, calls in wrong.items():
        for call in calls:
            with pytest.raises(RuntimeError, match=message):
                launch(*call)


def test_cpu_tensors_are_refused() -> None:
    features, logits, _, _ = make_inputs((1, 5, 6, 7))
    with pytest.raises(ValueError, match="backend: entropy_gate with backend='cuda' expects CUDA tensors"):
        entropy_gate(features, logits, backend="cuda")


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "unavailable", lambda *_: "made up")
    features, logits, _, _ = make_inputs((1, 5, 6, 7))
    with pytest.raises(RuntimeError, match="with backend='cuda' cannot run: made up"):
        op.entropy_gate_forward_on_cuda(features, logits, "cuda")


def cuda_source(folder: Path) -> Path:
    """What the CUDA library is built from; without the CPU kernels, whose library is then empty."""
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cpu"))
    (folder / "contrastseg_fast").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(target),
        "--build-temp",
        "build",
    ]
    environment = {**os.environ, "CONTRASTSEG_FAST_REQUIRE_EXTENSION": "", "MAX_JOBS": "1", **environment}
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole library as setup.py builds and links it, for one architecture."""
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA compiler")
    folder = tmp_path_factory.mktemp("cuda")
    done = build(cuda_source(folder / "source"), folder, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = (folder / "contrastseg_fast").glob("_C_cuda*.so")
    return library


def tool(name: str) -> str:
    """A tool of the CUDA toolkit, or the one that comes with Triton."""
    found = shutil.which(name)
    if found is None and (triton := importlib.util.find_spec("triton")) is not None:
        found = shutil.which(name, path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        pytest.skip(f"no {name}")
    return found


def read(*command: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_ahead_of_time_library_links_only_what_every_torch_has(compiled: Path) -> None:
    needed = re.findall(r"NEEDED.*\[(.+)\]", read(shutil.which("readelf"), "-d", str(compiled)))
    assert "libtorch.so" in needed, "which brings in libtorch_cuda.so where torch has it"
    assert not [name for name in needed if "cuda" in name or "cudart" in name or "python" in name]
    symbols = read(shutil.which("nm"), "-D", str(compiled))
    assert " T PyInit__C_cuda" in symbols
    assert " U aoti_torch_get_current_cuda_stream" in symbols
    assert not [line for line in symbols.splitlines() if "c10" in line and " U " in line], (
        "not in the stable ABI"
    )


def test_ahead_of_time_library_loads_where_torch_is_built_with_cuda_and_only_there(compiled: Path) -> None:
    script = f"""
import importlib.util, sys, torch, contrastseg_fast
from torch import Tensor

from contrastseg_fast import _backend
if not torch.cuda.is_available():
    assert _backend._CUDA_LIBRARY_ERROR == "torch finds no CUDA device"
    assert "contrastseg_fast._C_cuda" not in sys.modules
try:
    spec = importlib.util.spec_from_file_location("_C_cuda", {str(compiled)!r})
    importlib.util.module_from_spec(spec)
except ImportError as error:
    assert torch.version.cuda is None, error
    assert "aoti_torch_get_current_cuda_stream" in str(error), error
else:
    assert torch.version.cuda is not None
    for direction in ("forward", "backward"):
        name = f"contrastseg_fast::entropy_gate_{{direction}}_launch"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ahead_of_time_kernels_fit_the_registers(compiled: Path) -> None:
    usage = read(tool("cuobjdump"), "--dump-resource-usage", str(compiled))
    kernels = re.findall(r"Function (\w*entropy_gate_(?:fwd|bwd)_kernel\w*):\s+(.+)", usage)
    assert len(kernels) == 2 * 4 * 2 * 2, "directions, dtypes, layouts, widths"
    for name, resources in kernels:
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources)}
        assert used["STACK"] == used["LOCAL"] == 0, f"{name} spills"
        blocks = 4 if "fwd" in name else 2 if "kernelId" in name else 3
        assert used["REG"] * 256 * blocks <= 65536, name


def test_ahead_of_time_kernels_move_16_bytes_at_once(compiled: Path) -> None:
    machine_code = read(tool("cuobjdump"), "--dump-sass", str(compiled))
    functions = re.split(r"Function : ", machine_code)[1:]
    assert functions
    for function in functions:
        name = function.split(maxsplit=1)[0]
        instructions = re.findall(r"\b(LDG\.E\S*|STG\.E\S*|LDL\S*|STL\S*|ATOM\S*|RED\.E\S*)", function)
        assert not [found for found in instructions if not found.startswith(("LDG", "STG"))], name
        elements = int(re.search(r"kernelI.*?Li(\d+)ELb", name)[1])
        wide = {found.split(".128")[0] for found in instructions if ".128" in found}
        assert wide == ({"LDG.E", "STG.E"} if elements > 1 else set()), name


@pytest.mark.parametrize("forced", [False, True])
def test_ahead_of_time_a_failing_cuda_compiler_leaves_the_rest(forced: bool, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None or shutil.which(COMPILER) is None:
        pytest.skip("no CUDA compiler, or no C++ compiler")
    broken = tmp_path / "cuda" / "bin" / "nvcc"
    broken.parent.mkdir(parents=True)
    broken.write_text(f'#!/bin/sh\ncase "$*" in *--dryrun*|*--list*) exec {nvcc} "$@";; esac\nexit 7\n')
    broken.chmod(0o755)
    source = cuda_source(tmp_path / "source")
    done = build(source, tmp_path, CUDA_HOME=str(tmp_path / "cuda"), FORCE_CUDA="1" if forced else "")
    assert (done.returncode != 0) == forced, done.stderr
    assert "exit status 7" in done.stderr
    assert forced or list((tmp_path / "contrastseg_fast").glob("_C.*"))
    assert not list((tmp_path / "contrastseg_fast").glob("_C_cuda*"))
