"""The paper, line by line, in plain PyTorch: the oracle of every test.

Each function is one equation, or one step of Algorithm 1, written for reading: it builds the N x N
matrices, crops every box, and lets autograd differentiate. Arguments are those of
`contrastseg_fast.functional` and are not checked here. Sums run in fp64 for fp64 inputs, in fp32 for others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from contrastseg_fast import modules, sampling
from contrastseg_fast.receptive_field import ReceptiveField
from contrastseg_fast.sampling import sample_grid

__all__ = [
    "UAFS",
    "PDCRLoss",
    "ReceptiveField",
    "affinity_matrices",
    "class_distance_matrix",
    "cosine_similarity",
    "entropy_gate",
    "foreground_ratio",
    "nt_xent_loss",
    "pdcr_loss",
    "repelled_fraction",
    "sample_grid",
    "unit_vectors",
]


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _crop(x: Tensor, axis: int, first: int, extent: int) -> Tensor:
    """The part of the box [first, first + extent) of `axis` that lies inside the image."""
    begin, end = max(first, 0), min(first + extent, x.shape[axis])
    return x.narrow(axis, min(begin, x.shape[axis]), max(end - begin, 0))


def foreground_ratio(
    labels: Tensor,
    starts: Tensor,
    size: Sequence[int],
    num_classes: int,
    *,
    border: str = "full",
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 4, by cropping each box and counting: phi^m = (pixels of class m inside R) / (area of R)."""
    dims = len(size)
    labels = labels.double()
    if labels.ndim == dims + 1:
        labels = labels[:, None]
    counted = (labels != (math.inf if ignore_index is None else ignore_index)).any(1)  # (B, *spatial)
    if labels.shape[1] == 1:
        labels = (labels == torch.arange(num_classes, device=labels.device).view(-1, *[1] * dims)).double()
    membership = labels.masked_fill(~counted[:, None], 0)  # (B, M, *spatial)

    batch = labels.shape[0]
    starts = starts.expand(batch, *starts.shape[-2:])
    count = starts.shape[1]
    area = math.prod(size)
    ratios = membership.new_zeros(batch, count, num_classes)
    valid_fraction = membership.new_zeros(batch, count)
    for b, n in itertools.product(range(batch), range(count)):
        corner = starts[b, n].tolist()
        box_of_classes, box_counted = membership[b], counted[b]
        for axis, (first, extent) in enumerate(zip(corner, size, strict=True)):
            box_of_classes = _crop(box_of_classes, axis + 1, first, extent)
            box_counted = _crop(box_counted, axis, first, extent)
        pixels_of_class = box_of_classes.flatten(1).sum(1)
        inside = box_counted.numel()
        num_ignored = inside - int(box_counted.sum())
        if border == "background":
            pixels_of_class[0] += area - inside
        denominator = (inside if border == "clip" else area) - num_ignored
        if denominator > 0:
            ratios[b, n] = pixels_of_class / denominator
        if inside > 0:
            valid_fraction[b, n] = (inside - num_ignored) / inside
    return ratios.float(), valid_fraction.float()


def class_distance_matrix(ratios: Tensor, class_distance: str = "mean") -> Tensor:
    """The distance of Eq. 3, d_ij = 1/M sum_m |phi_i^m - phi_j^m|: `(B, N, M)` to `(B, N, N)`."""
    total = (ratios[:, :, None, :] - ratios[:, None, :, :]).abs().sum(-1)
    match class_distance:
        case "mean":
            return total / ratios.shape[-1]
        case "sum":
            return total
        case "tv":
            return total / 2
        case _:
            raise ValueError(f"class_distance: {class_distance!r} is not known")


def affinity_matrices(
    ratios: Tensor, affinity: str = "ratio", class_distance: str = "mean", include_background: bool = True
) -> tuple[Tensor, Tensor]:
    """Eq. 3 and the ablations of section 5.3.2: the affinity w and its complement wbar, each `(B, N, N)`."""
    batch, count, _ = ratios.shape
    match affinity:
        case "ratio":
            d = class_distance_matrix(ratios if include_background else ratios[..., 1:], class_distance)
        case "constant":
            d = ratios.new_full((batch, count, count), 0.5)
        case "diagonal":
            d = 1 - torch.eye(count, dtype=ratios.dtype, device=ratios.device).expand(batch, -1, -1)
        case "bipartite":
            label = ratios.argmax(-1)
            d = (label[:, :, None] != label[:, None, :]).to(ratios.dtype)
        case _:
            raise ValueError(f"affinity: {affinity!r} is not known")
    return 1 - d, d


