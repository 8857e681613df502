"""Pictures of time and memory over N, drawn from records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import pdcr
from benchmarks.record import Record

SHOWN = ("ours", "torch.compile", "reference", "chunked", "KeOps", "released", "three products")
Point = Callable[[dict[str, Any]], float | None]


def draw(records: list[Record], folder: Path) -> list[Path]:
    """Write `pdcr_time.png` and `pdcr_memory.png` of the random fp32 cases with 256 channels."""
    like = {name: value for name, value in asdict(pdcr.Size(0)).items() if name != "count"}
    cases = {
        case["size"]["count"]: case
        for record in records
        for case in record["cases"]
        if case["operation"] == "pdcr_loss" and like.items() <= case["size"].items()
    }
    if not cases:
        raise SystemExit("the records hold no pdcr_loss case to draw")
    folder.mkdir(parents=True, exist_ok=True)
    time = _picture(cases, lambda entry: entry.get("quantiles", {}).get("50"), "seconds, forward + backward")
    memory = _picture(cases, lambda entry: entry.get("peak_bytes"), "extra bytes at the peak")
    written = []
    for figure, name in ((time, "pdcr_time.png"), (memory, "pdcr_memory.png")):
        figure.savefig(folder / name, dpi=150, bbox_inches="tight")
        written.append(folder / name)
    return written


def _picture(cases: dict[int, dict[str, Any]], value: Point, label: str) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4))
    for color, name in enumerate(SHOWN):
        found = ((count, value(cases[count]["implementations"].get(name, {}))) for count in sorted(cases))
        points = [(count, height) for count, height in found if height is not None]
        if points:
            style = "--" if name == "three products" else "-"
            width = 2.5 if name == "ours" else 1.2
            (line,) = axes.plot(*zip(*points, strict=True), style, color=f"C{color}", linewidth=width)
            line.set(marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(cases), [str(count) for count in sorted(cases)], rotation=45)
    axes.set_xlabel("vectors N (C = 256, fp32, random ratios)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
