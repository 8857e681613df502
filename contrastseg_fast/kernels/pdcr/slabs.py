"""Matrix products by cuBLAS, for vectors that no fused kernel takes: N x N similarities a slab at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from contrastseg_fast.kernels.pdcr.layout import Layout
from contrastseg_fast.kernels.pdcr.plan import SLAB_FORWARD
from contrastseg_fast.problems import PADDING

_SLAB_BYTES = (16 << 20, 64 << 20)  # least and most


def problem_rows(laid_out: Layout, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first image and the packed rows `(B, P, width)` of every problem."""
    for first, stop in laid_out.problem_images.numbers.tolist():
        image = laid_out.images[first]
        shape = stop - first, image.padded, image.width
        yield first, rows[image.rows :][: math.prod(shape)].view(shape)


def similarities(rows: Tensor, first_column: Callable[[int], int]) -> Iterator[tuple[int, int, Tensor]]:
    """First row, first column and products `(B, rows, P - first column)` of every slab of `(B, P, width)`."""
    batch, padded, width = rows.shape
    least, most = _SLAB_BYTES
    height = min(max(batch * padded * width * 4, least), most) // (4 * batch * padded)
    unit = PADDING if height >= PADDING else SLAB_FORWARD.block_i
    height = max(unit, height // unit * unit)
    for first in range(0, padded, height):
        column = first_column(first)
        yield first, column, product(rows[:, first : first + height], rows[:, column:].mT)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product in fp32; those of 16-bit operands are never rounded again."""
    if a.dtype == torch.float32:
        return a @ b
    if not a.is_cuda:
        return a.float() @ b.float()
    return torch.bmm(a, b, out_dtype=torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the batched matrix product of `a` and `b` to `total`, in place."""
    if a.dtype == torch.float32:
        total.baddbmm_(a, b)
    else:
        total += product(a, b)
