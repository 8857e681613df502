"""The entropy gate (Eqs. 8 to 10) in Triton, for cards without the compiled CUDA kernels.

Tensors are `(B, channels, locations)`. In features, gated features and the gradients of both, channels
(`channels_last`) or locations are neighbours in memory; logits may have any strides. A program computes some
locations of one image: first their uncertainty, then their channels, a block at a time. The formulas are
those of csrc/entropy_gate_math.h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import narrow, on


class Launch(NamedTuple):
    """Block sizes and launch options of both kernels."""

    block_c: int
    block_l: int
    num_warps: int


LAUNCHES = {  # by channels_last, and the bytes of a feature
    False: {2: Launch(16, 128, 4), 4: Launch(16, 128, 4), 8: Launch(8, 128, 4)},
    True: {2: Launch(64, 16, 4), 4: Launch(64, 16, 4), 8: Launch(32, 16, 4)},
}
_VECTOR_BYTES = 16
# Strides by axis: b images, m classes, l locations; r from one run of neighbours to the next.
_UNSPECIALIZED = (
    *("channels", "num_classes", "num_locations", "blocks"),
    *(
        f"{name}_stride_{axis}"
        for name in ("features", "gated", "grad_gated", "grad_features")
        for axis in "br"
    ),
    *(f"{name}_stride_{axis}" for name in ("logits", "grad_logits") for axis in "bml"),
    "grad_uncertainty_stride_b",
)


@triton.jit
def _softmax(logits_ptrs, stride_m, num_classes, mask, DTYPE: tl.constexpr):
    """Of every location: the largest logit, 1 / sum, mean of t = logit - largest, and the uncertainty."""
    LOWEST: tl.constexpr = -708.0 if tl.float64 == DTYPE else -87.0
    largest = tl.load(logits_ptrs, mask=mask, other=0.0).to(DTYPE)  # [BLOCK_L]
    for m in range(1, num_classes):
        logit = tl.load(logits_ptrs + m * stride_m, mask=mask, other=0.0).to(DTYPE)
        largest = tl.where(logit > largest, logit, largest)
    # The largest logits add 1 each to `ones`: `rest` keeps what rounding their sum would lose.
    ones = tl.zeros_like(largest)
    rest = tl.zeros_like(largest)
    weighted = tl.zeros_like(largest)
    for m in range(num_classes):
        t = tl.load(logits_ptrs + m * stride_m, mask=mask, other=0.0).to(DTYPE) - largest
        t = tl.where(t < LOWEST, LOWEST, t)
        exponential = tl.where(t <= LOWEST, 0.0, tl.exp(t))
        ones += tl.where(t == 0.0, exponential, 0.0)
        rest += tl.where(t == 0.0, 0.0, exponential)
        weighted += exponential * t
    total = ones + rest
    inverse_total = 1.0 / total
    mean = weighted * inverse_total
    log_total = tl.log(total) + (rest - (total - ones)) * inverse_total
    uncertainty = (log_total - mean) / tl.log(num_classes.to(DTYPE))
    return largest, inverse_total, mean, tl.where(uncertainty > 1.0, 1.0, uncertainty)


@triton.jit
def _place(num_locations, blocks, BLOCK_L: tl.constexpr):
    """The image of a program, its locations [BLOCK_L], and which of them exist."""
    program = tl.program_id(0).to(tl.int64)
    location = (program % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    return program // blocks, location, location < num_locations


@triton.jit
def _offsets(image, c, location, stride_b, stride_r, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of features, [BLOCK_C, BLOCK_L]; every VECTOR neighbours begin at a multiple of VECTOR."""
    if CHANNELS_LAST:
        offsets = image * stride_b + location[None, :] * stride_r + c[:, None]
        return tl.multiple_of(offsets, (VECTOR, 1))
    offsets = image * stride_b + c[:, None].to(tl.int64) * stride_r + location[None, :]
    return tl.multiple_of(offsets, (1, VECTOR))


