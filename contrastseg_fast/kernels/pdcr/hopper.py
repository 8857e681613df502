"""The fused backward kernels for sm_90 in Gluon, whose products overlap with the instructions of pairs.

They take the tables of the kernels in backward.py and write the same parts of g, for plain exponents,
bounded sums and packed rows of one width. A program issues the product of column tile k, then the one that
adds tile k - 1 to g. While the tensor cores work on the latter, it computes the pair weights of tile k:

    tensor cores    product k | g += weights k-1 @ rows k-1
    instructions              |          weights k

Tiles k - 1, k and k + 1 are in shared memory, where the last is copied meanwhile. Gluon is experimental:
with a Triton that lacks one of the names below, importing this module raises ImportError or AttributeError.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from contrastseg_fast.kernels.pdcr.groups import GROUPS, TILE, core_around, first_step, next_row_tile
from contrastseg_fast.kernels.pdcr.layout import (
    CORES,
    COUNT,
    LOG_Z,
    LOG_Z_OF_ROWS,
    PADDED,
    PHI,
    RECORD,
    ROWS,
    SCALE,
    SHARE_IMAGE,
    SHARE_ITEM,
    SHARE_NUMBER,
    SHARE_OUT,
    STATS,
    TILE_IMAGE,
    TILE_ITEM,
    TILE_OUT,
    TILE_ROW_TILE,
    TILE_START,
    TILE_STOP,
)
from contrastseg_fast.kernels.pdcr.tiles import pair_weight, z_term

# Triton 3.6 has the second name of each.
_copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

_RING = gl.constexpr(3)  # column tiles in shared memory


@gluon.jit
def _copy_tile(buffer, rows_ptr, tile, WIDTH: gl.constexpr, BLOCK: gl.constexpr):
    """Begin to copy a tile of packed rows, [BLOCK, WIDTH], to shared memory."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    first = tile.to(gl.int64) * (BLOCK * WIDTH)
    _copy_to_shared(buffer, rows_ptr + first + (row[:, None] * WIDTH + channel[None, :]))


@gluon.jit
def _await_copies(OUTSTANDING: gl.constexpr):
    """Let the products of all warps read what was copied to shared memory, but for the latest groups."""
    async_copy.wait_group(OUTSTANDING)
    fence_async_shared()
    _barrier()


@gluon.jit
def _next(slot):
    """The slot of the ring after another."""
    return gl.where(slot == _RING - 1, 0, slot + 1)


@gluon.jit
def _column_tile(step, skip_first, num_skipped):
    return step + gl.where(step >= skip_first, num_skipped, 0)


@gluon.jit
def _keep(
    numbers,
    tile,
    scale_ptr,
    phi_ptr,
    log_z_ptr,
    stats_ptr,
    padded,
    count,
    log_weight_scale,
    CLASSES: gl.constexpr,
    BLOCK: gl.constexpr,
):
    """Scales, z terms and ratios of a tile's rows in shared memory, [2 + CLASSES, BLOCK].

    So one thread alone computes each z term, and the numbers take few registers.
    """
    row = tile * BLOCK + gl.arange(0, BLOCK, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    scale = gl.load(scale_ptr + row)  # [BLOCK]
    loaded = (scale, z_term(log_z_ptr, stats_ptr, row, count, scale, log_weight_scale, True))
    for m in gl.static_range(CLASSES):
        loaded = loaded + (gl.load(phi_ptr + (m * padded + row)),)  # type: ignore[assignment]  # noqa: RUF005
    for number in gl.static_range(2 + CLASSES):  # all at once: Triton 3.6 has a barrier between two stores
        numbers.index(number).store(loaded[number])


@gluon.jit
def _distances(of_rows, of_columns, unequal, PAIRS: gl.constexpr, CLASSES: gl.constexpr,
               CATEGORICAL: gl.constexpr):  # fmt: skip
    """As `tiles.distances`, from shared memory."""
    BY_ROW: gl.constexpr = gl.SliceLayout(1, PAIRS)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, PAIRS)
    phi_i, phi_j = of_rows.index(2).load(BY_ROW), of_columns.index(2).load(BY_COLUMN)  # [BLOCK_I], [BLOCK_J]
    if CATEGORICAL:
        return gl.where(phi_i[:, None] != phi_j[None, :], unequal, 0.0)
    distance = gl.abs(phi_i[:, None] - phi_j[None, :])  # [BLOCK_I, BLOCK_J]
    for m in gl.static_range(1, CLASSES):
        phi_i, phi_j = of_rows.index(2 + m).load(BY_ROW), of_columns.index(2 + m).load(BY_COLUMN)
        distance += gl.abs(phi_i[:, None] - phi_j[None, :])
    return distance


