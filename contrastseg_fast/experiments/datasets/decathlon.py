"""Any task of the Medical Segmentation Decathlon: NIfTI volumes, and a dataset.json that lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from contrastseg_fast.experiments.datasets.case import Case
from contrastseg_fast.experiments.datasets.dataset import Dataset, Problems
from contrastseg_fast.experiments.datasets.folder import VOLUME_SUFFIXES, DataError, Folder, split_name
from contrastseg_fast.experiments.datasets.layout import Layout, finish
from contrastseg_fast.experiments.datasets.volumes import Volume

INDEX = "dataset.json"
MAX_INDEX_BYTES = 2**24


def recognises(folder: Folder) -> bool:
    """Whether there is a dataset.json, or the folders it describes."""
    return (folder.root / INDEX).exists() or (folder.has("imagesTr") and folder.has("labelsTr"))


def read(folder: Folder, problems: Problems) -> Dataset:
    """Five folds over the training volumes, those of nnU-Net v2: the test part's labels are not public."""
    path = folder.file(INDEX)
    index = _read_index(path)
    class_names = _numbered(index, "labels", path)
    modalities = _numbered(index, "modality", path)
    if len(class_names) < 2:
        raise DataError(path, "labels with the background and at least one class", class_names)
    entries = index.get("training")
    if not isinstance(entries, list) or not entries:
        raise DataError(path, 'a list "training" of volumes', type(entries).__name__)
    cases = []
    for entry in entries:
        with problems.skipping():
            image, label = _entry(entry, path)
            volume = Volume(folder, image, label, len(modalities), tuple(range(len(class_names))))
            cases.append(Case(split_name(PurePosixPath(image).name)[0], volume))
    return finish(
        folder,
        problems,
        cases,
        name=folder.root.name or "decathlon",
        class_names=class_names,
        in_channels=len(modalities),
        spatial_dims=3,
        remarks=_remarks(index, folder, entries),
    )


def _read_index(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise DataError(path, f"at most {MAX_INDEX_BYTES} bytes", path.stat().st_size)
    try:
        index = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, "JSON", error) from error
    if not isinstance(index, dict):
        raise DataError(path, "a JSON object", type(index).__name__)
    return index


def _numbered(index: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    """The values of `{"0": a, "1": b}`, in the order of their numbers."""
    table = index.get(key)
    expected = f'"{key}" as {{"0": name, "1": name, ...}}'
    if not isinstance(table, dict) or set(table) != {str(i) for i in range(len(table))} or not table:
        raise DataError(path, expected, table)
    if not all(isinstance(name, str) for name in table.values()):
        raise DataError(path, expected, table)
    return tuple(table[str(i)] for i in range(len(table)))


def _entry(entry: object, path: Path) -> tuple[str, str]:
    if isinstance(entry, dict):
        image, label = entry.get("image"), entry.get("label")
        if isinstance(image, str) and isinstance(label, str):
            return str(PurePosixPath(image)), str(PurePosixPath(label))
    raise DataError(path, 'entries {"image": path, "label": path} under "training"', entry)


def _remarks(index: Mapping[str, Any], folder: Folder, entries: list[Any]) -> list[str]:
    path = folder.root / INDEX
    remarks = []
    if index.get("numTraining", len(entries)) != len(entries):
        remarks.append(f'{path}: expected {index["numTraining"]} volumes ("numTraining"), got {len(entries)}')
    listed = {PurePosixPath(str(entry.get("image"))).name for entry in entries if isinstance(entry, dict)}
    for name in folder.names("imagesTr") if folder.has("imagesTr") else []:
        if split_name(name)[1] in VOLUME_SUFFIXES and name not in listed:
            remarks.append(f"{folder.root / 'imagesTr' / name}: expected an entry in {INDEX}, got none")
    return remarks


DECATHLON = Layout(
    "a task of the Medical Segmentation Decathlon",
    f"  {INDEX}\n  imagesTr/la_003.nii.gz\n  labelsTr/la_003.nii.gz",
    recognises,
    read,
)
