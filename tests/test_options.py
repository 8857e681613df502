"""What goes beyond the paper: layers, patches and pairs of other kinds, projection heads, warming up."""

from __future__ import annotations

import itertools
import math
import re

import pytest

from contrastseg_fast.functional import WARMUPS, warmup_weight


def test_the_weight_rises_to_its_value_and_stays() -> None:
    for kind in WARMUPS:
        weights = [warmup_weight(step, 0.1, 40, kind) for step in range(100)]
        assert weights[0] == pytest.approx(0.1 * math.exp(-5) if kind == "sigmoid" else 0)
        assert all(earlier < later for earlier, later in itertools.pairwise(weights[:41]))
        assert weights[40:] == [0.1] * 60


def test_the_weight_half_way() -> None:
    assert warmup_weight(5, 0.2, 10) == pytest.approx(0.1)
    assert warmup_weight(0.5, 0.2, 1.0, "cosine") == pytest.approx(0.1)
    assert warmup_weight(2.5, 1.0, 10, "cosine") == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert warmup_weight(5, 1.0, 10, "sigmoid") == pytest.approx(math.exp(-1.25))


@pytest.mark.parametrize("kind", WARMUPS)
def test_no_steps_mean_no_warm_up(kind: str) -> None:
    assert warmup_weight(0, 0.3, 0, kind) == 0.3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0.1, 10), ValueError, "step: expected a finite number of at least 0, got -1"),
        (("1", 0.1, 10), TypeError, "step: expected a number, got str"),
        ((1, float("nan"), 10), ValueError, "weight: expected a finite number of at least 0, got nan"),
        ((1, 0.1, -10), ValueError, "warmup_steps: expected a finite number of at least 0, got -10"),
        ((1, 0.1, 10, "exp"), ValueError, "kind: expected one of 'linear', 'cosine', 'sigmoid', got 'exp'"),
    ],
)
def test_bad_arguments_of_the_warm_up_are_named(
    arguments: tuple, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        warmup_weight(*arguments)
