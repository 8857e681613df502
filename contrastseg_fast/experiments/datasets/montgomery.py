"""The Montgomery County chest X-rays: 138 grey images, and a mask for each lung, which are united."""

from __future__ import annotations

from contrastseg_fast.experiments.datasets.case import Case
from contrastseg_fast.experiments.datasets.dataset import Dataset, Problems
from contrastseg_fast.experiments.datasets.folder import DataError, Folder
from contrastseg_fast.experiments.datasets.layout import Layout, finish, match_pairs
from contrastseg_fast.experiments.datasets.photographs import Photograph

IMAGES, LEFT, RIGHT = "CXR_png", "ManualMask/leftMask", "ManualMask/rightMask"


def recognises(folder: Folder) -> bool:
    """Whether images and masks have their folders."""
    return folder.has(IMAGES) and folder.has("ManualMask")


def read(folder: Folder, problems: Problems) -> Dataset:
    """Five folds by patient: the set has no official parts."""
    for needed in (LEFT, RIGHT):
        if not folder.has(needed):
            raise DataError(folder.root, f"the subfolder {needed}", "none of that name")
    images, left, right = (folder.files(name, (".png",)) for name in (IMAGES, LEFT, RIGHT))
    with_left = match_pairs(images, left, folder, problems)
    with_right = set(match_pairs(images, right, folder, problems))
    cases = [
        Case(
            stem,
            Photograph(folder, images[stem], (left[stem], right[stem]), in_channels=1),
            group="_".join(stem.split("_")[:2]),
        )
        for stem in with_left
        if stem in with_right
    ]
    return finish(
        folder,
        problems,
        cases,
        name="montgomery",
        class_names=("background", "lung"),
        in_channels=1,
    )


MONTGOMERY = Layout(
    "the Montgomery County chest X-ray set",
    f"  {IMAGES}/MCUCXR_0001_0.png\n  {LEFT}/MCUCXR_0001_0.png\n  {RIGHT}/MCUCXR_0001_0.png",
    recognises,
    read,
)
