"""The paper's studies: what they compare, over several seeds, and the differences to the baseline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from contrastseg_fast.experiments import provenance, runs
from contrastseg_fast.experiments.config import Config
from contrastseg_fast.experiments.files import replace_text
from contrastseg_fast.experiments.paired import paired_difference

SCORES = ("dice", "jaccard", "accuracy")
NO_PDCR = {"pdcr.weight": 0.0}
NO_GATE = {"gate.kind": "none"}


@dataclass(frozen=True)
class Variant:
    """One row of a study: its name, what it is compared with (the first of its group), and its settings."""

    group: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.name


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    variant: Variant
    config: Config

    @property
    def folder(self) -> str:
        """A name for its results, which other settings never have."""
        words = re.sub(r"[^a-z0-9.]+", "-", f"{self.variant.group} {self.variant.name}".lower()).strip("-")
        return f"{words}-seed{self.config.seed}-{self.config.digest()}"


def jobs(config: Config, variants: Sequence[Variant], seeds: Sequence[int]) -> list[Job]:
    """All runs of a study; seed by seed, so that what is done early can be compared."""
    return [
        Job(variant, config.changed({**variant.changes, "seed": seed}))
        for seed in seeds
        for variant in variants
    ]


def pdcr_variants(
    group: str, weights: Sequence[float], variants: Sequence[str], distances: Sequence[str]
) -> list[Variant]:
    """PDCR in each form, with each class distance and weight."""
    return [
        Variant(
            group,
            f"PDCR ({form}, {distance}, {weight:g})",
            {
                **NO_GATE,
                "pdcr.weight": weight,
                "pdcr.variant": form,
                "pdcr.class_distance": distance,
                "pdcr.affinity": "ratio",
            },
        )
        for form in variants
        for distance in distances
        for weight in weights
    ]


def table3(
    networks: Sequence[str],
    weights: Sequence[float],
    forms: Sequence[str],
    distances: Sequence[str],
    affinities: Sequence[str] = (),
    comparators: Sequence[str] = (),
) -> list[Variant]:
    """Table 3: each network alone, with PDCR, with UAFS, and with both; and the comparators, if asked for.

    "Both" and other affinities have the first of the weights, forms and distances.
    """
    found = []
    for network in networks:
        of_network = {"network.name": network}
        alone = {**NO_PDCR, **NO_GATE}
        regularized = pdcr_variants(network, weights, forms, distances)
        first = regularized[0].changes
        rows = [Variant(network, "baseline", alone), *regularized]
        rows += [
            Variant(
                network, f"PDCR ({affinity} affinity, {weights[0]:g})", {**first, "pdcr.affinity": affinity}
            )
            for affinity in affinities
        ]
        rows += [
            Variant(network, kind.upper(), {**alone, "gate.kind": kind}) for kind in ("uafs", *comparators)
        ]
        rows.append(Variant(network, "PDCR + UAFS", {**first, "gate.kind": "uafs"}))
        found += [Variant(row.group, row.name, {**row.changes, **of_network}) for row in rows]
    return found


def sites(config: Config, encoder: Sequence[str], decoder: Sequence[str], weight: float) -> list[Variant]:
    """Figs. 4 and 5: PDCR, and UAFS, at each stage alone, at all of the encoder, and at all of both."""
    group = config.network.name
    alone = {**NO_PDCR, **NO_GATE}
    places: dict[str, list[str]] = {layer: [layer] for layer in (*encoder, *decoder)}
    places["encoder"] = list(encoder)
    if decoder:
        places["encoder and decoder"] = [*encoder, *decoder]
    found = [Variant(group, "baseline", alone)]
    for place, layers in places.items():
        changes = {**alone, "pdcr.weight": weight, "pdcr.layers": layers, "pdcr.patch_size": None}
        found.append(Variant(group, f"PDCR at {place}", changes))
    for place, layers in places.items():
        changes = {**alone, "gate.kind": "uafs", "gate.layers": layers}
        found.append(Variant(group, f"UAFS at {place}", changes))
    return found


def limited_data(fractions: Sequence[float], weight: float) -> list[Variant]:
    """Fig. 3: what PDCR and UAFS add where only a part of the training cases is there."""
    return [
        Variant(f"{100 * fraction:g} % of the training cases", name, {**changes, "data.fraction": fraction})
        for fraction in fractions
        for name, changes in _four(weight).items()
    ]


def figures(config: Config, weight: float) -> list[Variant]:
    """The four networks that Figs. 6 and 7 look into."""
    return [Variant(config.network.name, name, changes) for name, changes in _four(weight).items()]


def _four(weight: float) -> dict[str, dict[str, Any]]:
    return {
        "baseline": {**NO_PDCR, **NO_GATE},
        "PDCR": {"pdcr.weight": weight, **NO_GATE},
        "UAFS": {**NO_PDCR, "gate.kind": "uafs"},
        "PDCR + UAFS": {"pdcr.weight": weight, "gate.kind": "uafs"},
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Number, mean and standard deviation; the last is None for a single value.

    >>> spread([1.0, 3.0])
    {'n': 2, 'mean': 2.0, 'sd': 1.4142135623730951}
    """
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"n": len(values), "mean": float(np.mean(values)), "sd": deviation}


