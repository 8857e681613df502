"""`python -m benchmarks.model`: PDCR's time on an H100, reckoned from counts, and the launches to choose.

A tile of the kernels over pairs is a product on the tensor cores, then instructions for every pair. Within
one block the two follow each other; several blocks on a multiprocessor overlap. In cycles of one of them:

    alone    = tensor + instructions / (4 a cycle * share of them that the warps of one block fill) + stall
    together = max(alone / blocks, tensor, instructions / 4, exponentials / 16, bytes / L2 rate)

The overlapped backward kernels compute the weights of pairs while the second product is under way:

    alone    = tensor / 2 + max(tensor / 2, instructions / (4 a cycle * share)) + stall

Instructions come from the compiled loops (Triton 3.6, sm_90), the constants of the card from the counters and
the sweep of one H100. `MEASURED_KERNELS` are those of commit db56307, which ran there; `NOW` are those of
today, which no card has run.
"""

from __future__ import annotations

import itertools
from math import ceil
from typing import NamedTuple

PROCESSORS = 132
CLOCK = 1750.0  # cycles a microsecond
LAUNCH = 2.2  # microseconds between two kernels of a graph
SMALL = 3.0  # microseconds of a kernel that does next to nothing, launch included
DRAM = 3.0e6  # bytes a microsecond
L2 = 4.0e6 / PROCESSORS / CLOCK  # bytes a cycle of one multiprocessor, as the 64 x 64 tiles reached
TENSOR = 2048  # multiplications and additions of 16-bit numbers a cycle, counted together: 4096 flops
ISSUE = 4
EXPONENTIALS = 16
FILLED = {1: 0.55, 2: 0.92}  # share of issue slots, by warps of one block on each of the four schedulers
START = 2000  # cycles from a program's start to its first product, and from its last to its end
GROUPING = {"forward": 2, "backward": 0.5}  # small kernels' times that grouping rows adds; guessed
LEFT = (1.0, 0.58, 0.15)  # shares of tiles: random ratios, the fullest slice of a chest, slices of a brain
RATIOS = 26.0  # microseconds: of three layers' patches in 8 x 512 x 512 labels (benchmarks/NOTES.md)
SPLIT_ROWS = 2  # own rows are written and read again by a kernel that sums split columns


class Tile(NamedTuple):
    """A launch of a kernel over pairs and what its compiled loop takes."""

    rows: int  # that a program owns, in shared memory all along
    columns: int  # rows that stream past them
    warps: int
    stages: int
    blocks: int  # that fit a multiprocessor
    instructions: float  # for a pair, with one class
    per_class: float  # for a pair, for each further class
    stall: float  # cycles per tile for loads, barriers and atomics; fitted where measured
    overlapped: bool = False  # with the second product


class Design(NamedTuple):
    """The kernels of one version, by pass."""

    tiles: dict[str, dict[int, tuple[Tile, ...]]]  # by pass and padded width
    small_kernels: dict[str, int]  # besides the one over pairs
    row_time: dict[str, float]  # microseconds for every 1024 rows in the small kernels
    splits: tuple[int, ...]  # of columns over programs, backward


class Launch(NamedTuple):
    """The choice for a size."""

    tile: Tile
    splits: int
    microseconds: float  # of the kernel over pairs, and of summing what was split


class SmallCall(NamedTuple):
    """The one kernel of a pass over few vectors: a program has some rows, and meets all columns.

    Instructions are those of a warp, in the code for sm_90.
    """

    rows: int
    warps: int
    fixed: float  # for every warp
    element: float  # for 32 numbers of vectors, which are packed
    pair: float  # for 32 pairs, with one class
    per_class: float  # for 32 pairs, for each further class
    end: float  # cycles until the last program has reduced the parts of the others


