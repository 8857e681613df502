"""Copy the headers of torch that our sources include into tests/third_party/torch_2_11_headers.

    make test-torch VERSION=2.11.0
    .venv-torch-2.11.0/bin/python scripts/copy_torch_headers.py

PyTorch's license comes with them, without those of libraries that its binary package holds.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "tests" / "third_party" / "torch_2_11_headers"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"](torch/[^>"]+)[>"]', re.MULTILINE)
OTHER_LICENSES = "The PyTorch repository and source distributions bundle"


def included(files: Iterable[Path]) -> set[str]:
    """The headers of torch that the files name, whatever the preprocessor would choose."""
    return {name for file in files for name in INCLUDE.findall(file.read_text())}


def headers(folder: Path) -> set[str]:
    """The headers below `folder` that csrc includes, and those that these include."""
    found: set[str] = set()
    new = included(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    while new:
        found |= new
        new = included(folder / name for name in new) - found
    return found


def main() -> None:
    if not torch.__version__.startswith("2.11."):
        raise SystemExit(f"torch: expected version 2.11, got {torch.__version__}")
    folder = Path(torch.__file__).parent / "include"
    shutil.rmtree(TARGET / "torch", ignore_errors=True)
    names = sorted(headers(folder))
    for name in names:
        (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, TARGET / name)
    (text,) = (file.read_text() for file in distribution("torch").files or () if file.name == "LICENSE")
    (TARGET / "LICENSE").write_text(text.partition(OTHER_LICENSES)[0].strip() + "\n")
    print(f"{len(names)} headers of torch {torch.__version__}")


if __name__ == "__main__":
    main()
