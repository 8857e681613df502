"""The same public names in plain PyTorch: slow, and to be read against the paper.

Change one import and get the same losses, ratios and gates from `contrastseg_fast/equations.py`. Nothing here
runs a fast kernel, whichever method is called. Arguments are not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from contrastseg_fast import equations, uafs
from contrastseg_fast.affinity import Affinity, make_affinity, select_compared
from contrastseg_fast.call_plan import PatchContents
from contrastseg_fast.equations import cosine_similarity, foreground_ratio, unit_vectors
from contrastseg_fast.patches import first_label_map
from contrastseg_fast.pdcr_options import LayerSamples, PDCROptions
from contrastseg_fast.projection import Layer
from contrastseg_fast.receptive_field import ReceptiveField
from contrastseg_fast.sampling import sample_grid

__all__ = [
    "UAFS",
    "PDCRLoss",
    "ReceptiveField",
    "affinity_matrices",
    "cosine_similarity",
    "entropy_gate",
    "foreground_ratio",
    "nt_xent_loss",
    "pdcr_loss",
    "repelled_fraction",
    "sample_grid",
    "unit_vectors",
]


def _pair(
    ratios: Tensor,
    temperature: float = 0.5,
    affinity: str = "ratio",
    class_distance: str = "mean",
    include_background: bool = True,
    variant: str = "paper",
) -> tuple[Affinity, Tensor]:
    """How pairs are compared, and what is compared."""
    pair = make_affinity(
        affinity,
        num_classes=ratios.shape[-1],
        temperature=temperature,
        class_distance=class_distance,
        include_background=include_background,
        variant=variant,
    )
    return pair, select_compared(ratios, affinity, include_background)


def affinity_matrices(
    ratios: Tensor, affinity: str = "ratio", class_distance: str = "mean", include_background: bool = True
) -> tuple[Tensor, Tensor]:
    """Eq. 3 and the ablations of section 5.3.2: the affinity w and its complement wbar, each `(B, N, N)`."""
    pair, compared = _pair(
        ratios,
        affinity=affinity,
        class_distance=class_distance,
        include_background=include_background,
    )
    _, w, wbar = pair.matrices(compared.new_zeros((*compared.shape[:2], 1)), compared)
    return w, wbar


def pdcr_loss(
    vectors: Tensor,
    ratios: Tensor,
    *,
    temperature: float = 0.5,
    affinity: str = "ratio",
    class_distance: str = "mean",
    include_background: bool = True,
    valid: Tensor | None = None,
    variant: str = "paper",
    reduction: str = "mean",
) -> Tensor:
    """Eq. 7, as `functional.pdcr_loss`."""
    pair, compared = _pair(ratios, temperature, affinity, class_distance, include_background, variant)
    valid = equations.all_if_none(valid, vectors)
    total = equations.pdcr_loss(*pair.matrices(vectors, compared), temperature, valid)
    return equations.reduce(total, valid, reduction)


def repelled_fraction(
    vectors: Tensor,
    ratios: Tensor,
    *,
    temperature: float = 0.5,
    affinity: str = "ratio",
    class_distance: str = "mean",
    include_background: bool = True,
    valid: Tensor | None = None,
    variant: str = "paper",
) -> Tensor:
    """The share of pairs that Eq. 7 drives apart, as `functional.repelled_fraction`."""
    pair, compared = _pair(ratios, temperature, affinity, class_distance, include_background, variant)
    matrices = pair.matrices(vectors.detach(), compared)
    return equations.repelled_fraction(*matrices, temperature, equations.all_if_none(valid, vectors))


def nt_xent_loss(a: Tensor, b: Tensor, *, temperature: float = 0.5, reduction: str = "mean") -> Tensor:
    """Eqs. 1 and 2, as `functional.nt_xent_loss`."""
    vectors = torch.cat([a, b], -2)
    total = equations.nt_xent_loss(cosine_similarity(equations.upcast(vectors)), temperature)
    mean = total / max(1, vectors.shape[-2])
    match reduction:
        case "none":
            return mean
        case "sum":
            return total.sum()
        case _:
            return mean.sum() / max(1, mean.numel())


@overload
def entropy_gate(
    features: Tensor, logits: Tensor, *, return_uncertainty: Literal[False] = False
) -> Tensor: ...
@overload
def entropy_gate(
    features: Tensor, logits: Tensor, *, return_uncertainty: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def entropy_gate(
    features: Tensor, logits: Tensor, *, return_uncertainty: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Eqs. 8 to 10, as `functional.entropy_gate`."""
    gated, u = equations.entropy_gate(features, logits)
    return (gated, u) if return_uncertainty else gated


