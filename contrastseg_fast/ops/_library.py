"""The operator library that every operator registers with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from contrastseg_fast import _backend  # noqa: F401  loads the C++ kernels, where they are installed

NAMESPACE = "contrastseg_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(
    schema: str,
    plain: Callable[..., Any],
    fake: Callable[..., Any],
    on_cuda: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Define an operator.

    Args:
        schema: name, arguments and results.
        plain: the kernel in plain PyTorch, for every device that has no kernel of its own.
        fake: makes results without data.
        on_cuda: the kernel for CUDA tensors, which picks one of several.
    """
    LIBRARY.define(schema)
    name = schema.split("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    torch.library.impl(qualified, "CompositeExplicitAutograd", lib=LIBRARY)(plain)
    torch.library.register_fake(qualified, lib=LIBRARY)(fake)
    if on_cuda is not None:
        torch.library.impl(qualified, "CUDA", lib=LIBRARY)(on_cuda)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_autograd(
    operator: torch._ops.OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Give an operator its derivative."""
    name = operator._schema.name
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)


def forbid_second_derivative(operator: torch._ops.OpOverload) -> None:
    """Make differentiating a backward operator raise, where PyTorch would silently return no gradient."""
    name = operator._schema.name

    def backward(_ctx: Any, *_grads: Any) -> None:
        raise RuntimeError(f"{name} cannot be differentiated: second derivatives are not implemented")

    torch.library.register_autograd(name, backward, lib=LIBRARY)


def without_gradient(operator: torch._ops.OpOverload) -> None:
    """Declare that the results of an operator have no gradient."""
    torch.library.impl(operator._schema.name, "Autograd", lib=LIBRARY)(torch.library.fallthrough_kernel)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for all other dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32
