"""Builds, tests and measures everything on this machine's GPU, part by part, and records it in one file.

    python scripts/gpu_check.py --out DIR                 # everything, about an hour
    python scripts/gpu_check.py --out DIR --only tests-calls --only call
    python scripts/gpu_check.py --out DIR --dry-run       # tiny sizes on the CPU, to try the commands

Every part runs in a process of its own with its own time limit, and what one does leaves the others alone.
`DIR/gpu_check.json` is written anew after every part, `DIR/PART.log` holds a part's whole output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 470.0  # seconds of a part
BUDGET = 340.0  # seconds after which a part of the benchmarks starts no further case
NO_DEVICE = 2  # exit status
_TAIL = 30  # lines of the log of a part that failed
_BENCHMARKS = (
    *("pdcr-small", "pdcr-large", "pdcr-huge", "pdcr-mask", "pdcr-dtypes"),
    *("call", "ratios", "gate", "step", "step-networks"),
)
_TOOL_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute")
_NCU_SECTIONS = ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats", "LaunchStats")

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A command, and how to read and summarise the file of that name that it leaves in the output folder."""

    name: str
    command: Sequence[str]
    limit: float = LIMIT
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None  # why it cannot be run at all
    leaves: str | None = None
    summarise: Callable[[Result], str] = lambda _result: ""


def parts(out: Path, *, dry: bool) -> list[Part]:
    """Everything there is to check, in order."""
    python = sys.executable
    inside = [
        python,
        str(Path(__file__).resolve()),
        "--out",
        str(out),
        *(["--dry-run"] if dry else []),
        "--inside",
    ]

    def benchmark(name: str) -> Part:
        options = ["--trial", "--rounds", "1"] if dry else ["--budget", str(BUDGET)]
        command = [python, "-m", "benchmarks", "--part", name, *options, "--out", str(out / f"{name}.json")]
        return Part(name, command, leaves=f"{name}.json", summarise=_summarise_benchmark)

    return [
        Part("build", [*inside, "build"], leaves="build.json", summarise=_summarise_build),
        Part("ceilings", [*inside, "ceilings"], leaves="ceilings.json", summarise=_summarise_ceilings),
        _tests(out, "tests-pdcr", "test_pdcr.py", "not beyond_32_bits and not test_large", dry=dry),
        _tests(out, "tests-ops", "test_gate.py test_ratios.py test_timing.py", "not beyond_32_bits", dry=dry),
        _tests(out, "tests-calls", "test_calls.py test_training.py", "", dry=dry),
        _tests(
            out,
            "tests-large",
            "test_pdcr.py test_gate.py",
            "beyond_32_bits or test_large",
            dry=dry,
            workers=1,
        ),
        _sanitizer("memcheck", inside),
        _sanitizer("racecheck", inside),
        *(benchmark(name) for name in _BENCHMARKS),
        Part("profile", [*inside, "profile"], leaves="profile.json", summarise=_summarise_profile),
    ]


def _tests(out: Path, name: str, files: str, chosen: str, *, dry: bool, workers: int = 6) -> Part:
    """Tests of the GPU, several at once where pytest-xdist is there: most of their time is compilation."""
    options = ["-q", "-rs", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={out / name}.xml"]
    if dry:
        options += ["--device", "cpu"]
        few = "nothing or cpu_tensors or fp64 or certain or expanded or random-131072"
        chosen = f"({chosen or 'test'}) and ({few})"
    elif workers > 1 and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(workers)]
    if chosen:
        options += ["-k", chosen]
    paths = [str(ROOT / "tests" / "gpu" / each) for each in files.split()]
    missing = None if importlib.util.find_spec("pytest") else "pytest is not installed"
    return Part(
        name,
        [sys.executable, "-m", "pytest", *paths, *options],
        missing=missing,
        leaves=f"{name}.xml",
        summarise=_summarise_tests,
    )


def _sanitizer(tool: str, inside: list[str]) -> Part:
    command = _find_tool("compute-sanitizer")
    return Part(
        tool,
        [command or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *inside, "short-run"],
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # every tensor ends where its allocation does
        missing=None if command else "compute-sanitizer: not found",
    )


def _find_tool(name: str) -> str | None:
    if found := shutil.which(name):
        return found
    home = os.environ.get("CUDA_HOME")
    for folder in (*([f"{home}/bin", f"{home}/compute-sanitizer"] if home else []), *_TOOL_FOLDERS):
        for candidate in (Path(folder) / name, *sorted(Path(folder).glob(f"*/{name}"), reverse=True)):
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return str(candidate)
    return None


