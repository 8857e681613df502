"""How the weight of a regularizer grows during training."""

from __future__ import annotations

import math

from contrastseg_fast import _checks

WARMUPS = ("linear", "cosine", "sigmoid")


def warmup_weight(step: float, weight: float, warmup_steps: float, kind: str = "linear") -> float:
    """The weight of a regularizer that is faded in, so that a network first learns to segment.

        linear: t        cosine: (1 - cos(pi t)) / 2        sigmoid: exp(-5 (1 - t)^2)

    times `weight`, with t = step / warmup_steps, at most 1. In a training loop with `attach_pdcr`:

        loss = criterion(model(x), y) + warmup_weight(step, 0.01, warmup_steps=1000) * pdcr(y)

    Args:
        step: number of the current step or epoch, from 0; may be a fraction.
        weight: the weight after the warm-up.
        warmup_steps: length of the warm-up, in the unit of `step`; 0 means no warm-up.
        kind: `"linear"`, `"cosine"`, or `"sigmoid"`, the ramp-up of semi-supervised learning, which begins
            at 0.0067 of the weight.

    Returns:
        the weight at that step.

    Raises:
        TypeError: `step`, `weight` or `warmup_steps` is not a number.
        ValueError: one of them is negative or not finite, or `kind` is unknown.

    Example:
        >>> [round(warmup_weight(epoch, 0.01, 10), 4) for epoch in (0, 5, 10, 100)]
        [0.0, 0.005, 0.01, 0.01]
    """
    _checks.not_negative("step", step)
    _checks.not_negative("weight", weight)
    _checks.not_negative("warmup_steps", warmup_steps)
    _checks.one_of("kind", kind, WARMUPS)
    t = min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0
    match kind:
        case "linear":
            return weight * t
        case "cosine":
            return weight * (1 - math.cos(math.pi * t)) / 2
        case _:
            return weight * math.exp(-5 * (1 - t) ** 2)
