"""Images to segment without any download: two kinds of soft blobs in noise."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn

NUM_CLASSES = 3  # background and the two kinds


def batches(steps: int, size: int, channels: int = 1, batch_size: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Images `(B, channels, size, size)` and labels `(B, size, size)`, new ones at each of `steps` steps."""
    for _ in range(steps):
        coarse = torch.randn(batch_size, NUM_CLASSES, 6, 6)
        smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        smooth[:, 0] += 0.5
        labels = smooth.argmax(1)
        noise = torch.randn(batch_size, channels, size, size)
        yield labels[:, None] + 0.5 * noise, labels


def arguments(description: str | None) -> argparse.Namespace:
    """The command line that the examples share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=50, help="training steps")
    parser.add_argument("--size", type=int, default=64, help="pixels along a side")
    parser.add_argument("--weight", type=float, default=0.01, help="of PDCR beside the loss")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()
