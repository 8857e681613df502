"""PDCR (Eqs. 3, 6 and 7): the loss of every image, and its gradient, over all pairs of vectors.

With the distance d, the weights w and wbar and the similarity s of `contrastseg_fast/affinity.py`:

    loss_b = 1/n^2 * ( n * sum_i log Z_i - 1/tau * sum_ij s_ij w_ij ),   Z_i = sum_k exp(s_ik wbar_ik / tau)

`vectors` are `(B, N, C)`, `ratios` `(B, N, M)`, or `(B, N, 1)` categories with a categorical affinity.
`valid` `(B, N)` marks the vectors that make pairs, and `affinity` holds the numbers of an `Affinity`. Results
are the loss `(B,)` and log Z `(B, N)`, fp32, or fp64 for fp64 vectors.

The kernels below are plain PyTorch, in chunks of rows. The C++ extension (csrc/cpu) replaces them on the CPU,
the Triton kernels (kernels/pdcr) on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from contrastseg_fast.affinity import Affinity
from contrastseg_fast.equations import all_if_none
from contrastseg_fast.ops._dispatch import Operation, pick
from contrastseg_fast.ops._library import (
    accumulation_dtype,
    define,
    forbid_second_derivative,
    register_autograd,
)

OPERATION = Operation("pdcr_loss")
_MOST_IMAGES = 65535  # of the Triton kernels' grids
_CHUNK_ELEMENTS = 1 << 22  # pairs held at once by the plain kernels, over all images


def refused_by_triton(vectors: Tensor, name: str = "vectors") -> str | None:
    """The error for vectors that the Triton kernels do not take, or None."""
    expected = ""
    if vectors.dtype == torch.float64:
        expected, got = "fp32, bf16 or fp16", str(vectors.dtype)
    elif vectors.shape[0] > _MOST_IMAGES:
        expected, got = f"at most {_MOST_IMAGES} images", str(vectors.shape[0])
    return f"{name}: expected {expected} for backend='triton', got {got}" if expected else None


def normalised(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and 1 / length (both zero for a zero vector), in the accumulation dtype."""
    x = vectors.to(accumulation_dtype(vectors.dtype))
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    divisor = torch.where(largest > 0, largest, 1)
    x = x / divisor
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse_length = torch.where(length > 0, 1 / length, 0)
    return x * inverse_length, inverse_length / divisor