@gluon.jit
def _weights(
    product,
    of_rows,
    of_columns,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    PAIRS: gl.constexpr,
    CLASSES: gl.constexpr,
    CATEGORICAL: gl.constexpr,
    dtype: gl.constexpr,
):
    """The pair weights of a tile, rounded for the next product."""
    BY_ROW: gl.constexpr = gl.SliceLayout(1, PAIRS)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, PAIRS)
    weight = pair_weight(
        product,
        _distances(of_rows, of_columns, unequal, PAIRS, CLASSES, CATEGORICAL),
        of_rows.index(0).load(BY_ROW),
        of_columns.index(0).load(BY_COLUMN),
        of_rows.index(1).load(BY_ROW),
        of_columns.index(1).load(BY_COLUMN),
        bias,
        slope,
        shift,
        pull,
        offset,
        True,
        True,
    )
    return weight.to(dtype)


@gluon.jit
def _multiply_row_tile(
    own,
    ring,
    of_rows,
    of_columns,
    rows_ptr,
    scale_ptr,
    phi_ptr,
    log_z_ptr,
    stats_ptr,
    g_ptr,
    tile,
    start,  # column tiles, counted without those that are skipped
    stop,
    skip_first,
    num_skipped,
    padded,
    count,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    log_weight_scale,
    WIDTH: gl.constexpr,
    CLASSES: gl.constexpr,
    CATEGORICAL: gl.constexpr,
    BLOCK_I: gl.constexpr,
    BLOCK_J: gl.constexpr,
):
    """One part of g of a row tile, from some column tiles."""
    PAIRS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_J, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    dtype: gl.constexpr = rows_ptr.dtype.element_ty
    _barrier()  # the products of an earlier row tile have read shared memory
    column_tile = _column_tile(start, skip_first, num_skipped)
    slot = start * 0
    _copy_tile(own, rows_ptr, tile, WIDTH, BLOCK_I)
    _copy_tile(ring.index(slot), rows_ptr, column_tile, WIDTH, BLOCK_J)
    async_copy.commit_group()
    if start + 1 < stop:
        following = _column_tile(start + 1, skip_first, num_skipped)
        _copy_tile(ring.index(_next(slot)), rows_ptr, following, WIDTH, BLOCK_J)
    async_copy.commit_group()
    nothing = gl.zeros([BLOCK_I, BLOCK_J], gl.float32, PAIRS)
    g = warpgroup_mma_init(gl.zeros([BLOCK_I, WIDTH], gl.float32, SUMS))
    _keep(
        of_rows, tile, scale_ptr, phi_ptr, log_z_ptr, stats_ptr, padded, count, log_weight_scale, CLASSES,
        BLOCK_I,
    )  # fmt: skip
    _await_copies(1)
    product = warpgroup_mma(own, ring.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
    _keep(
        of_columns, column_tile, scale_ptr, phi_ptr, log_z_ptr, stats_ptr, padded, count, log_weight_scale,
        CLASSES, BLOCK_J,
    )  # fmt: skip
    product = warpgroup_mma_wait(0, deps=[product])
    weight = _weights(
        product, of_rows, of_columns, bias, slope, shift, unequal, pull, offset, PAIRS, CLASSES, CATEGORICAL,
        dtype,
    )  # fmt: skip
    for step in range(start + 1, stop):
        before, slot = slot, _next(slot)
        # At the end of the loop, ptxas would move this wait above the weights of pairs.
        g = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[g]))
        _await_copies(0)
        product = warpgroup_mma(own, ring.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        g = warpgroup_mma(gl.convert_layout(weight, WEIGHTS), ring.index(before), g, is_async=True)
        if step + 1 < stop:
            following = _column_tile(step + 1, skip_first, num_skipped)
            _copy_tile(ring.index(_next(slot)), rows_ptr, following, WIDTH, BLOCK_J)
        async_copy.commit_group()
        _keep(
            of_columns, _column_tile(step, skip_first, num_skipped), scale_ptr, phi_ptr, log_z_ptr, stats_ptr,
            padded, count, log_weight_scale, CLASSES, BLOCK_J,
        )  # fmt: skip
        product = warpgroup_mma_wait(1, deps=[product])
        weight = _weights(
            product, of_rows, of_columns, bias, slope, shift, unequal, pull, offset, PAIRS, CLASSES,
            CATEGORICAL, dtype,
        )  # fmt: skip
    g = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[g]))
    g = warpgroup_mma(gl.convert_layout(weight, WEIGHTS), ring.index(slot), g, is_async=True)
    g = warpgroup_mma_wait(0, deps=[g])
    row = gl.arange(0, BLOCK_I, gl.SliceLayout(1, SUMS))
    channel = gl.arange(0, WIDTH, gl.SliceLayout(0, SUMS))
    scale = of_rows.index(0).load(gl.SliceLayout(1, SUMS))
    gl.store(g_ptr + (row[:, None] * WIDTH + channel[None, :]), g * scale[:, None])


