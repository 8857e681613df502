"""PDCR on a GPU: the loss of every image and its gradient, from tiles of similarities that are never stored.

What is computed, with `u = v / |v|`, `x_ij = u_i . u_j - shift`, distances `d_ij`, and exponents base 2:

    t_ij = x_ij (den_bias + den_slope d_ij) log2(e) / tau        Z_i = sum_j 2^t_ij
    loss = ( n sum_i log Z_i - 1/tau (num_bias (|S|^2 - shift n^2) + num_slope sum_ij x_ij d_ij) ) / n^2
    g_i  = sum_j [ n (den_bias + den_slope d_ij) 2^t_ij (1/Z_i + 1/Z_j) - 2 num_slope d_ij ] u_j
           - 2 num_bias S

where `S = sum_j u_j` stands for the constant part of the numerator's weights: no tile has to form it. In the
paper's form most of the last term goes into the bracket, and in other forms all of it, which it nearly
cancels: the bracket is rounded to 16 bits, and so should be small.

16-bit vectors of up to 256 channels go through fused kernels (tensor cores, epilogue in registers). All
others go through panels: cuBLAS writes some rows of similarities, a kernel turns them into powers or pair
weights, cuBLAS multiplies. The forward pass visits the pairs (i, j) and (j, i) together, and so do the
backward panels; the fused backward kernel owns whole rows. Only the forward pass has float atomics, and not
where deterministic algorithms are asked for, nor where sums of powers need a running maximum. Every pair is
visited: tiles of equal ratios, whose exponents are all 0, cost more to find than they save (NOTES.md).

Tensor cores truncate where fp32 units round, so products of 16-bit vectors come out smaller than they are, by
up to C 2^-27 for parallel vectors. The gradient's own rounding hides that; the loss shows it at low
temperatures (tests/tensor_cores.py).

Rows are multiplied as `v'' = v 2^-k` with k such that 1 <= |v''| < 2, which is exact in 16 bits, and
`scale = 1 / |v''|` is applied to the products in fp32. A negative scale marks a row that is excluded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from contrastseg_fast.kernels._common import on, processors, sm_table
from contrastseg_fast.kernels._tuning import Launch, tuned
from contrastseg_fast.kernels.pdcr_kernels import (
    pdcr_bwd_kernel,
    pdcr_fwd_kernel,
    pdcr_fwd_panel_kernel,
    pdcr_grad_kernel,
    pdcr_loss_kernel,
    pdcr_pairs_kernel,
    pdcr_rows_kernel,
)

LOG2_E = math.log2(math.e)
_PAD = 128  # rows are padded to a multiple of every BLOCK_I and BLOCK_J
_NARROWEST_FUSED, _WIDEST_FUSED = 32, 256  # channels; of fewer, no thread would copy 16 bytes of a tile
_UNROLLED_CLASSES = 8
_LARGEST_EXPONENT = 85.0  # of e; sums of that many powers stay finite in fp32
_PANEL_BYTES = (16 << 20, 64 << 20)  # least and most, for the similarities of one panel


# By compute capability; then whether the mode is the paper's (plain exponents, at most two classes, no
# running maximum), which takes the fewest registers; then by padded channels: the next larger entry serves.
FORWARD = {
    80: {
        True: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
        False: {64: Launch(128, 64, 8, 3), 256: Launch(64, 64, 4, 2)},
    },
    90: {
        True: {64: Launch(128, 128, 8, 3), 256: Launch(128, 128, 8, 2)},
        False: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
    },
    100: {
        True: {64: Launch(128, 128, 8, 3), 256: Launch(128, 128, 8, 2)},
        False: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
    },
}
BACKWARD = {
    80: {
        True: {64: Launch(128, 64, 8, 3), 128: Launch(64, 64, 4, 2), 256: Launch(64, 64, 8, 2)},
        False: {256: Launch(64, 64, 8, 2)},
    },
    90: {
        True: {64: Launch(128, 128, 8, 3), 128: Launch(128, 128, 8, 2), 256: Launch(128, 64, 8, 3)},
        False: {128: Launch(128, 64, 8, 2), 256: Launch(128, 32, 8, 2)},
    },
    100: {
        True: {128: Launch(128, 64, 8, 2), 256: Launch(128, 64, 8, 2)},
        False: {128: Launch(128, 64, 8, 2), 256: Launch(128, 64, 8, 2)},
    },
}
# What tuning tries, for every shape.
CANDIDATES = [
    Launch(block_i, block_j, num_warps, num_stages)
    for block_i, block_j in ((128, 128), (128, 64), (128, 32), (64, 64), (64, 32))
    for num_warps in (4, 8)
    for num_stages in (2, 3, 4)
]
PANEL_FORWARD = Launch(32, 128, 4, 1)
PANEL_PAIRS = Launch(32, 128, 4, 1)
ROWS = (16, 128, 4)  # rows and channels of a program, warps


_PAIR_WEIGHTS = ("bias", "slope", "shift", "unequal", "pull", "offset")


class _Form(NamedTuple):
    """The operator's options as the kernels take them."""

    categorical: bool
    plain: bool  # t = x d log2(e) / tau, with that factor in the ratios
    stable: bool  # whether sums of powers could leave the range of fp32
    phi_scale: float
    bias: float
    slope: float
    shift: float
    unequal: float  # distance of different categories
    pull: float
    offset: float  # of the pair weights
    apart: float  # the part of num_bias that stays out of the pair weights
    factor: float  # log2(e) / tau
    attraction_scale: float

    @property
    def pair_weights(self) -> dict[str, float]:
        """What the kernels of the pair weights take, by the names of their arguments."""
        return {name: getattr(self, name) for name in _PAIR_WEIGHTS}


