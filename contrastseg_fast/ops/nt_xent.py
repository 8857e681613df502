"""NT-Xent (Eqs. 1 and 2): the contrastive loss of two views of each image, on the tiles of PDCR.

Of the 2B vectors of a group, i and p(i) = i +- B are the views of one image. With `s_ij = cos(v_i, v_j)`:

    loss_g = 1/2B * sum_i log( 1 + exp(log N_i - s_ip(i) / tau) ),   N_i = sum_{k != i, p(i)} exp(s_ik / tau)

PDCR's operator sums over all k. With the images as classes, weights `d`, and similarities shifted by 1, its
sum is `2 + exp(1 / tau) N_i`: the self pair and the positive add exp(0) each, every negative at least as
much, so that taking the 2 off again loses nothing. Its gradient formula takes the logarithm of a denominator
as an input, and given that of Eq. 1, `Z_i = N_i + exp(s_ip(i) / tau)`, it yields what the negatives add. What
the positive adds goes with `1 - exp(s_ip(i) / tau) / Z_i = N_i / Z_i`, found without the difference: trained
vectors live where it is small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastseg_fast.ops._library import LIBRARY, accumulation_dtype, define, forbid_second_derivative
from contrastseg_fast.ops.pdcr import _normalised, pdcr_backward, pdcr_forward

# distance_scale, categorical, num_bias, num_slope, den_bias, den_slope, shift
_NEGATIVES = (1.0, True, 0.0, 0.0, 0.0, 1.0, -1.0)


def _images(vectors: Tensor) -> Tensor:
    """The class `(G, 2B, 1)` of every vector: which image it is a view of."""
    groups, count, _ = vectors.shape
    image = torch.arange(count // 2, dtype=accumulation_dtype(vectors.dtype), device=vectors.device)
    return image.repeat(2).expand(groups, count)[..., None]


def _positives(unit: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The other view of every vector's image `(G, 2B, C)`, and (s_ip + 1) / tau `(G, 2B)`."""
    partner = unit.roll(unit.shape[1] // 2, 1)
    return partner, ((unit * partner).sum(-1) + 1) / temperature


def _forward(vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(vectors.device.type, enabled=False):
        _, log_sum = pdcr_forward(vectors, _images(vectors), None, temperature, *_NEGATIVES)
        if vectors.shape[1] > 2:
            log_n = log_sum + torch.log1p(-2 * torch.exp(-log_sum))  # of exp(1 / tau) N
        else:
            log_n = torch.full_like(log_sum, -torch.inf)
        unit, _ = _normalised(vectors)
        _, positive = _positives(unit, temperature)
        losses = torch.logaddexp(log_n - positive, torch.zeros_like(positive))
        return (losses.sum(1, dtype=torch.float64) / max(1, vectors.shape[1])).to(unit.dtype), log_n


def _backward(grad: Tensor, log_n: Tensor, vectors: Tensor, temperature: float) -> Tensor:
    with torch.autocast(vectors.device.type, enabled=False):
        unit, inverse = _normalised(vectors)
        partner, positive = _positives(unit, temperature)
        log_z = torch.logaddexp(log_n, positive)
        repelled = pdcr_backward(grad, log_z, vectors, _images(vectors), None, temperature, *_NEGATIVES)
        missing = torch.exp(log_n - log_z)  # N / Z
        missing = missing + missing.roll(vectors.shape[1] // 2, 1)
        attracted = missing[..., None] * (partner - (partner * unit).sum(-1, keepdim=True) * unit)
        scale = grad.to(unit.dtype)[:, None, None] / (temperature * max(1, vectors.shape[1]))
        return (repelled - attracted * scale * inverse).to(vectors.dtype)


def _forward_fake(vectors: Tensor, _temperature: float) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(vectors.dtype)
    return vectors.new_empty(vectors.shape[0], dtype=dtype), vectors.new_empty(vectors.shape[:2], dtype=dtype)


def _backward_fake(_grad: Tensor, _log_n: Tensor, vectors: Tensor, _temperature: float) -> Tensor:
    return vectors.new_empty(vectors.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    vectors, ctx.temperature = inputs
    _, log_n = output
    ctx.save_for_backward(log_n, vectors)
    ctx.mark_non_differentiable(log_n)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _grad_log_n: Tensor | None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    return nt_xent_backward(grad, *ctx.saved_tensors, ctx.temperature), None


_FORWARD = define(
    "nt_xent_forward(Tensor vectors, float temperature) -> (Tensor loss, Tensor log_n)",
    _forward,
    _forward_fake,
)
_BACKWARD = define(
    "nt_xent_backward(Tensor grad, Tensor log_n, Tensor vectors, float temperature) -> Tensor",
    _backward,
    _backward_fake,
)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context, lib=LIBRARY)
forbid_second_derivative(_BACKWARD)

nt_xent_forward = torch.ops.contrastseg_fast.nt_xent_forward.default
nt_xent_backward = torch.ops.contrastseg_fast.nt_xent_backward.default