@gluon.jit
def _allocate(dtype: gl.constexpr, WIDTH: gl.constexpr, CLASSES: gl.constexpr, BLOCK_I: gl.constexpr,
              BLOCK_J: gl.constexpr):  # fmt: skip
    """Shared memory for own rows and a ring of column tiles, and for the numbers of both (`_keep`)."""
    OWN: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_I, WIDTH], dtype)
    RING: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_J, WIDTH], dtype)
    own = gl.allocate_shared_memory(dtype, [BLOCK_I, WIDTH], OWN)
    ring = gl.allocate_shared_memory(dtype, [_RING, BLOCK_J, WIDTH], RING)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    of_rows = gl.allocate_shared_memory(gl.float32, [2 + CLASSES, BLOCK_I], FLAT)
    return own, ring, of_rows, gl.allocate_shared_memory(gl.float32, [2 + CLASSES, BLOCK_J], FLAT)


@gluon.jit(do_not_specialize=["num_classes"])
def pdcr_bwd_hopper_kernel(
    items_ptr,
    records_ptr,
    rows_ptr,
    floats_ptr,
    log_z_ptr,
    g_ptr,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    log_weight_scale,
    WIDTHS: gl.constexpr,  # one
    CLASSES: gl.constexpr,
    MORE_CLASSES: gl.constexpr,
    CATEGORICAL: gl.constexpr,
    PLAIN: gl.constexpr,
    BOUNDED: gl.constexpr,
    BLOCK_I: gl.constexpr,
    BLOCK_J: gl.constexpr,
):
    """As `pdcr_bwd_kernel`, overlapped."""
    gl.static_assert(PLAIN and BOUNDED and not MORE_CLASSES)
    own, ring, of_rows, of_columns = _allocate(
        rows_ptr.dtype.element_ty, WIDTHS[0], CLASSES, BLOCK_I, BLOCK_J
    )
    item_ptr = items_ptr + gl.program_id(0) * TILE_ITEM
    record_ptr = records_ptr + gl.load(item_ptr + TILE_IMAGE) * RECORD
    _multiply_row_tile(
        own,
        ring,
        of_rows,
        of_columns,
        rows_ptr + tl.multiple_of(gl.load(record_ptr + ROWS), 64),
        floats_ptr + tl.multiple_of(gl.load(record_ptr + SCALE), 64),
        floats_ptr + tl.multiple_of(gl.load(record_ptr + PHI), 64),
        log_z_ptr + gl.load(record_ptr + LOG_Z),
        floats_ptr + gl.load(record_ptr + STATS),
        g_ptr + tl.multiple_of(gl.load(item_ptr + TILE_OUT), 64),
        gl.load(item_ptr + TILE_ROW_TILE).to(gl.int32),
        gl.load(item_ptr + TILE_START).to(gl.int32),
        gl.load(item_ptr + TILE_STOP).to(gl.int32),
        0,
        0,
        tl.multiple_of(gl.load(record_ptr + PADDED), 64).to(gl.int32),
        gl.load(record_ptr + COUNT).to(gl.int32),
        bias,
        slope,
        shift,
        unequal,
        pull,
        offset,
        log_weight_scale,
        WIDTHS[0],
        CLASSES,
        CATEGORICAL,
        BLOCK_I,
        BLOCK_J,
    )


