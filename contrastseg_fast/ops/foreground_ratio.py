"""Foreground ratios (Eq. 4): the share of every class in boxes of the labels, and how much of each is valid.

    ratio^m = (pixels of class m inside the box) / denominator

labels are class indices `(B, *spatial)` of any dtype or soft labels `(B, M, *spatial)`, starts `(B, N, D)` or
`(N, D)` integers. Ratios carry no gradient. All sums are of integers, so that neither their order nor the
kernel shows in the result; soft labels are rounded to multiples of a small power of two (`_fraction_bits`).

The default kernels below are plain PyTorch, from integral images; devices with kernels of their own replace
them: C++ on the CPU, Triton on CUDA.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from contrastseg_fast import _backend
from contrastseg_fast.ops._library import LIBRARY, define


def _fraction_bits(extents: Sequence[int], size: Sequence[int]) -> int:
    """Bits behind the binary point of soft labels: 40, or fewer so that a box's sum fits into 62 bits."""
    area = math.prod([min(extent, length) for extent, length in zip(extents, size, strict=True)])
    return min(40, 52 - area.bit_length())


def _corners(
    begin: Sequence[Tensor], end: Sequence[Tensor], extents: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """The sign and the position `(B, N)` in the flat integral image of the 2^D corners of every box."""
    for ends in itertools.product((False, True), repeat=len(extents)):
        position = torch.zeros_like(begin[0])
        for axis, extent in enumerate(extents):
            position = position * (extent + 1) + (end[axis] if ends[axis] else begin[axis])
        yield (-1) ** ends.count(False), position


def _box_sums(pixels: Tensor, corners: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Sums `(B, N)` of integers `(B, *spatial)` over the boxes."""
    for axis in range(1, pixels.ndim):
        pixels = pixels.cumsum(axis)
    integral = torch.nn.functional.pad(pixels, (1, 0) * (pixels.ndim - 1)).flatten(1)
    total = torch.zeros_like(corners[0][1])
    for sign, position in corners:
        total += sign * integral.gather(1, position)
    return total


def _integers_exact(labels: Tensor) -> Tensor:
    """Labels that compare with any Python integer by value; a uint8 255 would be equal to -1."""
    return labels if labels.dtype.is_floating_point else labels.long()


def _foreground_ratio(
    labels: Tensor,
    starts: Tensor,
    size: Sequence[int],
    num_classes: int,
    border: str,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    labels = _integers_exact(labels)
    soft = labels.ndim == len(size) + 2
    extents = labels.shape[-len(size) :]
    starts = starts.long().expand(labels.shape[0], *starts.shape[-2:])
    begin, end = [], []
    for axis, (extent, length) in enumerate(zip(extents, size, strict=True)):
        first = starts[..., axis].clamp(-length, extent)
        begin.append(first.clamp(min=0))
        end.append(torch.maximum((first + length).clamp(max=extent), begin[axis]))
    corners = list(_corners(begin, end, extents))

    scale = 2.0 ** _fraction_bits(extents, size) if soft else 1.0
    ignored = torch.zeros_like(labels[:, 0] if soft else labels, dtype=torch.bool)
    if ignore_index is not None:
        ignored = (labels == ignore_index).all(1) if soft else labels == ignore_index
    sums = []
    for m in range(num_classes):
        members = (labels[:, m].double() * scale).round().long() if soft else (labels == m).long()
        sums.append(_box_sums(members.masked_fill(ignored, 0), corners).double())
    pixels = torch.stack(sums, -1) / scale

    num_ignored = _box_sums(ignored.long(), corners).double()
    inside = torch.stack(end, -1).sub(torch.stack(begin, -1)).prod(-1).double()
    area = float(math.prod(size))
    if border == "background":
        pixels[..., 0] += area - inside
    denominator = (inside if border == "clip" else area) - num_ignored
    ratios = torch.where(denominator[..., None] > 0, pixels / denominator[..., None], 0)
    valid_fraction = torch.where(inside > 0, (inside - num_ignored) / inside, 0)
    return ratios.float(), valid_fraction.float()


def _foreground_ratio_cuda(
    labels: Tensor,
    starts: Tensor,
    size: Sequence[int],
    num_classes: int,
    border: str,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    if _backend.has_triton("foreground_ratio runs in plain PyTorch", labels.device):
        from contrastseg_fast.kernels import foreground_ratio as kernels

        if kernels.can_count(labels, size):
            return kernels.foreground_ratio(labels, starts, size, num_classes, border, ignore_index)
    return _foreground_ratio(labels, starts, size, num_classes, border, ignore_index)


def _foreground_ratio_fake(
    labels: Tensor,
    starts: Tensor,
    size: Sequence[int],
    num_classes: int,
    border: str,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    shape = labels.shape[0], starts.shape[-2]
    ratios = labels.new_empty((*shape, num_classes), dtype=torch.float32)
    return ratios, labels.new_empty(shape, dtype=torch.float32)


def _labels_in_range(labels: Tensor, highest: int, integral: bool, ignore_index: int | None) -> Tensor:
    """Whether all labels are in [0, highest], and integers if `integral`; or equal to ignore_index."""
    labels = _integers_exact(labels)
    right = (labels >= 0) & (labels <= highest)
    if integral and labels.dtype.is_floating_point:
        right &= labels == labels.round()
    if ignore_index is not None:
        right |= labels == ignore_index
    return right.all()


def _labels_in_range_fake(labels: Tensor, *_options: object) -> Tensor:
    return labels.new_empty((), dtype=torch.bool)


_FOREGROUND_RATIO = define(
    "foreground_ratio(Tensor labels, Tensor starts, int[] size, int num_classes, str border, "
    "int? ignore_index) -> (Tensor ratios, Tensor valid_fraction)",
    _foreground_ratio,
    _foreground_ratio_fake,
)
_LABELS_IN_RANGE = define(
    "labels_in_range(Tensor labels, int highest, bool integral, int? ignore_index) -> Tensor",
    _labels_in_range,
    _labels_in_range_fake,
)
torch.library.impl(_FOREGROUND_RATIO, "CUDA", lib=LIBRARY)(_foreground_ratio_cuda)
for _op in (_FOREGROUND_RATIO, _LABELS_IN_RANGE):
    torch.library.impl(_op, "Autograd", lib=LIBRARY)(torch.library.fallthrough_kernel)  # no gradients

foreground_ratio = torch.ops.contrastseg_fast.foreground_ratio.default
labels_in_range = torch.ops.contrastseg_fast.labels_in_range.default
