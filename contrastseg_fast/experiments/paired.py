"""Differences of runs that share a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The mean difference of pairs, and its two-sided 95 % t interval, which one pair does not have.

    >>> paired_difference([2.0, 3.0], [1.0, 1.0])["mean"]
    1.5
    """
    differences = np.subtract(values, baseline)
    low = high = None
    if len(differences) > 1:
        error = stats.sem(differences)
        reach = error * stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)
        low, high = float(differences.mean() - reach), float(differences.mean() + reach)
    return {
        "n": len(differences),
        "mean": float(differences.mean()),
        "low": low,
        "high": high,
    }