@gluon.jit(do_not_specialize=["num_classes"])
def pdcr_bwd_groups_hopper_kernel(
    items_ptr,
    records_ptr,
    rows_ptr,
    floats_ptr,
    g_ptr,
    num_classes,
    bias,
    slope,
    shift,
    unequal,
    pull,
    offset,
    log_weight_scale,
    WIDTHS: gl.constexpr,  # one
    CLASSES: gl.constexpr,
    MORE_CLASSES: gl.constexpr,
    CATEGORICAL: gl.constexpr,
    PLAIN: gl.constexpr,
    BOUNDED: gl.constexpr,
    BLOCK_I: gl.constexpr,
    BLOCK_J: gl.constexpr,
):
    """As `pdcr_bwd_groups_kernel`, overlapped."""
    gl.static_assert(PLAIN and BOUNDED and not MORE_CLASSES)
    COLUMNS: gl.constexpr = TILE // BLOCK_J  # of a step
    BY_GROUP: gl.constexpr = gl.BlockedLayout([1, GROUPS], [32, 1], [gl.num_warps(), 1], [1, 0])
    own, ring, of_rows, of_columns = _allocate(
        rows_ptr.dtype.element_ty, WIDTHS[0], CLASSES, BLOCK_I, BLOCK_J
    )
    item_ptr = items_ptr + gl.program_id(0) * SHARE_ITEM
    record_ptr = records_ptr + gl.load(item_ptr + SHARE_IMAGE) * RECORD
    step = first_step(item_ptr, floats_ptr + gl.load(record_ptr + CORES), BLOCK_I)
    while step >= 0:
        # All is loaded again for every row tile: the products need the registers.
        cores_ptr = floats_ptr + gl.load(record_ptr + CORES)
        groups = gl.arange(0, GROUPS, gl.SliceLayout(0, BY_GROUP))
        tiles = gl.arange(0, TILE, gl.SliceLayout(1, BY_GROUP))
        tile, begin, end, following = next_row_tile(item_ptr, cores_ptr, step, BLOCK_I, tiles, groups)
        skip_first, num_skipped = core_around(cores_ptr, tile * BLOCK_I, groups)
        part = gl.load(item_ptr + SHARE_NUMBER).to(gl.int32) + tile
        _multiply_row_tile(
            own,
            ring,
            of_rows,
            of_columns,
            rows_ptr + tl.multiple_of(gl.load(record_ptr + ROWS), 64),
            floats_ptr + tl.multiple_of(gl.load(record_ptr + SCALE), 64),
            floats_ptr + tl.multiple_of(gl.load(record_ptr + PHI), 64),
            floats_ptr + gl.load(record_ptr + LOG_Z_OF_ROWS),
            floats_ptr + gl.load(record_ptr + STATS),
            g_ptr
            + tl.multiple_of(gl.load(item_ptr + SHARE_OUT), 64)
            + part.to(gl.int64) * (BLOCK_I * WIDTHS[0]),
            tile,
            (step - begin) * COLUMNS,
            (end - begin) * COLUMNS,
            skip_first // BLOCK_J,
            num_skipped // BLOCK_J,
            tl.multiple_of(gl.load(record_ptr + PADDED), 64).to(gl.int32),
            gl.load(record_ptr + COUNT).to(gl.int32),
            bias,
            slope,
            shift,
            unequal,
            pull,
            offset,
            log_weight_scale,
            WIDTHS[0],
            CLASSES,
            CATEGORICAL,
            BLOCK_I,
            BLOCK_J,
        )
        step = following
