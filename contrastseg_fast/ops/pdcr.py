"""PDCR (Eqs. 3, 6 and 7): the loss of every image, and its gradient, over all pairs of vectors.

With `d` the class distance, `w = num_bias + num_slope d`, `wbar = den_bias + den_slope d` and
`s = cos(v_i, v_j) - shift`:

    loss_b = 1/n^2 * ( n * sum_i log Z_i - 1/tau * sum_ij s_ij w_ij ),   Z_i = sum_k exp(s_ik wbar_ik / tau)

The default kernels below are plain PyTorch in row chunks. The C++ extension replaces them on the CPU, the
Triton kernels of kernels/pdcr.py on a GPU, where they can run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from contrastseg_fast import _backend
from contrastseg_fast.ops._library import LIBRARY, accumulation_dtype, define, forbid_second_derivative

_OPTIONS = (
    "Tensor vectors, Tensor ratios, Tensor? valid, float temperature, float distance_scale, "
    "bool categorical, float num_bias, float num_slope, float den_bias, float den_slope, float shift"
)
_MOST_IMAGES = 1 << 16  # of the Triton kernels' grids
_CHUNK_ELEMENTS = 1 << 22  # pairs held at once by the default kernels, over all images


def _normalised(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and 1 / length (both zero for a zero vector), in the accumulation dtype."""
    x = vectors.to(accumulation_dtype(vectors.dtype))
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    scale = torch.where(largest > 0, largest, 1)
    x = x / scale
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.where(length > 0, 1 / length, 0)
    return x * inverse, inverse / scale


def _distance(rows: Tensor, ratios: Tensor, distance_scale: float, categorical: bool) -> Tensor:
    """Class distances `(B, R, N)` between a chunk of rows and all vectors."""
    if categorical:
        return (rows != ratios.mT).to(ratios.dtype)
    distance = rows.new_zeros(rows.shape[0], rows.shape[1], ratios.shape[1])
    for m in range(ratios.shape[-1]):
        distance += (rows[..., m, None] - ratios[:, None, :, m]).abs()
    return distance * distance_scale


