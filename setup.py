"""Builds the C++ extension when a compiler is there; without one the package installs as pure Python."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import setup

CPU_SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp")) + sorted(
    str(path) for path in Path("csrc/cpu").glob("*.cpp")
)


def _cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "contrastseg_fast._C",
        CPU_SOURCES,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],  # the stable ABI of torch 2.11
        extra_compile_args=[
            "-O3",
            "-fvisibility=hidden",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-ffp-contract=fast",
            "-Wno-psabi",
        ],
        py_limited_api=True,
    )


def _build_command():
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        """A build that fails leaves a pure-Python package, unless CONTRASTSEG_FAST_REQUIRE_EXTENSION=1."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if os.environ.get("CONTRASTSEG_FAST_REQUIRE_EXTENSION") == "1":
                    raise
                warnings.warn(
                    f"contrastseg_fast: no C++ extension, installing pure Python: {error}", stacklevel=1
                )
                self.extensions = []

    return OptionalBuild


def _extension_arguments() -> dict:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        if os.environ.get("CONTRASTSEG_FAST_REQUIRE_EXTENSION") == "1":
            sys.exit(f"contrastseg_fast: the C++ compiler {compiler!r} was not found")
        warnings.warn(
            f"contrastseg_fast: no C++ compiler ({compiler!r}), installing pure Python", stacklevel=1
        )
        return {}
    return {
        "ext_modules": [_cpu_extension()],
        "cmdclass": {"build_ext": _build_command()},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**_extension_arguments())
