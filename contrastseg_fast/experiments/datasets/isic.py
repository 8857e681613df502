"""ISIC 2016 and ISIC 2017, task 1: dermoscopic photographs and a binary mask of the lesion."""

from __future__ import annotations

import re
from functools import partial

from contrastseg_fast.experiments.datasets.case import Case
from contrastseg_fast.experiments.datasets.dataset import Dataset, Problems
from contrastseg_fast.experiments.datasets.folder import DataError, Folder
from contrastseg_fast.experiments.datasets.layout import Layout, finish, match_pairs
from contrastseg_fast.experiments.datasets.photographs import Photograph

CLASS_NAMES = ("background", "lesion")

# Part of the split, folder of the images, folder of the masks; the first is needed.
Parts = tuple[tuple[str, str, str], ...]
PARTS_2016: Parts = (
    ("train", "ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth"),
    ("test", "ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"),
)
PARTS_2017: Parts = (
    ("train", "ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
    ("validation", "ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth"),
    ("test", "ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth"),
)


def recognises(folder: Folder, parts: Parts) -> bool:
    """Whether the folder of the training images or of their masks is there."""
    return any(folder.has(name) for name in parts[0][1:])


def read_cases(folder: Folder, problems: Problems, parts: Parts) -> list[Case]:
    """The cases of all parts whose images or masks are there."""
    cases = []
    for part, image_folder, mask_folder in parts:
        if not folder.has(image_folder) and not folder.has(mask_folder):
            continue
        for needed in (image_folder, mask_folder):
            if not folder.has(needed):
                raise DataError(folder.root, f"the subfolder {needed}", "none of that name")
        images = folder.files(image_folder, (".jpg", ".jpeg"))
        masks = {
            re.sub("_segmentation$", "", stem, flags=re.IGNORECASE): name
            for stem, name in folder.files(mask_folder, (".png",)).items()
        }
        cases += [
            Case(stem, Photograph(folder, images[stem], (masks[stem],), in_channels=3), part=part)
            for stem in match_pairs(images, masks, folder, problems)
        ]
    return cases


def read(folder: Folder, problems: Problems, parts: Parts, name: str) -> Dataset:
    """ISIC 2016: the official training and test parts, a tenth of training drawn for validation.

    ISIC 2017: the official training, validation and test parts. Without its test folders either is split into
    five folds. Patients are not given.
    """
    return finish(
        folder,
        problems,
        read_cases(folder, problems, parts),
        name=name,
        class_names=CLASS_NAMES,
        in_channels=3,
    )


def _tree(parts: Parts, suffix: str) -> str:
    return "\n".join(
        f"  {images}/ISIC_0000000.jpg\n  {masks}/ISIC_0000000{suffix}.png" for _, images, masks in parts
    )


ISIC_2016 = Layout(
    "ISIC 2016, task 1",
    _tree(PARTS_2016, "_Segmentation"),
    partial(recognises, parts=PARTS_2016),
    partial(read, parts=PARTS_2016, name="isic2016"),
)
ISIC_2017 = Layout(
    "ISIC 2017, task 1",
    _tree(PARTS_2017, "_segmentation"),
    partial(recognises, parts=PARTS_2017),
    partial(read, parts=PARTS_2017, name="isic2017"),
)
