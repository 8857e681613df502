"""The operator library that every op registers with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from contrastseg_fast import _backend  # noqa: F401  loads the C++ kernels, where they are installed

NAMESPACE = "contrastseg_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, default: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Define an op with a plain-PyTorch kernel for every device that has no kernel of its own.

    Returns the op's qualified name.
    """
    LIBRARY.define(schema)
    name = f"{NAMESPACE}::{schema.split('(')[0]}"
    torch.library.impl(name, "CompositeExplicitAutograd", lib=LIBRARY)(default)
    torch.library.register_fake(name, lib=LIBRARY)(fake)
    return name


def forbid_second_derivative(name: str) -> None:
    """Make differentiating a backward op raise, where PyTorch would silently return no gradient."""

    def backward(_ctx: Any, *_grads: Any) -> None:
        raise RuntimeError(f"{name} cannot be differentiated: second derivatives are not implemented")

    torch.library.register_autograd(name, backward, lib=LIBRARY)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
