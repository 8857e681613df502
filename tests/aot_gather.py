"""What to compile of the kernels that gather vectors: both memory formats, narrow and wide dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ahead_of_time import Spec

from contrastseg_fast.kernels import gather as kernels


def spec(
    name: str,
    kernel: Any,
    num_warps: int,
    constants: dict[str, Any],
    pointers: dict[str, str],
    wide_sizes: tuple[str, ...],
) -> Spec:
    """A launch on maps whose sizes are multiples of 16, which it writes in words of 16 bytes."""
    integers = dict.fromkeys(kernel.arg_names, "i32")
    signature = integers | pointers | dict.fromkeys(constants, "constexpr")
    instructions = ("STG.E.128",) if wide_sizes else ()
    return Spec(name, kernel, signature, constants, num_warps, 3, instructions, wide_sizes)


def specs(capability: int) -> Iterator[Spec]:
    """The launches, the same for all cards."""
    for channels_last in (False, True):
        layout = "channels_last" if channels_last else "contiguous"
        for dtype in ("bf16", "fp32", "fp64"):
            launch = kernels.GATHER[channels_last]
            yield spec(
                f"gather-{layout}-{dtype}",
                kernels.gather_kernel,
                launch.num_warps,
                {
                    "CHANNELS_LAST": channels_last,
                    "BLOCK_N": launch.block_positions,
                    "BLOCK_C": launch.block_channels,
                },
                {"features_ptr": f"*{dtype}", "position_ptr": "*i64", "vectors_ptr": f"*{dtype}"},
                ("channels",),
            )
            launch = kernels.SCATTER[channels_last]
            yield spec(
                f"gather_bwd-{layout}-{dtype}",
                kernels.gather_bwd_kernel,
                launch.num_warps,
                {
                    "CHANNELS_LAST": channels_last,
                    "BLOCK_S": launch.block_positions,
                    "BLOCK_C": launch.block_channels,
                },
                {
                    "grad_ptr": f"*{dtype}",
                    "position_ptr": "*i64",
                    "found_ptr": "*i32",
                    "features_grad_ptr": f"*{dtype}",
                },
                ("num_positions", "channels"),
            )
    block, num_warps = kernels.LOCATE
    pointers = {"position_ptr": "*i64", "found_ptr": "*i32"}
    yield spec("locate", kernels.locate_kernel, num_warps, {"BLOCK_N": block}, pointers, ())
