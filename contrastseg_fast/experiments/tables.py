"""Results as tables, for the terminal and for the page: the demo's, and a study's."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

ONE_PATIENT = (
    "One patient, one seed: training and held-out slices are of the same body, so these numbers prove "
    "nothing about accuracy. They show that the modules train, and what they do to the hidden vectors."
)


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, with what has to be said about them."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str

    def text(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])
            for first, *rest in lines
        ]
        return "\n".join(
            [self.title, textwrap.indent("\n".join([*shown, *textwrap.wrap(self.note, 100)]), "  "), ""]
        )

    def html(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.rows)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return (
            f"<h2>{escape(self.title)}</h2>"
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            f'<p class="small">{escape(self.note)}</p>'
        )


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """A table for every part of the results that is there."""
    found = {}
    scored = {name: run for name, run in results["runs"].items() if "scores" in run}
    if scored:
        found["scores"] = _scores(scored, results["settings"]["steps"])
        found["classes"] = _classes(scored)
    if results["step_seconds"]:
        found["steps"] = _steps(results["step_seconds"], results["settings"]["batch_size"])
    if results["comparison"]:
        found["comparison"] = _comparison(results["comparison"])
    return found


def study_tables(record: dict[str, Any]) -> list[Table]:
    """The scores of a study's variants, and what became of the hidden vectors."""
    summary = record["summary"]
    scored, hidden = [], []
    for row in summary:
        name = [row["group"], row["name"]]
        dice, jaccard, accuracy = (_spread(row[score]) for score in ("dice", "jaccard", "accuracy"))
        difference = row.get("dice_difference")
        scored.append([*name, str(row["dice"]["n"]), dice, _difference(difference), jaccard, accuracy])
        for layer, found in row["embeddings"].items():
            hidden.append(
                [
                    *name,
                    layer,
                    _spread(found["mean_cosine"], scale=1, form="{:.3f}"),
                    _spread(found["repelled_fraction"]),
                ]
            )
    header = ["group", "variant", "n", "Dice", "Dice - baseline [95 %]", "Jaccard", "accuracy"]
    if published := record.get("published"):
        header.append("the paper's Dice")
        for line, row in zip(scored, summary, strict=True):
            line.append(_number(published.get(row["group"], {}).get(row["name"]), "{:.2f}"))
    return [
        Table(
            f"{record['study']}: scores of the test cases, %",
            header,
            scored,
            "Mean and standard deviation over n seeds; Dice and Jaccard are means over the cases and all "
            "classes but background. The difference is to the group's first row, pairwise by seed, with the "
            "t interval over the seeds: where it holds 0, the seeds do not tell the two apart.",
        ),
        Table(
            f"{record['study']}: hidden vectors of the test cases",
            ["group", "variant", "layer", "mean cosine", "repelled pairs, %"],
            hidden,
            "Of two vectors of one image. Pairs are repelled by the loss of the variant; for those without "
            "PDCR by that of the settings. Behind UAFS receptive fields are larger, and so are their boxes.",
        ),
    ]


def _spread(found: dict[str, Any], scale: float = 100, form: str = "{:.2f}") -> str:
    mean = form.format(scale * found["mean"])
    return mean if found["sd"] is None else f"{mean} ± {form.format(scale * found['sd'])}"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    mean = f"{100 * found['mean']:+.2f}"
    return mean if found["low"] is None else f"{mean} [{100 * found['low']:+.2f}, {100 * found['high']:+.2f}]"


def _scores(runs: dict[str, Any], steps: int) -> Table:
    strides = list(next(iter(runs.values()))["embeddings"])
    rows = []
    for name, run in runs.items():
        numbers = [f"{run['scores'][key]:.3f}" for key in ("dice", "jaccard", "accuracy")]
        layers = run["embeddings"].values()
        cosines = " / ".join(f"{layer['mean_cosine']:.2f}" for layer in layers)
        repelled = " / ".join(f"{100 * layer['repelled_fraction']:.0f}" for layer in layers)
        rows.append([name, *numbers, cosines, repelled])
    return Table(
        f"Held-out slices after {steps} steps",
        ["run", "Dice", "Jaccard", "accuracy", "mean cosine", "repelled pairs, %"],
        rows,
        "Dice and Jaccard: mean over all classes but background. Mean cosine, and pairs that PDCR repels: of "
        f"hidden vectors at {', '.join(strides)}.",
    )


def _classes(runs: dict[str, Any]) -> Table:
    dice = {name: run["scores"]["dice_of_class"] for name, run in runs.items()}
    classes = list(next(iter(dice.values())))
    rows = [[name, *(_number(of_class[c], "{:.3f}") for c in classes)] for name, of_class in dice.items()]
    absent = any(value is None for of_class in dice.values() for value in of_class.values())
    note = "A dash: no held-out slice has the class." if absent else ""
    return Table("Dice of each class", ["run", *classes], rows, note)


def _steps(seconds: dict[str, float], batch_size: int) -> Table:
    baseline = seconds["baseline"]
    rows = [
        [name, f"{1e3 * s:.1f}", f"{1e3 * (s - baseline):+.1f}", f"{100 * (s / baseline - 1):+.0f}"]
        for name, s in seconds.items()
    ]
    return Table(
        "Time of a training step",
        ["run", "ms", "added, ms", "added, %"],
        rows,
        f"Batches of {batch_size} slices. Medians; the runs take turns, one step each. Reference: the same "
        "modules in plain PyTorch, written for reading; it crops every box.",
    )


def _comparison(comparison: list[dict[str, Any]]) -> Table:
    rows = []
    for row in comparison:
        fast, reference = row["fast"], row["reference"]
        rows.append(
            [
                str(row["num_vectors"]),
                _number(fast.get("value"), "{:.5f}"),
                _number(row.get("value_difference"), "{:.0e}"),
                _number(row.get("gradient_difference"), "{:.0e}"),
                _number(fast.get("seconds"), "{:.2f}", 1e3),
                reference.get("refused") or _number(reference.get("seconds"), "{:.2f}", 1e3),
                _number(fast.get("peak_bytes"), "{:.1f}", 1e-6),
                _number(reference.get("peak_bytes"), "{:.1f}", 1e-6),
            ]
        )
    return Table(
        "Fast against reference loss",
        ["N", "loss", "difference", "of gradient", "fast, ms", "reference, ms", "fast, MB", "reference, MB"],
        rows,
        "Loss and gradient of one image with 64 channels, fp32, random vectors, and the ratios of real "
        "patches. Differences are relative. Times are medians; the two take turns. Memory: how far the "
        "resident memory of a fresh process rises above its inputs.",
    )


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else form.format(scale * value)
