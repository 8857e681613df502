"""NT-Xent (Eqs. 1 and 2): the contrastive loss of two views of each image, on the tiles of PDCR.

Of the 2B vectors of a group, i and p(i) = i +- B are the views of one image. With `s_ij = cos(v_i, v_j)`:

    loss_g = 1/2B * sum_i log( 1 + exp(log N_i - s_ip(i) / tau) ),   N_i = sum_{k != i, p(i)} exp(s_ik / tau)

PDCR's operator sums over all k. With the images as categories, wbar = d, and similarities shifted by -1, its
sum is `2 + exp(1 / tau) N_i`: the self pair and the positive pair add exp(0) each, and every negative pair
adds at least as much, so subtracting the 2 again loses nothing. Its gradient takes the logarithm of a
denominator as an input. Given that of Eq. 1, `Z_i = N_i + exp(s_ip(i) / tau)`, it returns what the negative
pairs add. What the positive pair adds is proportional to `1 - exp(s_ip(i) / tau) / Z_i = N_i / Z_i`. That is
computed without the difference, because it is small for trained vectors. `rows` and `floats` go from the
forward pass of PDCR's operator to its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastseg_fast.affinity import Affinity
from contrastseg_fast.ops._dispatch import Operation
from contrastseg_fast.ops._library import (
    accumulation_dtype,
    define,
    forbid_second_derivative,
    register_autograd,
)
from contrastseg_fast.ops.pdcr import normalised, pdcr_backward, pdcr_forward, saved_sizes

OPERATION = Operation("nt_xent_loss")
_NEGATIVES = Affinity(
    temperature=1.0,
    distance_scale=1.0,
    categorical=True,
    num_bias=0.0,
    num_slope=0.0,
    den_bias=0.0,
    den_slope=1.0,
    shift=-1.0,
)


def _images(vectors: Tensor) -> Tensor:
    """The category `(G, 2B, 1)` of every vector: which image it is a view of."""
    groups, count, _ = vectors.shape
    image = torch.arange(count // 2, dtype=accumulation_dtype(vectors.dtype), device=vectors.device)
    return image.repeat(2).expand(groups, count)[..., None]


def _positives(unit: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The other view of every vector's image `(G, 2B, C)`, and (s_ip + 1) / tau `(G, 2B)`."""
    partner = unit.roll(unit.shape[1] // 2, 1)
    return partner, ((unit * partner).sum(-1) + 1) / temperature


def _forward(vectors: Tensor, temperature: float, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    affinity = [*_NEGATIVES._replace(temperature=temperature)]
    with torch.autocast(vectors.device.type, enabled=False):
        _, log_sum, *saved = pdcr_forward(vectors, _images(vectors), None, affinity, "none", backend)
        if vectors.shape[1] > 2:
            log_n = log_sum + torch.log1p(-2 * torch.exp(-log_sum))  # of exp(1 / tau) N
        else:
            log_n = torch.full_like(log_sum, -torch.inf)
        unit, _ = normalised(vectors)
        _, positive = _positives(unit, temperature)
        losses = torch.logaddexp(log_n - positive, torch.zeros_like(positive))
        loss = losses.sum(1, dtype=torch.float64) / max(1, vectors.shape[1])
        return loss.to(unit.dtype), log_n, *saved


def _backward(
    grad: Tensor,
    log_n: Tensor,
    vectors: Tensor,
    rows: Tensor,
    floats: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    affinity = [*_NEGATIVES._replace(temperature=temperature)]
    with torch.autocast(vectors.device.type, enabled=False):
        unit, inverse_length = normalised(vectors)
        partner, positive = _positives(unit, temperature)
        log_z = torch.logaddexp(log_n, positive)
        repelled = pdcr_backward(
            grad, log_z, vectors, _images(vectors), None, rows, floats, affinity, "none", backend
        )
        missing = torch.exp(log_n - log_z)  # N / Z
        missing = missing + missing.roll(vectors.shape[1] // 2, 1)
        attracted = missing[..., None] * (partner - (partner * unit).sum(-1, keepdim=True) * unit)
        scale = grad.to(unit.dtype)[:, None, None] / (temperature * max(1, vectors.shape[1]))
        return (repelled - attracted * scale * inverse_length).to(vectors.dtype)


def _forward_fake(vectors: Tensor, temperature: float, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(vectors.dtype)
    affinity = [*_NEGATIVES._replace(temperature=temperature)]
    num_rows, num_floats = saved_sizes(vectors, 1, affinity, backend)
    return (
        vectors.new_empty(vectors.shape[0], dtype=dtype),
        vectors.new_empty(vectors.shape[:2], dtype=dtype),
        vectors.new_empty((num_rows,)),
        vectors.new_empty((num_floats,), dtype=torch.float32),
    )


def _backward_fake(_grad: Tensor, _log_n: Tensor, vectors: Tensor, *_others: Any) -> Tensor:
    return vectors.new_empty(vectors.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    vectors, *ctx.options = inputs
    _, log_n, *saved = output
    ctx.save_for_backward(log_n, vectors, *saved)
    ctx.mark_non_differentiable(log_n, *saved)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    return nt_xent_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


nt_xent_forward = define(
    "nt_xent_forward(Tensor vectors, float temperature, str backend) -> "
    "(Tensor loss, Tensor log_n, Tensor rows, Tensor floats)",
    _forward,
    _forward_fake,
)
nt_xent_backward = define(
    "nt_xent_backward(Tensor grad, Tensor log_n, Tensor vectors, Tensor rows, Tensor floats, "
    "float temperature, str backend) -> Tensor",
    _backward,
    _backward_fake,
)
register_autograd(nt_xent_forward, OPERATION.name, _differentiate, _setup_context)
forbid_second_derivative(nt_xent_backward, OPERATION.name)
