"""`scripts/gpu_check.py`: its order and limits, and what it leaves behind whatever becomes of its parts."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.py"

pytest.importorskip("benchmarks", reason="needs the repository on the path")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


gpu_check = load()


@pytest.fixture
def keeper(tmp_path: Path) -> gpu_check.Keeper:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return gpu_check.Keeper(tmp_path / "out", scratch, {"command": "here"})


def part(name: str, *codes: str, least: float = 0.0, most: float = 30.0, **options: Any) -> gpu_check.Part:
    commands = [[sys.executable, "-c", code] for code in codes]
    return gpu_check.Part(name, lambda _seconds: commands, gpu_check.Limits(least, most), **options)


def run(keeper: gpu_check.Keeper, *parts: gpu_check.Part, seconds: float = 100.0) -> int:
    return gpu_check.run(parts, keeper, gpu_check.clock() + seconds)


def written(keeper: gpu_check.Keeper) -> dict[str, Any]:
    return json.loads((keeper.out / "gpu_check.json").read_text())["parts"]


def archived(keeper: gpu_check.Keeper) -> dict[str, str]:
    with tarfile.open(keeper.out / "logs.tar.gz") as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        return {name.removeprefix("logs/"): file.read().decode() for name, file in files.items()}


class TestLimits:
    def test_one_part_that_fails_leaves_the_others(
        self, keeper: gpu_check.Keeper, capsys: pytest.CaptureFixture[str]
    ) -> None:
        chosen = (
            part("bad", "print('so far so good'); raise SystemExit(3)"),
            part("slow", "import time; print('begun', flush=True); time.sleep(60)", most=1.0),
            part(
                "good",
                "",
                result=lambda: {"seen": 3},
                lines=lambda found: [f"saw {found['seen']}", "and more"],
            ),
            part("absent", "", missing="the tool was not found"),
        )
        assert run(keeper, *chosen) == 1
        parts = written(keeper)
        assert {name: found["outcome"] for name, found in parts.items()} == {
            "bad": "failed",
            "slow": "timed out",
            "good": "ok",
            "absent": "not run",
        }
        assert parts["bad"]["reason"] == "status 3"
        assert parts["bad"]["tail"] == ["so far so good"]
        assert parts["slow"]["reason"] == "ended after 1 s"
        assert 1 <= parts["slow"]["seconds"] < 30
        assert parts["good"]["result"] == {"seen": 3}
        shown = [line.split() for line in capsys.readouterr().out.splitlines()[-6:-1]]
        assert [words[0] for words in shown] == ["bad", "slow", "good", "and", "absent"]
        assert shown[2][-2:] == ["saw", "3"]
        assert archived(keeper)["slow.log"] == "begun\n"

    def test_all_well(self, keeper: gpu_check.Keeper) -> None:
        assert run(keeper, part("good", "")) == 0

    def test_parts_that_the_time_does_not_allow_are_dropped_and_smaller_ones_still_run(
        self, keeper: gpu_check.Keeper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: dict[str, float] = {}
        now = [0.0]

        def run_part(part: gpu_check.Part, keeper: gpu_check.Keeper, seconds: float) -> None:
            given[part.name] = seconds
            now[0] += 50
            keeper.record["parts"][part.name] = {"outcome": "ok", "seconds": 50.0}

        monkeypatch.setattr(gpu_check, "clock", lambda: now[0])
        monkeypatch.setattr(gpu_check, "run_part", run_part)
        plan = {"one": (10, 60), "two": (20, 30), "three": (30, 90), "four": (5, 90), "five": (1, 5)}
        chosen = [part(name, "", least=least, most=most) for name, (least, most) in plan.items()]
        assert gpu_check.run(chosen, keeper, 120.0) == 0
        assert given == {"one": 60, "two": 30, "four": 20}
        dropped = {name: found for name, found in written(keeper).items() if found["outcome"] == "dropped"}
        assert {name: found["reason"] for name, found in dropped.items()} == {
            "three": "20 s were left, it needs 30 s",
            "five": "0 s were left, it needs 1 s",
        }

    def test_the_end_of_the_time_ends_a_part(self, keeper: gpu_check.Keeper) -> None:
        since = time.monotonic()
        assert run(keeper, part("slow", "import time; time.sleep(60)"), seconds=1.0) == 1
        assert time.monotonic() - since < 30
        assert written(keeper)["slow"]["outcome"] == "timed out"

    def test_children_of_a_part_end_with_it(self, keeper: gpu_check.Keeper) -> None:
        code = (
            "import subprocess, sys\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            "print(child.pid, flush=True)\n"
            "child.wait()\n"
        )
        run(keeper, part("parent", code, most=2.0))
        pid = int(archived(keeper)["parent.log"])
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
                return
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the child lives on")

    def test_commands_of_a_part_run_at_the_same_time(self, keeper: gpu_check.Keeper) -> None:
        def waiting(mine: str, other: str) -> str:
            return (
                f"import pathlib, time; here = pathlib.Path({str(keeper.scratch)!r})\n"
                f"(here / '{mine}').touch()\n"
                f"while not (here / '{other}').exists(): time.sleep(0.05)"
            )

        assert run(keeper, part("pair", waiting("a", "b"), waiting("b", "a"))) == 0
        assert run(keeper, part("pair", "", "raise SystemExit(4)", "raise SystemExit(4)")) == 1
        assert written(keeper)["pair"]["reason"] == "2 of 3 processes, status 4"
        assert {"pair-0.log", "pair-1.log", "pair-2.log"} <= set(archived(keeper))


class TestWhatIsKept:
    def test_the_record_is_written_after_every_part(self, keeper: gpu_check.Keeper) -> None:
        file = keeper.out / "gpu_check.json"
        look = f"import json; print(list(json.load(open({str(file)!r}))['parts']))"
        run(keeper, part("first", ""), part("second", look))
        assert archived(keeper)["second.log"] == "['first']\n"

    def test_record_and_archive_are_renewed_while_a_part_runs(
        self, keeper: gpu_check.Keeper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_check, "RENEW_SECONDS", 0.0)
        code = (
            "import json, pathlib, time\n"
            f"record, own = pathlib.Path({str(keeper.out / 'gpu_check.json')!r}), '\"seen\": 7'\n"
            f"archive = record.with_name('logs.tar.gz')\n"
            f"pathlib.Path({str(keeper.scratch / 'left')!r}).write_text('7')\n"
            "while not (record.exists() and own in record.read_text() and archive.exists()):\n"
            "    time.sleep(0.05)\n"
            "assert json.loads(record.read_text())['parts']['long']['outcome'] == 'running'\n"
        )

        def left() -> dict[str, int]:
            file = keeper.scratch / "left"
            return {"seen": int(file.read_text())} if file.exists() else {}

        assert run(keeper, part("long", code, result=left)) == 0

    def test_an_interrupt_keeps_what_is_done(self, keeper: gpu_check.Keeper) -> None:
        """Ctrl-C, or SIGTERM as a scheduler sends it, while the second part runs."""
        code = (
            "import importlib.util, pathlib, signal, sys\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            f"spec = importlib.util.spec_from_file_location('gpu_check', {str(SCRIPT)!r})\n"
            "gpu_check = importlib.util.module_from_spec(spec)\n"
            "sys.modules['gpu_check'] = gpu_check\n"
            "spec.loader.exec_module(gpu_check)\n"
            "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
            f"scratch, out = pathlib.Path({str(keeper.scratch)!r}), pathlib.Path({str(keeper.out)!r})\n"
            "keeper = gpu_check.Keeper(out, scratch, {})\n"
            "def part(name, code, result=dict):\n"
            "    command = [[sys.executable, '-c', code]]\n"
            "    return gpu_check.Part(name, lambda _: command, gpu_check.Limits(0, 60), result=result)\n"
            "mark = f'import pathlib, time; pathlib.Path({str(scratch)!r}, \"begun\").touch()'\n"
            "long = part('second', f'{mark}; time.sleep(60)', lambda: {'half': 1})\n"
            "parts = [part('first', ''), long, part('third', '')]\n"
            "raise SystemExit(gpu_check.run(parts, keeper, gpu_check.clock() + 100))\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(600):
            if (keeper.scratch / "begun").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        parts = written(keeper)
        assert {name: found["outcome"] for name, found in parts.items()} == {
            "first": "ok",
            "second": "interrupted",
        }
        assert parts["second"]["result"] == {"half": 1}
        assert "second  interrupted" in said
        assert "third" not in said

    def test_unreadable_results_are_said(self, keeper: gpu_check.Keeper) -> None:
        run(keeper, part("torn", "", result=lambda: json.loads("{")))
        assert written(keeper)["torn"]["outcome"] == "ok"
        assert "Expecting" in written(keeper)["torn"]["unread"]

    def test_results_that_could_not_be_read_for_a_while(self, keeper: gpu_check.Keeper) -> None:
        texts = iter(["{", '{"seen": 3}'])
        slow = part("slow", "", result=lambda: json.loads(next(texts)))
        keeper.record["parts"] = {}
        found: dict[str, Any] = {"outcome": "running"}
        keeper.keep(slow, found)
        assert "unread" in written(keeper)["slow"]
        keeper.keep(slow, found)
        assert written(keeper)["slow"] == {"outcome": "running", "result": {"seen": 3}, "lines": []}

    def test_no_paths_of_this_machine_in_the_record(self, keeper: gpu_check.Keeper) -> None:
        command = [
            sys.executable,
            "-c",
            "",
            "--out",
            str(keeper.scratch / "it.json"),
            str(ROOT / "tests" / "gpu"),
        ]
        run(keeper, gpu_check.Part("one", lambda _seconds: [command], gpu_check.Limits(0, 30)))
        assert written(keeper)["one"]["command"] == "python -c '' --out it.json tests/gpu"


class TestPlan:
    def parts(self, scratch: Path, **options: Any) -> list[gpu_check.Part]:
        given = dict.fromkeys(("commit", "only", "data")) | {"dry_run": False, "first_seed": 5}
        return gpu_check.parts(argparse.Namespace(**{**given, "arms": ("baseline",), **options}), scratch)

    def commands(self, scratch: Path, seconds: float = 60.0, **options: Any) -> dict[str, list[list[str]]]:
        return {each.name: each.commands(seconds) for each in self.parts(scratch, **options)}

    def test_all_that_must_run_fits_the_usual_time(self) -> None:
        """Parts end at their limits, so only what comes late in the plan can be dropped."""
        most = [limits.most for limits in gpu_check.PLAN.values()]
        assert all(limits.least < limits.most for limits in gpu_check.PLAN.values())
        without_build = sum(most[1 : list(gpu_check.PLAN).index("counters")])
        assert without_build + gpu_check.PLAN["counters"].least < 9 * 60

    def test_as_many_processes_as_cores_share_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(16))
        commands = self.commands(tmp_path)
        for name in ("warm", "accuracy"):
            shares = [command[command.index("--share") + 1] for command in commands[name]]
            assert shares == [f"{k}/16" for k in range(16)]
        assert [len(commands[name]) for name in ("build", "right", "timings", "sanitizer")] == [1, 1, 1, 2]

    def test_a_part_knows_how_long_it_has(self, tmp_path: Path) -> None:
        commands = self.commands(tmp_path, 50.0)
        for name, option, seconds in (("timings", "--budget", 40.0), ("accuracy", "--seconds", 45.0)):
            (*_, command) = commands[name]
            assert float(command[command.index(option) + 1]) == seconds

    def test_what_is_missing_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda _name: None)
        monkeypatch.setattr(gpu_check, "_TOOL_FOLDERS", ())
        monkeypatch.delenv("CUDA_HOME", raising=False)
        assert {each.name: each.missing for each in self.parts(tmp_path) if each.missing} == {
            "counters": "ncu was not found",
            "accuracy": "no --data",
            "sanitizer": "compute-sanitizer was not found",
        }

    def test_tools_get_the_short_programs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: f"/tools/{name}")
        commands = self.commands(tmp_path)
        (counters,) = commands["counters"]
        assert counters[:3] == ["/tools/ncu", "--clock-control", "none"]  # the card's clocks stay as they are
        assert counters[-4:] == [sys.executable, "-m", "benchmarks.once", "--profile"]
        assert str(tmp_path / "counters.csv") in counters
        pattern = counters[counters.index("--kernel-name") + 1].removeprefix("regex:")
        forward, backward = (
            pytest.importorskip(f"contrastseg_fast.kernels.pdcr.{name}") for name in ("forward", "backward")
        )
        for kernel in (forward.pdcr_fwd_kernel, backward.pdcr_bwd_kernel):
            assert re.fullmatch(pattern, kernel.__name__)
        for tool, command in zip(("memcheck", "racecheck"), commands["sanitizer"], strict=True):
            assert command[:3] == ["/tools/compute-sanitizer", "--tool", tool]
            assert command[-3:] == [sys.executable, "-m", "benchmarks.once"]

    def test_only_keeps_the_order_and_what_describes_the_machine(self, tmp_path: Path) -> None:
        assert list(self.commands(tmp_path, only=["timings", "right"])) == ["build", "right", "timings"]

    def test_every_test_of_the_gpu_is_in_one_of_the_two_parts(self, tmp_path: Path) -> None:
        commands = self.commands(tmp_path)
        large, rest = (commands[name][0][-1] for name in ("right-large", "right"))
        assert rest == f"not ({large})"

    def test_unknown_parts_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            gpu_check.main(["--only", "everything"])
        assert ended.value.code == 2
        assert "invalid choice" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
    def test_without_cuda_it_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert gpu_check.main([]) == gpu_check.NO_DEVICE
        assert capsys.readouterr().out.count("\n") == 1


BLOCKED = ("monai", "matplotlib", "pytest_benchmark", "nibabel", "PIL", "sklearn", "pykeops", "torchvision")


def without_packages(folder: Path) -> str:
    """A folder for PYTHONPATH that makes every process unable to import what a bare machine may lack."""
    folder.mkdir()
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in BLOCKED)]
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return str(folder)


def bare_copy(folder: Path) -> Path:
    """The source tree as it travels: no git, nothing installed beside it."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "runs", "*.egg-info")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


