"""The entropy gate (Eqs. 8 to 10) in Triton.

Tensors are `(B, channels, locations)`. In features, gated features and the gradients of both, channels
(`channels_last`) or locations are neighbours in memory; logits may have any strides. A program computes some
locations of one image: first their uncertainty, then their channels, a block at a time. The first block is
asked for before the uncertainty is computed. The formulas are those of csrc/entropy_gate_math.h.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import narrow, on, processors
from contrastseg_fast.kernels._launch import launch as run_kernel


class Launch(NamedTuple):
    """Block sizes and launch options of both kernels."""

    block_c: int
    block_l: int
    num_warps: int


_BLOCK_ELEMENTS = {2: 2048, 4: 2048, 8: 1024}  # by the bytes of a feature
_BLOCK_CHANNELS = 64  # channels_last, where there are enough locations
_BLOCK_LOCATIONS = 128
_SECTOR_BYTES = 32  # what memory hands out at least
_PROGRAMS_PER_PROCESSOR = 4  # at least, unless blocks would be narrower than a sector
_VECTOR_BYTES = 16
_HELD_CLASSES = 8  # whose logits a program keeps in registers
# Strides by axis: b images, m classes, l locations; r from one run of neighbours to the next.
_UNSPECIALIZED = (
    *("channels", "num_classes", "num_locations", "blocks"),
    *(
        f"{name}_stride_{axis}"
        for name in ("features", "gated", "grad_gated", "grad_features")
        for axis in "br"
    ),
    *("logits_stride_b", "grad_logits_stride_b", "grad_uncertainty_stride_b"),
)
# Classes or locations that are neighbours tell how logits are read; more than that is not worth a kernel.
_UNALIGNED = tuple(f"{name}_stride_{axis}" for name in ("logits", "grad_logits") for axis in "ml")


@triton.jit
def _load_logits(ptrs, first, stride_m, num_classes, exists, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The logits of BLOCK_M classes, [BLOCK_M, BLOCK_L]; -inf beyond the last class."""
    m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    is_class = (m < num_classes)[:, None]
    logits = tl.load(ptrs[None, :] + m[:, None] * stride_m, mask=is_class & exists[None, :], other=0.0)
    return tl.where(is_class, logits.to(DTYPE), float("-inf"))


@triton.jit
def _exponentials(logits, largest):
    """t = logit - largest, kept where exp(t) is a normal number, and exp(t), 0 at the lowest t."""
    LOWEST: tl.constexpr = -708.0 if logits.dtype == tl.float64 else -87.0
    t = logits - largest[None, :]
    t = tl.where(t < LOWEST, LOWEST, t)
    return t, tl.where(t <= LOWEST, 0.0, tl.exp(t))


@triton.jit
def _softmax(logits, ptrs, stride_m, num_classes, exists, HOLDS_ALL: tl.constexpr):
    """Of every location: the largest logit, 1 / sum, mean of t = logit - largest, and the uncertainty.

    `logits` are those of the first classes. Unless they are all, the others are read from `ptrs`.
    """
    DTYPE: tl.constexpr = logits.dtype
    BLOCK_M: tl.constexpr = logits.shape[0]
    held = logits
    largest = tl.max(logits, axis=0)  # [BLOCK_L]
    if not HOLDS_ALL:
        for first in range(BLOCK_M, num_classes, BLOCK_M):
            logits = _load_logits(ptrs, first, stride_m, num_classes, exists, DTYPE, BLOCK_M)
            largest = tl.maximum(largest, tl.max(logits, axis=0))
    # The largest logits add 1 each to `ones`: `rest` keeps what rounding their sum would lose.
    ones = tl.zeros_like(largest)
    rest = tl.zeros_like(largest)
    weighted = tl.zeros_like(largest)
    for first in range(0, BLOCK_M if HOLDS_ALL else num_classes, BLOCK_M):
        if HOLDS_ALL:
            logits = held
        else:
            logits = _load_logits(ptrs, first, stride_m, num_classes, exists, DTYPE, BLOCK_M)
        t, exponentials = _exponentials(logits, largest)
        ones += tl.sum(tl.where(t == 0.0, exponentials, 0.0), axis=0)
        rest += tl.sum(tl.where(t == 0.0, 0.0, exponentials), axis=0)
        weighted += tl.sum(exponentials * t, axis=0)
    total = ones + rest
    inverse_total = 1.0 / total
    mean = weighted * inverse_total
    log_total = tl.log(total) + (rest - (total - ones)) * inverse_total
    uncertainty = (log_total - mean) / tl.log(num_classes.to(DTYPE))
    return largest, inverse_total, mean, tl.where(uncertainty > 1.0, 1.0, uncertainty)


