"""The benchmarks: their registry, what they compare, and what becomes of the records."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("pytest_benchmark")
pytest.importorskip("monai")

from benchmarks import (  # noqa: E402
    against,
    call,
    ceilings,
    gate,
    pdcr,
    plot,
    record,
    registry,
    step,
    table,
    timing,
)
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.operation import OURS, Case, Implementation, Operation, Unavailable  # noqa: E402
from benchmarks.session import Session  # noqa: E402
from contrastseg_fast import reference  # noqa: E402

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")

CPU_CASES = (*registry.DEFAULT, *registry.QUICK, *registry.LARGE, *registry.NETWORKS)
GPU_CASES = tuple(case for part in registry.PARTS.values() for case in part)
ALL_CASES = (*CPU_CASES, *GPU_CASES)
CHECKED_IMPLEMENTATIONS = [
    pytest.param(operation, implementation, id=f"{operation.name}-{implementation.name}")
    for operation in registry.OPERATIONS
    for implementation in operation.implementations
    if not implementation.yardstick and "cpu" in implementation.devices
]


def first_size(operation: Operation) -> Any:
    return next(case.size for case in registry.DEFAULT if case.operation is operation)


class TestRegistry:
    def test_ids_are_unique_and_found(self) -> None:
        assert len({case.id for case in ALL_CASES}) == len(ALL_CASES)
        for case in ALL_CASES:
            assert registry.find(case.id) is case

    def test_every_case_measures_ours_first_and_names_real_implementations(self) -> None:
        for case in ALL_CASES:
            names = [each.name for each in case.operation.implementations]
            assert len(set(names)) == len(names)
            assert set(case.without) <= set(names)
            assert (case.device == "cuda") == (case in GPU_CASES)
            assert case.implementations[0].name == OURS

    def test_results_are_checked_at_a_size_the_reference_holds(self) -> None:
        for case in ALL_CASES:
            operation = case.operation
            reference = operation.implementation("reference")
            if case.device not in reference.devices:
                continue
            assert reference.bytes_needed(operation.checked(case.size)) < (4e9 if case in CPU_CASES else 2e10)
            assert reference.bytes_needed(operation.tiny(case.size)) < 2e8

    def test_targets_name_measured_implementations(self) -> None:
        for target in registry.TARGETS:
            assert target.case in ALL_CASES
            match target.sense:
                case "memory":
                    assert target.case.operation.memory_unit is not None
                case "share":
                    assert target.case.operation.work is not None
                case "launches":
                    assert target.case.graph
                case _:
                    assert target.against
                    assert set(target.against) <= {each.name for each in target.case.implementations}

    def test_every_operation_has_a_default_and_a_quick_case(self) -> None:
        for cases in (registry.DEFAULT, registry.QUICK):
            assert {case.operation.name for case in cases} == {each.name for each in registry.OPERATIONS}


class TestImplementations:
    @pytest.mark.parametrize(("operation", "implementation"), CHECKED_IMPLEMENTATIONS)
    def test_agrees_with_the_float64_reference(
        self, operation: Operation, implementation: Implementation
    ) -> None:
        slow = implementation.name == "KeOps" or (operation is call.OPERATION and implementation.compiles)
        if slow and not os.environ.get("CONTRASTSEG_FAST_SLOW_TESTS"):
            pytest.skip("compiles for half a minute; set CONTRASTSEG_FAST_SLOW_TESTS=1")
        size = operation.tiny(first_size(operation))
        inputs = operation.make_inputs(size, "cpu")
        results = implementation.prepare(size, inputs)()
        assert timing.normwise_error(results, operation.oracle(size, inputs)) <= operation.tolerance(size)

    @pytest.mark.parametrize(
        "change",
        [
            {"ratios": "mask", "classes": 5, "batch": 2},
            {"dtype": "bf16"},
        ],
    )
    @pytest.mark.parametrize("name", [OURS, "chunked", "released"])
    def test_pdcr_peers_agree_on_masks_and_16_bit_vectors(self, name: str, change: dict[str, Any]) -> None:
        if name == "released" and "dtype" in change:
            pytest.skip("CosineSimilarity rounds to 16 bits; measured in fp32 only")
        operation = registry.PDCR_RANDOM.operation
        size = replace(operation.tiny(first_size(operation)), **change)
        inputs = operation.make_inputs(size, "cpu")
        results = operation.implementation(name).prepare(size, inputs)()
        assert timing.normwise_error(results, operation.oracle(size, inputs)) <= operation.tolerance(size)

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    @pytest.mark.parametrize("loss", [pdcr._ours, pdcr.loss_by_16_bit_products])
    def test_16_bit_gradients_of_many_vectors_do_not_vanish(self, loss: pdcr.Loss, dtype: str) -> None:
        size = pdcr.Size(1024, 64, dtype=dtype)
        inputs = pdcr.OPERATION.make_inputs(size, "cpu")
        results = pdcr._with_gradient(loss)(size, inputs)()
        expected = pdcr.OPERATION.oracle(size, inputs)
        assert timing.normwise_error(results, expected) <= pdcr.OPERATION.tolerance(size)

    def test_a_call_by_16_bit_products_agrees(self) -> None:
        size = call.OPERATION.tiny(call.Size(classes=5))
        inputs = call.OPERATION.make_inputs(size, "cpu")
        make_loss = call._with_cumsum(pdcr.loss_by_16_bit_products)
        results = call._with_gradients(make_loss)(size, inputs)()
        expected = call.OPERATION.oracle(size, inputs)
        assert timing.normwise_error(results, expected) <= call.OPERATION.tolerance(size)

    @pytest.mark.parametrize("count", [1, 100, 128, 2048])
    def test_masks_give_ratios_of_any_number_of_vectors(self, count: int) -> None:
        """Also where no grid has that many points."""
        _, ratios = pdcr.OPERATION.make_inputs(pdcr.Size(count, 4, "mask", 5, batch=2), "cpu")
        assert ratios.shape == (2, count, 5)
        total = ratios.sum(-1)  # below 1 where a box hangs over the rim
        assert ((total > 0) & (total < 1 + 1e-6)).all()

    @pytest.mark.parametrize("name", [OURS, "one-hot + cumsum", "lean cumsum", "released"])
    @pytest.mark.parametrize("change", [{}, {"extent": 0, "classes": 5}])
    def test_ratio_peers_agree_on_random_places_and_in_3d(self, name: str, change: dict[str, Any]) -> None:
        operation = registry.RATIOS.operation
        size = operation.tiny(replace(first_size(operation), places="random", **change))
        inputs = operation.make_inputs(size, "cpu")
        results = operation.implementation(name).prepare(size, inputs)()
        assert timing.normwise_error(results, operation.oracle(size, inputs)) <= operation.tolerance(size)

    def test_flex_attention_computes_log_z(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        operation = registry.PDCR_RANDOM.operation
        vectors, ratios = operation.make_inputs(pdcr.Size(49, 16, classes=3, batch=2), "cpu")
        s = reference.cosine_similarity(vectors.double())
        _, d = reference.affinity_matrices(ratios.double())
        expected = (s * d / pdcr.TEMPERATURE).logsumexp(-1)
        actual = pdcr.flex_log_z(flex_attention, vectors, ratios)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("network", ["BasicUNet", "DynUNet 3D"])
    def test_steps_of_other_networks_agree_with_the_reference(self, network: str) -> None:
        operation = step.OPERATION
        size = operation.tiny(step.Size(network=network))
        inputs = operation.make_inputs(size, "cpu")
        expected = operation.oracle(size, inputs)
        for name in (OURS, "reference, cumsum ratios"):
            results = operation.implementation(name).prepare(size, inputs)()
            assert timing.normwise_error(results, expected) <= operation.tolerance(size)
        without = operation.implementation("baseline").prepare(size, inputs)()
        assert timing.normwise_error(without, expected) > operation.tolerance(size)

    def test_yardsticks_compute_the_products_they_are_named_after(self) -> None:
        operation = registry.PDCR_RANDOM.operation
        size = operation.tiny(first_size(operation))
        for implementation in operation.implementations:
            if implementation.yardstick and "cpu" in implementation.devices:
                assert implementation.prepare(size, operation.make_inputs(size, "cpu"))() == ()


class TestRoofline:
    CEILINGS: ClassVar[dict[str, Any]] = {
        "copy_bytes_per_second": 1e12,
        "flops_per_second": {"bf16": 8e14, "fp32": 5e13},
        "exponentials_per_second": 4e12,
    }

    def test_pairs_of_equal_ratios_need_no_work(self) -> None:
        size = pdcr.Size(100, 32)
        vectors, _ = pdcr.OPERATION.make_inputs(size, "cpu")
        ratios = torch.zeros(1, 100, 2)
        ratios[:, :30, 0] = 1
        work = pdcr.OPERATION.work(size, (vectors, ratios))
        assert work.exponentials == pytest.approx(2 * 30 * 70)
        assert work.flops == pytest.approx(4 * 2 * 30 * 70 * 32)
        assert work.bytes == 3 * 100 * 32 * 4 + 2 * 100 * 2 * 4 + 800

    @pytest.mark.parametrize(("count", "bound"), [(128, "bytes"), (4096, "flops")])
    def test_the_slowest_part_bounds(self, count: int, bound: str) -> None:
        size = pdcr.Size(count, dtype="bf16")
        work = pdcr.OPERATION.work(size, pdcr.OPERATION.make_inputs(size, "cpu"))
        found = ceilings.floor(work, self.CEILINGS)
        assert found["bound"] == bound
        parts = {"bytes": work.bytes / 1e12, "flops": work.flops / 8e14}
        assert found["seconds"] == pytest.approx(parts[bound])

    def test_the_gate_moves_features_five_times(self) -> None:
        size = gate.Size((1, 8, 4, 4), 2)
        work = gate.OPERATION.work(size, gate.OPERATION.make_inputs(size, "cpu"))
        assert work.bytes == (5 * 8 + 3 * 2) * 16 * 4
        assert ceilings.floor(work, self.CEILINGS)["bound"] == "bytes"

    def test_ceilings_are_measured_and_shown(self) -> None:
        found = ceilings.measure("cpu")
        assert found["copy_bytes_per_second"] > 0
        assert all(rate > 0 for rate in found["flops_per_second"].values())
        assert len(ceilings.lines(found)) == 3


class TestParts:
    @pytest.mark.parametrize("part", ["ratios", "call"])
    def test_a_trial_measures_every_case_tiny(self, part: str, tmp_path: Path) -> None:
        out = tmp_path / "trial.json"
        cases = registry.trial(registry.PARTS[part])
        session = Session(cases, "", timing.Settings(rounds=1, seconds=0.01), out)
        assert session.run_bare() == 0
        made = record.load(out)
        assert [case["id"] for case in made["cases"]] == [case.id for case in cases]
        for case in made["cases"]:
            ours = case["implementations"][OURS]
            assert ours["status"] == "measured"
            assert case["floor"]["seconds"] > 0
            assert ours["share"] == pytest.approx(
                case["floor"]["seconds"] / statistics.median(ours["seconds"]), rel=1e-3
            )

    def test_cases_that_the_budget_does_not_reach_are_said(self, tmp_path: Path) -> None:
        out = tmp_path / "trial.json"
        session = Session(registry.trial(registry.PARTS["gate"]), "ours", timing.Settings(), out)
        assert session.run_bare(budget=0) == 0
        for case in record.load(out)["cases"]:
            assert case["implementations"][OURS]["reason"] == "after the 0 s given to this part"

    def test_every_part_has_a_trial(self) -> None:
        for cases in registry.PARTS.values():
            small = registry.trial(cases)
            assert {case.operation.name for case in small} == {case.operation.name for case in cases}
            assert {case.device for case in small} == {"cpu"}


@dataclass(frozen=True)
class Size:
    count: int = 4


class Stopwatch:
    """Runs what pytest-benchmark's fixture would, in the same order."""

    def pedantic(self, target: Callable[..., Any], setup: Callable[[], Any], rounds: int) -> None:
        data = []
        for _ in range(rounds):
            args, kwargs = setup()
            begin = time.perf_counter()
            target(*args, **kwargs)
            data.append(time.perf_counter() - begin)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


