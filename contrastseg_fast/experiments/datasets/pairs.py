"""Any folder of images and folder of masks: photographs or NIfTI volumes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from contrastseg_fast import _checks
from contrastseg_fast.experiments.datasets import photographs
from contrastseg_fast.experiments.datasets.case import Case
from contrastseg_fast.experiments.datasets.dataset import Dataset, Problems
from contrastseg_fast.experiments.datasets.folder import VOLUME_SUFFIXES, DataError, Folder, split_name
from contrastseg_fast.experiments.datasets.layout import Layout, finish, match_pairs
from contrastseg_fast.experiments.datasets.photographs import Photograph
from contrastseg_fast.experiments.datasets.volumes import Volume, open_volume


def recognises(folder: Folder, images: str = "images", masks: str = "masks", **_: object) -> bool:
    """Whether the two folders are there."""
    return folder.has(images) and folder.has(masks)


def read(
    folder: Folder,
    problems: Problems,
    images: str = "images",
    masks: str = "masks",
    values: Sequence[int] = photographs.BINARY,
    class_names: Sequence[str] | None = None,
    mask_suffix: str = "",
    patient: str | None = None,
) -> Dataset:
    """Five folds, by patient where `patient` finds one in the names."""
    values, names = _classes(values, class_names)
    if images == masks:
        _checks.fail("masks", "another folder than images", repr(masks))
    image_files = folder.files(images, (*photographs.SUFFIXES, *VOLUME_SUFFIXES))
    mask_files = {
        stem.removesuffix(mask_suffix): name
        for stem, name in folder.files(masks, (*photographs.SUFFIXES, *VOLUME_SUFFIXES)).items()
        if stem.endswith(mask_suffix)
    }
    volumes = [
        split_name(name)[1] in VOLUME_SUFFIXES for name in (*image_files.values(), *mask_files.values())
    ]
    if any(volumes) and not all(volumes):
        raise DataError(folder.root, "photographs or NIfTI volumes alike", "both")
    in_channels = _in_channels(folder, image_files, any(volumes))
    cases = []
    for stem in match_pairs(image_files, mask_files, folder, problems):
        image, mask = image_files[stem], mask_files[stem]
        files: Photograph | Volume
        if any(volumes):
            files = Volume(folder, image, mask, in_channels, values)
        else:
            files = Photograph(folder, image, (mask,), in_channels, values)
        cases.append(Case(stem, files, group=_patient(stem, patient)))
    return finish(
        folder,
        problems,
        cases,
        name=folder.root.name or "pairs",
        class_names=names,
        in_channels=in_channels,
        spatial_dims=3 if any(volumes) else 2,
    )


def _classes(
    values: Sequence[int], class_names: Sequence[str] | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    values = tuple(values)
    for value in values:
        _checks.integer("values", value, 0)
    if len(values) < 2 or len(set(values)) < len(values):
        _checks.fail("values", "a different grey value for each of at least two classes", values)
    names = ("background", *(f"class {m}" for m in range(1, len(values))))
    if class_names is not None:
        names = tuple(class_names)
        if len(names) != len(values):
            _checks.fail("class_names", f"{len(values)} names, as values has", len(names))
    return values, names


def _in_channels(folder: Folder, images: Mapping[str, str], volumes: bool) -> int:
    """Channels of the first image that can be opened."""
    broken = []
    for image in images.values():
        try:
            path = folder.file(image)
            return (*open_volume(path).shape, 1)[3] if volumes else photographs.header_channels(path)
        except DataError as error:
            broken.append(error)
    raise DataError(folder.root, "at least one readable image", f"none: {broken[0]}")


def _patient(stem: str, pattern: str | None) -> str | None:
    if pattern is None:
        return None
    try:
        found = re.search(pattern, stem)
    except re.error as error:
        _checks.fail("patient", "a regular expression", f"{pattern!r} ({error})")
    return found[1 if found.re.groups else 0] if found else None


PAIRS = Layout(
    "a folder of images and a folder of masks",
    "  images/a.png\n  masks/a.png",
    recognises,
    read,
    ("images", "masks", "values", "class_names", "mask_suffix", "patient"),
)
