"""PDCR on a GPU: the loss of every image and its gradient, from tiles of similarities that are never stored.

With `u = v / |v|`, `x_ij = u_i . u_j - shift`, distances `d_ij` of an `Affinity`, exponentials to base 2:

    t_ij = x_ij (den_bias + den_slope d_ij) log2(e) / tau        Z_i = sum_j 2^t_ij
    loss = ( n sum_i log Z_i - 1/tau (num_bias (|S|^2 - shift n^2) + num_slope sum_ij x_ij d_ij) ) / n^2
    g_i  = sum_j [ n (den_bias + den_slope d_ij) 2^t_ij (1/Z_i + 1/Z_j) - 2 num_slope d_ij ] u_j
           - 2 num_bias S

`S = sum_j u_j` gives the constant part of the numerator's weights, so that no tile has to compute it. The
last term of g nearly cancels the bracket, which is rounded to 16 bits and should be small. So the kernels add
`num_bias - separate_bias` of it inside the bracket, and `separate_bias` afterwards: a quarter of num_bias in
the paper's form with ratios, 0 in all others.

16-bit vectors of up to 256 channels take the fused kernels (tensor cores, epilogue in registers). All others
go through slabs: cuBLAS writes the similarities of some rows, a kernel turns them into exponentials or pair
weights, cuBLAS multiplies. The forward pass computes the pairs (i, j) and (j, i) together, and so do the
slabs of the backward pass; the fused backward kernel computes whole rows. Only the forward pass adds values
with float atomics. It does not when deterministic algorithms are requested, or when sums of exponentials need
a running maximum. Atomic counters, which find an image's last program, are always used: they do not change
results.

A call has any number of problems (problems.py), which share every launch: rows are packed, taken out of maps
where these are given (rows.py); tiles of pairs are summed, and an image's last program computes its loss
(forward.py, loss.py); tiles of pairs are multiplied, where several programs share the columns of a row tile
and write one part of g each (backward.py); and the parts are added up to gradients (gradient.py). Calls of
few vectors take one kernel forward and one backward instead (small.py). Tables on the device tell every
program its part of the work (layout.py). Of images with many vectors and exponents proportional to d, the
fused kernels group rows by equal ratios, and skip the pairs within a group (groups.py).

Tensor cores truncate where fp32 units round, so products of 16-bit vectors come out too small, by up to C
2^-27 for parallel vectors. The gradient's own rounding is larger than that; the loss shows it at low
temperatures (tests/tensor_cores.py).

Rows are packed as `v'' = v 2^-k` with k such that 1 <= |v''| < 2, which is exact in 16 bits. `scale = 1 /
|v''|` is applied to the products in fp32. fp32 rows are packed as unit vectors, with scale 1. The scale of an
excluded row is `EXCLUDED` (tiles.py).

Shapes: B images, N vectors of C channels, M classes. P is N rounded up to a multiple of every tile, `width`
or WIDTH is C rounded up. Rows from N to P are excluded, as are invalid vectors: their packed rows are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contrastseg_fast.affinity import Affinity
from contrastseg_fast.kernels._common import on
from contrastseg_fast.kernels.pdcr import plan
from contrastseg_fast.kernels.pdcr.backward import multiply_pairs
from contrastseg_fast.kernels.pdcr.forward import sum_pairs
from contrastseg_fast.kernels.pdcr.gradient import write_gradients
from contrastseg_fast.kernels.pdcr.loss import new_losses
from contrastseg_fast.kernels.pdcr.rows import Inputs, Packed, new_packed, pack
from contrastseg_fast.kernels.pdcr.small import differentiate_small, sum_small
from contrastseg_fast.problems import Call

__all__ = ["Inputs", "Packed", "backward", "forward"]


def _terms(call: Call, affinity: Affinity, dtype: torch.dtype) -> plan.Terms:
    return plan.terms_of(affinity, dtype, max(map(call.count, call.problems)), call.num_compared)


@torch.no_grad()
def forward(call: Call, inputs: Inputs, affinity: Affinity, reduction: str) -> tuple[Tensor, Tensor, Packed]:
    """The losses of a call's problems.

    Every image of every problem holds at least one number.

    Returns:
        the loss, a scalar averaged over problems, or one for every image of every problem for
        `reduction="none"`; log Z of all vectors of all images; and what the backward pass needs.
    """
    terms = _terms(call, affinity, inputs.sources[0].dtype)
    symmetric = terms.bounded and not torch.are_deterministic_algorithms_enabled()
    with on(inputs.ratios), torch.autocast(inputs.ratios.device.type, enabled=False):
        packed = new_packed(call, inputs.sources[0])
        losses = new_losses(call, packed, terms, symmetric, reduction)
        if plan.is_small_forward(call):
            sum_small(call, inputs, packed, losses, terms)
        else:
            scratch, partials = pack(call, inputs, packed, terms)
            sum_pairs(call, packed, scratch, partials, losses, terms, symmetric)
    return losses.loss, losses.log_z, packed


@torch.no_grad()
def backward(
    call: Call, packed: Packed, log_z: Tensor, affinity: Affinity, grad: Tensor, outs: tuple[Tensor, ...]
) -> None:
    """Fill the gradients `(B, N, C)` of the vectors of every source, from that of the loss of `forward`."""
    terms = _terms(call, affinity, packed.rows.dtype)
    with on(log_z), torch.autocast(log_z.device.type, enabled=False):
        if plan.is_small(call):
            differentiate_small(call, packed, log_z, terms, grad, outs)
        else:
            sums = multiply_pairs(call, packed, log_z, terms)
            write_gradients(call, packed, sums, terms, grad, outs)
