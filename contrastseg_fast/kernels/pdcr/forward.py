"""The forward pass of PDCR: sums of exponentials of all rows, and the loss of every image."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.affinity import Affinity
from contrastseg_fast.kernels._common import dot, on
from contrastseg_fast.kernels._tuning import Launch
from contrastseg_fast.kernels.pdcr import plan, slabs
from contrastseg_fast.kernels.pdcr.rows import Packed, pack
from contrastseg_fast.kernels.pdcr.tiles import EXCLUDED, LN_2, distances, exponents, is_excluded, load_rows


@triton.jit
def _add_pairs(
    product,
    distance,
    scale_i,
    scale_j,
    z_ptrs,  # of the column tile's rows
    is_above,  # whether the column tile lies above the diagonal, so that it stands for two tiles
    total,
    highest,
    attraction,
    bias,
    slope,
    shift,
    PLAIN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Adds a tile to the sums of its row tile, [BLOCK_I] each, and to those of its columns if SYMMETRIC."""
    similarity = product * scale_i[:, None] * scale_j[None, :]  # [BLOCK_I, BLOCK_J]
    t, weighted = exponents(similarity, distance, bias, slope, shift, PLAIN)
    counts_j = tl.where(is_excluded(scale_j), 0.0, 1.0)  # [BLOCK_J]
    if SYMMETRIC:
        exponentials = tl.exp2(t)
        total += tl.sum(exponentials * counts_j[None, :], 1)
        if is_above:
            counts_i = tl.where(is_excluded(scale_i), 0.0, 1.0)  # [BLOCK_I]
            tl.atomic_add(z_ptrs, tl.sum(exponentials * counts_i[:, None], 0), sem="relaxed")
            counts_j *= 2.0
    else:
        t = tl.where(counts_j[None, :] > 0, t, float("-inf"))
        reached = tl.maximum(highest, tl.max(t, 1))
        base = tl.where(reached == float("-inf"), 0.0, reached)
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(t - base[:, None]), 1)
        highest = reached
    attraction += tl.sum(weighted * counts_j[None, :], 1)
    return total, highest, attraction


@triton.jit
def _store_sums(z_ptrs, attraction_ptr, scale_i, total, highest, attraction, SYMMETRIC: tl.constexpr):
    """Stores the sums of a row tile: `z_ptrs` of its rows, `attraction_ptr` of the tile."""
    tl.store(attraction_ptr, tl.sum(tl.where(is_excluded(scale_i), 0.0, attraction), 0))
    if SYMMETRIC:
        tl.atomic_add(z_ptrs, total, sem="relaxed")
    else:
        tl.store(z_ptrs, highest + tl.log2(total))


