"""What a trained network makes of held-out images: classes, uncertainty, hidden vectors, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.metrics import compute_dice, compute_iou
from sklearn.metrics import accuracy_score
from torch import Tensor, nn

from contrastseg_fast import UAFS, ReceptiveField
from contrastseg_fast.functional import foreground_ratio, repelled_fraction, sample_grid
from contrastseg_fast.sampling import gather_vectors

VECTORS = 256  # taken from each map of each image


@dataclass(frozen=True)
class Hidden:
    """Hidden vectors `(B, N, C)` of one layer, and the ratios `(B, N, M)` of their patches."""

    vectors: Tensor
    ratios: Tensor


@dataclass(frozen=True)
class Outcome:
    """What the network finds in B images."""

    predictions: Tensor  # (B, *spatial) class indices
    uncertainty: Tensor | None  # (B, *spatial of the map) from 0 to 1, of the first UAFS module
    hidden: dict[str, Hidden]  # by layer

    def cpu(self) -> Outcome:
        """The same in the CPU's memory."""
        hidden = {
            name: Hidden(layer.vectors.cpu(), layer.ratios.cpu()) for name, layer in self.hidden.items()
        }
        uncertainty = None if self.uncertainty is None else self.uncertainty.cpu()
        return Outcome(self.predictions.cpu(), uncertainty, hidden)


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    """The classes `(B, *spatial)` of inputs `(B, C, *spatial)`."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in inputs.split(8)])


@torch.no_grad()
def examine(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    num_classes: int,
    boxes: Mapping[Any, ReceptiveField],
) -> Outcome:
    """Predict inputs `(B, C, *spatial)`, and sample what passes the layers and the first UAFS module.

    Args:
        labels: `(B, *spatial)`, integers.
        boxes: the patches that belong to the vectors, by layer to sample them from; `PDCRLoss.patches`.
    """
    vectors: dict[str, list[Tensor]] = {name: [] for name in boxes}
    shapes: dict[str, Sequence[int]] = {}
    uncertainty: list[Tensor] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(_keep_vectors(name, kept, shapes))
        for name, kept in vectors.items()
    ]
    gates = [module for module in model.modules() if isinstance(module, UAFS)]
    hooks += [gate.register_forward_hook(_keep_uncertainty(uncertainty)) for gate in gates[:1]]
    try:
        predictions = predict(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()

    hidden = {}
    for name, parts in vectors.items():
        indices = sample_grid(shapes[name], VECTORS, device=labels.device)
        size = [int(extent) for extent in boxes[name].size]
        ratios, _ = foreground_ratio(labels.long(), boxes[name].starts(indices), size, num_classes)
        hidden[name] = Hidden(torch.cat(parts).float(), ratios)
    return Outcome(predictions, torch.cat(uncertainty)[:, 0] if uncertainty else None, hidden)


def _keep_vectors(name: str, kept: list[Tensor], shapes: dict[str, Sequence[int]]) -> Callable[..., None]:
    def hook(_layer: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
        shapes[name] = output.shape[2:]
        kept.append(gather_vectors(output, sample_grid(shapes[name], VECTORS, device=output.device)))

    return hook


def _keep_uncertainty(kept: list[Tensor]) -> Callable[..., None]:
    def hook(gate: UAFS, inputs: tuple[Tensor], _output: Tensor) -> None:
        kept.append(gate.uncertainty(inputs[0]))

    return hook


def scores(predictions: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Dice and Jaccard (means over the classes but background) and accuracy of one image or volume.

    Both are class indices `(*spatial)`. A class that the labels lack counts in no mean, and its Dice is None.
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


def embedding_statistics(hidden: dict[str, Hidden], **options: Any) -> dict[str, dict[str, float]]:
    """By layer: mean cosine of two vectors of one image, and the fraction of such pairs that PDCR repels.

    The options are those of `repelled_fraction`.
    """
    statistics = {}
    for name, layer in hidden.items():
        unit = nn.functional.normalize(layer.vectors, dim=-1)
        count = unit.shape[1]
        cosines = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))  # of all i != j, summed
        repelled = repelled_fraction(layer.vectors, layer.ratios, **options)
        statistics[name] = {
            "mean_cosine": (cosines / (count * (count - 1))).mean().item(),
            "repelled_fraction": repelled.mean().item(),
        }
    return statistics