def _form(options: tuple[Any, ...], vectors: Tensor, num_classes: int) -> _Form:
    num_vectors = vectors.shape[1]
    temperature, distance_scale, categorical, num_bias, num_slope, den_bias, den_slope, shift = options
    farthest = 1.0 if categorical else distance_scale * num_classes
    weight = max(abs(den_bias), abs(den_bias + den_slope * farthest))
    largest = weight * (1 + abs(shift)) / temperature + math.log(max(num_vectors, 1))
    plain = den_bias == 0 and den_slope == 1 and shift == 0
    apart = 0.0
    if plain and not categorical:  # most categories are unlike: their weights are smallest with all of it
        apart = num_bias / 4  # by trial
    factor = LOG2_E / temperature
    scale = factor if plain else 1.0
    return _Form(
        categorical=categorical,
        plain=plain,
        stable=not largest <= _LARGEST_EXPONENT,
        phi_scale=1.0 if categorical else distance_scale * scale,
        bias=den_bias * factor,
        slope=den_slope * factor,
        shift=shift,
        unequal=scale,
        pull=-2 * num_slope * (1.0 if plain else factor),
        offset=-2 * (num_bias - apart) * factor,
        apart=apart,
        factor=factor,
        attraction_scale=num_slope / scale,
    )


def _weight_scale(dtype: torch.dtype, form: _Form, num_vectors: int) -> tuple[float, float]:
    """The factor of pair weights before they are rounded, so that fp16 holds them; and what undoes it."""
    largest = 2 * num_vectors * max(abs(form.bias), abs(form.bias + form.slope), form.factor) / form.factor
    shift = max(0, math.ceil(math.log2(max(largest, 1)) - 14)) if dtype == torch.float16 else 0
    return 2.0**-shift / form.factor, 2.0**shift


class _Prepared(NamedTuple):
    rows: Tensor  # (B, P, width)
    scale: Tensor  # (B, P)
    inverse: Tensor  # (B, P)
    phi: Tensor  # (B, M, P)
    sums: Tensor  # (B, width)
    num_valid: Tensor  # (B,)
    z: Tensor | None  # (B, P)


def fused(vectors: Tensor) -> bool:
    """Whether the fused kernels take these vectors; else the panels do."""
    return vectors.dtype in (torch.float16, torch.bfloat16) and vectors.shape[2] <= _WIDEST_FUSED


