"""A small U-Net in mixed precision with PDCR and UAFS, beside itself with the reference in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import blob_labels
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from contrastseg_fast import attach_pdcr, insert_uafs

LAYERS = ("stem", "middle", "deep")
NUM_CLASSES = 3
WINDOW = 20  # steps averaged before curves are compared
TOLERANCE = 0.03  # of the first window's loss


class UNet(nn.Module):
    """Three levels, skip connections, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self._block(1, 16, 1)
        self.middle = self._block(16, 32, 2)
        self.deep = self._block(32, 64, 2)
        self.narrow = self._block(64 + 32, 32, 1)
        self.head = nn.Conv2d(32 + 16, NUM_CLASSES, 1)

    @staticmethod
    def _block(before: int, after: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        half = self.middle(fine)
        coarse = interpolate(self.deep(half), scale_factor=2, mode="nearest")
        decoded = interpolate(self.narrow(torch.cat([coarse, half], 1)), scale_factor=2, mode="nearest")
        return self.head(torch.cat([decoded, fine], 1))


def train(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], steps: int, dtype: torch.dtype, backend: str
) -> tuple[list[float], list[float]]:
    """The segmentation's and PDCR's loss at every step."""
    images = batches[0][0]
    torch.manual_seed(3)
    insert_uafs(model, ["stem", "middle"], NUM_CLASSES, example_input=images, backend=backend)
    pdcr = attach_pdcr(
        model,
        LAYERS,
        NUM_CLASSES,
        example_input=images,
        num_samples=49,
        class_distance="tv",
        patch_size=5,
        backend=backend,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(images.device.type, enabled=dtype == torch.float16)
    model.train()
    curve, pdcr_curve = [], []
    for number in range(steps):
        x, y = batches[number % len(batches)]
        with torch.autocast(images.device.type, dtype=dtype):
            segmentation = cross_entropy(model(x), y)
            regularization = pdcr(y)
        optimizer.zero_grad()
        scaler.scale(segmentation + 0.05 * regularization).backward()
        scaler.step(optimizer)
        scaler.update()
        curve.append(segmentation.detach())
        pdcr_curve.append(regularization.detach())
    return torch.stack(curve).tolist(), torch.stack(pdcr_curve).tolist()


def windows(curve: list[float], width: int) -> Tensor:
    return torch.tensor(curve).unfold(0, width, width).mean(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_curves_of_fast_and_reference_agree(device, dtype: torch.dtype) -> None:
    """Means of 20 steps differ by at most 3 % of the loss that training starts with, and both learn."""
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("the CPU trains in bf16")
    steps, width = (200, WINDOW) if device.type == "cuda" else (8, 4)
    batches = []
    for _ in range(4):
        labels = blob_labels(2, (32, 32), NUM_CLASSES)
        images = labels[:, None] / NUM_CLASSES + 0.1 * torch.randn(2, 1, 32, 32)
        batches.append((images.to(device), labels.to(device)))
    model = UNet().to(device)
    fast = train(copy.deepcopy(model), batches, steps, dtype, "auto")
    slow = train(copy.deepcopy(model), batches, steps, dtype, "reference")
    for name, ours, theirs in zip(("segmentation", "PDCR"), fast, slow, strict=True):
        a, b = windows(ours, width), windows(theirs, width)
        assert torch.isfinite(a).all(), name
        assert (a - b).abs().max() <= TOLERANCE * b[0].abs(), f"{name}: {a} and {b}"
        assert a[-1] < a[0], name
