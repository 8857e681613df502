"""Pictures of time and memory over N, drawn from records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import pdcr
from benchmarks.record import Record

SHOWN = (
    *("ours", "torch.compile", "reference", "chunked", "KeOps", "released", "three products"),
    pdcr.COMPILED_16_BIT,
)
TIME, MEMORY = "seconds, forward + backward", "extra bytes at the peak"
Point = Callable[[dict[str, Any]], float | None]


def draw(records: list[Record], folder: Path) -> list[Path]:
    """Write `pdcr_time.png` and `pdcr_memory.png` of the random cases with 256 channels: fp32 on the CPU.

    Records of a GPU give `pdcr_gpu_time.png` and `pdcr_gpu_memory.png`, of the bf16 ones. A picture without
    a point is not drawn.
    """
    written = []
    for device, dtype, prefix in (("cpu", "fp32", "pdcr"), ("cuda", "bf16", "pdcr_gpu")):
        size = asdict(pdcr.Size(0, dtype=dtype))
        like = {name: value for name, value in size.items() if name != "count"}
        cases = {
            case["size"]["count"]: case
            for record in records
            for case in record["cases"]
            if case["operation"] == pdcr.OPERATION.name
            and case["device"] == device
            and like.items() <= case["size"].items()
        }
        if not cases:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        time = _picture(cases, lambda entry: entry.get("quantiles", {}).get("50"), dtype, TIME)
        memory = _picture(cases, lambda entry: entry.get("peak_bytes"), dtype, MEMORY)
        for figure, name in ((time, f"{prefix}_time.png"), (memory, f"{prefix}_memory.png")):
            if figure is not None:
                figure.savefig(folder / name, dpi=150, bbox_inches="tight")
                written.append(folder / name)
    if not written:
        raise SystemExit("the records hold no pdcr_loss case to draw")
    return written


def _picture(cases: dict[int, dict[str, Any]], value: Point, dtype: str, label: str) -> Any | None:
    """A figure, or None where no case has that value."""
    if all(value(entry) is None for case in cases.values() for entry in case["implementations"].values()):
        return None
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
    axes.set_xlabel(f"vectors N (C = 256, {dtype}, random ratios)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
