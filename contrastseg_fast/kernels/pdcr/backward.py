"""The backward pass of PDCR: g of every row, from the weights of all pairs, and the gradients of vectors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.affinity import Affinity
from contrastseg_fast.kernels._common import dot, dot_add, narrow, on
from contrastseg_fast.kernels._tuning import Launch
from contrastseg_fast.kernels.pdcr import plan, slabs
from contrastseg_fast.kernels.pdcr.rows import Packed, pack
from contrastseg_fast.kernels.pdcr.tiles import distances, exponents, is_excluded, load_rows


@triton.jit
def _pair_weight(
    product,
    distance,
    scale_i,
    scale_j,
    z_term_i,
    z_term_j,
    bias,
    slope,
    shift,
    pull,
    offset,
    PLAIN: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """The bracket of g times log2(e) / tau; z_term is n / Z if BOUNDED, else log2(Z / n)."""
    similarity = product * scale_i[:, None] * scale_j[None, :]
    t, _ = exponents(similarity, distance, bias, slope, shift, PLAIN)
    if BOUNDED:
        share = tl.exp2(t) * (z_term_i[:, None] + z_term_j[None, :])
    else:
        share = tl.exp2(t - z_term_i[:, None]) + tl.exp2(t - z_term_j[None, :])
    if PLAIN:
        return distance * (share + pull) + offset
    weight = (bias + slope * distance) * share + (pull * distance + offset)
    # Exponentials of excluded rows may overflow here, and inf * 0 is NaN.
    return tl.where(is_excluded(scale_i)[:, None] | is_excluded(scale_j)[None, :], 0.0, weight)


@triton.jit(do_not_specialize=["num_classes"])
def pdcr_bwd_kernel(
    rows_ptr,  # (B, P, WIDTH)
    scale_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    z_term_ptr,  # (B, P)
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
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """g times the scale of its row, for a row tile over all columns; without the constant part."""
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    scale_ptr += image * padded
    z_term_ptr += image * padded
    phi_ptr += image * num_classes * padded
    rows_ptr += image * padded * WIDTH
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    rows_i = load_rows(rows_ptr, tile, WIDTH, BLOCK_I)  # [BLOCK_I, WIDTH]
    scale_i = tl.load(scale_ptr + i)  # [BLOCK_I]
    z_term_i = tl.load(z_term_ptr + i)  # [BLOCK_I]

    g = tl.zeros([BLOCK_I, WIDTH], tl.float32)
    for column_tile in range(padded // BLOCK_J):
        j = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        scale_j = tl.load(scale_ptr + j)  # [BLOCK_J]
        z_term_j = tl.load(z_term_ptr + j)  # [BLOCK_J]
        rows_j = load_rows(rows_ptr, column_tile, WIDTH, BLOCK_J)  # [BLOCK_J, WIDTH]
        product = dot(rows_i, tl.trans(rows_j))  # [BLOCK_I, BLOCK_J]
        distance = distances(phi_ptr, i, j, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL)
        weight = _pair_weight(
            product,
            distance,
            scale_i,
            scale_j,
            z_term_i,
            z_term_j,
            bias,
            slope,
            shift,
            pull,
            offset,
            PLAIN,
            BOUNDED,
        )
        weight = weight * (scale_j * weight_scale)[None, :]
        g = dot_add(narrow(weight, rows_ptr.dtype.element_ty), rows_j, g)

    c = tl.arange(0, WIDTH)
    g_ptrs = g_ptr + (image * padded + i)[:, None] * WIDTH + c[None, :]
    tl.store(g_ptrs, g * scale_i[:, None])


def _multiply_tiles(packed: Packed, terms: plan.Terms, launch: Launch) -> Tensor:
    """g `(B, P, width)` without its constant part, times the scale of its row, by the fused kernel."""
    batch, padded, width = packed.rows.shape
    g = packed.rows.new_empty(packed.rows.shape, dtype=torch.float32)
    pdcr_bwd_kernel[(padded // launch.block_i, batch)](
        rows_ptr=packed.rows,
        scale_ptr=packed.scale,
        phi_ptr=packed.phi,
        z_term_ptr=packed.z_term,
        g_ptr=g,
        padded=padded,
        num_classes=packed.phi.shape[1],
        **terms.exponent,
        **terms.pair_weight,
        WIDTH=width,
        **terms.modes,
        BOUNDED=terms.bounded,
        **plan.tile_options(launch),
    )
    return g


@triton.jit(do_not_specialize=["num_classes"])
def pdcr_pairs_kernel(
    slab_ptr,  # (B, slab rows, P - first_row), products of packed rows
    weights_ptr,  # the same shape; may be slab_ptr
    scale_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    z_term_ptr,  # (B, P)
    first_row,
    padded,
    slab_stride_b,
    slab_stride_n,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    weight_scale,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A slab's pair weights times the scales of both rows; its columns begin at its first row."""
    tile = tl.program_id(1)
    column_tile = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    scale_ptr += image * padded
    z_term_ptr += image * padded
    phi_ptr += image * num_classes * padded
    row = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    column = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
    offsets = image * slab_stride_b + row.to(tl.int64)[:, None] * slab_stride_n + column[None, :]
    i, j = first_row + row, first_row + column
    inside = (j < padded)[None, :]
    j = tl.minimum(j, padded - 1)
    scale_i, scale_j = tl.load(scale_ptr + i), tl.load(scale_ptr + j)
    z_term_i, z_term_j = tl.load(z_term_ptr + i), tl.load(z_term_ptr + j)
    product = tl.load(slab_ptr + offsets, inside, 0.0)  # [BLOCK_I, BLOCK_J]
    distance = distances(phi_ptr, i, j, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL)
    weight = _pair_weight(
        product,
        distance,
        scale_i,
        scale_j,
        z_term_i,
        z_term_j,
        bias,
        slope,
        shift,
        pull,
        offset,
        PLAIN,
        BOUNDED,
    )
    weight = weight * scale_i[:, None] * (scale_j * weight_scale)[None, :]
    tl.store(weights_ptr + offsets, narrow(weight, weights_ptr.dtype.element_ty), inside)


