"""Builds, tests and measures on this machine's GPU within a few minutes, what is worth most first.

    python scripts/gpu_check.py --minutes 9 --out DIR [--commit HASH] [--data FILE.npz]
    python scripts/gpu_check.py --only right timings      # some of the parts
    python scripts/gpu_check.py --dry-run                 # all of them at tiny sizes on the CPU

It needs no installation. The plan below says what each part does; pytest, `python -m benchmarks` and NVIDIA's
tools do the work. Everything is written the moment it is known, so that an end by force loses seconds only:
`DIR/gpu_check.json` is a record as `python -m benchmarks --table` reads it, `DIR/logs.tar.gz` holds all
output and a line for every test, time, launch and training run.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Limits(NamedTuple):
    """A part is dropped when fewer than `least` seconds are left, and ended after `most`."""

    least: float
    most: float


PLAN = {  # in order of worth
    "build": Limits(
        3, 180
    ),  # the libraries if they do not load, for this card alone; the machine's description
    "warm": Limits(20, 75),  # compiles what is timed below, in as many processes as there are cores
    "right": Limits(40, 150),  # tests/gpu, in as many processes
    "right-large": Limits(20, 50),  # its tests of large sizes
    "timings": Limits(20, 110),  # the cases of benchmarks/gpu_plan.py, beside their peers
    "sweep": Limits(10, 45),  # other launches of PDCR's two kernels
    "counters": Limits(10, 30),  # what ncu counts in them
    "accuracy": Limits(60, 150),  # small networks trained with and without PDCR, on --data
    "sanitizer": Limits(20, 60),  # memcheck and racecheck of every kernel
    "large": Limits(10, 30),  # N = 131072
}
NO_DEVICE = 2  # exit status
LARGE_TESTS = "beyond_32_bits or test_large or 131072"
# A sample, quick on a CPU.
DRY_TESTS = "nothing or cpu_tensors or fp64 or certain or expanded or random-131072"
MARGIN = 5.0  # seconds before a part's end in which its programs begin nothing new
RENEW_SECONDS = 3.0  # between looks at what a running part has left
_TAIL = 12  # lines of the log of a process that failed
_TOOL_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute")
_NCU_SECTIONS = (
    *("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats"),
    *("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis"),
)

Result = dict[str, Any]
clock = time.monotonic


@dataclass(frozen=True)
class Part:
    """Commands that run at the same time, given the seconds they have, and how to read what they leave."""

    name: str
    commands: Callable[[float], list[list[str]]]
    limits: Limits
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None  # why it cannot run at all
    result: Callable[[], Result] = dict
    lines: Callable[[Result], list[str]] = lambda _result: []


class Keeper:
    """The record and the archive in the output folder; each is replaced as a whole, so it is never torn."""

    def __init__(self, out: Path, scratch: Path, record: dict[str, Any]) -> None:
        self.out, self.scratch, self.record = out, scratch, record
        self._renewed = clock()
        out.mkdir(parents=True, exist_ok=True)

    def keep(self, part: Part, found: Result) -> None:
        """Put a part's outcome, with what it has left so far, into the record."""
        found.pop("unread", None)
        try:
            found["result"] = part.result()
            found["lines"] = part.lines(found["result"]) if found["result"] else []
        except Exception as error:  # whatever a part leaves, the others' results are kept
            found["unread"] = f"{type(error).__name__}: {error}"
        self.record["parts"][part.name] = found
        self.save()

    def keep_now_and_then(self, part: Part, found: Result) -> None:
        """The same, and the archive, if the last time is a few seconds ago."""
        if clock() - self._renewed >= RENEW_SECONDS:
            self.keep(part, found)
            self.pack()
            self._renewed = clock()

    def pack(self) -> None:
        """Archive the scratch folder."""
        unfinished = self.out / "logs.tar.gz.part"
        with suppress(OSError):  # a file that is written meanwhile
            with tarfile.open(unfinished, "w:gz", compresslevel=3) as archive:
                archive.add(self.scratch, "logs")
            unfinished.replace(self.out / "logs.tar.gz")

    def save(self) -> None:
        from benchmarks import record

        record.save(self.record, self.out / "gpu_check.json")


