"""What the kernels of PDCR are launched with: tiles by card and width, and the terms of an affinity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastseg_fast.affinity import Affinity
from contrastseg_fast.kernels._common import capability, processors, sm_table
from contrastseg_fast.kernels._tuning import Launch, tuned
from contrastseg_fast.problems import Call, padded

_UNROLLED_CLASSES = 8
_REGISTERS, _SHARED_MEMORY = 65536, 227 << 10  # of a processor of sm_90
_LARGEST_EXPONENT = 85.0  # of e; sums of that many exponentials stay finite in fp32


class RowLaunch(NamedTuple):
    """What one program of the kernels over rows takes."""

    elements: int  # vectors times channels
    loss_rows: int  # vectors, of the loss kernel
    num_warps: int


class Launches(NamedTuple):
    """The launches of one width: for few tiles, which 64 rows spread over more programs, and for many."""

    few: Launch
    many: Launch


# By compute capability; then whether the kernel takes the fewest registers (plain exponents, at most two
# classes, no logarithms); then by padded channels: the next larger entry serves. Own rows come first: half as
# many are read twice as often.
_SMALL = Launch(64, 64, 4, 2)
_SMALL_DEEP = Launch(64, 64, 4, 3)
_WIDE = Launch(64, 64, 8, 2)
_WIDE_DEEP = Launch(64, 64, 8, 3)
FORWARD = {
    80: {
        True: {
            64: Launches(_SMALL_DEEP, Launch(128, 64, 8, 3)),
            256: Launches(_SMALL, Launch(128, 64, 8, 2)),
        },
        False: {64: Launches(_SMALL_DEEP, Launch(128, 64, 8, 3)), 256: Launches(_SMALL, _SMALL)},
    },
    90: {
        True: {64: Launches(_SMALL_DEEP, _SMALL_DEEP), 256: Launches(_SMALL, Launch(128, 64, 8, 2))},
        False: {64: Launches(_SMALL_DEEP, _SMALL_DEEP), 256: Launches(_SMALL, Launch(128, 64, 8, 2))},
    },
    100: {
        True: {
            64: Launches(_SMALL_DEEP, Launch(128, 64, 8, 3)),
            256: Launches(_SMALL, Launch(128, 64, 8, 2)),
        },
        # A thread keeps the ratios of some own rows in registers: of half as many with 8 warps.
        False: {64: Launches(_WIDE_DEEP, _WIDE_DEEP), 256: Launches(_WIDE, _WIDE)},
    },
}
BACKWARD = {
    80: {
        True: {
            64: Launches(_SMALL_DEEP, Launch(128, 64, 8, 3)),
            128: Launches(_SMALL, _SMALL),
            256: Launches(_WIDE, _WIDE),
        },
        False: {256: Launches(_WIDE, _WIDE)},
    },
    90: {
        True: {
            64: Launches(_SMALL_DEEP, Launch(128, 128, 8, 3)),
            128: Launches(_SMALL, Launch(128, 128, 8, 2)),
            256: Launches(_SMALL, Launch(128, 64, 8, 3)),
        },
        False: {
            128: Launches(_SMALL, Launch(128, 64, 8, 2)),
            256: Launches(_WIDE, Launch(128, 32, 8, 2)),
        },
    },
    100: {
        True: {256: Launches(_SMALL, Launch(128, 64, 8, 2))},
        False: {
            128: Launches(_SMALL, Launch(128, 64, 8, 2)),
            256: Launches(Launch(64, 32, 4, 2), Launch(128, 32, 8, 2)),
        },
    },
}
# Of small calls, by padded channels: a program takes one row tile and all columns of its image.
SMALL_FORWARD = {64: Launch(32, 128, 8, 1), 128: Launch(32, 64, 8, 1), 256: Launch(32, 32, 8, 1)}
SMALL_BACKWARD = {
    32: Launch(32, 64, 4, 2),
    64: Launch(32, 128, 8, 2),
    128: Launch(32, 64, 8, 2),
    256: Launch(32, 32, 16, 2),
}
_MOST_SMALL_UNROLLED = 5  # classes, next to vectors or gradients that take most of the registers
MOST_SMALL = 256  # vectors of an image
# Vectors of an image times channels, at least 64, which every program of the forward pass packs for its own
# row tile. Packing more takes longer than one launch that packs them once (benchmarks/model.py).
MOST_PACKED = 1 << 13
_FEW_TILES = {"forward": 1.5, "backward": 3.0}  # of 128 x 128, for every processor
# What tuning tries, for every shape.
CANDIDATES = [
    Launch(block_i, block_j, num_warps, num_stages)
    for block_i, block_j in ((128, 128), (128, 64), (128, 32), (64, 64), (64, 32))
    for num_warps in (4, 8)
    for num_stages in (2, 3, 4)
]
# On sm_90 backward too, of one width of 128 or 256 channels (backward.py). No card has run these kernels yet:
# the tables get them where one measures that they are faster.
OVERLAPPED = [Launch(128, block_j, 8, 3, overlapped=True) for block_j in (128, 64, 32)]
_WITH_OVERLAPPED = CANDIDATES + OVERLAPPED
SLAB_FORWARD = Launch(32, 128, 4, 1)
SLAB_PAIRS = Launch(32, 128, 4, 1)
ROWS = RowLaunch(2048, 1024, 4)
GROUP_ROWS = 512  # vectors whose groups one program finds
LOSS_BLOCK = 1024
MOST_ROWS_WITH_LOSS = 2048  # of an image; the loss of more takes one program too long
_FORWARD_PROGRAMS, _MOST_COLUMN_TILES = 8, 16  # of the forward pass, on a processor; tiles of one


class Terms(NamedTuple):
    """What the kernels take of an affinity.

    Modes are passed by name, the values of the other dictionaries in their order, which is that of arguments.
    """

    plain: bool  # t = x d log2(e) / tau, with log2(e) / tau in the packed ratios
    bounded: bool  # no sum of exponentials can leave the range of fp32
    phi_scale: float  # of the packed ratios
    modes: dict[str, Any]  # constexprs of all kernels over tiles
    exponent: dict[str, float]  # t and d, in all kernels over tiles
    pair_weight: dict[str, float]  # the bracket of g, times the weight scale
    loss: dict[str, float]
    gradient: dict[str, float]


def terms_of(affinity: Affinity, dtype: torch.dtype, num_vectors: int, num_classes: int) -> Terms:
    """The terms of an affinity for at most `num_vectors` vectors of an image, with ratios of M classes."""
    temperature, distance_scale, categorical, num_bias, num_slope, den_bias, den_slope, shift = affinity
    factor = math.log2(math.e) / temperature
    farthest = 1.0 if categorical else distance_scale * num_classes
    weight = max(abs(den_bias), abs(den_bias + den_slope * farthest))
    largest = weight * (1 + abs(shift)) / temperature + math.log(max(num_vectors, 1))
    plain = affinity.is_plain
    unit = factor if plain else 1.0  # what the kernels' distances are multiples of
    separate_bias = 0.0  # the part of num_bias that stays out of the pair weights
    if plain and not categorical:  # most categories are unlike: their weights are smallest with all of it
        separate_bias = num_bias / 4  # by trial
    exponent = {"bias": den_bias * factor, "slope": den_slope * factor, "shift": shift, "unequal": unit}
    bits = _surplus_bits(dtype, exponent, factor, num_vectors)
    weight_scale = 2.0**-bits / factor
    return Terms(
        plain=plain,
        bounded=largest <= _LARGEST_EXPONENT,
        phi_scale=1.0 if categorical else distance_scale * unit,
        modes={
            "CLASSES": num_classes if num_classes <= _UNROLLED_CLASSES else 1,
            "MORE_CLASSES": num_classes > _UNROLLED_CLASSES,
            "CATEGORICAL": categorical,
            "PLAIN": plain,
        },
        exponent=exponent,
        pair_weight={
            "pull": -2 * num_slope * (1.0 if plain else factor) * weight_scale,
            "offset": -2 * (num_bias - separate_bias) * factor * weight_scale,
            "log_weight_scale": math.log2(weight_scale),
        },
        loss={
            "inverse_temperature": 1 / temperature,
            "num_bias": num_bias,
            "attraction_scale": num_slope / unit,
            "shift": shift,
        },
        gradient={
            "separate_bias": separate_bias,
            "pair_bias": num_bias - separate_bias,
            "g_scale": 2.0**bits,
            "inverse_temperature": 1 / temperature,
        },
    )


def _surplus_bits(dtype: torch.dtype, exponent: dict[str, float], factor: float, num_vectors: int) -> int:
    """The power of two that pair weights are divided by before they are rounded, so that fp16 holds them."""
    if dtype != torch.float16:
        return 0
    bias, slope = exponent["bias"], exponent["slope"]
    largest = 2 * num_vectors * max(abs(bias), abs(bias + slope), factor) / factor
    return max(0, math.ceil(math.log2(max(largest, 1)) - 14))


def choose_launch(
    direction: str,
    call: Call,
    rows: Tensor,
    plain: bool,
    logged: bool,
    run: Callable[[Launch], object],
) -> Launch:
    """The launch of the table for a call with these packed rows, or the fastest if tuning is requested.

    Args:
        direction: "forward" or "backward".
        logged: whether the kernel works with logarithms of sums of exponentials.
        run: as for `tuned`.
    """
    width = max(map(call.width, call.problems))
    num_classes = call.num_compared
    table = FORWARD if direction == "forward" else BACKWARD
    by_width = sm_table(table, rows)[plain and num_classes <= 2 and not logged]
    entry = by_width[min(entry for entry in by_width if entry >= width)]
    tiles = sum(call.images(each) * (padded(call.count(each)) // 128) ** 2 for each in call.problems)
    few = tiles < _FEW_TILES[direction] * processors(rows)
    classes = min(num_classes, _UNROLLED_CLASSES + 1)
    family = f"pdcr_{direction} {rows.dtype} width {width} classes {classes} {plain=} {logged=} {few=}"
    can_overlap = direction == "backward" and capability(rows) == 90
    candidates = _WITH_OVERLAPPED if can_overlap else CANDIDATES
    return tuned(family, entry.few if few else entry.many, candidates, rows, run)


def is_small(call: Call) -> bool:
    """Whether one kernel takes the whole backward pass of a call: a program owns all pairs of a row tile.

    It owns the gradients of its vectors too, so that each has to belong to one problem.
    """
    sources = [segment.source for problem in call.problems for segment in problem.segments]
    return (
        call.fused
        and not call.grouped
        and not any(problem.merged or len(problem.segments) > 1 for problem in call.problems)
        and sorted(sources) == list(range(len(call.sources)))
        and max(map(call.count, call.problems)) <= MOST_SMALL
    )


def is_small_forward(call: Call) -> bool:
    """Whether one kernel takes the whole forward pass too: where vectors are few, and read in words."""
    return (
        is_small(call)
        and all(source.in_words for source in call.sources)
        and all(call.count(each) * max(call.width(each), 64) <= MOST_PACKED for each in call.problems)
    )


def small_modes(terms: Terms) -> dict[str, Any]:
    """The modes of the kernels of small calls."""
    if terms.modes["CLASSES"] <= _MOST_SMALL_UNROLLED:
        return terms.modes
    return {**terms.modes, "CLASSES": 1, "MORE_CLASSES": True}


def small_launch(table: dict[int, Launch], call: Call) -> Launch:
    """The launch of a small call."""
    widest = max(map(call.width, call.problems))
    launch = table[min(entry for entry in table if entry >= widest)]
    most = 128 if max(map(call.count, call.problems)) > 64 else 64
    return launch._replace(block_j=min(launch.block_j, most))


def columns_per_program(direction: str, call: Call, launch: Launch, rows: Tensor) -> int:
    """Column tiles of the widest rows that a program takes, for calls with these packed rows.

    The forward pass makes many programs. The backward pass makes one wave of them: each writes a part of g.
    """
    widest = max(map(call.width, call.problems))
    cost = 0
    for problem in call.problems:
        height = padded(call.count(problem))
        tiles = height // launch.block_i * (height // launch.block_j)
        cost += call.images(problem) * tiles * call.width(problem)
    if direction == "forward":
        wanted = 2 * _FORWARD_PROGRAMS * processors(rows)  # half of the tiles are computed
        return min(max(cost // (widest * wanted), 1), _MOST_COLUMN_TILES)
    return -(-cost // (widest * one_wave(call, launch, rows)))


def one_wave(call: Call, launch: Launch, rows: Tensor) -> int:
    """Programs of a launch that run at the same time, for calls with these packed rows."""
    return processors(rows) * _resident(launch, max(map(call.width, call.problems)))


def most_parts(width: int) -> int:
    """Parts of g at most: beyond, writing and adding them takes longer than it saves."""
    return max(4, 512 // width)


def _resident(launch: Launch, width: int) -> int:
    """Programs that a processor holds at once: each takes most of the registers that its warps may have."""
    stored = (launch.block_i + launch.num_stages * launch.block_j) * width * 2
    return max(1, min(_REGISTERS // (launch.num_warps * 32 * 255), _SHARED_MEMORY // stored))


def tile_options(launch: Launch) -> dict[str, Any]:
    """Constexprs and options of a kernel over tiles."""
    return {
        "BLOCK_I": launch.block_i,
        "BLOCK_J": launch.block_j,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }
