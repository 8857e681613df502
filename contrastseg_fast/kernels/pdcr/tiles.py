"""What the kernels of PDCR share: excluded rows, tiles of rows, distances, exponents and weights of pairs."""

from __future__ import annotations

import math

import triton
import triton.language as tl

EXCLUDED = tl.constexpr(-1.0)  # the scale of an excluded row; all others are at least 0
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def is_excluded(scale):
    """Whether rows are excluded from all pairs, told by their scales."""
    return scale < 0


@triton.jit
def are_valid(valid_ptr, first, n, inside, least_valid):
    """Which of some vectors make pairs: those of `inside`, but for invalid ones."""
    if valid_ptr is not None:
        valid = tl.load(valid_ptr + first + n, inside, 0)
        if valid_ptr.dtype.element_ty == tl.float32:
            inside = inside & (valid >= least_valid)
        else:
            inside = inside & (valid != 0)
    return inside


@triton.jit
def load_rows(rows_ptr, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of packed rows, [BLOCK, WIDTH]."""
    first = tl.cast(tile, tl.int64) * (BLOCK * WIDTH)
    return tl.load(rows_ptr + first + tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def load_phi(phi_ptr, n, stride, included, phi_scale):
    """Scaled ratios of one class: packed ones, or those of a source times `phi_scale`, 0 if not included."""
    if included is None:
        phi = tl.load(phi_ptr + n)
    else:
        phi = tl.load(phi_ptr + n.to(tl.int64) * stride, included, 0).to(tl.float32) * phi_scale
    return phi


@triton.jit
def distances(
    phi_ptr,
    i,
    j,
    stride_m,  # of classes: P, unless ratios are those of a source
    num_classes,
    unequal,  # the distance of different categories
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    stride_n=1,  # this and what follows: of a source's ratios alone
    included_i=None,
    included_j=None,
    phi_scale=None,
):
    """Scaled class distances of a tile. Classes after the first `CLASSES` take a loop at run time."""
    phi_i = load_phi(phi_ptr, i, stride_n, included_i, phi_scale)[:, None]  # [BLOCK_I, 1]
    phi_j = load_phi(phi_ptr, j, stride_n, included_j, phi_scale)[None, :]  # [1, BLOCK_J]
    if CATEGORICAL:
        return tl.where(phi_i != phi_j, unequal, 0.0)
    distance = tl.abs(phi_i - phi_j)
    for m in tl.static_range(1, CLASSES):
        phi_i = load_phi(phi_ptr + m * stride_m, i, stride_n, included_i, phi_scale)[:, None]
        phi_j = load_phi(phi_ptr + m * stride_m, j, stride_n, included_j, phi_scale)[None, :]
        distance += tl.abs(phi_i - phi_j)
    if MORE_CLASSES:  # noqa: SIM102
        # Always true; but where a loop stands directly within the loop over tiles, nothing is copied ahead.
        if num_classes > CLASSES:
            for further in range(CLASSES, num_classes):
                phi_i = load_phi(phi_ptr + further * stride_m, i, stride_n, included_i, phi_scale)[:, None]
                phi_j = load_phi(phi_ptr + further * stride_m, j, stride_n, included_j, phi_scale)[None, :]
                distance += tl.abs(phi_i - phi_j)
    return distance


@triton.jit
def exponents(similarity, distance, bias, slope, shift):
    """t of a tile, and x d, unless exponents are plain."""
    x = similarity - shift
    return x * (bias + slope * distance), x * distance


@triton.jit
def z_term(log_z_ptr, stats_ptr, row, count, scale, log_weight_scale, BOUNDED: tl.constexpr):
    """n / Z of some rows if BOUNDED, else log2(Z / n); what makes their share vanish if they are excluded.

    Either times the weight scale. It takes few instructions: every thread computes it for all its columns.
    """
    log_z = tl.load(log_z_ptr + row, row < count, 0.0)
    log_term = log_z * LOG2_E - (tl.log2(tl.load(stats_ptr)) + log_weight_scale)
    log_term = tl.where(is_excluded(scale), float("inf"), log_term)
    return tl.exp2(-log_term) if BOUNDED else log_term


@triton.jit
def pair_weight(
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
    """The bracket of g times log2(e) / tau, the weight scale and scale_j.

    z_term is n / Z if BOUNDED, else log2(Z / n); it, pull and offset contain the weight scale.
    """
    if PLAIN:
        distance = distance * scale_j[None, :]  # once, for the exponent and for the weight
        t = product * scale_i[:, None] * distance
    else:
        t, _ = exponents(product * scale_i[:, None] * scale_j[None, :], distance, bias, slope, shift)
    if BOUNDED:
        share = tl.exp2(t) * (z_term_i[:, None] + z_term_j[None, :])
    else:
        share = tl.exp2(t - z_term_i[:, None]) + tl.exp2(t - z_term_j[None, :])
    if PLAIN:
        return distance * (share + pull) + (offset * scale_j)[None, :]
    weight = (bias + slope * distance) * share + (pull * distance + offset)
    # Exponentials of excluded rows may overflow here, and inf * 0 is NaN.
    weight = tl.where(is_excluded(scale_i)[:, None] | is_excluded(scale_j)[None, :], 0.0, weight)
    return weight * scale_j[None, :]