def run(parts: Sequence[Part], keeper: Keeper, deadline: float) -> int:
    """Run the parts that the time until the deadline allows, one after the other; returns the exit status."""
    from benchmarks import gpu_report

    record = keeper.record
    record["parts"] = {}
    for part in parts:
        left = deadline - clock()
        reason = part.missing
        if reason is None and left < part.limits.least:
            reason = f"{max(left, 0):.0f} s were left, it needs {part.limits.least:g} s"
        if reason is not None:
            outcome = "not run" if part.missing else "dropped"
            record["parts"][part.name] = {"outcome": outcome, "seconds": 0.0, "reason": reason}
            keeper.save()
            continue
        print(f"{part.name}: at most {min(part.limits.most, left):.0f} s", flush=True)
        run_part(part, keeper, min(part.limits.most, left))
        if part.name == "build":
            record |= record["parts"]["build"].get("result", {}).pop("record", {})
        if record["parts"][part.name]["outcome"] == "interrupted":
            break
    keeper.pack()
    keeper.save()
    print(gpu_report.closing(record["parts"]))
    print(f"recorded in {keeper.out / 'gpu_check.json'}")
    outcomes = {each["outcome"] for each in record["parts"].values()}
    return 128 + signal.SIGINT if "interrupted" in outcomes else int(bool({"failed", "timed out"} & outcomes))


def run_part(part: Part, keeper: Keeper, seconds: float) -> None:
    """Run a part's processes for so long at most, and keep what becomes of it."""
    started = clock()
    commands = part.commands(seconds)
    suffixes = [""] if len(commands) == 1 else [f"-{k}" for k in range(len(commands))]
    logs = [keeper.scratch / f"{part.name}{suffix}.log" for suffix in suffixes]
    found: Result = {"outcome": "running", "command": _shown(commands[0]), "processes": len(commands)}
    processes: list[subprocess.Popen[Any]] = []
    interrupted = False
    try:
        for command, log in zip(commands, logs, strict=True):
            processes.append(_start(command, log, part.environment))
        while any(each.poll() is None for each in processes) and clock() - started < seconds:
            time.sleep(0.1)
            found["seconds"] = round(clock() - started, 1)
            keeper.keep_now_and_then(part, found)
    except KeyboardInterrupt:
        interrupted = True
    statuses = [each.poll() for each in processes]
    for process in processes:
        _end(process)
    found["seconds"] = round(clock() - started, 1)
    found |= {"outcome": "interrupted"} if interrupted else _outcome(statuses, seconds)
    bad = [log for log, status in zip(logs, statuses, strict=False) if status != 0]
    if bad:
        found["tail"] = bad[0].read_text(errors="replace").splitlines()[-_TAIL:]
        print("\n".join(line[:200] for line in found["tail"]), flush=True)
    keeper.keep(part, found)


def _outcome(statuses: list[int | None], seconds: float) -> Result:
    """What processes with these exit statuses, None for those that did not end by themselves, amount to."""
    if None in statuses:
        return {"outcome": "timed out", "reason": f"ended after {seconds:.0f} s"}
    bad = [status for status in statuses if status != 0]
    if not bad:
        return {"outcome": "ok"}
    of = f"{len(bad)} of {len(statuses)} processes, " if len(statuses) > 1 else ""
    return {"outcome": "failed", "reason": f"{of}status {bad[0]}"}


def _shown(command: Sequence[str]) -> str:
    """A command as it is recorded: this machine's paths become names, or paths within the sources."""

    def shown(word: str) -> str:
        path = Path(word)
        if word == sys.executable:
            return "python"
        if not path.is_absolute():
            return word
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    return shlex.join(map(shown, command))


def _start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[Any]:
    paths = (str(ROOT), environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH"))
    with log.open("w") as stream:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                **environment,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # so that its children end with it; the session stays this process's
        )


