"""Patches, the boxes of pixels whose labels are counted: their sizes, the label map, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastseg_fast import _checks, functional
from contrastseg_fast.projection import Layer
from contrastseg_fast.receptive_field import ReceptiveField

PatchSize = int | Sequence[int] | Mapping[Any, int | Sequence[int]] | None

_UNUSED_LABEL = -(2**15)  # marks masked pixels; exact in every floating dtype


class LabelMap(NamedTuple):
    """A label map as `unchecked.foreground_ratio` takes it, and the label of pixels to leave out."""

    labels: Tensor  # (B, *spatial), or soft (B, M, *spatial)
    ignore_index: int | None
    soft: bool


def first_label_map(labels: Tensor | Sequence[Tensor]) -> Tensor:
    """The first label map of a list (deep supervision), or the only one."""
    return labels[0] if isinstance(labels, (list, tuple)) and labels else labels  # type: ignore[return-value]


def patches_by_size(
    fields: Mapping[Layer, ReceptiveField],
    patch_size: PatchSize,
    patch_sizes: Sequence[PatchSize] | None,
) -> list[dict[Layer, ReceptiveField]]:
    """The layers' patches for each size: their receptive fields, or patches around their centres.

    Raises:
        TypeError: a size is neither an integer, nor one per axis, nor a mapping from layer to either.
        ValueError: both arguments are given, `patch_sizes` is empty, a layer is unknown, or a size is below
            1.
    """
    if patch_sizes is None:
        return [_patches(fields, patch_size)]
    if patch_size is not None:
        _checks.fail("patch_sizes", "None beside patch_size", patch_sizes)
    if not isinstance(patch_sizes, Sequence) or isinstance(patch_sizes, str):
        got = type(patch_sizes).__name__
        _checks.fail_type("patch_sizes", "a sequence of sizes, each as patch_size takes one", got)
    if not patch_sizes:
        _checks.fail("patch_sizes", "at least one size", "none")
    return [_patches(fields, size) for size in patch_sizes]


def _patches(fields: Mapping[Layer, ReceptiveField], patch_size: PatchSize) -> dict[Layer, ReceptiveField]:
    if patch_size is None:
        return dict(fields)
    if not isinstance(patch_size, (int, Sequence, Mapping)):
        got = type(patch_size).__name__
        _checks.fail_type("patch_size", "an integer, one per axis, or a mapping from layer to either", got)
    if not isinstance(patch_size, Mapping):
        return {layer: field.centred(patch_size) for layer, field in fields.items()}
    if not set(patch_size) <= set(fields):
        _checks.fail("patch_size", f"some of the layers {list(fields)}", list(patch_size))
    return {
        layer: field.centred(patch_size[layer]) if layer in patch_size else field
        for layer, field in fields.items()
    }


def prepare_labels(
    labels: Tensor, mask: Tensor | None, dims: int, num_classes: int, ignore_index: int | None
) -> LabelMap:
    """Check a label map and turn it into `(B, *spatial)` or soft `(B, M, *spatial)`, masked pixels ignored.

    With `num_classes=1`, a floating channel `(B, 1, *spatial)` becomes the soft labels of two classes.

    Raises:
        TypeError: `labels` or `mask` is not a tensor, or `labels` are complex.
        ValueError: `labels` or `mask` has another number of axes, another shape or another device, or
            `labels` have neither 1 nor `num_classes` channels; on the CPU also, a label is out of range.
    """
    _checks.tensor("labels", labels, (dims + 1, dims + 2), f"(B, [M,] *spatial) with {dims} spatial axes")
    if mask is not None:
        spatial_shape = labels.shape[-dims:]
        _checks.tensor("mask", mask, (dims + 2,), f"(B, 1, *spatial) with {dims} spatial axes")
        _checks.shape("mask", mask, (labels.shape[0], 1, *spatial_shape), "B and spatial shape of labels")
        _checks.same_device("mask", mask, "labels", labels)
        ignore_index = _UNUSED_LABEL if ignore_index is None else ignore_index
        if not labels.dtype.is_floating_point:
            labels = labels.int()
        has_channel = labels.ndim == dims + 2
        labels = labels.masked_fill(mask == 0 if has_channel else mask[:, 0] == 0, ignore_index)
    if num_classes == 1 and labels.ndim == dims + 2 and labels.dtype.is_floating_point:
        background = 1 - labels
        if ignore_index is not None:
            background = background.masked_fill(labels == ignore_index, ignore_index)
        labels = torch.cat([background, labels], 1)
    soft = functional.check_labels(labels, dims, max(num_classes, 2))
    if labels.ndim == dims + 2 and not soft:
        labels = labels[:, 0]
    if functional.is_checked(labels):
        functional.check_label_range(labels, soft, max(num_classes, 2), ignore_index)
    return LabelMap(labels, ignore_index, soft)


def check_resolution(
    field: ReceptiveField, map_shape: Sequence[int], label_shape: Sequence[int], layer: Layer
) -> None:
    """Check that the receptive fields of a map are centred on the label map, as they are on the input.

    Raises:
        ValueError: the label map is not about as large as the network's input.
    """
    field = field.location or field
    for axis, grid in enumerate(field.grids):
        count, extent = map_shape[axis], label_shape[axis]
        span = 2 * grid.start + (count - 1) * grid.stride + field.size[axis] * grid.unit  # in 1 / unit pixel
        if count > 0 and 4 * abs(span - extent * grid.unit) > 4 * grid.stride + extent * grid.unit:
            _checks.fail(
                "labels",
                f"the resolution of the network's input, for features[{layer!r}] of shape {tuple(map_shape)} "
                f"about {span / grid.unit:.0f} pixels along spatial axis {axis}",
                f"shape {tuple(label_shape)}",
            )
