"""Training from settings, alone and in two processes, and the studies over seeds, on tiny datasets."""

from __future__ import annotations

import html
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for package in ("monai", "nibabel", "pydantic", "scipy", "sklearn", "matplotlib", "tqdm", "yaml"):
    pytest.importorskip(package, reason="needs the experiments extra")

from dataset_fixtures import build  # noqa: E402
from scipy import stats  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from contrastseg_fast.experiments import __main__ as command  # noqa: E402
from contrastseg_fast.experiments import comparators, networks, runs, study  # noqa: E402
from contrastseg_fast.experiments.batches import Cases, Patches, batches  # noqa: E402
from contrastseg_fast.experiments.config import CONFIGS, Config, Network, load_config, load_published  # noqa: E402
from contrastseg_fast.experiments.datasets import DataError  # noqa: E402

TINY: dict[str, Any] = {
    "data": {"name": "pairs", "patch": [16, 16], "foreground_crops": 0.5},
    "network": {"name": "unet", "channels": [4, 8, 8], "residual_units": 1, "norm": "instance"},
    "pdcr": {"layers": "encoder", "weight": 0.1, "num_samples": 16, "sampler": "random"},
    "gate": {"hidden_channels": 4, "norm": "instance"},
    "training": {"steps": 6, "epoch_steps": 3, "batch_size": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("pairs", tmp_path_factory.mktemp("pairs"), cases=8, size=24)


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return Config.model_validate(TINY).changed({"data.folder": str(folder)})


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(json.dumps(TINY))  # JSON is YAML
    return path


def weights(out: Path) -> dict[str, Tensor]:
    saved = torch.load(out / runs.CHECKPOINT, weights_only=True)
    model: dict[str, Tensor] = saved["model"]
    return model


class TestSettings:
    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_bundled_files_are_valid(self, path: Path) -> None:
        assert load_config(path.stem) == load_config(path)
        assert load_config(path.stem).data.folder is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("training.steps=0", r"training\.steps: expected greater than or equal to 1, got 0"),
            ("training.step=5", r"training\.step: expected one of steps, .*, got 'step'"),
            ("gate.kind=eca", r"gate\.kind: expected 'none', 'uafs', 'se' or 'cbam', got 'eca'"),
            ("pdcr.variant=mine", r"pdcr\.variant: expected 'paper' or 'released', got 'mine'"),
            ("pdcr.weight=.nan", r"pdcr\.weight: expected a finite number, got nan"),
            ("data.patch=null", r"data: expected resize or patch"),
            ("nothing.here=1", r"nothing\.here: expected a key of the settings"),
            ("training.steps", "expected key=value, got 'training.steps'"),
            ("extra=1", r"extra: expected one of data, network, .*, got 'extra'"),
        ],
    )
    def test_errors_name_the_key_and_what_came(self, settings_file: Path, change: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_config(settings_file, [change])

    def test_files_that_do_not_fit(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"one of .*hippocampus"):
            load_config(tmp_path / "none.yaml")
        for text, message in (
            ("data: [1", "expected YAML"),
            ("- 1", "expected sections"),
            ("seed: 1", "data: expected a value"),
            ("!!python/object/apply:os.getcwd []", "expected YAML"),
        ):
            (tmp_path / "bad.yaml").write_text(text)
            with pytest.raises(ValueError, match=message):
                load_config(tmp_path / "bad.yaml")

    def test_numbers_as_yaml_writes_them(self, settings_file: Path) -> None:
        config = load_config(settings_file, ["training.lr=1e-3", "data.patch=[8, 8]", "seed=3"])
        assert (config.training.lr, config.data.patch, config.seed) == (1e-3, (8, 8), 3)

    def test_digest_follows_what_matters(self, config: Config) -> None:
        assert config.changed({"data.folder": "elsewhere", "data.workers": 2}).digest() == config.digest()
        assert config.changed({"seed": 1}).digest() != config.digest()
        assert str(config.data.folder) not in json.dumps(config.record())


class TestBatches:
    def cases(self, config: Config) -> Cases:
        experiment = runs.Experiment(config)
        return experiment.train_cases

    def test_processes_share_a_batch_and_resumed_runs_go_on(self, config: Config) -> None:
        patches = Patches(self.cases(config), config.data, seed=5)
        whole = list(batches(patches, range(4), 4))
        halves = [list(batches(patches, range(2, 4), 4, rank, 2)) for rank in range(2)]
        for step, parts in zip((2, 3), zip(*halves, strict=True), strict=True):
            for k in range(2):
                assert torch.equal(whole[step][k], torch.cat([part[k] for part in parts]))
        for loaded, expected in zip(batches(patches, range(2), 4, workers=2), whole[:2], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))
        other = next(batches(Patches(patches.cases, config.data, seed=6), range(1), 4))
        assert not torch.equal(other[0], whole[0][0])

    def test_every_case_once_a_round(self, config: Config) -> None:
        cases = self.cases(config)
        patches = Patches(cases, config.data, seed=0)
        seen = [id(patches._case(number)[0]) for number in range(2 * len(cases))]
        assert len(set(seen[: len(cases)])) == len(set(seen[len(cases) :])) == len(cases)

    def test_fractions_are_nested(self, config: Config) -> None:
        names = [
            {case.name for case in self.cases(config.changed({"data.fraction": fraction})).cases}
            for fraction in (0.25, 0.5, 1.0)
        ]
        assert names[0] < names[1] < names[2]

    def test_foreground_crops(self, config: Config) -> None:
        data = config.data.model_copy(update={"foreground_crops": 1.0, "augment": False, "patch": (9, 9)})
        patches = Patches(self.cases(config), data, seed=0)
        assert all(patches[number][1][4, 4] == 1 for number in range(8))

    def test_broken_cases_stop_or_are_named_and_left_out(self, tmp_path: Path, config: Config) -> None:
        folder = build("pairs", tmp_path, cases=6, size=24)
        broken = folder / "images" / "case_000.png"
        broken.write_bytes(broken.read_bytes()[:80])
        changed = config.changed({"data.folder": str(folder), "data.split_seed": 0})
        with pytest.raises(DataError, match="case_000"):
            runs.run(changed, tmp_path / "stops", quiet=True)
        with pytest.warns(UserWarning, match="case_000"):
            found = runs.run(changed.changed({"data.on_error": "skip"}), tmp_path / "skips", quiet=True)
        assert 0 <= found["scores"]["dice"] <= 1