class PDCRLoss(PDCROptions):
    """Algorithm 1: in every layer sample vectors, count in their patches (Eq. 4), and average Eq. 7.

    Beyond the paper: the mean over several sizes of patches, and sets of vectors across layers and images.
    """

    def sample(self, features: Tensor, layer: Layer) -> LayerSamples:
        """Take vectors out of one layer's feature map."""
        places = self.place(features, layer)
        return LayerSamples(layer, equations.gather_vectors(features, places.positions), places)

    def loss(
        self, samples: Iterable[LayerSamples], labels: Tensor | Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """The loss of vectors that were sampled before."""
        losses = []
        for vectors, sizes in self._sets(samples, labels, mask):
            by_size = [
                pdcr_loss(vectors, c.ratios, reduction=self.reduction, **self._pair_options(c)) for c in sizes
            ]
            losses.append(torch.stack(by_size).mean(0))
        stacked = torch.stack(losses, -1)
        return stacked if self.reduction == "none" else stacked.mean()

    @torch.no_grad()
    def repelled_fraction(
        self, samples: Iterable[LayerSamples], labels: Tensor | Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """The share of pairs that `loss` drives apart."""
        fractions = []
        for vectors, sizes in self._sets(samples, labels, mask):
            by_size = [repelled_fraction(vectors, c.ratios, **self._pair_options(c)) for c in sizes]
            fractions.append(torch.stack(by_size).mean(0))
        return torch.stack(fractions, -1)

    def _pair_options(self, contents: PatchContents) -> dict[str, Any]:
        """How pairs are scored, and which vectors make pairs."""
        return {
            "temperature": self.temperature,
            "affinity": self.affinity,
            "class_distance": self.class_distance,
            "include_background": self.counts_background,
            "valid": contents.valid,
            "variant": self.variant,
        }

    def _sets(
        self, samples: Iterable[LayerSamples], labels: Tensor | Sequence[Tensor], mask: Tensor | None
    ) -> list[tuple[Tensor, list[PatchContents]]]:
        """The vectors that make pairs with each other, and the contents of their patches of each size."""
        by_layer = {sample.layer: sample for sample in samples}
        labels, ignore_index = self._labels(first_label_map(labels), mask)
        sets = []
        for layers in self.sampled_sets(by_layer):
            vectors = torch.cat([self.project(by_layer[layer].vectors, layer) for layer in layers], 1)
            if self.pairs == "batch":
                vectors = vectors.flatten(0, 1)[None]
            sizes = []
            for patches in self.patches_by_size:
                held = [
                    self._count(labels, by_layer[layer], patches[layer], ignore_index) for layer in layers
                ]
                ratios, valid, inside = (torch.cat(parts, 1) for parts in zip(*held, strict=True))
                if self.pairs == "batch":
                    ratios, valid, inside = (x.flatten(0, 1)[None] for x in (ratios, valid, inside))
                if self.skip_homogeneous:
                    for b in range(len(valid)):
                        if inside[b, valid[b]].unique(dim=0).shape[0] == 1:
                            valid[b] = False
                sizes.append(PatchContents(ratios, valid, inside))
            sets.append((vectors, sizes))
        return sets

    def _labels(self, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
        """Labels `(B, 1 or M, *spatial)` in which masked pixels are ignored, and the label of those."""
        labels = labels.double()
        if labels.ndim == self.spatial_dims + 1:
            labels = labels[:, None]
        unused_label = -(2**15)
        ignore_index = unused_label if self.ignore_index is None else self.ignore_index
        if self.num_classes == 1:  # one foreground channel, maybe soft; class 0 is the rest
            ignored = labels == ignore_index
            labels = torch.cat([1 - labels, labels], 1).masked_fill(ignored, ignore_index)
        if mask is not None:
            labels = labels.masked_fill(mask == 0, ignore_index)
        return labels, ignore_index

    def _count(
        self, labels: Tensor, sample: LayerSamples, patch: ReceptiveField, ignore_index: int
    ) -> PatchContents:
        """Eq. 4 for the patches of one layer."""
        starts = patch.starts(sample.indices)
        size = [int(extent) for extent in patch.size]
        num_classes = max(self.num_classes, 2)
        ratios, valid_fraction = foreground_ratio(
            labels, starts, size, num_classes, border=self.border, ignore_index=ignore_index
        )
        inside, _ = foreground_ratio(
            labels, starts, size, num_classes, border="clip", ignore_index=ignore_index
        )
        return PatchContents(ratios, valid_fraction >= self.min_valid_fraction, inside)


class UAFS(uafs.UAFS):
    """Eqs. 8 to 10 behind the same network F."""

    def _gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return equations.entropy_gate(x, self.head(x))
