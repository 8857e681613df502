"""Foreground ratios (Eq. 4) on a GPU: exact counts in patches, from the labels or from running sums of them.

A pixel becomes a word of integer fields, one field for each of some classes, with a one in the field of its
class. The sum of a patch's words holds the counts of these classes, because a field has room for all pixels
of a patch. Differences of sums are exact even where the sums themselves wrap around. Soft labels are words of
their own, in fixed point: they are rounded to multiples of a small power of two (`plan.fixed_point_scale`).

Small patches are read pixel by pixel, in one launch. Where patches are large or many, words are first summed
up along the leading one, two or three axes, a launch each; along a summed axis, a patch then needs two words
instead of all. `plan.choose_summed_axes` decides by shapes alone. All sums are sums of integers, so the
result does not depend on their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contrastseg_fast.kernels._common import on
from contrastseg_fast.kernels.foreground_ratio import plan
from contrastseg_fast.kernels.foreground_ratio.patches import write_ratios
from contrastseg_fast.kernels.foreground_ratio.words import counting_arguments, fixed_point, sum_up

__all__ = ["foreground_ratio"]


def foreground_ratio(
    labels: Tensor,
    starts: Tensor,
    size: Sequence[int],
    num_classes: int,
    border: str,
    ignore_index: int | None,
    with_inside: bool,
    summed_axes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op; `summed_axes` overrides how many axes are summed up."""
    dims = len(size)
    soft = labels.ndim == dims + 2
    if labels.dtype in (torch.bool, torch.uint64):  # a uint64 beyond int64 wraps around, as in the default
        labels = labels.view(torch.uint8 if labels.dtype == torch.bool else torch.int64)
    if ignore_index is not None and not plan.can_be(ignore_index, labels.dtype):
        ignore_index = None
    images, num_patches, extents = labels.shape[0], starts.shape[-2], labels.shape[-dims:]
    ratios = labels.new_empty((images, num_patches, num_classes), dtype=torch.float32)
    valid_fraction = labels.new_empty((images, num_patches), dtype=torch.float32)
    num_inside = num_classes if with_inside else 0
    inside_ratios = labels.new_empty((images, num_patches, num_inside), dtype=torch.float32)
    results = ratios, valid_fraction, inside_ratios
    if images == 0 or num_patches == 0:
        return results

    fields = plan.choose_fields(num_classes, ignore_index is not None, plan.most_pixels(extents, size), soft)
    if summed_axes is None:
        label_bytes = 8 if soft else labels.element_size()
        summed_axes = plan.choose_summed_axes(
            images, num_patches, fields.num_words, extents, size, label_bytes
        )
    words_at_once = fields.num_words
    if summed_axes > 0 and not soft:
        words_at_once = plan.words_at_once(fields, images * math.prod(extents))
    counting = counting_arguments(labels, fields, num_classes, ignore_index)
    with on(labels):
        source = labels
        scale = plan.fixed_point_scale(extents, size) if soft else 1.0
        if soft:
            source = fixed_point(labels, extents, num_classes, ignore_index, scale)
        for first_word in range(0, fields.num_words, words_at_once):
            num_words = min(words_at_once, fields.num_words - first_word)
            if summed_axes > 0 and not soft:
                source = labels.new_empty((images, num_words, *extents), dtype=fields.dtype)
            for axis in range(summed_axes):
                sum_up(labels if axis == 0 and not soft else None, source, axis, first_word, counting)
            write_ratios(
                source,
                starts,
                size,
                border,
                results,
                fields=fields,
                first_word=first_word,
                num_words=num_words,
                unit=1 / scale,
                soft=soft,
                summed_axes=summed_axes,
                counting=counting,
            )
    return results
