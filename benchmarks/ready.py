"""`python -m benchmarks.ready --out FILE`: builds the libraries unless they load, records the machine."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.timing import Settings
from contrastseg_fast import _backend

ROOT = Path(__file__).resolve().parent.parent


def missing(device: str) -> dict[str, str]:
    """The backends that cannot run, and why."""
    reasons = {"cpu": _backend.cpu_error()}
    if device == "cuda":
        card = torch.device("cuda", torch.cuda.current_device())
        reasons |= {name: _backend.unavailable(name, card) for name in ("triton", "cuda")}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def build() -> bool:
    """Build both libraries in place, for the card's architecture alone; whether that succeeded."""
    architecture = ".".join(map(str, torch.cuda.get_device_capability()))
    environment = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file: what was done, the machine, the backends"
    )
    parser.add_argument("--commit", help="of the sources, where git cannot tell it")
    parser.add_argument("--trial", action="store_true", help="on the CPU; builds nothing")
    parser.add_argument("--built", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = "cpu" if options.trial else "cuda"
    absent = missing(device)
    if absent.keys() & {"cpu", "cuda"} and not options.trial and not options.built:
        print(f"building: {absent}", flush=True)
        build()
        # A library that could not be loaded is tried again by a new process.
        again = [sys.executable, "-m", "benchmarks.ready", "--built", "--out", str(options.out)]
        again += ["--commit", options.commit] if options.commit else []
        return subprocess.run(again, cwd=ROOT, check=False).returncode
    system = {"cpu": {"brand_raw": record.cpu_name()}, **platform.uname()._asdict()}
    made = record.new("", system, Settings(), device, options.commit)
    found: dict[str, Any] = {
        "how": "built in place" if options.built else "found",
        "missing": absent,
        "record": {key: made[key] for key in ("commit", "dirty", "machine", "versions", "settings")},
    }
    record.save(found, options.out)
    print(found["how"], absent)
    return int(bool(absent))


if __name__ == "__main__":
    raise SystemExit(main())