@triton.jit
def _mask(c, location, channels, num_locations, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Which features exist, [BLOCK_C, BLOCK_L]; the quotients tell that it is all of a vector or none."""
    if CHANNELS_LAST:
        return (c // VECTOR < channels // VECTOR)[:, None] & (location < num_locations)[None, :]
    return (c < channels)[:, None] & (location // VECTOR < num_locations // VECTOR)[None, :]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def entropy_gate_fwd_kernel(
    features_ptr,  # (B, C, L)
    logits_ptr,  # (B, M, L), any strides
    gated_ptr,  # (B, C, L)
    uncertainty_ptr,  # (B, 1, L), contiguous
    channels,
    num_classes,
    num_locations,
    blocks,  # of an image
    features_stride_b,
    features_stride_r,
    logits_stride_b,
    logits_stride_m,
    logits_stride_l,
    gated_stride_b,
    gated_stride_r,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Features times 2 - u, and the uncertainty u."""
    DTYPE: tl.constexpr = tl.float64 if features_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, location, exists = _place(num_locations, blocks, BLOCK_L)
    logits_ptrs = logits_ptr + image * logits_stride_b + location * logits_stride_l
    _, _, _, uncertainty = _softmax(logits_ptrs, logits_stride_m, num_classes, exists, DTYPE)
    tl.store(uncertainty_ptr + image * num_locations + location, uncertainty, mask=exists)
    gate = 2.0 - uncertainty
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = _mask(c, location, channels, num_locations, CHANNELS_LAST, VECTOR)
        offsets = _offsets(image, c, location, features_stride_b, features_stride_r, CHANNELS_LAST, VECTOR)
        features = tl.load(features_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_C, BLOCK_L]
        offsets = _offsets(image, c, location, gated_stride_b, gated_stride_r, CHANNELS_LAST, VECTOR)
        gated = narrow(features.to(DTYPE) * gate[None, :], gated_ptr.dtype.element_ty)
        tl.store(gated_ptr + offsets, gated, mask=mask)


def forward(
    features: Tensor, logits: Tensor, channels_last: bool, gated: Tensor, uncertainty: Tensor
) -> None:
    """Fill `gated` and `uncertainty`."""
    launch = LAUNCHES[channels_last][features.element_size()]
    grid, sizes = _grid(features, logits, launch.block_l)
    with on(features):
        entropy_gate_fwd_kernel[grid](
            features_ptr=features,
            logits_ptr=logits,
            gated_ptr=gated,
            uncertainty_ptr=uncertainty,
            **sizes,
            features_stride_b=features.stride(0),
            features_stride_r=_run_stride(features, channels_last),
            logits_stride_b=logits.stride(0),
            logits_stride_m=logits.stride(1),
            logits_stride_l=logits.stride(2),
            gated_stride_b=gated.stride(0),
            gated_stride_r=_run_stride(gated, channels_last),
            **_options(channels_last, launch, features, gated),
        )


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def entropy_gate_bwd_kernel(
    grad_gated_ptr,  # (B, C, L), read if HAS_GRAD_GATED
    grad_uncertainty_ptr,  # (B, 1, L), locations neighbours, read if HAS_GRAD_UNCERTAINTY
    features_ptr,  # (B, C, L)
    logits_ptr,  # (B, M, L), any strides
    grad_features_ptr,  # (B, C, L), written if HAS_GRAD_GATED
    grad_logits_ptr,  # (B, M, L), any strides
    channels,
    num_classes,
    num_locations,
    blocks,  # of an image
    grad_gated_stride_b,
    grad_gated_stride_r,
    grad_uncertainty_stride_b,
    features_stride_b,
    features_stride_r,
    logits_stride_b,
    logits_stride_m,
    logits_stride_l,
    grad_features_stride_b,
    grad_features_stride_r,
    grad_logits_stride_b,
    grad_logits_stride_m,
    grad_logits_stride_l,
    HAS_GRAD_GATED: tl.constexpr,
    HAS_GRAD_UNCERTAINTY: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The gradients of features and logits."""
    DTYPE: tl.constexpr = tl.float64 if features_ptr.dtype.element_ty == tl.float64 else tl.float32
    LOWEST: tl.constexpr = -708.0 if tl.float64 == DTYPE else -87.0
    image, location, exists = _place(num_locations, blocks, BLOCK_L)
    logits_ptrs = logits_ptr + image * logits_stride_b + location * logits_stride_l
    largest, inverse_total, mean, uncertainty = _softmax(
        logits_ptrs, logits_stride_m, num_classes, exists, DTYPE
    )
    grad = tl.zeros_like(uncertainty)  # of u: the gate is 2 - u
    if HAS_GRAD_GATED:
        gate = 2.0 - uncertainty
        sums = tl.zeros((BLOCK_C, BLOCK_L), DTYPE)
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            mask = _mask(c, location, channels, num_locations, CHANNELS_LAST, VECTOR)
            offsets = _offsets(
                image, c, location, grad_gated_stride_b, grad_gated_stride_r, CHANNELS_LAST, VECTOR
            )
            grad_gated = tl.load(grad_gated_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_C, BLOCK_L]
            offsets = _offsets(
                image, c, location, features_stride_b, features_stride_r, CHANNELS_LAST, VECTOR
            )
            features = tl.load(features_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_C, BLOCK_L]
            grad_gated = grad_gated.to(DTYPE)
            sums += grad_gated * features.to(DTYPE)
            offsets = _offsets(
                image, c, location, grad_features_stride_b, grad_features_stride_r, CHANNELS_LAST, VECTOR
            )
            grad_features = narrow(grad_gated * gate[None, :], grad_features_ptr.dtype.element_ty)
            tl.store(grad_features_ptr + offsets, grad_features, mask=mask)
        grad = -tl.sum(sums, axis=0)
    if HAS_GRAD_UNCERTAINTY:
        grad_ptrs = grad_uncertainty_ptr + image * grad_uncertainty_stride_b + location
        grad += tl.load(grad_ptrs, mask=exists, other=0.0)
    factor = grad * inverse_total / tl.log(num_classes.to(DTYPE))
    grad_logits_ptrs = grad_logits_ptr + image * grad_logits_stride_b + location * grad_logits_stride_l
    for m in range(num_classes):
        t = tl.load(logits_ptrs + m * logits_stride_m, mask=exists, other=0.0).to(DTYPE) - largest
        t = tl.where(t < LOWEST, LOWEST, t)
        exponential = tl.where(t <= LOWEST, 0.0, tl.exp(t))
        grad_logit = narrow(factor * exponential * (mean - t), grad_logits_ptr.dtype.element_ty)
        tl.store(grad_logits_ptrs + m * grad_logits_stride_m, grad_logit, mask=exists)


def backward(
    grad_gated: Tensor | None,
    grad_uncertainty: Tensor | None,
    features: Tensor,
    logits: Tensor,
    channels_last: bool,
    grad_features: Tensor,
    grad_logits: Tensor,
) -> None:
    """Fill `grad_features`, unless there is no `grad_gated`, and `grad_logits`."""
    launch = LAUNCHES[channels_last][features.element_size()]
    grid, sizes = _grid(features, logits, launch.block_l)
    given_gated = features if grad_gated is None else grad_gated  # what is absent is not read
    given_uncertainty = features if grad_uncertainty is None else grad_uncertainty
    with on(features):
        entropy_gate_bwd_kernel[grid](
            grad_gated_ptr=given_gated,
            grad_uncertainty_ptr=given_uncertainty,
            features_ptr=features,
            logits_ptr=logits,
            grad_features_ptr=grad_features,
            grad_logits_ptr=grad_logits,
            **sizes,
            grad_gated_stride_b=given_gated.stride(0),
            grad_gated_stride_r=_run_stride(given_gated, channels_last),
            grad_uncertainty_stride_b=given_uncertainty.stride(0),
            features_stride_b=features.stride(0),
            features_stride_r=_run_stride(features, channels_last),
            logits_stride_b=logits.stride(0),
            logits_stride_m=logits.stride(1),
            logits_stride_l=logits.stride(2),
            grad_features_stride_b=grad_features.stride(0),
            grad_features_stride_r=_run_stride(grad_features, channels_last),
            grad_logits_stride_b=grad_logits.stride(0),
            grad_logits_stride_m=grad_logits.stride(1),
            grad_logits_stride_l=grad_logits.stride(2),
            HAS_GRAD_GATED=grad_gated is not None,
            HAS_GRAD_UNCERTAINTY=grad_uncertainty is not None,
            **_options(channels_last, launch, given_gated, features, grad_features),
        )


def _run_stride(x: Tensor, channels_last: bool) -> int:
    """From the channels of one location to the next, or from the locations of one channel to the next."""
    return x.stride(2 if channels_last else 1)


def _vector(channels_last: bool, *tensors: Tensor) -> int:
    """Elements that can be moved at once: 16 bytes, or 1 where one of the tensors is not aligned to that."""
    vector = _VECTOR_BYTES // tensors[0].element_size()
    whole = all(
        x.data_ptr() % _VECTOR_BYTES == 0
        and x.stride(0) % vector == 0
        and _run_stride(x, channels_last) % vector == 0
        and x.shape[1 if channels_last else 2] % vector == 0
        for x in tensors
    )
    return vector if whole else 1


def _grid(features: Tensor, logits: Tensor, block_l: int) -> tuple[tuple[int], dict[str, int]]:
    """The launch grid, and the sizes by the names of the kernels' arguments."""
    images, channels, num_locations = features.shape
    blocks = triton.cdiv(num_locations, block_l)
    return (images * blocks,), {
        "channels": channels,
        "num_classes": logits.shape[1],
        "num_locations": num_locations,
        "blocks": blocks,
    }


def _options(channels_last: bool, launch: Launch, *features: Tensor) -> dict[str, Any]:
    """Constexprs and options of both kernels; `features` are all tensors that are moved in vectors."""
    return {
        "CHANNELS_LAST": channels_last,
        "VECTOR": _vector(channels_last, *features),
        "BLOCK_C": launch.block_c,
        "BLOCK_L": launch.block_l,
        "num_warps": launch.num_warps,
        "enable_fp_fusion": True,
    }
