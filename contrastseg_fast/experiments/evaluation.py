"""What a trained network makes of held-out slices: classes, uncertainty, hidden vectors, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.metrics import compute_dice, compute_iou
from sklearn.metrics import accuracy_score
from torch import Tensor, nn

from contrastseg_fast import UAFS, receptive_fields
from contrastseg_fast.experiments.data import to_input
from contrastseg_fast.experiments.training import CLASS_DISTANCE, LAYERS, PATCH_SIZE
from contrastseg_fast.functional import foreground_ratio, repelled_fraction, sample_grid
from contrastseg_fast.sampling import gather_vectors

VECTORS = 256  # taken from each map of each slice


@dataclass(frozen=True)
class Hidden:
    """Hidden vectors `(slices, N, C)` of one layer, and the ratios `(slices, N, M)` of their patches."""

    vectors: Tensor
    ratios: Tensor


@dataclass(frozen=True)
class Outcome:
    """What the network finds in slices of `(H, W)` pixels."""

    predictions: Tensor  # (slices, H, W) class indices
    uncertainty: Tensor | None  # (slices, H / 2, W / 2) from 0 to 1, of the first UAFS module
    hidden: dict[str, Hidden]  # by layer


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The classes `(B, H, W)` of slices `(B, H, W)` uint8."""
    model.eval()
    return torch.cat([model(to_input(part)).argmax(1) for part in images.split(8)])


@torch.no_grad()
def examine(model: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> Outcome:
    """Predict slices, `(B, H, W)` uint8, and sample what passes `LAYERS` and the first UAFS module."""
    maps: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    uncertainty: list[Tensor] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(_keep_output(kept)) for name, kept in maps.items()
    ]
    gates = [module for module in model.modules() if isinstance(module, UAFS)]
    hooks += [gate.register_forward_hook(_keep_uncertainty(uncertainty)) for gate in gates[:1]]
    try:
        predictions = predict(model, images)
    finally:
        for hook in hooks:
            hook.remove()

    fields = receptive_fields(model, (1, 1, *images.shape[1:]), list(LAYERS))
    hidden = {}
    for name, parts in maps.items():
        features = torch.cat(parts)
        indices = sample_grid(features.shape[2:], VECTORS)
        field = fields[name].centred(PATCH_SIZE[name]) if name in PATCH_SIZE else fields[name]
        size = [int(extent) for extent in field.size]
        ratios, _ = foreground_ratio(labels.long(), field.starts(indices), size, num_classes)
        hidden[name] = Hidden(gather_vectors(features, indices), ratios)
    return Outcome(predictions, torch.cat(uncertainty)[:, 0] if uncertainty else None, hidden)


def _keep_output(kept: list[Tensor]) -> Callable[..., None]:
    def hook(_layer: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
        kept.append(output)

    return hook


def _keep_uncertainty(kept: list[Tensor]) -> Callable[..., None]:
    def hook(gate: UAFS, inputs: tuple[Tensor], _output: Tensor) -> None:
        kept.append(gate.uncertainty(inputs[0]))

    return hook


def scores(predictions: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Dice and Jaccard (means over the classes but background) and accuracy of a volume `(slices, H, W)`.

    A class that no slice has counts in no mean, and its own Dice is None.
    """
    found, truth = (
        nn.functional.one_hot(classes.long(), len(class_names)).movedim(-1, 0)[None]
        for classes in (predictions, labels)
    )
    dice = compute_dice(found, truth, include_background=False)[0]
    jaccard = compute_iou(found, truth, include_background=False)[0]
    of_class = [None if value != value else value for value in dice.tolist()]
    return {
        "dice": dice.nanmean().item(),
        "jaccard": jaccard.nanmean().item(),
        "accuracy": float(accuracy_score(labels.flatten(), predictions.flatten())),
        "dice_of_class": dict(zip(class_names[1:], of_class, strict=True)),
    }


def embedding_statistics(hidden: dict[str, Hidden]) -> dict[str, dict[str, float]]:
    """By stride: mean cosine of two vectors of one slice, and the fraction of such pairs that PDCR repels."""
    statistics = {}
    for name, layer in hidden.items():
        unit = nn.functional.normalize(layer.vectors, dim=-1)
        count = unit.shape[1]
        cosines = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))  # of all i != j, summed
        repelled = repelled_fraction(layer.vectors, layer.ratios, class_distance=CLASS_DISTANCE)
        statistics[f"stride {LAYERS[name]}"] = {
            "mean_cosine": (cosines / (count * (count - 1))).mean().item(),
            "repelled_fraction": repelled.mean().item(),
        }
    return statistics
