"""PH2: 200 dermoscopic photographs, a folder each, with a binary mask of the lesion."""

from __future__ import annotations

import os
from dataclasses import replace

from contrastseg_fast.experiments.datasets import isic
from contrastseg_fast.experiments.datasets.case import Case
from contrastseg_fast.experiments.datasets.dataset import Dataset, Problems
from contrastseg_fast.experiments.datasets.folder import DataError, Folder
from contrastseg_fast.experiments.datasets.layout import Layout, finish
from contrastseg_fast.experiments.datasets.photographs import Photograph

IMAGE_FOLDERS = ("PH2 Dataset images", "PH2_Dataset_images")


def recognises(folder: Folder, isic2016: str | os.PathLike[str] | None = None) -> bool:
    """Whether the folder of the images is there."""
    return any(folder.has(name) for name in IMAGE_FOLDERS)


def read(folder: Folder, problems: Problems, isic2016: str | os.PathLike[str] | None = None) -> Dataset:
    """PH2 alone in five folds; with `isic2016`, train on ISIC 2016's training part and test on all of PH2.

    The second is how the authors' released configuration uses PH2 (its data set is named `ISIC2016_PH2`).
    Patients are not given.
    """
    images = next(name for name in IMAGE_FOLDERS if folder.has(name))
    names = [name for name in folder.names(images) if folder.has(f"{images}/{name}")]
    if not names:
        raise DataError(folder.root / images, "subfolders IMD002, IMD003, ...", "none")
    cases = [_case(folder, f"{images}/{name}", name) for name in names]
    if isic2016 is not None:
        other = Folder.at(isic2016)
        if not isic.recognises(other, isic.PARTS_2016):
            raise DataError(other.root, f"{isic.ISIC_2016.title},\n{isic.ISIC_2016.tree}\n", "another folder")
        cases = [replace(case, part="test") for case in cases]
        cases += isic.read_cases(other, problems, isic.PARTS_2016[:1])
    return finish(
        folder,
        problems,
        cases,
        name="ph2",
        class_names=isic.CLASS_NAMES,
        in_channels=3,
    )


def _case(folder: Folder, path: str, name: str) -> Case:
    image = f"{path}/{name}_Dermoscopic_Image/{name}.bmp"
    mask = f"{path}/{name}_lesion/{name}_lesion.bmp"
    return Case(name, Photograph(folder, image, (mask,), in_channels=3))


PH2 = Layout(
    "the PH2 database",
    "  PH2 Dataset images/IMD002/IMD002_Dermoscopic_Image/IMD002.bmp\n"
    "  PH2 Dataset images/IMD002/IMD002_lesion/IMD002_lesion.bmp",
    recognises,
    read,
    ("isic2016",),
)