def doubling(*implementations: Implementation, checked: Callable[[Size], Size] = lambda size: size) -> Case:
    """A case that doubles a vector."""
    operation = Operation(
        name="double",
        make_inputs=lambda size, _device: (torch.ones(size.count),),
        oracle=lambda _size, inputs: (2 * inputs[0].double(),),
        checked=checked,
        tiny=lambda size: size,
        tolerance=lambda _size: 1e-6,
        implementations=implementations,
        memory_unit=lambda size: 4 * size.count,
    )
    return Case(operation, Size())


def times(factor: float) -> Callable[[Any, Any], Any]:
    return lambda _size, inputs: lambda: (factor * inputs[0],)


def measure(case: Case, **settings: Any) -> dict[str, timing.Entry]:
    return timing.measure_times(case, case.implementations, timing.Settings(**settings), Stopwatch())


class TestTiming:
    def test_rounds_hold_every_implementation_once(self) -> None:
        called: list[str] = []

        def slow(name: str) -> Implementation:
            def prepare(_size: Size, inputs: Any) -> Any:
                def run() -> Any:
                    called.append(name)
                    time.sleep(0.011)
                    return (2 * inputs[0],)

                return run

            return Implementation(name, prepare)

        entries = measure(doubling(slow(OURS), slow("peer"), slow("other")), rounds=5)
        timed = called[-15:]
        assert all(set(timed[at : at + 3]) == {OURS, "peer", "other"} for at in range(0, 15, 3))
        assert {entry["status"] for entry in entries.values()} == {"measured"}
        assert all(len(entry["seconds"]) == 5 and entry["calls"] == 1 for entry in entries.values())
        assert all(second >= 0.01 for entry in entries.values() for second in entry["seconds"])

    def test_short_calls_are_repeated_within_a_sample(self) -> None:
        entry = measure(doubling(Implementation(OURS, times(2))), rounds=2)[OURS]
        assert entry["calls"] > 1
        assert all(0 < second < timing.SAMPLE_SECONDS for second in entry["seconds"])

    def test_what_cannot_be_timed_is_recorded_with_its_reason(self) -> None:
        def unavailable(_size: Size, _inputs: Any) -> Any:
            raise Unavailable("no compiler")

        def broken(_size: Size, _inputs: Any) -> Any:
            raise RuntimeError("out of luck\nat line 1")

        case = doubling(
            Implementation(OURS, times(2)),
            Implementation("wrong", times(2.01)),
            Implementation("not finite", times(float("nan"))),
            Implementation("unavailable", unavailable),
            Implementation("broken", broken),
            Implementation("too big", times(2), bytes_needed=lambda _size: 9e9),
            Implementation("refused", times(2), refuse=lambda _size, _device: "takes for ever"),
            Implementation("yardstick", times(7), yardstick=True),
        )
        entries = measure(case, rounds=1)
        found = {name: (entry["status"], entry.get("reason")) for name, entry in entries.items()}
        assert found == {
            OURS: ("measured", None),
            "wrong": ("wrong", "off by 0.005 from the float64 reference"),
            "not finite": ("wrong", "off by inf from the float64 reference"),
            "unavailable": ("skipped", "no compiler"),
            "broken": ("failed", "RuntimeError: out of luck"),
            "too big": ("skipped", "needs about 9.0 GB; the limit is 6.0 GB"),
            "refused": ("skipped", "takes for ever"),
            "yardstick": ("measured", None),
        }
        assert [name for name, entry in entries.items() if "seconds" in entry] == [OURS, "yardstick"]

    def test_beyond_the_checked_size_implementations_are_compared_with_each_other(self) -> None:
        def wrong_when_large(_size: Size, inputs: Any) -> Any:
            return lambda: ((2 if len(inputs[0]) < 4 else 3) * inputs[0],)

        peers = Implementation(OURS, times(2)), Implementation("peer", wrong_when_large)
        entries = measure(doubling(*peers, checked=lambda _size: Size(2)), rounds=1)
        assert entries["peer"]["status"] == "wrong"
        assert entries["peer"]["reason"] == "differs by 0.5 from ours at this size"

    def test_a_case_of_fixed_rounds_is_called_once_at_its_size(self) -> None:
        called: list[int] = []

        def prepare(_size: Size, inputs: Any) -> Any:
            def run() -> Any:
                called.append(len(inputs[0]))
                return (2 * inputs[0],)

            return run

        case = doubling(Implementation(OURS, prepare), checked=lambda _size: Size(2))
        measure(replace(case, rounds=1))
        assert called == [2, 4]