def _new_sums(
    packed: Packed, terms: plan.Terms, symmetric: bool, launch: Launch
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Zeros for z `(B, P)` and attraction `(B, row tiles, chunks)`, and the arguments of both kernels."""
    batch, padded, _ = packed.rows.shape
    row_tiles, column_tiles = padded // launch.block_i, padded // launch.block_j
    tiles_per_program = plan.tiles_per_program(packed.rows, launch, symmetric)
    chunks = triton.cdiv(column_tiles, tiles_per_program)
    zeros = packed.rows.new_zeros(batch * (padded + row_tiles * chunks), dtype=torch.float32)
    z = zeros[: batch * padded].view(batch, padded)
    attraction = zeros[batch * padded :].view(batch, row_tiles, chunks)
    num_classes = packed.phi.shape[1]
    arguments = {
        "scale_ptr": packed.scale,
        "phi_ptr": packed.phi,
        "z_ptr": z,
        "attraction_ptr": attraction,
        "padded": padded,
        "num_classes": num_classes,
        "tiles_per_program": tiles_per_program,
        **terms.exponent,
        **terms.modes,
        "SYMMETRIC": symmetric,
        **plan.tile_options(launch),
    }
    return z, attraction, arguments


@triton.jit(do_not_specialize=["num_classes", "tiles_per_program"])
def pdcr_fwd_kernel(
    rows_ptr,  # (B, P, WIDTH)
    scale_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    z_ptr,  # (B, P): sums of exponentials; log2 of them unless SYMMETRIC
    attraction_ptr,  # (B, row tiles, chunks), 0 where no program writes
    padded,
    num_classes,
    tiles_per_program,
    bias,
    slope,
    shift,
    unequal,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Sums of exponentials and the weighted similarities of a row tile with a chunk of column tiles."""
    tile = tl.program_id(0)
    chunk = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    start = chunk * tiles_per_program
    if SYMMETRIC:
        start += tile * BLOCK_I // BLOCK_J
    stop = tl.minimum(padded // BLOCK_J, start + tiles_per_program)
    if start >= stop:
        return
    rows_ptr += image * padded * WIDTH
    scale_ptr += image * padded
    phi_ptr += image * num_classes * padded
    z_ptr += image * padded
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    scale_i = tl.load(scale_ptr + i)  # [BLOCK_I]
    rows_i = load_rows(rows_ptr, tile, WIDTH, BLOCK_I)  # [BLOCK_I, WIDTH]

    total = tl.zeros([BLOCK_I], tl.float32)
    highest = tl.full([BLOCK_I], float("-inf"), tl.float32)
    attraction = tl.zeros([BLOCK_I], tl.float32)
    for column_tile in range(start, stop):
        j = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        scale_j = tl.load(scale_ptr + j)  # [BLOCK_J]
        rows_j = load_rows(rows_ptr, column_tile, WIDTH, BLOCK_J)  # [BLOCK_J, WIDTH]
        product = dot(rows_i, tl.trans(rows_j))  # [BLOCK_I, BLOCK_J]
        distance = distances(phi_ptr, i, j, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL)
        is_above = column_tile * BLOCK_J >= (tile + 1) * BLOCK_I
        total, highest, attraction = _add_pairs(
            product,
            distance,
            scale_i,
            scale_j,
            z_ptr + j,
            is_above,
            total,
            highest,
            attraction,
            bias,
            slope,
            shift,
            PLAIN,
            SYMMETRIC,
        )
    attraction_ptr += (image * (padded // BLOCK_I) + tile) * tl.num_programs(1) + chunk
    _store_sums(z_ptr + i, attraction_ptr, scale_i, total, highest, attraction, SYMMETRIC)


def _sum_tiles(packed: Packed, terms: plan.Terms, symmetric: bool, launch: Launch) -> tuple[Tensor, Tensor]:
    """z `(B, P)`, as logarithms to base 2 unless symmetric; attraction `(B, row tiles, chunks)`."""
    z, attraction, arguments = _new_sums(packed, terms, symmetric, launch)
    batch, row_tiles, chunks = attraction.shape
    pdcr_fwd_kernel[(row_tiles, chunks, batch)](rows_ptr=packed.rows, WIDTH=packed.rows.shape[2], **arguments)
    return z, attraction


@triton.jit(do_not_specialize=["first_tile", "num_classes", "tiles_per_program"])
def pdcr_fwd_slab_kernel(
    slab_ptr,  # (B, slab rows, P - first_column): products of packed rows
    scale_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    z_ptr,  # (B, P): sums of exponentials; log2 of them unless SYMMETRIC
    attraction_ptr,  # (B, row tiles, chunks), 0 where no program writes
    first_tile,  # of the slab
    first_column,  # of the slab, a multiple of BLOCK_J
    padded,
    slab_stride_b,
    slab_stride_n,
    num_classes,
    tiles_per_program,
    bias,
    slope,
    shift,
    unequal,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """As `pdcr_fwd_kernel`, for the row tiles of a slab of products."""
    tile = tl.program_id(0) + first_tile
    chunk = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    start = chunk * tiles_per_program
    if SYMMETRIC:
        start += tile * BLOCK_I // BLOCK_J
    stop = tl.minimum(padded // BLOCK_J, start + tiles_per_program)
    if start >= stop:
        return
    scale_ptr += image * padded
    phi_ptr += image * num_classes * padded
    z_ptr += image * padded
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    scale_i = tl.load(scale_ptr + i)  # [BLOCK_I]
    slab_row = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    slab_ptrs = slab_ptr + image * slab_stride_b + slab_row.to(tl.int64) * slab_stride_n  # [BLOCK_I]

    total = tl.zeros([BLOCK_I], tl.float32)
    highest = tl.full([BLOCK_I], float("-inf"), tl.float32)
    attraction = tl.zeros([BLOCK_I], tl.float32)
    for column_tile in range(start, stop):
        j = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        scale_j = tl.load(scale_ptr + j)  # [BLOCK_J]
        product = tl.load(slab_ptrs[:, None] + (j - first_column)[None, :])  # [BLOCK_I, BLOCK_J]
        distance = distances(phi_ptr, i, j, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL)
        is_above = column_tile * BLOCK_J >= (tile + 1) * BLOCK_I
        total, highest, attraction = _add_pairs(
            product,
            distance,
            scale_i,
            scale_j,
            z_ptr + j,
            is_above,
            total,
            highest,
            attraction,
            bias,
            slope,
            shift,
            PLAIN,
            SYMMETRIC,
        )
    attraction_ptr += (image * (padded // BLOCK_I) + tile) * tl.num_programs(1) + chunk
    _store_sums(z_ptr + i, attraction_ptr, scale_i, total, highest, attraction, SYMMETRIC)


def _sum_slabs(packed: Packed, terms: plan.Terms, symmetric: bool) -> tuple[Tensor, Tensor]:
    """As `_sum_tiles`, from slabs."""
    launch = plan.SLAB_FORWARD
    z, attraction, arguments = _new_sums(packed, terms, symmetric, launch)
    batch, _, chunks = attraction.shape

    def first_column(first_row: int) -> int:
        return first_row // launch.block_j * launch.block_j if symmetric else 0

    for first, column, slab in slabs.similarities(packed.rows, first_column):
        pdcr_fwd_slab_kernel[(slab.shape[1] // launch.block_i, chunks, batch)](
            slab_ptr=slab,
            first_tile=first // launch.block_i,
            first_column=column,
            slab_stride_b=slab.stride(0),
            slab_stride_n=slab.stride(1),
            **arguments,
        )
    return z, attraction


@triton.jit(do_not_specialize=["num_vectors", "num_parts"])
def pdcr_loss_kernel(
    z_ptr,  # (B, P)
    scale_ptr,  # (B, P)
    num_valid_ptr,  # (B,)
    unit_sum_ptr,  # (B, width)
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
    """log Z of the vectors, and the loss of one image, summed in fp64."""
    image = tl.program_id(0).to(tl.int64)
    num_valid = tl.load(num_valid_ptr + image).to(tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_vectors, BLOCK):
        n = first + tl.arange(0, BLOCK)
        inside = n < num_vectors
        included = ~is_excluded(tl.load(scale_ptr + image * padded + n, inside, EXCLUDED))
        z = tl.load(z_ptr + image * padded + n, included, 1.0)
        log_z = z * LN_2 if LOGGED else tl.log(z)
        log_z = tl.where(included, log_z, 0.0)
        tl.store(log_z_ptr + image * num_vectors + n, log_z, inside)
        total += log_z.to(tl.float64)
    attraction = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        values = tl.load(attraction_ptr + image * num_parts + part, part < num_parts, 0.0)
        attraction += values.to(tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        value = tl.load(unit_sum_ptr + image * width + c, c < width, 0.0).to(tl.float64)
        square += value * value
    weights = num_bias * (tl.sum(square, 0) - shift * num_valid * num_valid)
    weights += attraction_scale * tl.sum(attraction, 0)
    loss = num_valid * tl.sum(total, 0) - inverse_temperature * weights
    loss = loss / tl.maximum(num_valid * num_valid, 1.0)
    tl.store(loss_ptr + image, tl.where(num_valid > 0, loss, 0.0).to(tl.float32))


def _write_loss(
    packed: Packed, terms: plan.Terms, symmetric: bool, z: Tensor, attraction: Tensor, num_vectors: int
) -> tuple[Tensor, Tensor]:
    """The loss `(B,)` and log Z `(B, N)` from the sums."""
    batch, padded, width = packed.rows.shape
    loss = z.new_empty(batch)
    log_z = z.new_empty(batch, num_vectors)
    pdcr_loss_kernel[(batch,)](
        z_ptr=z,
        scale_ptr=packed.scale,
        num_valid_ptr=packed.num_valid,
        unit_sum_ptr=packed.unit_sum,
        attraction_ptr=attraction,
        loss_ptr=loss,
        log_z_ptr=log_z,
        num_vectors=num_vectors,
        padded=padded,
        width=width,
        num_parts=attraction[0].numel(),
        **terms.loss,
        LOGGED=not symmetric,
        BLOCK=1024,
        enable_fp_fusion=True,
    )
    return loss, log_z


@torch.no_grad()
def forward(
    vectors: Tensor, ratios: Tensor, valid: Tensor | None, affinity: Affinity
) -> tuple[Tensor, Tensor]:
    """The loss `(B,)` of every image, and log Z `(B, N)`; `vectors` holds at least one number."""
    terms = plan.terms_of(affinity, vectors, ratios.shape[-1])
    symmetric = terms.bounded and not torch.are_deterministic_algorithms_enabled()
    with on(vectors), torch.autocast(vectors.device.type, enabled=False):
        packed = pack(vectors, ratios, valid, terms)
        if plan.is_fused(vectors):
            launch = plan.choose_launch(
                plan.FORWARD,
                packed.rows,
                ratios.shape[-1],
                terms.plain,
                not symmetric,
                lambda launch: _sum_tiles(packed, terms, symmetric, launch),
            )
            z, attraction = _sum_tiles(packed, terms, symmetric, launch)
        else:
            z, attraction = _sum_slabs(packed, terms, symmetric)
        return _write_loss(packed, terms, symmetric, z, attraction, vectors.shape[1])
