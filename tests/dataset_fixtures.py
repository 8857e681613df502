"""Small datasets in every format that the readers know, laid out as the real ones are."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

BRIGHT, DARK = 200, 60
CLASSES = {"Heart": 2, "Prostate": 3, "BrainTumour": 4}
MODALITIES = {"Heart": ("MRI",), "Prostate": ("T2", "ADC"), "BrainTumour": ("FLAIR", "T1w", "t1gd", "T2w")}


def build(name: str, folder: Path, cases: int = 4, size: int = 32) -> Path:
    """Write a small dataset for `open_dataset(name, ...)`, and return the folder to open.

    Photographs are `size` wide and `size + 8` high, volumes `size x (size + 8) x (size // 2)`. Every case
    shows one brighter disc (in volumes a cylinder), which is the foreground. "isic2016" and "isic2017" have
    `cases` in each of their parts; "decathlon" is Task02 Heart, and "decathlon:Prostate" and
    "decathlon:BrainTumour" the other two of the paper; "digestpath" has `cases` with and `cases` without a
    lesion.
    """
    match name.partition(":"):
        case ("isic2016", _, _):
            for part in ("Training", "Test"):
                _isic(folder, f"ISBI2016_ISIC_Part1_{part}", "", "_Segmentation", cases, size)
        case ("isic2017", _, _):
            for part in ("Training", "Validation", "Test_v2"):
                _isic(folder, f"ISIC-2017_{part}", "_Part1", "_segmentation", cases, size)
                for image in sorted((folder / f"ISIC-2017_{part}_Data").glob("*.jpg")):
                    image.with_name(f"{image.stem}_superpixels.png").touch()
                (folder / f"ISIC-2017_{part}_Data" / f"ISIC-2017_{part}_Data_metadata.csv").touch()
        case ("ph2", _, _):
            for index in range(cases):
                stem = f"IMD{index + 2:03}"
                place = folder / "PH2 Dataset images" / stem
                image, mask = disc(index, size)
                save(place / f"{stem}_Dermoscopic_Image" / f"{stem}.bmp", _colour(image))
                save(place / f"{stem}_lesion" / f"{stem}_lesion.bmp", mask)
        case ("montgomery", _, _):
            for index in range(cases):
                stem = f"MCUCXR_{index + 1:04}_{index % 2}.png"
                image, mask = disc(index, size)
                left, right = mask.copy(), mask.copy()
                left[:, : size // 2], right[:, size // 2 :] = False, False
                save(folder / "CXR_png" / stem, image)
                save(folder / "ManualMask" / "leftMask" / stem, left)
                save(folder / "ManualMask" / "rightMask" / stem, right)
        case ("digestpath", _, _):
            for index in range(cases):
                stem = f"2018_{64980 + index // 2}_1-{index}_2019-02-25 21_57_36-lv1-{index}-15156-3000-3000"
                image, mask = disc(index, size)
                save(folder / "tissue-train-pos-v1" / f"{stem}.jpg", _colour(image))
                save(folder / "tissue-train-pos-v1" / f"{stem}_mask.jpg", np.uint8(255) * mask)
                stem = f"D2018{index:05}_2019-05-14 17_20_41-lv1-{index}-6000-4000-3000"
                save(folder / "tissue-train-neg" / f"{stem}.jpg", _colour(np.full_like(image, DARK)))
        case ("decathlon", _, task):
            _decathlon(folder, task or "Heart", cases, size)
        case ("pairs", _, _):
            for index in range(cases):
                image, mask = disc(index, size)
                save(folder / "images" / f"case_{index:03}.png", image)
                save(folder / "masks" / f"case_{index:03}.png", np.uint8(255) * mask)
        case _:
            raise ValueError(f"name: expected a dataset, got {name!r}")
    return folder


def disc(index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image `(size + 8, size)` uint8 with one brighter disc, and the disc as bool; both follow `index`."""
    generator = np.random.default_rng(index)
    rows, columns = np.ogrid[: size + 8, :size]
    centre = size / 2 + generator.uniform(-size / 8, size / 8, 2)
    mask = (rows - centre[0] - 4) ** 2 + (columns - centre[1]) ** 2 < (size / 4) ** 2
    noise = generator.integers(-20, 20, mask.shape)
    return (np.where(mask, BRIGHT, DARK) + noise).astype(np.uint8), mask


def save(path: Path, pixels: np.ndarray) -> Path:
    """Write a picture in the format of its suffix, and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def save_volume(path: Path, values: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Path:
    """Write a NIfTI file, and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([*spacing, 1.0])), path)
    return path


def _colour(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey, grey // 2, grey // 4], -1)


def _isic(folder: Path, start: str, part: str, ending: str, cases: int, size: int) -> None:
    first = {"Training": 0, "Validation": 1000, "Test": 2000}[start.split("_")[-1].replace("v2", "Test")]
    for index in range(cases):
        stem = f"ISIC_{first + index:07}"
        image, mask = disc(index, size)
        save(folder / f"{start}_Data" / f"{stem}.jpg", _colour(image))
        save(folder / f"{start}{part}_GroundTruth" / f"{stem}{ending}.png", np.uint8(255) * mask)


def _decathlon(folder: Path, task: str, cases: int, size: int) -> None:
    modalities, num_classes = MODALITIES[task], CLASSES[task]
    names = [f"{task.lower()}_{index + 1:03}.nii.gz" for index in range(cases)]
    for index, name in enumerate(names):
        image, mask = disc(index, size)
        depth = np.arange(size // 2)
        inside = mask.T[..., None] & (np.abs(depth - size // 4) < size // 6)
        labels = (inside * (1 + depth % (num_classes - 1))).astype(np.uint8)
        volume = np.where(inside, 1000.0, 300.0) + image.T[..., None]
        channels = np.stack([volume * (m + 1) for m in range(len(modalities))], -1).astype(np.float32)
        spacing = (0.5, 0.75, 2.0)
        save_volume(
            folder / "imagesTr" / name, channels if len(modalities) > 1 else channels[..., 0], spacing
        )
        save_volume(folder / "labelsTr" / name, labels, spacing)
        (folder / "imagesTr" / f"._{name}").write_bytes(b"Mac OS X")
    index_file = {
        "name": task,
        "tensorImageSize": "3D" if len(modalities) == 1 else "4D",
        "modality": {str(m): modality for m, modality in enumerate(modalities)},
        "labels": {"0": "background", **{str(m): f"part {m}" for m in range(1, num_classes)}},
        "numTraining": cases,
        "numTest": 1,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": ["./imagesTs/unseen.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(index_file))
