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
slabs of the backward pass; the fused backward kernel computes whole rows. Only the forward pass uses float
atomics. It does not use them when deterministic algorithms are requested, or when sums of exponentials need a
running maximum. Every pair is computed: finding tiles of equal ratios, whose exponents are all 0, costs more
than skipping them saves (benchmarks/NOTES.md).

Tensor cores truncate where fp32 units round, so products of 16-bit vectors come out too small, by up to C
2^-27 for parallel vectors. The gradient's own rounding is larger than that; the loss shows it at low
temperatures (tests/tensor_cores.py).

Rows are packed as `v'' = v 2^-k` with k such that 1 <= |v''| < 2, which is exact in 16 bits. `scale = 1 /
|v''|` is applied to the products in fp32. The scale of an excluded row is `EXCLUDED` (tiles.py).

Shapes: B images, N vectors of C channels, M classes. P is N rounded up to a multiple of every tile, `width`
or WIDTH is C rounded up. Rows from N to P are excluded, as are invalid vectors: their packed rows are zero.
"""

from contrastseg_fast.kernels.pdcr.backward import backward
from contrastseg_fast.kernels.pdcr.forward import forward

__all__ = ["backward", "forward"]
