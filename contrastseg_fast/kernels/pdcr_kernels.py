"""The kernels of kernels/pdcr.py, which says what they compute; each gets tile sizes that divide P.

B images, N vectors of C channels, M classes; P is N padded, `width` or WIDTH is C padded. `t`, `d` and `Z`
are those of kernels/pdcr.py. Rows from N to P, and of vectors that take no part, are zero with scale -1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from contrastseg_fast.kernels._common import dot, dot_add, narrow


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
    absent,  # the scaled ratio of what takes no part
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
        phi = tl.where(takes_part, phi * phi_scale, absent)
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
    weight = (bias + slope * distance) * share + (pull * distance + offset)
    # Powers of rows that take no part may overflow here, and inf * 0 is NaN.
    return tl.where((scale_i >= 0)[:, None] & (scale_j >= 0)[None, :], weight, 0.0)


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


@triton.jit
def _unit_and_g(rows_ptr, g_ptr, sums_ptr, offsets, c, mask, scale, undo, num_bias):
    """Unit vectors and g with its constant part, of some rows and channels."""
    unit = tl.load(rows_ptr + offsets + c[None, :], mask, 0).to(tl.float32) * scale[:, None]
    everyone = tl.load(sums_ptr + c[None, :], mask, 0.0)
    g = tl.load(g_ptr + offsets + c[None, :], mask, 0.0) * undo[:, None] - 2 * num_bias * everyone
    return unit, g


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
    sums_ptr += image * width
    along = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (c < channels)[None, :]
        unit, g = _unit_and_g(rows_ptr, g_ptr, sums_ptr, offsets, c, mask, scale, undo, num_bias)
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
        unit, g = _unit_and_g(rows_ptr, g_ptr, sums_ptr, offsets, c, mask, scale, undo, num_bias)
        g = (g - along[:, None] * unit) * factor * inverse[:, None]
        out_ptrs = out_ptr + (image * num_vectors + target)[:, None] * channels + c[None, :]
        tl.store(out_ptrs, narrow(g, out_ptr.dtype.element_ty), mask & inside[:, None])
