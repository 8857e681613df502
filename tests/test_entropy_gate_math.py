"""The arithmetic of one location of the entropy gate, which the kernels of all devices share."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++").split()[0]
VALUES = [f"float32_{lanes}" for lanes in (1, 4, 8, 16)] + [f"float64_{lanes}" for lanes in (1, 2, 4, 8)]

CUDA_SOURCE = """
#include <cmath>
#include <cstdint>
#include <cstring>
#define CSF_CAPABILITY device
#include "entropy_gate_math.h"

template <class T>
struct Logits {
  const T* first;
  int64_t stride;
  __device__ T operator()(int64_t m) const { return first[m * stride]; }
};

template <class T>
__global__ void gate_kernel(const T* logits, int64_t classes, int64_t locations, T inverse_log_classes,
                            T* gates, T* grads) {
  const int64_t location = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (location >= locations) return;
  const Logits<T> at{logits + location, locations};
  device::Softmax<T> softmax;
  gates[location] = device::gate(device::uncertainty<T>(at, classes, inverse_log_classes, softmax));
  for (int64_t m = 0; m < classes; ++m) {
    grads[location + m * locations] = device::uncertainty_derivative<T>(softmax, at(m), inverse_log_classes);
  }
}

template __global__ void gate_kernel<float>(const float*, int64_t, int64_t, float, float*, float*);
template __global__ void gate_kernel<double>(const double*, int64_t, int64_t, double, double*, double*);
"""


@pytest.fixture(scope="module", params=["plain", "fused multiply-add"])
def gate_math(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The C++ header as a module, compiled for any processor of this kind, and for this one."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER})")
    library = tmp_path_factory.mktemp("gate_math") / "entropy_gate_math.so"
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
    command += ["-Wall", "-Wno-psabi", "-ffp-contract=fast", "-o", str(library)]
    command += ["-march=native"] if request.param == "fused multiply-add" else []
    command += [
        f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    ]
    subprocess.run([*command, str(ROOT / "tests" / "entropy_gate_math.cpp")], check=True)
    spec = importlib.util.spec_from_file_location("entropy_gate_math", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dtype_of(value: str) -> np.dtype:
    return np.dtype(value.split("_")[0])


def exact(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u and du/dlogits of finite logits `(M, L)`, written so that nothing cancels, in extended precision."""
    z = logits.astype(np.longdouble)
    order = np.argsort(-z, axis=0, kind="stable")
    t = np.take_along_axis(z, order, 0) - z.max(0)
    log_sum = np.log1p(np.exp(t[1:]).sum(0))
    a = np.exp(t - log_sum)
    u = (a * (log_sum - t)).sum(0) / np.log(np.longdouble(len(z)))
    sorted_derivative = a * ((a * t).sum(0) - t) / np.log(np.longdouble(len(z)))
    derivative = np.empty_like(t)
    np.put_along_axis(derivative, order, sorted_derivative, 0)
    return u, derivative


def ulps(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest error, in units of what separates the expected value from the next in the actual dtype."""
    spacing = np.spacing(np.abs(expected).astype(actual.dtype)).astype(np.longdouble)
    return float(np.max(np.abs(actual.astype(np.longdouble) - expected) / spacing))


@pytest.mark.parametrize("value", VALUES)
def test_exp_and_log_to_two_units_in_the_last_place(gate_math: ModuleType, value: str) -> None:
    dtype = dtype_of(value)
    lowest = -87 if dtype == np.float32 else -708
    x = np.concatenate([np.linspace(lowest, 0, 40000), -np.logspace(-40, 0, 800)]).astype(dtype)
    assert ulps(getattr(gate_math, f"exp_{value}")(x), np.exp(x.astype(np.longdouble))) <= 2
    y = np.concatenate(
        [np.linspace(1, 3, 40000), np.logspace(0, 30, 800), 1 + np.logspace(-16, 0, 800)]
    ).astype(dtype)
    log = getattr(gate_math, f"log_{value}")(y)
    assert ulps(log, np.log(y.astype(np.longdouble))) <= 3
    assert log[0] == 0


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("classes", [2, 3, 7, 128])
def test_location_against_extended_precision(gate_math: ModuleType, value: str, classes: int) -> None:
    dtype = dtype_of(value)
    scales = np.repeat([1e-3, 1.0, 8.0, 60.0], 128)
    logits = (np.random.default_rng(classes).standard_normal((classes, 512)) * scales).astype(dtype)
    gates, u, derivative = getattr(gate_math, f"location_{value}")(logits)
    expected_u, expected_derivative = exact(logits)
    steepest = np.abs(expected_derivative).max(0)
    # Rounding z - max z by eps |z - max z| changes exp of it by that much, relatively.
    eps, vanishing = np.finfo(dtype).eps, 1e4 * np.finfo(dtype).tiny
    assert (np.abs(u - expected_u) <= eps * (4 + np.abs(np.log(expected_u))) * expected_u + vanishing).all()
    error = np.abs(derivative - expected_derivative)
    assert (error <= eps * (16 + np.abs(np.log(steepest))) * steepest + vanishing).all()
    assert (u >= 0).all()
    assert (u <= 1).all()
    assert (gates == 2 - u).all()


@pytest.mark.parametrize("value", VALUES)
def test_extreme_logits(gate_math: ModuleType, value: str) -> None:
    inf, nan = np.inf, np.nan
    columns = np.array(
        [
            # certain: u = 0
            [0, -1000, -1000],
            [1e30, -1e30, 1e29],
            [3, -inf, -inf],
            [-inf, -inf, -1e30],
            # constant: u = 1
            [0, 0, 0],
            [1e30, 1e30, 1e30],
            [-5e-39, -5e-39, -5e-39],
            # undefined
            [nan, 0, 0],
            [0, nan, 0],
            [0, 0, nan],
            [inf, 0, 0],
            [inf, -inf, inf],
            [-inf, -inf, -inf],
            # two of three classes left
            [7, -inf, 7],
            [-inf, 0, 0],
            [1e30, 1e30, 0],
        ]
    )
    location = getattr(gate_math, f"location_{value}")
    gates, u, derivative = location(columns.T.astype(dtype_of(value)))
    assert (u[:4] == 0).all()
    assert (gates[:4] == 2).all()
    np.testing.assert_allclose(u[4:7], 1, rtol=1e-6)
    assert (derivative[:, :7] == 0).all()
    assert np.isnan(u[7:13]).all()
    assert np.isnan(derivative[:, 7:13]).any(0).all()
    np.testing.assert_allclose(u[13:], np.log(2) / np.log(3), rtol=1e-6)
    np.testing.assert_allclose(derivative[:, 13:], 0, atol=1e-7)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_header_compiles_for_cuda(tmp_path: Path) -> None:
    source = tmp_path / "gate.cu"
    source.write_text(CUDA_SOURCE)
    command = ["nvcc", "-std=c++17", "-c", f"-I{ROOT / 'csrc'}", "-o", str(tmp_path / "gate.o"), str(source)]
    subprocess.run([*command, "-Werror", "all-warnings"], check=True)
