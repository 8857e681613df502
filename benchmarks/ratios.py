"""`foreground_ratio` (Eq. 4): the classes' shares of many boxes of a label map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from benchmarks.masks import FIELD, chest_slices, chest_volume, grid_starts
from benchmarks.operation import OURS, Implementation, Inputs, Operation, Result, Run, Work
from contrastseg_fast import functional, reference

Ratios = Callable[[Tensor, Tensor, Sequence[int], int], Tensor]


@dataclass(frozen=True)
class Size:
    """`count` boxes of 11 pixels along each axis, in `batch` slices or in the volume."""

    batch: int = 8
    extent: int = 512  # of a slice; 0 stands for the whole volume
    classes: int = 4
    count: int = 1024
    places: str = "grid"

    def __str__(self) -> str:
        image = f"{self.extent}x{self.extent}" if self.extent else "133x128x128"
        return f"{self.places},B={self.batch},{image},M={self.classes},N={self.count}"

    @property
    def box(self) -> tuple[int, ...]:
        return (FIELD,) * (2 if self.extent else 3)


def _inputs(size: Size, device: str) -> Inputs:
    if size.extent:
        labels = chest_slices(size.batch, size.extent, size.classes)
    else:
        labels = chest_volume(size.classes)
    if size.places == "grid":
        starts = grid_starts(size.extent, size.count)
    else:
        generator = torch.Generator().manual_seed(0)
        places = [torch.randint(extent, (size.count,), generator=generator) for extent in labels.shape[1:]]
        starts = torch.stack(places, -1) - FIELD // 2
    return labels.to(device), starts.to(device)


def _plain(ratios: Ratios) -> Callable[[Size, Inputs], Run]:
    def prepare(size: Size, inputs: Inputs) -> Run:
        labels, starts = inputs
        return lambda: (ratios(labels, starts, size.box, size.classes),)

    return prepare


def _ours(labels: Tensor, starts: Tensor, box: Sequence[int], num_classes: int) -> Tensor:
    return functional.foreground_ratio(labels, starts, box, num_classes)[0]


def _reference(labels: Tensor, starts: Tensor, box: Sequence[int], num_classes: int) -> Tensor:
    return reference.foreground_ratio(labels, starts, box, num_classes)[0]


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    return one_hot(labels, num_classes).movedim(-1, 1).float()  # sums are exact up to 2^24 pixels


def _lean_one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Half the bytes that `one_hot` writes, and no copy to another type."""
    classes = torch.arange(num_classes, device=labels.device).view(-1, *[1] * (labels.ndim - 1))
    return (labels[:, None] == classes).int()


def cumsum_table(
    labels: Tensor, num_classes: int, membership: Callable[[Tensor, int], Tensor] = _lean_one_hot
) -> Tensor:
    """One-hot labels summed along each axis, `(B, M, *spatial)` with a leading 0 along each axis."""
    table = membership(labels, num_classes)
    for axis in range(2, table.ndim):
        table = table.cumsum(axis, dtype=table.dtype)
    return pad(table, (1, 0) * (table.ndim - 2))


def ratios_of_table(table: Tensor, starts: Tensor, box: Sequence[int]) -> Tensor:
    """Ratios `(B, N, M)` by the corners of every box in `cumsum_table`'s."""
    total = torch.zeros((), dtype=table.dtype, device=table.device)
    for corner in product((0, 1), repeat=len(box)):
        edges = [
            (starts[:, axis] + far * extent).clamp(0, table.shape[axis + 2] - 1)
            for axis, (far, extent) in enumerate(zip(corner, box, strict=True))
        ]
        index: tuple[Any, ...] = (slice(None), slice(None), *edges)
        total = total + (-1) ** (len(box) - sum(corner)) * table[index]
    return total.mT / prod(box)


def _cumsum(membership: Callable[[Tensor, int], Tensor]) -> Ratios:
    def ratios(labels: Tensor, starts: Tensor, box: Sequence[int], num_classes: int) -> Tensor:
        return ratios_of_table(cumsum_table(labels, num_classes, membership), starts, box)

    return ratios


ratios_by_cumsum = _cumsum(_lean_one_hot)


def _compiled(size: Size, inputs: Inputs) -> Run:
    ratios = torch.compile(ratios_by_cumsum, dynamic=False, fullgraph=True)
    return _plain(ratios)(size, inputs)


def _released(labels: Tensor, starts: Tensor, box: Sequence[int], num_classes: int) -> Tensor:
    """Each patch cropped and compared with each class in Python, as the authors' code does."""
    area = prod(box)
    ratios = torch.zeros(labels.shape[0], len(starts), num_classes)
    for b, image in enumerate(labels):
        for n, start in enumerate(starts.tolist()):
            window = (slice(max(at, 0), at + extent) for at, extent in zip(start, box, strict=True))
            patch = image[tuple(window)]
            for m in range(num_classes):
                ratios[b, n, m] = (patch == m).sum() / area
    return ratios


def _read(_size: Size, inputs: Inputs) -> Run:
    labels = inputs[0]
    return lambda: (labels.sum(),)


def _pixel_bytes(bytes_per_pixel: int) -> Callable[[Size], float]:
    """Of what is kept for each pixel and class."""

    def needed(size: Size) -> float:
        pixels = size.batch * size.extent**2 if size.extent else 133 * 128 * 128
        return bytes_per_pixel * pixels * size.classes

    return needed


def _oracle(size: Size, inputs: Inputs) -> Result:
    """On the CPU: the reference looks at one box after the other, and would wait for a GPU at each."""
    labels, starts = inputs
    (ratios,) = _plain(_reference)(size, (labels.cpu(), starts.cpu()))()
    return (ratios.to(labels.device),)


def _work(size: Size, inputs: Inputs) -> Work:
    labels, starts = inputs
    written = 4 * labels.shape[0] * size.count * (size.classes + 1)
    return Work(bytes=labels.nbytes + starts.nbytes + written)


OPERATION = Operation(
    name="foreground_ratio",
    make_inputs=_inputs,
    oracle=_oracle,
    checked=lambda size: size,
    tiny=lambda size: replace(size, batch=1, extent=size.extent and 64, count=25),
    tolerance=lambda _size: 1e-6,
    work=_work,
    implementations=(
        Implementation(OURS, _plain(_ours)),
        Implementation("reference", _plain(_reference), bytes_needed=_pixel_bytes(17), devices=("cpu",)),
        Implementation("one-hot + cumsum", _plain(_cumsum(_one_hot)), bytes_needed=_pixel_bytes(12)),
        Implementation("lean cumsum", _plain(_cumsum(_lean_one_hot)), bytes_needed=_pixel_bytes(12)),
        Implementation("torch.compile", _compiled, bytes_needed=_pixel_bytes(12), compiles=True),
        Implementation("released", _plain(_released), devices=("cpu",)),
        Implementation("one read of the labels", _read, yardstick=True, weighed=False),
    ),
)
