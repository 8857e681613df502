"""`scripts/gpu_check.py`: what its parts leave behind, whatever becomes of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu_check.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


gpu_check = load()


def part(name: str, code: str, **options: object) -> gpu_check.Part:
    return gpu_check.Part(name, [sys.executable, "-c", code], **options)


def written(out: Path) -> dict[str, dict[str, object]]:
    return json.loads((out / "gpu_check.json").read_text())["parts"]


def test_one_part_that_fails_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = f"open({str(tmp_path / 'good.json')!r}, 'w').write('{{\"seen\": 3}}')"
    chosen = [
        part("bad", "print('so far so good'); raise SystemExit(3)"),
        part("slow", "import time; print('begun', flush=True); time.sleep(60)", limit=1.0),
        part("good", good, leaves="good.json", summarise=lambda result: f"saw {result['seen']}"),
        part("absent", "", missing="the tool: not found"),
    ]
    assert gpu_check.run(chosen, tmp_path, {"command": "here"}) == 1
    parts = written(tmp_path)
    assert {name: found["outcome"] for name, found in parts.items()} == {
        "bad": "failed",
        "slow": "timed out",
        "good": "ok",
        "absent": "not run",
    }
    assert parts["bad"]["summary"] == "status 3"
    assert parts["bad"]["tail"] == ["so far so good"]
    assert parts["slow"]["summary"] == "after 1 s"
    assert parts["slow"]["tail"] == ["begun"]
    assert 1 <= parts["slow"]["seconds"] < 30
    assert parts["good"]["result"] == {"seen": 3}
    assert sys.executable in parts["good"]["command"]
    lines = capsys.readouterr().out.splitlines()
    table = lines[-5:-1]
    assert [line.split()[0] for line in table] == ["bad", "slow", "good", "absent"]
    assert table[2].endswith("saw 3")
    assert table[3].endswith("the tool: not found")


def test_all_well(tmp_path: Path) -> None:
    assert gpu_check.run([part("good", "")], tmp_path, {}) == 0


def test_the_record_is_written_after_every_part(tmp_path: Path) -> None:
    look = f"import json; print(list(json.load(open({str(tmp_path / 'gpu_check.json')!r}))['parts']))"
    gpu_check.run([part("first", ""), part("second", look)], tmp_path, {})
    assert (tmp_path / "second.log").read_text() == "['first']\n"


def test_an_interrupt_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_part = gpu_check.run_part

    def interrupted(chosen: gpu_check.Part, out: Path) -> dict[str, object]:
        if chosen.name == "second":
            raise KeyboardInterrupt
        return run_part(chosen, out)

    monkeypatch.setattr(gpu_check, "run_part", interrupted)
    assert gpu_check.run([part("first", ""), part("second", ""), part("third", "")], tmp_path, {}) == 130
    assert {name: found["outcome"] for name, found in written(tmp_path).items()} == {
        "first": "ok",
        "second": "interrupted",
    }


def test_results_of_an_earlier_run_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    found = gpu_check.run_part(part("dead", "raise SystemExit(1)", leaves="old.json"), tmp_path)
    assert "result" not in found


def test_unreadable_results_are_said(tmp_path: Path) -> None:
    torn = f"open({str(tmp_path / 'torn.json')!r}, 'w').write('{{')"
    found = gpu_check.run_part(part("torn", torn, leaves="torn.json"), tmp_path)
    assert found["outcome"] == "ok"
    assert "Expecting" in found["unread"]


def test_reads_what_pytest_leaves(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_not_here(): pytest.skip('no second device')\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    command += [str(tmp_path / "test_three.py"), f"--junitxml={tmp_path / 'three.xml'}"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    result = gpu_check._read(tmp_path / "three.xml")
    assert result == {
        "passed": 1,
        "failed": ["test_three::test_bad"],
        "skipped": {"no second device": 1},
    }
    assert gpu_check._summarise_tests(result) == "1 passed, 1 failed, 1 skipped (no second device)"


def test_dry_run_walks_through_the_parts(tmp_path: Path) -> None:
    names = ("build", "tests-calls", "tests-large", "memcheck", "gate", "profile")
    only = [argument for name in names for argument in ("--only", name)]
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(tmp_path), *only]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    made = json.loads((tmp_path / "gpu_check.json").read_text())
    assert made["dry_run"]
    assert made["versions"]["torch"] == importlib.metadata.version("torch")
    assert "--dry-run" in made["command"]
    assert tuple(made["parts"]) == names
    outcomes = {name: made["parts"][name]["outcome"] for name in names}
    assert outcomes.pop("memcheck") in ("ok", "not run")
    assert set(outcomes.values()) == {"ok"}
    assert made["parts"]["tests-calls"]["result"]["passed"] > 0
    assert all(
        case["implementations"]["ours"]["status"] == "measured"
        for case in made["parts"]["gate"]["result"]["cases"]
    )
    assert f"recorded in {tmp_path / 'gpu_check.json'}" in finished.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_without_cuda_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == gpu_check.NO_DEVICE
    assert capsys.readouterr().out.count("\n") == 1


def test_every_part_keeps_to_its_time() -> None:
    for each in gpu_check.parts(Path("somewhere"), dry=False):
        assert each.limit < 480


def test_every_part_of_the_registry_is_checked() -> None:
    registry = pytest.importorskip("benchmarks.registry", reason="needs the repository on the path")

    assert tuple(registry.PARTS) == gpu_check._BENCHMARKS


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--only", "everything"])
    assert ended.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
