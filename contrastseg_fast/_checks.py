"""Checks of arguments; each raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

RATIO_TOLERANCE = 1e-4
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(name: str, expected: str, got: object) -> NoReturn:
    """Raise the ValueError of a bad value."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def fail_type(name: str, expected: str, got: object) -> NoReturn:
    """Raise the TypeError of a value of the wrong type or dtype."""
    raise TypeError(f"{name}: expected {expected}, got {got}")


_PACKAGE = str(Path(__file__).parent)


def _level_of_caller() -> int:
    """The `stacklevel` of the innermost code outside the package, for a warning two calls below it."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


def warn(message: str) -> None:
    """Warn of arguments that are allowed and have no effect; silent while compiling."""
    if not torch.compiler.is_compiling():
        warnings.warn(f"contrastseg_fast: {message}", UserWarning, stacklevel=_level_of_caller())


@functools.cache
def warn_once(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn the first time only."""
    warnings.warn(f"contrastseg_fast: {message}", category, stacklevel=_level_of_caller())


def one_of(name: str, value: Any, options: Sequence[str]) -> None:
    """Check that an option is one of the known words."""
    if value not in options:
        fail(name, f"one of {', '.join(map(repr, options))}", repr(value))


def positive_finite(name: str, value: Any) -> None:
    """Check a positive, finite Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail_type(name, "a number", type(value).__name__)
    if not 0 < value < math.inf:  # NaN neither; torch.compile follows comparisons of a dynamic number
        fail(name, "a positive, finite number", value)


def not_negative(name: str, value: Any) -> None:
    """Check a finite Python number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail_type(name, "a number", type(value).__name__)
    if not 0 <= value < math.inf:
        fail(name, "a finite number of at least 0", value)


def integer(name: str, value: Any, minimum: int) -> None:
    """Check a Python integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail_type(name, "an integer", type(value).__name__)
    if value < minimum:
        fail(name, f"an integer of at least {minimum}", value)


def optional_integer(name: str, value: Any) -> None:
    """Check None or a Python integer."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        fail_type(name, "an integer or None", type(value).__name__)


def boolean(name: str, value: Any) -> None:
    """Check True or False."""
    if not isinstance(value, bool):
        fail_type(name, "a bool", type(value).__name__)


def fraction(name: str, value: Any) -> None:
    """Check a Python number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail_type(name, "a number", type(value).__name__)
    if not 0 <= value <= 1:
        fail(name, "a number from 0 to 1", value)


def tensor(name: str, value: Any, ndims: Sequence[int], layout: str) -> None:
    """Check a dense tensor of one of the given numbers of dimensions; `layout` describes its shape."""
    if not isinstance(value, Tensor):
        fail_type(name, f"a tensor {layout}", type(value).__name__)
    if value.ndim not in ndims:
        fail(name, f"a tensor {layout}", f"shape {tuple(value.shape)}")


def dtype(name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Check a tensor's dtype."""
    if value.dtype not in dtypes:
        fail_type(name, f"dtype {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}", value.dtype)


def shape(name: str, value: Tensor, expected: Sequence[int], like: str) -> None:
    """Check a tensor's shape; `like` says where the expected one comes from."""
    if tuple(value.shape) != tuple(expected):
        fail(name, f"shape {tuple(expected)} ({like})", tuple(value.shape))


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two tensors are on one device."""
    if value.device != other.device:
        fail(name, f"device {other.device}, where {other_name} is", value.device)


def check_ratio_sum(ratios: Tensor, class_distance: str) -> None:
    """Check that ratios do not sum above 1, except for `class_distance="mean"`.

    Raises:
        ValueError: they do, as those of multi-hot labels may.
    """
    if class_distance != "mean" and (total := ratios.sum(-1).max().item()) > 1 + RATIO_TOLERANCE:
        fail(
            "ratios",
            f"a sum of at most 1 for class_distance={class_distance!r} (multi-hot labels need 'mean')",
            f"a sum of {total:g}",
        )
