"""The entropy gate of UAFS (Eqs. 8 to 10): features times 2 - u, with the uncertainty u of their logits.

With `a = softmax(logits)` over the M classes of a location:

    u = -sum_m a_m log a_m / log M        gated = features * (2 - u)

`u` is computed and returned in fp32, or in fp64 where features or logits are fp64; `gated` has the dtype of
the features. Results are contiguous, or channels-last where features (for the logits' gradient: logits) are.
A logit of -inf is a class ruled out; NaN, +inf, or nothing but -inf at a location give NaN, as in softmax.

`_forward` and `_backward` are plain PyTorch. The C++ extension (csrc/cpu) replaces them on the CPU; on a GPU
the Triton kernels (kernels/entropy_gate.py) do, or the CUDA kernels (csrc/cuda) where Triton is missing. Both
fill results that `launch_forward` and `launch_backward` allocate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contrastseg_fast.ops._dispatch import Operation, pick
from contrastseg_fast.ops._library import (
    LIBRARY,
    accumulation_dtype,
    define,
    forbid_second_derivative,
    register_autograd,
)

OPERATION = Operation("entropy_gate", on_cuda=("triton", "cuda"))
Launch = Callable[..., None]


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is None or x.is_contiguous() or not x.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """`x` with the dtype of `like`, and its memory format."""
    return x.to(like.dtype).contiguous(memory_format=_memory_format(like))


def _accumulation_dtype(features: Tensor, logits: Tensor) -> torch.dtype:
    return accumulation_dtype(torch.promote_types(features.dtype, logits.dtype))


def _uncertainty(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the uncertainty, in the accumulation dtype."""
    log_a = logits.to(_accumulation_dtype(features, logits)).log_softmax(1)
    log_a = log_a.clamp(min=torch.finfo(log_a.dtype).min)  # a logit of -inf: 0 log 0 = 0
    entropy = -(log_a.exp() * log_a).sum(1, keepdim=True)
    return log_a, (entropy / math.log(logits.shape[1])).clamp(max=1)


def _forward(features: Tensor, logits: Tensor, _backend: str = "auto") -> tuple[Tensor, Tensor]:
    with torch.autocast(features.device.type, enabled=False):
        _, u = _uncertainty(features, logits)
        return _dense(features * (2 - u), features), u.contiguous()


