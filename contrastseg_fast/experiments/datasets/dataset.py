"""What a dataset is to the experiments: cases that load when asked, classes, and the protocol's split."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from contrastseg_fast.experiments.datasets.folder import DataError
from contrastseg_fast.experiments.datasets.splits import Split, describe_split, split_cases

ON_ERROR = ("raise", "skip")


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


@dataclass(frozen=True)
class Dataset:
    """The cases of one folder; made by `open_dataset`.

    Attributes:
        name: the dataset's name, fit for file names.
        class_names: a name for every class, the background first.
        spatial_dims: 2 or 3.
        in_channels: channels of every image.
        cases: in the order of their names.
        on_error: what `load` does with a case that cannot be read, "raise" or "skip".
        skipped: what was wrong with the cases left out when the folder was opened.
        remarks: what `check` reports about the folder as a whole.
    """

    name: str
    class_names: tuple[str, ...]
    spatial_dims: int
    in_channels: int
    cases: tuple[Case, ...]
    on_error: str = "raise"
    skipped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes, the background included."""
        return len(self.class_names)

    @property
    def protocol(self) -> str:
        """Where the test and the validation part of `splits` come from, in words."""
        return describe_split(self.cases)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, name: str) -> Case:
        for case in self.cases:
            if case.name == name:
                return case
        raise KeyError(name)

    def splits(self, seed: int = 0) -> Split:
        """The names of the training, validation and test cases, by the dataset's protocol.

        Parts that the dataset is distributed in are kept. Where it has no test part, the cases are dealt into
        five folds by patient, and fold `seed % 5` is the test part: seeds 0 to 4 test every case once, in the
        folds that nnU-Net v2 makes of the same names; seeds 5 to 9 are another deal. Where it has no
        validation part, a tenth of the training patients (at least one) is drawn by the seed.

        Raises:
            ValueError: fewer than three patients (or cases) to split.
        """
        return split_cases(self.cases, seed)

    def load(self, names: Sequence[str] | None = None) -> Iterator[tuple[Case, Sample]]:
        """Read the named cases (None: all), one at a time.

        With `on_error="skip"` a case that cannot be read is left out, and a warning at the end counts and
        names what was left out; with "raise" it raises DataError.
        """
        problems = Problems(self.on_error)
        kept = 0
        by_name = {case.name: case for case in self.cases}
        for name in by_name if names is None else names:
            case = by_name[name]
            sample = None
            with problems.skipping():
                sample = case.load()
            if sample is not None:
                kept += 1
                yield case, sample
        problems.warn(self.name, kept)

    def check(self, progress: Callable[[Sequence[Case]], Iterable[Case]] = iter) -> list[str]:
        """Read every case, and say all that is wrong or doubtful, an entry each; empty if all is well.

        Args:
            progress: wraps the cases while they are read, as `tqdm.tqdm` does.
        """
        found = [*self.skipped, *self.remarks]
        seen: set[int] = set()
        for case in progress(self.cases):
            try:
                sample = case.load()
            except DataError as error:
                found.append(str(error))
            else:
                found += case.files.doubts()
                seen.update(torch.unique(sample.labels).tolist())
        found += [
            f"class {m} ({name}) occurs in no case"
            for m, name in enumerate(self.class_names)
            if m not in seen
        ]
        return found


class Problems:
    """Collects the errors of single cases, or lets the first one through."""

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self.found: list[str] = []

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Let a DataError through, or note it and go on behind the block."""
        try:
            yield
        except DataError as error:
            if self.on_error == "raise":
                raise
            self.found.append(str(error))

    def warn(self, name: str, kept: int) -> None:
        """Count and name what was left out, in one warning."""
        if not self.found:
            return
        shown = "\n  ".join(self.found[:5])
        rest = f"\n  and {len(self.found) - 5} more" if len(self.found) > 5 else ""
        warnings.warn(
            f"{name}: {len(self.found)} left out, {kept} cases kept:\n  {shown}{rest}", stacklevel=3
        )
