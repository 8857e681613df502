"""Foreground ratios (Eq. 4): the share of every class in patches of the labels, and how much of each is
valid.

    ratio^m = (pixels of class m inside the patch) / denominator

`labels` are class indices `(B, *spatial)` of any dtype or soft labels `(B, M, *spatial)`, `starts` are `(B,
N, D)` or `(N, D)` integers. Results are the ratios `(B, N, M)`, the valid fraction `(B, N)`, and,
`with_inside`, the ratios over the part of each patch inside the image `(B, N, M)` (those of border="clip";
else `(B, N, 0)`), all fp32 and without gradients. All sums are of integers, so that neither their order nor
the kernel shows in the result; soft labels are rounded to multiples of a small power of two
(`_fraction_bits`).

The kernels below are plain PyTorch, from integral images. The C++ extension (csrc/cpu) replaces them on the
CPU, the Triton kernels (kernels/foreground_ratio) on a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from contrastseg_fast.ops._dispatch import Operation, pick
from contrastseg_fast.ops._library import define, without_gradient

OPERATION = Operation("foreground_ratio")
_WIDEST_FIELD = 31  # bits of a count in the Triton kernels' words


def refused_by_triton(labels: Tensor, size: Sequence[int]) -> str | None:
    """The error for patches that the Triton kernels do not count, or None."""
    extents = labels.shape[-len(size) :]
    area = math.prod([min(pair) for pair in zip(extents, size, strict=True)])
    if area.bit_length() > _WIDEST_FIELD:
        return f"size: expected fewer than 2^31 pixels of the image for backend='triton', got {area}"
    if max(extents) >= 1 << 31:
        got = tuple(extents)
        return f"labels: expected fewer than 2^31 pixels along each axis for backend='triton', got {got}"
    if math.prod(size) >= 1 << 63:
        return f"size: expected an area below 2^63 for backend='triton', got {tuple(size)}"
    return None


def _fraction_bits(extents: Sequence[int], size: Sequence[int]) -> int:
    """Bits behind the binary point of soft labels: 40, or fewer so that a patch's sum fits into 52 bits."""
    area = math.prod([min(extent, length) for extent, length in zip(extents, size, strict=True)])
    return min(40, 52 - area.bit_length())


def _corners(
    begin: Sequence[Tensor], end: Sequence[Tensor], extents: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """The sign and the position `(B, N)` in the flat integral image of the 2^D corners of every patch."""
    for ends in itertools.product((False, True), repeat=len(extents)):
        position = torch.zeros_like(begin[0])
        for axis, extent in enumerate(extents):
            position = position * (extent + 1) + (end[axis] if ends[axis] else begin[axis])
        yield (-1) ** ends.count(False), position


def _patch_sums(pixels: Tensor, corners: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Sums `(B, N)` of integers `(B, *spatial)` over the patches."""
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
    with_inside: bool,
    _backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
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
        sums.append(_patch_sums(members.masked_fill(ignored, 0), corners).double())
    pixels = torch.stack(sums, -1) / scale

    num_ignored = _patch_sums(ignored.long(), corners).double()
    inside = torch.stack(end, -1).sub(torch.stack(begin, -1)).prod(-1).double()
    area = float(math.prod(size))
    valid_pixels = inside - num_ignored
    inside_ratios = pixels[..., : num_classes if with_inside else 0] / valid_pixels[..., None].clamp(min=1)
    if border == "background":
        pixels[..., 0] += area - inside
    denominator = valid_pixels if border == "clip" else area - num_ignored
    ratios = torch.where(denominator[..., None] > 0, pixels / denominator[..., None], 0)
    valid_fraction = torch.where(inside > 0, valid_pixels / inside, 0)
    return ratios.float(), valid_fraction.float(), inside_ratios.float()


def foreground_ratio_on_cuda(
    labels: Tensor,
    starts: Tensor,
    size: Sequence[int],
    num_classes: int,
    border: str,
    ignore_index: int | None,
    with_inside: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (size, num_classes, border, ignore_index, with_inside)
    if pick(OPERATION, backend, labels, refused_by_triton(labels, size)) != "triton":
        return _foreground_ratio(labels, starts, *options)
    from contrastseg_fast.kernels import foreground_ratio as kernels

    return kernels.foreground_ratio(labels, starts, *options)


def _foreground_ratio_fake(
    labels: Tensor,
    starts: Tensor,
    _size: Sequence[int],
    num_classes: int,
    _border: str,
    _ignore_index: int | None,
    with_inside: bool,
    _backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = labels.shape[0], starts.shape[-2]
    ratios = labels.new_empty((*shape, num_classes), dtype=torch.float32)
    inside_ratios = labels.new_empty((*shape, num_classes if with_inside else 0), dtype=torch.float32)
    return ratios, labels.new_empty(shape, dtype=torch.float32), inside_ratios


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


foreground_ratio = define(
    "foreground_ratio(Tensor labels, Tensor starts, int[] size, int num_classes, str border, "
    "int? ignore_index, bool with_inside, str backend) "
    "-> (Tensor ratios, Tensor valid_fraction, Tensor inside_ratios)",
    _foreground_ratio,
    _foreground_ratio_fake,
    foreground_ratio_on_cuda,
)
labels_in_range = define(
    "labels_in_range(Tensor labels, int highest, bool integral, int? ignore_index) -> Tensor",
    _labels_in_range,
    _labels_in_range_fake,
)
without_gradient(foreground_ratio)
without_gradient(labels_in_range)
