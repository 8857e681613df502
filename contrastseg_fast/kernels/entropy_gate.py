"""The entropy gate (Eqs. 8 to 10) in Triton, for cards without the compiled CUDA kernels.

Tensors are `(B, channels, locations)`: features, their gradients and the gated features have adjoining
channels (`channels_last`) or adjoining locations; logits may have any strides. A program owns some locations
of one image: their uncertainty first, then their channels, a block at a time. The formulas are those of
csrc/entropy_gate_math.h.
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
_SIZES = ("C", "M", "L", "tiles")
_STRIDES = ("x_b", "x_run", "z_b", "z_m", "z_l", "y_b", "y_run")
_GRAD_STRIDES = ("g_b", "g_run", "du_b", "dz_b", "dz_m", "dz_l")


@triton.jit
def _softmax(p_z, z_m, M, mask, S: tl.constexpr):
    """Of every location: the largest logit, 1 / sum, mean of t = z - largest, and the uncertainty."""
    lowest: tl.constexpr = -708.0 if tl.float64 == S else -87.0
    v_largest = tl.load(p_z, mask=mask, other=0.0).to(S)  # [BLOCK_L]
    for m in range(1, M):
        v_z = tl.load(p_z + m * z_m, mask=mask, other=0.0).to(S)
        v_largest = tl.where(v_z > v_largest, v_z, v_largest)
    # The largest logits add 1 each to `ones`: `rest` keeps what rounding their sum would lose.
    v_ones = tl.zeros_like(v_largest)
    v_rest = tl.zeros_like(v_largest)
    v_weighted = tl.zeros_like(v_largest)
    for m in range(M):
        v_t = tl.load(p_z + m * z_m, mask=mask, other=0.0).to(S) - v_largest
        v_t = tl.where(v_t < lowest, lowest, v_t)
        v_e = tl.where(v_t <= lowest, 0.0, tl.exp(v_t))
        v_ones += tl.where(v_t == 0.0, v_e, 0.0)
        v_rest += tl.where(v_t == 0.0, 0.0, v_e)
        v_weighted += v_e * v_t
    v_sum = v_ones + v_rest
    v_inverse = 1.0 / v_sum
    v_mean = v_weighted * v_inverse
    v_log_sum = tl.log(v_sum) + (v_rest - (v_sum - v_ones)) * v_inverse
    v_u = (v_log_sum - v_mean) / tl.log(M.to(S))
    return v_largest, v_inverse, v_mean, tl.where(v_u > 1.0, 1.0, v_u)


@triton.jit
def _place(L, tiles, BLOCK_L: tl.constexpr):
    """Image, locations [BLOCK_L], and which of them there are."""
    program = tl.program_id(0).to(tl.int64)
    v_l = (program % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    return program // tiles, v_l, v_l < L


@triton.jit
def _offsets(image, v_c, v_l, stride, run, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Of features, [BLOCK_C, BLOCK_L]; every VECTOR of them that adjoin begin at a multiple of VECTOR."""
    if CHANNELS_LAST:
        offsets = image * stride + v_l[None, :] * run + v_c[:, None]
        return tl.multiple_of(offsets, (VECTOR, 1))
    offsets = image * stride + v_c[:, None].to(tl.int64) * run + v_l[None, :]
    return tl.multiple_of(offsets, (1, VECTOR))


