"""The functions of `functional` behind their checks, for arguments that are known to be right.

In the functions of pairs, `vectors` are `(B, N, C)`, and `compared` is what `select_compared` of affinity.py
returns: ratios `(B, N, M)` or categories `(B, N, 1)`. `valid` `(B, N)` bool says which vectors make pairs;
None means all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from contrastseg_fast import equations
from contrastseg_fast.affinity import Affinity
from contrastseg_fast.ops import foreground_ratio as ratio_op
from contrastseg_fast.ops import pdcr

_PAIRS_AT_ONCE = 1 << 22  # of all images, in repelled_fraction


def pdcr_loss(
    vectors: Tensor,
    compared: Tensor,
    valid: Tensor | None,
    affinity: Affinity,
    reduction: str,
    backend: str,
) -> Tensor:
    """`functional.pdcr_loss`."""
    if backend == "reference":
        valid = equations.all_if_none(valid, vectors)
        total = equations.pdcr_loss(*affinity.matrices(vectors, compared), affinity.temperature, valid)
        return equations.reduce(total, valid, reduction)
    loss, *_ = pdcr.pdcr_forward(vectors, compared, valid, [*affinity], reduction, backend)
    return loss


@torch.no_grad()
def repelled_fraction(
    vectors: Tensor, compared: Tensor, valid: Tensor | None, affinity: Affinity, backend: str
) -> Tensor:
    """`functional.repelled_fraction`, in chunks of rows: N x N is never stored."""
    vectors = vectors.detach()  # tangents too, which no_grad leaves
    valid = equations.all_if_none(valid, vectors)
    if backend == "reference":
        matrices = affinity.matrices(vectors, compared)
        return equations.repelled_fraction(*matrices, affinity.temperature, valid)
    _, log_z, *_ = pdcr.pdcr_forward(vectors, compared, valid, [*affinity], "none", backend)
    num_vectors = valid.sum(1)
    repelled = torch.zeros_like(num_vectors)
    with torch.autocast(vectors.device.type, enabled=False):
        unit, _ = pdcr.normalised(vectors)
        compared = compared.to(unit.dtype)
        for rows in pdcr.row_chunks(valid, _PAIRS_AT_ONCE):
            w, wbar = affinity.weights(affinity.distance(compared[:, rows], compared))
            exponent = (unit[:, rows] @ unit.mT - affinity.shift) * wbar / affinity.temperature
            share = (exponent - log_z[:, rows, None]).exp() + (exponent - log_z[:, None, :]).exp()
            repels = num_vectors[:, None, None] * wbar * share > 2 * w
            is_pair = (valid[:, rows, None] & valid[:, None, :]).tril(rows.start - 1)  # each pair once
            repelled = repelled + (repels & is_pair).sum((1, 2))  # torch.vmap adds no batch in place
    return repelled / (num_vectors * (num_vectors - 1) // 2).clamp(min=1)


def foreground_ratio(
    labels: Tensor,
    starts: Tensor,
    size: Sequence[int],
    num_classes: int,
    border: str,
    ignore_index: int | None,
    with_inside: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`functional.foreground_ratio`, and with `with_inside` the ratios over the patches' parts in the image.

    Labels are `(B, *spatial)` or soft `(B, M, *spatial)`.
    """
    if backend != "reference":
        options = (list(size), num_classes, border, ignore_index, with_inside, backend)
        return ratio_op.foreground_ratio(labels, starts, *options)
    count = functools.partial(
        equations.foreground_ratio, labels.detach(), starts, size, num_classes, ignore_index=ignore_index
    )
    ratios, valid_fraction = count(border=border)
    return ratios, valid_fraction, count(border="clip")[0] if with_inside else ratios[..., :0]
