"""The datasets of the paper's Table 1 in the folders they come in, and any folders of images and masks."""

from __future__ import annotations

import os
from typing import Any

from contrastseg_fast import _checks
from contrastseg_fast.experiments.datasets import decathlon, digestpath, isic, montgomery, pairs, ph2
from contrastseg_fast.experiments.datasets.case import Case, Sample
from contrastseg_fast.experiments.datasets.dataset import ON_ERROR, Dataset, Problems
from contrastseg_fast.experiments.datasets.folder import DataError, Folder
from contrastseg_fast.experiments.datasets.layout import Layout, wrong_folder
from contrastseg_fast.experiments.datasets.splits import Split

__all__ = ["DATASETS", "Case", "DataError", "Dataset", "Layout", "Sample", "Split", "open_dataset"]

DATASETS: dict[str, Layout] = {
    "isic2016": isic.ISIC_2016,
    "isic2017": isic.ISIC_2017,
    "ph2": ph2.PH2,
    "montgomery": montgomery.MONTGOMERY,
    "digestpath": digestpath.DIGESTPATH,
    "decathlon": decathlon.DECATHLON,
    "pairs": pairs.PAIRS,
}


def open_dataset(
    name: str, folder: str | os.PathLike[str], *, on_error: str = "raise", **options: Any
) -> Dataset:
    """Open a dataset: names and headers are read now, pixels when a case is loaded.

    Nothing outside `folder` is read (absolute paths, `..` and symbolic links that lead out are refused),
    nothing that is read is executed, and no image is decoded that is larger than Pillow's limit or that
    claims more voxels than its file can hold.

    Args:
        name: one of `DATASETS`: "isic2016", "isic2017", "ph2", "montgomery", "digestpath", "decathlon" (any
            task) or "pairs" (any folder of images and one of masks).
        folder: the folder as unpacked; `DATASETS[name].tree` shows what is expected in it.
        on_error: what a broken file does, here and in `Dataset.load`: "raise" stops with a DataError that
            names it, "skip" leaves its case out and counts what was left out in one warning.
        options: those of the one dataset. "ph2": `isic2016`, the folder of ISIC 2016 to train on.
            "digestpath": `negatives=False` leaves out the images without a lesion. "pairs": `images` and
            `masks`, names of the two subfolders; `values`, the grey value of every class in the masks;
            `class_names`; `mask_suffix`, what a mask's name has behind the image's; `patient`, a regular
            expression whose first group (or whole match) in a name is the patient.

    Returns:
        the dataset, its cases in the order of their names.

    Raises:
        DataError: a ValueError. The folder does not hold this dataset (the message names a folder nearby that
            does), a file is missing or does not match, or no case is left.
        TypeError, ValueError: an argument is not one of those above.

    Example:
        >>> import numpy, pathlib, tempfile
        >>> from PIL import Image
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for part in ("images", "masks"):
        ...     (folder / part).mkdir()
        ...     Image.fromarray(numpy.eye(4, dtype=numpy.uint8) * 255).save(folder / part / "a.png")
        >>> dataset = open_dataset("pairs", folder)
        >>> dataset.num_classes, dataset.in_channels, dataset["a"].load().labels.sum()
        (2, 1, tensor(4))
    """
    _checks.one_of("name", name, tuple(DATASETS))
    _checks.one_of("on_error", on_error, ON_ERROR)
    layout = DATASETS[name]
    unknown = sorted(set(options) - set(layout.options))
    if unknown:
        allowed = ", ".join(layout.options) or "none"
        _checks.fail_type("options", f"for {name!r} {allowed}", ", ".join(unknown))
    opened = Folder.at(folder)
    if not layout.recognises(opened, **options):
        raise wrong_folder(layout, DATASETS, opened, options)
    return layout.read(opened, Problems(on_error), **options)
