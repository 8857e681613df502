"""What the tests share: poisoned memory, error measures, and ratios like those of real masks."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Threads that wait by spinning slow small kernels down a hundredfold where other work shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels then run on CPU tensors


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill freshly allocated tensors with NaN (floating) or the largest value (integer), and seed torch."""
    was_on = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(was_on, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = was_filling


def normwise_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm and fp64; NaN and infinities show."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return (difference / torch.linalg.vector_norm(expected.double()).clamp(min=1e-300)).item()


def blob_labels(batch: int, spatial_shape: tuple[int, ...], num_classes: int, scale: int = 8) -> Tensor:
    """Label maps `(B, *spatial)` int64 of smooth random regions about `scale` pixels wide."""
    coarse = torch.randn(batch, num_classes, *(max(2, extent // scale) for extent in spatial_shape))
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(spatial_shape)]
    smooth = torch.nn.functional.interpolate(coarse, spatial_shape, mode=mode, align_corners=False)
    return smooth.argmax(1)


def blob_ratios(batch: int, count: int, num_classes: int, box: int = 5) -> Tensor:
    """Ratios `(B, N, M)` fp32 of boxes in smooth random label maps: many are equal, as in real masks."""
    side = max(16, 2 * int(count**0.5) + 1)
    one_hot = torch.nn.functional.one_hot(blob_labels(batch, (side, side), num_classes), num_classes)
    counts = torch.nn.functional.avg_pool2d(
        one_hot.movedim(-1, 1).float(), box, stride=1, padding=box // 2, divisor_override=1
    )
    flat = counts.flatten(2).mT / box**2
    return flat[:, torch.arange(count) * flat.shape[1] // max(count, 1)].contiguous()


def random_ratios(batch: int, count: int, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Proportions `(B, N, M)` that are all different."""
    return torch.rand(batch, count, num_classes, dtype=torch.float64).softmax(-1).to(dtype)
