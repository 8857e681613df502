"""One case of a dataset: where its files lie, and what they hold once read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor


class Sample(NamedTuple):
    """One case in memory.

    `image` is `(C, *spatial)` float32, in [0, 1] for photographs and in the file's own units for volumes;
    `labels` is `(*spatial)` int64; `spacing` is the size of a voxel along each axis in the file's unit
    (millimetres, as a rule), None for photographs.
    """

    image: Tensor
    labels: Tensor
    spacing: tuple[float, ...] | None


class Files(Protocol):
    """The files of one case, by the format they are in."""

    def check_headers(self) -> None:
        """Raise DataError where the headers alone show that the case cannot be read."""

    def read(self) -> Sample:
        """Read the pixels; DataError where that fails."""

    def doubts(self) -> list[str]:
        """What the headers show that is no error and yet worth a look."""


@dataclass(frozen=True)
class Case:
    """One image with its labels, still on disk.

    Attributes:
        name: unique within the dataset, and free of path separators.
        files: where the case lies.
        group: the patient or the slide, where the files tell; cases of one group stay together in a split.
        part: "train", "validation" or "test" where the dataset is distributed in such parts, else None.
    """

    name: str
    files: Files = field(repr=False)
    group: str | None = None
    part: str | None = None

    def load(self) -> Sample:
        """Read the case.

        Raises:
            DataError: a file is broken, or does not match the dataset; the message names it.
        """
        return self.files.read()
