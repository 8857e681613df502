"""The sources compile with the headers of the oldest torch that the package claims; CI has a newer one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
HEADERS = ROOT / "tests" / "third_party" / "torch_2_11_headers"  # the installed torch's are not looked for
INCLUDES = [str(ROOT / "csrc"), str(HEADERS)]
STANDARD = "-std=c++17"  # that of torch 2.11's build helper
COMPILER = os.environ.get("CXX", "c++").split()[0]
CPP, CUDA = (
    sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob(pattern)
        if "#include <torch/" in path.read_text()
    )
    for pattern in ("*.cpp", "*.cu")
)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, whose macros and options the libraries are built with."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER})")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(build: ModuleType, source: str | Path) -> str:
    """What the C++ compiler says about a file: nothing where all is well."""
    command = [COMPILER, STANDARD, "-fsyntax-only", "-w", f"-D{'='.join(build.STABLE_ABI)}"]
    command += [f"-I{path}" for path in INCLUDES]
    return subprocess.run([*command, str(source)], capture_output=True, text=True).stderr


@pytest.mark.parametrize("source", CPP)
def test_cpp(build: ModuleType, source: str) -> None:
    assert check(build, source) == ""


@pytest.mark.parametrize("source", CUDA)
def test_cuda(build: ModuleType, source: str, tmp_path: Path) -> None:
    nvcc = build._find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [*build._launcher_command(nvcc, INCLUDES), "-ptx", source, "-o", str(tmp_path / "any.ptx")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_newer_names_are_found(build: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "newer.cpp"
    source.write_text(
        "#include <torch/headeronly/version.h>\n"
        "#include <torch/csrc/stable/ops.h>\n"
        "static_assert(TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR == 11);\n"
    )
    assert check(build, source) == ""
    with source.open("a") as file:
        file.write("void newer() { STABLE_TORCH_ERROR_CODE_CHECK(0); }\n")  # of torch 2.12
    assert "STABLE_TORCH_ERROR_CODE_CHECK" in check(build, source)
