"""Cases of a dataset as patches to learn from, each decided by the seed and its number, and as images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, NormalizeIntensityd, RandCropByPosNegLabeld, Resized, SpatialPadd
from torch import Tensor
from torch.utils.data import DataLoader

from contrastseg_fast.experiments.config import Data
from contrastseg_fast.experiments.data import augmentation
from contrastseg_fast.experiments.datasets import Case, DataError, Dataset

CACHED_PIXELS = 1 << 27  # of prepared images and labels that each part of the data keeps in memory
KEYS = ("image", "labels")


class Cases:
    """Cases, read and prepared when asked: with mean 0 and deviation 1, and resized if so chosen."""

    def __init__(self, dataset: Dataset, names: Sequence[str], data: Data) -> None:
        self.cases = [dataset[name] for name in names]
        self.skips = dataset.on_error == "skip"
        self._kept: dict[int, tuple[Tensor, Tensor, tuple[int, ...]] | None] = {}
        self._kept_pixels = 0
        prepare: list[Any] = [NormalizeIntensityd("image", channel_wise=True)]
        if data.resize is not None:
            modes = ("trilinear" if dataset.spatial_dims == 3 else "bilinear", "nearest")
            prepare.append(Resized(KEYS, data.resize, mode=modes))
        self._prepare = Compose(prepare)

    def __len__(self) -> int:
        return len(self.cases)

    def prepared(self, position: int) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
        """One image `(C, *spatial)`, its labels `(*spatial)`, and the extent of the image as it is on disk.

        None, after a warning, for a case that cannot be read, if such cases are to be skipped.
        """
        if position not in self._kept:
            found = self._read(self.cases[position])
            size = 0 if found is None else found[0].numel() + found[1].numel()
            if self._kept_pixels + size > CACHED_PIXELS:
                return found
            self._kept_pixels += size
            self._kept[position] = found
        return self._kept[position]

    def original_labels(self, position: int) -> Tensor:
        """The labels `(*spatial)` as they are on disk."""
        return self.cases[position].load().labels

    def _read(self, case: Case) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
        try:
            image, labels, _ = case.load()
        except DataError as error:
            if not self.skips:
                raise
            warnings.warn(f"{case.name} is left out: {error}", stacklevel=2)
            return None
        ready = self._prepare({"image": image, "labels": labels[None]})
        return _plain(ready["image"]), _plain(ready["labels"])[0].to(torch.int16), tuple(labels.shape)


class Patches(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The endless series of training samples; the seed and its number alone decide a sample.

    So a run that is resumed, and several processes that share a batch, learn from what one process would
    have learnt from without a break. Every case comes once in each round of `len(cases)` samples.
    """

    def __init__(self, cases: Cases, data: Data, seed: int) -> None:
        self.cases = cases
        self.seed = seed
        steps: list[Any] = []
        if data.patch is not None:
            share = data.foreground_crops
            steps.append(SpatialPadd(KEYS, data.patch))
            steps.append(RandCropByPosNegLabeld(KEYS, "labels", data.patch, share, 1 - share))
        if data.augment:
            steps.append(augmentation(data.input_shape))
        self._augment = Compose(steps)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """An image `(C, *patch)` fp32 and its labels `(*patch)` int64."""
        draw = np.random.default_rng([self.seed, 1, number])
        image, labels = self._case(number)
        self._augment.set_random_state(int(draw.integers(2**32)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Num foregrounds", category=UserWarning)
            sample: Any = self._augment({"image": image, "labels": labels[None].float()})
        sample = sample[0] if isinstance(sample, list) else sample
        return _plain(sample["image"]).float(), _plain(sample["labels"])[0].long()

    def _case(self, number: int) -> tuple[Tensor, Tensor]:
        for tried in range(len(self.cases)):
            turn, place = divmod(number + tried, len(self.cases))
            order = np.random.default_rng([self.seed, 0, turn]).permutation(len(self.cases))
            found = self.cases.prepared(int(order[place]))
            if found is not None:
                return found[:2]
        raise DataError("the training cases", "at least one that can be read", "none")


def batches(
    patches: Patches, steps: range, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of some steps: images `(B, C, *patch)` and labels `(B, *patch)`.

    Of each batch a process gets its own part, `batch_size / world` samples.
    """
    own = batch_size // world
    numbers = [[step * batch_size + rank * own + item for item in range(own)] for step in steps]
    yield from DataLoader(patches, batch_sampler=numbers, num_workers=workers, persistent_workers=workers > 0)


def _plain(value: Any) -> Tensor:
    """A tensor without MONAI's metadata."""
    return torch.as_tensor(value.as_tensor() if hasattr(value, "as_tensor") else value)