def _end(process: subprocess.Popen[Any]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parts(options: argparse.Namespace, scratch: Path) -> list[Part]:
    """The plan's parts, with the commands that the options ask for."""
    from benchmarks import gpu_report

    cores = len(os.sched_getaffinity(0))
    trial = ["--trial"] if options.dry_run else []

    def python(module: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", module, *arguments]

    def shared(module: str, *arguments: str) -> list[list[str]]:
        count = min(cores, 2) if options.dry_run else cores
        return [python(module, *arguments, *trial, "--share", f"{k}/{count}") for k in range(count)]

    def measured(name: str, cases: str, seconds: float) -> list[list[str]]:
        limits = [*trial, "--rounds", "1"] if trial else ["--budget", str(seconds - 2 * MARGIN)]
        return [python("benchmarks", "--part", cases, *limits, "--out", str(scratch / f"{name}.json"))]

    def commands(name: str, seconds: float) -> list[list[str]]:
        leaves = ["--out", str(scratch / f"{name}.jsonl")]
        match name:
            case "build":
                commit = ["--commit", options.commit] if options.commit else []
                return [python("benchmarks.ready", *trial, *commit, "--out", str(scratch / "build.json"))]
            case "warm":
                return shared("benchmarks.warm", *leaves)
            case "right" | "right-large":
                return [_pytest(name, scratch, cores, dry=options.dry_run)]
            case "timings":
                return measured(name, "nine-minutes", seconds)
            case "sweep":
                return [python("benchmarks.sweep", *trial, *leaves)]
            case "counters":
                return [
                    [*_ncu(scratch, dry=options.dry_run), *python("benchmarks.once", "--profile", *trial)]
                ]
            case "accuracy":
                chosen = ["--arms", *options.arms, "--first-seed", str(options.first_seed)]
                chosen += ["--seeds", "2"] if options.dry_run else ["--seconds", str(seconds - MARGIN)]
                return shared("benchmarks.accuracy", "--data", str(options.data), *chosen, *leaves)
            case "sanitizer":
                once = python("benchmarks.once", *trial)
                return [[*_sanitizer(tool, dry=options.dry_run), *once] for tool in ("memcheck", "racecheck")]
            case _:
                return measured(name, "largest", seconds)

    return [
        Part(
            name,
            functools.partial(commands, name),
            limits,
            _environment(name),
            _missing(name, options),
            functools.partial(gpu_report.result, name, scratch),
            functools.partial(gpu_report.lines, name),
        )
        for name, limits in PLAN.items()
        if options.only is None or name in ("build", *options.only)
    ]


def _pytest(name: str, scratch: Path, cores: int, *, dry: bool) -> list[str]:
    """Tests of the GPU, in many processes where pytest-xdist is there: most of their time is compilation."""
    chosen = LARGE_TESTS if name == "right-large" else f"not ({LARGE_TESTS})"
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-p", "gpu.outcomes", "--outcomes", str(scratch / f"{name}.jsonl")]
    workers = min(cores, 2) if name == "right-large" or dry else cores  # large tests need much memory
    if importlib.util.find_spec("xdist") is not None and not (name == "right-large" and dry):
        command += ["-p", "xdist.plugin", "-n", str(workers), "--dist", "worksteal"]
    if dry:
        command += ["--device", "cpu"]
        chosen = f"({chosen}) and ({DRY_TESTS})"
    return [*command, "-k", chosen]


def _ncu(scratch: Path, *, dry: bool) -> list[str]:
    if dry:
        return []
    sections = [argument for section in _NCU_SECTIONS for argument in ("--section", section)]
    command = [str(_find_tool("ncu")), "--clock-control", "none", "--profile-from-start", "off", *sections]
    command += ["--kernel-name", "regex:pdcr_.wd.*", "--csv", "--page", "details"]
    return [*command, "--log-file", str(scratch / "counters.csv")]


def _sanitizer(tool: str, *, dry: bool) -> list[str]:
    return [] if dry else [str(_find_tool("compute-sanitizer")), "--tool", tool, "--error-exitcode", "9"]


def _environment(name: str) -> dict[str, str]:
    match name:
        case "warm" | "accuracy":  # many processes share the cores
            return {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        case "right" | "right-large":
            plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # some take seconds to import, in every process
            return {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), **plugins}
        case "sanitizer":  # every tensor then ends where its allocation does
            return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        case _:
            return {}


def _missing(name: str, options: argparse.Namespace) -> str | None:
    if name in ("right", "right-large") and importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    if name == "accuracy" and options.data is None:
        return "no --data"
    tool = {"counters": "ncu", "sanitizer": "compute-sanitizer"}.get(name)
    if tool is not None and not options.dry_run and _find_tool(tool) is None:
        return f"{tool} was not found"
    return None


def _find_tool(name: str) -> str | None:
    if found := shutil.which(name):
        return found
    home = os.environ.get("CUDA_HOME")
    for folder in (*([f"{home}/bin", f"{home}/compute-sanitizer"] if home else []), *_TOOL_FOLDERS):
        for candidate in (Path(folder) / name, *sorted(Path(folder).glob(f"*/{name}"), reverse=True)):
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return str(candidate)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    started = clock()
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.accuracy import ARMS, DEFAULT_ARMS

    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing goes on")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check"), help="folder for record and archive"
    )
    parser.add_argument("--commit", help="of the sources, where git cannot tell it")
    parser.add_argument("--data", type=Path, help="images to train on, as benchmarks/accuracy.py packs them")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=DEFAULT_ARMS, help="what is trained")
    parser.add_argument("--first-seed", type=int, default=100, help="of the training runs")
    parser.add_argument("--only", nargs="+", choices=PLAN, metavar="PART", help=", ".join(PLAN))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to try the commands")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.dry_run:
        print("gpu-check: torch finds no CUDA device; --dry-run tries the commands on the CPU")
        return NO_DEVICE
    if options.data is not None:
        options.data = options.data.resolve()
    elif options.dry_run:
        options.data = ROOT / "contrastseg_fast" / "data" / "chest_ct.npz"
    given = sys.argv[1:] if arguments is None else arguments
    record = {
        "command": _shown(["python", "scripts/gpu_check.py", *given]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dry_run": options.dry_run,
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        keeper = Keeper(options.out.resolve(), Path(scratch), record)
        return run(parts(options, Path(scratch)), keeper, started + 60 * options.minutes)


if __name__ == "__main__":
    raise SystemExit(main())
