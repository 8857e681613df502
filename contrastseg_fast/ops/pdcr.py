"""PDCR (Eqs. 3, 6 and 7): the loss of every image, and its gradient, over all pairs of vectors.

With the distance d, the weights w and wbar and the similarity s of `contrastseg_fast/affinity.py`:

    loss_b = 1/n^2 * ( n * sum_i log Z_i - 1/tau * sum_ij s_ij w_ij ),   Z_i = sum_k exp(s_ik wbar_ik / tau)

`vectors` are `(B, N, C)`, `ratios` `(B, N, M)`, or `(B, N, 1)` categories with a categorical affinity.
`valid` `(B, N)` marks the vectors that make pairs, and `affinity` holds the numbers of an `Affinity`.
`reduction` is `"none"` (loss_b of every image, 0 without valid vectors), `"mean"` (over the images that have
valid vectors) or `"sum"` (of loss_b n_b^2). Results are the loss, `(B,)` or a scalar, and log Z `(B, N)`,
fp32, or fp64 for fp64 vectors. `rows` (in the dtype of the vectors) and `floats` (fp32) are what the backward
pass reuses of the forward pass; only kernels on a GPU fill them, all others return them empty. The backward
pass takes any log Z, but with plain exponents (`Affinity.is_plain`) that of the forward pass, as `floats` may
hold it in the order of rows.

The kernels below are plain PyTorch, in chunks of rows. The C++ extension (csrc/cpu) replaces them on the CPU,
the Triton kernels (kernels/pdcr) on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from contrastseg_fast.affinity import Affinity
from contrastseg_fast.equations import all_if_none
from contrastseg_fast.ops._dispatch import Operation, pick
from contrastseg_fast.ops._library import (
    accumulation_dtype,
    define,
    forbid_second_derivative,
    register_autograd,
)
from contrastseg_fast.problems import (
    Call,
    Problem,
    Segment,
    Source,
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


def _shared(value: Tensor, vectors: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    """A scalar or a number for every image, times what L / n^2 of the image counts in the mean or the sum."""
    if reduction == "mean":
        return value / (max(1, vectors.shape[0]) if valid is None else valid.any(1).sum().clamp(min=1))
    if reduction == "sum":
        return value * (vectors.shape[1] ** 2 if valid is None else valid.sum(1).square())
    raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")


def _reduce(image_loss: Tensor, vectors: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    """The loss from L / n^2 of every image `(B,)`."""
    return image_loss if reduction == "none" else _shared(image_loss, vectors, valid, reduction).sum()


def _image_grads(grad: Tensor, vectors: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    """The gradient `(B,)` of L / n^2 of every image, from that of the loss."""
    if reduction == "none":
        return grad
    return _shared(grad, vectors, valid, reduction).expand(vectors.shape[0])


def _none_saved(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Empty `rows` and `floats`."""
    return vectors.new_empty((0,)), vectors.new_empty((0,), dtype=torch.float32)