@triton.jit
def _place(num_locations, blocks, BLOCK_L: tl.constexpr):
    """The image of a program, its locations [BLOCK_L], and which of them exist."""
    program = tl.program_id(0)
    location = (program % blocks).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    return (program // blocks).to(tl.int64), location, location < num_locations


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


@triton.jit
def _load(
    ptr, image, c, location, stride_b, stride_r, mask, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr
):
    """A block of features or their gradients, [BLOCK_C, BLOCK_L]; it is read once."""
    offsets = _offsets(image, c, location, stride_b, stride_r, CHANNELS_LAST, VECTOR)
    return tl.load(ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
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
    HOLDS_ALL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Features times 2 - u, and the uncertainty u."""
    DTYPE: tl.constexpr = tl.float64 if features_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, location, exists = _place(num_locations, blocks, BLOCK_L)
    logits_ptrs = logits_ptr + image * logits_stride_b + location * logits_stride_l
    logits = _load_logits(logits_ptrs, 0, logits_stride_m, num_classes, exists, DTYPE, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    mask = _mask(c, location, channels, num_locations, CHANNELS_LAST, VECTOR)
    features = _load(
        *(features_ptr, image, c, location, features_stride_b, features_stride_r, mask),
        *(CHANNELS_LAST, VECTOR),
    )
    _, _, _, uncertainty = _softmax(logits, logits_ptrs, logits_stride_m, num_classes, exists, HOLDS_ALL)
    tl.store(uncertainty_ptr + image * num_locations + location, uncertainty, mask=exists)
    gate = 2.0 - uncertainty
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        offsets = _offsets(image, c, location, gated_stride_b, gated_stride_r, CHANNELS_LAST, VECTOR)
        gated = narrow(features.to(DTYPE) * gate[None, :], gated_ptr.dtype.element_ty)
        tl.store(gated_ptr + offsets, gated, mask=mask)
        c += BLOCK_C
        mask = _mask(c, location, channels, num_locations, CHANNELS_LAST, VECTOR)
        features = _load(
            *(features_ptr, image, c, location, features_stride_b, features_stride_r, mask),
            *(CHANNELS_LAST, VECTOR),
        )


def forward(
    features: Tensor, logits: Tensor, channels_last: bool, gated: Tensor, uncertainty: Tensor
) -> None:
    """Fill `gated` and `uncertainty`."""
    launch = choose_launch(features, channels_last)
    grid, sizes = _grid(features, logits, launch.block_l)
    strides = functools.partial(_strides, channels_last=channels_last)
    with on(features):
        run_kernel(
            entropy_gate_fwd_kernel,
            grid,
            (features, logits, gated, uncertainty),
            (*sizes, *strides(features), *logits.stride(), *strides(gated)),
            _options(channels_last, launch, logits.shape[1], features, gated),
        )


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
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
    HOLDS_ALL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The gradients of features and logits."""
    DTYPE: tl.constexpr = tl.float64 if features_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, location, exists = _place(num_locations, blocks, BLOCK_L)
    logits_ptrs = logits_ptr + image * logits_stride_b + location * logits_stride_l
    logits = _load_logits(logits_ptrs, 0, logits_stride_m, num_classes, exists, DTYPE, BLOCK_M)
    if HAS_GRAD_GATED:
        c = tl.arange(0, BLOCK_C)
        mask = _mask(c, location, channels, num_locations, CHANNELS_LAST, VECTOR)
        grad_gated = _load(
            *(grad_gated_ptr, image, c, location, grad_gated_stride_b, grad_gated_stride_r, mask),
            *(CHANNELS_LAST, VECTOR),
        )
        features = _load(
            *(features_ptr, image, c, location, features_stride_b, features_stride_r, mask),
            *(CHANNELS_LAST, VECTOR),
        )
    largest, inverse_total, mean, uncertainty = _softmax(
        logits, logits_ptrs, logits_stride_m, num_classes, exists, HOLDS_ALL
    )
    grad = tl.zeros_like(uncertainty)  # of u: the gate is 2 - u
    if HAS_GRAD_GATED:
        gate = 2.0 - uncertainty
        sums = tl.zeros((BLOCK_C, BLOCK_L), DTYPE)
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            offsets = _offsets(
                image, c, location, grad_features_stride_b, grad_features_stride_r, CHANNELS_LAST, VECTOR
            )
            sums += grad_gated.to(DTYPE) * features.to(DTYPE)
            grad_features = narrow(grad_gated.to(DTYPE) * gate[None, :], grad_features_ptr.dtype.element_ty)
            tl.store(grad_features_ptr + offsets, grad_features, mask=mask)
            c += BLOCK_C
            mask = _mask(c, location, channels, num_locations, CHANNELS_LAST, VECTOR)
            grad_gated = _load(
                *(grad_gated_ptr, image, c, location, grad_gated_stride_b, grad_gated_stride_r, mask),
                *(CHANNELS_LAST, VECTOR),
            )
            features = _load(
                *(features_ptr, image, c, location, features_stride_b, features_stride_r, mask),
                *(CHANNELS_LAST, VECTOR),
            )
        grad = -tl.sum(sums, axis=0)
    if HAS_GRAD_UNCERTAINTY:
        grad_ptrs = grad_uncertainty_ptr + image * grad_uncertainty_stride_b + location
        grad += tl.load(grad_ptrs, mask=exists, other=0.0)
    factor = grad * inverse_total / tl.log(num_classes.to(DTYPE))
    grad_logits_ptrs = grad_logits_ptr + image * grad_logits_stride_b + location * grad_logits_stride_l
    # Logits are read again, from a cache: what is kept for them takes the registers of other programs. Even
    # their addresses would be, if the compiler knew that this loop runs once.
    for first in range(0, num_classes, BLOCK_M):
        logits = _load_logits(logits_ptrs, first, logits_stride_m, num_classes, exists, DTYPE, BLOCK_M)
        t, exponentials = _exponentials(logits, largest)
        grad_logits = factor[None, :] * exponentials * (mean[None, :] - t)
        m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        tl.store(
            grad_logits_ptrs[None, :] + m[:, None] * grad_logits_stride_m,
            narrow(grad_logits, grad_logits_ptr.dtype.element_ty),
            mask=(m < num_classes)[:, None] & exists[None, :],
        )


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
    launch = choose_launch(features, channels_last)
    grid, sizes = _grid(features, logits, launch.block_l)
    strides = functools.partial(_strides, channels_last=channels_last)
    given_gated = features if grad_gated is None else grad_gated  # what is absent is not read
    given_uncertainty = features if grad_uncertainty is None else grad_uncertainty
    with on(features):
        run_kernel(
            entropy_gate_bwd_kernel,
            grid,
            (given_gated, given_uncertainty, features, logits, grad_features, grad_logits),
            (
                *sizes,
                *strides(given_gated),
                given_uncertainty.stride(0),
                *strides(features),
                *logits.stride(),
                *strides(grad_features),
                *grad_logits.stride(),
            ),
            {
                "HAS_GRAD_GATED": grad_gated is not None,
                "HAS_GRAD_UNCERTAINTY": grad_uncertainty is not None,
                **_options(channels_last, launch, logits.shape[1], given_gated, features, grad_features),
            },
        )


def choose_launch(features: Tensor, channels_last: bool) -> Launch:
    """Blocks of about the same size, of fewer locations and more channels where programs would be few."""
    images, channels, num_locations = features.shape
    all_channels = triton.next_power_of_2(max(channels, 1))
    elements = _BLOCK_ELEMENTS[features.element_size()]
    block_l = elements // min(all_channels, _BLOCK_CHANNELS) if channels_last else _BLOCK_LOCATIONS
    wanted = _PROGRAMS_PER_PROCESSOR * processors(features)
    while block_l > _SECTOR_BYTES // features.element_size() and (
        images * triton.cdiv(num_locations, block_l) < wanted
    ):
        block_l //= 2
    return Launch(min(elements // block_l, all_channels), block_l, num_warps=4)


def _strides(x: Tensor, channels_last: bool) -> tuple[int, int]:
    """From one image to the next, and as `_run_stride`."""
    return x.stride(0), _run_stride(x, channels_last)


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


def _grid(features: Tensor, logits: Tensor, block_l: int) -> tuple[tuple[int], tuple[int, ...]]:
    """The launch grid, and the sizes in the order of the kernels' arguments."""
    images, channels, num_locations = features.shape
    blocks = triton.cdiv(num_locations, block_l)
    return (images * blocks,), (channels, logits.shape[1], num_locations, blocks)


def _options(channels_last: bool, launch: Launch, classes: int, *features: Tensor) -> dict[str, Any]:
    """Constexprs and options of both kernels; `features` are all tensors that are moved in vectors."""
    return {
        "HOLDS_ALL": classes <= _HELD_CLASSES,
        "BLOCK_M": min(max(triton.next_power_of_2(classes), 4), _HELD_CLASSES),
        "CHANNELS_LAST": channels_last,
        "VECTOR": _vector(channels_last, *features),
        "BLOCK_C": launch.block_c,
        "BLOCK_L": launch.block_l,
        "num_warps": launch.num_warps,
        "enable_fp_fusion": True,
    }
