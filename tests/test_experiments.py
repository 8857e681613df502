"""The demo: its data, what it measures, and that it keeps its promises on seeds, files and Ctrl-C."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for package in ("monai", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason="needs the demo extra")

from contrastseg_fast.experiments import compare, demo, evaluation, report, training  # noqa: E402
from contrastseg_fast.experiments.data import (  # noqa: E402
    BUNDLED,
    Volume,
    as_input,
    augmented_batches,
    load_volume,
    split_slices,
    to_input,
)
from contrastseg_fast.experiments.tables import Table, tables  # noqa: E402

TINY = demo.Settings(steps=2, batch_size=2, sizes=(96,), timing_rounds=1, tsne_points=100)


@pytest.fixture(scope="module")
def volume() -> Volume:
    """Every fourth slice of the bundled CT, at a quarter of its resolution."""
    whole = load_volume()
    return Volume(whole.image[::4, ::4, ::4].copy(), whole.labels[::4, ::4, ::4].copy(), whole.class_names)


@pytest.fixture(scope="module")
def data(volume: Volume, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, image=volume.image, labels=volume.labels, class_names=np.array(volume.class_names))
    return path


class TestData:
    def test_bundled_volume(self) -> None:
        volume = load_volume()
        assert volume.image.shape == volume.labels.shape == (133, 128, 128)
        assert volume.class_names == ("background", "lungs", "heart and vessels", "bones", "other organs")
        assert np.unique(volume.labels).tolist() == [0, 1, 2, 3, 4]
        assert BUNDLED.stat().st_size <= 1_500_000
        assert "MIT License" in BUNDLED.with_suffix(".LICENSE").read_text()

    def test_bundled_volume_lies_as_radiologists_view_it(self) -> None:
        volume = load_volume()
        _, row, column = (axis.mean() for axis in np.nonzero(volume.labels[60:100] == 2))
        assert column > 64  # the heart is on the patient's left, the right of the picture
        bones = np.nonzero(volume.labels[:30] == 3)[1].mean()
        assert bones > row  # the spine is below the heart
        lungs = np.nonzero(volume.labels == 1)[0].mean()
        organs = np.nonzero(volume.labels == 4)[0].mean()
        assert lungs > organs  # slices run from the feet to the head
        assert volume.image[volume.labels == 1].mean() < 60  # air is dark
        assert volume.image[volume.labels == 3].mean() > 180  # bone is bright

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": None}, "expected the arrays image and labels"),
            ({"image": np.zeros((16, 16, 16), np.float32)}, "expected image as"),
            ({"labels": np.zeros((16, 16, 8), np.uint8)}, "expected labels as"),
            (
                {"image": np.zeros((16, 9, 16), np.uint8), "labels": np.zeros((16, 9, 16), np.uint8)},
                "multiples",
            ),
            (
                {"image": np.zeros((3, 16, 16), np.uint8), "labels": np.zeros((3, 16, 16), np.uint8)},
                "at least 12",
            ),
            ({"class_names": np.array(["one", "two"])}, "a name for each of 3 classes"),
            ({"class_names": np.array([{}], dtype=object)}, "plain arrays"),
        ],
    )
    def test_unfit_files_are_refused(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        labels = np.full((16, 16, 16), 2, np.uint8)
        arrays = {"image": labels, "labels": labels, **change}
        np.savez(tmp_path / "x.npz", **{name: array for name, array in arrays.items() if array is not None})
        with pytest.raises(ValueError, match=message):
            load_volume(tmp_path / "x.npz")

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        np.save(tmp_path / "array.npy", np.zeros(3))
        (tmp_path / "text.npz").write_text("not an archive")
        for name in ("array.npy", "text.npz"):
            with pytest.raises(ValueError, match="plain arrays"):
                load_volume(tmp_path / name)

    @pytest.mark.parametrize("num_slices", [12, 13, 40, 133, 500])
    def test_split_is_contiguous_with_a_gap(self, num_slices: int) -> None:
        split = split_slices(num_slices)
        first, last = split.test[0], split.test[-1]
        assert split.test == tuple(range(first, last + 1))
        below = [z for z in split.train if z < first]
        above = [z for z in split.train if z > last]
        assert below == list(range(first - split.gap))
        assert above == list(range(last + split.gap + 1, num_slices))
        assert split.gap >= 1
        assert below
        assert above

    def test_batches_follow_the_seed(self, volume: Volume) -> None:
        def batches(seed: int) -> list[torch.Tensor]:
            pairs = augmented_batches(volume, split_slices(len(volume.image)).train, 3, 4, seed)
            return [torch.as_tensor(array) for pair in pairs for array in pair]

        once, again, other = batches(0), batches(0), batches(1)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(once, other, strict=True))

    def test_labels_move_with_the_image(self) -> None:
        labels = load_volume().labels[60:76]
        volume = Volume(labels * 50, labels, ("a", "b", "c", "d", "e"))
        for image, moved in augmented_batches(volume, tuple(range(16)), 4, 4, seed=0):
            assert image.dtype == moved.dtype == torch.uint8
            assert set(moved.unique().tolist()) <= {0, 1, 2, 3, 4}
            assert (image.int() - 50 * moved.int()).abs().le(25).float().mean() > 0.97


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).resolve().parent.parent / "scripts" / "reduce_chest_ct.py"
    spec = importlib.util.spec_from_file_location("reduce_chest_ct", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestReduction:
    def test_labels_go_to_the_majority_and_ties_to_the_first_class(self, script: Any) -> None:
        structures = [
            {"id": "1", "structure": "heart", "group": "cardiac"},
            {"id": "2", "structure": "lung_upper_lobe_left", "group": "organs"},
            {"id": "3", "structure": "gluteus_maximus_left", "group": "muscles"},
        ]
        mask = np.zeros((1, 4, 12), np.uint8)
        mask[0, :, :4].flat[:9] = 1  # 9 of 16 pixels
        mask[0, :2, 4:8], mask[0, 2:, 4:8] = 1, 2  # 8 and 8
        mask[0, :, 8:] = 3
        assert script.reduce_labels(mask, structures).tolist() == [[[2, 1, 0]]]

    def test_image_is_clipped_then_averaged(self, script: Any) -> None:
        hounsfield = np.full((1, 4, 8), -2048.0)
        hounsfield[0, :2, 4:] = 3000
        assert script.reduce_image(hounsfield).tolist() == [[[0, 128]]]

    def test_axes(self, script: Any) -> None:
        volume = np.zeros((2, 3, 4))
        volume[1, 2, 3] = 1  # the most left, front and head
        assert np.argwhere(script.axial(volume)).tolist() == [[3, 0, 1]]


class TestTraining:
    def batch(self, volume: Volume) -> tuple[torch.Tensor, torch.Tensor]:
        return as_input(*next(augmented_batches(volume, split_slices(len(volume.image)).train, 1, 2, seed=0)))

    def test_same_seed_same_numbers(self, volume: Volume) -> None:
        def train(seed: int) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
            trainer = training.demo_trainer(training.RUNS[-1], volume, num_steps=3, seed=seed)
            losses = [trainer.step(*self.batch(volume)) for _ in range(3)]
            return losses, list(trainer.model.state_dict().values())

        (losses, weights), (losses_again, weights_again) = train(seed=3), train(seed=3)
        assert losses == losses_again
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))
        assert train(seed=4)[0] != losses

    @pytest.mark.parametrize("run", training.RUNS, ids=lambda run: run.name)
    def test_fast_and_reference_train_alike(self, volume: Volume, run: training.Run) -> None:
        batch = self.batch(volume)
        losses = {}
        for backend in ("auto", "reference"):
            trainer = training.demo_trainer(run, volume, num_steps=3, seed=0, backend=backend)
            losses[backend] = [trainer.step(*batch) for _ in range(3)]
        for fast, reference in zip(losses["auto"], losses["reference"], strict=True):
            assert ("pdcr" in fast) == run.pdcr
            assert fast == pytest.approx(reference, rel=1e-3)

    def test_step_seconds_times_every_run_in_turn(self, volume: Volume) -> None:
        trainers = {run.name: training.demo_trainer(run, volume, 3, seed=0) for run in training.RUNS[:2]}
        ticks: list[None] = []
        seconds = training.step_seconds(trainers, self.batch(volume), 2, lambda: ticks.append(None))
        assert list(seconds) == ["baseline", "+ PDCR"]
        assert min(seconds.values()) > 0
        assert len(ticks) == 2 * 3


class TestEvaluation:
    def test_scores_of_a_known_case(self) -> None:
        labels = torch.tensor([[[0, 1], [1, 2]], [[0, 0], [2, 2]]])
        predictions = torch.tensor([[[0, 1], [0, 2]], [[0, 0], [2, 1]]])
        found = evaluation.scores(predictions, labels, ("background", "one", "two", "absent"))
        assert found["dice_of_class"] == {
            "one": pytest.approx(0.5),
            "two": pytest.approx(0.8),
            "absent": None,
        }
        assert found["dice"] == pytest.approx(0.65)
        assert found["jaccard"] == pytest.approx((1 / 3 + 2 / 3) / 2)
        assert found["accuracy"] == pytest.approx(6 / 8)

    def test_embedding_statistics_of_known_vectors(self) -> None:
        layer = next(iter(training.LAYERS))
        ratios = torch.eye(4)[None].expand(2, -1, -1)
        alike = evaluation.Hidden(torch.ones(2, 4, 8), ratios)
        apart = evaluation.Hidden(torch.eye(4).expand(2, -1, -1), ratios)
        assert evaluation.embedding_statistics({layer: alike})[layer] == pytest.approx(
            {"mean_cosine": 1.0, "repelled_fraction": 1.0}
        )
        assert evaluation.embedding_statistics({layer: apart})[layer]["mean_cosine"] == pytest.approx(0.0)

    def test_examine_finds_uncertainty_and_ratios(self, volume: Volume) -> None:
        images, labels = to_input(volume.image[10:14]), torch.from_numpy(volume.labels[10:14])
        trainer = training.demo_trainer(training.RUNS[-1], volume, 1, seed=0)
        boxes = training.boxes(trainer.model, images)
        outcome = evaluation.examine(trainer.model, images, labels, volume.num_classes, boxes)
        assert outcome.uncertainty is not None
        assert outcome.uncertainty.shape == (4, 16, 16)
        assert 0 <= outcome.uncertainty.min() <= outcome.uncertainty.max() <= 1
        assert torch.equal(outcome.predictions, evaluation.predict(trainer.model, images))
        assert [layer.vectors.shape for layer in outcome.hidden.values()] == [
            (4, 256, 16),
            (4, 64, 32),
            (4, 16, 64),
        ]
        for layer in outcome.hidden.values():
            assert layer.ratios.sum(-1).max() <= 1 + 1e-6
        baseline = training.demo_trainer(training.RUNS[0], volume, 1, seed=0)
        boxes = training.boxes(baseline.model, images)
        outcome = evaluation.examine(baseline.model, images, labels, volume.num_classes, boxes)
        assert outcome.uncertainty is None


class TestComparison:
    def measured(self, data: Path) -> dict[str, dict[str, Any]]:
        found: dict[str, Any] = {"fast": {}, "reference": {}}

        def emit(name: str, value: Any) -> None:
            found[name] = {**found[name], **value} if isinstance(value, dict) else value

        compare.measure(*compare.pairs_of_slice(data, 128, seed=0), emit)
        return found

    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compare, "SECONDS", 0.0)

    def test_both_agree(self, data: Path) -> None:
        found = self.measured(data)
        assert found["value_difference"] < 1e-5
        assert found["gradient_difference"] < 1e-5
        for name in ("fast", "reference"):
            assert found[name]["seconds"] > 0
            assert found[name]["peak_bytes"] >= 0

    def test_reference_that_does_not_fit_is_refused(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compare, "available_bytes", lambda: 1e5)
        found = self.measured(data)
        assert "needs about" in found["reference"]["refused"]
        assert "seconds" not in found["reference"]
        assert found["fast"]["seconds"] > 0

    def test_reference_that_fails_is_reported(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def greedy(vectors: torch.Tensor, ratios: torch.Tensor, **options: Any) -> torch.Tensor:
            if vectors.shape[1] > 64:
                torch.empty(1 << 60)
            return compare.reference.pdcr_loss(vectors, ratios, **options)

        monkeypatch.setitem(compare.IMPLEMENTATIONS, "reference", greedy)
        found = self.measured(data)
        assert "failed" in found["reference"]["refused"]
        assert found["fast"]["seconds"] > 0

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
    def test_peak_bytes_sees_memory_that_is_gone_again(self) -> None:
        size = 64 << 20
        for _ in range(2):
            _, peak = compare.peak_bytes(lambda: torch.ones(size // 4).sum().item())
            assert 0.9 * size < peak < 1.3 * size

    def test_a_process_of_its_own(self, data: Path) -> None:
        found = compare.compare(data, 64, seed=0)
        assert found["num_vectors"] == 64
        assert found["fast"]["value"] == pytest.approx(found["reference"]["value"], rel=1e-5)


class TestReport:
    def test_table(self) -> None:
        table = Table("Title", ["run", "Dice"], [["a <b>", "0.5"], ["c", "10.25"]], "A note.")
        assert table.text() == "Title\n  run     Dice\n  a <b>    0.5\n  c      10.25\n  A note.\n"
        assert "<td>a &lt;b&gt;</td>" in table.html()

    def test_sizes_the_reference_cannot_hold_say_so(self) -> None:
        refused = {
            "num_vectors": 8,
            "fast": {"value": 1.0, "seconds": 1e-3},
            "reference": {"refused": "too big"},
        }
        results = {"runs": {}, "step_seconds": {}, "comparison": [refused]}
        (table,) = tables(results).values()
        assert table.rows == [["8", "1.00000", "-", "-", "1.00", "too big", "-", "-"]]


class TestDemo:
    def run(self, data: Path, out: Path, **changes: Any) -> tuple[int, dict[str, Any], str]:
        out.mkdir(exist_ok=True)
        settings = replace(TINY, data=data, out=out, **changes)
        status = demo.run_demo(settings, load_volume(data))
        return status, json.loads((out / "results.json").read_text()), (out / "index.html").read_text()

    @pytest.fixture(autouse=True)
    def _nondeterministic_again(self) -> Any:
        yield
        torch.use_deterministic_algorithms(False)

    def test_from_end_to_end_twice(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compare, "SECONDS", 0.0)
        status, results, page = self.run(data, tmp_path / "a")
        assert status == 0
        assert results["finished"]
        assert {path.name for path in (tmp_path / "a").iterdir()} == {
            *report.PICTURES,
            "results.json",
            "index.html",
        }
        assert page.count("data:image/png;base64,") == len(report.PICTURES) == 5
        assert "prove nothing about accuracy" in " ".join(page.split())
        printed = " ".join(capsys.readouterr().out.split())
        assert "prove nothing about accuracy" in printed
        for table in tables(results).values():
            assert table.title in printed
            assert table.html() in page
        assert list(results["runs"]) == [run.name for run in training.RUNS]
        assert set(results["step_seconds"]) == {*results["runs"], "+ both, reference"}
        for run in results["runs"].values():
            assert len(run["curves"]["segmentation"]) == 2
            assert 0 <= run["scores"]["dice"] <= 1

        _, again, _ = self.run(data, tmp_path / "b", sizes=())
        assert again["runs"] == results["runs"]

    def test_interrupt_keeps_what_is_done(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        step: Callable[..., dict[str, float]] = training.Trainer.step
        steps = []

        def interrupted_step(trainer: training.Trainer, *batch: torch.Tensor) -> dict[str, float]:
            steps.append(trainer)
            if len(steps) == 4:  # the second step of the second run
                os.kill(os.getpid(), signal.SIGINT)
            return step(trainer, *batch)

        monkeypatch.setattr(training.Trainer, "step", interrupted_step)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
        try:
            status, results, page = self.run(data, tmp_path)
        finally:
            signal.signal(signal.SIGINT, before)
        assert status == 130
        assert not results["finished"]
        assert "scores" in results["runs"]["baseline"]
        assert "scores" not in results["runs"]["+ PDCR"]
        assert len(results["runs"]["+ PDCR"]["curves"]["segmentation"]) == 1
        assert "Not finished" in page
        assert "Held-out slices after 2 steps" in page
        assert page.count("data:image/png;base64,") == 1  # learning curves
        assert "Interrupted" in capsys.readouterr().err

    def test_command_line_refuses_bad_input(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").touch()
        for option, value in (("--steps", "0"), ("--seed", "-1"), ("--data", "none.npz"), ("--out", "file")):
            if option in ("--data", "--out"):
                value = str(tmp_path / value)
            with pytest.raises(SystemExit) as error:
                demo.main(["--out", str(tmp_path / "out"), option, value])
            assert error.value.code == 2
            message = capsys.readouterr().err.splitlines()[-1]
            assert f"error: {option}: " in message
            assert value in message
        assert not (tmp_path / "out").exists()


def test_importing_the_package_does_not_import_the_experiments() -> None:
    code = (
        "import sys, contrastseg_fast; "
        "print([m for m in sys.modules if m.startswith('contrastseg_fast.experiments') or m == 'monai'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
