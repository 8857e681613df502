"""Compiles what `dry_jit.py` recorded, for cards that this machine does not need, and reads the result."""

from __future__ import annotations

import collections
import concurrent.futures
import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dry_jit import Recording, Variant

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # a block's limit in bytes
TENSOR_MEMORY_COLUMNS = 512
_HERE = Path(__file__).parent


class Compiled(NamedTuple):
    """The result for one variant: why it does not compile, or what it takes of the card."""

    error: str = ""
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    tensor_memory: int = 0  # columns
    instructions: dict[str, int] = {}  # noqa: RUF012  the number of each in the code, if it was read
    in_flight: dict[str, int] = {}  # noqa: RUF012  those of sm_90 while one group of products is under way

    def count(self, pattern: str) -> int:
        """The number of instructions whose mnemonic begins with a match."""
        return _matching(self.instructions, pattern)

    def count_in_flight(self, pattern: str) -> int:
        """As `count`, of those in `in_flight`."""
        return _matching(self.in_flight, pattern)


def _matching(instructions: dict[str, int], pattern: str) -> int:
    return sum(count for name, count in instructions.items() if re.match(pattern, name))


def record(capability: int, sources: Iterable[str]) -> Recording:
    """What these sources launch (`dry_jit.py` lists them), recorded in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "recording"
        command = [sys.executable, "-O", str(_HERE / "dry_jit.py"), str(capability), str(out), *sources]
        _run(command)
        return pickle.loads(out.read_bytes())


def compile_all(
    capability: int, variants: Iterable[Variant], disassembled: Collection[str]
) -> dict[Variant, Compiled]:
    """Compile for a card, with one process per core, and read the code of some kernels."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, out = Path(folder) / "variants", Path(folder) / "compiled"
        wanted.write_bytes(pickle.dumps(list(variants)))
        paths = [str(wanted), str(out)]
        _run([sys.executable, str(_HERE / "ahead_of_time.py"), str(capability), *paths, *disassembled])
        return pickle.loads(out.read_bytes())


def _run(command: list[str]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])


def _compile(capability: int, variant: Variant, disassembled: bool) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(
        kernel,
        dict(variant.signature),
        dict(variant.constants),
        {path: [list(each) for each in attribute] for path, attribute in variant.attributes},
    )
    try:
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options)
        )
    except Exception as error:  # a compiler's own
        return Compiled(error=f"{type(error).__name__}: {error}")
    metadata = compiled.metadata
    return Compiled(
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", 0) or 0,
        **_resources(compiled.asm["cubin"], disassembled),
    )


def _resources(cubin: bytes, disassembled: bool) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        options = ["--dump-resource-usage", *(["--dump-sass"] if disassembled else [])]
        command = [str(tools / "cuobjdump"), *options, file.name]
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    mnemonics = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text)
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "instructions": dict(collections.Counter(mnemonics)),
        "in_flight": _in_flight(text) if disassembled else {},
    }


def _in_flight(code: str) -> dict[str, int]:
    """The instructions that follow a wait for all groups of products but one, up to that for all."""
    found: collections.Counter[str] = collections.Counter()
    waiting_for = "0"
    for name, operands in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*);", code):
        if name.startswith("WARPGROUP.DEPBAR"):
            waiting_for = operands.split("gsb0, 0x")[1].strip()
        elif waiting_for != "0":
            found[name] += 1
    return dict(found)


def main(capability: int, wanted: Path, out: Path, disassembled: list[str]) -> None:
    sys.path[:0] = [str(_HERE.parent), str(_HERE)]
    variants = pickle.loads(wanted.read_bytes())
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        read = [variant.kernel in disassembled for variant in variants]
        results = pool.map(_compile, [capability] * len(variants), variants, read)
        out.write_bytes(pickle.dumps(dict(zip(variants, results, strict=True))))


if __name__ == "__main__":
    from ahead_of_time import main as run  # what is pickled belongs to a module that others can import

    run(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