SMALL_CALL = {
    "forward": SmallCall(32, 8, 710, 17, 36, 5, 1000),
    "backward": SmallCall(32, 8, 600, 0, 13, 2, 0),
}
MEASURED_KERNELS = Design(
    tiles={
        "forward": {
            64: (Tile(128, 128, 8, 3, 1, 16.7, 2.3, 3800), Tile(64, 64, 4, 2, 3, 18.5, 2.3, 950)),
            256: (Tile(128, 128, 8, 2, 1, 18.2, 2.3, 3800), Tile(64, 64, 4, 2, 2, 21.4, 2.3, 950)),
        },
        "backward": {
            64: (Tile(128, 128, 8, 3, 1, 15.0, 2.3, 50), Tile(64, 64, 4, 2, 2, 16.0, 2.3, 50)),
            256: (Tile(128, 64, 8, 3, 1, 16.7, 2.3, 50), Tile(64, 64, 4, 2, 2, 16.5, 2.3, 50)),
        },
    },
    small_kernels={"forward": 5, "backward": 5},
    row_time={"forward": 2.2, "backward": 2.0},
    splits=(1,),
)
NOW = Design(
    tiles={
        "forward": {
            64: (Tile(64, 64, 4, 3, 3, 11.4, 2.1, 200),),
            128: (Tile(64, 64, 4, 2, 3, 11.7, 2.2, 200), Tile(128, 64, 8, 2, 1, 11.5, 2.4, 300)),
            256: (Tile(64, 64, 4, 2, 2, 13.5, 2.2, 200), Tile(128, 64, 8, 2, 1, 13.8, 2.4, 300)),
        },
        "backward": {
            64: (Tile(64, 64, 4, 3, 3, 13.0, 2.3, 50), Tile(128, 128, 8, 3, 1, 12.0, 2.3, 50)),
            128: (Tile(64, 64, 4, 2, 2, 13.0, 2.3, 50), Tile(128, 128, 8, 2, 1, 12.0, 2.3, 50)),
            256: (Tile(64, 64, 4, 2, 2, 13.5, 2.3, 50), Tile(128, 64, 8, 3, 1, 13.7, 2.3, 50)),
        },
    },
    small_kernels={"forward": 1, "backward": 1},
    row_time={"forward": 0.4, "backward": 0.4},
    splits=(1, 2, 4, 8),
)


# The launch of kernels/pdcr/hopper.py for 256 channels, which no table has.
OVERLAPPED = Tile(128, 64, 8, 3, 1, 13.7, 2.3, 50, overlapped=True)


