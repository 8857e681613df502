"""What a dataset is to the experiments: cases that load when asked, classes, and the protocol's split."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from contrastseg_fast.experiments.datasets.case import Case, Sample
from contrastseg_fast.experiments.datasets.folder import DataError
from contrastseg_fast.experiments.datasets.splits import Split, describe_split, split_cases

ON_ERROR = ("raise", "skip")


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