def _row_chunks(vectors: Tensor) -> Iterator[slice]:
    batch, count = vectors.shape[:2]
    rows = max(1, _CHUNK_ELEMENTS // max(1, batch * count))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _pair_weights(valid: Tensor, rows: slice) -> Tensor:
    return valid[:, rows, None] & valid[:, None, :]


def _prepare(vectors: Tensor, ratios: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    unit, inverse = _normalised(vectors)
    if valid is None:
        valid = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    return unit, inverse, ratios.to(unit.dtype), valid


def _forward(
    vectors: Tensor,
    ratios: Tensor,
    valid: Tensor | None,
    temperature: float,
    distance_scale: float,
    categorical: bool,
    num_bias: float,
    num_slope: float,
    den_bias: float,
    den_slope: float,
    shift: float,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(vectors.device.type, enabled=False):
        unit, _, ratios, valid = _prepare(vectors, ratios, valid)
        log_z = unit.new_zeros(valid.shape)
        attraction = torch.zeros(valid.shape[0], dtype=torch.float64, device=unit.device)
        for rows in _row_chunks(unit):
            distance = _distance(ratios[:, rows], ratios, distance_scale, categorical)
            similarity = unit[:, rows] @ unit.mT - shift
            exponent = similarity * (den_bias + den_slope * distance) / temperature
            exponent.masked_fill_(~valid[:, None, :], -torch.inf)
            log_z[:, rows] = torch.where(valid[:, rows], exponent.logsumexp(-1), 0)
            weighted = similarity * (num_bias + num_slope * distance) * _pair_weights(valid, rows)
            attraction += weighted.sum((1, 2), dtype=torch.float64)
        count = valid.sum(1)
        total = count * log_z.sum(1, dtype=torch.float64) - attraction / temperature
        loss = torch.where(count > 0, total / count.clamp(min=1).double().square(), 0)
        return loss.to(unit.dtype), log_z


def _backward(
    grad: Tensor,
    log_z: Tensor,
    vectors: Tensor,
    ratios: Tensor,
    valid: Tensor | None,
    temperature: float,
    distance_scale: float,
    categorical: bool,
    num_bias: float,
    num_slope: float,
    den_bias: float,
    den_slope: float,
    shift: float,
) -> Tensor:
    with torch.autocast(vectors.device.type, enabled=False):
        unit, inverse, ratios, valid = _prepare(vectors, ratios, valid)
        count = valid.sum(1).to(unit.dtype)[:, None, None]
        grad_unit = torch.empty_like(unit)
        for rows in _row_chunks(unit):
            distance = _distance(ratios[:, rows], ratios, distance_scale, categorical)
            den_weight = den_bias + den_slope * distance
            exponent = (unit[:, rows] @ unit.mT - shift) * den_weight / temperature
            share = (exponent - log_z[:, rows, None]).exp() + (exponent - log_z[:, None, :]).exp()
            pair = count * den_weight * share - 2 * (num_bias + num_slope * distance)
            grad_unit[:, rows] = pair.masked_fill_(~_pair_weights(valid, rows), 0) @ unit
        grad_unit -= (grad_unit * unit).sum(-1, keepdim=True) * unit
        scale = grad.to(unit.dtype)[:, None, None] / (temperature * count.clamp(min=1).square())
        return (grad_unit * scale * inverse).to(vectors.dtype)


def _has_triton(vectors: Tensor) -> bool:
    if vectors.dtype == torch.float64 or vectors.numel() == 0 or len(vectors) >= _MOST_IMAGES:
        return False
    return _backend.has_triton(f"pdcr_loss runs in plain PyTorch on {vectors.device}", vectors.device)


def _forward_cuda(vectors: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    if not _has_triton(vectors):
        return _forward(vectors, *options)
    from contrastseg_fast.kernels import pdcr as kernels

    return kernels.forward(vectors, *options)


def _backward_cuda(grad: Tensor, log_z: Tensor, vectors: Tensor, *options: Any) -> Tensor:
    if not _has_triton(vectors):
        return _backward(grad, log_z, vectors, *options)
    from contrastseg_fast.kernels import pdcr as kernels

    return kernels.backward(grad, log_z, vectors, *options)


def _forward_fake(vectors: Tensor, *_options: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(vectors.dtype)
    return vectors.new_empty(vectors.shape[0], dtype=dtype), vectors.new_empty(vectors.shape[:2], dtype=dtype)


def _backward_fake(grad: Tensor, log_z: Tensor, vectors: Tensor, *_options: Any) -> Tensor:
    return vectors.new_empty(vectors.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    vectors, ratios, valid, *ctx.options = inputs
    _, log_z = output
    ctx.save_for_backward(log_z, vectors, ratios, valid)
    ctx.mark_non_differentiable(log_z)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _grad_log_z: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_vectors = None
    if grad is not None and ctx.needs_input_grad[0]:
        grad_vectors = pdcr_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (grad_vectors, None, None, *(None for _ in ctx.options))


_FORWARD = define(f"pdcr_forward({_OPTIONS}) -> (Tensor loss, Tensor log_z)", _forward, _forward_fake)
_BACKWARD = define(
    f"pdcr_backward(Tensor grad, Tensor log_z, {_OPTIONS}) -> Tensor",
    _backward,
    _backward_fake,
)
torch.library.impl(_FORWARD, "CUDA", lib=LIBRARY)(_forward_cuda)
torch.library.impl(_BACKWARD, "CUDA", lib=LIBRARY)(_backward_cuda)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context, lib=LIBRARY)
forbid_second_derivative(_BACKWARD)

pdcr_forward = torch.ops.contrastseg_fast.pdcr_forward.default
pdcr_backward = torch.ops.contrastseg_fast.pdcr_backward.default