def checked(root: Path, out: Path, environment: dict[str, str], *options: str) -> tuple[int, str]:
    finished = subprocess.run(
        [sys.executable, "scripts/gpu_check.py", "--dry-run", "--out", str(out), *options],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return finished.returncode, finished.stdout + finished.stderr


def test_dry_run_walks_through_all_parts_on_a_bare_machine(tmp_path: Path) -> None:
    root, out = bare_copy(tmp_path / "tree"), tmp_path / "out"
    tools = tmp_path / "tools"  # of the system, but neither git nor make
    tools.mkdir()
    for name in ("sh", "cc", "gcc", "c++", "g++", "ld", "as"):
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    environment = {"PATH": str(tools), "PYTHONPATH": without_packages(tmp_path / "site")}
    status, said = checked(root, out, environment, "--commit", "abc1234")
    assert status == 0, said
    assert sorted(path.name for path in out.iterdir()) == ["gpu_check.json", "logs.tar.gz"]
    made = json.loads((out / "gpu_check.json").read_text())
    assert (made["commit"], made["dirty"], made["dry_run"]) == ("abc1234", None, True)
    assert made["versions"]["torch"] == importlib.metadata.version("torch")
    assert {name: found["outcome"] for name, found in made["parts"].items()} == dict.fromkeys(
        gpu_check.PLAN, "ok"
    )
    results = {name: found["result"] for name, found in made["parts"].items()}
    assert results["warm"]["failed"] == {}
    assert results["right"]["passed"] > 0
    assert results["right"]["compared"] > 0
    assert results["right-large"]["passed"] > 0
    for name in ("timings", "large"):
        for case in results[name]["cases"]:
            assert case["implementations"]["ours"]["status"] == "measured"
    assert len(results["sweep"]["launches"]) == 8
    assert results["accuracy"]["summary"]["released-0.3"]["difference"]["n"] == 2
    assert "Dice" in said
    assert f"recorded in {out / 'gpu_check.json'}" in said

    from benchmarks import record, table

    found = record.load(out / "gpu_check.json")
    assert len(found["cases"]) == len(results["timings"]["cases"]) + 1
    assert "commit abc1234;" in table.markdown([found])


def test_without_git_the_commit_is_unknown_unless_it_is_told(tmp_path: Path) -> None:
    root, out = bare_copy(tmp_path / "tree"), tmp_path / "out"
    status, said = checked(root, out, {}, "--only", "build")
    assert status == 0, said
    made = json.loads((out / "gpu_check.json").read_text())
    assert (made["commit"], made["dirty"]) == ("unknown", None)
    assert list(made["parts"]) == ["build"]


@pytest.fixture
def outcomes(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs tests under the plugin, and gives the rows it wrote."""

    def rows(code: str, *options: str) -> list[dict[str, Any]]:
        (tmp_path / "test_few.py").write_text(code)
        file = tmp_path / "outcomes.jsonl"
        command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(tmp_path)]
        command += ["-p", "gpu.outcomes", "--outcomes", str(file), *options, str(tmp_path / "test_few.py")]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, check=False)
        return [json.loads(line) for line in file.read_text().splitlines()]

    return rows


class TestOutcomes:
    FEW = (
        "import os, pytest, torch\n"
        "from gpu.oracle import assert_as_exact\n"
        "def test_good():\n"
        "    x = torch.tensor([3.0, 4.0])\n"
        "    assert_as_exact('loss', x + 0.005, x + 0.01, x, 1e-3)\n"
        "def test_bad(): assert 1 == 2, 'they differ'\n"
        "def test_not_here(): pytest.skip('no second device')\n"
        "@pytest.fixture\n"
        "def broken(): raise RuntimeError('no memory')\n"
        "def test_set_up(broken): pass\n"
    )

    def test_outcomes_messages_and_errors(self, outcomes) -> None:
        found = {row["test"].split("::")[-1]: row for row in outcomes(self.FEW)}
        assert {name: row["outcome"] for name, row in found.items()} == {
            "test_good": "passed",
            "test_bad": "failed",
            "test_not_here": "skipped",
            "test_set_up": "failed",
        }
        ((name, error, plain, allowed),) = found["test_good"]["errors"]
        assert name == "loss"
        assert error == pytest.approx(0.005 * 2**0.5 / 5, rel=1e-3)
        assert plain == pytest.approx(2 * error, rel=1e-3)
        assert allowed == pytest.approx(2 * plain + 1e-3)
        assert found["test_bad"]["message"].startswith("AssertionError: they differ")
        assert found["test_not_here"]["message"] == "no second device"
        assert "RuntimeError: no memory" in found["test_set_up"]["message"]

        from benchmarks import gpu_report

        result = gpu_report._tests(list(found.values()))
        assert (result["passed"], result["skipped"], result["compared"]) == (1, {"no second device": 1}, 1)
        assert [each["test"].split("::")[-1] for each in result["failed"]] == ["test_bad", "test_set_up"]
        first, nearest, *failures = gpu_report.lines("right", result)
        assert first == "1 passed, 2 failed, 1 skipped (no second device)"
        assert nearest.startswith("1 errors compared")
        assert "they differ" in failures[0]

    def test_files_that_cannot_be_collected_are_failures(self, outcomes) -> None:
        (row,) = outcomes("import no_such_module\n")
        assert row["outcome"] == "failed"
        assert "no_such_module" in row["message"]

    def test_what_is_known_survives_the_end_of_the_process(self, outcomes) -> None:
        code = "import os\ndef test_good(): pass\ndef test_dies(): os._exit(1)\n"
        assert [row["outcome"] for row in outcomes(code)] == ["passed"]

    def test_processes_of_xdist_report_once(self, outcomes) -> None:
        pytest.importorskip("xdist")
        found = outcomes(self.FEW, "-n", "2")
        assert sorted(row["outcome"] for row in found) == ["failed", "failed", "passed", "skipped"]
        assert [len(row["errors"]) for row in found if "errors" in row] == [1]