def unit_vectors(vectors: Tensor) -> Tensor:
    """u = v / |v|, and 0 with gradient 0 where v = 0.

    Each vector is first divided by its largest entry, which changes nothing but keeps squares in range.
    """
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    v = vectors / largest.masked_fill(largest == 0, 1)
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return torch.where(length == 0, 0, v / length.masked_fill(length == 0, 1))


def cosine_similarity(vectors: Tensor) -> Tensor:
    """Eq. 6: s_ij = v_i . v_j / (|v_i| |v_j|), `(B, N, C)` to `(B, N, N)`."""
    u = unit_vectors(vectors)
    with torch.autocast(u.device.type, enabled=False):
        return u @ u.mT


def _logits_and_weights(
    vectors: Tensor,
    ratios: Tensor,
    temperature: float,
    affinity: str,
    class_distance: str,
    include_background: bool,
    valid: Tensor | None,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What Eq. 7 is made of: s w / tau, s wbar / tau, w, wbar, each `(B, N, N)`, and valid `(B, N)`."""
    vectors = _upcast(vectors)
    s = cosine_similarity(vectors)
    w, wbar = affinity_matrices(ratios.to(s.dtype), affinity, class_distance, include_background)
    match variant:
        case "paper":
            pass
        case "released":  # the authors' 2D code swaps w and wbar, and subtracts the largest s, which is 1
            w, wbar, s = wbar, w, s - 1
        case _:
            raise ValueError(f"variant: {variant!r} is not known")
    if valid is None:
        valid = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    return s * w / temperature, s * wbar / temperature, w, wbar, valid


def _log_z(repelling: Tensor, valid: Tensor) -> Tensor:
    """log Z_i = log sum_k exp(s_ik wbar_ik / tau) over the valid k, `(B, N)`."""
    return repelling.masked_fill(~valid[:, None, :], torch.finfo(repelling.dtype).min).logsumexp(-1)


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
    """Eq. 7: L = sum_i sum_j -log( exp(s_ij w_ij / tau) / sum_k exp(s_ik wbar_ik / tau) ), for each image."""
    attracting, repelling, _, _, valid = _logits_and_weights(
        vectors, ratios, temperature, affinity, class_distance, include_background, valid, variant
    )
    pair_loss = _log_z(repelling, valid)[:, :, None] - attracting
    pair_counts = valid[:, :, None] & valid[:, None, :]
    image_loss = pair_loss.masked_fill(~pair_counts, 0).sum((1, 2))  # (B,)
    if reduction == "sum":
        return image_loss.sum()
    num_vectors = valid.sum(1)
    image_loss = image_loss / num_vectors.clamp(min=1) ** 2
    if reduction == "none":
        return image_loss
    if reduction == "mean":
        return image_loss.sum() / (num_vectors > 0).sum().clamp(min=1)
    raise ValueError(f"reduction: {reduction!r} is not known")


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
    """The share of the pairs i != j of each image that Eq. 7 drives apart, `(B,)`.

    Those are the pairs with dL/ds_ij = 1/tau [ n wbar_ij e_ij (1/Z_i + 1/Z_j) - 2 w_ij ] > 0, where
    e = exp(s wbar / tau).
    """
    _, repelling, w, wbar, valid = _logits_and_weights(
        vectors.detach(), ratios, temperature, affinity, class_distance, include_background, valid, variant
    )
    log_z = _log_z(repelling, valid)
    share = (repelling - log_z[:, :, None]).exp() + (repelling - log_z[:, None, :]).exp()
    num_vectors = valid.sum(1)
    repels = num_vectors[:, None, None] * wbar * share > 2 * w
    pair_counts = (valid[:, :, None] & valid[:, None, :]).tril(-1)  # each pair once
    num_pairs = num_vectors * (num_vectors - 1) // 2
    return (repels & pair_counts).sum((1, 2)) / num_pairs.clamp(min=1)


def nt_xent_loss(a: Tensor, b: Tensor, *, temperature: float = 0.5, reduction: str = "mean") -> Tensor:
    """Eqs. 1 and 2: L = 1/2B sum_i -log( exp(s_ip(i) / tau) / sum_{k != i} exp(s_ik / tau) ), by groups."""
    logits = cosine_similarity(_upcast(torch.cat([a, b], -2))) / temperature  # ([G,] 2B, 2B)
    count = logits.shape[-1]
    itself = torch.eye(count, dtype=torch.bool, device=logits.device)
    log_z = logits.masked_fill(itself, -math.inf).logsumexp(-1)
    positive = logits.diagonal(count // 2, -2, -1)  # s_ip(i) / tau of the first view, and of the second
    total = log_z.sum(-1) - 2 * positive.sum(-1)
    match reduction:
        case "none":
            return total / max(1, count)
        case "sum":
            return total.sum()
        case "mean":
            return (total / max(1, count)).sum() / max(1, total.numel())
        case _:
            raise ValueError(f"reduction: {reduction!r} is not known")


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
    """Eqs. 8 to 10: A = softmax(F(H)), u = -sum_m a_m log2 a_m / log2 M, Hhat = H * (1 + (1 - u))."""
    log_a = _upcast(logits).log_softmax(1)
    log_a = log_a.clamp(min=torch.finfo(log_a.dtype).min)  # a logit of -inf: 0 log 0 = 0
    u = -(log_a.exp() * log_a).sum(1, keepdim=True) / math.log(logits.shape[1])
    gated = (features * (1 + (1 - u))).to(features.dtype)
    return (gated, u) if return_uncertainty else gated


class PDCRLoss(modules.PDCRLoss):
    """Algorithm 1: in every layer sample vectors, count in their boxes (Eq. 4), and average Eq. 7.

    Beyond the paper: the mean over several sizes of boxes, and sets of vectors across layers and images.
    """

    def forward(
        self,
        features: Tensor | Sequence[Tensor] | Mapping[Any, Tensor],
        labels: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of the feature maps, one for each layer, with the labels of the input image."""
        labels = modules.finest(labels).double()
        dims = next(iter(self.receptive_fields.values())).spatial_dims
        if labels.ndim == dims + 1:
            labels = labels[:, None]
        num_classes, include_background = self.num_classes, self.include_background
        unused_label = -(2**15)
        ignore_index = unused_label if self.ignore_index is None else self.ignore_index
        if num_classes == 1:  # one foreground channel, maybe soft; what is left is class 0
            ignored = labels == ignore_index
            labels = torch.cat([1 - labels, labels], 1).masked_fill(ignored, ignore_index)
            num_classes, include_background = 2, False
        if mask is not None:
            labels = labels.masked_fill(mask == 0, ignore_index)

        vectors: dict[modules.Layer, Tensor] = {}
        contents: list[dict[modules.Layer, modules.BoxContents]] = [{} for _ in self.boxes_by_size]
        for layer, feature_map in zip(self.boxes, self.in_layer_order(features), strict=True):
            indices = sampling.sample(
                self.sampler, feature_map.shape[2:], self.num_samples, self.generator, feature_map.device
            )
            at_indices: tuple[Any, ...] = (slice(None), slice(None), *indices.unbind(1))
            vectors[layer] = self.project(feature_map[at_indices].mT, layer)
            for boxes, held in zip(self.boxes_by_size, contents, strict=True):
                starts = boxes[layer].starts(indices)
                size = [int(extent) for extent in boxes[layer].size]
                ratios, valid_fraction = foreground_ratio(
                    labels, starts, size, num_classes, border=self.border, ignore_index=ignore_index
                )
                inside, _ = foreground_ratio(
                    labels, starts, size, num_classes, border="clip", ignore_index=ignore_index
                )
                valid = valid_fraction >= self.min_valid_fraction
                held[layer] = modules.BoxContents(ratios, valid, inside)

        set_losses = []
        for layers in self.vector_sets:
            size_losses = []
            for held in contents:
                v = torch.cat([vectors[layer] for layer in layers], 1)
                ratios = torch.cat([held[layer].ratios for layer in layers], 1)
                valid = torch.cat([held[layer].valid for layer in layers], 1)
                inside = torch.cat([held[layer].inside for layer in layers], 1)
                if self.pairs == "batch":
                    v, ratios, valid, inside = (x.flatten(0, 1)[None] for x in (v, ratios, valid, inside))
                if self.skip_homogeneous:
                    for b in range(len(valid)):
                        if inside[b, valid[b]].unique(dim=0).shape[0] == 1:
                            valid[b] = False
                size_losses.append(
                    pdcr_loss(
                        v,
                        ratios,
                        temperature=self.temperature,
                        affinity=self.affinity,
                        class_distance=self.class_distance,
                        include_background=include_background,
                        valid=valid,
                        variant=self.variant,
                        reduction=self.reduction,
                    )
                )
            set_losses.append(torch.stack(size_losses).mean(0))
        losses = torch.stack(set_losses, -1)
        return losses if self.reduction == "none" else losses.mean()


class UAFS(modules.UAFS):
    """Eqs. 8 to 10 behind the same network F."""

    def forward(self, x: Tensor) -> Tensor:
        """The gated features."""
        return entropy_gate(x, self.head(x))
