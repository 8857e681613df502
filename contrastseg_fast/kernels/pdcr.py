"""PDCR on a GPU: the loss of every image and its gradient, from tiles of similarities that are never stored.

What is computed, with `u = v / |v|`, `x_ij = u_i . u_j - shift`, distances `d_ij`, and exponents base 2:

    t_ij = x_ij (den_bias + den_slope d_ij) log2(e) / tau        Z_i = sum_j 2^t_ij
    loss = ( n sum_i log Z_i - 1/tau (num_bias (|S|^2 - shift n^2) + num_slope sum_ij x_ij d_ij) ) / n^2
    g_i  = sum_j [ n (den_bias + den_slope d_ij) 2^t_ij (1/Z_i + 1/Z_j) - 2 num_slope d_ij ] u_j
           - 2 num_bias S

where `S = sum_j u_j` stands for the constant part of the numerator's weights: no tile has to form it. In the
paper's form t and the bracket vanish where d = 0, so tiles of equal ratios are left out, exactly. Where none
can be, most of the last term goes into the bracket, and in other forms all of it, which it nearly cancels:
the bracket is rounded to 16 bits, and so should be small.

16-bit vectors of up to 256 channels go through fused kernels (tensor cores, epilogue in registers). All
others go through panels: cuBLAS writes some rows of similarities, a kernel turns them into powers or pair
weights, cuBLAS multiplies. The forward pass visits the pairs (i, j) and (j, i) together, and so do the
backward panels; the fused backward kernel owns whole rows. Only the forward pass has float atomics, and not
where deterministic algorithms are asked for, nor where sums of powers need a running maximum.

Rows are multiplied as `v'' = v 2^-k` with k such that 1 <= |v''| < 2, which is exact in 16 bits, and
`scale = 1 / |v''|` is applied to the products in fp32. A negative scale marks a row that takes no part.
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
    pdcr_grad_kernel,
    pdcr_loss_kernel,
    pdcr_pairs_kernel,
    pdcr_rows_kernel,
)

LOG2_E = math.log2(math.e)
_PAD = 128  # rows are padded to a multiple of every BLOCK_I and BLOCK_J
_WIDEST_FUSED = 256  # channels
_UNROLLED_CLASSES = 4
_LARGEST_EXPONENT = 85.0  # of e; sums of that many powers stay finite in fp32
_PANEL_BYTES = (16 << 20, 64 << 20)  # least and most, for the similarities of one panel

SORT_FROM = 8192  # vectors of an image; below, finding tiles of equal ratios costs more than it saves


# By compute capability; then whether the mode is the paper's (plain exponents, at most two classes, no
# running maximum), which takes the fewest registers; then by padded channels: the next larger entry serves.
FORWARD = {
    80: {
        True: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
        False: {64: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
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
        False: {128: Launch(64, 64, 4, 2), 256: Launch(64, 64, 8, 2)},
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


class _Form(NamedTuple):
    """The operator's options as the kernels take them."""

    categorical: bool
    plain: bool  # t = x d log2(e) / tau, with that factor in the ratios
    skips: bool  # whether vectors are sorted, so that tiles of equal ratios can be left out
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
    def pair_weights(self) -> tuple[float, ...]:
        """What the pair weights take, in the kernels' order."""
        return self.bias, self.slope, self.shift, self.unequal, self.pull, self.offset