@triton.jit
def _mask(v_c, v_l, C, L, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Which features there are, [BLOCK_C, BLOCK_L]; the quotients tell that it is all of a vector or none."""
    if CHANNELS_LAST:
        return (v_c // VECTOR < C // VECTOR)[:, None] & (v_l < L)[None, :]
    return (v_c < C)[:, None] & (v_l // VECTOR < L // VECTOR)[None, :]


@triton.jit(do_not_specialize=(*_SIZES, *_STRIDES))
def entropy_gate_fwd_kernel(
    p_x,
    p_z,
    p_y,
    p_u,
    C,
    M,
    L,
    tiles,
    x_b,
    x_run,
    z_b,
    z_m,
    z_l,
    y_b,
    y_run,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    S: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    image, v_l, mask_l = _place(L, tiles, BLOCK_L)
    _, _, _, v_u = _softmax(p_z + image * z_b + v_l * z_l, z_m, M, mask_l, S)
    tl.store(p_u + image * L + v_l, v_u, mask=mask_l)
    v_gate = 2.0 - v_u
    for c in range(0, C, BLOCK_C):
        v_c = c + tl.arange(0, BLOCK_C)
        mask = _mask(v_c, v_l, C, L, CHANNELS_LAST, VECTOR)
        v_x = tl.load(
            p_x + _offsets(image, v_c, v_l, x_b, x_run, CHANNELS_LAST, VECTOR), mask=mask, other=0.0
        )
        p_out = p_y + _offsets(image, v_c, v_l, y_b, y_run, CHANNELS_LAST, VECTOR)
        tl.store(p_out, narrow(v_x.to(S) * v_gate[None, :], p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=(*_SIZES, *_STRIDES, *_GRAD_STRIDES))
def entropy_gate_bwd_kernel(
    p_g,
    p_du,
    p_x,
    p_z,
    p_y,
    p_dz,
    C,
    M,
    L,
    tiles,
    g_b,
    g_run,
    du_b,
    x_b,
    x_run,
    z_b,
    z_m,
    z_l,
    y_b,
    y_run,
    dz_b,
    dz_m,
    dz_l,
    HAS_GRAD: tl.constexpr,
    HAS_GRAD_U: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    S: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    lowest: tl.constexpr = -708.0 if tl.float64 == S else -87.0
    image, v_l, mask_l = _place(L, tiles, BLOCK_L)
    p_logits = p_z + image * z_b + v_l * z_l
    v_largest, v_inverse, v_mean, v_u = _softmax(p_logits, z_m, M, mask_l, S)
    v_grad = tl.zeros_like(v_u)  # of u: the gate is 2 - u
    if HAS_GRAD:
        v_gate = 2.0 - v_u
        v_sums = tl.zeros((BLOCK_C, BLOCK_L), S)
        for c in range(0, C, BLOCK_C):
            v_c = c + tl.arange(0, BLOCK_C)
            mask = _mask(v_c, v_l, C, L, CHANNELS_LAST, VECTOR)
            v_g = tl.load(
                p_g + _offsets(image, v_c, v_l, g_b, g_run, CHANNELS_LAST, VECTOR), mask=mask, other=0.0
            )
            v_x = tl.load(
                p_x + _offsets(image, v_c, v_l, x_b, x_run, CHANNELS_LAST, VECTOR), mask=mask, other=0.0
            )
            v_g = v_g.to(S)
            v_sums += v_g * v_x.to(S)
            p_out = p_y + _offsets(image, v_c, v_l, y_b, y_run, CHANNELS_LAST, VECTOR)
            tl.store(p_out, narrow(v_g * v_gate[None, :], p_y.dtype.element_ty), mask=mask)
        v_grad = -tl.sum(v_sums, axis=0)
    if HAS_GRAD_U:
        v_grad += tl.load(p_du + image * du_b + v_l, mask=mask_l, other=0.0)
    v_scale = v_grad * v_inverse / tl.log(M.to(S))
    for m in range(M):
        v_t = tl.load(p_logits + m * z_m, mask=mask_l, other=0.0).to(S) - v_largest
        v_t = tl.where(v_t < lowest, lowest, v_t)
        v_e = tl.where(v_t <= lowest, 0.0, tl.exp(v_t))
        v_dz = v_scale * v_e * (v_mean - v_t)
        p_out = p_dz + image * dz_b + v_l * dz_l + m * dz_m
        tl.store(p_out, narrow(v_dz, p_dz.dtype.element_ty), mask=mask_l)


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


def _grid(x: Tensor, block_l: int) -> tuple[tuple[int], dict[str, int]]:
    """The launch grid, and the locations' blocks of an image."""
    tiles = triton.cdiv(x.shape[2], block_l)
    return (x.shape[0] * tiles,), {"C": x.shape[1], "L": x.shape[2], "tiles": tiles}


def _options(channels_last: bool, launch: Launch, *features: Tensor) -> dict[str, Any]:
    return {
        "CHANNELS_LAST": channels_last,
        "VECTOR": _vector(channels_last, *features),
        "BLOCK_C": launch.block_c,
        "BLOCK_L": launch.block_l,
        "num_warps": launch.num_warps,
        "enable_fp_fusion": True,
    }


def forward(x: Tensor, z: Tensor, channels_last: bool, gated: Tensor, uncertainty: Tensor) -> None:
    """Fill `gated` and `uncertainty` from features `x` and logits `z`."""
    launch = LAUNCHES[channels_last][x.element_size()]
    grid, sizes = _grid(x, launch.block_l)
    with on(x):
        entropy_gate_fwd_kernel[grid](
            p_x=x,
            p_z=z,
            p_y=gated,
            p_u=uncertainty,
            **sizes,
            M=z.shape[1],
            x_b=x.stride(0),
            x_run=_run_stride(x, channels_last),
            z_b=z.stride(0),
            z_m=z.stride(1),
            z_l=z.stride(2),
            y_b=gated.stride(0),
            y_run=_run_stride(gated, channels_last),
            **_options(channels_last, launch, x, gated),
        )


def backward(
    grad_gated: Tensor | None,
    grad_uncertainty: Tensor | None,
    x: Tensor,
    z: Tensor,
    channels_last: bool,
    grad_x: Tensor,
    grad_z: Tensor,
) -> None:
    """Fill `grad_x`, unless there is no `grad_gated`, and `grad_z`."""
    launch = LAUNCHES[channels_last][x.element_size()]
    grid, sizes = _grid(x, launch.block_l)
    g = x if grad_gated is None else grad_gated  # what is absent is not read
    du = x if grad_uncertainty is None else grad_uncertainty
    with on(x):
        entropy_gate_bwd_kernel[grid](
            p_g=g,
            p_du=du,
            p_x=x,
            p_z=z,
            p_y=grad_x,
            p_dz=grad_z,
            **sizes,
            M=z.shape[1],
            g_b=g.stride(0),
            g_run=_run_stride(g, channels_last),
            du_b=du.stride(0),
            x_b=x.stride(0),
            x_run=_run_stride(x, channels_last),
            z_b=z.stride(0),
            z_m=z.stride(1),
            z_l=z.stride(2),
            y_b=grad_x.stride(0),
            y_run=_run_stride(grad_x, channels_last),
            dz_b=grad_z.stride(0),
            dz_m=grad_z.stride(1),
            dz_l=grad_z.stride(2),
            HAS_GRAD=grad_gated is not None,
            HAS_GRAD_U=grad_uncertainty is not None,
            **_options(channels_last, launch, g, x, grad_x),
        )
