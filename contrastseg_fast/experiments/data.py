"""The images the experiments train on: one CT volume, its held-out part, and augmented batches of slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from monai.transforms import Compose, RandAffined, RandFlipd
from torch import Tensor

BUNDLED = Path(__file__).resolve().parent.parent / "data" / "chest_ct.npz"
MIN_SLICES = 12
STRIDE = 8  # height and width must be multiples of it, as the U-Net halves them three times


@dataclass(frozen=True)
class Volume:
    """One patient: `image` and `labels` are `(slices, height, width)` uint8, with a name for every class."""

    image: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class Split:
    """Slice numbers: a contiguous `test` part, and `train` on both sides of it behind a gap."""

    train: tuple[int, ...]
    test: tuple[int, ...]
    gap: int


def load_volume(path: Path = BUNDLED) -> Volume:
    """Read a `.npz` with `image` and `labels`, `(slices, height, width)` uint8, and optional `class_names`.

    Raises:
        OSError: there is no such file.
        ValueError: an array is missing, has another shape or dtype, or holds a label without a name.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file.items())
    except (AttributeError, TypeError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path}: expected a .npz file of plain arrays") from error
    if not {"image", "labels"} <= set(arrays):
        raise ValueError(f"{path}: expected the arrays image and labels, got {sorted(arrays)}")
    image, labels, names = arrays["image"], arrays["labels"], arrays.get("class_names")
    for name, array in (("image", image), ("labels", labels)):
        if array.ndim != 3 or array.dtype != np.uint8 or array.shape != image.shape:
            raise ValueError(
                f"{path}: expected {name} as (slices, height, width) uint8, got {array.shape} {array.dtype}"
            )
    depth, height, width = image.shape
    if depth < MIN_SLICES or height * width == 0 or height % STRIDE or width % STRIDE:
        raise ValueError(
            f"{path}: expected at least {MIN_SLICES} slices, their height and width multiples of {STRIDE}, "
            f"got {image.shape}"
        )
    num_labels = max(2, int(labels.max()) + 1)
    if names is None:
        names = [f"class {m}" for m in range(num_labels)]
    if len(names) < num_labels:
        raise ValueError(f"{path}: expected a name for each of {num_labels} classes, got {len(names)}")
    return Volume(image, labels, tuple(str(name) for name in names))


def split_slices(num_slices: int) -> Split:
    """Hold out the slices from 1/3 to 1/2 of the body, and leave 3 % (at least one) unused on either side.

    >>> split_slices(133).test[0], split_slices(133).test[-1], split_slices(133).gap
    (44, 65, 4)
    """
    first, last, gap = num_slices // 3, num_slices // 2, max(1, round(0.03 * num_slices))
    train = (*range(first - gap), *range(last + gap, num_slices))
    return Split(train, tuple(range(first, last)), gap)


def to_input(image: np.ndarray | Tensor) -> Tensor:
    """`(B, H, W)` uint8 to the network's input, `(B, 1, H, W)` fp32 in [0, 1]."""
    return torch.as_tensor(image)[:, None].float() / 255


def as_input(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of slices and their labels, both `(B, H, W)` uint8, as a network learns from them."""
    return to_input(images), labels.long()


def augmentation(spatial_shape: Sequence[int]) -> Compose:
    """The paper's augmentations of `image` and `labels`, 2D or 3D: scale, rotate, shift, shear, and flip."""
    keys, dims = ("image", "labels"), len(spatial_shape)
    return Compose(
        [
            RandAffined(
                keys,
                prob=0.9,
                rotate_range=(np.pi / 12,) * (1 if dims == 2 else 3),
                shear_range=(0.1,) * dims * (dims - 1),
                translate_range=tuple(extent / 12 for extent in spatial_shape),
                scale_range=(0.15,) * dims,
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            RandFlipd(keys, prob=0.5, spatial_axis=1),
        ]
    )


def augmented_batches(
    volume: Volume, slices: tuple[int, ...], num_batches: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of randomly drawn, augmented slices: images and labels, each `(batch_size, H, W)` uint8.

    The seed alone decides them, so that every run of an experiment sees the same batches.
    """
    order = np.random.default_rng(seed)
    augment = augmentation(volume.image.shape[1:])
    augment.set_random_state(seed)
    for _ in range(num_batches):
        drawn = order.choice(slices, batch_size, replace=batch_size > len(slices))
        samples = [
            augment({"image": volume.image[z][None].astype(np.float32), "labels": volume.labels[z][None]})
            for z in drawn
        ]
        yield (
            torch.cat([torch.as_tensor(s["image"]).round().clamp(0, 255).to(torch.uint8) for s in samples]),
            torch.cat([torch.as_tensor(s["labels"]).to(torch.uint8) for s in samples]),
        )
