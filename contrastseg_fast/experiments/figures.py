"""The pictures of the experiments, each drawn from plain results and written to one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from torch.nn.functional import normalize

from contrastseg_fast.experiments.evaluation import Hidden, Outcome

RUN_COLOURS = ("#555555", "#0077bb", "#ee7733", "#009988")
CLASS_COLOURS = ("#bbbbbb", "#4477aa", "#ee6677", "#ccbb44", "#228833", "#66ccee", "#aa3377")
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 110,
}


def class_colours(num_classes: int) -> list[Any]:
    if num_classes <= len(CLASS_COLOURS):
        return list(CLASS_COLOURS[:num_classes])
    return [CLASS_COLOURS[0], *matplotlib.colormaps["turbo"](np.linspace(0, 1, num_classes - 1))]


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})


def _class_legend(figure: Figure, names: Sequence[str], colours: Sequence[Any]) -> None:
    handles = [
        Line2D([], [], linestyle="", marker="o", color=colour, label=name)
        for name, colour in zip(names, colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 8))


def learning_curves(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Training loss (mean of the last ten steps), held-out Dice, and the PDCR loss, over steps."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        loss, dice, pdcr = figure.subplots(1, 3)
        for (name, run), colour in zip(runs.items(), RUN_COLOURS, strict=False):
            curves = run["curves"]
            loss.plot(_smooth(curves["segmentation"]), color=colour, label=name)
            dice.plot(
                [step for step, _ in curves["dice"]], [d for _, d in curves["dice"]], ".-", color=colour
            )
            if "pdcr" in curves:
                pdcr.plot(_smooth(curves["pdcr"]), color=colour)
        loss.set(title="Segmentation loss, training", xlabel="step")
        dice.set(title="Dice, held-out slices", xlabel="step", ylim=(0, 1))
        pdcr.set(title="PDCR loss, training", xlabel="step")
        loss.legend()
        _save(figure, path)


def _smooth(values: list[float], width: int = 10) -> list[float]:
    return [float(np.mean(values[max(0, i - width + 1) : i + 1])) for i in range(len(values))]


def slices(
    images: np.ndarray,
    labels: np.ndarray,
    titles: Sequence[str],
    class_names: Sequence[str],
    outcomes: dict[str, Outcome],
    path: Path,
) -> None:
    """Six of the images `(B, H, W)`: each with ground truth, predictions, and the uncertainty map of UAFS.

    The predictions are those of the first run, and of the last run that has an uncertainty map.
    """
    columns = np.linspace(0, len(images) - 1, min(6, len(images))).round().astype(int)
    shown = [next(iter(outcomes))]
    gated = [name for name, outcome in outcomes.items() if outcome.uncertainty is not None]
    shown += [name for name in gated[-1:] if name not in shown]
    uncertainty = outcomes[gated[-1]].uncertainty if gated else None
    rows = ["image", "ground truth", *shown, *([f"uncertainty\n({gated[-1]})"] if gated else [])]
    colours = class_colours(len(class_names))
    palette = ListedColormap(colours)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.7 * len(columns) + 0.4, 1.7 * len(rows) + 0.4), layout="constrained")
        axes = figure.subplots(len(rows), len(columns), squeeze=False)
        for column, position in enumerate(columns):
            predictions = [outcomes[name].predictions[position].numpy() for name in shown]
            _image(axes[0, column], images[position])
            axes[0, column].set_title(titles[position], weight="normal")
            for axis, classes in zip(axes[1:, column], [labels[position], *predictions], strict=False):
                _image(axis, images[position])
                foreground = np.ma.masked_equal(classes, 0)
                axis.imshow(foreground, palette, vmin=0, vmax=len(colours) - 1, interpolation="nearest")
            if uncertainty is not None:
                least = np.floor(10 * uncertainty.min().item()) / 10
                picture = axes[-1, column].imshow(uncertainty[position].numpy(), "magma", vmin=least, vmax=1)
        if uncertainty is not None:
            figure.colorbar(picture, ax=axes[-1], shrink=0.9, pad=0.01)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, name in zip(axes[:, 0], rows, strict=True):
            axis.set_ylabel(name)
        _class_legend(figure, class_names[1:], colours[1:])
        _save(figure, path)


def _image(axis: Axes, image: np.ndarray) -> None:
    whole = image.dtype == np.uint8
    axis.imshow(image, "gray", vmin=0 if whole else image.min(), vmax=255 if whole else image.max())


def tsne(
    layers: dict[str, Hidden], class_names: Sequence[str], most_points: int, seed: int, path: Path
) -> None:
    """Hidden vectors of one layer, one panel a run, coloured by the most frequent class of their patches."""
    colours = class_colours(len(class_names))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(layers), 4.8), layout="constrained")
        axes = figure.subplots(1, len(layers), squeeze=False)[0]
        for axis, (name, layer) in zip(axes, layers.items(), strict=True):
            unit = normalize(layer.vectors, dim=-1).flatten(0, 1)
            step = -(-len(unit) // most_points)
            points = TSNE(init="pca", random_state=seed).fit_transform(unit[::step].numpy())
            classes = layer.ratios.flatten(0, 1)[::step].argmax(-1).numpy()
            for label, colour in enumerate(colours):
                axis.scatter(*points[classes == label].T, s=7, color=colour, linewidths=0)
            axis.set(title=name, xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        _class_legend(figure, class_names, colours)
        _save(figure, path)


def affinity(layers: dict[str, Hidden], position: int, class_names: Sequence[str], path: Path) -> None:
    """Affinity w (Eq. 3) of the vectors of one slice, and their cosines in each run, all sorted by ratio."""
    ratios = next(iter(layers.values())).ratios[position]
    largest, dominant = ratios.max(-1)
    order = np.lexsort((-largest.numpy(), dominant.numpy()))
    panels = {"affinity w": 1 - (ratios[order][:, None] - ratios[order]).abs().sum(-1) / 2}
    for name, layer in layers.items():
        unit = normalize(layer.vectors[position][order], dim=-1)
        panels[f"cosine, {name}"] = unit @ unit.T
    colours = class_colours(len(class_names))
    palette = ListedColormap(colours)
    classes = dominant[order].numpy()[:, None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.7 * len(panels) + 0.4, 3.7), layout="constrained")
        for axis, (name, matrix) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            scale, least = ("RdBu_r", -1) if name.startswith("cosine") else ("viridis", 0)
            picture = axis.imshow(matrix.numpy(), scale, vmin=least, vmax=1)
            figure.colorbar(picture, ax=axis, shrink=0.75, pad=0.02)
            strip = axis.inset_axes((-0.06, 0, 0.04, 1))
            strip.imshow(classes, palette, vmin=0, vmax=len(colours) - 1, aspect="auto")
            for part in (axis, strip):
                part.set(xticks=[], yticks=[])
                part.spines[:].set_visible(False)
            axis.set_title(name)
        _class_legend(figure, class_names, colours)
        _save(figure, path)


def time_and_memory(comparison: list[dict[str, Any]], path: Path) -> None:
    """Seconds and peak memory of the fast and the reference loss over N."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, key, unit in zip(axes, ("seconds", "peak_bytes"), (1e-3, 1e6), strict=True):
            for name, colour in (("reference", RUN_COLOURS[0]), ("fast", RUN_COLOURS[1])):
                rows = [row for row in comparison if row[name].get(key)]
                axis.plot(
                    [row["num_vectors"] for row in rows],
                    [row[name][key] / unit for row in rows],
                    "o-",
                    markersize=4,
                    color=colour,
                    label=name,
                )
            axis.set(xlabel="N, vectors of one image", xscale="log", yscale="log")
            axis.set_xticks(sizes := [row["num_vectors"] for row in comparison], sizes)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].set(title="Loss and gradient, milliseconds")
        axes[1].set(title="Peak memory, MB")
        axes[0].legend()
        _save(figure, path)
