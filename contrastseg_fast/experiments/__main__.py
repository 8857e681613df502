"""The paper's experiments on your data.

contrastseg-fast train hippocampus --data Task04_Hippocampus --set pdcr.weight=0.1
contrastseg-fast table3 hippocampus --data Task04_Hippocampus --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from contrastseg_fast import functional
from contrastseg_fast.experiments import drawing, report, study
from contrastseg_fast.experiments.config import CONFIGS, Config, load_config, load_published
from contrastseg_fast.experiments.networks import build
from contrastseg_fast.experiments.runs import processes, run
from contrastseg_fast.experiments.tables import study_tables

INTERRUPTED = 130  # the exit status of a program ended by Ctrl-C
PATHS = ("--data", "--out", "--paper-values")
PATH_KEYS = r"data\.(?:folder|options\.isic2016)"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    main_parser = argparse.ArgumentParser(
        prog="contrastseg-fast", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("config", help=f"a YAML file, or one of: {known}")
        added.add_argument("--data", help="the dataset's folder; the same as --set data.folder=FOLDER")
        added.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
        added.add_argument("--out", type=Path, help="folder for results (default runs/COMMAND)")
        added.add_argument("--threads", type=int, help="of the CPU (default: torch's own)")
        added.add_argument("--quiet", action="store_true", help="no progress bars")
        return added

    def study_command(name: str, text: str, seeds: Sequence[int] = (0, 1, 2)) -> argparse.ArgumentParser:
        added = command(name, text)
        added.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
        added.add_argument("--weight", type=float, default=0.01, help="of PDCR (default %(default)s)")
        added.add_argument(
            "--paper-values", type=Path, help="YAML: the paper's Dice in %% by group and variant"
        )
        added.add_argument("--dry-run", action="store_true", help="list the runs, and which are done")
        return added

    command("train", "Train one network, and score it on the test cases.")
    table3 = study_command("table3", "Networks alone, with PDCR, with UAFS, and with both (Table 3).")
    table3.add_argument("--networks", nargs="+", help="default: the config's")
    table3.add_argument("--weights", type=float, nargs="+", help="several weights of PDCR, in place of one")
    table3.add_argument("--variants", nargs="+", default=["paper"], choices=functional.VARIANTS)
    table3.add_argument(
        "--distances", nargs="+", choices=functional.CLASS_DISTANCES, help="default: config's"
    )
    table3.add_argument("--affinities", nargs="+", default=[], choices=functional.AFFINITIES[1:])
    table3.add_argument("--comparators", nargs="+", default=[], choices=("se", "cbam"))
    study_command("sites", "PDCR and UAFS at each stage of the network (Figs. 4 and 5).")
    limited = study_command("limited-data", "Parts of the training cases (Fig. 3).")
    limited.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0])
    study_command("figures", "Uncertainty maps, embeddings and affinities (Figs. 6 and 7).", seeds=(0,))
    shown = commands.add_parser("report", help="Tables and a page from a study's results.json.")
    shown.add_argument("results", type=Path, help="the file, wherever it was made")
    shown.add_argument("--out", type=Path, help="folder for index.html (default runs/report)")
    return main_parser


def variants(args: argparse.Namespace, config: Config) -> list[study.Variant]:
    """What the study of this command compares."""
    match args.command:
        case "table3":
            return study.table3(
                args.networks or [config.network.name],
                args.weights or [args.weight],
                args.variants,
                args.distances or [config.pdcr.class_distance],
                args.affinities,
                args.comparators,
            )
        case "sites":
            dims = len(config.data.input_shape)
            _, stages = build(config.network, dims, in_channels=1, num_classes=2)
            return study.sites(config, stages.encoder, stages.decoder, args.weight)
        case "limited-data":
            return study.limited_data(args.fractions, args.weight)
        case _:
            return study.figures(config, args.weight)


def train(args: argparse.Namespace, config: Config) -> None:
    """One run, with as many processes as torchrun started."""
    with processes() as team:
        found = run(config, args.out, team, args.quiet)
        if team.first:
            scores = ", ".join(f"{name} {found['scores'][name]:.4f}" for name in study.SCORES)
            print(f"{found['test_cases']} test cases: {scores}. More: {args.out / 'result.json'}")


def conduct(args: argparse.Namespace, config: Config) -> None:
    """All runs of a study, its tables and its page."""
    planned = study.jobs(config, variants(args, config), args.seeds)
    if "LOCAL_RANK" in os.environ:
        raise ValueError(f"{args.command}: expected one process, got torchrun, which is for train")
    if args.dry_run:
        for job in planned:
            done = "done" if (args.out / "runs" / job.folder / "result.json").exists() else "to do"
            print(f"{done:<6} {job.folder}")
        return

    def started(number: int, job: study.Job) -> None:
        print(f"{number}/{len(planned)} {job.folder}", flush=True)

    published = load_published(args.paper_values) if args.paper_values else {}
    line = command_line(args.words)
    record = study.conduct(args.command, config, planned, args.out, line, started, published, args.quiet)
    if args.command == "figures":
        drawing.draw(planned, args.out)
    show(record, args.out)


def show(record: dict[str, Any], out: Path) -> None:
    """Print the tables of a study, and write its page."""
    out.mkdir(parents=True, exist_ok=True)
    report.write_study(record, out)
    for table in study_tables(record):
        print(table.text())
    print(f"Tables and pictures: {out / 'index.html'}")


def command_line(given: Sequence[str]) -> str:
    """The command as it can be given again, with names of folders left out."""
    words = ["contrastseg-fast", *given]
    for position, word in enumerate(words):
        before = given[position - 2] if position > 1 else ""
        if before in PATHS:
            words[position] = before.removeprefix("--").upper()
        else:
            words[position] = re.sub(rf"^({'|'.join(PATHS)}|.*{PATH_KEYS})=.*", r"\1=...", word)
    return shlex.join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    line = parser()
    args = line.parse_args(words)
    args.words = words
    args.out = args.out or Path("runs") / args.command
    try:
        if args.command == "report":
            show(json.loads(args.results.read_text(encoding="utf-8")), args.out)
            return 0
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        changes = [*args.set, *([] if args.data is None else [f"data.folder={args.data}"])]
        config = load_config(args.config, changes)
        if args.command == "train":
            train(args, config)
        else:
            conduct(args, config)
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from the last epoch.", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, TypeError, ImportError) as error:
        line.exit(2, f"{line.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