def _form(options: tuple[Any, ...], vectors: Tensor, num_classes: int) -> _Form:
    num_vectors = vectors.shape[1]
    temperature, distance_scale, categorical, num_bias, num_slope, den_bias, den_slope, shift = options
    farthest = 1.0 if categorical else distance_scale * num_classes
    weight = max(abs(den_bias), abs(den_bias + den_slope * farthest))
    largest = weight * (1 + abs(shift)) / temperature + math.log(max(num_vectors, 1))
    plain = den_bias == 0 and den_slope == 1 and shift == 0
    skips = plain and not categorical and fused(vectors) and num_vectors >= SORT_FROM
    apart = 0.0
    if plain and not categorical:  # most categories are unlike: their weights are smallest with all of it
        apart = num_bias if skips else num_bias / 4  # by trial
    factor = LOG2_E / temperature
    scale = factor if plain else 1.0
    return _Form(
        categorical=categorical,
        plain=plain,
        skips=skips,
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
    order: Tensor | None  # (B, N)


def fused(vectors: Tensor) -> bool:
    """Whether the fused kernels take these vectors; else the panels do."""
    return vectors.dtype in (torch.float16, torch.bfloat16) and vectors.shape[2] <= _WIDEST_FUSED


def _order(ratios: Tensor, valid: Tensor | None) -> Tensor:
    """Vectors of equal ratios together, those that take no part last."""
    weights = torch.arange(2, ratios.shape[-1] + 2, device=ratios.device).sqrt()
    keys = (ratios * weights).sum(-1)
    if valid is not None:
        keys = keys.masked_fill(~valid, torch.inf)
    return keys.sort(dim=-1, stable=True).indices


def _runs(phi: Tensor, launch: Launch) -> Tensor:
    """For every row tile `(B, T, 2)` the column tiles [first, last) whose ratios all equal all of its own."""
    changes = (phi[..., 1:] != phi[..., :-1]).any(1)
    positions = torch.arange(1, phi.shape[-1], device=phi.device)
    starts = torch.nn.functional.pad(torch.where(changes, positions, 0), (1, 0)).cummax(-1).values
    first = starts[:, :: launch.block_i].contiguous()
    last = torch.searchsorted(starts, first, right=True)
    begin = torch.arange(0, phi.shape[-1], launch.block_i, device=phi.device)
    whole = (first <= begin) & (last >= begin + launch.block_i)
    # Whole row tiles only: a skipped pair is counted by the row tiles on either side of it.
    first, last = -(first // -launch.block_i), last // launch.block_i
    per_row_tile = launch.block_i // launch.block_j
    return torch.stack([first, torch.where(whole, last, first)], -1).mul(per_row_tile).int()


def _prepare(
    vectors: Tensor, ratios: Tensor, valid: Tensor | None, form: _Form, log_z: Tensor | None = None
) -> _Prepared:
    batch, num_vectors, channels = vectors.shape
    padded = _PAD * triton.cdiv(num_vectors, _PAD)
    width = max(16, triton.next_power_of_2(channels)) if fused(vectors) else 8 * triton.cdiv(channels, 8)
    num_classes = ratios.shape[-1]
    new = vectors.new_empty
    order = _order(ratios, valid) if form.skips else None
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
        vectors,
        ratios,
        None if valid is None else valid.view(torch.uint8),
        order,
        log_z,
        count,
        rows,
        scale,
        inverse,
        phi,
        sums,
        z,
        num_vectors,
        padded,
        channels,
        width,
        num_classes,
        *vectors.stride(),
        *ratios.stride(),
        form.phi_scale,
        -1.0 if form.plain else 0.0,  # equal to no other, for runs; within their range, for exponents
        UNIT=vectors.dtype == torch.float32,
        STABLE=form.stable,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    return _Prepared(rows, scale, inverse, phi, sums.sum(1), count, z, order)


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
        "CLASSES": num_classes if num_classes <= _UNROLLED_CLASSES else 0,
        "CATEGORICAL": form.categorical,
        "PLAIN": form.plain,
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
    runs = _runs(phi, launch) if prepared.order is not None else None

    def add(first: int, first_column: int, panel: Tensor | None) -> None:
        tiles = row_tiles if panel is None else panel.shape[1] // launch.block_i
        pdcr_fwd_kernel[(tiles, chunks, batch)](
            rows if panel is None else None,
            panel,
            prepared.scale,
            phi,
            runs,
            prepared.order,
            prepared.num_valid,
            z,
            attraction,
            first // launch.block_i,
            first_column,
            padded,
            0 if panel is None else panel.stride(0),
            0 if panel is None else panel.stride(1),
            phi.shape[1],
            per_program,
            form.bias,
            form.slope,
            form.shift,
            form.unequal,
            WIDTH=0 if from_panels else width,
            **_modes(form, phi.shape[1]),
            SYMMETRIC=symmetric,
            BLOCK_I=launch.block_i,
            BLOCK_J=launch.block_j,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=True,
        )

    if not from_panels:
        add(0, 0, None)
        return z, attraction
    block_j = launch.block_j
    for panel in _panels(prepared, lambda first: first // block_j * block_j if symmetric else 0):
        add(*panel)
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
            z,
            prepared.scale,
            prepared.order,
            prepared.num_valid,
            prepared.sums,
            attraction,
            loss,
            log_z,
            num_vectors,
            *prepared.rows.shape[1:],
            attraction.shape[1],
            1 / temperature,
            num_bias,
            form.attraction_scale,
            form.shift,
            LOGGED=not symmetric,
            BLOCK=1024,
        )
    return loss, log_z


def _multiply_pairs(prepared: _Prepared, form: _Form, weight_scale: float, launch: Launch) -> Tensor:
    """g `(B, P, width)` but for its constant part, times the scale of its row, by the fused kernel."""
    rows, scale, _, phi, _, num_valid, z, order = prepared
    batch, padded, width = rows.shape
    g = rows.new_empty(rows.shape, dtype=torch.float32)
    pdcr_bwd_kernel[(padded // launch.block_i, batch)](
        rows,
        scale,
        phi,
        z,
        _runs(phi, launch) if order is not None else None,
        order,
        num_valid,
        g,
        padded,
        phi.shape[1],
        *form.pair_weights,
        weight_scale,
        WIDTH=width,
        **_modes(form, phi.shape[1]),
        STABLE=form.stable,
        BLOCK_I=launch.block_i,
        BLOCK_J=launch.block_j,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
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
            panel,
            pairs,
            prepared.scale,
            prepared.phi,
            prepared.z,
            first,
            padded,
            panel.stride(0),
            panel.stride(1),
            prepared.phi.shape[1],
            *form.pair_weights,
            weight_scale,
            **_modes(form, prepared.phi.shape[1]),
            STABLE=form.stable,
            BLOCK_I=launch.block_i,
            BLOCK_J=launch.block_j,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=True,
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
            g,
            rows,
            prepared.scale,
            prepared.inverse,
            prepared.sums,
            prepared.order,
            prepared.num_valid,
            grad,
            out,
            num_vectors,
            rows.shape[1],
            channels,
            rows.shape[2],
            grad.stride(0),
            form.apart,
            row_scale,
            1 / temperature,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return out
