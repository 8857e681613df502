"""Photographs and their masks, read by Pillow: PNG, JPEG, BMP and TIFF only, whatever a file's name says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contrastseg_fast.experiments.datasets.dataset import Sample
from contrastseg_fast.experiments.datasets.folder import DataError, Folder

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
LOSSY_FORMATS = ("JPEG", "MPO")
COLOUR_MODES = ("RGB", "RGBA", "P")
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I")
GREY_MODES = ("1", "L", "LA", *DEEP_MODES)
BINARY = (0, 255)
BLURRED_SHARE = 0.1  # of a lossy mask's pixels may lie far from every class's grey value


@dataclass(frozen=True)
class Photograph:
    """An image file and its mask files; several masks are united, none at all means background throughout.

    `values` is the grey value of every class. A lossy mask is rounded to the nearest; any other must hold
    these values only. `foreground=True` refuses a mask without any.
    """

    folder: Folder
    image: str
    masks: tuple[str, ...]
    in_channels: int
    values: tuple[int, ...] = BINARY
    foreground: bool = False

    def check_headers(self) -> None:
        """Raise DataError for unreadable headers, other channels, or sizes that differ."""
        path = self.folder.file(self.image)
        with opened(path) as image:
            size, mode = image.size, image.mode
        if self.in_channels == 3 and mode not in COLOUR_MODES:
            raise DataError(path, "a colour image (3 channels)", f"mode {mode}")
        if self.in_channels == 1 and mode not in GREY_MODES + COLOUR_MODES:
            raise DataError(path, "a grey image (1 channel)", f"mode {mode}")
        for name in self.masks:
            mask_path = self.folder.file(name)
            with opened(mask_path) as mask:
                if mask.size != size:
                    width, height = mask.size
                    raise DataError(
                        mask_path, f"{size[0]} x {size[1]} pixels, as {self.image} has", f"{width} x {height}"
                    )

    def read(self) -> Sample:
        """Image in [0, 1] and labels; DataError for broken files and unexpected grey values."""
        self.check_headers()
        path = self.folder.file(self.image)
        pixels = read_colour(path) if self.in_channels == 3 else read_grey(path)
        largest = 65535 if pixels.dtype.itemsize > 1 else 255
        image = torch.from_numpy(pixels.astype(np.float32) / largest)
        image = image.movedim(-1, 0).contiguous() if self.in_channels == 3 else image[None]
        labels = np.zeros(pixels.shape[:2], np.int64)
        for name in self.masks:
            np.maximum(labels, self._read_mask(self.folder.file(name)), out=labels)
        return Sample(image, torch.from_numpy(labels), None)

    def doubts(self) -> list[str]:
        """None: headers of photographs tell no more than `check_headers` asks."""
        return []

    def _read_mask(self, path: Path) -> np.ndarray:
        with opened(path) as mask:
            lossy = mask.format in LOSSY_FORMATS
        grey = read_grey(path)
        labels = nearest_labels(grey, self.values, path) if lossy else exact_labels(grey, self.values, path)
        if self.foreground and not labels.any():
            raise DataError(
                path, f"a mask with foreground ({self.values[1:]})", f"grey values to {grey.max()}"
            )
        return labels


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The image at `path`; whatever Pillow raises for it, here or while it is read, becomes a DataError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.format == "TIFF" and getattr(image, "n_frames", 1) != 1:
                raise DataError(path, "one picture", f"{getattr(image, 'n_frames', 0)} in one file")
            yield image
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = "an image within PIL.Image.MAX_IMAGE_PIXELS (set it yourself if you trust the file)"
        raise DataError(path, limit, error) from error
    except Exception as error:  # broken bytes raise nearly anything, SyntaxError and struct.error among it
        raise DataError(path, "a readable PNG, JPEG, BMP or TIFF file", error) from error


def header_channels(path: Path) -> int:
    """1 or 3, by the header."""
    with opened(path) as image:
        if image.mode not in GREY_MODES + COLOUR_MODES:
            raise DataError(path, "a grey or a colour image", f"mode {image.mode}")
        return 1 if image.mode in GREY_MODES else 3


def read_colour(path: Path) -> np.ndarray:
    """`(H, W, 3)` uint8; transparency is dropped."""
    with opened(path) as image:
        return np.array(image.convert("RGB"))


def read_grey(path: Path) -> np.ndarray:
    """`(H, W)` uint8, or integers of up to 16 bits.

    Colour whose channels are equal counts as grey; a palette of colours stands for its indices.
    """
    with opened(path) as image:
        if image.mode in DEEP_MODES:
            deep = np.array(image)
            if deep.min(initial=0) < 0 or deep.max(initial=0) > 65535:
                raise DataError(path, "grey values from 0 to 65535", f"{deep.min()} to {deep.max()}")
            return deep
        if image.mode in ("1", "L", "LA"):
            return np.array(image.convert("L"))
        colour = np.array(image.convert("RGB"))
        if (colour == colour[..., :1]).all():
            return colour[..., 0]
        if image.mode == "P":
            return np.array(image)
        raise DataError(path, "a grey image", f"colours (mode {image.mode})")


def exact_labels(grey: np.ndarray, values: Sequence[int], path: Path) -> np.ndarray:
    """Class of every pixel, int64; DataError where a pixel has none of the values."""
    labels = np.full(grey.shape, -1, np.int64)
    for m, value in enumerate(values):
        labels[grey == value] = m
    wrong = labels < 0
    if wrong.any():
        others = np.unique(grey[wrong])
        shown = ", ".join(f"{value:g}" for value in others[:8]) + (", ..." if len(others) > 8 else "")
        expected = f"values {', '.join(map(str, values))} only (one a class)"
        raise DataError(path, expected, f"{shown} in {wrong.mean():.2%} of it")
    return labels


def nearest_labels(grey: np.ndarray, values: Sequence[int], path: Path) -> np.ndarray:
    """Class of every pixel of a lossy mask, `grey` uint8: that of the nearest value.

    Raises:
        DataError: more than a tenth of the pixels lie nearer to the middle between two values than to one.
    """
    distance = np.abs(np.arange(256)[:, None] - np.asarray(values))
    far = (distance.min(1) > np.diff(np.sort(values)).min() / 4)[grey].mean()
    if far > BLURRED_SHARE:
        expected = f"grey values near {', '.join(map(str, values))}"
        raise DataError(path, expected, f"{far:.0%} of the pixels far from them")
    return distance.argmin(1)[grey]
