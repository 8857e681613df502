"""A folder that its readers never leave, and the error that names what is wrong in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

VOLUME_SUFFIXES = (".nii", ".nii.gz")


class DataError(ValueError):
    """A file or folder of a dataset that cannot be used: which one, what was expected, and what came."""

    def __init__(self, path: object, expected: str, got: object) -> None:
        super().__init__(f"{path}: expected {expected}, got {got}")


def split_name(file_name: str) -> tuple[str, str]:
    """Stem and suffix, the suffix in small letters and `.nii.gz` in one piece.

    >>> split_name("heart_01.NII.gz"), split_name("a.b.JPG")
    (('heart_01', '.nii.gz'), ('a.b', '.jpg'))
    """
    stem, suffix = os.path.splitext(file_name)
    if suffix.lower() == ".gz" and stem.lower().endswith(".nii"):
        return stem[:-4], ".nii.gz"
    return stem, suffix.lower()


@dataclass(frozen=True)
class Folder:
    """The folder that was given, with its symbolic links resolved; other paths are relative to it."""

    root: Path

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Folder:
        """The folder at `path`; DataError where there is none."""
        root = Path(path)
        if not root.is_dir():
            raise DataError(root, "a folder", "a file" if root.exists() else "nothing there")
        return cls(root.resolve())

    def path(self, relative: str) -> Path:
        """The path of something inside the folder.

        Raises:
            DataError: the path is absolute, goes up, or leads outside through a symbolic link.
        """
        windows = PureWindowsPath(relative)
        outside = PurePosixPath(relative).is_absolute() or windows.drive or windows.root
        if outside or ".." in windows.parts or "\0" in relative:
            raise DataError(self.root, "paths inside this folder", repr(relative))
        path = self.root / relative
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, no name in this file system
            raise DataError(self.root, "paths inside this folder", f"{relative!r} ({error})") from error
        if not resolved.is_relative_to(self.root):
            raise DataError(path, f"a path inside {self.root}", f"a link to {resolved}")
        return path

    def file(self, relative: str) -> Path:
        """The path of a regular file inside the folder; DataError where there is none."""
        path = self.path(relative)
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise DataError(path, "a file", error.strerror) from error
        if not stat.S_ISREG(mode):
            raise DataError(path, "a file", "something else")
        return path

    def has(self, relative: str) -> bool:
        """Whether there is such a subfolder."""
        return self.path(relative).is_dir()

    def names(self, relative: str) -> list[str]:
        """Names in a subfolder, sorted, without hidden ones (`.DS_Store`, `._x`)."""
        path = self.path(relative)
        try:
            return sorted(name for name in os.listdir(path) if not name.startswith("."))
        except OSError as error:
            raise DataError(path, "a folder", error.strerror) from error

    def files(self, relative: str, suffixes: Sequence[str]) -> dict[str, str]:
        """Relative paths of the files with one of the suffixes in a subfolder, by their stems.

        Raises:
            DataError: there is none, or two differ in the suffix alone.
        """
        found: dict[str, str] = {}
        names = self.names(relative)
        for name in names:
            stem, suffix = split_name(name)
            if suffix not in suffixes:
                continue
            if stem in found:
                raise DataError(self.root / relative, f"one file named {stem}", f"{found[stem]} and {name}")
            found[stem] = f"{relative}/{name}"
        if not found:
            inside = [name for name in names if (self.root / relative / name).is_dir()]
            got = f"the subfolders {', '.join(inside[:3])} only" if inside else f"{len(names)} other files"
            raise DataError(self.root / relative, f"files ending in {' or '.join(suffixes)}", got)
        return found
