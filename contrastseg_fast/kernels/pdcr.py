"""PDCR on a GPU: the loss of every image and its gradient, from tiles of similarities that are never stored.

What is computed, with `u = v / |v|`, `x_ij = u_i . u_j - shift`, distances `d_ij`, and exponents base 2:

    t_ij = x_ij (den_bias + den_slope d_ij) log2(e) / tau        Z_i = sum_j 2^t_ij
    loss = ( n sum_i log Z_i - 1/tau (num_bias (|S|^2 - shift n^2) + num_slope sum_ij x_ij d_ij) ) / n^2
    g_i  = sum_j [ n (den_bias + den_slope d_ij) 2^t_ij (1/Z_i + 1/Z_j) - 2 num_slope d_ij ] u_j
           - 2 num_bias S

where `S = sum_j u_j` stands for the constant part of the numerator's weights: no tile has to form it. In the
paper's form t and the bracket vanish where d = 0, so tiles of equal ratios are left out, exactly. In other
forms the last term goes into the bracket, which it nearly cancels.

16-bit vectors of up to 256 channels go through fused kernels (tensor cores, epilogue in registers). All
others go through panels: cuBLAS writes some rows of similarities, a kernel turns them into powers or pair
weights, cuBLAS multiplies. The forward pass visits the pairs (i, j) and (j, i) together, and so do the
backward panels; the fused backward kernel owns whole rows. Only the forward pass has float atomics, and not
where deterministic algorithms are asked for, nor where sums of powers need a running maximum.

Rows are multiplied as `v'' = v 2^-k` with k such that 1 <= |v''| < 2, which is exact in 16 bits, and
`scale = 1 / |v''|` is applied to the products in fp32. A negative scale marks a row that takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels._common import dot, dot_add, narrow, on, processors, sm_table

LOG2_E = math.log2(math.e)
_PAD = 128  # rows are padded to a multiple of every BLOCK_I and BLOCK_J
_WIDEST_FUSED = 256  # channels
_UNROLLED_CLASSES = 4
_LARGEST_EXPONENT = 85.0  # of e; sums of that many powers stay finite in fp32
_PANEL_BYTES = (16 << 20, 64 << 20)  # least and most, for the similarities of one panel

SORT_FROM = 8192  # vectors of an image; below, finding tiles of equal ratios costs more than it saves


class Launch(NamedTuple):
    """Tile sizes and launch options of one kernel."""

    block_i: int
    block_j: int
    num_warps: int
    num_stages: int


# By compute capability; then whether the mode is the paper's (plain exponents, at most two classes, no
# running maximum), which takes the fewest registers; then by padded channels: the next larger entry serves.
FORWARD = {
    80: {
        True: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
        False: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
    },
    90: {
        True: {64: Launch(128, 128, 8, 3), 256: Launch(128, 128, 8, 2)},
        False: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
    },
    100: {
        True: {64: Launch(128, 128, 8, 3), 256: Launch(128, 128, 8, 2)},
        False: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
    },
}
BACKWARD = {
    80: {
        True: {64: Launch(128, 64, 8, 3), 128: Launch(64, 64, 4, 2), 256: Launch(64, 64, 8, 2)},
        False: {128: Launch(64, 64, 4, 2), 256: Launch(64, 64, 8, 2)},
    },
    90: {
        True: {64: Launch(128, 128, 8, 3), 128: Launch(128, 128, 8, 2), 256: Launch(128, 64, 8, 3)},
        False: {128: Launch(128, 64, 8, 2), 256: Launch(128, 32, 8, 2)},
    },
    100: {
        True: {128: Launch(128, 64, 8, 2), 256: Launch(128, 64, 8, 2)},
        False: {128: Launch(128, 64, 8, 2), 256: Launch(128, 64, 8, 2)},
    },
}
PANEL_FORWARD = Launch(32, 128, 4, 1)
PANEL_PAIRS = Launch(32, 128, 4, 1)
ROWS = (16, 128, 4)  # rows and channels of a program, warps


@triton.jit(do_not_specialize=["num_vectors", "num_classes", "vectors_stride_b", "ratios_stride_b"])
def pdcr_rows_kernel(
    vectors_ptr,  # (B, N, C), any strides
    ratios_ptr,  # (B, N, M), any strides
    valid_ptr,  # (B, N) or None
    order_ptr,  # (B, N) or None
    log_z_ptr,  # (B, N), or None in the forward pass
    count_ptr,  # (B,)
    rows_ptr,  # (B, P, width)
    scale_ptr,  # (B, P)
    inverse_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    sums_ptr,  # (B, blocks, width)
    z_ptr,  # (B, P) or None: n / Z, or log2(Z / n) if STABLE
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
    UNIT: tl.constexpr,  # whether to write v / |v|, with scale 1
    STABLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows as they are multiplied, 1 / |v|, scaled ratios by class, and sums of the unit vectors."""
    block = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = n < num_vectors
    source = n.to(tl.int64)
    if order_ptr is not None:
        source = tl.load(order_ptr + image * num_vectors + n, inside, 0).to(tl.int64)
    takes_part = inside
    if valid_ptr is not None:
        takes_part = inside & (tl.load(valid_ptr + image * num_vectors + source, inside, 0) != 0)
    vector_ptrs = vectors_ptr + image * vectors_stride_b + source * vectors_stride_n  # [BLOCK_N]

    largest = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = takes_part[:, None] & (c < channels)[None, :]  # [BLOCK_N, BLOCK_C]
        v = tl.load(vector_ptrs[:, None] + c.to(tl.int64)[None, :] * vectors_stride_c, mask, 0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(v), 1))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    shrink = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)  # 2^-k: |entries| < 4

    square = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = takes_part[:, None] & (c < channels)[None, :]
        v = tl.load(vector_ptrs[:, None] + c.to(tl.int64)[None, :] * vectors_stride_c, mask, 0).to(tl.float32)
        v = v * shrink[:, None]
        square += tl.sum(v * v, 1)
    length = tl.sqrt_rn(square)
    exponent = (length.to(tl.int32, bitcast=True) >> 23) & 0xFF
    shrink_more = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)  # 1 <= |v''| < 2
    scale = tl.where(square == 0, 0.0, tl.div_rn(1.0, tl.where(square == 0, 1.0, length * shrink_more)))

    for first in range(0, width, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = takes_part[:, None] & (c < channels)[None, :]
        v = tl.load(vector_ptrs[:, None] + c.to(tl.int64)[None, :] * vectors_stride_c, mask, 0).to(tl.float32)
        row = v * shrink[:, None] * shrink_more[:, None]
        unit = row * scale[:, None]
        if UNIT:
            row = unit
        row_ptrs = rows_ptr + (image * padded + n)[:, None] * width + c[None, :]
        in_width = (c < width)[None, :]
        tl.store(row_ptrs, narrow(row, rows_ptr.dtype.element_ty), in_width & (n < padded)[:, None])
        sum_ptrs = sums_ptr + (image * tl.num_programs(0) + block) * width + c
        tl.store(sum_ptrs, tl.sum(unit, 0), c < width)

    inverse = tl.where(square == 0, 0.0, scale * (shrink * shrink_more))
    if UNIT:
        scale = tl.where(square == 0, 0.0, 1.0)
    tl.store(scale_ptr + image * padded + n, tl.where(takes_part, scale, -1.0), n < padded)
    tl.store(inverse_ptr + image * padded + n, tl.where(takes_part, inverse, 0.0), n < padded)
    ratio_ptrs = ratios_ptr + image * ratios_stride_b + source * ratios_stride_n
    class_ptr = phi_ptr + image * num_classes * padded
    for _ in range(num_classes):
        phi = tl.load(ratio_ptrs, takes_part, 0).to(tl.float32)
        phi = tl.where(takes_part, phi * phi_scale, -1.0)  # equal to no vector that takes part
        tl.store(class_ptr + n, phi, n < padded)
        ratio_ptrs += ratios_stride_m
        class_ptr += padded
    if log_z_ptr is not None:
        log_z = tl.load(log_z_ptr + image * num_vectors + source, takes_part, 0)
        count = tl.load(count_ptr + image).to(tl.float32)
        if STABLE:
            z = tl.where(takes_part, log_z * 1.4426950408889634 - tl.log2(count), float("inf"))
        else:
            z = tl.where(takes_part, count * tl.exp(-log_z), 0.0)
        tl.store(z_ptr + image * padded + n, z, n < padded)


@triton.jit
def _distance(phi_ptr, i, j, padded, num_classes, CLASSES: tl.constexpr, CATEGORICAL: tl.constexpr, unequal):
    """Scaled class distances of a tile; `CLASSES` = 0 loops at run time."""
    if CATEGORICAL:
        differ = tl.load(phi_ptr + i)[:, None] != tl.load(phi_ptr + j)[None, :]  # [BLOCK_I, BLOCK_J]
        distance = tl.where(differ, unequal, 0.0)
    elif CLASSES > 0:
        distance = tl.abs(tl.load(phi_ptr + i)[:, None] - tl.load(phi_ptr + j)[None, :])
        for m in tl.static_range(1, CLASSES):
            phi_i = tl.load(phi_ptr + m * padded + i)  # [BLOCK_I]
            phi_j = tl.load(phi_ptr + m * padded + j)  # [BLOCK_J]
            distance += tl.abs(phi_i[:, None] - phi_j[None, :])
    else:
        distance = tl.abs(tl.load(phi_ptr + i)[:, None] - tl.load(phi_ptr + j)[None, :])
        for _ in range(1, num_classes):
            phi_ptr += padded
            distance += tl.abs(tl.load(phi_ptr + i)[:, None] - tl.load(phi_ptr + j)[None, :])
    return distance


@triton.jit
def _exponent(similarity, distance, bias, slope, shift, PLAIN: tl.constexpr):
    """t of a tile, and x d up to a constant factor."""
    if PLAIN:
        t = similarity * distance
        return t, t
    x = similarity - shift
    return x * (bias + slope * distance), x * distance


@triton.jit
def _skipped(runs_ptr, index, start, stop):
    """The column tiles within [start, stop) whose ratios all equal those of a row tile."""
    first = tl.minimum(tl.maximum(tl.load(runs_ptr + 2 * index), start), stop)
    last = tl.minimum(tl.maximum(tl.load(runs_ptr + 2 * index + 1), first), stop)
    return first, last


@triton.jit(do_not_specialize=["first_tile", "first_column", "num_classes", "tiles_per_program"])
def pdcr_fwd_kernel(
    rows_ptr,  # (B, P, WIDTH), or None: similarities come from panel_ptr
    panel_ptr,  # (B, panel rows, P - first_column) or None
    scale_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    runs_ptr,  # (B, row tiles, 2) or None
    order_ptr,  # (B, N) or None; with it, vectors that take no part come last
    count_ptr,  # (B,)
    z_ptr,  # (B, P): sums of powers; log2 of them unless SYMMETRIC
    attraction_ptr,  # (B, row tiles, chunks), 0 where no program writes
    first_tile,
    first_column,  # of the panel, a multiple of BLOCK_J
    padded,
    panel_stride_b,
    panel_stride_n,
    num_classes,
    tiles_per_program,
    bias,
    slope,
    shift,
    unequal,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Sums of powers and the weighted similarities of a row tile with a chunk of column tiles."""
    tile = tl.program_id(0) + first_tile
    chunk = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    scale_ptr += image * padded
    phi_ptr += image * num_classes * padded
    z_ptr += image * padded
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    scale_i = tl.load(scale_ptr + i)  # [BLOCK_I]
    part_i = tl.where(scale_i < 0, 0.0, 1.0)

    stop = padded // BLOCK_J
    if order_ptr is not None:
        stop = tl.cdiv(tl.load(count_ptr + image), BLOCK_J).to(tl.int32)
    start = chunk * tiles_per_program
    if SYMMETRIC:
        start += tile * BLOCK_I // BLOCK_J
    if start >= stop:
        return
    stop = tl.minimum(stop, start + tiles_per_program)
    first_skipped, num_skipped = stop, 0
    if runs_ptr is not None:
        index = image * (padded // BLOCK_I) + tile
        first_skipped, last_skipped = _skipped(runs_ptr, index, start, stop)
        num_skipped = last_skipped - first_skipped

    if rows_ptr is not None:
        c = tl.arange(0, WIDTH)
        rows_ptr += image * padded * WIDTH
        rows_i = tl.load(
            rows_ptr
            + tile.to(tl.int64) * (BLOCK_I * WIDTH)
            + tl.arange(0, BLOCK_I)[:, None] * WIDTH
            + c[None, :]
        )  # [BLOCK_I, WIDTH]
    else:
        panel_ptr += (
            image * panel_stride_b + (i - first_tile * BLOCK_I).to(tl.int64)[:, None] * panel_stride_n
        )

    total = tl.zeros([BLOCK_I], tl.float32)
    highest = tl.full([BLOCK_I], float("-inf"), tl.float32)
    attraction = tl.zeros([BLOCK_I], tl.float32)
    for step in range(start, stop - num_skipped):
        column_tile = step + tl.where(step >= first_skipped, num_skipped, 0)
        j = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        scale_j = tl.load(scale_ptr + j)  # [BLOCK_J]
        part_j = tl.where(scale_j < 0, 0.0, 1.0)
        if rows_ptr is not None:
            rows_j = tl.load(
                rows_ptr
                + column_tile.to(tl.int64) * (BLOCK_J * WIDTH)
                + tl.arange(0, BLOCK_J)[:, None] * WIDTH
                + c[None, :]
            )  # [BLOCK_J, WIDTH]
            product = dot(rows_i, tl.trans(rows_j))  # [BLOCK_I, BLOCK_J]
        else:
            product = tl.load(panel_ptr + (j - first_column)[None, :])
        similarity = product * scale_i[:, None] * scale_j[None, :]
        distance = _distance(phi_ptr, i, j, padded, num_classes, CLASSES, CATEGORICAL, unequal)
        t, weighted = _exponent(similarity, distance, bias, slope, shift, PLAIN)
        if SYMMETRIC:
            powers = tl.exp2(t)
            total += tl.sum(powers * part_j[None, :], 1)
            if column_tile * BLOCK_J >= (tile + 1) * BLOCK_I:
                tl.atomic_add(z_ptr + j, tl.sum(powers * part_i[:, None], 0), sem="relaxed")
                part_j *= 2.0
        else:
            t = tl.where(part_j[None, :] > 0, t, float("-inf"))
            reached = tl.maximum(highest, tl.max(t, 1))
            base = tl.where(reached == float("-inf"), 0.0, reached)
            total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(t - base[:, None]), 1)
            highest = reached
        attraction += tl.sum(weighted * part_j[None, :], 1)

    attraction_ptr += (image * (padded // BLOCK_I) + tile) * tl.num_programs(1) + chunk
    tl.store(attraction_ptr, tl.sum(attraction * part_i, 0))
    if runs_ptr is not None:
        every = tl.load(runs_ptr + 2 * index + 1) - tl.load(runs_ptr + 2 * index)
        skipped = tl.where(chunk == 0, every * BLOCK_J, 0).to(
            tl.float32
        )  # pairs of exponent 0, on either side
        if SYMMETRIC:
            total += skipped
        else:
            reached = tl.where(skipped > 0, tl.maximum(highest, 0.0), highest)
            base = tl.where(reached == float("-inf"), 0.0, reached)
            total = total * tl.exp2(highest - base) + skipped * tl.exp2(-base)
            highest = reached
    if SYMMETRIC:
        tl.atomic_add(z_ptr + i, total, sem="relaxed")
    else:
        tl.store(z_ptr + i, highest + tl.log2(total))


@triton.jit(do_not_specialize=["num_vectors", "num_parts"])
def pdcr_loss_kernel(
    z_ptr,  # (B, P)
    scale_ptr,  # (B, P)
    order_ptr,  # (B, N) or None
    count_ptr,  # (B,)
    sums_ptr,  # (B, width)
    attraction_ptr,  # (B, parts)
    loss_ptr,  # (B,)
    log_z_ptr,  # (B, N)
    num_vectors,
    padded,
    width,
    num_parts,
    inverse_temperature,
    num_bias,
    attraction_scale,
    shift,
    LOGGED: tl.constexpr,  # whether z is log2 of the sums
    BLOCK: tl.constexpr,
):
    """log Z in the order of the vectors, and the loss of one image, summed in fp64."""
    image = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + image).to(tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_vectors, BLOCK):
        n = first + tl.arange(0, BLOCK)
        inside = n < num_vectors
        takes_part = tl.load(scale_ptr + image * padded + n, inside, -1.0) >= 0
        z = tl.load(z_ptr + image * padded + n, takes_part, 1.0)
        log_z = z * 0.6931471805599453 if LOGGED else tl.log(z)
        log_z = tl.where(takes_part, log_z, 0.0)
        target = n.to(tl.int64)
        if order_ptr is not None:
            target = tl.load(order_ptr + image * num_vectors + n, inside, 0).to(tl.int64)
        tl.store(log_z_ptr + image * num_vectors + target, log_z, inside)
        total += log_z.to(tl.float64)
    attraction = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        values = tl.load(attraction_ptr + image * num_parts + part, part < num_parts, 0.0)
        attraction += values.to(tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        value = tl.load(sums_ptr + image * width + c, c < width, 0.0).to(tl.float64)
        square += value * value
    weights = num_bias * (tl.sum(square, 0) - shift * count * count) + attraction_scale * tl.sum(
        attraction, 0
    )
    loss = (count * tl.sum(total, 0) - inverse_temperature * weights) / tl.maximum(count * count, 1.0)
    tl.store(loss_ptr + image, tl.where(count > 0, loss, 0.0).to(tl.float32))


@triton.jit
def _pair_weight(
    product,
    distance,
    scale_i,
    scale_j,
    z_i,
    z_j,
    bias,
    slope,
    shift,
    pull,
    offset,
    PLAIN: tl.constexpr,
    STABLE: tl.constexpr,
):
    """The bracket of g times log2(e) / tau; z is n / Z, or log2(Z / n) if STABLE."""
    similarity = product * scale_i[:, None] * scale_j[None, :]
    t, _ = _exponent(similarity, distance, bias, slope, shift, PLAIN)
    if STABLE:
        share = tl.exp2(t - z_i[:, None]) + tl.exp2(t - z_j[None, :])
    else:
        share = tl.exp2(t) * (z_i[:, None] + z_j[None, :])
    if PLAIN:
        return distance * (share + pull) + offset
    return (bias + slope * distance) * share + (pull * distance + offset)


@triton.jit(do_not_specialize=["num_classes"])
def pdcr_bwd_kernel(
    rows_ptr,  # (B, P, WIDTH)
    scale_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    z_ptr,  # (B, P)
    runs_ptr,  # (B, row tiles, 2) or None
    order_ptr,  # (B, N) or None
    count_ptr,  # (B,)
    g_ptr,  # (B, P, WIDTH)
    padded,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    weight_scale,  # of the pair weights, before they are rounded
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    STABLE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """g times the scale of its row, for a row tile over all columns; without the constant part."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    scale_ptr += image * padded
    z_ptr += image * padded
    phi_ptr += image * num_classes * padded
    rows_ptr += image * padded * WIDTH
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tl.arange(0, WIDTH)
    rows_i = tl.load(
        rows_ptr + tile.to(tl.int64) * (BLOCK_I * WIDTH) + tl.arange(0, BLOCK_I)[:, None] * WIDTH + c[None, :]
    )  # [BLOCK_I, WIDTH]
    scale_i = tl.load(scale_ptr + i)  # [BLOCK_I]
    z_i = tl.load(z_ptr + i)  # [BLOCK_I]
    count = tl.load(count_ptr + image)
    stop = padded // BLOCK_J
    if order_ptr is not None:
        stop = tl.cdiv(count, BLOCK_J).to(tl.int32)
    first_skipped, num_skipped = stop, 0
    if runs_ptr is not None:
        first_skipped, last_skipped = _skipped(runs_ptr, image * (padded // BLOCK_I) + tile, 0, stop)
        num_skipped = last_skipped - first_skipped

    g = tl.zeros([BLOCK_I, WIDTH], tl.float32)
    for step in range(stop - num_skipped):
        column_tile = step + tl.where(step >= first_skipped, num_skipped, 0)
        j = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        scale_j = tl.load(scale_ptr + j)  # [BLOCK_J]
        z_j = tl.load(z_ptr + j)  # [BLOCK_J]
        rows_j = tl.load(
            rows_ptr
            + column_tile.to(tl.int64) * (BLOCK_J * WIDTH)
            + tl.arange(0, BLOCK_J)[:, None] * WIDTH
            + c[None, :]
        )  # [BLOCK_J, WIDTH]
        product = dot(rows_i, tl.trans(rows_j))  # [BLOCK_I, BLOCK_J]
        distance = _distance(phi_ptr, i, j, padded, num_classes, CLASSES, CATEGORICAL, unequal)
        weight = _pair_weight(
            product, distance, scale_i, scale_j, z_i, z_j, bias, slope, shift, pull, offset, PLAIN, STABLE
        )
        weight = weight * (scale_j * weight_scale)[None, :]
        g = dot_add(narrow(weight, rows_ptr.dtype.element_ty), rows_j, g)

    g_ptrs = g_ptr + (image * padded + i)[:, None] * WIDTH + c[None, :]
    tl.store(g_ptrs, g * scale_i[:, None])


@triton.jit(do_not_specialize=["first_row", "num_classes"])
def pdcr_pairs_kernel(
    panel_ptr,  # (B, panel rows, P - first_row), similarities
    weights_ptr,  # the same shape; may be panel_ptr
    scale_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    z_ptr,  # (B, P)
    first_row,
    padded,
    panel_stride_b,
    panel_stride_n,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    weight_scale,
    CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    STABLE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A panel's pair weights times the scales of both rows; its columns begin at its first row."""
    tile = tl.program_id(1)
    column_tile = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    scale_ptr += image * padded
    z_ptr += image * padded
    phi_ptr += image * num_classes * padded
    row = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    column = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
    offsets = image * panel_stride_b + row.to(tl.int64)[:, None] * panel_stride_n + column[None, :]
    i, j = first_row + row, first_row + column
    inside = (j < padded)[None, :]
    j = tl.minimum(j, padded - 1)
    scale_i, scale_j = tl.load(scale_ptr + i), tl.load(scale_ptr + j)
    z_i, z_j = tl.load(z_ptr + i), tl.load(z_ptr + j)
    product = tl.load(panel_ptr + offsets, inside, 0.0)  # [BLOCK_I, BLOCK_J]
    distance = _distance(phi_ptr, i, j, padded, num_classes, CLASSES, CATEGORICAL, unequal)
    weight = _pair_weight(
        product, distance, scale_i, scale_j, z_i, z_j, bias, slope, shift, pull, offset, PLAIN, STABLE
    )
    weight = weight * scale_i[:, None] * (scale_j * weight_scale)[None, :]
    tl.store(weights_ptr + offsets, narrow(weight, weights_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_vectors", "grad_stride"])
def pdcr_grad_kernel(
    g_ptr,  # (B, P, width), times the scale of the row
    rows_ptr,  # (B, P, width)
    scale_ptr,  # (B, P)
    inverse_ptr,  # (B, P)
    sums_ptr,  # (B, width)
    order_ptr,  # (B, N) or None
    count_ptr,  # (B,)
    grad_ptr,  # (B,), stride grad_stride
    out_ptr,  # (B, N, C)
    num_vectors,
    padded,
    channels,
    width,
    grad_stride,
    num_bias,
    row_scale,
    inverse_temperature,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of the vectors from g: what is along u goes, the rest is over |v|."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr + image * padded + n)  # [BLOCK_N]
    undo = row_scale * tl.where(scale > 0, 1 / tl.where(scale > 0, scale, 1.0), 0.0)
    offsets = (image * padded + n)[:, None] * width
    along = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (c < channels)[None, :]
        unit = tl.load(rows_ptr + offsets + c[None, :], mask, 0).to(tl.float32) * scale[:, None]
        everyone = tl.load(sums_ptr + image * width + c, c < channels, 0.0)
        g = (
            tl.load(g_ptr + offsets + c[None, :], mask, 0.0) * undo[:, None]
            - 2 * num_bias * everyone[None, :]
        )
        along += tl.sum(g * unit, 1)
    size = tl.load(count_ptr + image).to(tl.float32)
    factor = (
        tl.load(grad_ptr + image * grad_stride).to(tl.float32)
        * inverse_temperature
        / tl.maximum(size * size, 1.0)
    )
    inverse = tl.load(inverse_ptr + image * padded + n)  # [BLOCK_N]
    inside = n < num_vectors
    target = n.to(tl.int64)
    if order_ptr is not None:
        target = tl.load(order_ptr + image * num_vectors + n, inside, 0).to(tl.int64)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (c < channels)[None, :]
        unit = tl.load(rows_ptr + offsets + c[None, :], mask, 0).to(tl.float32) * scale[:, None]
        everyone = tl.load(sums_ptr + image * width + c, c < channels, 0.0)
        g = (
            tl.load(g_ptr + offsets + c[None, :], mask, 0.0) * undo[:, None]
            - 2 * num_bias * everyone[None, :]
        )
        g = (g - along[:, None] * unit) * factor * inverse[:, None]
        out_ptrs = out_ptr + (image * num_vectors + target)[:, None] * channels + c[None, :]
        tl.store(out_ptrs, narrow(g, out_ptr.dtype.element_ty), mask & inside[:, None])


class _Form(NamedTuple):
    """The operator's options as the kernels take them."""

    plain: bool  # t = x d log2(e) / tau, with that factor in the ratios
    stable: bool  # whether sums of powers could leave the range of fp32
    phi_scale: float
    bias: float
    slope: float
    unequal: float  # distance of different categories
    pull: float
    offset: float  # of the pair weights
    apart: float  # num_bias where it stays out of the pair weights
    factor: float  # log2(e) / tau
    attraction_scale: float


def _form(options: tuple[Any, ...], num_classes: int, num_vectors: int) -> _Form:
    temperature, distance_scale, categorical, num_bias, num_slope, den_bias, den_slope, shift = options
    farthest = 1.0 if categorical else distance_scale * num_classes
    weight = max(abs(den_bias), abs(den_bias + den_slope * farthest))
    largest = weight * (1 + abs(shift)) / temperature + math.log(max(num_vectors, 1))
    plain = den_bias == 0 and den_slope == 1 and shift == 0
    # Weights are rounded to 16 bits, so they should be small: most ratios are alike, most categories are not.
    apart = plain and not categorical
    factor = LOG2_E / temperature
    scale = factor if plain else 1.0
    return _Form(
        plain=plain,
        stable=not largest <= _LARGEST_EXPONENT,
        phi_scale=1.0 if categorical else distance_scale * scale,
        bias=den_bias * factor,
        slope=den_slope * factor,
        unequal=scale,
        pull=-2 * num_slope * (1.0 if plain else factor),
        offset=0.0 if apart else -2 * num_bias * factor,
        apart=num_bias if apart else 0.0,
        factor=factor,
        attraction_scale=num_slope / scale,
    )


def _weight_scale(dtype: torch.dtype, form: _Form, num_vectors: int) -> tuple[float, float]:
    """The factor of pair weights before they are rounded, so that fp16 holds them; and what undoes it."""
    largest = 2 * num_vectors * max(abs(form.bias), abs(form.bias + form.slope), form.factor) / form.factor
    shift = max(0, math.ceil(math.log2(max(largest, 1)) - 14)) if dtype == torch.float16 else 0
    return 2.0**-shift / form.factor, 2.0**shift


class _Prepared(NamedTuple):
    rows: Tensor  # (B, P, width)
    scale: Tensor  # (B, P)
    inverse: Tensor  # (B, P)
    phi: Tensor  # (B, M, P)
    sums: Tensor  # (B, width)
    num_valid: Tensor  # (B,)
    z: Tensor | None  # (B, P)
    order: Tensor | None  # (B, N)


def fused(vectors: Tensor) -> bool:
    """Whether the fused kernels take these vectors; else the panels do."""
    return vectors.dtype in (torch.float16, torch.bfloat16) and vectors.shape[2] <= _WIDEST_FUSED


def _sorted(vectors: Tensor, form: _Form) -> bool:
    return form.plain and form.offset == 0 and fused(vectors) and vectors.shape[1] >= SORT_FROM


def _order(ratios: Tensor, valid: Tensor | None) -> Tensor:
    """Vectors of equal ratios together, those that take no part last."""
    weights = torch.arange(2, ratios.shape[-1] + 2, device=ratios.device).sqrt()
    keys = (ratios * weights).sum(-1)
    if valid is not None:
        keys = keys.masked_fill(~valid, torch.inf)
    return keys.sort(dim=-1, stable=True).indices


def _runs(phi: Tensor, launch: Launch) -> Tensor:
    """For every row tile `(B, T, 2)` the column tiles [first, last) whose ratios all equal all of its own."""
    changes = (phi[..., 1:] != phi[..., :-1]).any(1)
    positions = torch.arange(1, phi.shape[-1], device=phi.device)
    starts = torch.nn.functional.pad(torch.where(changes, positions, 0), (1, 0)).cummax(-1).values
    first = starts[:, :: launch.block_i].contiguous()
    last = torch.searchsorted(starts, first, right=True)
    begin = torch.arange(0, phi.shape[-1], launch.block_i, device=phi.device)
    whole = (first <= begin) & (last >= begin + launch.block_i)
    # Whole row tiles only: a skipped pair is counted by the row tiles on either side of it.
    first, last = -(first // -launch.block_i), last // launch.block_i
    per_row_tile = launch.block_i // launch.block_j
    return torch.stack([first, torch.where(whole, last, first)], -1).mul(per_row_tile).int()


def _prepare(
    vectors: Tensor, ratios: Tensor, valid: Tensor | None, form: _Form, log_z: Tensor | None = None
) -> _Prepared:
    batch, num_vectors, channels = vectors.shape
    padded = _PAD * triton.cdiv(num_vectors, _PAD)
    width = max(16, triton.next_power_of_2(channels)) if fused(vectors) else 8 * triton.cdiv(channels, 8)
    num_classes = ratios.shape[-1]
    new = vectors.new_empty
    order = _order(ratios, valid) if _sorted(vectors, form) else None
    if valid is None:
        count = torch.full((batch,), num_vectors, dtype=torch.int64, device=vectors.device)
    else:
        valid = valid.contiguous()
        count = valid.sum(1)
    block_n, block_c, num_warps = ROWS
    blocks = triton.cdiv(padded, block_n)
    rows = new(batch, padded, width)
    scale, inverse = (new(batch, padded, dtype=torch.float32) for _ in range(2))
    z = None if log_z is None else torch.empty_like(scale)
    phi = new(batch, num_classes, padded, dtype=torch.float32)
    sums = new(batch, blocks, width, dtype=torch.float32)
    pdcr_rows_kernel[(blocks, batch)](
        vectors,
        ratios,
        None if valid is None else valid.view(torch.uint8),
        order,
        log_z,
        count,
        rows,
        scale,
        inverse,
        phi,
        sums,
        z,
        num_vectors,
        padded,
        channels,
        width,
        num_classes,
        *vectors.stride(),
        *ratios.stride(),
        form.phi_scale,
        UNIT=vectors.dtype == torch.float32,
        STABLE=form.stable,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    return _Prepared(rows, scale, inverse, phi, sums.sum(1), count, z, order)


def _launch(table: dict[int, dict[bool, dict[int, Launch]]], prepared: _Prepared, form: _Form) -> Launch:
    _, num_classes, _ = prepared.phi.shape
    lean = form.plain and num_classes <= 2 and not form.stable
    by_width = sm_table(table, prepared.rows)[lean]
    return by_width[min(width for width in by_width if width >= prepared.rows.shape[2])]


def _panels(prepared: _Prepared, first_column: Callable[[int], int]) -> Iterator[tuple[int, int, Tensor]]:
    """First row, first column and similarities `(B, rows, P - first column)` of every panel."""
    rows = prepared.rows
    batch, padded, width = rows.shape
    least, most = _PANEL_BYTES
    height = min(max(batch * padded * width * 4, least), most) // (4 * batch * padded)
    unit = _PAD if height >= _PAD else PANEL_FORWARD.block_i
    height = max(unit, height // unit * unit)
    for first in range(0, padded, height):
        column = first_column(first)
        yield first, column, _product(rows[:, first : first + height], rows[:, column:].mT)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product in fp32: of 16-bit operands, which are never rounded again."""
    if a.dtype == torch.float32:
        return a @ b
    if not a.is_cuda:
        return a.float() @ b.float()
    return torch.bmm(a, b, out_dtype=torch.float32)


def _add_product(sum: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == torch.float32:
        sum.baddbmm_(a, b)
    else:
        sum += _product(a, b)


@torch.no_grad()
def forward(vectors: Tensor, ratios: Tensor, valid: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """The kernel of the operator `pdcr_forward` (ops/pdcr.py); there is at least one number in `vectors`."""
    temperature, _, categorical, num_bias, _, _, _, shift = options
    batch, num_vectors, _ = vectors.shape
    num_classes = ratios.shape[-1]
    form = _form(options, num_classes, num_vectors)
    symmetric = not (form.stable or torch.are_deterministic_algorithms_enabled())
    loss = vectors.new_empty(batch, dtype=torch.float32)
    log_z = vectors.new_empty(batch, num_vectors, dtype=torch.float32)
    with on(vectors), torch.autocast(vectors.device.type, enabled=False):
        prepared = _prepare(vectors, ratios, valid, form)
        padded, width = prepared.rows.shape[1:]
        one_launch = fused(vectors)
        launch = (
            _launch(FORWARD, prepared, form._replace(stable=not symmetric)) if one_launch else PANEL_FORWARD
        )
        row_tiles, column_tiles = padded // launch.block_i, padded // launch.block_j
        per_program = column_tiles
        if symmetric:
            pairs = batch * row_tiles * (column_tiles + 1) // 2
            per_program = min(max(pairs // (8 * processors(vectors)), 1), 16)
        chunks = triton.cdiv(column_tiles, per_program)
        buffer = vectors.new_zeros(batch * (padded + row_tiles * chunks), dtype=torch.float32)
        z, attraction = buffer[: batch * padded], buffer[batch * padded :]
        runs = _runs(prepared.phi, launch) if prepared.order is not None else None

        def add(first: int, first_column: int, panel: Tensor | None) -> None:
            tiles = row_tiles if panel is None else panel.shape[1] // launch.block_i
            pdcr_fwd_kernel[(tiles, chunks, batch)](
                prepared.rows if panel is None else None,
                panel,
                prepared.scale,
                prepared.phi,
                runs,
                prepared.order,
                prepared.num_valid,
                z,
                attraction,
                first // launch.block_i,
                first_column,
                padded,
                0 if panel is None else panel.stride(0),
                0 if panel is None else panel.stride(1),
                num_classes,
                per_program,
                form.bias,
                form.slope,
                shift,
                form.unequal,
                WIDTH=width if one_launch else 0,
                CLASSES=num_classes if num_classes <= _UNROLLED_CLASSES else 0,
                CATEGORICAL=categorical,
                PLAIN=form.plain,
                SYMMETRIC=symmetric,
                BLOCK_I=launch.block_i,
                BLOCK_J=launch.block_j,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                enable_fp_fusion=True,
            )

        if one_launch:
            add(0, 0, None)
        else:
            block_j = launch.block_j
            for first, first_column, panel in _panels(
                prepared, lambda first: first // block_j * block_j if symmetric else 0
            ):
                add(first, first_column, panel)
        pdcr_loss_kernel[(batch,)](
            z,
            prepared.scale,
            prepared.order,
            prepared.num_valid,
            prepared.sums,
            attraction,
            loss,
            log_z,
            num_vectors,
            padded,
            width,
            row_tiles * chunks,
            1 / temperature,
            num_bias,
            form.attraction_scale,
            shift,
            LOGGED=not symmetric,
            BLOCK=1024,
        )
    return loss, log_z


def _add_panel(
    g: Tensor,
    first: int,
    panel: Tensor,
    prepared: _Prepared,
    weights: tuple[float, ...],
    weight_scale: float,
    modes: dict[str, Any],
) -> None:
    """Add to g what the pairs of a panel give to its rows, and to the rows behind it."""
    rows = prepared.rows
    batch, height, columns = panel.shape
    pairs = panel if rows.dtype == torch.float32 else panel.new_empty(panel.shape, dtype=rows.dtype)
    launch = PANEL_PAIRS
    pdcr_pairs_kernel[(triton.cdiv(columns, launch.block_j), height // launch.block_i, batch)](
        panel,
        pairs,
        prepared.scale,
        prepared.phi,
        prepared.z,
        first,
        rows.shape[1],
        panel.stride(0),
        panel.stride(1),
        prepared.phi.shape[1],
        *weights,
        weight_scale,
        **modes,
        BLOCK_I=launch.block_i,
        BLOCK_J=launch.block_j,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
    )
    last = first + height
    _add_product(g[:, first:last], pairs, rows[:, first:])
    if columns > height:
        _add_product(g[:, last:], pairs[:, :, height:].mT, rows[:, first:last])


@torch.no_grad()
def backward(
    grad: Tensor, log_z: Tensor, vectors: Tensor, ratios: Tensor, valid: Tensor | None, *options: Any
) -> Tensor:
    """The kernel of the operator `pdcr_backward` (ops/pdcr.py), likewise."""
    temperature, _, categorical, _, _, _, _, shift = options
    batch, num_vectors, channels = vectors.shape
    num_classes = ratios.shape[-1]
    form = _form(options, num_classes, num_vectors)
    out = vectors.new_empty(vectors.shape)
    weight_scale, row_scale = _weight_scale(vectors.dtype, form, num_vectors)
    with on(vectors), torch.autocast(vectors.device.type, enabled=False):
        prepared = _prepare(vectors, ratios, valid, form, log_z.contiguous())
        rows, scale, inverse, phi, sums, count, z, order = prepared
        padded, width = rows.shape[1:]
        modes = {
            "CLASSES": num_classes if num_classes <= _UNROLLED_CLASSES else 0,
            "CATEGORICAL": categorical,
            "PLAIN": form.plain,
            "STABLE": form.stable,
        }
        weights = (form.bias, form.slope, shift, form.unequal, form.pull, form.offset)
        if fused(vectors):
            g = vectors.new_empty(rows.shape, dtype=torch.float32)
            launch = _launch(BACKWARD, prepared, form)
            pdcr_bwd_kernel[(padded // launch.block_i, batch)](
                rows,
                scale,
                phi,
                z,
                _runs(phi, launch) if order is not None else None,
                order,
                count,
                g,
                padded,
                num_classes,
                *weights,
                weight_scale,
                WIDTH=width,
                **modes,
                BLOCK_I=launch.block_i,
                BLOCK_J=launch.block_j,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                enable_fp_fusion=True,
            )
        else:
            g = vectors.new_zeros(rows.shape, dtype=torch.float32)
            for first, _, panel in _panels(prepared, lambda first: first):
                _add_panel(g, first, panel, prepared, weights, weight_scale, modes)
        block_n, block_c, num_warps = ROWS
        pdcr_grad_kernel[(padded // block_n, batch)](
            g,
            rows,
            scale,
            inverse,
            sums,
            order,
            count,
            grad,
            out,
            num_vectors,
            padded,
            channels,
            width,
            grad.stride(0),
            form.apart,
            row_scale,
            1 / temperature,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return out
