"""The PDCR kernels at every entry of their launch tables, and in every mode at the widest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ahead_of_time import Spec

from contrastseg_fast.kernels import pdcr

MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

MODES = {
    "plain": {"CLASSES": 2, "CATEGORICAL": False, "PLAIN": True},
    "general": {"CLASSES": 4, "CATEGORICAL": False, "PLAIN": False},
    "many_classes": {"CLASSES": 0, "CATEGORICAL": False, "PLAIN": True},
    "categorical": {"CLASSES": 1, "CATEGORICAL": True, "PLAIN": True},
}


def _spec(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    launch: tuple[int, int],
    instructions: tuple[str, ...] = (),
    divisible: tuple[str, ...] = (),
) -> Spec:
    """Pointers that are not in `types` are fp32, other arguments i32; None is a constant."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = types.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")
    return Spec(name, kernel, signature, constants, *launch, instructions, divisible)


_FLOATS = dict.fromkeys(
    (
        "phi_scale",
        "absent",
        "bias",
        "slope",
        "shift",
        "unequal",
        "pull",
        "offset",
        "num_bias",
        "weight_scale",
        "row_scale",
        "inverse_temperature",
        "attraction_scale",
    ),
    "fp32",
)
_SORTED = {"order_ptr": "*i64", "runs_ptr": "*i32", "count_ptr": "*i64"}


def _fused(capability: int) -> Iterator[Spec]:
    instruction = (MATRIX_INSTRUCTION[capability],)
    for table, kernel, name in (
        (pdcr.FORWARD, pdcr.pdcr_fwd_kernel, "fwd"),
        (pdcr.BACKWARD, pdcr.pdcr_bwd_kernel, "bwd"),
    ):
        by_mode = table[capability]
        for lean, width, mode, extreme, dtype in [
            *((True, width, "plain", False, "bf16") for width in by_mode[True]),
            (True, 128, "plain", False, "fp16"),
            (True, 256, "categorical", False, "bf16"),
            *((False, width, "general", True, "bf16") for width in by_mode[False]),
            (False, 256, "plain", True, "fp16"),
            (False, 256, "general", False, "bf16"),
            (False, 256, "many_classes", False, "bf16"),
            (False, 256, "many_classes", True, "bf16"),
        ]:
            launch = by_mode[lean][min(entry for entry in by_mode[lean] if entry >= width)]
            constants = {
                **MODES[mode],
                "WIDTH": width,
                "BLOCK_I": launch.block_i,
                "BLOCK_J": launch.block_j,
            }
            types = {**_FLOATS, **_SORTED, "rows_ptr": f"*{dtype}"}
            if name == "fwd":  # extreme: rows with a running maximum
                constants |= {"SYMMETRIC": not extreme, "panel_ptr": None}
            else:  # extreme: two powers a pair
                constants |= {"STABLE": extreme}
            if mode != "plain":
                constants |= {"order_ptr": None, "runs_ptr": None}
            yield _spec(
                f"pdcr_{name}-{dtype}-{width}-{mode}{'-extreme' * extreme}",
                kernel,
                types,
                constants,
                (launch.num_warps, launch.num_stages),
                instruction,
                ("padded",),
            )


def _panels() -> Iterator[Spec]:
    for mode, flags in MODES.items():
        for extreme in (False, True):
            launch = pdcr.PANEL_FORWARD
            blocks = {"BLOCK_I": launch.block_i, "BLOCK_J": launch.block_j}
            absent = {"rows_ptr": None, "runs_ptr": None, "order_ptr": None}
            yield _spec(
                f"pdcr_fwd-panel-{mode}{'-extreme' * extreme}",
                pdcr.pdcr_fwd_kernel,
                {**_FLOATS, "count_ptr": "*i64"},
                {**flags, **blocks, **absent, "WIDTH": 0, "SYMMETRIC": not extreme},
                (launch.num_warps, launch.num_stages),
                divisible=("padded", "first_column", "panel_stride_b", "panel_stride_n"),
            )
            launch = pdcr.PANEL_PAIRS
            blocks = {"BLOCK_I": launch.block_i, "BLOCK_J": launch.block_j}
            yield _spec(
                f"pdcr_pairs-{mode}{'-extreme' * extreme}",
                pdcr.pdcr_pairs_kernel,
                {**_FLOATS, "weights_ptr": "*bf16"},
                {**flags, **blocks, "STABLE": extreme},
                (launch.num_warps, launch.num_stages),
                divisible=("padded", "panel_stride_b", "panel_stride_n"),
            )


def specs(capability: int) -> Iterator[Spec]:
    yield from _fused(capability)
    yield from _panels()
    block_n, block_c, num_warps = pdcr.ROWS
    types = {**_FLOATS, "count_ptr": "*i64"}
    for dtype in ("fp32", "bf16"):
        yield _spec(
            f"pdcr_rows-{dtype}",
            pdcr.pdcr_rows_kernel,
            {
                **types,
                "vectors_ptr": f"*{dtype}",
                "rows_ptr": f"*{dtype}",
                "valid_ptr": "*u8",
                "order_ptr": "*i64",
            },
            {
                "vectors_stride_c": 1,
                "UNIT": dtype == "fp32",
                "STABLE": False,
                "BLOCK_N": block_n,
                "BLOCK_C": block_c,
            },
            (num_warps, 3),
            divisible=("vectors_stride_n", "width", "padded"),
        )
        yield _spec(
            f"pdcr_grad-{dtype}",
            pdcr.pdcr_grad_kernel,
            {**types, "rows_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "order_ptr": "*i64"},
            {"BLOCK_N": block_n, "BLOCK_C": block_c},
            (num_warps, 3),
            divisible=("width", "padded", "channels"),
        )
    yield _spec(
        "pdcr_loss",
        pdcr.pdcr_loss_kernel,
        {**types, "order_ptr": "*i64"},
        {"LOGGED": False, "BLOCK": 1024},
        (4, 3),
    )
