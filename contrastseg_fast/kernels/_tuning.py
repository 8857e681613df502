"""Launch parameters, and the choice of them by measurement if requested.

With `CONTRASTSEG_FAST_AUTOTUNE=1`, the first call of every family of shapes times the candidates on its own
data and keeps the fastest, by card and Triton version, in `launch.json` of `CONTRASTSEG_FAST_CACHE` (default:
~/.cache/contrastseg_fast). Otherwise the tables in the kernels' plans decide. `forced` overrules both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Launch(NamedTuple):
    """Tile sizes and launch options of one kernel."""

    block_i: int
    block_j: int
    num_warps: int
    num_stages: int
    overlapped: bool = False  # by the kernel for sm_90 whose products overlap with other instructions


_chosen: dict[str, Launch] = {}
_forced: dict[str, Launch] = {}  # by what the names of their families begin with


@contextmanager
def forced(prefix: str, launch: Launch) -> Iterator[None]:
    """Use `launch` for all families whose names begin with `prefix`, to measure launches of no table."""
    _forced[prefix] = launch
    try:
        yield
    finally:
        del _forced[prefix]


def tuned(
    family: str,
    default: Launch,
    candidates: Sequence[Launch],
    tensor: Tensor,
    run: Callable[[Launch], object],
) -> Launch:
    """The launch for a family of shapes: `default`, unless tuning is requested or a launch is forced.

    Args:
        family: what the choice depends on, in words.
        tensor: on the card that `run` uses.
        run: does the work with a given launch; one that does not fit the card raises.
    """
    for prefix, launch in _forced.items():
        if family.startswith(prefix):
            return launch
    if os.environ.get("CONTRASTSEG_FAST_AUTOTUNE") != "1" or not tensor.is_cuda:
        return default
    key = f"{torch.cuda.get_device_name(tensor.device)}, Triton {triton.__version__}: {family}"
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return default
        file = _file()
        known = json.loads(file.read_text()) if file.exists() else {}
        if key not in known:
            milliseconds = {launch: _time(run, launch) for launch in dict.fromkeys([default, *candidates])}
            known[key] = min(milliseconds, key=milliseconds.__getitem__)
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(known, indent=1))
            scratch.replace(file)
        _chosen[key] = Launch(*known[key])
    return _chosen[key]


def _file() -> Path:
    folder = os.environ.get("CONTRASTSEG_FAST_CACHE", "~/.cache/contrastseg_fast")
    return Path(folder).expanduser() / "launch.json"


def _time(run: Callable[[Launch], object], launch: Launch) -> float:
    try:
        return triton.testing.do_bench(lambda: run(launch), warmup=10, rep=50, return_mode="median")
    except (triton.runtime.errors.OutOfResources, triton.CompilationError):
        return float("inf")
