"""The main job: train a U-Net on a chest CT with and without PDCR and UAFS, and show what they do and cost.

python -m contrastseg_fast.experiments.demo [--quick] [--seed 0] [--steps 600] [--data FILE] [--out runs/demo]
"""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from contrastseg_fast.experiments import figures, report
from contrastseg_fast.experiments.compare import SIZES, compare
from contrastseg_fast.experiments.data import (
    BUNDLED,
    Volume,
    as_input,
    augmented_batches,
    load_volume,
    split_slices,
    to_input,
)
from contrastseg_fast.experiments.evaluation import Outcome, embedding_statistics, examine, predict, scores
from contrastseg_fast.experiments.provenance import machine
from contrastseg_fast.experiments.tables import ONE_PATIENT, tables
from contrastseg_fast.experiments.training import (
    CLASS_DISTANCE,
    LAYERS,
    RUNS,
    Run,
    Trainer,
    boxes,
    demo_trainer,
    step_seconds,
)

REFERENCE_ROUNDS = 2  # of its slow step
INTERRUPTED = 130  # the exit status of a program ended by Ctrl-C
DRAWN_LAYER = next(name for name, stride in LAYERS.items() if stride == 4)


@dataclass(frozen=True)
class Settings:
    """How much the demo does."""

    out: Path = Path("runs/demo")
    data: Path = BUNDLED
    seed: int = 0
    steps: int = 600
    batch_size: int = 4
    sizes: Sequence[int] = SIZES
    timing_rounds: int = 15
    tsne_points: int = 1200


QUICK = Settings(steps=40, sizes=(128, 512, 2048), timing_rounds=3, tsne_points=400)


Tick = Callable[[], object]


class Stage(NamedTuple):
    """A part of the demo, its cost in training steps; `run` calls what it gets after each unit."""

    title: str
    cost: float
    units: int
    run: Callable[[Tick], None]