def row_chunks(valid: Tensor, pairs: int) -> Iterator[slice]:
    """Chunks of the rows of `(B, N, N)` that hold at most `pairs` pairs, for `valid` `(B, N)`."""
    batch, count = valid.shape
    rows = max(1, pairs // max(1, batch * count))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _is_pair(valid: Tensor, rows: slice) -> Tensor:
    return valid[:, rows, None] & valid[:, None, :]


def _prepare(vectors: Tensor, ratios: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    unit, inverse_length = normalised(vectors)
    return unit, inverse_length, ratios.to(unit.dtype), all_if_none(valid, vectors)


def _forward(
    vectors: Tensor,
    ratios: Tensor,
    valid: Tensor | None,
    affinity: Sequence[float],
    _backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    pair = Affinity.from_numbers(affinity)
    with torch.autocast(vectors.device.type, enabled=False):
        unit, _, ratios, valid = _prepare(vectors, ratios, valid)
        log_z = unit.new_zeros(valid.shape)
        attraction = torch.zeros(valid.shape[0], dtype=torch.float64, device=unit.device)
        for rows in row_chunks(valid, _CHUNK_ELEMENTS):
            w, wbar = pair.weights(pair.distance(ratios[:, rows], ratios))
            similarity = unit[:, rows] @ unit.mT - pair.shift
            exponent = similarity * wbar / pair.temperature
            exponent.masked_fill_(~valid[:, None, :], -torch.inf)
            log_z[:, rows] = torch.where(valid[:, rows], exponent.logsumexp(-1), 0)
            attraction += (similarity * w * _is_pair(valid, rows)).sum((1, 2), dtype=torch.float64)
        count = valid.sum(1)
        total = count * log_z.sum(1, dtype=torch.float64) - attraction / pair.temperature
        loss = torch.where(count > 0, total / count.clamp(min=1).double().square(), 0)
        return loss.to(unit.dtype), log_z


def _backward(
    grad: Tensor,
    log_z: Tensor,
    vectors: Tensor,
    ratios: Tensor,
    valid: Tensor | None,
    affinity: Sequence[float],
    _backend: str = "auto",
) -> Tensor:
    pair = Affinity.from_numbers(affinity)
    with torch.autocast(vectors.device.type, enabled=False):
        unit, inverse_length, ratios, valid = _prepare(vectors, ratios, valid)
        count = valid.sum(1).to(unit.dtype)[:, None, None]
        grad_unit = torch.empty_like(unit)
        for rows in row_chunks(valid, _CHUNK_ELEMENTS):
            w, wbar = pair.weights(pair.distance(ratios[:, rows], ratios))
            exponent = (unit[:, rows] @ unit.mT - pair.shift) * wbar / pair.temperature
            share = (exponent - log_z[:, rows, None]).exp() + (exponent - log_z[:, None, :]).exp()
            pair_weight = count * wbar * share - 2 * w
            grad_unit[:, rows] = pair_weight.masked_fill_(~_is_pair(valid, rows), 0) @ unit
        grad_unit -= (grad_unit * unit).sum(-1, keepdim=True) * unit
        scale = grad.to(unit.dtype)[:, None, None] / (pair.temperature * count.clamp(min=1).square())
        return (grad_unit * scale * inverse_length).to(vectors.dtype).contiguous()


def _takes_triton(vectors: Tensor, backend: str) -> bool:
    return vectors.numel() > 0 and pick(OPERATION, backend, vectors, refused_by_triton(vectors)) == "triton"


def pdcr_forward_on_cuda(
    vectors: Tensor, ratios: Tensor, valid: Tensor | None, affinity: Sequence[float], backend: str
) -> tuple[Tensor, Tensor]:
    if not _takes_triton(vectors, backend):
        return _forward(vectors, ratios, valid, affinity)
    from contrastseg_fast.kernels import pdcr as kernels

    return kernels.forward(vectors, ratios, valid, Affinity.from_numbers(affinity))


def pdcr_backward_on_cuda(
    grad: Tensor,
    log_z: Tensor,
    vectors: Tensor,
    ratios: Tensor,
    valid: Tensor | None,
    affinity: Sequence[float],
    backend: str,
) -> Tensor:
    if not _takes_triton(vectors, backend):
        return _backward(grad, log_z, vectors, ratios, valid, affinity)
    from contrastseg_fast.kernels import pdcr as kernels

    return kernels.backward(grad, log_z, vectors, ratios, valid, Affinity.from_numbers(affinity))


def _forward_fake(vectors: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(vectors.dtype)
    return vectors.new_empty(vectors.shape[0], dtype=dtype), vectors.new_empty(vectors.shape[:2], dtype=dtype)


def _backward_fake(_grad: Tensor, _log_z: Tensor, vectors: Tensor, *_others: Any) -> Tensor:
    return vectors.new_empty(vectors.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    vectors, ratios, valid, ctx.affinity, ctx.backend = inputs
    _, log_z = output
    ctx.save_for_backward(log_z, vectors, ratios, valid)
    ctx.mark_non_differentiable(log_z)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _grad_log_z: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_vectors = None
    if grad is not None and ctx.needs_input_grad[0]:
        grad_vectors = pdcr_backward(grad, *ctx.saved_tensors, ctx.affinity, ctx.backend)
    return grad_vectors, None, None, None, None


_INPUTS = "Tensor vectors, Tensor ratios, Tensor? valid, float[] affinity, str backend"
pdcr_forward = define(
    f"pdcr_forward({_INPUTS}) -> (Tensor loss, Tensor log_z)", _forward, _forward_fake, pdcr_forward_on_cuda
)
pdcr_backward = define(
    f"pdcr_backward(Tensor grad, Tensor log_z, {_INPUTS}) -> Tensor",
    _backward,
    _backward_fake,
    pdcr_backward_on_cuda,
)
register_autograd(pdcr_forward, OPERATION.name, _differentiate, _setup_context)
forbid_second_derivative(pdcr_backward, OPERATION.name)