def synthetic_record(seconds: dict[str, list[float]], case: Case, peak_bytes: int) -> record.Record:
    entries: dict[str, timing.Entry] = {
        name: {"status": "measured", "calls": 1, "seconds": samples, "error": 1e-7}
        for name, samples in seconds.items()
    }
    entries[OURS]["peak_bytes"] = peak_bytes
    entries["KeOps"] = {"status": "skipped", "reason": "no compiler"}
    cpu = {"brand_raw": "A Processor"}
    machine = {"cpu": cpu, "processor": "", "system": "Linux", "release": "6", "machine": "x86_64"}
    made = record.new("python -m benchmarks", machine, timing.Settings())
    made["cases"].append(record.describe_case(case, entries))
    return made


@pytest.fixture
def made(tmp_path: Path) -> record.Record:
    """A record as it comes back from its file: 0.1 s against 0.25 s, 0.3 s and 3 s; 20 MB."""
    seconds = {
        OURS: [0.1, 0.2, 0.1],
        "reference": [3.0, 3.0, 3.0],
        "torch.compile": [0.3, 0.3, 0.9],
        "three products": [0.25, 0.25, 0.25],
        "two products, tiles of 256": [0.08, 0.08, 0.08],
        "two products, tiles of 512": [0.16, 0.16, 0.16],
    }
    path = tmp_path / "made.json"
    record.save(synthetic_record(seconds, registry.PDCR_RANDOM, 20 * 2**20), path)
    return record.load(path)


