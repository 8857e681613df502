"""Training, validation and test cases, by the parts a dataset comes in or by folds of patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import KFold

from contrastseg_fast import _checks
from contrastseg_fast.experiments.datasets.case import Case

NUM_FOLDS = 5
FIRST_DEAL = 12345  # the seed of nnU-Net v2's five folds
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Split:
    """Names of cases, each in the order of the dataset."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def split_cases(cases: Sequence[Case], seed: int) -> Split:
    """Split by the parts that the cases are marked with, and by patient where there is no such part."""
    _checks.integer("seed", seed, 0)
    parts: dict[str | None, list[Case]] = {}
    for case in cases:
        parts.setdefault(case.part or "train", []).append(case)
    train, validation, test = (parts.get(part, []) for part in ("train", "validation", "test"))
    missing = 3 - bool(validation) - bool(test)
    if len(_groups(train)) < missing:
        _checks.fail("cases", f"at least {missing} patients (or cases) to split", len(_groups(train)))
    if not test:
        train, test = _deal(train, seed)
    if not validation:
        train, validation = _draw(train, seed)
    return Split(*(tuple(case.name for case in part) for part in (train, validation, test)))


def describe_split(cases: Sequence[Case]) -> str:
    """Which parts of a split are the dataset's own, and which are drawn."""
    parts = {case.part for case in cases}
    unit = "cases" if all(case.group is None for case in cases) else "patients"
    own = "the dataset's own"
    test = own if "test" in parts else f"one of five folds of {unit}"
    validation = own if "validation" in parts else f"a tenth of the training {unit}"
    return f"test: {test}; validation: {validation}"


def _groups(cases: Sequence[Case]) -> list[str]:
    return sorted({_group(case) for case in cases})


def _group(case: Case) -> str:
    return case.name if case.group is None else case.group


def _deal(cases: Sequence[Case], seed: int) -> tuple[list[Case], list[Case]]:
    groups = _groups(cases)
    num_folds = min(NUM_FOLDS, len(groups))
    deal, fold = divmod(seed, num_folds)
    folds = list(KFold(num_folds, shuffle=True, random_state=FIRST_DEAL + deal).split(groups))
    return _part(cases, {groups[i] for i in folds[fold][1]})


def _draw(cases: Sequence[Case], seed: int) -> tuple[list[Case], list[Case]]:
    groups = _groups(cases)
    count = max(1, round(VALIDATION_SHARE * len(groups)))
    drawn = np.random.default_rng(seed).choice(len(groups), count, replace=False)
    return _part(cases, {groups[i] for i in drawn})


def _part(cases: Sequence[Case], held_out: set[str]) -> tuple[list[Case], list[Case]]:
    kept = [case for case in cases if _group(case) not in held_out]
    return kept, [case for case in cases if _group(case) in held_out]