class TestNetworks:
    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("name", ["unet", "dynunet"])
    def test_stages_are_layers_of_falling_and_rising_resolution(self, name: str, dims: int) -> None:
        model, stages = networks.build(Network(name=name, channels=(4, 8, 8, 8)), dims, 2, 3)
        extents: list[int] = []
        for layer in (*stages.encoder, *stages.decoder):
            model.get_submodule(layer).register_forward_hook(lambda _m, _i, out: extents.append(out.shape[2]))
        assert model(torch.zeros(1, 2, *[16] * dims)).shape == (1, 3, *[16] * dims)
        encoder = extents[: len(stages.encoder)]
        decoder = extents[len(stages.encoder) :]
        assert encoder == sorted(encoder, reverse=True)
        assert decoder == sorted(decoder)
        assert encoder[-1] == 2

    @pytest.mark.parametrize("name", ["fcn", "deeplabv3plus"])
    def test_library_networks(self, name: str) -> None:
        pytest.importorskip({"fcn": "torchvision", "deeplabv3plus": "segmentation_models_pytorch"}[name])
        model, stages = networks.build(Network(name=name), 2, 1, 2)
        assert model.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 2, 64, 64)
        assert set(stages.encoder) <= {layer for layer, _ in model.named_modules()}

    def test_missing_library_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
        with pytest.raises(ImportError, match=r"needs segmentation-models-pytorch.*\[experiments\]"):
            networks.build(Network(name="deeplabv3plus"), 2, 1, 2)

    def test_two_axes_only(self) -> None:
        with pytest.raises(ValueError, match="unet or dynunet for 3D images, got 'fcn'"):
            networks.build(Network(name="fcn"), 3, 1, 2)


