"""Groups of vectors with equal ratios: their rows lie together, so that whole tiles of pairs can be skipped.

A pair at distance 0 has the exponential 1, no weighted similarity, and the same bracket of g as all others:

    Z_i += 1        g_i -= 2 (num_bias - separate_bias) u_j

Most vectors of a real mask have patches of one class alone, which forms a group: its ratio is exactly 1, all
others are 0. So are vectors whose compared ratios are all 0, or those of one category. The packed rows of an
image are these groups one after another, then the vectors of no group, then those that are left out with the
padding, all in the order of vectors. The core of a group is what it has of whole tiles of PADDING rows, so
that it is the same for tiles of every size. Pairs within a core are skipped: Z begins with their number, and
the gradient kernel adds the sum of the core's unit vectors to g.

Cores are numbers in floats: the first tile of every group's core, the number of its tiles, then that of all
tiles with valid rows, and the number of pairs of tiles that are left. A step is a row tile with PADDING
columns. The backward pass shares the steps of an image evenly, wherever row tiles begin or end. Programs
compute where their steps lie, since only the device knows the groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from contrastseg_fast.kernels.pdcr.layout import (
    GROUP_BLOCKS,
    HISTOGRAMS,
    KEYS,
    RECORD,
    ROW_FIRST,
    ROW_GROUP_BLOCK,
    ROW_IMAGE,
    ROW_ITEM,
    ROW_NUMBER,
    ROW_RATIOS,
    ROW_VALID,
    ROW_VECTOR,
    ROW_VECTORS,
    SHARE_LEAST,
    SHARE_NUMBER,
    SHARE_SHARES,
)
from contrastseg_fast.kernels.pdcr.tiles import are_valid
from contrastseg_fast.problems import NUM_GROUPS, PADDING

GROUPS = tl.constexpr(NUM_GROUPS)
TILE = tl.constexpr(PADDING)
MIXED = tl.constexpr(NUM_GROUPS - 2)  # the vectors of no group; all groups before it have a core
LEFT_OUT = tl.constexpr(NUM_GROUPS - 1)
VALID_TILES, LEFT_PAIRS = tl.constexpr(2 * NUM_GROUPS), tl.constexpr(2 * NUM_GROUPS + 1)
_RANK_BITS = tl.constexpr(16)
_RANK_MASK = tl.constexpr((1 << 16) - 1)
_BLOCKS_AT_ONCE = tl.constexpr(32)


@triton.jit
def load_vector_numbers(item_ptr, valid_ptr, least_valid, BLOCK_N: tl.constexpr):
    """Rows of an item: which of `BLOCK_N` it has, their vectors, and which of these make pairs."""
    step = tl.arange(0, BLOCK_N)
    in_image = step < tl.load(item_ptr + ROW_NUMBER)  # [BLOCK_N]
    n = tl.load(item_ptr + ROW_VECTOR) + step
    inside = in_image & (n < tl.load(item_ptr + ROW_VECTORS))
    return in_image, n, are_valid(valid_ptr, tl.load(item_ptr + ROW_VALID), n, inside, least_valid)


@triton.jit
def _find_groups(ratio_ptrs, included, num_classes, stride_m, CATEGORICAL: tl.constexpr):
    """The groups of vectors [BLOCK_N]."""
    if CATEGORICAL:
        category = tl.load(ratio_ptrs, included, 0).to(tl.float32)
        is_small = (category >= 0) & (category < MIXED)
        group = tl.where(is_small, category, 0.0).to(tl.int32)
        is_pure = is_small & (group.to(tl.float32) == category)
    else:
        group = tl.zeros(included.shape, tl.int32)
        ones = tl.zeros(included.shape, tl.int32)
        others = tl.zeros(included.shape, tl.int32)
        for m in range(num_classes):
            ratio = tl.load(ratio_ptrs, included, 0).to(tl.float32)
            group = tl.where(ratio == 1, m + 1, group)
            ones += tl.where(ratio == 1, 1, 0)
            others += tl.where((ratio == 1) | (ratio == 0), 0, 1)
            ratio_ptrs += stride_m
        is_pure = (ones <= 1) & (others == 0) & (group < MIXED)
    return tl.where(included, tl.where(is_pure, group, MIXED), LEFT_OUT)


@triton.jit(do_not_specialize=["num_classes", "ratios_stride_n", "ratios_stride_m"])
def pdcr_groups_kernel(
    ratios_ptr,
    valid_ptr,  # bytes, fp32, or None
    items_ptr,
    records_ptr,
    keys_ptr,
    num_classes,
    ratios_stride_n,
    ratios_stride_m,
    least_valid,
    CATEGORICAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The groups of some vectors, their ranks among those of equal groups, and how many each group has."""
    item_ptr = items_ptr + tl.program_id(0) * ROW_ITEM
    record_ptr = records_ptr + tl.load(item_ptr + ROW_IMAGE) * RECORD
    in_image, n, included = load_vector_numbers(item_ptr, valid_ptr, least_valid, BLOCK_N)
    ratio_ptrs = ratios_ptr + tl.load(item_ptr + ROW_RATIOS) + n * ratios_stride_n
    group = _find_groups(ratio_ptrs, included, num_classes, ratios_stride_m, CATEGORICAL)
    groups = tl.arange(0, GROUPS)
    is_of = (in_image[:, None] & (group[:, None] == groups[None, :])).to(tl.int32)  # [BLOCK_N, GROUPS]
    rank = tl.sum(is_of * (tl.cumsum(is_of, 0) - 1), 1)
    row = tl.load(item_ptr + ROW_FIRST) + tl.arange(0, BLOCK_N)
    tl.store(keys_ptr + tl.load(record_ptr + KEYS) + row, (group << _RANK_BITS) + rank, in_image)
    block = tl.load(item_ptr + ROW_GROUP_BLOCK)
    histogram_ptr = keys_ptr + tl.load(record_ptr + HISTOGRAMS) + block * GROUPS
    tl.store(histogram_ptr + groups, tl.sum(is_of, 0))


