"""The positions of planned samples as kernels compute them: those of the samplers."""

from __future__ import annotations

import pytest
import torch

from contrastseg_fast import _backend, sampling

pytest.importorskip("triton")
if not (torch.cuda.is_available() or _backend.interpreting()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from contrastseg_fast.kernels.sample_plan import planned_position
from contrastseg_fast.sample_plan import SamplePlan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def positions_kernel(
    positions_ptr, first, extent_z, extent_y, extent_x, count_z, count_y, count_x, BLOCK: tl.constexpr
):
    """The positions of some vectors, in the dtype of the pointer."""
    n = (first + tl.arange(0, BLOCK)).to(positions_ptr.dtype.element_ty)
    position = planned_position(n, extent_z, extent_y, extent_x, count_z, count_y, count_x)
    tl.static_assert(position.dtype == n.dtype)
    tl.store(positions_ptr + tl.arange(0, BLOCK), position)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("sampler", ["grid", "raster"])
@pytest.mark.parametrize("shape", [(37,), (7, 9), (16, 1), (4, 5, 6), (3, 1, 11), (1, 1, 1)])
def test_positions_are_those_of_the_sampler(shape: tuple[int, ...], sampler: str, dtype: torch.dtype) -> None:
    for num_samples in (1, 5, 16, 1000):
        expected = torch.zeros((), dtype=torch.int64)
        for extent, coordinates in zip(shape, sampling.sample(sampler, shape, num_samples).T, strict=True):
            expected = expected * extent + coordinates
        extents, counts = SamplePlan.make(sampler, shape, num_samples).three()
        block = triton.next_power_of_2(len(expected))
        positions = torch.empty(block, dtype=dtype, device=DEVICE)
        positions_kernel[(1,)](positions, 0, *extents, *counts, BLOCK=block)
        assert positions.cpu()[: len(expected)].tolist() == expected.tolist()


def test_positions_beyond_32_bits() -> None:
    extent, count = 2**35 + 3, 2**10
    positions = torch.empty(4, dtype=torch.int64, device=DEVICE)
    positions_kernel[(1,)](positions, 1000, 1, 1, extent, 1, 1, count, BLOCK=4)
    assert positions.tolist() == [(2 * n + 1) * extent // (2 * count) for n in range(1000, 1004)]
