"""Files of one JSON object a line, to which many processes add while another reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append(path: Path | None, row: Row) -> None:
    """Print a row, and add it to the file, if there is one."""
    print(json.dumps(row)[:300], flush=True)
    if path is not None:
        write(path, row)


def write(path: Path, row: Row) -> None:
    """Add a row to the file in a single write, so that those of several processes do not mix."""
    with path.open("ab", buffering=0) as file:
        file.write(f"{json.dumps(row)}\n".encode())


def read(path: Path) -> list[Row]:
    """The rows written so far; a line that is still being written is left out.

    Raises:
        ValueError: a whole line is no JSON.
    """
    if not path.exists():
        return []
    whole, _, _unfinished = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def share(units: list[Any], which: str) -> list[Any]:
    """Share `"K/N"` of some work: every Nth unit, from the Kth on, counted from 0."""
    first, of = (int(part) for part in which.split("/"))
    if not 0 <= first < of:
        raise ValueError(f"share: expected K/N with 0 <= K < N, got {which}")
    return units[first::of]
