"""The paper, equation by equation, in plain PyTorch: the oracle of every test.

Each function is one equation, written to be read: it builds the N x N matrices, crops every patch, and lets
autograd differentiate. Arguments are not checked. Sums are taken in fp64 for fp64 inputs, in fp32 otherwise.
This file imports torch alone; tests/test_reference.py compares it with the paper's sums written as loops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """fp64 stays fp64, all other dtypes become fp32."""
    return x if x.dtype == torch.float64 else x.float()


def all_if_none(valid: Tensor | None, vectors: Tensor) -> Tensor:
    """Which vectors `(B, N, C)` make pairs `(B, N)`, bool: those that are given, or all."""
    if valid is not None:
        return valid
    return torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)


def gather_vectors(features: Tensor, positions: Tensor) -> Tensor:
    """The vectors `(B, N, C)` of a map `(B, C, *spatial)` at positions `(N,)` in raster order."""
    return features.flatten(2)[:, :, positions].mT


def _crop(x: Tensor, axis: int, first: int, extent: int) -> Tensor:
    """The part of the patch [first, first + extent) of `axis` that lies inside the image."""
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
    """Eq. 4, by cropping each patch and counting: phi^m = (pixels of class m inside R) / (area of R).

    Returns ratios `(B, N, M)` and the valid fraction `(B, N)`.
    """
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
    ratios = membership.new_zeros((batch, count, num_classes))
    valid_fraction = membership.new_zeros((batch, count))
    for b, n in itertools.product(range(batch), range(count)):
        corner = starts[b, n].tolist()
        patch_of_classes, patch_counted = membership[b], counted[b]
        for axis, (first, extent) in enumerate(zip(corner, size, strict=True)):
            patch_of_classes = _crop(patch_of_classes, axis + 1, first, extent)
            patch_counted = _crop(patch_counted, axis, first, extent)
        pixels_of_class = patch_of_classes.flatten(1).sum(1)
        inside = patch_counted.numel()
        num_ignored = inside - int(patch_counted.sum())
        if border == "background":
            pixels_of_class[0] += area - inside
        denominator = (inside if border == "clip" else area) - num_ignored
        if denominator > 0:
            ratios[b, n] = pixels_of_class / denominator
        if inside > 0:
            valid_fraction[b, n] = (inside - num_ignored) / inside
    return ratios.float(), valid_fraction.float()


def class_distance(ratios: Tensor, scale: float) -> Tensor:
    """Eq. 3: d_ij = scale * sum_m |phi_i^m - phi_j^m|, `(B, N, N)`. The paper has scale = 1/M."""
    return scale * (ratios[:, :, None, :] - ratios[:, None, :, :]).abs().sum(-1)


def category_distance(categories: Tensor) -> Tensor:
    """Section 5.3.2: d_ij = 0 where i and j have the same category, else 1; `(B, N, 1)` to `(B, N, N)`."""
    return (categories != categories.mT).to(categories.dtype)


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


def log_partition(s: Tensor, wbar: Tensor, temperature: float, valid: Tensor) -> Tensor:
    """log Z_i = log sum_k exp(s_ik wbar_ik / tau) over the valid k, `(B, N)`."""
    exponent = s * wbar / temperature
    return exponent.masked_fill(~valid[:, None, :], torch.finfo(exponent.dtype).min).logsumexp(-1)


def pdcr_loss(s: Tensor, w: Tensor, wbar: Tensor, temperature: float, valid: Tensor) -> Tensor:
    """Eq. 7: L = sum_i sum_j -log( exp(s_ij w_ij / tau) / sum_k exp(s_ik wbar_ik / tau) ), for each image.

    Similarities s and weights w and wbar are `(B, N, N)`; `valid` `(B, N)` says which vectors make pairs.
    """
    pair_loss = log_partition(s, wbar, temperature, valid)[:, :, None] - s * w / temperature
    is_pair = valid[:, :, None] & valid[:, None, :]
    return pair_loss.masked_fill(~is_pair, 0).sum((1, 2))


def reduce(image_loss: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Sums of Eq. 7 `(B,)` over n^2, one per image (`"none"`) or averaged over images with valid vectors.

    `"sum"` is their plain sum.
    """
    num_vectors = valid.sum(1)
    mean = image_loss / num_vectors.clamp(min=1) ** 2
    match reduction:
        case "none":
            return mean
        case "sum":
            return image_loss.sum()
        case _:
            return mean.sum() / (num_vectors > 0).sum().clamp(min=1)


def repelled_fraction(s: Tensor, w: Tensor, wbar: Tensor, temperature: float, valid: Tensor) -> Tensor:
    """The share of the pairs i != j of each image that Eq. 7 drives apart, `(B,)`.

    Those are the pairs with dL/ds_ij = 1/tau [ n wbar_ij e_ij (1/Z_i + 1/Z_j) - 2 w_ij ] > 0, where
    e = exp(s wbar / tau).
    """
    exponent = s * wbar / temperature
    log_z = log_partition(s, wbar, temperature, valid)
    share = (exponent - log_z[:, :, None]).exp() + (exponent - log_z[:, None, :]).exp()
    num_vectors = valid.sum(1)
    repels = num_vectors[:, None, None] * wbar * share > 2 * w
    is_pair = (valid[:, :, None] & valid[:, None, :]).tril(-1)  # each pair once
    num_pairs = num_vectors * (num_vectors - 1) // 2
    return (repels & is_pair).sum((1, 2)) / num_pairs.clamp(min=1)


def nt_xent_loss(s: Tensor, temperature: float) -> Tensor:
    """Eqs. 1 and 2: L = sum_i -log( exp(s_ip(i) / tau) / sum_{k != i} exp(s_ik / tau) ), for each group.

    Similarities s `(..., 2B, 2B)` of B vectors of a first view, then those of a second view.
    """
    logits = s / temperature
    count = logits.shape[-1]
    itself = torch.eye(count, dtype=torch.bool, device=logits.device)
    log_z = logits.masked_fill(itself, -math.inf).logsumexp(-1)
    positive = logits.diagonal(count // 2, -2, -1)  # s_ip(i) / tau of the first view, and of the second
    return log_z.sum(-1) - 2 * positive.sum(-1)


def entropy_gate(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Eqs. 8 to 10: A = softmax(F(H)), u = -sum_m a_m log2 a_m / log2 M, Hhat = H * (1 + (1 - u)).

    Returns Hhat and u.
    """
    log_a = upcast(logits).log_softmax(1)
    log_a = log_a.clamp(min=torch.finfo(log_a.dtype).min)  # a logit of -inf: 0 log 0 = 0
    u = -(log_a.exp() * log_a).sum(1, keepdim=True) / math.log(logits.shape[1])
    return (features * (1 + (1 - u))).to(features.dtype), u