class TestRecord:
    def test_round_trip_keeps_samples_and_adds_quantiles_and_ratios(self, made: record.Record) -> None:
        (case,) = made["cases"]
        assert case["id"] == registry.PDCR_RANDOM.id
        assert case["size"]["count"] == 4096
        assert case["memory_unit_bytes"] == 4096 * 256 * 4
        compiled = case["implementations"]["torch.compile"]
        assert compiled["seconds"] == [0.3, 0.3, 0.9]
        assert compiled["quantiles"] == {"20": 0.3, "50": 0.3, "80": 0.66}
        assert compiled["over_ours"]["medians"] == pytest.approx(3)
        assert compiled["over_ours"]["within_rounds"]["20"] == pytest.approx(2.1)  # of 1.5, 3 and 9
        assert case["implementations"]["KeOps"] == {"status": "skipped", "reason": "no compiler"}

    def test_says_where_it_comes_from(self, made: record.Record) -> None:
        assert made["versions"]["torch"] == torch.__version__
        assert made["machine"]["cpu"] == "A Processor"
        assert {"command", "date", "commit", "dirty", "settings"} <= set(made)

    def test_targets_are_measured_and_missed_ones_said(self, made: record.Record) -> None:
        rows = table.targets_table(made["cases"]).splitlines()[2:]
        figures = {
            (cells[3], cells[5]): (cells[4], cells[6])
            for cells in ([cell.strip() for cell in row.split("|")] for row in rows)
        }
        assert figures == {
            ("three products", "<= 0.5"): ("0.4", "met"),
            ("the sampled vectors in fp32", "<= 4"): ("5", "**missed**"),
        }

    def test_targets_of_gpu_cases_are_measured(self) -> None:
        call_case, small, gate_case = registry.GPU_CALLS[0], registry.GPU_SMALL[0], registry.GPU_GATES[0]
        measured = {
            call_case: (
                {"seconds": [2.0], "launches": 26, "uncaptured_host_seconds": 3.0},
                {"seconds": [5.0], "uncaptured_host_seconds": 4.0},
            ),
            small: ({"seconds": [1.0]}, {"seconds": [1.5]}),
            gate_case: ({"seconds": [1.0], "share": 0.93}, {}),
        }
        cases = [
            {"id": case.id, "implementations": {OURS: ours, pdcr.COMPILED_16_BIT: peer}}
            for case, (ours, peer) in measured.items()
        ]
        rows = table.targets_table(cases).splitlines()[2:]
        found = [tuple(cell.strip() for cell in row.split("|")[4:7]) for row in rows]
        assert sorted(found) == [
            ("0.75", "<= 1", "met"),
            ("1.5x as fast", ">= 1.5x", "met"),
            ("2.5x as fast", ">= 3x", "**missed**"),
            ("26", "<= 25", "**missed**"),
            ("93%", ">= 93%", "met"),
        ]

    def test_table_shows_times_ratios_memory_and_reasons(self, made: record.Record) -> None:
        text = table.markdown([made])
        assert "| ours | 100 ms (100 to 160) |  | 21 MB |" in text
        assert "| torch.compile | 300 ms (300 to 660) | 3x |  |" in text
        assert "| KeOps | skipped: no compiler |  |  |" in text
        assert "`python -m benchmarks`" in text
        assert "A Processor" in text

    def test_cases_of_a_gpu_check_are_read(self, made: record.Record, tmp_path: Path) -> None:
        whole = {key: value for key, value in made.items() if key != "cases"}
        parts = {
            "build": {},
            "pdcr-small": {"result": {"cases": made["cases"]}},
            "gate": {"outcome": "failed"},
        }
        (tmp_path / "gpu.json").write_text(json.dumps({**whole, "parts": parts}))
        found = record.load(tmp_path / "gpu.json")
        assert found["cases"] == made["cases"]
        assert "A Processor" in table.markdown([found])

    def test_pictures_are_drawn(self, made: record.Record, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        written = plot.draw([made], tmp_path / "pictures")
        assert [path.name for path in written] == ["pdcr_time.png", "pdcr_memory.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)

    def test_a_picture_without_a_point_is_not_drawn(self, made: record.Record, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        for entry in made["cases"][0]["implementations"].values():
            entry.pop("peak_bytes", None)
        assert [path.name for path in plot.draw([made], tmp_path)] == ["pdcr_time.png"]
        assert [path.name for path in tmp_path.glob("*_memory.png")] == []


KEPT = [path for path in sorted(record.RESULTS.glob("*.json")) if "cases" in json.loads(path.read_text())]


@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
class TestKeptRecords:
    def test_cases_and_implementations_are_the_registrys(self, path: Path) -> None:
        for case in record.load(path)["cases"]:
            known = registry.find(case["id"])
            assert case["operation"] == known.operation.name
            assert case["device"] == known.device
            names = {each.name for each in known.operation.implementations}
            variants = {"ours, never sorted", "ours, in panels"}  # of a commit, forced
            variants |= {"ours in Triton"}  # of a commit whose gate took its CUDA kernels
            assert set(case["implementations"]) <= names | variants

    def test_medians_and_ratios_are_those_of_the_samples(self, path: Path) -> None:
        for case in record.load(path)["cases"]:
            entries = case["implementations"]
            ours = statistics.median(entries[OURS]["seconds"])
            for entry in entries.values():
                assert ("seconds" in entry) == (entry["status"] == "measured")
                if "seconds" in entry:
                    median = statistics.median(entry["seconds"])
                    assert entry["quantiles"]["50"] == pytest.approx(median, rel=1e-3)
                    assert entry["over_ours"]["medians"] == pytest.approx(median / ours, rel=1e-3)
                if "forward_seconds" in entry and "seconds_are" in entry:
                    parts = entry["forward_seconds"] + entry["backward_seconds"]
                    assert median == pytest.approx(parts, rel=1e-3)

    def test_tables_are_drawn_and_say_where_they_come_from(self, path: Path) -> None:
        kept = record.load(path)
        text = table.markdown([kept])
        assert all(f"`{case['id']}`" in text for case in kept["cases"])
        assert kept["commit"][:9] in text.splitlines()[-1]
        assert len(kept["commit"]) == 40


def test_the_failures_of_a_gpus_tests_are_named() -> None:
    kept = record.load(record.RESULTS / "gpu_h100_2026-11-27.json")
    assert kept["tests"]["failed"] == len(kept["tests"]["failures"])
    assert all(failure["message"] for failure in kept["tests"]["failures"])
    assert len(kept["float64_checks"]) == 43


class TestAgainst:
    def test_a_tree_against_itself(self, tmp_path: Path) -> None:
        cases = [case for case in registry.QUICK if case.operation.name in ("pdcr_loss", "entropy_gate")]
        found = against.measure(ROOT, cases, rounds=1, seconds=0.0)
        assert list(found) == [case.id for case in cases]
        for times in found.values():
            assert all(0 < time < 60 for each in times.values() for time in each)
            assert len(times["before"]) == len(times["after"]) == 1
        text = against.table(found)
        assert f"| {cases[0].id} |" in text
        made = against.describe("the command", ROOT, found)
        assert made["commits"]["before"] == made["commits"]["after"]
        assert made["cases"][0]["ratio"] == against.ratio(found[cases[0].id])

    def test_another_folder_is_refused_in_its_words(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=str(tmp_path)):
            against.measure(tmp_path, list(registry.QUICK[:1]), rounds=1)


class TestCommand:
    def test_quick_run_records_times_and_memory(self, tmp_path: Path) -> None:
        out = tmp_path / "quick.json"
        pattern = r"^pdcr_loss/random.*(ours|reference|three products)$"
        arguments = ["--quick", "--only", pattern, "--rounds", "2", "--out", str(out)]
        command = [sys.executable, "-m", "benchmarks", *arguments]
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        finished = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        made = json.loads(out.read_text())
        (case,) = made["cases"]
        entries = case["implementations"]
        assert set(entries) == {OURS, "reference", "three products"}
        assert all(len(entry["seconds"]) == 2 for entry in entries.values())
        assert entries[OURS]["error"] < 1e-5
        matrix_bytes = 4 * case["size"]["count"] ** 2
        assert entries["reference"]["peak_bytes"] > 4 * matrix_bytes
        assert 0 < entries[OURS]["peak_bytes"] < entries["reference"]["peak_bytes"]
        assert "peak_bytes" not in entries["three products"]
        assert "--quick" in made["command"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--only", "nothing like it"], "matches nothing"),
            (["--rounds", "0"], "at least 1"),
            (["--quick", "--large"], "not allowed with"),
            (["--trial"], "go with --part"),
            (["--budget", "3", "--quick"], "go with --part"),
            pytest.param(["--part", "gate"], "needs a CUDA device", marks=needs_no_cuda),
        ],
    )
    def test_bad_arguments_are_refused(
        self,
        arguments: list[str],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert message in capsys.readouterr().err

    def test_lists_what_it_would_measure(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--list", "--large", "--only", "ours$"])
        assert main() == 0
        assert capsys.readouterr().out == f"{registry.PDCR_LARGE.id}: ours\n"
