"""What to compile of the kernels for the foreground ratios: every launch, on labels of all kinds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import triton.language as tl
from ahead_of_time import Spec

from contrastseg_fast.kernels import foreground_ratio as kernels

LABELS = {"*u8": tl.int32, "*i64": tl.int64, "*bf16": tl.float32, "*fp64": tl.float64}


def signature(kernel: Any, constants: dict[str, Any], **others: str) -> dict[str, str]:
    """Types of all arguments: 32-bit integers but for constants and `others`."""
    names = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
    return names | others


def counting(labels: str, has_ignore: bool = True, word: tl.dtype = tl.int64) -> dict[str, Any]:
    return {"LABEL": LABELS[labels], "WORD": word, "HAS_IGNORE": has_ignore}


def box_spec(
    labels: str, extents: tuple[int, ...], size: tuple[int, ...], summed: int, soft: bool, word: tl.dtype
) -> Spec:
    block_boxes, block_y, block_x = kernels.box_tile(extents, size, summed)
    constants = counting(labels, word=word) | {
        "DIMS": len(size),
        "SUMMED": summed,
        "SOFT": soft,
        "BELOW_2_24": math.prod(size) < 1 << 24 and not soft,
        "BORDER": "background",
        "BLOCK_BOXES": block_boxes,
        "BLOCK_Y": block_y,
        "BLOCK_X": block_x,
        "FIELDS": 2 if soft else 8,
    }
    source = labels if summed == 0 and not soft else "*i32" if word == tl.int32 else "*i64"
    kernel = kernels.box_ratio_kernel
    types = signature(
        kernel,
        constants,
        source_ptr=source,
        starts_ptr="*i64",
        ratios_ptr="*fp32",
        valid_ptr="*fp32",
        unit="fp32",
    )
    kind = "soft" if soft else f"summed{summed}"
    name = f"box_ratio-{kind}-{labels[1:]}-{word}-{'x'.join(map(str, size))}"
    return Spec(name, kernel, types, constants, kernels.BOX_WARPS, 3)


def sum_spec(labels: str | None, length: int, along_rows: bool, word: tl.dtype) -> Spec:
    launch = kernels.sum_launch(length, along_rows)
    constants = counting(labels or "*i64", word=word) | {
        "ALONG_ROWS": along_rows,
        "BLOCK_LINES": launch.block_lines,
        "BLOCK_LENGTH": launch.block_length,
    }
    if labels is None:
        constants["labels_ptr"] = None
    kernel = kernels.running_sum_kernel
    types = signature(kernel, constants, words_ptr="*i32" if word == tl.int32 else "*i64")
    if labels is not None:
        types["labels_ptr"] = labels
    kind = "in_place" if labels is None else labels[1:]
    name = f"running_sum-{'rows' if along_rows else 'down'}{length}-{kind}-{word}"
    instructions = ("LDGSTS",) if word == tl.int64 and labels in (None, "*i64") else ()  # loads ahead of time
    return Spec(name, kernel, types, constants, launch.num_warps, 3, instructions)


def fixed_point_spec(labels: str) -> Spec:
    constants = {"LABEL": LABELS[labels], "HAS_IGNORE": True, "BLOCK": kernels.FIXED_POINT_ELEMENTS}
    kernel = kernels.fixed_point_kernel
    types = signature(kernel, constants, labels_ptr=labels, words_ptr="*i64", scale="fp32")
    return Spec(f"fixed_point-{labels[1:]}", kernel, types, constants, kernels.FIXED_POINT_WARPS, 3)


def specs(capability: int) -> Iterator[Spec]:
    """The launches, the same for all cards."""
    large = (512, 512)
    yield box_spec("*i64", large, (11, 11), 0, False, tl.int64)
    yield box_spec("*u8", large, (35, 35), 0, False, tl.int32)
    yield box_spec("*bf16", (96, 96, 96), (7, 7, 7), 0, False, tl.int64)
    yield box_spec("*fp64", (96, 96, 96), (35, 35, 35), 1, False, tl.int64)
    yield box_spec("*i64", large, (91, 91), 1, False, tl.int32)
    yield box_spec("*i64", large, (91, 91), 2, False, tl.int64)
    yield box_spec("*i64", large, (11, 11), 0, True, tl.int64)
    yield box_spec("*i64", (8192, 8192), (5000, 5000), 2, False, tl.int64)
    for along_rows, table in ((False, kernels.SUM_DOWN), (True, kernels.SUM_ALONG_ROWS)):
        for length in table:
            yield sum_spec("*i64", length, along_rows, tl.int64)
            yield sum_spec(None, length, along_rows, tl.int64)
    yield sum_spec("*u8", 256, False, tl.int32)
    yield sum_spec("*bf16", 256, False, tl.int64)
    yield fixed_point_spec("*bf16")
    yield fixed_point_spec("*fp64")
