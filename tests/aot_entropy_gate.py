"""The entropy gate's Triton kernels as they are launched."""

from __future__ import annotations

from collections.abc import Iterator

from ahead_of_time import Spec

from contrastseg_fast.kernels.entropy_gate import (
    LAUNCHES,
    entropy_gate_bwd_kernel,
    entropy_gate_fwd_kernel,
)

_LAYOUTS = {False: "channels_first", True: "channels_last"}
_POINTERS = {
    entropy_gate_fwd_kernel: {"p_x": "features", "p_z": "logits", "p_y": "features", "p_u": "computed"},
    entropy_gate_bwd_kernel: {
        **{"p_g": "features", "p_du": "computed", "p_x": "features"},
        **{"p_z": "logits", "p_y": "features", "p_dz": "logits"},
    },
}


def specs(capability: int) -> Iterator[Spec]:
    """Both directions, in every layout, for features and logits of the same type, aligned and not."""
    for kernel, pointers in _POINTERS.items():
        for channels_last, layout in _LAYOUTS.items():
            for dtype, size in (("fp32", 4), ("bf16", 2), ("fp16", 2), ("fp64", 8)):
                for vector in (16 // size, 1):
                    launch = LAUNCHES[channels_last][size]
                    constants = {
                        "CHANNELS_LAST": channels_last,
                        "VECTOR": vector,
                        "BLOCK_C": launch.block_c,
                        "BLOCK_L": launch.block_l,
                    }
                    if kernel is entropy_gate_bwd_kernel:
                        constants |= {"HAS_GRAD": True, "HAS_GRAD_U": True}
                    types = {"features": dtype, "logits": dtype, "computed": "fp64" if size == 8 else "fp32"}
                    signature = {
                        name: f"*{types[pointers[name]]}"
                        if name in pointers
                        else "constexpr"
                        if name in constants
                        else "i32"
                        for name in kernel.arg_names
                    }
                    yield Spec(
                        f"{kernel.__name__}-{layout}-{dtype}-{vector}",
                        kernel,
                        signature,
                        constants,
                        launch.num_warps,
                        num_stages=3,
                        instructions=("LDG.E.128", "STG.E.128") if vector > 1 else (),
                    )
