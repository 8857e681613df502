"""The entropy gate's Triton kernels as they are launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ahead_of_time import Spec

from contrastseg_fast.kernels.entropy_gate import (
    LAUNCHES,
    entropy_gate_bwd_kernel,
    entropy_gate_fwd_kernel,
)

_LAYOUTS = {False: "channels_first", True: "channels_last"}
_VECTORS = (("fp32", 4), ("fp32", 1), ("bf16", 8), ("fp64", 1))  # elements that are moved at once
_SIZES = {"bf16": 2, "fp32": 4, "fp64": 8}


def _signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """Features and logits of one type; integers of 32 bits."""
    computed = "fp64" if dtype == "fp64" else "fp32"
    pointers = dict.fromkeys(("p_g", "p_x", "p_y", "p_z", "p_dz"), dtype)
    pointers |= dict.fromkeys(("p_u", "p_du"), computed)
    types = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in kernel.arg_names}
    return types | dict.fromkeys(constants, "constexpr")


def specs(capability: int) -> Iterator[Spec]:
    """Both directions, in every layout, with every way to move features."""
    for kernel in (entropy_gate_fwd_kernel, entropy_gate_bwd_kernel):
        for channels_last, layout in _LAYOUTS.items():
            for dtype, vector in _VECTORS:
                launch = LAUNCHES[channels_last][_SIZES[dtype]]
                constants = {"CHANNELS_LAST": channels_last, "VECTOR": vector}
                constants |= {"BLOCK_C": launch.block_c, "BLOCK_L": launch.block_l}
                if kernel is entropy_gate_bwd_kernel:
                    constants |= {"HAS_GRAD": True, "HAS_GRAD_U": True}
                yield Spec(
                    f"{kernel.__name__}-{layout}-{dtype}-{vector}",
                    kernel,
                    _signature(kernel, constants, dtype),
                    constants,
                    launch.num_warps,
                    num_stages=3,
                    instructions=("LDG.E.128", "STG.E.128") if vector > 1 else (),
                )
