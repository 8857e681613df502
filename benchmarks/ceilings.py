"""What the machine can do at most: bytes copied, products and exponentials, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import device as device_timing
from benchmarks.operation import Work

_EXPONENTIALS = 64  # of every element read
_ROUNDS = 9
MATRIX_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}

Ceilings = dict[str, Any]


def measure(device: str) -> Ceilings:
    """Bytes read and written a second by a copy; flops a second by dtype; exponentials a second.

    Random values throughout; medians. On the CPU sizes are small: it serves trials of the commands.
    """
    on_cuda = device == "cuda"
    count = 2**29 if on_cuda else 2**16  # 2 GiB
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    ceilings: Ceilings = {
        "copy_bytes_per_second": 2 * source.nbytes / _seconds(lambda: target.copy_(source), on_cuda)
    }
    extent = 8192 if on_cuda else 64
    products = {}
    for name, dtype in MATRIX_DTYPES.items():
        if name == "tf32" and not on_cuda:
            continue
        a, b = (torch.randn(extent, extent, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        with _tf32(name == "tf32"):
            products[name] = 2 * extent**3 / _seconds(lambda: torch.mm(a, b, out=product), on_cuda)  # noqa: B023
    ceilings["flops_per_second"] = products

    exponentiate = torch.compile(_many_exponentials) if on_cuda else _many_exponentials
    few = source[: 2**26]
    ceilings["exponentials_per_second"] = (
        _EXPONENTIALS * few.numel() / _seconds(lambda: exponentiate(few), on_cuda)
    )
    return ceilings


def floor(work: Work, ceilings: Ceilings) -> dict[str, Any]:
    """The least seconds that the work takes, and which of its three parts bounds it."""
    seconds = {
        "bytes": work.bytes / ceilings["copy_bytes_per_second"],
        "flops": work.flops / ceilings["flops_per_second"].get(work.dtype, float("inf")),
        "exponentials": work.exponentials / ceilings["exponentials_per_second"],
    }
    bound = max(seconds, key=lambda part: seconds[part])
    return {
        "bytes": work.bytes,
        "flops": work.flops,
        "exponentials": work.exponentials,
        "seconds": seconds[bound],
        "bound": bound,
    }


def lines(ceilings: Ceilings) -> list[str]:
    """The ceilings as the terminal shows them."""
    products = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings["flops_per_second"].items())
    return [
        f"copy           {ceilings['copy_bytes_per_second'] / 1e12:.3g} TB/s, read and written",
        f"products       {products} TFLOP/s",
        f"exponentials   {ceilings['exponentials_per_second'] / 1e12:.3g} T/s",
    ]


def _many_exponentials(x: Tensor) -> Tensor:
    for _ in range(_EXPONENTIALS):
        x = torch.exp(-x)
    return x


@contextmanager
def _tf32(allowed: bool) -> Any:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _seconds(run: Callable[[], object], on_cuda: bool) -> float:
    def once() -> tuple[Tensor, ...]:
        run()
        return ()

    for _ in range(3):
        run()
    if on_cuda:
        return median(device_timing.timed(once, 3, 1e-3).on_device for _ in range(_ROUNDS))
    durations = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        run()
        durations.append(time.perf_counter() - begin)
    return median(durations)
