"""How an H100's tensor cores sum products of 16-bit numbers, and what that leaves of a loss.

Products are exact. Those of 16 channels and the sum so far are aligned to the largest of them, truncated two
bits behind the last bit that fp32 has there, and added; the sum is truncated to fp32. All errors go towards
zero: sums of products of one sign, as nearly parallel vectors have, come out too small, by an amount that
grows with the number of channels. fp16 loses more than bf16, whose products have 16 bits instead of 22.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS_AT_ONCE = 16
EXTRA_BITS = 2
_MANTISSA = 24


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.mT` of `(I, C)` and `(J, C)` 16-bit numbers, in fp64 with the values that the cores give."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for first in range(0, a.shape[1], CHANNELS_AT_ONCE):
        channels = slice(first, first + CHANNELS_AT_ONCE)
        products = a[:, None, channels].double() * b[None, :, channels].double()
        terms = torch.cat([products, total[..., None]], -1)
        kept = terms.abs().amax(-1, keepdim=True)
        total = _truncate(_truncate(terms, kept, _MANTISSA + EXTRA_BITS).sum(-1), None, _MANTISSA)
    return total


def _truncate(x: Tensor, largest: Tensor | None, bits: int) -> Tensor:
    """Cut off what is below the last of so many bits of `largest`, or of each number itself."""
    _, exponent = torch.frexp(x if largest is None else largest)
    unit = torch.exp2((exponent - bits).double())
    return (x / unit).trunc() * unit


def largest_shift(channels: int, dtype: torch.dtype) -> float:
    """How much smaller the cosine of parallel vectors may come out: C 2^-27 in fp16, C 2^-28 in bf16."""
    return {torch.float16: 2.0**-27, torch.bfloat16: 2.0**-28}.get(dtype, 0.0) * channels


def largest_loss_error(channels: int, dtype: torch.dtype, temperature: float) -> float:
    """What that may do to the loss of an image, which has cosines over tau as exponents."""
    return largest_shift(channels, dtype) / temperature
