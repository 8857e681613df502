"""Figs. 6 and 7 from finished runs: uncertainty maps, embeddings, and affinities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from contrastseg_fast.experiments import figures, runs
from contrastseg_fast.experiments.evaluation import Hidden, Outcome
from contrastseg_fast.experiments.study import Job

SHOWN_CASES = 6
TSNE_POINTS = 1200
DRAWN_STRIDE = 4  # or the first layer, where none has it


def draw(jobs: Sequence[Job], out: Path) -> None:
    """Draw what the networks of the first seed make of test cases, into `out`."""
    seed = jobs[0].config.seed
    outcomes: dict[str, Outcome] = {}
    hidden: dict[str, Hidden] = {}
    for job in jobs:
        if job.config.seed == seed:
            experiment = runs.load_best(job.config, out / "runs" / job.folder)
            images, labels, outcome = experiment.examine(experiment.test_cases, SHOWN_CASES)
            layer = _drawn_layer(experiment)
            hidden[job.variant.name] = outcome.hidden[layer]
            outcomes[job.variant.name] = outcome
    images = images.mean(1)  # grey
    class_names = experiment.dataset.class_names
    if labels.ndim == 4:
        depths = (labels > 0).sum((1, 2)).argmax(-1) / labels.shape[-1]
        images, labels = _sections(images, depths), _sections(labels, depths)
        outcomes = {name: _outcome_sections(outcome, depths) for name, outcome in outcomes.items()}
    titles = [f"case {number + 1}" for number in range(len(images))]
    figures.slices(images.numpy(), labels.numpy(), titles, class_names, outcomes, out / "slices.png")
    figures.affinity(hidden, 0, class_names, out / "affinity.png")
    figures.tsne(hidden, class_names, TSNE_POINTS, seed, out / "tsne.png")


def _drawn_layer(experiment: runs.Experiment) -> str:
    boxes = experiment.boxes
    at_stride = [name for name, box in boxes.items() if max(box.stride) == DRAWN_STRIDE]
    return str([*at_stride, *boxes][0])


def _outcome_sections(outcome: Outcome, depths: Tensor) -> Outcome:
    uncertainty = None if outcome.uncertainty is None else _sections(outcome.uncertainty, depths)
    return replace(outcome, predictions=_sections(outcome.predictions, depths), uncertainty=uncertainty)


def _sections(volumes: Tensor, depths: Tensor) -> Tensor:
    """Of each volume `(B, H, W, D)` the section at a depth from 0 to 1, that with the most foreground."""
    positions = (depths * volumes.shape[-1]).long()
    return torch.stack([volume[..., k] for volume, k in zip(volumes, positions.tolist(), strict=True)])
