"""Builds the C++ and CUDA libraries where compilers are there; without any the package is pure Python.

CXX names the C++ compiler. nvcc is looked for in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda; no GPU is
needed. FORCE_CUDA=1 makes the CUDA library mandatory, FORCE_CUDA=0 leaves it out, and TORCH_CUDA_ARCH_LIST
("8.0;9.0+PTX") overrides its architectures. With CONTRASTSEG_FAST_REQUIRE_EXTENSION=1 a build that fails is
an error; else the package installs without that library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup

STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")  # of torch 2.11
CUDA_ARCHITECTURES = ("80", "90", "100")
CUDA_LAUNCHERS = ("csrc/cuda/entropy_gate_launch.cu",)

CXX = os.environ.get("CXX", "c++").split()[0]
REQUIRED = os.environ.get("CONTRASTSEG_FAST_REQUIRE_EXTENSION") == "1"
FORCE_CUDA = os.environ.get("FORCE_CUDA")


def _sources(*patterns: str) -> list[str]:
    return [str(path) for pattern in patterns for path in sorted(Path("csrc").glob(pattern))]


def _extension(name: str, sources: list[str], compile_args: list[str], **arguments) -> Extension:
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        f"contrastseg_fast.{name}",
        sources,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[STABLE_ABI],
        extra_compile_args=["-O3", "-fvisibility=hidden", *compile_args],
        py_limited_api=True,
        **arguments,
    )


def _cpu_extension() -> Extension:
    unobserved = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
    return _extension("_C", _sources("*.cpp", "cpu/**/*.cpp"), unobserved)


def _find_nvcc() -> str | None:
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), None, "/usr/local/cuda"]
    for folder in folders:
        nvcc = shutil.which("nvcc", path=None if folder is None else os.path.join(folder, "bin"))
        if nvcc is not None:
            return nvcc
    return None


def _cuda_library_folder(nvcc: str) -> str:
    """Where the static CUDA runtime is; nvcc tells its own place, since the one in PATH may be a wrapper."""
    told = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True, check=True)
    top = Path(re.search(r"TOP=(.+)", told.stderr)[1].strip()).resolve()
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (top / folder / "libcudart_static.a").exists():
            return str(top / folder)
    raise FileNotFoundError(f"no libcudart_static.a below {top}")


def _cuda_extension(nvcc: str) -> Extension:
    return _extension(
        "_C_cuda",
        _sources("cuda/*.cpp"),
        [],
        library_dirs=[_cuda_library_folder(nvcc)],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        # Where torch has CUDA, libtorch.so brings in the library that knows the current stream.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--exclude-libs,ALL"],
    )


def _architectures(nvcc: str) -> Iterator[str]:
    """nvcc's options: machine code for every architecture, PTX for the last or those marked with it."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted:
        for entry in re.split(r"[;\s]+", wanted.strip()):
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
            if match is None:
                raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected numbers as in '8.0;9.0+PTX', got {entry!r}")
            name = "".join(match[part] for part in (1, 2, 3))
            yield f"-gencode=arch=compute_{name},code=sm_{name}"
            if match[4]:
                yield f"-gencode=arch=compute_{name},code=compute_{name}"
        return
    told = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout.split()
    names = [name for name in CUDA_ARCHITECTURES if f"compute_{name}" in told]
    for name in names:
        yield f"-gencode=arch=compute_{name},code=sm_{name}"
    yield f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"


def _launcher_command(nvcc: str, includes: list[str]) -> list[str]:
    """What compiles a .cu file, but for the file and what to make of it."""
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", *(["-ccbin", CXX] if "CXX" in os.environ else [])]
    macros = ["-DUSE_CUDA", f"-D{'='.join(STABLE_ABI)}"]
    options = ["-O3", "-std=c++17", "--threads", "0", *_architectures(nvcc), *host, *macros]
    return [nvcc, *options, *(f"-I{path}" for path in includes)]


def _compile_launcher(nvcc: str, source: str, folder: str, includes: list[str]) -> str:
    """Compile a .cu file; returns the object file."""
    target = Path(folder) / Path(source).with_suffix(".cu.o")
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*_launcher_command(nvcc, includes), "-c", source, "-o", str(target)], check=True)
    return str(target)


def _build_command(nvcc: str | None) -> type:
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        """Leaves out a library that cannot be built, unless it is required."""

        def build_extensions(self) -> None:
            self.failed: list[Extension] = []
            super().build_extensions()
            self.extensions = [extension for extension in self.extensions if extension not in self.failed]

        def build_extension(self, extension: Extension) -> None:
            is_cuda = extension.name.endswith("_cuda")
            try:
                if is_cuda:
                    includes = [*extension.include_dirs]
                    for source in CUDA_LAUNCHERS:
                        extension.extra_objects.append(
                            _compile_launcher(nvcc, source, self.build_temp, includes)
                        )
                super().build_extension(extension)
            except Exception as error:
                if REQUIRED or (is_cuda and FORCE_CUDA == "1"):
                    raise
                warnings.warn(f"contrastseg_fast: installing without {extension.name}: {error}", stacklevel=1)
                self.failed.append(extension)

    return OptionalBuild


def _extension_arguments() -> dict:
    if shutil.which(CXX) is None:
        if REQUIRED or FORCE_CUDA == "1":
            raise SystemExit(f"contrastseg_fast: the C++ compiler {CXX!r} was not found")
        warnings.warn(f"contrastseg_fast: no C++ compiler ({CXX!r}), installing pure Python", stacklevel=1)
        return {}
    extensions = [_cpu_extension()]
    nvcc = None if FORCE_CUDA == "0" else _find_nvcc()
    if nvcc is not None:
        try:
            extensions.append(_cuda_extension(nvcc))
        except Exception as error:
            if REQUIRED or FORCE_CUDA == "1":
                raise
            warnings.warn(f"contrastseg_fast: no CUDA library: {error}", stacklevel=1)
    elif FORCE_CUDA == "1":
        raise SystemExit(
            "contrastseg_fast: FORCE_CUDA=1, but no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
        )
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": _build_command(nvcc)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**_extension_arguments())