class TestComparators:
    @pytest.mark.parametrize("dims", [2, 3])
    def test_cbam_weighs_channels_then_places(self, dims: int) -> None:
        torch.manual_seed(0)
        block = comparators.CBAM(dims, 20).double()
        x = torch.randn(2, 20, *[9] * dims, dtype=torch.float64)
        axes = tuple(range(2, dims + 2))
        first, _, second = block.channels
        attention = sum(
            torch.relu(pooled @ first.weight.T + first.bias) @ second.weight.T + second.bias
            for pooled in (x.mean(axes), x.amax(axes))
        )
        weighted = x * torch.sigmoid(attention)[(...,) + (None,) * dims]
        place = torch.stack([weighted.mean(1), weighted.max(1).values], 1)
        convolution = nn.functional.conv2d if dims == 2 else nn.functional.conv3d
        expected = weighted * torch.sigmoid(convolution(place, block.places.weight, padding=3))
        torch.testing.assert_close(block(x), expected)

    @pytest.mark.parametrize("kind", ["se", "cbam"])
    def test_they_take_the_place_of_uafs(self, config: Config, kind: str) -> None:
        changed = config.changed({"gate.kind": kind})
        experiment, alone = runs.Experiment(changed), runs.Experiment(config)
        assert experiment.boxes == alone.boxes  # though squeeze-and-excitation sees the whole image
        blocks = {name for name in experiment.model.state_dict() if name.startswith("comparators.")}
        assert {name.split(".")[1] for name in blocks} == {"model/0", "model/1/submodule/0"}
        rest = {k: v for k, v in experiment.model.state_dict().items() if k not in blocks}
        torch.testing.assert_close(rest, dict(alone.model.state_dict()), rtol=0, atol=0)
        image = torch.randn(1, 1, 16, 16)
        assert not torch.equal(experiment.model(image), alone.model(image))
        with pytest.raises(ValueError, match=r"gate\.layers: expected .* for"):
            runs.Experiment(changed.changed({"gate.layers": "auto"}))


KILLED = """
import os, signal, sys
from contrastseg_fast.experiments import __main__, training
step, taken = training.Trainer.step, []
def fatal(trainer, *batch):
    taken.append(1)
    if len(taken) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, *batch)
training.Trainer.step = fatal
__main__.main(sys.argv[1:])
"""


