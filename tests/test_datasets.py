"""The readers of the paper's datasets: what they read, how they split it, what they refuse."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

for package in ("PIL", "nibabel", "sklearn"):
    pytest.importorskip(package, reason="needs the experiments extra")

from dataset_fixtures import BRIGHT, build, disc, save, save_volume  # noqa: E402
from PIL import Image  # noqa: E402

from contrastseg_fast.experiments.datasets import (  # noqa: E402
    DATASETS,
    Case,
    DataError,
    Dataset,
    open_dataset,
    volumes,
)
from contrastseg_fast.experiments.datasets.digestpath import patient  # noqa: E402
from contrastseg_fast.experiments.datasets.folder import Folder  # noqa: E402
from contrastseg_fast.experiments.datasets.photographs import Photograph  # noqa: E402
from contrastseg_fast.experiments.datasets.splits import split_cases  # noqa: E402

FORMATS = (*DATASETS, "decathlon:Prostate", "decathlon:BrainTumour")


def opened(name: str, folder: Path, **options: Any) -> Dataset:
    return open_dataset(name.partition(":")[0], folder, **options)


def edit_json(folder: Path, **changes: Any) -> None:
    path = folder / "dataset.json"
    index = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in {**index, **changes}.items() if value != "gone"})
    )


def add_to_training(folder: Path, image: object, label: object = "./labelsTr/heart_001.nii.gz") -> None:
    index = json.loads((folder / "dataset.json").read_text())
    edit_json(folder, training=[*index["training"], {"image": image, "label": label}])


class TestReading:
    @pytest.mark.parametrize("name", FORMATS)
    def test_what_is_read_is_what_was_written(self, tmp_path: Path, name: str) -> None:
        dataset = opened(name, build(name, tmp_path, cases=3, size=33))
        num_parts = {"isic2016": 2, "isic2017": 3, "digestpath": 2}.get(name, 1)
        assert len(dataset) == 3 * num_parts
        assert [case.name for case in dataset.cases] == sorted(case.name for case in dataset.cases)
        case = next(case for case in dataset.cases if "D2018" not in case.name)
        image, labels, spacing = case.load()
        grey, mask = (torch.from_numpy(array) for array in disc(0, 33))
        assert image.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert image.is_contiguous()
        assert image.shape == (dataset.in_channels, *labels.shape)
        assert labels.ndim == dataset.spatial_dims
        if dataset.spatial_dims == 2:
            assert spacing is None
            assert torch.equal(labels, mask.long())
            error = (image[0] * 255 - grey).abs()
            assert error.max() < 1e-4 if name in ("ph2", "montgomery", "pairs") else error.mean() < 10  # JPEG
        else:
            assert spacing == (0.5, 0.75, 2.0)
            assert torch.equal(labels.amax(2) > 0, mask.mT)
            assert set(labels.unique().tolist()) == set(range(dataset.num_classes))
            expected = (torch.where(labels > 0, 1000, 300) + grey.mT[..., None]).float()
            channels = torch.arange(1, dataset.in_channels + 1).view(-1, 1, 1, 1)
            assert torch.equal(image, channels * expected)

    @pytest.mark.parametrize(
        ("name", "classes", "channels"),
        [
            ("isic2017", ("background", "lesion"), 3),
            ("montgomery", ("background", "lung"), 1),
            ("digestpath", ("background", "lesion"), 3),
            ("decathlon:Prostate", ("background", "part 1", "part 2"), 2),
            ("decathlon:BrainTumour", ("background", "part 1", "part 2", "part 3"), 4),
        ],
    )
    def test_classes_and_channels(
        self, tmp_path: Path, name: str, classes: tuple[str, ...], channels: int
    ) -> None:
        dataset = opened(name, build(name, tmp_path, cases=1))
        assert dataset.class_names == classes
        assert dataset.num_classes == len(classes)
        assert dataset.in_channels == channels

    def test_lungs_are_united(self, tmp_path: Path) -> None:
        folder = build("montgomery", tmp_path, cases=1)
        (mask,) = (folder / "ManualMask" / "leftMask").iterdir()
        left = Image.open(mask)
        left.paste(1, (0, 0, 3, 3))  # the lungs may overlap
        left.save(mask)
        labels = opened("montgomery", folder).cases[0].load().labels
        expected = torch.from_numpy(disc(0, 32)[1]).long()
        expected[:3, :3] = 1
        assert torch.equal(labels, expected)

    def test_images_without_a_lesion_are_background(self, tmp_path: Path) -> None:
        folder = build("digestpath", tmp_path, cases=2)
        dataset = opened("digestpath", folder)
        sums = {case.name[:5]: int(case.load().labels.sum()) for case in dataset.cases}
        assert sums["2018_"] > 0
        assert sums["D2018"] == 0
        assert len(opened("digestpath", folder, negatives=False)) == 2

    @pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "I;16"])
    def test_modes_of_a_grey_png(self, tmp_path: Path, mode: str) -> None:
        _, mask = disc(0, 16)
        save(tmp_path / "images" / "a.png", disc(0, 16)[0])
        (tmp_path / "masks").mkdir()
        grey = Image.fromarray(np.uint8(255) * mask)
        stored = Image.fromarray(mask.astype(np.uint16) * 255) if mode == "I;16" else grey.convert(mode)
        assert stored.mode == mode
        stored.save(tmp_path / "masks" / "a.png")
        labels = opened("pairs", tmp_path).cases[0].load().labels
        assert torch.equal(labels, torch.from_numpy(mask).long())

    def test_coloured_palettes_are_indices(self, tmp_path: Path) -> None:
        indices = (np.arange(64).reshape(8, 8) % 3).astype(np.uint8)
        mask = Image.fromarray(indices)
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        (tmp_path / "masks").mkdir()
        mask.save(tmp_path / "masks" / "a.png")
        save(tmp_path / "images" / "a.png", indices)
        labels = opened("pairs", tmp_path, values=(0, 1, 2)).cases[0].load().labels
        assert torch.equal(labels, torch.from_numpy(indices).long())

    def test_deep_images_reach_one(self, tmp_path: Path) -> None:
        folder = build("pairs", tmp_path, cases=1, size=8)
        save(folder / "images" / "case_000.png", np.full((16, 8), 65535, np.uint16))
        assert opened("pairs", folder).cases[0].load().image.eq(1).all()

    def test_order_of_values_is_the_order_of_classes(self, tmp_path: Path) -> None:
        grey = np.array([[128, 0], [255, 128]], np.uint8)
        save(tmp_path / "images" / "a.png", grey)
        save(tmp_path / "masks" / "a.png", grey)
        dataset = opened("pairs", tmp_path, values=(255, 128, 0), class_names=("sky", "cup", "disc"))
        assert dataset.class_names == ("sky", "cup", "disc")
        assert dataset.cases[0].load().labels.tolist() == [[1, 2], [0, 1]]

    def test_lossy_masks_go_to_the_nearest_value(self, tmp_path: Path) -> None:
        """Flat areas survive JPEG; values that lie close together, in any order, are told apart."""
        labels = np.kron([[0, 1], [2, 0]], np.ones((16, 16), int))
        values = np.array([100, 0, 160])
        save(tmp_path / "images" / "a.jpg", values[labels].astype(np.uint8))
        save(tmp_path / "masks" / "a.jpg", (values[labels] + 9).astype(np.uint8))
        dataset = opened("pairs", tmp_path, values=values.tolist())
        assert dataset.cases[0].load().labels.tolist() == labels.tolist()

    def test_pairs_of_volumes_and_other_names(self, tmp_path: Path) -> None:
        labels = np.arange(60).reshape(3, 4, 5) % 3
        for stem in ("p1_a", "p1_b", "p2_a"):
            save_volume(
                tmp_path / "t1" / f"{stem}.nii.gz", np.arange(60.0, dtype=np.float32).reshape(3, 4, 5)
            )
            save_volume(tmp_path / "truth" / f"{stem}_seg.nii", (labels * 2).astype(np.int16))
        dataset = opened(
            "pairs",
            tmp_path,
            images="t1",
            masks="truth",
            mask_suffix="_seg",
            values=(0, 2, 4),
            patient=r"^(p\d+)_",
        )
        image, read, _ = dataset["p1_b"].load()
        assert dataset.spatial_dims == 3
        assert [case.group for case in dataset.cases] == ["p1", "p1", "p2"]
        assert image.flatten().tolist() == list(range(60))
        assert read.tolist() == labels.tolist()

    def test_scaled_volumes_are_in_their_own_units(self, tmp_path: Path) -> None:
        folder = build("decathlon", tmp_path, cases=1, size=8)
        path = folder / "imagesTr" / "heart_001.nii.gz"
        stored = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into("<ff", stored, 112, 2.0, -1024.0)  # scl_slope, scl_inter
        before = opened("decathlon", folder).cases[0].load().image
        path.write_bytes(gzip.compress(bytes(stored)))
        assert torch.equal(opened("decathlon", folder).cases[0].load().image, 2 * before - 1024)

    def test_opening_decodes_nothing(self, tmp_path: Path) -> None:
        folder = build("pairs", tmp_path, cases=1, size=64)
        path = folder / "images" / "case_000.png"
        path.write_bytes(path.read_bytes()[:200])
        dataset = opened("pairs", folder)
        with pytest.raises(DataError, match=r"case_000\.png: expected a readable PNG"):
            dataset.cases[0].load()

    @pytest.mark.parametrize("name", ["isic2016", "decathlon"])
    def test_cases_travel_to_other_processes(self, tmp_path: Path, name: str) -> None:
        case = opened(name, build(name, tmp_path, cases=1)).cases[0]
        image, labels, _ = pickle.loads(pickle.dumps(case)).load()
        assert torch.equal(image, case.load().image)
        assert torch.equal(labels, case.load().labels)


class TestSplits:
    def test_official_parts_are_kept(self, tmp_path: Path) -> None:
        dataset = opened("isic2017", build("isic2017", tmp_path, cases=3, size=8))
        for seed in (0, 7):
            split = dataset.splits(seed)
            assert split.train == ("ISIC_0000000", "ISIC_0000001", "ISIC_0000002")
            assert split.validation == ("ISIC_0001000", "ISIC_0001001", "ISIC_0001002")
            assert split.test == ("ISIC_0002000", "ISIC_0002001", "ISIC_0002002")
        assert dataset.protocol == "test: the dataset's own; validation: the dataset's own"

    def test_validation_is_drawn_from_training(self, tmp_path: Path) -> None:
        dataset = opened("isic2016", build("isic2016", tmp_path, cases=20, size=8))
        drawn = set()
        for seed in range(8):
            split = dataset.splits(seed)
            assert split == dataset.splits(seed)
            assert split.test == tuple(f"ISIC_{2000 + i:07}" for i in range(20))
            assert len(split.validation) == 2
            assert sorted(split.train + split.validation) == [f"ISIC_{i:07}" for i in range(20)]
            drawn.add(split.validation)
        assert len(drawn) > 1

    def test_missing_test_part_leaves_folds(self, tmp_path: Path) -> None:
        folder = build("isic2016", tmp_path, cases=5, size=8)
        for ending in ("Data", "GroundTruth"):
            (folder / f"ISBI2016_ISIC_Part1_Test_{ending}").rename(tmp_path / ending)
        dataset = opened("isic2016", folder)
        assert dataset.protocol.startswith("test: one of five folds of cases")
        assert len(dataset.splits(0).test) == 1

    def test_folds_are_those_of_nnunet(self) -> None:
        """Literal folds of `KFold(5, shuffle=True, random_state=12345)` over ten sorted names."""
        cases = [Case(f"case_{i}", UNREAD) for i in range(10)]
        tested = [split_cases(cases, seed).test for seed in range(5)]
        assert tested == NNUNET_FOLDS

    def test_folds_are_those_of_the_nnunet_at_hand(self) -> None:
        generate = pytest.importorskip("nnunetv2.utilities.crossval_split").generate_crossval_split
        folds = generate([f"case_{i}" for i in range(10)])
        assert [tuple(fold["val"]) for fold in folds] == NNUNET_FOLDS

    @settings(max_examples=60, deadline=None)
    @given(
        groups=st.lists(st.sampled_from("abcdefgh") | st.none(), min_size=3, max_size=30),
        seed=st.integers(0, 30),
    )
    def test_every_case_is_in_one_part_and_every_patient_too(
        self, groups: list[str | None], seed: int
    ) -> None:
        cases = [Case(f"case {i}", UNREAD, group) for i, group in enumerate(groups)]
        if len({case.group or case.name for case in cases}) < 3:
            with pytest.raises(ValueError, match="at least 3 patients"):
                split_cases(cases, seed)
            return
        split = split_cases(cases, seed)
        parts = (split.train, split.validation, split.test)
        assert all(parts)
        assert sorted(sum(parts, ())) == sorted(case.name for case in cases)
        group_of = {case.name: case.group or case.name for case in cases}
        patients = [{group_of[name] for name in part} for part in parts]
        assert sum(map(len, patients)) == len(set.union(*patients))

    def test_seeds_0_to_4_test_every_case_once(self, tmp_path: Path) -> None:
        dataset = opened("montgomery", build("montgomery", tmp_path, cases=7, size=8))
        tested = [name for seed in range(5) for name in dataset.splits(seed).test]
        assert sorted(tested) == [case.name for case in dataset.cases]
        assert dataset.splits(0) != dataset.splits(5)

    def test_ph2_can_test_what_isic_2016_trains(self, tmp_path: Path) -> None:
        training = build("isic2016", tmp_path / "isic", cases=10, size=8)
        folder = build("ph2", tmp_path / "ph2", cases=3, size=8)
        split = opened("ph2", folder, isic2016=training).splits(1)
        assert split.test == ("IMD002", "IMD003", "IMD004")
        assert len(split.validation) == 1
        assert sorted(split.train + split.validation) == [f"ISIC_{i:07}" for i in range(10)]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("2018_64982_1-3_2019-02-25 21_57_36-lv1-20268-15156-7200-4864", "2018_64982"),
            ("2018_64982_1-1_2019-02-26 08_00_00-lv1-1-2-3-4", "2018_64982"),
            ("18-00530B_2019-05-07 23_56_22-lv1-30926-15446-4418-2866", "18-00530B"),
            ("D201101001_2019-05-14 17_20_41-lv1-7826-1226-3422-5018", "D201101001"),
            ("2019-05-08 15_02_22-lv1-22113-19790-6356-2832", "2019-05-08 15_02_22"),
            ("anything", "anything"),
        ],
    )
    def test_patients_of_digestpath(self, name: str, expected: str) -> None:
        assert patient(name) == expected

    def test_negative_seeds_are_refused(self) -> None:
        with pytest.raises(ValueError, match="seed: expected an integer of at least 0, got -1"):
            split_cases([], -1)


UNREAD = Photograph(Folder(Path("nowhere")), "", (), 1)
NNUNET_FOLDS = [
    ("case_0", "case_7"),
    ("case_3", "case_9"),
    ("case_4", "case_6"),
    ("case_1", "case_8"),
    ("case_2", "case_5"),
]


def remove(relative: str) -> Callable[[Path], None]:
    return lambda folder: (folder / relative).unlink()


def put(relative: str, pixels: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: save(folder / relative, pixels) and None


def put_volume(relative: str, values: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: save_volume(folder / relative, values) and None


def empty(relative: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for path in (folder / relative).iterdir():
            path.unlink()

    return apply


TRAINING_2016 = "ISBI2016_ISIC_Part1_Training_Data/ISIC_0000000.jpg"
TRUTH_2016 = "ISBI2016_ISIC_Part1_Training_GroundTruth/ISIC_0000000_Segmentation.png"
DIGEST = "tissue-train-pos-v1/2018_64980_1-0_2019-02-25 21_57_36-lv1-0-15156-3000-3000"
HEART, HEART_LABEL = "imagesTr/heart_001.nii.gz", "labelsTr/heart_001.nii.gz"
LESION = "PH2 Dataset images/IMD002/IMD002_lesion/IMD002_lesion.bmp"
RIGHT_LUNG = "ManualMask/rightMask/MCUCXR_0001_0.png"

# Dataset, what is done to it, and what the error says of which file.
BROKEN = [
    (
        "isic2016",
        remove(TRUTH_2016),
        r"ISIC_0000000\.jpg: expected a mask of the same name, got none; .*0001",
    ),
    (
        "isic2016",
        remove(TRAINING_2016),
        r"0000_Segmentation\.png: expected an image of the same name, got none",
    ),
    (
        "isic2016",
        put(TRAINING_2016, np.zeros((40, 32), np.uint8)),
        r"0\.jpg: expected a colour image .* mode L",
    ),
    ("isic2016", put(TRUTH_2016, np.zeros((32, 40), np.uint8)), r"expected 32 x 40 pixels, .* got 40 x 32"),
    ("ph2", remove(LESION), r"IMD002_lesion\.bmp: expected a file, got No such file"),
    ("montgomery", remove(RIGHT_LUNG), r"CXR_png/MCUCXR_0001_0\.png: expected a mask of the same name"),
    (
        "digestpath",
        remove(f"{DIGEST}_mask.jpg"),
        r"3000-3000\.jpg: expected a mask 2018_64980.*_mask\.jpg, got none",
    ),
    ("digestpath", remove(f"{DIGEST}.jpg"), r"3000_mask\.jpg: expected an image of the same name, got none"),
    (
        "pairs",
        lambda f: (f / "images/case_000.png").write_bytes(b""),
        r"case_000\.png: expected a readable PNG",
    ),
    (
        "pairs",
        put("masks/case_002.png", np.zeros((9, 9), np.uint8)),
        r"case_002\.png: expected an image of the",
    ),
    ("decathlon", remove(HEART), r"heart_001\.nii\.gz: expected a file, got No such file"),
    (
        "decathlon",
        put_volume(HEART, np.zeros((32, 40, 16, 2), np.float32)),
        r"heart_001\.nii\.gz: expected 1 channels \(modalities\), got shape \(32, 40, 16, 2\)",
    ),
    (
        "decathlon",
        put_volume(HEART_LABEL, np.zeros((32, 40, 15), np.uint8)),
        r"labelsTr/heart_001\.nii\.gz: expected shape \(32, 40, 16\), as .*imagesTr.* has, got \(32, 40, 15",
    ),
    ("decathlon", put_volume(HEART, np.zeros((32, 40), np.float32)), r"expected three axes"),
    (
        "decathlon",
        put_volume(HEART, np.zeros((2, 2, 2), np.complex64)),
        r"expected real numbers, got complex64",
    ),
    ("decathlon", lambda f: add_to_training(f, 3), r'dataset\.json: expected entries \{"image": path'),
    ("decathlon", lambda f: add_to_training(f, f"./{HEART}"), r"expected one case named heart_001, got two"),
    ("decathlon", lambda f: add_to_training(f, "imagesTr"), r"imagesTr: expected a file, got something else"),
    (
        "decathlon",
        lambda f: add_to_training(f, "dataset.json"),
        r"expected a file ending in \.nii or \.nii\.gz",
    ),
]

# What concerns the whole folder, and no `on_error` gets past.
HOPELESS = [
    (
        "isic2016",
        empty("ISBI2016_ISIC_Part1_Training_Data"),
        r"expected files ending in \.jpg or \.jpeg, got 0 other",
    ),
    ("montgomery", empty("CXR_png"), r"CXR_png: expected files ending in \.png, got 0 other files"),
    ("decathlon", remove("dataset.json"), r"dataset\.json: expected a file, got No such file"),
    (
        "decathlon",
        lambda f: (f / "dataset.json").write_text("{"),
        r"dataset\.json: expected JSON, got Expecting",
    ),
    ("decathlon", lambda f: (f / "dataset.json").write_text("[" * 100_000), r"dataset\.json: expected JSON"),
    ("decathlon", lambda f: (f / "dataset.json").write_text("[]"), r"expected a JSON object, got list"),
    ("decathlon", lambda f: edit_json(f, labels="gone"), r'expected "labels" as \{"0": name, .*, got None'),
    ("decathlon", lambda f: edit_json(f, labels={"0": "a", "2": "b"}), r'expected "labels" as'),
    ("decathlon", lambda f: edit_json(f, labels={"background": 0, "x": 1}), r'expected "labels" as'),
    ("decathlon", lambda f: edit_json(f, labels={"0": "background"}), r"at least one class"),
    ("decathlon", lambda f: edit_json(f, modality={"0": 1}), r'expected "modality" as'),
    ("decathlon", lambda f: edit_json(f, training=[]), r'expected a list "training" of volumes'),
    (
        "decathlon",
        lambda f: edit_json(f, training={"a": 1}),
        r'expected a list "training" of volumes, got dict',
    ),
]


class TestErrors:
    @pytest.mark.parametrize(("name", "spoil", "message"), BROKEN)
    def test_broken_cases_stop_or_are_counted(
        self, tmp_path: Path, name: str, spoil: Callable[[Path], None], message: str
    ) -> None:
        folder = build(name, tmp_path, cases=2)
        whole = len(opened(name, folder))
        spoil(folder)
        with pytest.raises(DataError, match=message):
            opened(name, folder)
        with pytest.warns(UserWarning, match=rf"1 left out, \d+ cases kept:\n  .*{message}"):
            dataset = opened(name, folder, on_error="skip")
        assert len(dataset) in (whole, whole - 1)  # an entry that was added takes none away
        assert len(dataset.skipped) == 1
        assert dataset.check()[0] == dataset.skipped[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(list(dataset.load())) == len(dataset)

    @pytest.mark.parametrize(("name", "spoil", "message"), HOPELESS)
    @pytest.mark.parametrize("on_error", ["raise", "skip"])
    def test_folders_without_hope(
        self, tmp_path: Path, name: str, spoil: Callable[[Path], None], message: str, on_error: str
    ) -> None:
        folder = build(name, tmp_path, cases=1)
        spoil(folder)
        with pytest.raises(DataError, match=message):
            opened(name, folder, on_error=on_error)

    @pytest.mark.parametrize(
        ("name", "spoil", "message"),
        [
            (
                "isic2016",
                put(TRUTH_2016, np.full((40, 32), 7, np.uint8)),
                r"expected values 0, 255 only \(one a class\), got 7 in 100\.00% of it",
            ),
            (
                "digestpath",
                put(f"{DIGEST}_mask.jpg", np.full((40, 32), 1, np.uint8)),
                r"_mask\.jpg: expected a mask with foreground \(\(255,\)\), got grey values to 1",
            ),
            (
                "digestpath",
                put(f"{DIGEST}_mask.jpg", np.full((40, 32), 120, np.uint8)),
                r"expected grey values near 0, 255, got 100% of the pixels far from them",
            ),
            (
                "ph2",
                put(LESION, np.tile(np.uint8([9, 0, 0]), (40, 32, 1))),
                r"expected a grey image, got colours \(mode RGB\)",
            ),
            (
                "decathlon",
                put_volume(HEART_LABEL, np.full((32, 40, 16), 3, np.uint8)),
                r"heart_001\.nii\.gz: expected values 0, 1 only \(one a class\), got 3 in",
            ),
            (
                "decathlon",
                put_volume(HEART_LABEL, np.full((32, 40, 16), 0.5, np.float32)),
                r"expected values 0, 1 only \(one a class\), got 0\.5 in",
            ),
            (
                "decathlon",
                put_volume(HEART_LABEL, np.full((32, 40, 16), -1, np.int16)),
                r"expected values 0, 1 only \(one a class\), got -1 in",
            ),
            (
                "decathlon",
                put_volume(HEART, np.full((32, 40, 16), np.nan, np.float32)),
                r"expected finite intensities, got NaN or infinity in 100\.00% of it",
            ),
        ],
    )
    def test_pixels_that_do_not_match(
        self, tmp_path: Path, name: str, spoil: Callable[[Path], None], message: str
    ) -> None:
        folder = build(name, tmp_path, cases=2)
        spoil(folder)
        dataset = opened(name, folder)
        with pytest.raises(DataError, match=message):
            list(dataset.load())
        assert len([problem for problem in dataset.check() if " in no case" not in problem]) == 1
        skipping = opened(name, folder, on_error="skip")
        with pytest.warns(UserWarning, match=rf"1 left out, {len(dataset) - 1} cases kept:\n  .*{message}"):
            assert len(list(skipping.load())) == len(dataset) - 1

    @pytest.mark.parametrize("name", DATASETS)
    def test_wrong_level_names_the_right_one(self, tmp_path: Path, name: str) -> None:
        folder = build(name, tmp_path / "unpacked" / "data", cases=1)
        inside = next(path for path in sorted(folder.iterdir()) if path.is_dir())
        for wrong in (tmp_path, tmp_path / "unpacked", inside):
            with pytest.raises(DataError, match="expected") as error:
                open_dataset(name, wrong)
            assert str(error.value).endswith(f"another folder; try {folder}")

    def test_other_datasets_are_told(self, tmp_path: Path) -> None:
        build("montgomery", tmp_path, cases=1)
        with pytest.raises(
            DataError, match=r"ISBI2016_ISIC_Part1_Training_Data(?s:.)*got what looks like 'mont"
        ):
            open_dataset("isic2016", tmp_path)

    def test_no_folder_and_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nowhere: expected a folder, got nothing there"):
            open_dataset("ph2", tmp_path / "nowhere")
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match="file: expected a folder, got a file"):
            open_dataset("ph2", tmp_path / "file")
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="got an empty folder"):
            open_dataset("ph2", tmp_path / "empty")

    def test_nothing_left_is_an_error(self, tmp_path: Path) -> None:
        folder = build("decathlon", tmp_path, cases=1)
        (folder / HEART).unlink()
        with (
            pytest.warns(UserWarning, match="1 left out, 0 cases kept"),
            pytest.raises(DataError, match=r"expected at least one case, got .*heart_001"),
        ):
            opened("decathlon", folder, on_error="skip")

    def test_bad_arguments(self, tmp_path: Path) -> None:
        folder = build("pairs", tmp_path, cases=1)
        with pytest.raises(ValueError, match=r"name: expected one of 'isic2016'.* got 'isic2018'"):
            open_dataset("isic2018", folder)
        with pytest.raises(ValueError, match="on_error: expected one of 'raise', 'skip', got 'warn'"):
            open_dataset("pairs", folder, on_error="warn")
        with pytest.raises(TypeError, match=r"options: expected for 'pairs' images, masks, .*, got valeus"):
            open_dataset("pairs", folder, valeus=(0, 1))
        for values in ((0,), (0, 0), (0, -1)):
            with pytest.raises(ValueError, match="values: expected"):
                open_dataset("pairs", folder, values=values)
        with pytest.raises(ValueError, match="class_names: expected 2 names, as values has, got 3"):
            open_dataset("pairs", folder, class_names=("a", "b", "c"))
        with pytest.raises(ValueError, match="patient: expected a regular expression, got '\\('"):
            open_dataset("pairs", folder, patient="(")
        with pytest.raises(ValueError, match="masks: expected another folder than images"):
            open_dataset("pairs", folder, images="masks")

    def test_photographs_and_volumes_do_not_mix(self, tmp_path: Path) -> None:
        folder = build("pairs", tmp_path, cases=1)
        save_volume(folder / "masks" / "case_001.nii", np.zeros((2, 2, 2), np.uint8))
        with pytest.raises(DataError, match="expected photographs or NIfTI volumes alike, got both"):
            opened("pairs", folder)

    def test_two_files_of_one_name(self, tmp_path: Path) -> None:
        folder = build("pairs", tmp_path, cases=1)
        save(folder / "images" / "case_000.bmp", disc(0, 32)[0])
        with pytest.raises(
            DataError, match=r"one file named case_000, got images/case_000\.bmp and case_000\.png"
        ):
            opened("pairs", folder)


class TestCheck:
    @pytest.mark.parametrize("name", FORMATS)
    def test_whole_datasets_have_no_problems(self, tmp_path: Path, name: str) -> None:
        assert opened(name, build(name, tmp_path, cases=2)).check() == []

    def test_doubts_are_reported(self, tmp_path: Path) -> None:
        folder = build("decathlon", tmp_path, cases=2)
        save_volume(folder / HEART_LABEL, np.zeros((32, 40, 16), np.uint8), spacing=(1.0, 1.0, 1.0))
        save_volume(folder / "imagesTr" / "extra.nii.gz", np.zeros((2, 2, 2), np.uint8))
        index = json.loads((folder / "dataset.json").read_text())
        edit_json(folder, numTraining=3, labels={**index["labels"], "2": "never seen"})
        problems = opened("decathlon", folder).check()
        assert len(problems) == 4
        assert 'expected 3 volumes ("numTraining"), got 2' in problems[0]
        assert "extra.nii.gz: expected an entry in dataset.json, got none" in problems[1]
        assert f"{HEART_LABEL}: expected the affine of {HEART}, got another" in problems[2]
        assert problems[3] == "class 2 (never seen) occurs in no case"

    def test_progress_sees_every_case(self, tmp_path: Path) -> None:
        dataset = opened("pairs", build("pairs", tmp_path, cases=3))
        shown = []

        def progress(cases: Any) -> Any:
            for case in cases:
                shown.append(case.name)
                yield case

        assert dataset.check(progress) == []
        assert shown == ["case_000", "case_001", "case_002"]


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class TestSafety:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        parts=st.lists(
            st.sampled_from(
                ["..", ".", "", "a", "link", "up", "C:", "~", "\\", "..\\..", "\0", "a" * 300, "\ud800"]
            )
            | st.text(max_size=6),
            max_size=6,
        ),
        start=st.sampled_from(["", "/", "./", "//", "\\\\host\\share", "C:\\", "file:///"]),
    )
    def test_no_path_leads_outside(
        self, tmp_path_factory: pytest.TempPathFactory, parts: list[str], start: str
    ) -> None:
        root = tmp_path_factory.getbasetemp() / "rooted"
        if not root.exists():
            (root / "a" / "a").mkdir(parents=True)
            (root / "link").symlink_to("a")
            (root / "up").symlink_to("..")
        try:
            path = Folder.at(root).path(start + "/".join(parts))
        except DataError:
            return
        assert path.resolve().is_relative_to(root.resolve())
        assert ".." not in path.parts

    @pytest.mark.parametrize(
        "escape",
        [
            "{outside}/secret.nii.gz",
            "../outside/secret.nii.gz",
            "./imagesTr/../../outside/secret.nii.gz",
            "imagesTr\\..\\..\\outside\\secret.nii.gz",
            "C:\\secret.nii.gz",
            "link/secret.nii.gz",
            "imagesTr/link.nii.gz",
            "\0",
            "a" * 5000,
            "\ud800.nii.gz",
        ],
    )
    def test_listed_paths_stay_inside(self, tmp_path: Path, escape: str) -> None:
        folder = build("decathlon", tmp_path / "task", cases=1)
        secret = save_volume(tmp_path / "outside" / "secret.nii.gz", np.zeros((32, 40, 16), np.uint8))
        (folder / "link").symlink_to(secret.parent)
        (folder / "imagesTr" / "link.nii.gz").symlink_to(secret)
        add_to_training(folder, escape.format(outside=secret.parent))
        with pytest.raises(DataError, match=r"expected (a path|paths|a file)"):
            opened("decathlon", folder)
        with pytest.warns(UserWarning, match="1 left out, 1 cases kept"):
            dataset = opened("decathlon", folder, on_error="skip")
        assert [case.name for case in dataset.cases] == ["heart_001"]

    def test_links_out_are_refused_by_name(self, tmp_path: Path) -> None:
        folder = build("pairs", tmp_path / "data", cases=2)
        outside = save(tmp_path / "outside.png", disc(1, 32)[0])
        (folder / "images" / "case_001.png").unlink()
        (folder / "images" / "case_001.png").symlink_to(outside)
        with pytest.raises(
            DataError, match=r"case_001\.png: expected a path inside .*, got a link to .*outside\.png"
        ):
            opened("pairs", folder)
        for option in ({"images": ".."}, {"masks": str(tmp_path)}, {"images": "../data/images"}):
            with pytest.raises(DataError, match="expected paths inside this folder"):
                opened("pairs", folder, **option)

    def test_links_made_after_opening_are_refused(self, tmp_path: Path) -> None:
        folder = build("decathlon", tmp_path / "task", cases=1)
        case = opened("decathlon", folder).cases[0]
        outside = (folder / HEART).rename(tmp_path / "heart_001.nii.gz")
        (folder / HEART).symlink_to(outside)
        with pytest.raises(DataError, match="expected a path inside"):
            case.load()

    def test_links_inside_and_a_linked_folder_are_fine(self, tmp_path: Path) -> None:
        folder = build("pairs", tmp_path / "data", cases=2)
        (folder / "images" / "case_001.png").unlink()
        (folder / "images" / "case_001.png").symlink_to("case_000.png")
        (tmp_path / "shortcut").symlink_to(folder)
        assert len(opened("pairs", tmp_path / "shortcut")) == 2

    def test_loops_and_pipes_are_refused(self, tmp_path: Path) -> None:
        folder = build("pairs", tmp_path, cases=2)
        first, second = (folder / "images" / f"case_00{i}.png" for i in range(2))
        first.unlink()
        second.unlink()
        first.symlink_to(first)
        with pytest.raises(DataError, match=r"images/case_001\.png: expected a file, got No such file"):
            Folder.at(folder).file("images/case_001.png")
        os.mkfifo(second)
        with pytest.raises(DataError, match=r"images/case_001\.png: expected a file, got something else"):
            Folder.at(folder).file("images/case_001.png")
        with pytest.raises(DataError, match=r"expected at least one readable image, got none: .*case_000"):
            opened("pairs", folder, on_error="skip")

    @pytest.mark.parametrize("disguise", ["images/case_000.png", "masks/case_000.png"])
    def test_nothing_is_executed(self, tmp_path: Path, disguise: str) -> None:
        """Pickles would run code, and PostScript would start Ghostscript: whatever the name says."""

        class Trap:
            def __reduce__(self) -> tuple[Any, tuple[str]]:
                return os.mkdir, (str(tmp_path / "sprung"),)

        folder = build("pairs", tmp_path, cases=2)
        postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 40\n%%EndComments\nshowpage\n"
        for content in (pickle.dumps(Trap()), postscript):
            (folder / disguise).write_bytes(content)
            with pytest.raises(
                DataError, match=r"case_000\.png: expected a readable PNG, JPEG, BMP or TIFF file"
            ):
                opened("pairs", folder)
        np.save(folder / "trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
        (folder / "trap.npy").rename(folder / disguise)
        with pytest.raises(DataError, match="expected a readable PNG"):
            opened("pairs", folder)
        assert not (tmp_path / "sprung").exists()

    def test_huge_pictures_are_refused_by_their_header(self, tmp_path: Path) -> None:
        folder = build("pairs", tmp_path, cases=2)
        for name in ("images", "masks"):
            (folder / name / "case_001.png").write_bytes(png_claiming(200_000, 200_000))
        with pytest.raises(
            DataError, match=r"case_001\.png: expected an image within PIL\.Image\.MAX_IMAGE_PIXELS"
        ):
            opened("pairs", folder)

    @pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("shape", [(32767, 32767, 32767), (2000, 2000, 200), (32, 40, 5000)])
    def test_huge_volumes_are_refused_by_their_header(
        self, tmp_path: Path, ending: str, shape: tuple[int, ...]
    ) -> None:
        path = save_volume(tmp_path / "images" / f"a{ending}", np.zeros((2, 2, 2), np.float64))
        save_volume(tmp_path / "masks" / f"a{ending}", np.zeros((2, 2, 2), np.uint8))
        stored = bytearray(gzip.decompress(path.read_bytes()) if ending == ".nii.gz" else path.read_bytes())
        struct.pack_into("<hhh", stored, 42, *shape)
        path.write_bytes(gzip.compress(bytes(stored)) if ending == ".nii.gz" else bytes(stored))
        with pytest.raises(DataError, match=rf"a{ending}: expected at most .* got a header that claims \d+"):
            opened("pairs", tmp_path)

    def test_volumes_that_compress_well_are_refused_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = build("decathlon", tmp_path, cases=1, size=8)
        monkeypatch.setattr(volumes, "MAX_VALUES", 8 * 16 * 4 - 1)
        with pytest.raises(DataError, match=r"expected at most 511 values, got a header that claims 512"):
            opened("decathlon", folder)

    @pytest.mark.parametrize("name", ["pairs", "isic2016", "ph2", "decathlon"])
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    @pytest.mark.filterwarnings("ignore")
    def test_broken_bytes_raise_one_error(
        self, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
    ) -> None:
        folder = tmp_path_factory.getbasetemp() / f"broken {name}"
        if not folder.exists():
            build(name, folder, cases=1, size=8)
        files = sorted(path for path in folder.rglob("*.*") if path.is_file() and path.name[0] != ".")
        path = data.draw(st.sampled_from(files))
        whole = path.read_bytes()
        broken = bytearray(gzip.decompress(whole) if path.name.endswith(".gz") else whole)
        for _ in range(data.draw(st.integers(0, 4))):
            broken[data.draw(st.integers(0, min(len(broken), 400) - 1))] = data.draw(st.integers(0, 255))
        del broken[data.draw(st.integers(len(broken) // 2, len(broken))) :]
        message = str(folder)
        try:
            path.write_bytes(gzip.compress(bytes(broken)) if path.name.endswith(".gz") else bytes(broken))
            for case in opened(name, folder).cases:
                image, labels, _ = case.load()
                assert image.isfinite().all()
                assert labels.min() >= 0
                assert labels.max() <= 1
        except DataError as error:
            message = str(error)
        finally:
            path.write_bytes(whole)
        assert message.startswith(str(folder))


def test_fixture_discs_are_bright() -> None:
    grey, mask = disc(3, 33)
    assert grey.shape == mask.shape == (41, 33)
    assert abs(grey[mask].mean() - BRIGHT) < 5
    with pytest.raises(ValueError, match="expected a dataset"):
        build("nothing", Path("nowhere"))


@pytest.mark.parametrize("name", DATASETS)
def test_documentation_shows_the_layout_and_the_fixture_has_it(tmp_path: Path, name: str) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "datasets.md").read_text()
    assert f"```\n{DATASETS[name].tree}\n```" in page
    folder = build(name, tmp_path, cases=1, size=8)
    made = {path.parent.relative_to(folder) for path in folder.rglob("*.*") if path.is_file()}
    shown = {Path(line.strip()).parent for line in DATASETS[name].tree.splitlines()}
    assert made == shown
