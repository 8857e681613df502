"""What `scripts/gpu_check.py` runs: the cases, the sweep, the training runs, and how their files are read."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("benchmarks", reason="needs the repository on the path")

from benchmarks import (
    accuracy,
    device,
    gpu_plan,
    gpu_report,
    once,
    pdcr,
    ready,
    record,
    registry,
    rows,
    sweep,
    table,
    timing,
    warm,
)
from benchmarks.operation import OURS, Case
from contrastseg_fast.problems import Call, Problem, Segment, Source

CASES = (*gpu_plan.NINE_MINUTES, *gpu_plan.LARGEST)
CHEST = Path(registry.__file__).parent.parent / "contrastseg_fast" / "data" / "chest_ct.npz"


class TestPlan:
    def test_cases_measure_ours_beside_peers_and_have_trials(self) -> None:
        assert len({case.id for case in CASES}) == len(CASES)
        for case in CASES:
            names = [each.name for each in case.implementations]
            assert names[0] == OURS
            assert len(names) > 1
            assert case.device == "cuda"
        assert all(case.graph for case in gpu_plan.NINE_MINUTES)
        for cases in gpu_plan.PARTS.values():
            small = registry.trial(cases)
            assert {case.operation for case in small} == {case.operation for case in cases}

    def test_peers_that_targets_name_are_measured(self) -> None:
        cases = {case.id: case for case in CASES}
        targets = [target for target in registry.TARGETS if target.case.id in cases]
        assert {target.case.id for target in targets} >= {case.id for case in registry.GPU_SMALL}
        for target in targets:
            if target.sense in ("at most", "at least"):
                names = {each.name for each in cases[target.case.id].implementations}
                assert names & set(target.against)

    def test_every_case_and_launch_is_compiled_beforehand(self) -> None:
        names = [name for name, _ in warm.units(trial=False)]
        for case in gpu_plan.NINE_MINUTES:
            assert f"{case.id}/{OURS}" in names
        assert len(names) > len(gpu_plan.SWEEP) * sum(map(len, sweep.LAUNCHES.values()))
        assert len(set(names)) == len(names)
        compiled = ["torch.compile" in name for name in names]
        assert compiled == sorted(compiled, reverse=True)  # what takes longest begins first


class TestRows:
    def test_a_line_that_is_being_written_is_left_out(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        assert rows.read(file) == []
        rows.append(file, {"a": 1})
        rows.append(file, {"b": [2]})
        with file.open("a") as stream:
            stream.write('{"c": ')
        assert rows.read(file) == [{"a": 1}, {"b": [2]}]

    def test_shares_are_whole_and_do_not_overlap(self) -> None:
        work = list(range(23))
        shares = [rows.share(work, f"{k}/5") for k in range(5)]
        assert sorted(unit for share in shares for unit in share) == work
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

    @pytest.mark.parametrize("which", ["5/5", "-1/5", "0/0"])
    def test_no_such_share(self, which: str) -> None:
        with pytest.raises(ValueError, match="share: expected K/N"):
            rows.share([], which)


class TestSweep:
    UNIT = sweep.Unit(pdcr.OPERATION.tiny(gpu_plan.SWEEP[0]), "backward", (64, 64, 4, 2))

    def test_a_launch_is_forced_while_its_call_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In one direction alone, under the names that the plan gives its families."""
        plan = pytest.importorskip("contrastseg_fast.kernels.pdcr.plan")
        size, seen = pdcr.Size(257, 64, dtype="bf16"), {}
        source = Source.dense((1, size.count, size.channels), (0, 0, 1))
        call = Call((source,), (Problem((Segment(0, 0, 0, 0, size.count),)),), size.classes, True)

        def prepare(_size: Any, _inputs: Any) -> Any:
            def run() -> tuple[torch.Tensor, ...]:
                for direction in sweep.LAUNCHES:
                    rows = torch.zeros(1, dtype=torch.bfloat16)
                    seen[direction] = plan.choose_launch(direction, call, rows, True, False, None)
                return (torch.ones(3),)

            return run

        implementations = tuple(replace(each, prepare=prepare) for each in pdcr.OPERATION.implementations)
        monkeypatch.setattr(pdcr, "OPERATION", replace(pdcr.OPERATION, implementations=implementations))
        of_tables = sweep.Unit(size, "backward", None).prepare("cpu")
        of_tables()
        before = dict(seen)
        forced = (128, 32, 8, 4, False)
        assert forced not in before.values()
        for direction in sweep.LAUNCHES:
            seen.clear()
            run = sweep.Unit(size, direction, forced).prepare("cpu")
            assert seen == {}
            run()
            assert seen == {**before, direction: forced}
        of_tables()
        assert seen == before

    def test_what_fails_or_is_wrong_has_no_time(self) -> None:
        _, good = sweep.measure(self.UNIT, "cpu", None)
        row, _ = sweep.measure(self.UNIT, "cpu", good)
        assert row["seconds"] > 0
        assert row["difference"] < 1e-6
        row, _ = sweep.measure(self.UNIT, "cpu", tuple(2 * each for each in good))
        assert "seconds" not in row
        assert row["failed"] == "differs by 0.5 from the tables' launch"
        row, result = sweep.measure(self.UNIT._replace(launch=(1, 2)), "cpu", good)
        assert result is None
        assert row["failed"].startswith("TypeError")

    def test_the_fastest_of_each_kernel(self) -> None:
        def row(direction: str, launch: list[int] | None, **found: Any) -> rows.Row:
            return {"size": "N", "direction": direction, "launch": launch, **found}

        found = sweep.best(
            [
                row("forward", None, seconds=3e-5),
                row("forward", [64], seconds=2e-5),
                row("forward", [32], failed="OutOfResources"),
                row("backward", None, failed="OutOfResources"),
                row("backward", [64], seconds=5e-5),
            ]
        )
        assert [(each["launch"], each["seconds"], each["tables"]) for each in found] == [
            ([64], 2e-5, 3e-5),
            ([64], 5e-5, None),
        ]
        said = gpu_report.lines("sweep", {"launches": [], "best": found})
        assert said[1] == "N forward: 20 us by [64], by the tables 30"
        assert said[2] == "N backward: 50 us by [64], by the tables failed"


