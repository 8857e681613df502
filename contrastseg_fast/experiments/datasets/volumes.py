"""Volumes and labels in NIfTI files, read by nibabel; a header's claims are checked before allocation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import nibabel
import numpy as np
import torch
from nibabel.arrayproxy import ArrayProxy

from contrastseg_fast.experiments.datasets.dataset import Sample
from contrastseg_fast.experiments.datasets.folder import VOLUME_SUFFIXES, DataError, Folder, split_name
from contrastseg_fast.experiments.datasets.photographs import exact_labels

MAX_VALUES = 2**30  # in one file, all channels together
MAX_DEFLATE_RATIO = 1032  # what one compressed byte can stand for


@dataclass(frozen=True)
class Volume:
    """A NIfTI image and its labels; `values` is the number that stands for each class."""

    folder: Folder
    image: str
    label: str
    in_channels: int
    values: tuple[int, ...]

    def check_headers(self) -> None:
        """Raise DataError for unreadable headers, impossible sizes, other channels, or sizes that differ."""
        image_path, label_path = self.folder.file(self.image), self.folder.file(self.label)
        shape = (*open_volume(image_path).shape, 1)[:4]
        if shape[3] != self.in_channels:
            raise DataError(image_path, f"{self.in_channels} channels (modalities)", f"shape {shape}")
        label_shape = (*open_volume(label_path).shape, 1)[:4]
        if label_shape != (*shape[:3], 1):
            raise DataError(label_path, f"shape {shape[:3]}, as {self.image} has", label_shape)

    def read(self) -> Sample:
        """Image in the file's units, labels and voxel size; DataError for broken files and other labels."""
        self.check_headers()
        image_path, label_path = self.folder.file(self.image), self.folder.file(self.label)
        pixels, spacing = _read(image_path)
        if not np.isfinite(pixels).all():
            share = 1 - np.isfinite(pixels).mean()
            raise DataError(image_path, "finite intensities", f"NaN or infinity in {share:.2%} of it")
        pixels = pixels.reshape(*pixels.shape[:3], self.in_channels)
        label_values, _ = _read(label_path)
        labels = exact_labels(label_values.reshape(pixels.shape[:3]), self.values, label_path)
        image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))
        return Sample(image, torch.from_numpy(np.ascontiguousarray(labels)), spacing)

    def doubts(self) -> list[str]:
        """Whether image and labels lie in different places of the scanner."""
        image, label = (open_volume(self.folder.file(name)) for name in (self.image, self.label))
        if np.allclose(image.affine, label.affine, atol=1e-2):
            return []
        return [f"{self.folder.root / self.label}: expected the affine of {self.image}, got another"]


def open_volume(path: Path) -> nibabel.Nifti1Image:
    """The header of a NIfTI file, and access to its pixels.

    Raises:
        DataError: it is no readable NIfTI-1 or NIfTI-2 file of real numbers in three dimensions (and
            channels), or claims more values than the file can hold.
    """
    if split_name(path.name)[1] not in VOLUME_SUFFIXES:
        raise DataError(path, f"a file ending in {' or '.join(VOLUME_SUFFIXES)}", path.name)
    try:
        volume = nibabel.load(path, mmap=False)
    except Exception as error:  # broken bytes raise nearly anything
        raise DataError(path, "a readable NIfTI file", error) from error
    if not isinstance(volume, nibabel.Nifti1Image):
        raise DataError(path, "a NIfTI file", type(volume).__name__)
    shape, dtype = volume.shape, volume.get_data_dtype()
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise DataError(path, "three axes without length 0, and channels at most", f"shape {shape}")
    if dtype.kind not in "iuf":
        raise DataError(path, "real numbers", dtype)
    _check_size(path, math.prod(map(int, shape)), dtype.itemsize, cast(ArrayProxy, volume.dataobj).offset)
    return volume


def _check_size(path: Path, count: int, itemsize: int, offset: int) -> None:
    if count > MAX_VALUES:
        raise DataError(path, f"at most {MAX_VALUES} values", f"a header that claims {count}")
    held = path.stat().st_size * (MAX_DEFLATE_RATIO if path.name.lower().endswith(".gz") else 1)
    if offset + count * itemsize > held:
        claimed = f"a header that claims {offset + count * itemsize}"
        raise DataError(path, f"at most the {held} bytes that a file of this size can hold", claimed)


def _read(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Values, scaled as the header says, float32, and the size of a voxel."""
    volume = open_volume(path)
    spacing = tuple(float(size) for size in volume.header.get_zooms()[:3])
    if not all(math.isfinite(size) and size > 0 for size in spacing):
        raise DataError(path, "a voxel size above 0 along each axis", spacing)
    try:
        return volume.get_fdata(caching="unchanged", dtype=np.float32), spacing
    except Exception as error:  # a broken stream raises nearly anything
        raise DataError(path, "pixels as the header describes them", error) from error
