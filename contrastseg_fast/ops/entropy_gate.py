"""The entropy gate of UAFS (Eqs. 8 to 10): features times 2 - u, with the uncertainty u of their logits.

With `a = softmax(logits)` over the M classes of a location:

    u = -sum_m a_m log a_m / log M        gated = features * (2 - u)

`u` is computed and returned in fp32, or in fp64 where features or logits are fp64; `gated` has the dtype of
the features. Results are contiguous, or channels-last where features (for the logits' gradient: logits) are.
A logit of -inf is a class ruled out; NaN, +inf, or nothing but -inf at a location give NaN, as in softmax.

The default kernels below are plain PyTorch; devices with kernels of their own replace them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from contrastseg_fast.ops._library import LIBRARY, accumulation_dtype, define, forbid_second_derivative


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


def _forward(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(features.device.type, enabled=False):
        _, u = _uncertainty(features, logits)
        return _dense(features * (2 - u), features), u.contiguous()


def _backward(
    grad_gated: Tensor | None, grad_uncertainty: Tensor | None, features: Tensor, logits: Tensor
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


def _forward_fake(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    uncertainty = logits.new_empty(
        (logits.shape[0], 1, *logits.shape[2:]), dtype=_accumulation_dtype(features, logits)
    )
    return torch.empty_like(features, memory_format=_memory_format(features)), uncertainty


def _backward_fake(
    grad_gated: Tensor | None, grad_uncertainty: Tensor | None, features: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(features, memory_format=_memory_format(features)),
        torch.empty_like(logits, memory_format=_memory_format(logits)),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_gated: Tensor | None, grad_uncertainty: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if grad_gated is None and grad_uncertainty is None:
        return None, None
    grad_features, grad_logits = entropy_gate_backward(grad_gated, grad_uncertainty, *ctx.saved_tensors)
    return grad_features, grad_logits


_FORWARD = define(
    "entropy_gate_forward(Tensor features, Tensor logits) -> (Tensor gated, Tensor uncertainty)",
    _forward,
    _forward_fake,
)
_BACKWARD = define(
    "entropy_gate_backward(Tensor? grad_gated, Tensor? grad_uncertainty, Tensor features, Tensor logits) "
    "-> (Tensor grad_features, Tensor grad_logits)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context, lib=LIBRARY)
forbid_second_derivative(_BACKWARD)

entropy_gate_forward = torch.ops.contrastseg_fast.entropy_gate_forward.default
entropy_gate_backward = torch.ops.contrastseg_fast.entropy_gate_backward.default