class TestAccuracy:
    @pytest.fixture
    def data(self) -> accuracy.Data:
        found = accuracy.load(CHEST)
        images, labels = (each[40:64, ..., 32:64, 32:64] for each in found[:2])
        return accuracy.Data(images, labels, found.patients[:24])

    def test_arms_share_what_a_seed_decides_and_differ_in_what_they_add(self, data: accuracy.Data) -> None:
        def dice_and_loss(arm: str, seed: int = 3) -> tuple[float, float]:
            found = accuracy.train(data, accuracy.ARMS[arm], seed, 6, "cpu")
            return found["dice"], found["loss"]

        baseline = dice_and_loss("baseline")
        assert dice_and_loss("baseline") == baseline
        losses = {arm: dice_and_loss(arm)[1] for arm in accuracy.ARMS}
        assert len(set(losses.values())) == len(losses)
        assert dice_and_loss("baseline", seed=4) != baseline

    def test_training_lowers_the_loss(self, data: accuracy.Data) -> None:
        first = accuracy.train(data, accuracy.ARMS["baseline"], 0, 1, "cpu")
        last = accuracy.train(data, accuracy.ARMS["baseline"], 0, 60, "cpu")
        assert last["loss"] < 0.8 * first["loss"]
        assert 0 <= last["dice"] <= 1

    def test_patients_are_either_trained_on_or_tested(self) -> None:
        patients = torch.arange(150).repeat_interleave(2)
        for_training, for_testing = accuracy.split(patients, seed=0)
        assert len(for_training) == 2 * accuracy.TRAINING_PATIENTS
        assert len(for_testing) == 2 * accuracy.TEST_PATIENTS
        assert not set(patients[for_training].tolist()) & set(patients[for_testing].tolist())
        assert not torch.equal(for_training, accuracy.split(patients, seed=1)[0])
        with pytest.raises(ValueError, match="more than 20 patients, got 20"):
            accuracy.split(torch.arange(20), seed=0)

    def test_a_run_that_passes_the_deadline_counts_for_nothing(self, data: accuracy.Data) -> None:
        assert accuracy.train(data, accuracy.ARMS["baseline"], 0, 2, "cpu", deadline=-math.inf) is None

    def test_a_loss_that_is_not_a_number_is_said(self, data: accuracy.Data) -> None:
        broken = data._replace(images=data.images * torch.nan)
        found = accuracy.train(broken, accuracy.ARMS["baseline"], 0, 2, "cpu")
        assert found == {"failed": "the loss is not a number at step 0"}

    def test_perfect_and_wrong_predictions(self) -> None:
        labels = torch.zeros(2, 8, 8, dtype=torch.long)
        labels[:, :4] = 1
        images = torch.stack([1.0 - labels, labels.float()], 1)
        data = accuracy.Data(images, labels, torch.arange(2))
        identity = torch.nn.Identity()
        assert accuracy.evaluate(identity, data, torch.arange(2), "cpu") == 1
        swapped = data._replace(images=images.flip(1))
        assert accuracy.evaluate(identity, swapped, torch.arange(2), "cpu") == 0

    def test_differences_are_of_the_same_seeds(self) -> None:
        found = [
            *({"arm": "baseline", "seed": seed, "dice": 0.5 + 0.01 * seed} for seed in range(4)),
            *({"arm": "paper-0.03", "seed": seed, "dice": 0.51 + 0.01 * seed} for seed in (1, 2, 3, 9)),
            {"arm": "paper-0.03", "seed": 0, "failed": "the loss is not a number at step 20"},
        ]
        summary = accuracy.summarise(found)
        assert summary["baseline"] == {"runs": 4, "dice": pytest.approx(0.515)}
        assert summary["paper-0.03"]["runs"] == 4
        assert summary["paper-0.03"]["difference"]["n"] == 3
        assert summary["paper-0.03"]["difference"]["mean"] == pytest.approx(0.01)
        (_, _, line) = gpu_report.lines("accuracy", {"runs": found, "summary": summary})
        assert line.startswith("paper-0.03: Dice 54.8 over 4 runs, +1.00 to the baseline over 3 pairs (+1.00")

    def test_reads_what_it_packs(self, tmp_path: Path) -> None:
        image_module = pytest.importorskip("PIL.Image")
        pytest.importorskip("nibabel")
        pytest.importorskip("sklearn")
        rng = np.random.default_rng(0)
        for name in ("a_1", "a_2", "b_1"):
            image = rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)
            mask = 255 * rng.integers(0, 2, (16, 24), dtype=np.uint8)
            for folder, pixels in (("images", image), ("masks", mask)):
                (tmp_path / folder).mkdir(exist_ok=True)
                image_module.fromarray(pixels).save(tmp_path / folder / f"{name}.png")
        file = tmp_path / "packed.npz"
        assert accuracy.main(["--pack", str(tmp_path), "--data", str(file)]) == 0
        data = accuracy.load(file)
        assert data.images.shape == (3, 3, 16, 24)
        assert data.images.mean((0, 2, 3)).abs().max() < 1e-5
        assert data.patients.tolist() == [0, 0, 1]
        assert torch.equal(data.labels[2], torch.from_numpy(mask // 255).long())
        with np.load(file) as packed:
            assert np.array_equal(packed["image"][2], image)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"image": np.zeros((2, 8, 8))}, "the arrays image and labels"),
            ({"image": np.zeros((2, 8, 8)), "labels": np.zeros((2, 8, 9))}, "labels .n, H, W. as image has"),
            ({"image": np.zeros((2, 9, 9)), "labels": np.zeros((2, 9, 9))}, "multiples of 8"),
        ],
    )
    def test_other_files_are_refused(self, arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            accuracy.load(tmp_path / "bad.npz")


class TestReports:
    def test_counters_of_each_kernel(self, tmp_path: Path) -> None:
        file = tmp_path / "counters.csv"
        head = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"'
        file.write_text(
            "==PROF== Connected to process 12\n"
            f"{head}\n"
            '"0","pdcr_fwd_kernel","Speed","Duration","us","316.2",""\n'
            '"0","pdcr_fwd_kernel","Launch","Registers Per Thread","register/thread","1,024",""\n'
            '"0","pdcr_fwd_kernel","Launch","","","","Occupancy"\n'
            '"1","pdcr_bwd_kernel","Speed","Duration","us","494",""\n'
        )
        found = gpu_report.result("counters", tmp_path)
        assert [kernel["name"] for kernel in found["kernels"]] == ["pdcr_fwd_kernel", "pdcr_bwd_kernel"]
        assert found["kernels"][0]["metrics"] == {
            "Duration": "316.2 us",
            "Registers Per Thread": "1,024 register/thread",
        }
        assert gpu_report.lines("counters", found)[2] == "pdcr_bwd_kernel: Duration 494 us"

    def test_summaries_of_the_sanitizer(self, tmp_path: Path) -> None:
        (tmp_path / "sanitizer-0.log").write_text("working\n========= ERROR SUMMARY: 0 errors\n")
        (tmp_path / "sanitizer-1.log").write_text("========= RACECHECK SUMMARY: 1 hazard displayed\n")
        assert gpu_report.lines("sanitizer", gpu_report.result("sanitizer", tmp_path))[1:] == [
            "sanitizer-0: ========= ERROR SUMMARY: 0 errors",
            "sanitizer-1: ========= RACECHECK SUMMARY: 1 hazard displayed",
        ]

    @pytest.mark.parametrize("part", ["build", "warm", "right", "timings", "sweep", "counters", "accuracy"])
    def test_parts_that_left_nothing_can_be_read(self, part: str, tmp_path: Path) -> None:
        found = gpu_report.result(part, tmp_path)
        json.dumps(found)
        if found:
            assert gpu_report.lines(part, found)

    def test_times_are_shown_with_what_a_call_costs_the_host(self) -> None:
        case = {
            "id": "pdcr_loss/N@cuda,graph",
            "implementations": {
                OURS: {"seconds": [3e-5, 2e-5, 9e-5], "uncaptured_host_seconds": 2.4e-4, "launches": 5},
                "three products": {"seconds": [1e-5]},
                "torch.compile": {"status": "failed", "reason": "RuntimeError: no"},
            },
        }
        assert gpu_report.lines("timings", {"cases": [case]})[1] == (
            "pdcr_loss/N@cuda: ours 30 (240 host, 5 launches), three products 10, "
            "torch.compile failed (RuntimeError: no)"
        )


class TestMeasuring:
    def test_a_captured_call_also_tells_its_launches_and_its_time_on_the_host(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The path of CUDA, its clock and its graphs replaced."""
        runs: list[str] = []
        monkeypatch.setattr(device, "captured", lambda run, _pool: runs.append("captured") or run)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
        monkeypatch.setattr(device, "launches", lambda _run: 7)
        monkeypatch.setattr(device, "host_seconds", lambda _run: 0.25)
        monkeypatch.setattr(
            device, "timed", lambda run, calls, host=0.0: (run(), device.Timed(1e-4, 2e-5))[1]
        )
        operation = replace(
            pdcr.OPERATION,
            make_inputs=lambda size, _device: pdcr.OPERATION.make_inputs(size, "cpu"),
            rotates=False,
        )
        case = Case(operation, pdcr.Size(9, 4), "cuda", without=("torch.compile", "KeOps"), graph=True)
        ours = timing.measure_times(case, case.implementations[:1], timing.Settings(rounds=3))[OURS]
        assert (ours["status"], ours["graph"], runs) == ("measured", "captured", ["captured"])
        assert (ours["launches"], ours["uncaptured_host_seconds"]) == (7, 0.25)
        assert ours["seconds"] == [1e-4] * 3

        def no_driver(_run: Any) -> int:
            raise OSError("libcuda.so.1: cannot open")

        monkeypatch.setattr(device, "launches", no_driver)
        ours = timing.measure_times(case, case.implementations[:1], timing.Settings(rounds=3))[OURS]
        assert (ours["graph"], ours.get("launches")) == ("captured", None)

    def test_every_kernel_runs_at_odd_sizes(self, capsys: pytest.CaptureFixture[str]) -> None:
        once.every_kernel("cpu")
        assert len(capsys.readouterr().out.splitlines()) == 36
        assert not torch.are_deterministic_algorithms_enabled()

    def test_libraries_that_do_not_load_are_built_for_this_card_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[list[str], dict[str, str] | None]] = []

        def run(command: list[str], env: dict[str, str] | None = None, **_: Any) -> argparse.Namespace:
            asked.append((command, env))
            return argparse.Namespace(returncode=0)

        monkeypatch.setattr(ready.subprocess, "run", run)
        monkeypatch.setattr(ready, "missing", lambda _device: {"cuda": "undefined symbol"})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        assert ready.main(["--out", str(tmp_path / "build.json"), "--commit", "abc"]) == 0
        (build, environment), (again, _) = asked
        assert build[1:] == ["setup.py", "build_ext", "--inplace", "--force"]
        assert environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
        assert {"--built", "--commit", "abc"} <= set(again)

    def test_a_commit_can_be_told(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        machine = {"cpu": {}, "processor": "P", "system": "Linux", "release": "6", "machine": "x86_64"}
        monkeypatch.setattr(record, "_ROOT", tmp_path)
        made = record.new("", machine, timing.Settings())
        assert (made["commit"], made["dirty"]) == ("unknown", None)
        made = record.new("", machine, timing.Settings(), commit="abc1234")
        assert made["commit"] == "abc1234"
        assert "with local changes" not in table.markdown([made])

    def test_records_are_replaced_as_a_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "made.json"
        record.save({"cases": [1, 2]}, file)
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            record.save({"cases": [3]}, file)
        assert json.loads(file.read_text()) == {"cases": [1, 2]}
