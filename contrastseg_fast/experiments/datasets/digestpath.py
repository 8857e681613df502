"""DigestPath 2019, tissue segmentation: colonoscopy slides, those with a lesion with a JPEG mask."""

from __future__ import annotations

import re

from contrastseg_fast.experiments.datasets.case import Case
from contrastseg_fast.experiments.datasets.dataset import Dataset, Problems
from contrastseg_fast.experiments.datasets.folder import DataError, Folder
from contrastseg_fast.experiments.datasets.layout import Layout, finish
from contrastseg_fast.experiments.datasets.photographs import Photograph

POSITIVE = ("tissue-train-pos-v1", "tissue-train-pos")
NEGATIVE = "tissue-train-neg"
MASK = "_mask"


def recognises(folder: Folder, negatives: bool = True) -> bool:
    """Whether the folder of the slides with a lesion is there."""
    return any(folder.has(name) for name in POSITIVE)


def read(folder: Folder, problems: Problems, negatives: bool = True) -> Dataset:
    """Five folds by patient, as far as the file names tell one: the test part's masks are not public.

    An image of the negative folder has no lesion and needs no mask.
    """
    positive = next(name for name in POSITIVE if folder.has(name))
    cases = _cases(folder, problems, positive, foreground=True)
    if negatives and folder.has(NEGATIVE):
        cases += _cases(folder, problems, NEGATIVE, foreground=False)
    return finish(
        folder,
        problems,
        cases,
        name="digestpath",
        class_names=("background", "lesion"),
        in_channels=3,
    )


def patient(stem: str) -> str:
    """The patient, or at least the slide, that an image's name tells.

    Names carry the day of the scan: what stands before it is the patient (year and number, where it starts
    with a year); where nothing does, the time of the scan up to the cut-out's position tells the slide.

    >>> patient("2018_64982_1-3_2019-02-25 21_57_36-lv1-20268"), patient("18-00530B_2019-05-07 23_56_22")
    ('2018_64982', '18-00530B')
    >>> patient("2019-05-08 15_02_22-lv1-22113-19790-6356-2832"), patient("a")
    ('2019-05-08 15_02_22', 'a')
    """
    accession = re.match(r"\d{4}[_ ]\d+", stem)
    if accession:
        return accession[0]
    before, *behind = re.split(r"(?=2\d{3}-\d{2}-\d{2})", stem, maxsplit=1)
    if before.strip("_ -"):
        return before.strip("_ -")
    return behind[0].split("-lv1")[0] if behind else stem


def _cases(folder: Folder, problems: Problems, name: str, *, foreground: bool) -> list[Case]:
    files = folder.files(name, (".jpg", ".jpeg"))
    cases = []
    for stem, image in files.items():
        if stem.endswith(MASK):
            if stem.removesuffix(MASK) not in files:
                with problems.skipping():
                    raise DataError(folder.root / image, "an image of the same name", "none")
            continue
        mask = files.get(stem + MASK)
        if mask is None and foreground:
            with problems.skipping():
                raise DataError(folder.root / image, f"a mask {stem}{MASK}.jpg", "none")
            continue
        masks = () if mask is None else (mask,)
        files_of_case = Photograph(folder, image, masks, in_channels=3, foreground=foreground)
        cases.append(Case(stem, files_of_case, group=patient(stem)))
    return cases


DIGESTPATH = Layout(
    "DigestPath 2019, tissue segmentation",
    f"  {POSITIVE[0]}/x.jpg\n  {POSITIVE[0]}/x_mask.jpg\n  {NEGATIVE}/y.jpg",
    recognises,
    read,
    ("negatives",),
)