def _prepare(
    vectors: Tensor, ratios: Tensor, valid: Tensor | None, form: _Form, log_z: Tensor | None = None
) -> _Prepared:
    batch, num_vectors, channels = vectors.shape
    padded = _PAD * triton.cdiv(num_vectors, _PAD)
    width = 8 * triton.cdiv(channels, 8)
    if fused(vectors):
        width = max(_NARROWEST_FUSED, triton.next_power_of_2(channels))
    num_classes = ratios.shape[-1]
    new = vectors.new_empty
    if valid is None:
        count = torch.full((batch,), num_vectors, dtype=torch.int64, device=vectors.device)
    else:
        valid = valid.contiguous()
        count = valid.sum(1)
    block_n, block_c, num_warps = ROWS
    blocks = triton.cdiv(padded, block_n)
    rows = new(batch, padded, width)
    scale, inverse = (new(batch, padded, dtype=torch.float32) for _ in range(2))
    z = None if log_z is None else torch.empty_like(scale)
    phi = new(batch, num_classes, padded, dtype=torch.float32)
    sums = new(batch, blocks, width, dtype=torch.float32)
    pdcr_rows_kernel[(blocks, batch)](
        vectors_ptr=vectors,
        ratios_ptr=ratios,
        valid_ptr=None if valid is None else valid.view(torch.uint8),
        log_z_ptr=log_z,
        count_ptr=count,
        rows_ptr=rows,
        scale_ptr=scale,
        inverse_ptr=inverse,
        phi_ptr=phi,
        sums_ptr=sums,
        z_ptr=z,
        num_vectors=num_vectors,
        padded=padded,
        channels=channels,
        width=width,
        num_classes=num_classes,
        vectors_stride_b=vectors.stride(0),
        vectors_stride_n=vectors.stride(1),
        vectors_stride_c=vectors.stride(2),
        ratios_stride_b=ratios.stride(0),
        ratios_stride_n=ratios.stride(1),
        ratios_stride_m=ratios.stride(2),
        phi_scale=form.phi_scale,
        UNIT=vectors.dtype == torch.float32,
        STABLE=form.stable,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    return _Prepared(rows, scale, inverse, phi, sums.sum(1), count, z)


def _launch(
    table: dict[int, dict[bool, dict[int, Launch]]],
    prepared: _Prepared,
    form: _Form,
    symmetric: bool,
    run: Callable[[Launch], object],
) -> Launch:
    """The table's entry for these vectors, or the fastest where tuning was asked for."""
    width, num_classes = prepared.rows.shape[2], prepared.phi.shape[1]
    lean = form.plain and num_classes <= 2 and symmetric
    by_width = sm_table(table, prepared.rows)[lean]
    entry = by_width[min(entry for entry in by_width if entry >= width)]
    classes = min(num_classes, _UNROLLED_CLASSES + 1)
    name = "pdcr_fwd" if table is FORWARD else "pdcr_bwd"
    family = f"{name} {prepared.rows.dtype} width {width} classes {classes} {form.plain=} {symmetric=}"
    return tuned(family, entry, CANDIDATES, prepared.rows, run)


def _panels(prepared: _Prepared, first_column: Callable[[int], int]) -> Iterator[tuple[int, int, Tensor]]:
    """First row, first column and similarities `(B, rows, P - first column)` of every panel."""
    rows = prepared.rows
    batch, padded, width = rows.shape
    least, most = _PANEL_BYTES
    height = min(max(batch * padded * width * 4, least), most) // (4 * batch * padded)
    unit = _PAD if height >= _PAD else PANEL_FORWARD.block_i
    height = max(unit, height // unit * unit)
    for first in range(0, padded, height):
        column = first_column(first)
        yield first, column, _product(rows[:, first : first + height], rows[:, column:].mT)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product in fp32: of 16-bit operands, which are never rounded again."""
    if a.dtype == torch.float32:
        return a @ b
    if not a.is_cuda:
        return a.float() @ b.float()
    return torch.bmm(a, b, out_dtype=torch.float32)


def _add_product(sum: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == torch.float32:
        sum.baddbmm_(a, b)
    else:
        sum += _product(a, b)


def _modes(form: _Form, num_classes: int) -> dict[str, Any]:
    return {
        "CLASSES": num_classes if num_classes <= _UNROLLED_CLASSES else 1,
        "MORE_CLASSES": num_classes > _UNROLLED_CLASSES,
        "CATEGORICAL": form.categorical,
        "PLAIN": form.plain,
    }


def _options(launch: Launch) -> dict[str, Any]:
    return {
        "BLOCK_I": launch.block_i,
        "BLOCK_J": launch.block_j,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }


def _sum_powers(
    prepared: _Prepared, form: _Form, symmetric: bool, launch: Launch, from_panels: bool
) -> tuple[Tensor, Tensor]:
    """Sums of powers `(B, P)`, log2 of them unless symmetric; weighted similarities in parts `(B, parts)`."""
    rows, phi = prepared.rows, prepared.phi
    batch, padded, width = rows.shape
    row_tiles, column_tiles = padded // launch.block_i, padded // launch.block_j
    per_program = column_tiles
    if symmetric:
        pairs = batch * row_tiles * (column_tiles + 1) // 2
        per_program = min(max(pairs // (8 * processors(rows)), 1), 16)
    chunks = triton.cdiv(column_tiles, per_program)
    zeros = rows.new_zeros(batch * (padded + row_tiles * chunks), dtype=torch.float32)
    z, attraction = zeros[: batch * padded].view(batch, padded), zeros[batch * padded :].view(batch, -1)
    arguments = {
        "scale_ptr": prepared.scale,
        "phi_ptr": phi,
        "z_ptr": z,
        "attraction_ptr": attraction,
        "padded": padded,
        "num_classes": phi.shape[1],
        "tiles_per_program": per_program,
        "bias": form.bias,
        "slope": form.slope,
        "shift": form.shift,
        "unequal": form.unequal,
        **_modes(form, phi.shape[1]),
        "SYMMETRIC": symmetric,
        **_options(launch),
    }
    if not from_panels:
        pdcr_fwd_kernel[(row_tiles, chunks, batch)](rows_ptr=rows, WIDTH=width, **arguments)
        return z, attraction
    block_i, block_j = launch.block_i, launch.block_j
    for first, column, panel in _panels(
        prepared, lambda first: first // block_j * block_j if symmetric else 0
    ):
        pdcr_fwd_panel_kernel[(panel.shape[1] // block_i, chunks, batch)](
            panel_ptr=panel,
            first_tile=first // block_i,
            first_column=column,
            panel_stride_b=panel.stride(0),
            panel_stride_n=panel.stride(1),
            **arguments,
        )
    return z, attraction


@torch.no_grad()
def forward(vectors: Tensor, ratios: Tensor, valid: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """The kernel of the operator `pdcr_forward` (ops/pdcr.py); there is at least one number in `vectors`."""
    temperature, _, _, num_bias, *_ = options
    batch, num_vectors, _ = vectors.shape
    form = _form(options, vectors, ratios.shape[-1])
    symmetric = not (form.stable or torch.are_deterministic_algorithms_enabled())
    loss = vectors.new_empty(batch, dtype=torch.float32)
    log_z = vectors.new_empty(batch, num_vectors, dtype=torch.float32)
    with on(vectors), torch.autocast(vectors.device.type, enabled=False):
        prepared = _prepare(vectors, ratios, valid, form)
        from_panels = not fused(vectors)
        launch = PANEL_FORWARD
        if not from_panels:
            launch = _launch(
                FORWARD,
                prepared,
                form,
                symmetric,
                lambda launch: _sum_powers(prepared, form, symmetric, launch, False),
            )
        z, attraction = _sum_powers(prepared, form, symmetric, launch, from_panels)
        pdcr_loss_kernel[(batch,)](
            z_ptr=z,
            scale_ptr=prepared.scale,
            count_ptr=prepared.num_valid,
            sums_ptr=prepared.sums,
            attraction_ptr=attraction,
            loss_ptr=loss,
            log_z_ptr=log_z,
            num_vectors=num_vectors,
            padded=prepared.rows.shape[1],
            width=prepared.rows.shape[2],
            num_parts=attraction.shape[1],
            inverse_temperature=1 / temperature,
            num_bias=num_bias,
            attraction_scale=form.attraction_scale,
            shift=form.shift,
            LOGGED=not symmetric,
            BLOCK=1024,
            enable_fp_fusion=True,
        )
    return loss, log_z


def _multiply_pairs(prepared: _Prepared, form: _Form, weight_scale: float, launch: Launch) -> Tensor:
    """g `(B, P, width)` but for its constant part, times the scale of its row, by the fused kernel."""
    rows, phi = prepared.rows, prepared.phi
    batch, padded, width = rows.shape
    g = rows.new_empty(rows.shape, dtype=torch.float32)
    pdcr_bwd_kernel[(padded // launch.block_i, batch)](
        rows_ptr=rows,
        scale_ptr=prepared.scale,
        phi_ptr=phi,
        z_ptr=prepared.z,
        g_ptr=g,
        padded=padded,
        num_classes=phi.shape[1],
        **form.pair_weights,
        weight_scale=weight_scale,
        WIDTH=width,
        **_modes(form, phi.shape[1]),
        STABLE=form.stable,
        **_options(launch),
    )
    return g


def _multiply_panels(prepared: _Prepared, form: _Form, weight_scale: float) -> Tensor:
    """The same from panels."""
    rows = prepared.rows
    batch, padded, _ = rows.shape
    g = rows.new_zeros(rows.shape, dtype=torch.float32)
    launch = PANEL_PAIRS
    for first, _, panel in _panels(prepared, lambda first: first):
        height, columns = panel.shape[1:]
        pairs = panel if rows.dtype == torch.float32 else torch.empty_like(panel, dtype=rows.dtype)
        pdcr_pairs_kernel[(triton.cdiv(columns, launch.block_j), height // launch.block_i, batch)](
            panel_ptr=panel,
            weights_ptr=pairs,
            scale_ptr=prepared.scale,
            phi_ptr=prepared.phi,
            z_ptr=prepared.z,
            first_row=first,
            padded=padded,
            panel_stride_b=panel.stride(0),
            panel_stride_n=panel.stride(1),
            num_classes=prepared.phi.shape[1],
            **form.pair_weights,
            weight_scale=weight_scale,
            **_modes(form, prepared.phi.shape[1]),
            STABLE=form.stable,
            **_options(launch),
        )
        last = first + height
        _add_product(g[:, first:last], pairs, rows[:, first:])
        if columns > height:
            _add_product(g[:, last:], pairs[:, :, height:].mT, rows[:, first:last])
    return g


@torch.no_grad()
def backward(
    grad: Tensor, log_z: Tensor, vectors: Tensor, ratios: Tensor, valid: Tensor | None, *options: Any
) -> Tensor:
    """The kernel of the operator `pdcr_backward` (ops/pdcr.py), likewise."""
    temperature, *_ = options
    batch, num_vectors, channels = vectors.shape
    form = _form(options, vectors, ratios.shape[-1])
    weight_scale, row_scale = _weight_scale(vectors.dtype, form, num_vectors)
    out = vectors.new_empty(vectors.shape)
    with on(vectors), torch.autocast(vectors.device.type, enabled=False):
        prepared = _prepare(vectors, ratios, valid, form, log_z.contiguous())
        rows = prepared.rows
        if fused(vectors):
            launch = _launch(
                BACKWARD,
                prepared,
                form,
                not form.stable,
                lambda launch: _multiply_pairs(prepared, form, weight_scale, launch),
            )
            g = _multiply_pairs(prepared, form, weight_scale, launch)
        else:
            g = _multiply_panels(prepared, form, weight_scale)
        block_n, block_c, num_warps = ROWS
        pdcr_grad_kernel[(rows.shape[1] // block_n, batch)](
            g_ptr=g,
            rows_ptr=rows,
            scale_ptr=prepared.scale,
            inverse_ptr=prepared.inverse,
            sums_ptr=prepared.sums,
            count_ptr=prepared.num_valid,
            grad_ptr=grad,
            out_ptr=out,
            num_vectors=num_vectors,
            padded=rows.shape[1],
            channels=channels,
            width=rows.shape[2],
            grad_stride=grad.stride(0),
            num_bias=form.apart,
            row_scale=row_scale,
            inverse_temperature=1 / temperature,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return out