def summarise(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every variant: scores over seeds, and differences to the first variant of its group.

    Only seeds that the variant and its baseline both have enter a difference.
    """
    by_variant: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for one in found:
        by_variant.setdefault((one["group"], one["name"]), {})[one["seed"]] = one
    baselines: dict[str, tuple[str, str]] = {}
    rows = []
    for key, of_seed in by_variant.items():
        reference = by_variant[baselines.setdefault(key[0], key)]
        common = [seed for seed in of_seed if seed in reference]
        row: dict[str, Any] = {"group": key[0], "name": key[1], "seeds": list(of_seed)}
        for score in SCORES:
            row[score] = spread([one["scores"][score] for one in of_seed.values()])
        if reference is not of_seed and common:
            row["dice_difference"] = paired_difference(
                [of_seed[seed]["scores"]["dice"] for seed in common],
                [reference[seed]["scores"]["dice"] for seed in common],
            )
        layers = next(iter(of_seed.values()))["embeddings"]
        row["embeddings"] = {
            layer: {
                name: spread([one["embeddings"][layer][name] for one in of_seed.values()])
                for name in ("mean_cosine", "repelled_fraction")
            }
            for layer in layers
        }
        rows.append(row)
    return rows


def _check(job: Job) -> None:
    """Build what the job needs, so that what does not fit shows now and not after hours."""
    try:
        runs.Experiment(job.config)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{job.variant.group}, {job.variant.name}: {error}") from error


def conduct(
    name: str,
    config: Config,
    planned: Sequence[Job],
    out: Path,
    command: str,
    started: Callable[[int, Job], object],
    published: Mapping[str, Mapping[str, float]],
    quiet: bool = False,
) -> dict[str, Any]:
    """Make every run that is not finished yet, and write `results.json` after each.

    Args:
        started: told the number and the job before each run.
        published: the paper's Dice in %, by group and variant, as far as it is given.

    Returns:
        the content of `results.json`.

    Raises:
        ValueError: the settings of a variant do not fit; told before the first run.
    """
    for job in planned:
        if (
            job.config.seed == planned[0].config.seed
            and not (out / "runs" / job.folder / runs.RESULT).exists()
        ):
            _check(job)
    done: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    for number, job in enumerate(planned, start=1):
        started(number, job)
        found = runs.run(job.config, out / "runs" / job.folder, quiet=quiet)
        done.append(
            {
                "group": job.variant.group,
                "name": job.variant.name,
                "seed": job.config.seed,
                "folder": job.folder,
                **{key: value for key, value in found.items() if key != "settings"},
            }
        )
        record = {
            "study": name,
            "finished": number == len(planned),
            "command": command,
            "commit": provenance.commit(),
            "machine": provenance.machine(),
            "settings": config.record(),
            "variants": {
                f"{other.variant.group}: {other.variant.name}": dict(other.variant.changes)
                for other in planned
            },
            "published": published,
            "runs": done,
            "summary": summarise(done),
        }
        replace_text(out / "results.json", json.dumps(record, indent=2) + "\n")
    return record