def _backward(
    grad_gated: Tensor | None,
    grad_uncertainty: Tensor | None,
    features: Tensor,
    logits: Tensor,
    _backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    with torch.autocast(features.device.type, enabled=False):
        log_a, u = _uncertainty(features, logits)
        grad_u = torch.zeros_like(u) if grad_uncertainty is None else grad_uncertainty.to(u.dtype)
        grad_features = torch.zeros_like(features)
        if grad_gated is not None:
            grad_features = grad_gated * (2 - u)
            grad_u = grad_u - (grad_gated.to(u.dtype) * features.to(u.dtype)).sum(1, keepdim=True)
        log_classes = math.log(logits.shape[1])
        grad_logits = -grad_u / log_classes * log_a.exp() * (log_a + u * log_classes)
        return _dense(grad_features, features), _dense(grad_logits, logits)


def _forward_fake(features: Tensor, logits: Tensor, _backend: str = "auto") -> tuple[Tensor, Tensor]:
    uncertainty = logits.new_empty(
        (logits.shape[0], 1, *logits.shape[2:]), dtype=_accumulation_dtype(features, logits)
    )
    return torch.empty_like(features, memory_format=_memory_format(features)), uncertainty


def _backward_fake(
    _grad_gated: Tensor | None,
    _grad_uncertainty: Tensor | None,
    features: Tensor,
    logits: Tensor,
    _backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(features, memory_format=_memory_format(features)),
        torch.empty_like(logits, memory_format=_memory_format(logits)),
    )


def _locations(x: Tensor, channels_last: bool | None = None) -> Tensor:
    """`x` as `(B, channels, locations)`, copied only where strides cannot say that.

    Channels adjoin if `channels_last` is True, locations if it is False.
    """
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    adjoining = 1 if channels_last else 2
    if channels_last is None or flat.stride(adjoining) == 1 or flat.shape[adjoining] == 1:
        return flat
    return flat.mT.contiguous().mT if channels_last else flat.contiguous()


def launch_forward(launch: Launch, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the results, and have `launch` fill them."""
    computed = _accumulation_dtype(features, logits)
    if computed == torch.float64 and features.dtype != logits.dtype:
        gated, u = launch_forward(launch, features.to(computed), logits.to(computed))
        return gated.to(features.dtype), u
    gated, u = _forward_fake(features, logits)
    if u.numel() > 0:
        channels_last = _memory_format(features) != torch.contiguous_format
        x = _locations(features, channels_last)
        launch(x, _locations(logits), channels_last, _locations(gated), _locations(u))
    return gated, u


def launch_backward(
    launch: Launch,
    grad_gated: Tensor | None,
    grad_uncertainty: Tensor | None,
    features: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor]:
    computed = _accumulation_dtype(features, logits)
    if computed == torch.float64 and features.dtype != logits.dtype:
        grads = launch_backward(
            launch, grad_gated, grad_uncertainty, features.to(computed), logits.to(computed)
        )
        return grads[0].to(features.dtype), grads[1].to(logits.dtype)
    grad_features, grad_logits = _backward_fake(None, None, features, logits)
    if grad_gated is None:
        grad_features.zero_()
    if grad_logits.numel() > 0:
        channels_last = _memory_format(features) != torch.contiguous_format
        if grad_gated is not None:
            grad_gated = _locations(grad_gated.to(features.dtype), channels_last)
        if grad_uncertainty is not None:
            grad_uncertainty = _locations(grad_uncertainty.to(computed), False)
        x = _locations(features, channels_last)
        results = (_locations(grad_features), _locations(grad_logits))
        launch(grad_gated, grad_uncertainty, x, _locations(logits), channels_last, *results)
    return grad_features, grad_logits


def _launches(choice: str) -> tuple[Launch, Launch]:
    """What fills the results, forward and backward, on a GPU."""
    if choice == "cuda":  # operators whose kernels the CUDA library registers
        operators = torch.ops.contrastseg_fast
        return (
            operators.entropy_gate_forward_launch.default,
            operators.entropy_gate_backward_launch.default,
        )
    from contrastseg_fast.kernels import entropy_gate as kernels

    return kernels.forward, kernels.backward


def entropy_gate_forward_on_cuda(features: Tensor, logits: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    choice = pick(OPERATION, backend, features)
    if choice == "plain":
        return _forward(features, logits)
    return launch_forward(_launches(choice)[0], features, logits)


def entropy_gate_backward_on_cuda(
    grad_gated: Tensor | None,
    grad_uncertainty: Tensor | None,
    features: Tensor,
    logits: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    inputs = (grad_gated, grad_uncertainty, features, logits)
    choice = pick(OPERATION, backend, features)
    return _backward(*inputs) if choice == "plain" else launch_backward(_launches(choice)[1], *inputs)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    features, logits, ctx.backend = inputs
    ctx.save_for_backward(features, logits)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_gated: Tensor | None, grad_uncertainty: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None]:
    if grad_gated is None and grad_uncertainty is None:
        return None, None, None
    return *entropy_gate_backward(grad_gated, grad_uncertainty, *ctx.saved_tensors, ctx.backend), None


# The kernels come with the CUDA library. Tensors are (B, channels, locations).
LIBRARY.define(
    "entropy_gate_forward_launch(Tensor features, Tensor logits, bool channels_last, "
    "Tensor(a!) gated, Tensor(b!) uncertainty) -> ()"
)
LIBRARY.define(
    "entropy_gate_backward_launch(Tensor? grad_gated, Tensor? grad_uncertainty, Tensor features, "
    "Tensor logits, bool channels_last, Tensor(a!) grad_features, Tensor(b!) grad_logits) -> ()"
)

entropy_gate_forward = define(
    "entropy_gate_forward(Tensor features, Tensor logits, str backend) -> (Tensor gated, Tensor uncertainty)",
    _forward,
    _forward_fake,
    entropy_gate_forward_on_cuda,
)
entropy_gate_backward = define(
    "entropy_gate_backward(Tensor? grad_gated, Tensor? grad_uncertainty, Tensor features, Tensor logits, "
    "str backend) -> (Tensor grad_features, Tensor grad_logits)",
    _backward,
    _backward_fake,
    entropy_gate_backward_on_cuda,
)
register_autograd(entropy_gate_forward, OPERATION.name, _differentiate, _setup_context)
forbid_second_derivative(entropy_gate_backward, OPERATION.name)
