"""Where the kernels find the numbers of a call, and which part of the work each program does.

Both are tables of integers on the device. They depend on a `Call` and on tile sizes alone, so they are made
once. A program reads one item of its kernel's table, and the record of the image that the item belongs to.
Kernels over slabs read no items: the grid gives their part.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import triton.language as tl

from contrastseg_fast.kernels._device_table import Table
from contrastseg_fast.kernels.pdcr import plan
from contrastseg_fast.problems import NUM_GROUPS, PADDING, Call, aligned, padded, saved_floats


class Record(NamedTuple):
    """An image of a problem: its sizes, and where its numbers begin in each tensor of the call."""

    padded: int  # P
    num_vectors: int  # N
    width: int
    rows: int  # (P, width), in rows
    # In floats:
    scale: int  # (P): 1 / length of the packed row, or EXCLUDED
    inverse_length: int  # (P): 1 / |v|
    phi: int  # (M, P): scaled ratios
    unit_sum: int  # (width): S
    stats: int  # (2): the number of valid vectors n, and the factor of the incoming gradient
    # In floats, if rows are grouped (groups.py):
    rows_of_vectors: int  # (P)
    cores: int  # where the groups lie
    group_sums: int  # (groups, width): sums of the unit vectors of their cores
    log_z_of_rows: int  # (P); in log_z, if rows are in the order of vectors
    # In keys, if rows are grouped:
    keys: int  # (P): group and rank of every vector
    histograms: int  # (blocks, groups): vectors of every group
    group_blocks: int  # how many blocks
    # In scratch:
    z: int  # (P): sums of exponentials; their log2 unless SYMMETRIC; at first the number of skipped pairs
    sums: int  # (blocks, width): sums of the unit vectors of some rows
    valid: int  # (blocks): numbers of valid vectors
    blocks: int  # how many blocks
    part_sums: int  # (parts, width): sums of several of `sums`
    log_z: int  # (N), in log_z
    parts: int  # in which the loss is summed up
    # In partials:
    partial: int  # (parts, 3): sums of log Z, of weighted similarities, of valid vectors
    counter: int  # of programs that are through with the image
    loss: int  # the image's number, also of its element of the loss and of the loss's gradient


def _fields(record: type[NamedTuple]) -> list[tl.constexpr]:
    return [tl.constexpr(number) for number in range(len(record._fields))]


# The places of the fields, for kernels, which see a table as rows of integers.
RECORD = tl.constexpr(len(Record._fields))
(
    PADDED, COUNT, WIDTH, ROWS, SCALE, INVERSE_LENGTH, PHI, UNIT_SUM, STATS, ROWS_OF_VECTORS, CORES,
    GROUP_SUMS, LOG_Z_OF_ROWS, KEYS, HISTOGRAMS, GROUP_BLOCKS, Z, SUMS, VALID, BLOCKS, PART_SUMS, LOG_Z,
    PARTS, PARTIAL, COUNTER, LOSS,
) = _fields(Record)  # fmt: skip


class SourceRecord(NamedTuple):
    """A source: how its vectors are read, see `problems.Source`."""

    stride_b: int
    stride_n: int
    stride_c: int
    channels: int
    extent_z: int
    extent_y: int
    extent_x: int
    count_z: int
    count_y: int
    count_x: int
    positions: int


SOURCE = tl.constexpr(len(SourceRecord._fields))
(
    STRIDE_B, STRIDE_N, STRIDE_C, CHANNELS, EXTENT_Z, EXTENT_Y, EXTENT_X, COUNT_Z, COUNT_Y, COUNT_X,
    POSITIONS_AT,
) = _fields(SourceRecord)  # fmt: skip


class RowItem(NamedTuple):
    """Some rows of an image, which one program packs, or takes all pairs of."""

    image: int  # its record
    source: int
    source_image: int
    vector: int  # the first one
    rows: int
    row: int  # the first one
    ratios: int  # where those of the source's image begin
    valid: int
    num_vectors: int  # of the source: rows beyond are padding
    sums: int  # where the sums go of a program that packs
    valid_sum: int
    group_block: int  # its block of keys, if rows are grouped


ROW_ITEM = tl.constexpr(len(RowItem._fields))
(
    ROW_IMAGE, ROW_SOURCE, ROW_SOURCE_IMAGE, ROW_VECTOR, ROW_NUMBER, ROW_FIRST, ROW_RATIOS, ROW_VALID,
    ROW_VECTORS, ROW_SUMS, ROW_VALID_SUM, ROW_GROUP_BLOCK,
) = _fields(RowItem)  # fmt: skip


class TileItem(NamedTuple):
    """A row tile of an image and some column tiles."""

    image: int
    width: int  # its number among the widths of the call
    row_tile: int
    start: int  # the first column tile
    stop: int
    out: int  # where the program's sum goes, or its part of g begins


TILE_ITEM = tl.constexpr(len(TileItem._fields))
TILE_IMAGE, TILE_WIDTH, TILE_ROW_TILE, TILE_START, TILE_STOP, TILE_OUT = _fields(TileItem)


class ShareItem(NamedTuple):
    """A program's share of the steps of an image whose rows are grouped (groups.py)."""

    image: int
    width: int
    number: int  # of the share
    shares: int  # of the image
    least: int  # steps of a share at least
    out: int  # where the image's parts of g begin


