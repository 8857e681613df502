"""The model of PDCR's time on an H100: against what was measured, and what it chooses."""

from __future__ import annotations

import pytest

from benchmarks.model import (
    CLOCK,
    MEASURED,
    MEASURED_KERNELS,
    NOW,
    OVERLAPPED,
    PROCESSORS,
    TENSOR,
    best_launch,
    cycles,
    predict,
    predict_small,
)

SIZES = [(batch, count) for batch in (1, 8) for count in (128, 1024, 16384)]
DIRECTIONS = ("forward", "backward")
SHARED_MEMORY = 227 * 1024


@pytest.mark.parametrize("size", MEASURED)
def test_measured_times_are_reproduced_within_a_fifth(size):
    for direction, measured in zip(DIRECTIONS, MEASURED[size], strict=True):
        assert predict(*size, 2, direction, MEASURED_KERNELS) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_more_work_never_takes_less_time(width, direction):
    for batch, count in SIZES:
        time = predict(batch, count, width, 2, direction)
        assert time <= predict(batch, 2 * count, width, 2, direction)
        assert time <= predict(2 * batch, count, width, 2, direction)
        assert time <= predict(batch, count, width, 4, direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("count", [4096, 16384])
def test_no_prediction_is_faster_than_the_tensor_cores(count, direction):
    flops = {"forward": 1, "backward": 4}[direction] * count**2 * 256
    assert predict(1, count, 256, 2, direction) > flops / (4096 * PROCESSORS * CLOCK)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tiles_fit_the_shared_memory_as_often_as_they_claim(direction):
    for width, tiles in NOW.tiles[direction].items():
        for tile in tiles:
            rows = tile.rows + tile.stages * tile.columns
            assert tile.blocks * rows * width * 2 <= SHARED_MEMORY


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("width", [64, 256])
def test_grouping_rows_costs_little_and_saves_what_it_skips(width, classes):
    """At N = 16384: at most 2 % if no tile is skipped, and most of the time of those that are."""

    def time(left: float | None) -> float:
        return sum(predict(1, 16384, width, classes, way, left=left) for way in DIRECTIONS)

    assert time(1.0) < 1.02 * time(None)
    for left in (0.15, 0.58):
        assert left < time(left) / time(1.0) < left + 0.15


def test_overlapped_products_hide_the_instructions_of_pairs():
    tile = NOW.tiles["backward"][256][1]
    assert tile._replace(overlapped=True) == OVERLAPPED
    hidden = cycles(tile, 256, 2, 2, 1) - cycles(OVERLAPPED, 256, 2, 2, 1)
    assert hidden == 2 * tile.rows * tile.columns * 256 / TENSOR / 2  # a product
    assert cycles(OVERLAPPED, 64, 2, 2, 1) < cycles(tile, 64, 2, 2, 1)


def test_columns_are_split_where_row_tiles_are_few_and_only_there():
    assert best_launch(1, 1024, 256, 2, "backward").splits > 1
    assert best_launch(1, 16384, 256, 2, "backward").splits == 1
    assert best_launch(1, 1024, 256, 2, "backward").microseconds < 0.6 * (
        best_launch(1, 1024, 256, 2, "backward", NOW._replace(splits=(1,))).microseconds
    )


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_small_calls_are_those_that_one_kernel_is_faster_for(width, batch):
    plan = pytest.importorskip("contrastseg_fast.kernels.pdcr.plan")
    for count in (32, 64, 128, plan.MOST_SMALL):
        size = (batch, count, width, 2)
        assert predict_small(*size, "backward") < predict(*size, "backward")
        if count * max(width, 64) <= plan.MOST_PACKED:
            assert predict_small(*size, "forward") < predict(*size, "forward")
        elif count * width > 2 * plan.MOST_PACKED:
            assert predict_small(*size, "forward") > predict(*size, "forward")