def run(chosen: Sequence[Part], out: Path, record: dict[str, Any]) -> int:
    """Run the parts one after the other, and keep the record up to date; returns the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    record["parts"] = {}
    interrupted = False
    for part in chosen:
        print(f"{part.name} ...", flush=True)
        try:
            outcome = run_part(part, out)
        except KeyboardInterrupt:
            outcome, interrupted = {"outcome": "interrupted", "summary": ""}, True
        record["parts"][part.name] = {"command": shlex.join(part.command), **outcome}
        save(record, out)
        if outcome["outcome"] in ("failed", "timed out"):
            print("\n".join(outcome.get("tail", [])), flush=True)
        if interrupted:
            break
    print(table(record))
    if targets := _targets(record):
        print(targets)
    print(f"recorded in {out / 'gpu_check.json'}")
    if interrupted:
        return 128 + signal.SIGINT
    failed = {"failed", "timed out"} & {each["outcome"] for each in record["parts"].values()}
    return int(bool(failed))


def run_part(part: Part, out: Path) -> dict[str, Any]:
    """Run one part within its limit: its outcome, seconds, summary, result; the log's end if it failed."""
    if part.missing is not None:
        return {"outcome": "not run", "seconds": 0.0, "summary": part.missing}
    log = out / f"{part.name}.log"
    left = out / part.leaves if part.leaves else None
    if left is not None:
        left.unlink(missing_ok=True)  # of an earlier run
    started = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            list(part.command),
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": _python_path(), **part.environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children end with it
        )
        try:
            status: int | None = process.wait(part.limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    try:
        result = _read(left) if left is not None else None
    except (OSError, ValueError, ElementTree.ParseError) as error:
        result, found["unread"] = None, str(error)
    summary = part.summarise(result) if result is not None else ""
    if status == 0:
        found |= {"outcome": "ok", "summary": summary}
    else:
        reason = f"after {part.limit:g} s" if status is None else f"status {status}"
        found |= {
            "outcome": "timed out" if status is None else "failed",
            "summary": f"{reason}; {summary}".strip("; "),
            "tail": log.read_text(errors="replace").splitlines()[-_TAIL:],
        }
    if result is not None:
        found["result"] = result
    return found


def _end(process: subprocess.Popen[Any]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def save(record: dict[str, Any], out: Path) -> None:
    """Write the record in place of the last one, whole or not at all."""
    text = re.sub(
        r"\[[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(record, indent=1)
    )
    unfinished = out / "gpu_check.json.part"
    unfinished.write_text(text + "\n")
    unfinished.replace(out / "gpu_check.json")


def table(record: dict[str, Any]) -> str:
    """One line a part: outcome, seconds and what came out of it."""
    rows = [
        (name, part["outcome"], f"{part.get('seconds', 0):.0f} s", part.get("summary", ""))
        for name, part in record["parts"].items()
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {outcome:<{widths[1]}}  {seconds:>{widths[2]}}  {summary}".rstrip()
        for name, outcome, seconds, summary in rows
    )


def _targets(record: dict[str, Any]) -> str:
    cases = [
        case
        for name in _BENCHMARKS
        for case in record["parts"].get(name, {}).get("result", {}).get("cases", [])
    ]
    if not cases:
        return ""
    from benchmarks.table import targets_table

    return targets_table(cases)


def _read(path: Path) -> Result | None:
    if not path.exists():
        return None
    return _read_junit(path) if path.suffix == ".xml" else json.loads(path.read_text())


def _read_junit(path: Path) -> Result:
    suites = ElementTree.parse(path).getroot()
    found: Result = {"passed": 0, "failed": [], "skipped": {}}
    for case in suites.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(name)
        elif skipped is not None:
            reason = skipped.get("message", "")
            found["skipped"][reason] = found["skipped"].get(reason, 0) + 1
        else:
            found["passed"] += 1
    return found


def _summarise_tests(result: Result) -> str:
    failed = f", {len(result['failed'])} failed" if result["failed"] else ""
    skipped = "".join(f", {count} skipped ({reason})" for reason, count in result["skipped"].items())
    return f"{result['passed']} passed{failed}{skipped}"


def _summarise_build(result: Result) -> str:
    reasons = (f"{name}: {reason or 'ready'}" for name, reason in result["backends"].items())
    return f"{result['how']}; {', '.join(reasons)}"


def _summarise_ceilings(result: Result) -> str:
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in result["flops_per_second"].items())
    return f"copy {result['copy_bytes_per_second'] / 1e12:.3g} TB/s; {rates} TFLOP/s"


def _summarise_benchmark(result: Result) -> str:
    ours = [case["implementations"].get("ours", {}).get("status") for case in result["cases"]]
    bad = [
        f"{case['id']} {entry['status']}"
        for case in result["cases"]
        if (entry := case["implementations"].get("ours", {})).get("status") in ("wrong", "failed")
    ]
    return "; ".join([f"{ours.count('measured')} of {len(ours)} cases measured", *bad])


def _summarise_profile(result: Result) -> str:
    slowest = ", ".join(
        f"{each['name'][:40]} {each['microseconds']:.0f} us" for each in result["kernels"][:3]
    )
    return f"{slowest}; ncu: {result['ncu']}".removeprefix("; ")


def inside_build(out: Path, *, dry: bool) -> int:
    """Build the extensions in place unless they are there; tell which backends can run."""
    how = "found"
    if dry:
        how = "not built in a dry run"
    elif _find_library("_C") is None or _find_library("_C_cuda") is None:
        how = "built in place"
        compiler = _find_tool("nvcc")
        environment = {**os.environ, "FORCE_CUDA": "1"} if compiler else dict(os.environ)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
            how = "the build failed"
    import torch

    from contrastseg_fast import _backend

    backends: dict[str, str | None] = {"cpu": None if _backend.has_cpu_extension() else "not installed"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("triton", "cuda"):
        is_cuda = device.type == "cuda"
        backends[name] = _backend.unavailable(name, device) if is_cuda else "torch finds no CUDA device"
    _write(out, "build", {"how": how, "backends": backends})
    usable = dry or (backends["triton"] is None and backends["cuda"] is None)
    return int(not usable)


def _find_library(name: str) -> Path | None:
    return next((ROOT / "contrastseg_fast").glob(f"{name}.*so"), None)


def inside_ceilings(out: Path, *, dry: bool) -> int:
    """What the card can do at most."""
    from benchmarks import ceilings

    found = ceilings.measure("cpu" if dry else "cuda")
    print("\n".join(ceilings.lines(found)))
    _write(out, "ceilings", found)
    return 0


def inside_machine(out: Path, *, dry: bool) -> int:
    """The machine, the versions and the commit."""
    import platform

    from benchmarks import record
    from benchmarks.timing import Settings

    machine = {"cpu": {"brand_raw": record.cpu_name()}, **platform.uname()._asdict()}
    made = record.new("", machine, Settings(), "cpu" if dry else "cuda")
    _write(out, "machine", {key: made[key] for key in ("commit", "dirty", "machine", "versions")})
    return 0


def inside_short_run(_out: Path, *, dry: bool) -> int:
    """Every kernel once at odd sizes, for tools that slow kernels down a hundredfold."""
    import torch

    from contrastseg_fast import functional

    device = torch.device("cpu" if dry else "cuda")
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        for dtype in (torch.float32, torch.bfloat16):
            for count, channels, classes in ((257, 100, 2), (130, 300, 5)):
                vectors = torch.randn(2, count, channels, device=device, dtype=dtype, requires_grad=True)
                ratios = torch.rand(2, count, classes, device=device).softmax(-1)
                ratios[:, : count // 2] = ratios[:, :1]
                functional.pdcr_loss(vectors, ratios).backward()
            features = torch.randn(2, 19, 33, 35, device=device, dtype=dtype, requires_grad=True)
            logits = torch.randn(2, 3, 33, 35, device=device, dtype=dtype, requires_grad=True)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                gated = functional.entropy_gate(features.contiguous(memory_format=memory_format), logits)
                gated.sum().backward()
    for extents, size in (((67, 93), (7, 10)), ((21, 18, 27), (5, 4, 7))):
        labels = torch.randint(4, (2, *extents), device=device)
        starts = functional.sample_grid(extents, 60, device=device)
        functional.foreground_ratio(labels, starts, size, 4)
        functional.foreground_ratio(labels, starts.flip(0) - 3, size, 4, border="clip", ignore_index=1)
    if not dry:
        torch.cuda.synchronize()
    return 0


def _profiled() -> list[Callable[[], object]]:
    """The calls whose kernels are profiled."""
    from benchmarks import gate, pdcr

    calls: list[Callable[[], object]] = []
    for operation, size in (
        (pdcr.OPERATION, pdcr.Size(16384, dtype="bf16")),
        (gate.OPERATION, gate.Size((2, 64, 128, 128, 128), 5, "bf16")),
    ):
        calls.append(operation.implementation("ours").prepare(size, operation.make_inputs(size, "cuda")))
    return calls


def inside_profiled_run(_out: Path, *, dry: bool) -> int:
    """The calls to profile, once to warm up and once between the profiler's marks."""
    import torch

    for call in _profiled():
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def inside_profile(out: Path, *, dry: bool) -> int:
    """The kernels of one PDCR and one gate call by their time, and the slowest ones' counters by ncu."""
    if dry:
        _write(out, "profile", {"kernels": [], "ncu": "not run in a dry run"})
        return 0
    import torch

    calls = _profiled()
    for call in calls:
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for call in calls:
            call()
        torch.cuda.synchronize()
    kernels = sorted(
        (
            {"name": each.key, "count": each.count, "microseconds": each.device_time_total}
            for each in profile.key_averages()
            if each.device_time_total > 0
        ),
        key=lambda kernel: -kernel["microseconds"],
    )
    for kernel in kernels:
        print(f"{kernel['microseconds']:10.1f} us  {kernel['count']:4d} x  {kernel['name']}")
    found: Result = {"kernels": kernels, "ncu": "not found"}
    _write(out, "profile", found)
    if (ncu := _find_tool("ncu")) is not None:
        names = {re.split(r"[<(]", kernel["name"].removeprefix("void "))[0] for kernel in kernels[:4]}
        names = {name.split("::")[-1].strip() for name in names}
        command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
        command += [
            "--kernel-name",
            f"regex:{'|'.join(map(re.escape, sorted(names)))}",
            "--launch-count",
            "8",
        ]
        command += [argument for section in _NCU_SECTIONS for argument in ("--section", section)]
        inner = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), "--inside", "profiled-run"]
        finished = subprocess.run([*command, *inner], capture_output=True, text=True, check=False)
        (out / "ncu.txt").write_text(finished.stdout + finished.stderr)
        print(finished.stdout[-20000:], finished.stderr[-2000:])
        found["ncu"] = "in ncu.txt" if finished.returncode == 0 else f"status {finished.returncode}"
        found["ncu_lines"] = finished.stdout.splitlines()[-400:]
        _write(out, "profile", found)
    return 0


def _write(out: Path, name: str, result: Result) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result))


INSIDE: dict[str, Callable[..., int]] = {
    "build": inside_build,
    "ceilings": inside_ceilings,
    "machine": inside_machine,
    "short-run": inside_short_run,
    "profile": inside_profile,
    "profiled-run": inside_profiled_run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    everything = [part.name for part in parts(Path("."), dry=True)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check"), help="folder for records and logs"
    )
    parser.add_argument(
        "--only", action="append", choices=everything, metavar="PART", help=", ".join(everything)
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to try the commands")
    parser.add_argument("--inside", choices=INSIDE, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if options.inside is not None:
        sys.path.insert(0, str(ROOT))
        return INSIDE[options.inside](out, dry=options.dry_run)

    import torch

    if not torch.cuda.is_available() and not options.dry_run:
        print("gpu-check: torch finds no CUDA device; --dry-run tries the commands on the CPU")
        return NO_DEVICE
    sys.path.insert(0, str(ROOT))
    command = [str(Path(__file__).name), *(sys.argv[1:] if arguments is None else arguments)]
    record: dict[str, Any] = {
        "command": shlex.join(["python", f"scripts/{command[0]}", *command[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dry_run": options.dry_run,
    }
    out.mkdir(parents=True, exist_ok=True)
    dry = ["--dry-run"] if options.dry_run else []
    script = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), *dry, "--inside", "machine"]
    machine = run_part(Part("machine", script, limit=120, leaves="machine.json"), out)
    record |= machine.get("result") or {"machine": machine}
    chosen = [
        part for part in parts(out, dry=options.dry_run) if options.only is None or part.name in options.only
    ]
    return run(chosen, out, record)


if __name__ == "__main__":
    raise SystemExit(main())
