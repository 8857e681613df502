"""Packed rows: vectors as the kernels multiply them, and what goes with each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import narrow
from contrastseg_fast.kernels.pdcr import plan
from contrastseg_fast.kernels.pdcr.tiles import EXCLUDED, LOG2_E


class Packed(NamedTuple):
    """Vectors, ratios and sums of exponentials as the kernels over tiles read them."""

    rows: Tensor  # (B, P, width)
    scale: Tensor  # (B, P): 1 / length of the packed row, or EXCLUDED
    inverse_length: Tensor  # (B, P): 1 / |v|
    phi: Tensor  # (B, M, P): scaled ratios
    unit_sum: Tensor  # (B, width): S
    num_valid: Tensor  # (B,)
    z_term: Tensor | None  # (B, P): n / Z, or log2(Z / n) unless bounded; None in the forward pass


@triton.jit(do_not_specialize=["num_vectors", "num_classes", *(f"ratios_stride_{axis}" for axis in "bnm")])
def pdcr_rows_kernel(
    vectors_ptr,  # (B, N, C), any strides
    ratios_ptr,  # (B, N, M), any strides
    valid_ptr,  # (B, N) or None
    log_z_ptr,  # (B, N), or None in the forward pass
    num_valid_ptr,  # (B,)
    rows_ptr,  # (B, P, width)
    scale_ptr,  # (B, P)
    inverse_length_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    block_sums_ptr,  # (B, blocks, width)
    z_term_ptr,  # (B, P) or None
    num_vectors,
    padded,
    channels,
    width,
    num_classes,
    vectors_stride_b,
    vectors_stride_n,
    vectors_stride_c,
    ratios_stride_b,
    ratios_stride_n,
    ratios_stride_m,
    phi_scale,
    UNIT: tl.constexpr,  # whether to pack v / |v|, with scale 1
    BOUNDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Packs the rows of one block, and sums their unit vectors."""
    block = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    included = n < num_vectors
    if valid_ptr is not None:
        included = included & (tl.load(valid_ptr + image * num_vectors + n, included, 0) != 0)
    vector_ptrs = vectors_ptr + image * vectors_stride_b + n.to(tl.int64) * vectors_stride_n  # [BLOCK_N]

    largest = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = included[:, None] & (c < channels)[None, :]  # [BLOCK_N, BLOCK_C]
        v = tl.load(vector_ptrs[:, None] + c.to(tl.int64)[None, :] * vectors_stride_c, mask, 0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(v), 1))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    shrink = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)  # 2^-k: |entries| < 4

    square = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = included[:, None] & (c < channels)[None, :]
        v = tl.load(vector_ptrs[:, None] + c.to(tl.int64)[None, :] * vectors_stride_c, mask, 0).to(tl.float32)
        v = v * shrink[:, None]
        square += tl.sum(v * v, 1)
    length = tl.sqrt_rn(square)
    exponent = (length.to(tl.int32, bitcast=True) >> 23) & 0xFF
    shrink_more = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)  # 1 <= |v''| < 2
    scale = tl.where(square == 0, 0.0, tl.div_rn(1.0, tl.where(square == 0, 1.0, length * shrink_more)))

    for first in range(0, width, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = included[:, None] & (c < channels)[None, :]
        v = tl.load(vector_ptrs[:, None] + c.to(tl.int64)[None, :] * vectors_stride_c, mask, 0).to(tl.float32)
        row = v * shrink[:, None] * shrink_more[:, None]
        unit = row * scale[:, None]
        if UNIT:
            row = unit
        row_ptrs = rows_ptr + (image * padded + n)[:, None] * width + c[None, :]
        in_width = (c < width)[None, :]
        tl.store(row_ptrs, narrow(row, rows_ptr.dtype.element_ty), in_width & (n < padded)[:, None])
        sum_ptrs = block_sums_ptr + (image * tl.num_programs(0) + block) * width + c
        tl.store(sum_ptrs, tl.sum(unit, 0), c < width)

    inverse_length = tl.where(square == 0, 0.0, scale * (shrink * shrink_more))
    if UNIT:
        scale = tl.where(square == 0, 0.0, 1.0)
    tl.store(scale_ptr + image * padded + n, tl.where(included, scale, EXCLUDED), n < padded)
    inverse_length = tl.where(included, inverse_length, 0.0)
    tl.store(inverse_length_ptr + image * padded + n, inverse_length, n < padded)
    ratio_ptrs = ratios_ptr + image * ratios_stride_b + n.to(tl.int64) * ratios_stride_n
    class_ptr = phi_ptr + image * num_classes * padded
    for _ in range(num_classes):
        phi = tl.load(ratio_ptrs, included, 0).to(tl.float32)
        tl.store(class_ptr + n, phi * phi_scale, n < padded)
        ratio_ptrs += ratios_stride_m
        class_ptr += padded
    if log_z_ptr is not None:
        log_z = tl.load(log_z_ptr + image * num_vectors + n, included, 0)
        num_valid = tl.load(num_valid_ptr + image).to(tl.float32)
        if BOUNDED:
            z_term = tl.where(included, num_valid * tl.exp(-log_z), 0.0)
        else:
            z_term = tl.where(included, log_z * LOG2_E - tl.log2(num_valid), float("inf"))
        tl.store(z_term_ptr + image * padded + n, z_term, n < padded)


def pack(
    vectors: Tensor, ratios: Tensor, valid: Tensor | None, terms: plan.Terms, log_z: Tensor | None = None
) -> Packed:
    """Pack vectors `(B, N, C)` and what goes with them; the backward pass gives `log_z` `(B, N)`."""
    batch, padded, width = plan.packed_shape(vectors)
    num_classes = ratios.shape[-1]
    if valid is None:
        num_valid = torch.full((batch,), vectors.shape[1], dtype=torch.int64, device=vectors.device)
    else:
        valid = valid.contiguous()
        num_valid = valid.sum(1)
    blocks = triton.cdiv(padded, plan.ROWS.block_n)
    rows = vectors.new_empty(batch, padded, width)
    scale, inverse_length = (vectors.new_empty(batch, padded, dtype=torch.float32) for _ in range(2))
    z_term = None if log_z is None else torch.empty_like(scale)
    phi = vectors.new_empty(batch, num_classes, padded, dtype=torch.float32)
    block_sums = vectors.new_empty(batch, blocks, width, dtype=torch.float32)
    pdcr_rows_kernel[(blocks, batch)](
        vectors_ptr=vectors,
        ratios_ptr=ratios,
        valid_ptr=None if valid is None else valid.view(torch.uint8),
        log_z_ptr=log_z,
        num_valid_ptr=num_valid,
        rows_ptr=rows,
        scale_ptr=scale,
        inverse_length_ptr=inverse_length,
        phi_ptr=phi,
        block_sums_ptr=block_sums,
        z_term_ptr=z_term,
        num_vectors=vectors.shape[1],
        padded=padded,
        channels=vectors.shape[2],
        width=width,
        num_classes=num_classes,
        vectors_stride_b=vectors.stride(0),
        vectors_stride_n=vectors.stride(1),
        vectors_stride_c=vectors.stride(2),
        ratios_stride_b=ratios.stride(0),
        ratios_stride_n=ratios.stride(1),
        ratios_stride_m=ratios.stride(2),
        phi_scale=terms.phi_scale,
        UNIT=vectors.dtype == torch.float32,
        BOUNDED=terms.bounded,
        **plan.row_options(),
    )
    return Packed(rows, scale, inverse_length, phi, block_sums.sum(1), num_valid, z_term)