class Demo:
    """The stages in their order, and what they have found so far."""

    def __init__(self, settings: Settings, volume: Volume) -> None:
        self.settings = settings
        self.began = time.perf_counter()
        self.volume = volume
        self.split = split_slices(len(volume.image))
        held_out = list(self.split.test)
        self.inputs = to_input(self.volume.image[held_out])
        self.labels = torch.from_numpy(self.volume.labels[held_out])
        self.outcomes: dict[str, Outcome] = {}
        self.results: dict[str, Any] = {
            "finished": False,
            "settings": {
                "command": shlex.join(["python", "-m", "contrastseg_fast.experiments.demo", *sys.argv[1:]]),
                "seed": settings.seed,
                "steps": settings.steps,
                "batch_size": settings.batch_size,
                "class_names": list(self.volume.class_names),
                "train_slices": len(self.split.train),
                "test_slices": len(held_out),
                "first_test_slice": held_out[0],
                "last_test_slice": held_out[-1],
                "gap": self.split.gap,
            },
            "machine": machine(),
            "runs": {},
            "step_seconds": {},
            "comparison": [],
            "seconds": 0.0,
        }

    def stages(self) -> list[Stage]:
        steps = self.settings.steps
        timed = len(RUNS) * (self.settings.timing_rounds + 1) + REFERENCE_ROUNDS + 1
        return [
            *(Stage(f"training: {run.name}", steps, steps, partial(self.train, run)) for run in RUNS),
            Stage("drawing", 100, 2, self.draw),
            Stage("timing a step", timed + 20 * REFERENCE_ROUNDS, timed, self.time_steps),
            *(
                Stage(f"comparing: N = {n}", 30 + n**2 / 5e5, 1, partial(self.compare, n))
                for n in self.settings.sizes
            ),
        ]

    def train(self, run: Run, tick: Tick) -> None:
        steps, seed = self.settings.steps, self.settings.seed
        trainer = demo_trainer(run, self.volume, steps, seed)
        curves: dict[str, list[Any]] = {"segmentation": [], "dice": []}
        found: dict[str, Any] = {"curves": curves}
        self.results["runs"][run.name] = found
        batches = augmented_batches(self.volume, self.split.train, steps, self.settings.batch_size, seed)
        for step, batch in enumerate(batches, start=1):
            for name, value in trainer.step(*as_input(*batch)).items():
                curves.setdefault(name, []).append(value)
            if step % max(1, steps // 10) == 0:
                curves["dice"].append([step, self.scores(predict(trainer.model, self.inputs))["dice"]])
            tick()
        outcome = examine(
            trainer.model,
            self.inputs,
            self.labels,
            self.volume.num_classes,
            boxes(trainer.model, self.inputs),
        )
        self.outcomes[run.name] = outcome
        found["scores"] = self.scores(outcome.predictions)
        statistics = embedding_statistics(outcome.hidden, class_distance=CLASS_DISTANCE)
        found["embeddings"] = {f"stride {LAYERS[layer]}": values for layer, values in statistics.items()}

    def scores(self, predictions: torch.Tensor) -> dict[str, Any]:
        return scores(predictions, self.labels, self.volume.class_names)

    def time_steps(self, tick: Tick) -> None:
        settings = self.settings
        drawn = augmented_batches(self.volume, self.split.train, 1, settings.batch_size, settings.seed)
        batch = as_input(*next(drawn))

        def trainer(run: Run, backend: str) -> Trainer:
            return demo_trainer(run, self.volume, settings.steps, settings.seed, backend)

        fast = {run.name: trainer(run, "auto") for run in RUNS}
        slow = {f"{run.name}, reference": trainer(run, "reference") for run in RUNS[-1:]}
        seconds = step_seconds(fast, batch, settings.timing_rounds, tick)
        self.results["step_seconds"] = seconds | step_seconds(slow, batch, REFERENCE_ROUNDS, tick)

    def compare(self, num_vectors: int, tick: Tick) -> None:
        self.results["comparison"].append(compare(self.settings.data, num_vectors, self.settings.seed))
        tick()

    def draw(self, tick: Tick) -> None:
        out, names = self.settings.out, self.volume.class_names
        layers = {name: self.outcomes[name].hidden[DRAWN_LAYER] for name in ("baseline", "+ PDCR")}
        held_out = list(self.split.test)
        images, labels = self.volume.image[held_out], self.volume.labels[held_out]
        titles = [f"slice {number}" for number in held_out]
        figures.slices(images, labels, titles, names, self.outcomes, out / "slices.png")
        figures.affinity(layers, len(self.split.test) // 2, names, out / "affinity.png")
        tick()
        figures.tsne(layers, names, self.settings.tsne_points, self.settings.seed, out / "tsne.png")
        tick()

    def save(self) -> None:
        """Write the record, the page, and the pictures that grow with every stage."""
        out = self.settings.out
        if self.results["runs"]:
            figures.learning_curves(self.results["runs"], out / "learning_curves.png")
        if self.results["comparison"]:
            figures.time_and_memory(self.results["comparison"], out / "time_and_memory.png")
        self.results["seconds"] = time.perf_counter() - self.began
        report.write(self.results, out)


def run_demo(settings: Settings, volume: Volume) -> int:
    """Run all stages into the folder `settings.out`, keep what is done at Ctrl-C; returns the exit status."""
    torch.use_deterministic_algorithms(True)
    for name in report.PICTURES:  # of an earlier run
        (settings.out / name).unlink(missing_ok=True)
    demo = Demo(settings, volume)
    stages = demo.stages()
    total = sum(stage.cost for stage in stages)
    layout = "{desc:<24} {percentage:3.0f}% |{bar}| {elapsed} passed, {remaining} left"
    with tqdm(total=total, bar_format=layout, leave=False, smoothing=0.05) as bar:
        try:
            for stage in stages:
                bar.set_description_str(stage.title)
                stage.run(partial(bar.update, stage.cost / stage.units))
                demo.save()
            demo.results["finished"] = True
        except KeyboardInterrupt:
            pass
    demo.save()
    for table in tables(demo.results).values():
        print(table.text())
    print(textwrap.fill(ONE_PATIENT, 100))
    print(f"Pictures and tables: {settings.out / 'index.html'}")
    if demo.results["finished"]:
        return 0
    print("Interrupted: only what was done until then is there.", file=sys.stderr)
    return INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a short run: fewer steps and sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, help=f"training steps (default {Settings.steps}, quick {QUICK.steps})"
    )
    parser.add_argument("--data", type=Path, default=BUNDLED, help="another .npz with image and labels")
    parser.add_argument(
        "--out", type=Path, default=Settings.out, help="folder for results (default %(default)s)"
    )
    args = parser.parse_args(arguments)
    settings = replace(QUICK if args.quick else Settings(), out=args.out, data=args.data, seed=args.seed)
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed: expected a number from 0 to 2**32 - 1, got {args.seed}")
    if args.steps is not None:
        if args.steps < 1:
            parser.error(f"--steps: expected at least 1, got {args.steps}")
        settings = replace(settings, steps=args.steps)
    try:
        volume = load_volume(settings.data)
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return run_demo(settings, volume)


if __name__ == "__main__":
    sys.exit(main())
