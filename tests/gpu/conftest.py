"""The device under test. Without CUDA everything skips, unless `--device cpu` asks for what runs there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from dry_jit import serve_cpu_tensors

from contrastseg_fast import _backend

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's condition for equal bits


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cuda", "cpu", "interpreter", "launches"),
        default="cuda",
        help="where tests/gpu runs; on the CPU with small sizes and backend='auto', there also with the "
        "Triton kernels in Triton's interpreter; 'launches' is for tests/dry_jit.py (%(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device", "cuda") == "interpreter":
        interpret_kernels()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that the tests run on."""
    if request.config.getoption("device", "cuda") != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device; --device cpu runs what makes sense without one")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for tests of what only CUDA has."""
    if device.type != "cuda":
        pytest.skip("about CUDA alone")
    return device


@pytest.fixture(autouse=True)
def poisoned_memory(device: torch.device) -> Iterator[None]:
    """Leave NaN in the memory that the allocator hands out next; seed torch; keep its global switches."""
    was_on = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(0)
    if device.type == "cuda":
        poison = [
            torch.full((size,), torch.nan, device=device) for size in (1 << 8, 1 << 16, 1 << 18, 1 << 26)
        ]
        del poison
    yield
    torch.use_deterministic_algorithms(was_on, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = was_filling


@pytest.fixture
def deterministic() -> None:
    """Ask for equal bits; fresh memory is then filled with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(params=["fastest", "deterministic"])
def determinism(request: pytest.FixtureRequest) -> str:
    """Kernels chosen for speed, and those that give equal bits."""
    if request.param == "deterministic":
        request.getfixturevalue("deterministic")
    return request.param


@pytest.fixture
def triton(device: torch.device) -> str:
    """The backend of the pair and the ratio kernels."""
    return _explicit("triton", device)


@pytest.fixture(params=["cuda", "triton"])
def gate_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """The backends of the entropy gate."""
    if device.type == "cpu" and request.param == "triton":
        pytest.skip("the CPU has one backend")
    return _explicit(request.param, device)


@pytest.fixture
def fit(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """A size, or where the CPU computes the second, smaller one."""
    in_full = request.config.getoption("device", "cuda") in ("cuda", "launches")
    return lambda size, on_cpu: size if in_full else min(size, on_cpu)


def interpret_kernels() -> None:
    """Run what runs on CUDA on the CPU instead, for the rest of this process, kernels interpreted."""
    os.environ["TRITON_INTERPRET"] = "1"
    serve_cpu_tensors()


def _explicit(backend: str, device: torch.device) -> str:
    if device.type == "cpu":
        return "auto"
    if (reason := _backend.unavailable(backend, device)) is not None:
        pytest.skip(f"backend={backend!r}: {reason}")
    return backend