def _multiply_slabs(packed: Packed, terms: plan.Terms) -> Tensor:
    """As `_multiply_tiles`, from slabs."""
    rows = packed.rows
    batch, padded, _ = rows.shape
    g = rows.new_zeros(rows.shape, dtype=torch.float32)
    launch = plan.SLAB_PAIRS
    for first, _, slab in slabs.similarities(rows, lambda first_row: first_row):
        height, columns = slab.shape[1:]
        weights = slab if rows.dtype == torch.float32 else torch.empty_like(slab, dtype=rows.dtype)
        pdcr_pairs_kernel[(triton.cdiv(columns, launch.block_j), height // launch.block_i, batch)](
            slab_ptr=slab,
            weights_ptr=weights,
            scale_ptr=packed.scale,
            phi_ptr=packed.phi,
            z_term_ptr=packed.z_term,
            first_row=first,
            padded=padded,
            slab_stride_b=slab.stride(0),
            slab_stride_n=slab.stride(1),
            num_classes=packed.phi.shape[1],
            **terms.exponent,
            **terms.pair_weight,
            **terms.modes,
            BOUNDED=terms.bounded,
            **plan.tile_options(launch),
        )
        last = first + height
        slabs.add_product(g[:, first:last], weights, rows[:, first:])
        if columns > height:
            slabs.add_product(g[:, last:], weights[:, :, height:].mT, rows[:, first:last])
    return g


@triton.jit
def _unit_and_g(rows_ptr, g_ptr, unit_sum_ptr, offsets, c, mask, scale, undo, separate_bias):
    """Unit vectors and g with its constant part, of some rows and channels."""
    unit = tl.load(rows_ptr + offsets + c[None, :], mask, 0).to(tl.float32) * scale[:, None]
    unit_sum = tl.load(unit_sum_ptr + c[None, :], mask, 0.0)
    g = tl.load(g_ptr + offsets + c[None, :], mask, 0.0) * undo[:, None] - 2 * separate_bias * unit_sum
    return unit, g


@triton.jit(do_not_specialize=["num_vectors", "grad_stride"])
def pdcr_grad_kernel(
    g_ptr,  # (B, P, width), times the scale of the row
    rows_ptr,  # (B, P, width)
    scale_ptr,  # (B, P)
    inverse_length_ptr,  # (B, P)
    unit_sum_ptr,  # (B, width)
    num_valid_ptr,  # (B,)
    grad_ptr,  # (B,), stride grad_stride
    out_ptr,  # (B, N, C)
    num_vectors,
    padded,
    channels,
    width,
    grad_stride,
    separate_bias,  # of the numerator's weights; the rest of num_bias is in the pair weights
    g_scale,  # what undoes the weight_scale of the pair weights, but for log2(e) / tau
    inverse_temperature,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of the vectors from g: the part along u is removed, the rest is divided by |v|."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr + image * padded + n)  # [BLOCK_N]
    undo = g_scale * tl.where(scale > 0, 1 / tl.where(scale > 0, scale, 1.0), 0.0)
    offsets = (image * padded + n)[:, None] * width
    unit_sum_ptr += image * width
    along = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (c < channels)[None, :]
        unit, g = _unit_and_g(rows_ptr, g_ptr, unit_sum_ptr, offsets, c, mask, scale, undo, separate_bias)
        along += tl.sum(g * unit, 1)
    num_valid = tl.load(num_valid_ptr + image).to(tl.float32)
    grad = tl.load(grad_ptr + image * grad_stride).to(tl.float32)
    factor = grad * inverse_temperature / tl.maximum(num_valid * num_valid, 1.0)
    inverse_length = tl.load(inverse_length_ptr + image * padded + n)  # [BLOCK_N]
    inside = n < num_vectors
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (c < channels)[None, :]
        unit, g = _unit_and_g(rows_ptr, g_ptr, unit_sum_ptr, offsets, c, mask, scale, undo, separate_bias)
        g = (g - along[:, None] * unit) * factor * inverse_length[:, None]
        out_ptrs = out_ptr + (image * num_vectors + n)[:, None] * channels + c[None, :]
        tl.store(out_ptrs, narrow(g, out_ptr.dtype.element_ty), mask & inside[:, None])


def _write_gradient(packed: Packed, terms: plan.Terms, g: Tensor, grad: Tensor, vectors: Tensor) -> Tensor:
    """The gradient of the vectors, like `vectors` `(B, N, C)`."""
    batch, padded, width = packed.rows.shape
    _, num_vectors, channels = vectors.shape
    out = vectors.new_empty(vectors.shape)
    pdcr_grad_kernel[(padded // plan.ROWS.block_n, batch)](
        g_ptr=g,
        rows_ptr=packed.rows,
        scale_ptr=packed.scale,
        inverse_length_ptr=packed.inverse_length,
        unit_sum_ptr=packed.unit_sum,
        num_valid_ptr=packed.num_valid,
        grad_ptr=grad,
        out_ptr=out,
        num_vectors=num_vectors,
        padded=padded,
        channels=channels,
        width=width,
        grad_stride=grad.stride(0),
        **terms.gradient,
        **plan.row_options(),
    )
    return out


@torch.no_grad()
def backward(
    grad: Tensor, log_z: Tensor, vectors: Tensor, ratios: Tensor, valid: Tensor | None, affinity: Affinity
) -> Tensor:
    """The gradient of the vectors from that of the losses `(B,)`; `vectors` holds at least one number."""
    terms = plan.terms_of(affinity, vectors, ratios.shape[-1])
    with on(vectors), torch.autocast(vectors.device.type, enabled=False):
        packed = pack(vectors, ratios, valid, terms, log_z.contiguous())
        if plan.is_fused(vectors):
            launch = plan.choose_launch(
                plan.BACKWARD,
                packed.rows,
                ratios.shape[-1],
                terms.plain,
                not terms.bounded,
                lambda launch: _multiply_tiles(packed, terms, launch),
            )
            g = _multiply_tiles(packed, terms, launch)
        else:
            g = _multiply_slabs(packed, terms)
        return _write_gradient(packed, terms, g, grad, vectors)