def _forward(
    vectors: Tensor,
    ratios: Tensor,
    valid: Tensor | None,
    affinity: Sequence[float],
    reduction: str,
    _backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pair = Affinity.from_numbers(affinity)
    with torch.autocast(vectors.device.type, enabled=False):
        unit, _, ratios, included = _prepare(vectors, ratios, valid)
        log_z = unit.new_zeros(included.shape)
        attraction = torch.zeros(included.shape[0], dtype=torch.float64, device=unit.device)
        for rows in row_chunks(included, _CHUNK_ELEMENTS):
            w, wbar = pair.weights(pair.distance(ratios[:, rows], ratios))
            similarity = unit[:, rows] @ unit.mT - pair.shift
            exponent = similarity * wbar / pair.temperature
            exponent.masked_fill_(~included[:, None, :], -torch.inf)
            log_z[:, rows] = torch.where(included[:, rows], exponent.logsumexp(-1), 0)
            attraction += (similarity * w * _is_pair(included, rows)).sum((1, 2), dtype=torch.float64)
        count = included.sum(1)
        total = count * log_z.sum(1, dtype=torch.float64) - attraction / pair.temperature
        image_loss = torch.where(count > 0, total / count.clamp(min=1).double().square(), 0)
        loss = _reduce(image_loss, vectors, valid, reduction)
        return loss.to(unit.dtype), log_z, *_none_saved(vectors)


def _backward(
    grad: Tensor,
    log_z: Tensor,
    vectors: Tensor,
    ratios: Tensor,
    valid: Tensor | None,
    _rows: Tensor,
    _floats: Tensor,
    affinity: Sequence[float],
    reduction: str,
    _backend: str = "auto",
) -> Tensor:
    pair = Affinity.from_numbers(affinity)
    with torch.autocast(vectors.device.type, enabled=False):
        image_grads = _image_grads(grad, vectors, valid, reduction)
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
        scale = image_grads.to(unit.dtype)[:, None, None] / (pair.temperature * count.clamp(min=1).square())
        return (grad_unit * scale * inverse_length).to(vectors.dtype).contiguous()


def takes_triton(vectors: Sequence[Tensor], backend: str, refused: str | None = None) -> bool:
    """Whether the Triton kernels take these vectors of several sources together, which are on a GPU.

    Args:
        refused: the error for what else they do not take, None if they take it.
    """
    first = vectors[0]
    if isinstance(first, FakeTensor) and not torch.cuda.is_available():
        return False
    if any(x.dtype != first.dtype or x.numel() == 0 for x in vectors):
        return False
    return pick(OPERATION, backend, first, refused_by_triton(first) or refused) == "triton"


def _call(vectors: Tensor, ratios_stride: int, num_compared: int, affinity: Sequence[float]) -> Call:
    """One problem of vectors `(B, N, C)`."""
    count = vectors.shape[1]
    source = Source.dense(vectors.shape, vectors.stride())
    segment = Segment(0, 0, ratios_stride, 0, count)
    return Call.make(
        [source], [Problem((segment,))], num_compared, vectors.dtype, Affinity.from_numbers(affinity)
    )


def pdcr_forward_on_cuda(
    vectors: Tensor,
    ratios: Tensor,
    valid: Tensor | None,
    affinity: Sequence[float],
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not takes_triton([vectors], backend):
        return _forward(vectors, ratios, valid, affinity, reduction)
    from contrastseg_fast.kernels import pdcr as kernels

    images, *strides = ratios.stride()
    call = _call(vectors, images, ratios.shape[2], affinity)
    valid = None if valid is None else valid.contiguous()
    inputs = kernels.Inputs((vectors,), ratios, (strides[0], strides[1]), valid)
    loss, log_z, saved = kernels.forward(call, inputs, Affinity.from_numbers(affinity), reduction)
    return loss, log_z.view(vectors.shape[:2]), *saved


def pdcr_backward_on_cuda(
    grad: Tensor,
    log_z: Tensor,
    vectors: Tensor,
    ratios: Tensor,
    valid: Tensor | None,
    rows: Tensor,
    floats: Tensor,
    affinity: Sequence[float],
    reduction: str,
    backend: str,
) -> Tensor:
    if rows.numel() == 0:
        return _backward(grad, log_z, vectors, ratios, valid, rows, floats, affinity, reduction)
    from contrastseg_fast.kernels import pdcr as kernels

    call = _call(vectors, 0, ratios.shape[2], affinity)
    gradient = vectors.new_empty(vectors.shape)
    packed = kernels.Packed(rows, floats)
    kernels.backward(call, packed, log_z.contiguous(), Affinity.from_numbers(affinity), grad, (gradient,))
    return gradient


def saved_sizes(
    vectors: Tensor, num_compared: int, affinity: Sequence[float], backend: str
) -> tuple[int, int]:
    """The sizes of `rows` and `floats`, for ratios of `num_compared` numbers each."""
    if not vectors.is_cuda or not takes_triton([vectors], backend):
        return 0, 0
    return _call(vectors, 0, num_compared, affinity).saved_sizes()


def _forward_fake(
    vectors: Tensor,
    ratios: Tensor,
    _valid: Tensor | None,
    affinity: Sequence[float],
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(vectors.dtype)
    num_rows, num_floats = saved_sizes(vectors, ratios.shape[-1], affinity, backend)
    return (
        vectors.new_empty(vectors.shape[:1] if reduction == "none" else (), dtype=dtype),
        vectors.new_empty(vectors.shape[:2], dtype=dtype),
        vectors.new_empty((num_rows,)),
        vectors.new_empty((num_floats,), dtype=torch.float32),
    )


def _backward_fake(_grad: Tensor, _log_z: Tensor, vectors: Tensor, *_others: Any) -> Tensor:
    return vectors.new_empty(vectors.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    vectors, ratios, valid, *ctx.options = inputs
    _, log_z, *saved = output
    ctx.save_for_backward(log_z, vectors, ratios, valid, *saved)
    ctx.mark_non_differentiable(log_z, *saved)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_vectors = None
    if grad is not None and ctx.needs_input_grad[0]:
        grad_vectors = pdcr_backward(grad, *ctx.saved_tensors, *ctx.options)
    return grad_vectors, None, None, None, None, None


_OPTIONS = "float[] affinity, str reduction, str backend"
pdcr_forward = define(
    f"pdcr_forward(Tensor vectors, Tensor ratios, Tensor? valid, {_OPTIONS}) -> "
    "(Tensor loss, Tensor log_z, Tensor rows, Tensor floats)",
    _forward,
    _forward_fake,
    pdcr_forward_on_cuda,
)
pdcr_backward = define(
    "pdcr_backward(Tensor grad, Tensor log_z, Tensor vectors, Tensor ratios, Tensor? valid, Tensor rows, "
    f"Tensor floats, {_OPTIONS}) -> Tensor",
    _backward,
    _backward_fake,
    pdcr_backward_on_cuda,
)
register_autograd(pdcr_forward, OPERATION.name, _differentiate, _setup_context)
forbid_second_derivative(pdcr_backward, OPERATION.name)
