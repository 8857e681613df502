"""The operator library that every operator registers with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from contrastseg_fast import _backend  # noqa: F401  loads the C++ kernels, where they are installed

NAMESPACE = "contrastseg_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_REFERENCE = "backend='reference' of the function or module"


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
    operator: torch._ops.OpOverload,
    function: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Give an operator its derivative in reverse mode, and an error for other derivatives.

    The kernel of `torch.library.register_autograd` drops tangents, so that derivatives in forward mode would
    be 0. The kernel here checks for them first. Compiled graphs do not contain it.

    Args:
        function: the public function, for the errors.
    """
    kernel = make_autograd_impl(operator, Info(backward, setup_context))

    def autograd(keyset: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            _refuse_transforms(function, inputs)
        return kernel(keyset, *inputs)

    LIBRARY.impl(operator._schema.name.split("::")[1], autograd, "Autograd", with_keyset=True)


def forbid_second_derivative(operator: torch._ops.OpOverload, function: str) -> None:
    """Make differentiating a backward operator raise, where PyTorch would silently return no gradient."""

    def backward(_ctx: Any, *_grads: Any) -> None:
        raise RuntimeError(f"{function}: second derivatives are not implemented; use {_REFERENCE}")

    register_autograd(operator, function, backward)


def _refuse_transforms(function: str, inputs: Sequence[Any]) -> None:
    """Raise if an operator has inputs with tangents, or is differentiated within `torch.func`."""
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            f"{function}: forward-mode derivatives (torch.func.jvp and jacfwd, torch.autograd.forward_ad) "
            f"are not implemented; use {_REFERENCE}"
        )
    within = torch._C._are_functorch_transforms_active()  # under vmap alone, its level is gone here
    if within and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{function}: derivatives within torch.func (grad, vjp, jacrev) are not implemented; use "
            f"torch.autograd.grad, or {_REFERENCE}"
        )


def loop_over_batch(operator: torch._ops.OpOverload) -> None:
    """Make `torch.vmap` run an operator of lists of tensors for each element; others need no such rule."""

    def run(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        def element(number: int) -> list[Any]:
            return [_element(x, dim, number) for x, dim in zip(inputs, in_dims, strict=True)]

        results = [operator(*element(number)) for number in range(info.batch_size)]
        stacked = tree_map(lambda *each: torch.stack(each), *results)
        return stacked, tree_map(lambda _: 0, stacked)

    torch.library.register_vmap(operator._schema.name, run, lib=LIBRARY)


def _element(x: Any, dim: Any, number: int) -> Any:
    if isinstance(x, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(x)
        return [_element(each, of_each, number) for each, of_each in zip(x, dims, strict=True)]
    return x if dim is None else x.select(dim, number)


def without_gradient(operator: torch._ops.OpOverload) -> None:
    """Declare that the results of an operator have no gradient."""
    torch.library.impl(operator._schema.name, "Autograd", lib=LIBRARY)(torch.library.fallthrough_kernel)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for all other dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32
