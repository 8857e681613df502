"""Compiles Triton kernels for cards that are not there, and reads what came out.

A file `aot_<op>.py` beside this one says what to compile: `specs(capability)` yields a `Spec` for every entry
of the op's launch table. Interpreted kernels cannot be compiled, so `compile_all` runs this file as a program
of its own, `python tests/ahead_of_time.py NAME...`, which prints one JSON object by name.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # a block's limit in bytes
TENSOR_MEMORY_COLUMNS = 512

_HERE = Path(__file__).parent


class Spec(NamedTuple):
    """One kernel as it is launched."""

    name: str  # unique for a capability
    kernel: Any  # the jitted function
    signature: dict[str, str]  # type of every argument: "*bf16", "i32", "fp32" or "constexpr"
    constants: dict[str, Any]  # values of the constexpr arguments
    num_warps: int
    num_stages: int
    instructions: tuple[str, ...] = ()  # what must occur in the machine code
    divisible: tuple[str, ...] = ()  # integer arguments that are multiples of 16, as all pointers are


def modules() -> list[str]:
    """The files that say what to compile."""
    return sorted(path.stem for path in _HERE.glob("aot_*.py"))


def all_specs() -> Iterator[tuple[int, Spec]]:
    """Every kernel of every file, for every card."""
    for module in modules():
        for capability in CAPABILITIES:
            for spec in importlib.import_module(module).specs(capability):
                yield capability, spec


def identifier(capability: int, spec: Spec) -> str:
    """What a test calls it."""
    return f"sm_{capability}-{spec.name}"


def compile_all(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Compile the kernels of those identifiers in processes of their own; what each came out as.

    Each has either "error", or "registers", "stack", "local", "shared", "tensor_memory", "seconds" and
    "instructions" (the mnemonics that occur).
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def _compile(capability: int, spec: Spec) -> dict[str, Any]:
    import time

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = spec.kernel.arg_names
    aligned = [
        (arguments.index(name),)
        for name, kind in spec.signature.items()
        if kind.startswith("*") or name in spec.divisible
    ]
    source = ASTSource(
        fn=spec.kernel,
        signature=spec.signature,
        constexprs=spec.constants,
        attrs={position: [["tt.divisibility", 16]] for position in aligned},
    )
    began = time.perf_counter()
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
    )
    seconds = time.perf_counter() - began
    return {
        **_resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "seconds": seconds,
    }


def _resources(cubin: bytes) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def read(*options: str) -> str:
            command = [str(tools / "cuobjdump"), *options, file.name]
            path = f"{tools}:{os.environ['PATH']}"
            return subprocess.run(
                command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
            ).stdout

        usage = read("--dump-resource-usage")
        machine_code = read("--dump-sass")
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    mnemonics = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", machine_code)
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "instructions": sorted(set(mnemonics)),
        "spilled": sum(name.startswith(("LDL", "STL")) for name in mnemonics),
    }


def _compile_named(name: str) -> tuple[str, dict[str, Any]]:
    capability, spec = next(pair for pair in all_specs() if identifier(*pair) == name)
    try:
        return name, _compile(capability, spec)
    except Exception as error:  # a compiler's own; told by the test of this kernel
        return name, {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        print(json.dumps(dict(pool.map(_compile_named, sys.argv[1:]))))
