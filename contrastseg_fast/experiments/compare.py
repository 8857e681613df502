"""Fast against reference loss at one N: value, gradient, time and peak memory, in a process of its own."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from contrastseg_fast import functional, reference
from contrastseg_fast.experiments.data import load_volume, split_slices

SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
CHANNELS = 64
PATCH = 11
SECONDS = 1.0  # spent on timing one size, if single calls are shorter

Loss = Callable[..., Tensor]
IMPLEMENTATIONS: dict[str, Loss] = {"fast": functional.pdcr_loss, "reference": reference.pdcr_loss}


def compare(data: Path, num_vectors: int, seed: int) -> dict[str, Any]:
    """Run this file for one size in a fresh process; what it found before it died, if it died, is kept."""
    arguments = ["--data", str(data), "--num-vectors", str(num_vectors), "--seed", str(seed)]
    command = [sys.executable, "-m", "contrastseg_fast.experiments.compare", *arguments]
    result: dict[str, Any] = {"num_vectors": num_vectors, "fast": {}, "reference": {}}
    process = subprocess.run(  # in a session of its own: Ctrl-C is for the demo, which ends it quietly
        command, stdout=subprocess.PIPE, text=True, check=False, start_new_session=True
    )
    for line in process.stdout.splitlines():
        name, found = json.loads(line)
        result[name] = {**result[name], **found} if isinstance(found, dict) else found
    if process.returncode != 0:
        result["reference"].setdefault("refused", f"its process ended with status {process.returncode}")
    return result


def pairs_of_slice(data: Path, num_vectors: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random vectors `(1, N, CHANNELS)`, and the ratios of patches at random places of a held-out slice."""
    volume = load_volume(data)
    held_out = split_slices(len(volume.labels)).test
    labels = torch.from_numpy(volume.labels[held_out[len(held_out) // 2]])[None]
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(1, num_vectors, CHANNELS, generator=generator)
    places = [torch.randint(extent, (num_vectors,), generator=generator) for extent in labels.shape[1:]]
    starts = torch.stack(places, -1) - PATCH // 2
    ratios, _ = functional.foreground_ratio(labels, starts, (PATCH, PATCH), volume.num_classes)
    return vectors, ratios


def loss_and_gradient(loss: Loss, vectors: Tensor, ratios: Tensor) -> tuple[float, Tensor]:
    vectors = vectors.detach().requires_grad_()
    value = loss(vectors, ratios, class_distance="tv")
    (gradient,) = torch.autograd.grad(value, vectors)
    return value.item(), gradient


def available_bytes() -> float:
    """What the machine has free, or less where a control group limits this process."""
    free = math.inf
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def reference_bytes(num_vectors: int, num_classes: int) -> int:
    """What the reference needs beyond its inputs: 12 N x N fp32 matrices, or two for every class if more."""
    return 4 * num_vectors**2 * max(12, 2 * num_classes + 1)


def peak_bytes(action: Callable[[], Any]) -> tuple[Any, int]:
    """The action's result, and how far it raised the resident memory of this process at its highest."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():  # no Linux: only what exceeds the highest so far can be seen
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return action(), unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    reset.write_text("5")  # the highest becomes the present
    before = _resident("VmRSS")
    result = action()
    return result, max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(vectors: Tensor, ratios: Tensor, emit: Callable[[str, Any], None]) -> None:
    """Emit value, peak and time of both implementations, and how far they differ."""
    for loss in IMPLEMENTATIONS.values():
        loss_and_gradient(loss, vectors[:, :64], ratios[:, :64])
    values: dict[str, tuple[float, Tensor]] = {}
    for name, loss in IMPLEMENTATIONS.items():
        needed, free = reference_bytes(vectors.shape[1], ratios.shape[-1]), available_bytes()
        if name == "reference" and needed > 0.8 * free:
            emit(name, {"refused": f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"})
            continue
        try:
            values[name], peak = peak_bytes(partial(loss_and_gradient, loss, vectors, ratios))
        except (MemoryError, RuntimeError) as error:
            emit(name, {"refused": f"failed: {str(error).splitlines()[0]}"})
            continue
        emit(name, {"value": values[name][0], "peak_bytes": peak})
    if len(values) == 2:
        (fast, fast_gradient), (exact, gradient) = values["fast"], values["reference"]
        emit("value_difference", abs(fast - exact) / abs(exact))
        emit("gradient_difference", ((fast_gradient - gradient).norm() / gradient.norm()).item())
    seconds: dict[str, list[float]] = {name: [] for name in values}
    end = time.perf_counter() + SECONDS
    while not all(seconds.values()) or time.perf_counter() < end:
        for name, times in seconds.items():
            begin = time.perf_counter()
            loss_and_gradient(IMPLEMENTATIONS[name], vectors, ratios)
            times.append(time.perf_counter() - begin)
    for name, times in seconds.items():
        emit(name, {"seconds": median(times), "calls": len(times)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num-vectors", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    vectors, ratios = pairs_of_slice(args.data, args.num_vectors, args.seed)
    measure(vectors, ratios, lambda name, found: print(json.dumps([name, found]), flush=True))


if __name__ == "__main__":
    main()