SHARE_ITEM = tl.constexpr(len(ShareItem._fields))
SHARE_IMAGE, SHARE_WIDTH, SHARE_NUMBER, SHARE_SHARES, SHARE_LEAST, SHARE_OUT = _fields(ShareItem)


class GradientItem(NamedTuple):
    """Some vectors of a source, and which uses they have."""

    source: int
    vector: int  # the first one
    num_vectors: int  # of the source
    first_use: int
    stop_use: int
    out: int


GRADIENT_ITEM = tl.constexpr(len(GradientItem._fields))
GRAD_SOURCE, GRAD_VECTOR, GRAD_VECTORS, GRAD_FIRST_USE, GRAD_STOP_USE, GRAD_OUT = _fields(GradientItem)


class Use(NamedTuple):
    """An image of a problem that holds the vectors of an image of a source."""

    image: int
    row: int  # of the first vector


USE = tl.constexpr(len(Use._fields))
USE_IMAGE, USE_ROW = _fields(Use)
LOSS_ITEM = tl.constexpr(2)  # an image and a part of it


class Sizes(NamedTuple):
    """Numbers in the tensors of a call."""

    rows: int
    floats: int
    log_z: int
    scratch: int  # fp32, of the forward pass alone
    partials: int  # fp64, of the forward pass alone: counters, losses of images, sums of their parts
    keys: int  # int32, of the forward pass alone
    counters: int
    losses: int


class Layout(NamedTuple):
    """A call's tables that do not depend on tiles."""

    sizes: Sizes
    images: tuple[Record, ...]
    records: Table  # of the images
    sources: Table
    row_items: Table
    group_items: Table  # row items too; none unless rows are grouped
    loss_items: Table
    problem_images: Table  # (problems, 2): first image, and one behind the last
    block_n: int  # vectors that a program over rows takes
    block_c: int  # all of their channels
    group_n: int  # vectors that a program over keys takes
    loss_n: int  # vectors of a part of the loss


class Tiles(NamedTuple):
    """The items of a kernel over tiles, and where the numbers of every image lie that its programs write."""

    items: Table
    spans: Table  # (images, 2); of shares (images, 3)
    numbers: int  # that programs write


