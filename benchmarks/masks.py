"""Real label maps: axial slices of the bundled chest CT."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import contrastseg_fast
from contrastseg_fast.functional import foreground_ratio, sample_grid

FIELD, STRIDE = 11, 4  # pixels: receptive field and stride of a second encoder stage
_VOLUME = Path(contrastseg_fast.__file__).parent / "data" / "chest_ct.npz"


def chest_volume(num_classes: int) -> Tensor:
    """Labels `(1, 133, 128, 128)` int64; classes from `num_classes - 1` on become one."""
    return _read("labels")[None].long().clamp(max=num_classes - 1)


def chest_slices(batch: int, extent: int, num_classes: int) -> Tensor:
    """Labels `(batch, extent, extent)` int64 of slices spread over the body, by nearest neighbour."""
    return _spread(chest_volume(num_classes)[0], batch, extent)


def chest_images(batch: int, extent: int) -> Tensor:
    """The images of the same slices, `(batch, 1, extent, extent)` fp32 in [0, 1]."""
    return _spread(_read("image"), batch, extent)[:, None].float() / 255


def chest_crops(batch: int, extent: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images `(batch, 1, extent, extent, extent)` fp32, and labels of cubes along the body."""
    labels = chest_volume(num_classes)[0]
    image = _read("image")
    across = tuple(slice((size - extent) // 2, (size + extent) // 2) for size in labels.shape[1:])
    room = labels.shape[0] - extent
    cubes = [
        (slice(first, first + extent), *across)
        for first in ((2 * b + 1) * room // (2 * batch) for b in range(batch))
    ]
    images = torch.stack([image[cube] for cube in cubes])[:, None].float() / 255
    return images, torch.stack([labels[cube] for cube in cubes])


def grid_starts(extent: int, count: int) -> Tensor:
    """First pixels `(count, 2)` of the fields of a grid of features at `STRIDE`."""
    return sample_grid((extent // STRIDE, extent // STRIDE), count) * STRIDE - FIELD // 2


@functools.cache
def mask_ratios(batch: int, count: int, num_classes: int, extent: int = 512) -> Tensor:
    """Foreground ratios `(batch, count, num_classes)` of grid samples of slices large enough."""
    while (extent // STRIDE) ** 2 < count:
        extent *= 2
    points = math.ceil(math.sqrt(count)) ** 2  # of a square grid, of which some are left out
    starts = grid_starts(extent, points)[torch.arange(count) * points // count]
    labels = chest_slices(batch, extent, num_classes)
    ratios, _ = foreground_ratio(labels, starts, (FIELD, FIELD), num_classes)
    return ratios


def _read(name: str) -> Tensor:
    with np.load(_VOLUME) as file:
        return torch.from_numpy(file[name])


def _spread(volume: Tensor, batch: int, extent: int) -> Tensor:
    slices = (2 * torch.arange(batch) + 1) * volume.shape[0] // (2 * batch)
    pixels = torch.arange(extent) * volume.shape[1] // extent
    return volume[slices][:, pixels][:, :, pixels]
