"""A kernel that computes positions and vectors of many plans in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from contrastseg_fast.kernels.sample_plan import planned_position, planned_vector


@triton.jit
def _kernel(numbers_ptr, plans_ptr, results_ptr, count, INVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """`results[k]` is the position of vector `numbers[k]` of plan `plans[:, k]`, or the vector there."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < count
    number = tl.load(numbers_ptr + k, inside, 0)
    ez, ey, ex = (
        tl.load(plans_ptr + k, inside, 1),
        tl.load(plans_ptr + count + k, inside, 1),
        tl.load(plans_ptr + 2 * count + k, inside, 1),
    )
    cz, cy, cx = (
        tl.load(plans_ptr + 3 * count + k, inside, 1),
        tl.load(plans_ptr + 4 * count + k, inside, 1),
        tl.load(plans_ptr + 5 * count + k, inside, 1),
    )
    if INVERSE:
        result = planned_vector(number, ez, ey, ex, cz, cy, cx)
    else:
        result = planned_position(number, ez, ey, ex, cz, cy, cx)
    tl.store(results_ptr + k, result, inside)


def compute(numbers: Tensor, plans: Tensor, inverse: bool) -> Tensor:
    """Of vectors, or with `inverse` of positions, `(K,)` and their plans' six numbers `(6, K)`."""
    results = numbers.new_full(numbers.shape, -7)
    block = 8192
    _kernel[(triton.cdiv(len(numbers), block),)](
        numbers, plans.contiguous(), results, len(numbers), inverse, block
    )
    return results