def cycles(tile: Tile, width: int, classes: int, products: int, blocks: int) -> float:
    """Cycles of a multiprocessor for one tile, with that many blocks on it."""
    pairs = tile.rows * tile.columns
    tensor = products * pairs * width / TENSOR
    slots = pairs / 32 * (tile.instructions + (classes - 1) * tile.per_class) / ISSUE
    issued = slots / FILLED[tile.warps // ISSUE]
    alone = (tensor / 2 + max(tensor / 2, issued) if tile.overlapped else tensor + issued) + tile.stall
    traffic = tile.columns * width * 2 / L2  # streamed rows; own rows are read once
    return max(alone / blocks, tensor, slots, pairs / EXPONENTIALS, traffic)


def kernel_time(
    tile: Tile,
    splits: int,
    batch: int,
    count: int,
    width: int,
    classes: int,
    products: int,
    left: float | None = None,
) -> float:
    """Microseconds of the kernel over pairs. One product: forward, every pair once; two: whole rows.

    `left` is the share of tiles that grouped rows do not skip, None if rows are not grouped. Backward, these
    are split evenly over one wave of programs, most of which begin two row tiles.
    """
    row_tiles, column_tiles = ceil(count / tile.rows), ceil(count / tile.columns)
    if products == 1:
        tiles = batch * row_tiles * (column_tiles + tile.rows // tile.columns) / 2
        programs = min(tiles, max(8 * PROCESSORS, tiles / 16))
    else:
        tiles, programs = batch * row_tiles * column_tiles, batch * row_tiles * splits
    slots = PROCESSORS * tile.blocks
    tiles *= 1 if left is None else left
    if left is not None and products == 2:
        length = ceil(tiles / slots)
        busy = length * tile.blocks * cycles(tile, width, classes, 2, tile.blocks) + 2 * START
        return LAUNCH + busy / CLOCK
    together = min(tile.blocks, ceil(programs / PROCESSORS))
    length = ceil(tiles / programs)  # tiles of one program
    full, rest = divmod(ceil(programs), slots)
    waves = [together] * full + ([ceil(rest / PROCESSORS)] if rest else [])
    busy = sum(length * blocks * cycles(tile, width, classes, products, blocks) + START for blocks in waves)
    if products == 1:  # programs of unequal length fill each other's gaps
        even = tiles * cycles(tile, width, classes, 1, together) / PROCESSORS + START * programs / slots
        busy = min(busy, max(even, length * cycles(tile, width, classes, 1, 1) + START))
    return LAUNCH + busy / CLOCK


def best_launch(
    batch: int,
    count: int,
    width: int,
    classes: int,
    direction: str,
    design: Design = NOW,
    left: float | None = None,
) -> Launch:
    """The launch that should be fastest for B images of N vectors; `direction` is forward or backward."""
    by_width = design.tiles[direction]
    tiles = by_width[min(entry for entry in by_width if entry >= width)]
    products = {"forward": 1, "backward": 2}[direction]
    launches = []
    for tile in tiles:
        for splits in design.splits if products == 2 and left is None else (1,):
            if splits > ceil(count / tile.columns):
                continue
            time = kernel_time(tile, splits, batch, count, width, classes, products, left)
            if left is not None and products == 2:  # a program's part of a second row tile
                time += SPLIT_ROWS * PROCESSORS * tile.blocks * tile.rows * width * 4 / DRAM
            if splits > 1:  # written to the L2 cache or memory, and read by the last kernel
                time += (splits - 1) * SPLIT_ROWS * batch * count * width * 4 / DRAM
            launches.append(Launch(tile, splits, time))
    return min(launches, key=lambda launch: launch.microseconds)


def predict(
    batch: int,
    count: int,
    width: int,
    classes: int,
    direction: str,
    design: Design = NOW,
    left: float | None = None,
) -> float:
    """Microseconds of one pass: the kernel over pairs and the small ones around it."""
    launch = best_launch(batch, count, width, classes, direction, design, left)
    rows = design.row_time[direction] * count / 1024 * max(1.0, batch * width / 256 / 4)
    small = design.small_kernels[direction] + (GROUPING[direction] if left is not None else 0)
    return launch.microseconds + small * SMALL + rows


def predict_small(batch: int, count: int, width: int, classes: int, direction: str) -> float:
    """Microseconds of one pass by the kernel of small calls."""
    kernel = SMALL_CALL[direction]
    pairs = kernel.rows * count
    instructions = (
        kernel.warps * kernel.fixed
        + (kernel.rows + count) * width / 32 * kernel.element
        + pairs / 32 * (kernel.pair + (classes - 1) * kernel.per_class)
    )
    products = {"forward": 1, "backward": 2}[direction]
    tensor = products * pairs * width / (TENSOR / 2)  # by the instructions of older cards
    together = ceil(batch * ceil(count / kernel.rows) / PROCESSORS)
    one = instructions / ISSUE / FILLED[kernel.warps // ISSUE] + tensor
    return LAUNCH + (START + together * one + kernel.end) / CLOCK


def predict_call(batch: int, count: int, widths: tuple[int, ...], classes: int, map_bytes: float) -> float:
    """Microseconds of a whole call of `PDCRLoss` and its gradients, a layer for each width.

    All layers share every launch. `map_bytes` are written as dense gradients of the feature maps.
    """
    pairs = rows = 0.0
    for direction in ("forward", "backward"):
        for width in widths:
            launch = best_launch(batch, count, width, classes, direction)
            pairs += launch.microseconds - LAUNCH
            rows += NOW.row_time[direction] * count / 1024 * max(1.0, batch * width / 256 / 4)
    small = sum(NOW.small_kernels.values()) + 1  # and torch's `ones`
    return RATIOS + pairs + 2 * LAUNCH + rows + small * SMALL + LAUNCH + map_bytes / DRAM


# Batch, N, C: microseconds forward and backward of the best measured launches (two classes, bf16).
MEASURED = {
    (1, 256, 256): (22.2, 28.6),
    (1, 4096, 256): (54.8, 102.0),
    (1, 16384, 256): (355.6, 535.9),
    (8, 1024, 256): (41.2, 49.2),
    (8, 1024, 64): (27.0, 29.1),
}
COMPILED = {
    (1, 128, 64): 19,
    (1, 1024, 64): 29,
    (8, 1024, 256): 138,
    (1, 4096, 256): 169,
    (1, 16384, 256): 2301,
}


def main() -> None:
    print("| B, N, C | measured | reckoned |\n|---|---|---|")
    for (batch, count, width), measured in MEASURED.items():
        reckoned = [predict(batch, count, width, 2, way, MEASURED_KERNELS) for way in ("forward", "backward")]
        print(
            f"| {batch}, {count}, {width} | {measured[0]} + {measured[1]} "
            f"| {reckoned[0]:.0f} + {reckoned[1]:.0f} |"
        )
    print("\n| B, N, C | forward: tile | us | backward: tile, splits | us | both | torch.compile |")
    print("|---|---|---|---|---|---|---|")
    for width in (64, 256):
        for batch in (1, 8):
            for count in (128, 256, 512, 1024, 2048, 4096, 16384):
                cells = []
                for direction in ("forward", "backward"):
                    tile, splits, _ = best_launch(batch, count, width, 2, direction)
                    time = predict(batch, count, width, 2, direction)
                    cells.append(
                        (f"{tile.rows} x {tile.columns} x {tile.warps} x {tile.stages}", splits, time)
                    )
                (one, _, forward), (two, splits, backward) = cells
                peer = COMPILED.get((batch, count, width), "")
                print(
                    f"| {batch}, {count}, {width} | {one} | {forward:.0f} | {two}, {splits} | {backward:.0f} "
                    f"| {forward + backward:.0f} | {peer} |"
                )
    print("\n| B, N, C | forward: by tiles | by one kernel | backward: by tiles | by one kernel |")
    print("|---|---|---|---|---|")
    for batch, count, width in itertools.product((1, 8), (64, 128, 256), (64, 256)):
        size = (batch, count, width, 2)
        times = [
            f"{by(*size, way):.1f}" for way in ("forward", "backward") for by in (predict, predict_small)
        ]
        print(f"| {batch}, {count}, {width} | {' | '.join(times)} |")

    maps = 8 * 2 * sum(width * (512 // stride) ** 2 for width, stride in ((64, 4), (128, 8), (256, 16)))
    call = predict_call(8, 1024, (64, 128, 256), 4, maps)
    print(f"\nA whole call, 8 x 512 x 512, three layers, N = 1024, M = 4: {call:.0f} us (torch.compile: 472)")
    overlapped = kernel_time(OVERLAPPED, 1, 1, 16384, 256, 2, products=2)
    print(f"\nThe overlapped backward kernel, 1, 16384, 256: {overlapped:.0f} us")
    print("\n| B, N, C, M, grouped | " + " | ".join(f"{left} left" for left in LEFT) + " | not grouped |")
    print("|---|" + "---|" * (len(LEFT) + 1))
    for width, classes in ((64, 2), (256, 2), (256, 5)):
        for count in (8192, 10240, 16384):
            times = [
                sum(predict(1, count, width, classes, way, NOW, left) for way in ("forward", "backward"))
                for left in (*LEFT, None)
            ]
            print(f"| 1, {count}, {width}, {classes} | " + " | ".join(f"{time:.0f}" for time in times) + " |")


if __name__ == "__main__":
    main()