@functools.lru_cache(maxsize=1024)
def lay_out(call: Call, launch: plan.RowLaunch) -> Layout:
    """The tables of a call that do not depend on tiles."""
    widest = max(call.width(problem) for problem in call.problems)
    block_c = max(16, 1 << (widest - 1).bit_length())
    block_n = max(1, launch.elements // block_c)
    records: list[Record] = []
    row_items: list[RowItem] = []
    group_items: list[RowItem] = []
    loss_items: list[list[int]] = []
    problem_images = []
    group_n = max(plan.GROUP_ROWS, block_n)
    loss_n = PADDING if call.grouped else launch.loss_rows
    rows = floats = log_z = scratch = parts = keys = 0
    num_images = sum(map(call.images, call.problems))
    first_partial = 1 + num_images
    for number, problem in enumerate(call.problems):
        width, count = call.width(problem), call.count(problem)
        height = padded(count)
        problem_images.append([len(records), len(records) + call.images(problem)])
        blocks = _row_blocks(call, number, block_n, group_n)
        group_blocks = _row_blocks(call, number, group_n, group_n) if call.grouped else [[]] * len(blocks)
        for image in range(call.images(problem)):
            own = blocks[image]
            num_parts = -(-count // loss_n)
            phi = floats + 2 * height
            unit_sum = phi + call.num_compared * height
            stats = unit_sum + aligned(width)
            places = aligned(stats + 2)
            sums = scratch + height
            valid = sums + aligned(len(own) * width)
            part_sums = valid + aligned(len(own))
            index = len(records)
            row_items += [
                item._replace(image=index, sums=sums + block * width, valid_sum=valid + block)
                for block, item in enumerate(own)
            ]
            group_items += [item._replace(image=index) for item in group_blocks[image]]
            loss_items += [[index, part] for part in range(num_parts)]
            records.append(
                Record(
                    padded=height,
                    num_vectors=count,
                    width=width,
                    rows=rows,
                    scale=floats,
                    inverse_length=floats + height,
                    phi=phi,
                    unit_sum=unit_sum,
                    stats=stats,
                    rows_of_vectors=places,
                    log_z_of_rows=places + height if call.grouped else log_z,
                    cores=places + 2 * height,
                    group_sums=aligned(places + 2 * height + 1),
                    keys=keys,
                    histograms=keys + height,
                    group_blocks=len(group_blocks[image]),
                    z=scratch,
                    sums=sums,
                    valid=valid,
                    blocks=len(own),
                    part_sums=part_sums,
                    log_z=log_z,
                    parts=num_parts,
                    partial=first_partial + num_images + 3 * parts,
                    counter=1 + index,
                    loss=index,
                )
            )
            rows += height * width
            floats += saved_floats(count, width, call.num_compared, call.grouped)
            keys += height + NUM_GROUPS * len(group_blocks[image])
            scratch = part_sums + aligned(num_parts * width)
            log_z += count
            parts += num_parts
    sources = [
        SourceRecord(*source.strides, source.channels, *source.extents, *source.counts, source.positions_at)
        for source in call.sources
    ]
    partials = first_partial + num_images + 3 * parts
    return Layout(
        Sizes(rows, floats, log_z, scratch, partials, keys, first_partial, num_images),
        tuple(records),
        Table(records),
        Table(sources),
        Table(row_items),
        Table(group_items),
        Table(loss_items),
        Table(problem_images),
        block_n,
        block_c,
        group_n,
        loss_n,
    )


def _row_blocks(call: Call, number: int, rows_at_once: int, group_n: int) -> list[list[RowItem]]:
    """The row items of every image of a problem, but for the image and the places of sums.

    The last rows of an image are no vectors: the block before them writes them too. Blocks of keys, of
    `group_n` vectors, begin anew with every image of a source, as those of rows do.
    """
    problem = call.problems[number]
    images, count = call.images(problem), call.count(problem)
    blocks: list[list[RowItem]] = [[] for _ in range(images)]
    group_blocks = [0] * images
    stride = count // call.sources[problem.segments[0].source].images if problem.merged else 0
    row = 0
    for segment in problem.segments:
        source = call.sources[segment.source]
        for image in range(source.images):
            of_problem = 0 if problem.merged else image
            first_row = row + image * stride
            end = first_row + source.num_vectors
            stop = padded(count) if end == count else end
            for first in range(first_row, stop, rows_at_once):
                blocks[of_problem].append(
                    RowItem(
                        image=0,
                        source=segment.source,
                        source_image=image,
                        vector=first - first_row,
                        rows=min(rows_at_once, stop - first),
                        row=first,
                        ratios=segment.ratios_at + image * segment.ratios_stride,
                        valid=segment.valid_at + image * segment.valid_stride,
                        num_vectors=source.num_vectors,
                        sums=0,
                        valid_sum=0,
                        group_block=group_blocks[of_problem] + (first - first_row) // group_n,
                    )
                )
            group_blocks[of_problem] += -(-(stop - first_row) // group_n)
        row += source.num_vectors
    return blocks


@functools.lru_cache(maxsize=1024)
def small_items(call: Call, block_i: int) -> Table:
    """Items of the kernels of small calls, each a row tile of an image, the last ones without vectors."""
    items = []
    first_image = 0
    for number, problem in enumerate(call.problems):
        for image, blocks in enumerate(_row_blocks(call, number, block_i, block_i), first_image):
            items += [item._replace(image=image) for item in blocks]
        first_image += call.images(problem)
    return Table(items)


def _column_chunks(
    image: Record, launch: plan.Launch, first: int, per_program: int, widest: int, most: int
) -> list[range]:
    """Column tiles from `first` on in at most `most` chunks, each like `per_program` of the widest."""
    columns = image.padded // launch.block_j
    own = max(1, min(most, columns - first, (columns - first) * image.width // (per_program * widest)))
    bounds = [first + part * (columns - first) // own for part in range(own + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def _by_cost(items: list[TileItem], widths: tuple[int, ...]) -> Table:
    """The items, those that take longest first, so that none of these is left at the end."""
    longest_first = sorted(items, key=lambda item: (item.start - item.stop) * widths[item.width])
    return Table(longest_first)


@functools.lru_cache(maxsize=1024)
def forward_tiles(
    call: Call, rows: plan.RowLaunch, launch: plan.Launch, symmetric: bool, per_program: int
) -> Tiles:
    """Items of the forward pass: row tiles with some column tiles, from the diagonal on if symmetric.

    The spans say where the sums of an image begin and end.
    """
    widths = fused_widths(call)
    items: list[TileItem] = []
    spans = []
    for index, image in enumerate(lay_out(call, rows).images):
        begin, columns = len(items), image.padded // launch.block_j
        for tile in range(image.padded // launch.block_i):
            first = tile * launch.block_i // launch.block_j if symmetric else 0
            most = columns if symmetric else 1
            chunks = _column_chunks(image, launch, first, per_program, widths[-1], most)
            for chunk in chunks:
                items.append(
                    TileItem(index, widths.index(image.width), tile, chunk.start, chunk.stop, len(items))
                )
        spans.append([begin, len(items)])
    return Tiles(_by_cost(items, widths), Table(spans), len(items))


@functools.lru_cache(maxsize=1024)
def backward_tiles(call: Call, rows: plan.RowLaunch, launch: plan.Launch, per_program: int) -> Tiles:
    """Items of the backward pass: row tiles with some column tiles, for one part of g `(parts, P, width)`.

    The spans say where the g of an image begins, and its number of parts.
    """
    widths = fused_widths(call)
    items: list[TileItem] = []
    spans = []
    numbers = 0
    for index, image in enumerate(lay_out(call, rows).images):
        chunks = _column_chunks(image, launch, 0, per_program, widths[-1], plan.most_parts(image.width))
        for tile in range(image.padded // launch.block_i):
            for part, chunk in enumerate(chunks):
                at = numbers + (part * image.padded + tile * launch.block_i) * image.width
                items.append(TileItem(index, widths.index(image.width), tile, chunk.start, chunk.stop, at))
        spans.append([numbers, len(chunks)])
        numbers += len(chunks) * image.padded * image.width
    return Tiles(_by_cost(items, widths), Table(spans), numbers)


@functools.lru_cache(maxsize=1024)
def shares(call: Call, rows: plan.RowLaunch, launch: plan.Launch, programs: int) -> Tiles:
    """Items of the backward pass over grouped rows, which share the steps of each image evenly.

    Share s of row tile r goes to part s + r, so that no two are the same. The spans say where the parts of an
    image begin, how many shares it has, and the least steps of a share.
    """
    widths, images = fused_widths(call), lay_out(call, rows).images
    costs = [image.padded**2 * image.width for image in images]
    if len(images) > 1:
        programs *= 2  # which skip unequal numbers of pairs: short programs fill the gaps of long ones
    items, spans, numbers = [], [], 0
    for index, (image, cost) in enumerate(zip(images, costs, strict=True)):
        own = max(1, programs * cost // sum(costs))
        least = -(-image.padded // (PADDING * plan.most_parts(image.width)))
        items += [
            ShareItem(index, widths.index(image.width), number, own, least, numbers) for number in range(own)
        ]
        spans.append([numbers, own, least])
        numbers += (own + image.padded // launch.block_i) * launch.block_i * image.width
    return Tiles(Table(items), Table(spans), numbers)


@functools.lru_cache(maxsize=1024)
def slab_spans(call: Call, rows: plan.RowLaunch, launch: plan.Launch, per_program: int) -> tuple[Table, int]:
    """For slabs: where the sums of every image begin and end, one for each program; and how many sums."""
    spans, end = [], 0
    for image in lay_out(call, rows).images:
        chunks = -(-image.padded // (launch.block_j * per_program))
        begin, end = end, end + image.padded // launch.block_i * chunks
        spans.append([begin, end])
    return Table(spans), end


@functools.lru_cache(maxsize=1024)
def whole_rows(call: Call, rows: plan.RowLaunch) -> Table:
    """The spans of a g that lies where packed rows lie, in one part."""
    return Table([[image.rows, 1] for image in lay_out(call, rows).images])


@functools.lru_cache(maxsize=1024)
def gradient_items(call: Call, rows: plan.RowLaunch) -> tuple[Table, Table]:
    """Items of the gradient kernel, each some vectors of a source; and the uses of all vectors."""
    laid_out = lay_out(call, rows)
    uses: list[Use] = []
    items: list[GradientItem] = []
    for number, source in enumerate(call.sources):
        for image in range(source.images):
            begin = len(uses)
            for problem, (first_image, _) in zip(
                call.problems, laid_out.problem_images.numbers.tolist(), strict=True
            ):
                row = 0
                for segment in problem.segments:
                    if segment.source == number and problem.merged:
                        uses.append(Use(first_image, row + image * (call.count(problem) // source.images)))
                    elif segment.source == number:
                        uses.append(Use(first_image + image, row))
                    row += call.sources[segment.source].num_vectors
            for first in range(0, source.num_vectors, laid_out.block_n):
                at = (image * source.num_vectors + first) * source.channels
                items.append(GradientItem(number, first, source.num_vectors, begin, len(uses), at))
    return Table(items), Table(uses)


def fused_widths(call: Call) -> tuple[int, ...]:
    """The widths of packed rows in a call."""
    return tuple(sorted({call.width(problem) for problem in call.problems}))