@triton.jit
def find_places(record_ptr, keys_ptr, block, row, in_image):
    """Rows of vectors, how many pairs of each are skipped, and the image's cores.

    Args:
        block: of keys.
        row: vectors of the image, [BLOCK_N].

    Returns:
        the rows and their numbers of skipped pairs, [BLOCK_N]; the first tile of every core and its number of
        tiles, [GROUPS]; and the number of tiles with valid rows.
    """
    groups = tl.arange(0, GROUPS)
    number = tl.zeros([GROUPS], tl.int32)
    before = tl.zeros([GROUPS], tl.int32)
    blocks = tl.load(record_ptr + GROUP_BLOCKS)
    for first in range(0, blocks, _BLOCKS_AT_ONCE):
        other = first + tl.arange(0, _BLOCKS_AT_ONCE)
        ptrs = keys_ptr + tl.load(record_ptr + HISTOGRAMS) + (other * GROUPS)[:, None] + groups[None, :]
        histogram = tl.load(ptrs, (other < blocks)[:, None], 0)  # [_BLOCKS_AT_ONCE, GROUPS]
        number += tl.sum(histogram, 0)
        before += tl.sum(tl.where((other < block)[:, None], histogram, 0), 0)
    start = tl.cumsum(number, 0) - number
    first_tile = (start + TILE - 1) // TILE
    num_tiles = tl.where(groups < MIXED, tl.maximum((start + number) // TILE - first_tile, 0), 0)
    valid_tiles = tl.sum(tl.where(groups == LEFT_OUT, (start + TILE - 1) // TILE, 0), 0)
    key = tl.load(keys_ptr + tl.load(record_ptr + KEYS) + row, in_image, 0)  # [BLOCK_N]
    is_of = (key >> _RANK_BITS)[:, None] == groups[None, :]  # [BLOCK_N, GROUPS]
    place = tl.sum(tl.where(is_of, (start + before)[None, :], 0), 1) + (key & _RANK_MASK)
    tile = place // TILE
    in_core = (tile[:, None] >= first_tile[None, :]) & (tile[:, None] < (first_tile + num_tiles)[None, :])
    skipped = tl.sum(tl.where(in_core, (num_tiles * TILE)[None, :], 0), 1)
    return place, skipped, first_tile, num_tiles, valid_tiles


@triton.jit
def store_cores(cores_ptr, first_tile, num_tiles, valid_tiles):
    """Stores the cores of an image."""
    groups = tl.arange(0, GROUPS)
    tl.store(cores_ptr + groups, first_tile.to(tl.float32))
    tl.store(cores_ptr + GROUPS + groups, num_tiles.to(tl.float32))
    left = valid_tiles * valid_tiles - tl.sum(num_tiles * num_tiles, 0)
    tl.store(cores_ptr + VALID_TILES, valid_tiles.to(tl.float32))
    tl.store(cores_ptr + LEFT_PAIRS, left.to(tl.float32))


@triton.jit
def load_cores(cores_ptr, groups=None):
    """The first tile of every group's core, and its number of tiles, [GROUPS].

    Gluon needs to know where threads keep numbers: there, callers pass those of all `groups` and `tiles`.
    """
    if groups is None:
        groups = tl.arange(0, GROUPS)
    return tl.load(cores_ptr + groups).to(tl.int32), tl.load(cores_ptr + GROUPS + groups).to(tl.int32)


@triton.jit
def core_around(cores_ptr, row, groups=None):
    """The first row of the core that holds the row tile from `row` on, and its rows; or nothing."""
    first_tile, num_tiles = load_cores(cores_ptr, groups)
    tile = row // TILE
    holds = (first_tile <= tile) & (tile < first_tile + num_tiles)
    return tl.sum(tl.where(holds, first_tile, 0), 0) * TILE, tl.sum(tl.where(holds, num_tiles, 0), 0) * TILE


@triton.jit
def core_of_rows(cores_ptr, row):
    """The group whose core holds each row [N], and whether there is one."""
    first_tile, num_tiles = load_cores(cores_ptr)
    tile = (row // TILE)[:, None]
    holds = ((first_tile[None, :] <= tile) & (tile < (first_tile + num_tiles)[None, :])).to(tl.int32)
    return tl.sum(holds * tl.arange(0, GROUPS)[None, :], 1), tl.sum(holds, 1) > 0


@triton.jit
def left_of_columns(cores_ptr, row, start, stop, BLOCK_J: tl.constexpr):
    """Which of some column tiles the row tile from `row` on computes.

    Returns:
        the first tile that is skipped, how many are; and the range of the others, counted without these.
    """
    first_row, num_rows = core_around(cores_ptr, row)
    skip_first, num_skipped = first_row // BLOCK_J, num_rows // BLOCK_J
    stop = tl.minimum(stop, tl.load(cores_ptr + VALID_TILES).to(tl.int32) * (TILE // BLOCK_J))
    start -= tl.minimum(tl.maximum(start - skip_first, 0), num_skipped)
    stop -= tl.minimum(tl.maximum(stop - skip_first, 0), num_skipped)
    return skip_first, num_skipped, start, stop


@triton.jit
def steps_above(cores_ptr, tile, BLOCK_I: tl.constexpr, groups=None):
    """The steps of all row tiles above each of some [T], whose height is BLOCK_I."""
    HEIGHT: tl.constexpr = TILE // BLOCK_I  # of a core's tile, in row tiles
    first_tile, num_tiles = load_cores(cores_ptr, groups)
    in_core = tl.maximum(tile[:, None] - HEIGHT * first_tile[None, :], 0)  # [T, GROUPS]
    in_core = tl.minimum(in_core, HEIGHT * num_tiles[None, :])
    valid_tiles = tl.load(cores_ptr + VALID_TILES).to(tl.int32)
    return tl.minimum(tile, HEIGHT * valid_tiles) * valid_tiles - tl.sum(in_core * num_tiles[None, :], 1)


@triton.jit
def share_of_steps(cores_ptr, shares, least, BLOCK_I: tl.constexpr):
    """The steps of a share at most, and of all shares of the image."""
    total = tl.load(cores_ptr + LEFT_PAIRS).to(tl.int32) * (TILE // BLOCK_I)
    return tl.maximum((total + shares - 1) // shares, least), total


@triton.jit
def first_step(item_ptr, cores_ptr, BLOCK_I: tl.constexpr):
    """The first step of a share, -1 if it has none."""
    size, total = _share_of_item(item_ptr, cores_ptr, BLOCK_I)
    step = tl.load(item_ptr + SHARE_NUMBER).to(tl.int32) * size
    return tl.where(step < total, step, -1)


@triton.jit
def next_row_tile(item_ptr, cores_ptr, step, BLOCK_I: tl.constexpr, tiles=None, groups=None):
    """The row tile of a step of a share.

    Returns:
        the tile; its first step, and the first one after those that belong to the share; and the share's next
        step after these, -1 if there is none.
    """
    size, total = _share_of_item(item_ptr, cores_ptr, BLOCK_I)
    if tiles is None:
        tiles = tl.arange(0, TILE)
    tile, begin, end = 0, 0, total
    for first in range(0, tl.load(cores_ptr + VALID_TILES).to(tl.int32) * (TILE // BLOCK_I), TILE):
        ends = steps_above(cores_ptr, first + 1 + tiles, BLOCK_I, groups)
        is_above = ends <= step
        tile += tl.sum(is_above.to(tl.int32), 0)
        begin = tl.maximum(begin, tl.max(tl.where(is_above, ends, 0), 0))
        end = tl.minimum(end, tl.min(tl.where(is_above, total, ends), 0))
    stop = tl.minimum((step // size + 1) * size, total)
    return tile, begin, tl.minimum(end, stop), tl.where(end < stop, end, -1)


@triton.jit
def _share_of_item(item_ptr, cores_ptr, BLOCK_I: tl.constexpr):
    return share_of_steps(
        cores_ptr,
        tl.load(item_ptr + SHARE_SHARES).to(tl.int32),
        tl.load(item_ptr + SHARE_LEAST).to(tl.int32),
        BLOCK_I,
    )


@triton.jit
def parts_of_rows(cores_ptr, row, shares, least, BLOCK_I: tl.constexpr):
    """Of rows [BLOCK_N]: the first part of their g, and the number of parts."""
    size, _ = share_of_steps(cores_ptr, shares, least, BLOCK_I)
    tile = row // BLOCK_I
    begin, end = steps_above(cores_ptr, tile, BLOCK_I), steps_above(cores_ptr, tile + 1, BLOCK_I)
    first = begin // size
    return first + tile, tl.where(end > begin, (end - 1) // size - first + 1, 0)