class TestTraining:
    def arguments(self, settings_file: Path, config: Config, out: Path, *changes: str) -> list[str]:
        options = [word for change in changes for word in ("--set", change)]
        return [
            *("train", str(settings_file), "--data", str(config.data.folder)),
            *("--out", str(out), "--quiet", "--threads", "1", *options),
        ]

    def test_a_killed_run_goes_on_as_if_nothing_had_been(
        self, settings_file: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = self.arguments(settings_file, config, tmp_path / "killed", "gate.kind=uafs")
        killed = subprocess.run([sys.executable, "-c", KILLED, *words], check=False)
        assert killed.returncode == -9
        saved = torch.load(tmp_path / "killed" / runs.CHECKPOINT, weights_only=True)
        assert saved["progress"]["step"] == 3
        assert not (tmp_path / "killed" / runs.RESULT).exists()
        threads = torch.get_num_threads()
        try:
            assert command.main(words) == 0
            straight = self.arguments(settings_file, config, tmp_path / "straight", "gate.kind=uafs")
            assert command.main(straight) == 0
        finally:
            torch.set_num_threads(threads)
        assert "2 test cases: dice 0." in capsys.readouterr().out
        pieces, whole = weights(tmp_path / "killed"), weights(tmp_path / "straight")
        assert all(torch.equal(pieces[name], whole[name]) for name in whole)
        assert (tmp_path / "killed" / "log.csv").read_text() == (
            tmp_path / "straight" / "log.csv"
        ).read_text()
        results = [json.loads((tmp_path / x / runs.RESULT).read_text()) for x in ("killed", "straight")]
        for result in results:
            del result["seconds"]
        assert results[0] == results[1]

    def test_finished_runs_stay_and_other_settings_are_refused(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        short = config.changed({"training.steps": 1})
        found = runs.run(short, tmp_path, quiet=True)
        with pytest.raises(ValueError, match="--out: expected a folder without a run of other settings"):
            runs.run(short.changed({"seed": 1}), tmp_path, quiet=True)
        (tmp_path / "result.json").rename(tmp_path / "kept.json")
        with pytest.raises(ValueError, match="--out: expected a folder without a run of other settings"):
            runs.run(short.changed({"seed": 1}), tmp_path, quiet=True)
        (tmp_path / "kept.json").rename(tmp_path / "result.json")
        monkeypatch.setattr(runs, "Experiment", None)
        assert runs.run(short, tmp_path, quiet=True) == found

    def test_the_best_network_is_tested(self, config: Config, tmp_path: Path) -> None:
        found = runs.run(config, tmp_path, quiet=True)
        history = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
        best = history[history["validation_dice"].argmax()]
        assert (found["best_step"], found["validation_dice"]) == (best["step"], best["validation_dice"])
        assert list(history["step"]) == [3, 6]
        again = runs.load_best(config, tmp_path)
        assert again.score(again.test_cases) == found["scores"]

    def test_tensorboard_gets_the_log_where_it_is_installed(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found: list[tuple[Any, ...]] = []

        class SummaryWriter:
            def __init__(self, folder: str, purge_step: int) -> None:
                found.append((folder, purge_step))

            def add_scalar(self, *scalar: Any) -> None:
                found.append(scalar)

            def close(self) -> None:
                found.append(("closed",))

        board = types.SimpleNamespace(SummaryWriter=SummaryWriter)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
        result = runs.run(config.changed({"training.steps": 1}), tmp_path, quiet=True)
        assert found[0] == (str(tmp_path / "tensorboard"), 0)
        assert ("validation_dice", result["validation_dice"], 1) in found
        assert found[-1] == ("closed",)

    def test_scores_at_the_images_own_resolution(self, config: Config) -> None:
        resized = config.changed({"data.resize": [16, 16], "data.patch": None})
        experiment = runs.Experiment(resized)
        image, labels, extent = experiment.test_cases.prepared(0) or (None, None, None)
        assert image is not None
        assert image.shape == (1, 16, 16)
        assert labels is not None
        assert extent == (32, 24)
        assert experiment.logits(image, (32, 24)).shape == (2, 32, 24)
        assert 0 <= experiment.score(experiment.test_cases)["dice"] <= 1

    def test_amp_needs_a_gpu(self, config: Config) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(ValueError, match=r"training\.amp: expected false or null without a GPU"):
            runs.Experiment(config.changed({"training.amp": True}))

    def test_extents_that_do_not_fit_the_images(self, config: Config) -> None:
        with pytest.raises(ValueError, match=r"data\.patch: expected one extent for each of 2 axes"):
            runs.Experiment(config.changed({"data.patch": [8, 8, 8]}))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
class TestTwoProcesses:
    STEP = ("training.steps=1", "training.optimizer=sgd", "training.momentum=0", "training.lr=1.0")
    CROPS = ("data.patch=[8,8]", "data.foreground_crops=0", "data.augment=false", "training.batch_size=4")
    PDCR = (
        "pdcr.weight=1",
        "pdcr.skip_homogeneous=true",
        "pdcr.sampler=grid",
        "gate.kind=uafs",
        "data.split_seed=0",
    )

    def test_same_gradients_as_one_process_with_the_whole_batch(
        self, settings_file: Path, config: Config, tmp_path: Path
    ) -> None:
        changes = [*self.STEP, *self.CROPS, *self.PDCR, "training.weight_decay=0"]
        whole = load_config(settings_file, [*changes, f"data.folder={config.data.folder}"])
        cases = runs.Experiment(whole).train_cases

        def mixed_crops(seed: int) -> set[int]:
            _, labels = next(batches(Patches(cases, whole.data, seed), range(1), 4))
            return set((labels.flatten(1).amax(1) > labels.flatten(1).amin(1)).view(2, 2).sum(1).tolist())

        # One process has one crop that counts, the other two: the mean of their means would be another.
        seed = next(seed for seed in range(100) if mixed_crops(seed) == {1, 2})
        changes.append(f"seed={seed}")
        experiment = runs.Experiment(whole.changed({"seed": seed}))
        before = {name: value.clone() for name, value in experiment.model.state_dict().items()}

        experiment.fit(_made(tmp_path / "one"), quiet=True)
        words = TestTraining().arguments(settings_file, config, tmp_path / "two", *changes)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*launch, "-m", "contrastseg_fast.experiments", *words], check=True, timeout=120)
        one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
        for name in before:
            gradient, shared = before[name] - one[name], before[name] - two[name]
            torch.testing.assert_close(shared, gradient, rtol=1e-3, atol=1e-5)
        results = [json.loads((tmp_path / x / runs.RESULT).read_text()) for x in ("one", "two")]
        for score in study.SCORES:
            assert results[0]["scores"][score] == pytest.approx(results[1]["scores"][score], abs=1e-3)

    def test_batches_that_cannot_be_shared(self, config: Config) -> None:
        with pytest.raises(
            ValueError, match=r"training\.batch_size: expected a multiple of 3 processes, got 2"
        ):
            runs.Experiment(config, runs.Processes(0, 3))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def result(group: str, name: str, seed: int, dice: float) -> dict[str, Any]:
    layer = {"mean_cosine": dice, "repelled_fraction": dice / 2}
    scores = {"dice": dice, "jaccard": dice / 2, "accuracy": 1.0}
    return {"group": group, "name": name, "seed": seed, "scores": scores, "embeddings": {"layer": layer}}


class TestStatistics:
    def test_interval_is_that_of_the_paired_t_test(self) -> None:
        draw = np.random.default_rng(0)
        values, baseline = draw.normal(1, 1, 5), draw.normal(0, 1, 5)
        found = study.paired_difference(values, baseline)
        low, high = stats.ttest_rel(values, baseline).confidence_interval(0.95)
        assert (found["low"], found["high"]) == pytest.approx((low, high))
        assert found["mean"] == pytest.approx((values - baseline).mean())

    def test_one_seed_has_no_interval_and_equal_differences_one_of_no_width(self) -> None:
        assert study.paired_difference([2.0], [1.0]) == {"n": 1, "mean": 1.0, "low": None, "high": None}
        found = study.paired_difference([2.0, 3.0], [1.0, 2.0])
        assert (found["low"], found["high"]) == (1.0, 1.0)

    def test_differences_are_within_the_group_and_by_seed(self) -> None:
        found = [
            result(group, name, seed, dice)
            for group, first in (("a", 0.2), ("b", 0.4))
            for seed in (0, 1)
            for name, dice in (("baseline", first + seed / 10), ("PDCR", first + seed / 10 + 0.05))
        ]
        rows = study.summarise([*found, result("b", "PDCR", 7, 0.9)])
        assert [(row["group"], row["name"]) for row in rows] == [
            ("a", "baseline"),
            ("a", "PDCR"),
            ("b", "baseline"),
            ("b", "PDCR"),
        ]
        assert "dice_difference" not in rows[0]
        for row in (rows[1], rows[3]):
            assert row["dice_difference"]["n"] == 2
            assert row["dice_difference"]["mean"] == pytest.approx(0.05)
        assert rows[3]["dice"]["n"] == 3
        assert rows[0]["dice"]["sd"] == pytest.approx(np.std([0.2, 0.3], ddof=1))
        assert rows[0]["embeddings"]["layer"]["repelled_fraction"]["mean"] == pytest.approx(0.125)


class TestStudies:
    def planned(self, config: Config, *words: str) -> list[study.Job]:
        args = command.parser().parse_args([words[0], "unused", *words[1:]])
        return study.jobs(config, command.variants(args, config), args.seeds)

    def test_table3(self, config: Config) -> None:
        planned = self.planned(
            config,
            *("table3", "--networks", "unet", "dynunet", "--weights", "0.01", "0.1", "--seeds", "3", "4"),
            *("--variants", "paper", "released", "--affinities", "constant", "--comparators", "se"),
        )
        assert len(planned) == len({job.folder for job in planned}) == 2 * 2 * 9
        names = [job.variant.name for job in planned if job.config.seed == 3][:9]
        assert names == [
            "baseline",
            "PDCR (paper, mean, 0.01)",
            "PDCR (paper, mean, 0.1)",
            "PDCR (released, mean, 0.01)",
            "PDCR (released, mean, 0.1)",
            "PDCR (constant affinity, 0.01)",
            "UAFS",
            "SE",
            "PDCR + UAFS",
        ]
        of_name = {job.variant.key: job.config for job in planned}
        assert of_name["unet", "baseline"].pdcr.weight == 0
        both = of_name["dynunet", "PDCR + UAFS"]
        assert (both.network.name, both.gate.kind, both.pdcr.weight) == ("dynunet", "uafs", 0.01)
        assert of_name["unet", "PDCR (constant affinity, 0.01)"].pdcr.affinity == "constant"
        assert of_name["unet", "UAFS"].pdcr.weight == 0

    def test_sites_and_parts_of_the_data(self, config: Config) -> None:
        planned = {job.variant.name: job.config for job in self.planned(config, "sites", "--seeds", "0")}
        assert planned["PDCR at model.0"].pdcr.layers == ("model.0",)
        assert planned["UAFS at model.1.submodule.2"].gate.layers == ("model.1.submodule.2",)
        assert planned["UAFS at encoder and decoder"].pdcr.weight == 0
        assert len(planned) == 1 + 2 * 5
        runs.Experiment(planned["UAFS at encoder and decoder"])
        limited = self.planned(config, "limited-data", "--fractions", "0.5", "1", "--seeds", "0")
        assert [job.config.data.fraction for job in limited] == [0.5] * 4 + [1.0] * 4

    def test_from_end_to_end_and_once(
        self,
        settings_file: Path,
        config: Config,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        words = ["table3", str(settings_file), "--data", str(config.data.folder), "--out", str(tmp_path)]
        words += ["--seeds", "0", "1", "--quiet", "--set", "training.steps=1"]
        assert command.main([*words, "--dry-run"]) == 0
        assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["to", "do"]] * 8
        assert not (tmp_path / "runs").exists()
        published = tmp_path / "paper.yaml"
        published.write_text("unet: {UAFS: 12.34}")
        words += ["--paper-values", str(published)]
        assert command.main(words) == 0
        text = (tmp_path / "results.json").read_text()
        record = json.loads(text)
        assert record["finished"]
        assert str(config.data.folder) not in text
        assert "--data DATA" in record["command"]
        assert [row["name"] for row in record["summary"]] == [
            "baseline",
            "PDCR (paper, mean, 0.01)",
            "UAFS",
            "PDCR + UAFS",
        ]
        for row in record["summary"]:
            assert row["dice"]["n"] == 2
            assert set(row["embeddings"]) == {"model.0", "model.1.submodule.0"}
        page = (tmp_path / "index.html").read_text()
        printed = capsys.readouterr().out
        for fact in ("PDCR + UAFS", "t interval over the seeds", "mean cosine", "the paper's Dice", "12.34"):
            assert fact in html.unescape(page)
            assert fact in " ".join(printed.split())

        assert command.main(["report", str(tmp_path / "results.json"), "--out", str(tmp_path / "again")]) == 0
        assert (tmp_path / "again" / "index.html").read_text() == page
        monkeypatch.setattr(runs, "Experiment", None)  # nothing is computed again
        assert command.main(words) == 0
        assert json.loads((tmp_path / "results.json").read_text())["runs"] == record["runs"]
        capsys.readouterr()
        assert command.main([*words, "--dry-run"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["done"] * 8

    def test_what_does_not_fit_shows_before_the_first_run(
        self, settings_file: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["table3", str(settings_file), "--data", str(config.data.folder), "--out", str(tmp_path)]
        words += ["--networks", "unet", "dynunet", "--set", "pdcr.patch_size={model.0: 5}"]
        with pytest.raises(SystemExit):
            command.main(words)
        assert "error: dynunet, baseline: patch_size: expected some of the layers" in capsys.readouterr().err
        assert not any(tmp_path.iterdir())

    def test_figures_of_volumes(self, settings_file: Path, tmp_path: Path) -> None:
        folder = build("decathlon:Prostate", tmp_path / "data", cases=6, size=24)
        changes = [
            "data.name=decathlon",
            "data.patch=[16,16,8]",
            "network.channels=[4,8]",
            "training.steps=1",
        ]
        changes += ["pdcr.num_samples=64", f"data.folder={folder}"]
        words = ["figures", str(settings_file), "--out", str(tmp_path / "out"), "--quiet"]
        assert command.main([*words, *(word for change in changes for word in ("--set", change))]) == 0
        page = (tmp_path / "out" / "index.html").read_text()
        assert page.count("data:image/png;base64,") == 3
        record = (tmp_path / "out" / "results.json").read_text()
        assert str(tmp_path) not in record

    def test_the_recorded_command_tells_no_folder(self) -> None:
        words = ["sites", "ph2", "--data", "/home/me", "--out=/home/me", "--set", "data.folder=/home/me"]
        words += ["--set=data.options.isic2016=/home/me", "--paper-values", "/home/me", "--set", "seed=1"]
        assert command.command_line(words) == (
            "contrastseg-fast sites ph2 --data DATA --out=... --set data.folder=... "
            "--set=data.options.isic2016=... --paper-values PAPER-VALUES --set seed=1"
        )

    def test_studies_are_not_for_torchrun(
        self, settings_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(SystemExit):
            command.main(["sites", str(settings_file), "--dry-run"])
        assert "sites: expected one process, got torchrun" in capsys.readouterr().err

    def test_values_of_the_paper_that_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "paper.yaml").write_text("unet: high")
        with pytest.raises(ValueError, match=r"paper\.yaml: expected \{group"):
            load_published(tmp_path / "paper.yaml")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["train", "none"], "none: expected a YAML file or one of"),
            (["train", "FILE"], "data.folder: expected the folder of the dataset, got none"),
            (["train", "FILE", "--set", "seed=x"], "seed: expected a valid integer"),
            (["table3", "FILE", "--networks", "vnet", "--dry-run"], "network.name: expected 'unet'"),
        ],
    )
    def test_errors_end_the_command(
        self, settings_file: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        filled = [str(settings_file) if word == "FILE" else word for word in words]
        with pytest.raises(SystemExit) as error:
            command.main(filled)
        assert error.value.code == 2
        assert message in capsys.readouterr().err


def test_ctrl_c_keeps_the_last_epoch(
    settings_file: Path,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step: Callable[..., dict[str, float]] = runs.Trainer.step
    taken: list[int] = []

    def interrupted(trainer: runs.Trainer, *batch: Tensor) -> dict[str, float]:
        taken.append(1)
        if len(taken) == 5:
            raise KeyboardInterrupt
        return step(trainer, *batch)

    monkeypatch.setattr(runs.Trainer, "step", interrupted)
    words = TestTraining().arguments(settings_file, config, tmp_path)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        assert command.main(words) == 130
    finally:
        torch.set_num_threads(threads)
    assert "Interrupted" in capsys.readouterr().err
    assert torch.load(tmp_path / runs.CHECKPOINT, weights_only=True)["progress"]["step"] == 3
    assert torch.are_deterministic_algorithms_enabled() == deterministic
