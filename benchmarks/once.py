"""`python -m benchmarks.once`: every kernel once at odd sizes, for tools that slow kernels a hundredfold.

With `--profile` it runs PDCR's two kernels instead, warmed up, between the marks of CUDA's profiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import pdcr
from benchmarks.operation import OURS
from contrastseg_fast import PDCRLoss, ReceptiveField, functional, problems

PROFILED = pdcr.Size(16384, dtype="bf16")


def every_kernel(device: str) -> None:
    """Both passes of every operator, in 16 and 32 bits, with and without the demand for equal bits."""
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        for dtype in (torch.float32, torch.bfloat16):
            for name, call in _calls(device, dtype).items():
                print(f"{name}, {dtype}, deterministic: {deterministic}", flush=True)
                call()
    torch.use_deterministic_algorithms(False)


def _calls(device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    return {
        "pdcr_loss, two classes": lambda: _loss(device, dtype, 257, 100, 2),
        "pdcr_loss, wide": lambda: _loss(device, dtype, 130, 300, 5),
        "pdcr_loss, released": lambda: _loss(device, dtype, 130, 64, 3, variant="released"),
        "pdcr_loss, grouped rows": lambda: _grouped_loss(device, dtype),
        "entropy_gate": lambda: _gate(device, dtype, torch.contiguous_format),
        "entropy_gate, channels_last": lambda: _gate(device, dtype, torch.channels_last),
        "foreground_ratio": lambda: _ratios(device),
        "PDCRLoss": lambda: _call(device, dtype),
        "PDCRLoss, pairs across images": lambda: _call(
            device, dtype, pairs="batch", patch_sizes=(5, 13), sampler="random"
        ),
    }


def _loss(device: str, dtype: torch.dtype, count: int, channels: int, classes: int, **options: str) -> None:
    vectors = torch.randn(2, count, channels, device=device, dtype=dtype, requires_grad=True)
    ratios = torch.rand(2, count, classes, device=device).softmax(-1)
    ratios[:, : count // 2] = ratios[:, :1]
    functional.pdcr_loss(vectors, ratios, **options).backward()


def _grouped_loss(device: str, dtype: torch.dtype) -> None:
    """As of images with many vectors: most ratios are those of one class, in two of three images."""
    vectors = torch.randn(3, 421, 100, device=device, dtype=dtype, requires_grad=True)
    classes = torch.rand(3, 421, device=device).gt(0.8).long()
    ratios = torch.nn.functional.one_hot(classes, 2).float()
    ratios[:, ::9] = torch.rand(3, 47, 2, device=device).softmax(-1)
    ratios[2] = torch.rand(421, 2, device=device).softmax(-1)
    with mock.patch.object(problems, "FEWEST_GROUPED", 1):
        functional.pdcr_loss(vectors, ratios).backward()


def _gate(device: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    def drawn(channels: int) -> Tensor:
        x = torch.randn(2, channels, 33, 35, device=device, dtype=dtype)
        return x.contiguous(memory_format=layout).requires_grad_()

    functional.entropy_gate(drawn(19), drawn(3)).sum().backward()


def _ratios(device: str) -> None:
    for extents, size in (((67, 93), (7, 10)), ((21, 18, 27), (5, 4, 7))):
        labels = torch.randint(4, (2, *extents), device=device)
        starts = functional.sample_grid(extents, 60, device=device)
        functional.foreground_ratio(labels, starts, size, 4)
        functional.foreground_ratio(labels, starts.flip(0) - 3, size, 4, border="clip", ignore_index=1)


def _call(device: str, dtype: torch.dtype, **options: Any) -> None:
    """Two layers, from maps to their gradients."""
    fields = [
        ReceptiveField((field,) * 2, (stride,) * 2, (-(field // 2),) * 2)
        for stride, field in ((2, 7), (4, 19))
    ]
    maps = [
        torch.randn(2, channels, 64 // stride, 96 // stride, device=device, dtype=dtype, requires_grad=True)
        for channels, stride in ((17, 2), (40, 4))
    ]
    PDCRLoss(fields, 3, num_samples=150, **options)(
        maps, torch.randint(3, (2, 64, 96), device=device)
    ).backward()


def profiled(device: str) -> None:
    """PDCR forward and backward, marked for a profiler at the second call."""
    size = PROFILED if device == "cuda" else pdcr.OPERATION.tiny(PROFILED)
    run = pdcr.OPERATION.implementation(OURS).prepare(size, pdcr.OPERATION.make_inputs(size, device))
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="PDCR's two kernels for a profiler")
    parser.add_argument("--trial", action="store_true", help="on the CPU")
    options = parser.parse_args(arguments)
    device = "cpu" if options.trial else "cuda"
    (profiled if options.profile else every_kernel)(device)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
