"""The positions of planned vectors, and the planned vectors of positions (`sample_plan.SamplePlan.three`).

Results have the dtype of the first argument.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from contrastseg_fast.sample_plan import SamplePlan


def fits(plan: SamplePlan) -> bool:
    """Whether int32 holds all numbers computed from a plan."""
    products = (extent * (count + 1) for extent, count in zip(*plan, strict=True))
    return max(math.prod(plan.extents), *products) < 2**30


@triton.jit
def _middle(step, extent, count):
    """The middle of one of `count` equal steps along an axis."""
    return (2 * step + 1) * tl.cast(extent, step.dtype) // tl.cast(2 * count, step.dtype)


@triton.jit
def planned_position(n, extent_z, extent_y, extent_x, count_z, count_y, count_x):
    """The positions of vectors n in raster order."""
    rows = n // tl.cast(count_x, n.dtype)
    z = _middle(rows // tl.cast(count_y, n.dtype), extent_z, count_z)
    y = _middle(rows % tl.cast(count_y, n.dtype), extent_y, count_y)
    x = _middle(n % tl.cast(count_x, n.dtype), extent_x, count_x)
    return (z * tl.cast(extent_y, n.dtype) + y) * tl.cast(extent_x, n.dtype) + x


@triton.jit
def _candidate(coordinate, extent, count):
    """The only index whose point may lie at a coordinate, and whether it does."""
    index = (2 * coordinate * count + extent - 1) // extent // 2
    return index, (2 * index + 1) * extent < 2 * (coordinate + 1) * count


@triton.jit
def planned_vector(position, extent_z, extent_y, extent_x, count_z, count_y, count_x):
    """The numbers of the vectors at positions of the map, -1 where there is none."""
    rows = position // extent_x
    z, in_z = _candidate(rows // extent_y, extent_z, count_z)
    y, in_y = _candidate(rows % extent_y, extent_y, count_y)
    x, in_x = _candidate(position % extent_x, extent_x, count_x)
    return tl.where(in_z & in_y & in_x, (z * count_y + y) * count_x + x, -1)
