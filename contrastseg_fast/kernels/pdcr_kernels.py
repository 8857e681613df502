"""The kernels of kernels/pdcr.py, which says what they compute; each gets tile sizes that divide P.

B images, N vectors of C channels, M classes; P is N padded, `width` or WIDTH is C padded. `t`, `d` and `Z`
are those of kernels/pdcr.py. Rows from N to P, and of excluded vectors, are zero with scale -1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from contrastseg_fast.kernels._common import dot, dot_add, narrow


@triton.jit(do_not_specialize=["num_vectors", "num_classes", *(f"ratios_stride_{axis}" for axis in "bnm")])
def pdcr_rows_kernel(
    vectors_ptr,  # (B, N, C), any strides
    ratios_ptr,  # (B, N, M), any strides
    valid_ptr,  # (B, N) or None
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
        sum_ptrs = sums_ptr + (image * tl.num_programs(0) + block) * width + c
        tl.store(sum_ptrs, tl.sum(unit, 0), c < width)

    inverse = tl.where(square == 0, 0.0, scale * (shrink * shrink_more))
    if UNIT:
        scale = tl.where(square == 0, 0.0, 1.0)
    tl.store(scale_ptr + image * padded + n, tl.where(included, scale, -1.0), n < padded)
    tl.store(inverse_ptr + image * padded + n, tl.where(included, inverse, 0.0), n < padded)
    ratio_ptrs = ratios_ptr + image * ratios_stride_b + n.to(tl.int64) * ratios_stride_n
    class_ptr = phi_ptr + image * num_classes * padded
    for _ in range(num_classes):
        phi = tl.load(ratio_ptrs, included, 0).to(tl.float32)
        tl.store(class_ptr + n, phi * phi_scale, n < padded)
        ratio_ptrs += ratios_stride_m
        class_ptr += padded
    if log_z_ptr is not None:
        log_z = tl.load(log_z_ptr + image * num_vectors + n, included, 0)
        count = tl.load(count_ptr + image).to(tl.float32)
        if STABLE:
            z = tl.where(included, log_z * 1.4426950408889634 - tl.log2(count), float("inf"))
        else:
            z = tl.where(included, count * tl.exp(-log_z), 0.0)
        tl.store(z_ptr + image * padded + n, z, n < padded)


@triton.jit
def _load_rows(rows_ptr, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of rows, [BLOCK, WIDTH], as they are multiplied."""
    first = tl.cast(tile, tl.int64) * (BLOCK * WIDTH)
    return tl.load(rows_ptr + first + tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _add_distance(distance, phi_ptr, i, j):
    """The distances of one class added to those of others."""
    phi_i = tl.load(phi_ptr + i)  # [BLOCK_I]
    phi_j = tl.load(phi_ptr + j)  # [BLOCK_J]
    return distance + tl.abs(phi_i[:, None] - phi_j[None, :])


@triton.jit
def _distance(
    phi_ptr,
    i,
    j,
    padded,
    num_classes,
    unequal,
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
):
    """Scaled class distances of a tile; classes behind the first `CLASSES` take a loop at run time."""
    if CATEGORICAL:
        differ = tl.load(phi_ptr + i)[:, None] != tl.load(phi_ptr + j)[None, :]  # [BLOCK_I, BLOCK_J]
        return tl.where(differ, unequal, 0.0)
    distance = tl.abs(tl.load(phi_ptr + i)[:, None] - tl.load(phi_ptr + j)[None, :])
    for m in tl.static_range(1, CLASSES):
        distance = _add_distance(distance, phi_ptr + m * padded, i, j)
    if MORE_CLASSES:  # noqa: SIM102
        # Always true; but where a loop stands directly within the loop over tiles, nothing is copied ahead.
        if num_classes > CLASSES:
            for further in range(CLASSES, num_classes):
                distance = _add_distance(distance, phi_ptr + further * padded, i, j)
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
def _add_pairs(
    product,
    distance,
    scale_i,
    scale_j,
    z_ptr,  # of the column tile's rows
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
    t, weighted = _exponent(similarity, distance, bias, slope, shift, PLAIN)
    counts_j = tl.where(scale_j < 0, 0.0, 1.0)  # [BLOCK_J]
    if SYMMETRIC:
        powers = tl.exp2(t)
        total += tl.sum(powers * counts_j[None, :], 1)
        if is_above:
            counts_i = tl.where(scale_i < 0, 0.0, 1.0)  # [BLOCK_I]
            tl.atomic_add(z_ptr, tl.sum(powers * counts_i[:, None], 0), sem="relaxed")
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
def _store_sums(z_ptr, attraction_ptr, scale_i, total, highest, attraction, SYMMETRIC: tl.constexpr):
    """The sums of a row tile; `z_ptr` are its rows' addresses, `attraction_ptr` its own."""
    tl.store(attraction_ptr, tl.sum(tl.where(scale_i < 0, 0.0, attraction), 0))
    if SYMMETRIC:
        tl.atomic_add(z_ptr, total, sem="relaxed")
    else:
        tl.store(z_ptr, highest + tl.log2(total))


@triton.jit(do_not_specialize=["num_classes", "tiles_per_program"])
def pdcr_fwd_kernel(
    rows_ptr,  # (B, P, WIDTH)
    scale_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    z_ptr,  # (B, P): sums of powers; log2 of them unless SYMMETRIC
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
    """Sums of powers and the weighted similarities of a row tile with a chunk of column tiles."""
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
    rows_i = _load_rows(rows_ptr, tile, WIDTH, BLOCK_I)  # [BLOCK_I, WIDTH]

    total = tl.zeros([BLOCK_I], tl.float32)
    highest = tl.full([BLOCK_I], float("-inf"), tl.float32)
    attraction = tl.zeros([BLOCK_I], tl.float32)
    for column_tile in range(start, stop):
        j = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        scale_j = tl.load(scale_ptr + j)  # [BLOCK_J]
        rows_j = _load_rows(rows_ptr, column_tile, WIDTH, BLOCK_J)  # [BLOCK_J, WIDTH]
        product = dot(rows_i, tl.trans(rows_j))  # [BLOCK_I, BLOCK_J]
        distance = _distance(phi_ptr, i, j, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL)
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


@triton.jit(do_not_specialize=["first_tile", "num_classes", "tiles_per_program"])
def pdcr_fwd_panel_kernel(
    panel_ptr,  # (B, panel rows, P - first_column): products of rows
    scale_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    z_ptr,  # (B, P): sums of powers; log2 of them unless SYMMETRIC
    attraction_ptr,  # (B, row tiles, chunks), 0 where no program writes
    first_tile,  # of the panel
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
    CLASSES: tl.constexpr,
    MORE_CLASSES: tl.constexpr,
    CATEGORICAL: tl.constexpr,
    PLAIN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """As `pdcr_fwd_kernel`, for the row tiles of a panel of products."""
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
    panel_row = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    panel_ptrs = panel_ptr + image * panel_stride_b + panel_row.to(tl.int64) * panel_stride_n  # [BLOCK_I]

    total = tl.zeros([BLOCK_I], tl.float32)
    highest = tl.full([BLOCK_I], float("-inf"), tl.float32)
    attraction = tl.zeros([BLOCK_I], tl.float32)
    for column_tile in range(start, stop):
        j = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        scale_j = tl.load(scale_ptr + j)  # [BLOCK_J]
        product = tl.load(panel_ptrs[:, None] + (j - first_column)[None, :])  # [BLOCK_I, BLOCK_J]
        distance = _distance(phi_ptr, i, j, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL)
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


@triton.jit(do_not_specialize=["num_vectors", "num_parts"])
def pdcr_loss_kernel(
    z_ptr,  # (B, P)
    scale_ptr,  # (B, P)
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
    """log Z of the vectors, and the loss of one image, summed in fp64."""
    image = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + image).to(tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_vectors, BLOCK):
        n = first + tl.arange(0, BLOCK)
        inside = n < num_vectors
        included = tl.load(scale_ptr + image * padded + n, inside, -1.0) >= 0
        z = tl.load(z_ptr + image * padded + n, included, 1.0)
        log_z = z * 0.6931471805599453 if LOGGED else tl.log(z)
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
    # Powers of excluded rows may overflow here, and inf * 0 is NaN.
    return tl.where((scale_i >= 0)[:, None] & (scale_j >= 0)[None, :], weight, 0.0)


@triton.jit(do_not_specialize=["num_classes"])
def pdcr_bwd_kernel(
    rows_ptr,  # (B, P, WIDTH)
    scale_ptr,  # (B, P)
    phi_ptr,  # (B, M, P)
    z_ptr,  # (B, P)
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
    rows_i = _load_rows(rows_ptr, tile, WIDTH, BLOCK_I)  # [BLOCK_I, WIDTH]
    scale_i = tl.load(scale_ptr + i)  # [BLOCK_I]
    z_i = tl.load(z_ptr + i)  # [BLOCK_I]

    g = tl.zeros([BLOCK_I, WIDTH], tl.float32)
    for column_tile in range(padded // BLOCK_J):
        j = column_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        scale_j = tl.load(scale_ptr + j)  # [BLOCK_J]
        z_j = tl.load(z_ptr + j)  # [BLOCK_J]
        rows_j = _load_rows(rows_ptr, column_tile, WIDTH, BLOCK_J)  # [BLOCK_J, WIDTH]
        product = dot(rows_i, tl.trans(rows_j))  # [BLOCK_I, BLOCK_J]
        distance = _distance(phi_ptr, i, j, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL)
        weight = _pair_weight(
            product, distance, scale_i, scale_j, z_i, z_j, bias, slope, shift, pull, offset, PLAIN, STABLE
        )
        weight = weight * (scale_j * weight_scale)[None, :]
        g = dot_add(narrow(weight, rows_ptr.dtype.element_ty), rows_j, g)

    c = tl.arange(0, WIDTH)
    g_ptrs = g_ptr + (image * padded + i)[:, None] * WIDTH + c[None, :]
    tl.store(g_ptrs, g * scale_i[:, None])


@triton.jit(do_not_specialize=["num_classes"])
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
    MORE_CLASSES: tl.constexpr,
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
    distance = _distance(phi_ptr, i, j, padded, num_classes, unequal, CLASSES, MORE_CLASSES, CATEGORICAL)
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
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (c < channels)[None, :]
        unit, g = _unit_and_g(rows_ptr, g_ptr, sums_ptr, offsets, c, mask, scale, undo, num_bias)
        g = (g - along[:, None] * unit) * factor * inverse[:, None]
        out_ptrs = out_ptr + (image * num_vectors + n)[:, None] * channels + c[None, :]
        tl.store(out_ptrs, narrow(g, out_ptr.dtype.element_ty), mask & inside[:, None])
