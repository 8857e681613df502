"""How a dataset lies in its folder, and which folder nearby looks right when the given one does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contrastseg_fast.experiments.datasets.case import Case
from contrastseg_fast.experiments.datasets.dataset import Dataset, Problems
from contrastseg_fast.experiments.datasets.folder import DataError, Folder

MAX_LOOKED_AT = 500


@dataclass(frozen=True)
class Layout:
    """One way of distributing a dataset.

    Attributes:
        title: the dataset's full name.
        tree: the files expected, as text.
        recognises: whether a folder looks like this one, by the names in it.
        read: makes the dataset of a folder.
        options: names of the keyword arguments of `read` and `recognises`.
    """

    title: str
    tree: str
    recognises: Callable[..., bool]
    read: Callable[..., Dataset]
    options: tuple[str, ...] = ()


def wrong_folder(
    layout: Layout, others: Mapping[str, Layout], folder: Folder, options: Mapping[str, Any]
) -> DataError:
    """The error for a folder in which the dataset is not, with the nearest folder in which it is."""
    expected = f"{layout.title},\n{layout.tree}\n"
    for nearby in _nearby(folder.root):
        if _is(layout, Folder(nearby), options):
            return DataError(folder.root, expected, f"another folder; try {nearby}")
    found = [name for name, other in others.items() if _is(other, folder, {})]
    got = f"what looks like {found[0]!r}" if found else ", ".join(folder.names(".")[:8]) or "an empty folder"
    return DataError(folder.root, expected, got)


def _is(layout: Layout, folder: Folder, options: Mapping[str, Any]) -> bool:
    try:
        return layout.recognises(folder, **options)
    except (DataError, OSError):  # links that lead out, folders that may not be read
        return False


def _nearby(root: Path) -> Iterator[Path]:
    """Subfolders, their subfolders, and the two folders above."""
    children = _subfolders(root)
    yield from children
    for child in children:
        yield from _subfolders(child)
    yield from list(root.parents)[:2]


def _subfolders(path: Path) -> list[Path]:
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        return [entry for entry in entries[:MAX_LOOKED_AT] if entry.is_dir() and not entry.is_symlink()]
    except OSError:
        return []


def match_pairs(
    images: Mapping[str, str], masks: Mapping[str, str], folder: Folder, problems: Problems
) -> list[str]:
    """Stems with an image and a mask; either without the other is a problem."""
    for stem, image in images.items():
        if stem not in masks:
            with problems.skipping():
                raise DataError(folder.root / image, "a mask of the same name", f"none; {_example(masks)}")
    for stem, mask in masks.items():
        if stem not in images:
            with problems.skipping():
                raise DataError(folder.root / mask, "an image of the same name", f"none; {_example(images)}")
    return [stem for stem in images if stem in masks]


def _example(files: Mapping[str, str]) -> str:
    return f"the first of {len(files)} is {next(iter(files.values()))}" if files else "there are none at all"


def finish(
    folder: Folder,
    problems: Problems,
    cases: Sequence[Case],
    *,
    name: str,
    class_names: Sequence[str],
    in_channels: int,
    spatial_dims: int = 2,
    remarks: Sequence[str] = (),
) -> Dataset:
    """Check the headers of all cases and that names differ, and put the dataset together.

    Raises:
        DataError: two cases have one name, a header is wrong (`on_error="raise"`), or no case is left.
    """
    kept: dict[str, Case] = {}
    for case in cases:
        with problems.skipping():
            if case.name in kept:
                raise DataError(folder.root, f"one case named {case.name}", "two")
            case.files.check_headers()
            kept[case.name] = case
    problems.warn(name, len(kept))
    if not kept:
        raise DataError(folder.root, "at least one case", "; ".join(problems.found[:3]) or "none")
    return Dataset(
        name,
        tuple(class_names),
        spatial_dims,
        in_channels,
        tuple(kept[name] for name in sorted(kept)),
        problems.on_error,
        tuple(problems.found),
        tuple(remarks),
    )
