"""Foreground ratios (Eq. 4) on a GPU: exact counts in patches, from the labels or from a table of their sums.

A pixel becomes a word of integer fields, one field for each of some classes, with a one in the field of its
class. The sum of a patch's words holds the counts of these classes, because a field has room for all pixels
of a patch. Differences of sums are exact even where the sums themselves wrap around. Soft labels are words of
their own, in fixed point: they are rounded to multiples of a small power of two (`plan.fixed_point_scale`).

All sets of patches are counted in one launch. Small patches are read pixel by pixel. Where patches are large
or many, another launch first makes a table: words are summed up along the leading one, two or three axes,
within segments of a fixed length, so that no program waits for another. Along a summed axis, a patch then
needs the sum at its end, the totals of the segments before, and the sum before its begin.
`plan.choose_sums` decides by shapes alone. All sums are sums of integers, so the result does not depend on
their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from contrastseg_fast.kernels._common import on
from contrastseg_fast.kernels.foreground_ratio import plan
from contrastseg_fast.kernels.foreground_ratio.patches import Ratios, write_ratios
from contrastseg_fast.kernels.foreground_ratio.plan import PatchSet
from contrastseg_fast.kernels.foreground_ratio.words import fixed_point, sum_segments

__all__ = ["PatchSet", "Ratios", "foreground_ratio", "foreground_ratios"]


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
    patches = PatchSet(tuple(size), starts)
    results = foreground_ratios(
        labels, [patches], num_classes, border, ignore_index, with_inside, summed_axes
    )
    shape = labels.shape[0], patches.num_patches
    return (
        results.ratios.view(*shape, num_classes),
        results.valid_fraction.view(shape),
        results.inside.view(*shape, num_classes if with_inside else 0),
    )


def foreground_ratios(
    labels: Tensor,
    patch_sets: Sequence[PatchSet],
    num_classes: int,
    border: str,
    ignore_index: int | None,
    with_inside: bool,
    sums: plan.Sums | int | None = None,
) -> Ratios:
    """The ratios of several sets of patches of the same labels.

    Args:
        labels: as for the op.
        patch_sets: at least one; of the same number of axes.
        num_classes: as for the op, like the next three.
        sums: the table to use, or how many axes it sums up for all sets; None chooses.
    """
    dims = len(patch_sets[0].size)
    soft = labels.ndim == dims + 2
    if labels.dtype in (torch.bool, torch.uint64):  # a uint64 beyond int64 wraps around, as in the default
        labels = labels.view(torch.uint8 if labels.dtype == torch.bool else torch.int64)
    if ignore_index is not None and not plan.can_be(ignore_index, labels.dtype):
        ignore_index = None
    request = plan.Request(
        images=labels.shape[0],
        extents=tuple(labels.shape[-dims:]),
        num_classes=num_classes,
        has_ignore=ignore_index is not None,
        label_bytes=8 if soft else labels.element_size(),
        soft=soft,
        boxes=tuple(plan.Boxes(patches.size, patches.num_patches) for patches in patch_sets),
    )
    patches = request.images * sum(boxes.num_patches for boxes in request.boxes)
    results = Ratios(
        *(
            labels.new_empty((patches * width,), dtype=torch.float32)
            for width in (num_classes, 1, num_classes if with_inside else 0)
        )
    )
    if sums is None:
        sums = plan.choose_sums(request)
    elif isinstance(sums, int):
        sums = plan.sums_along(request, sums)
    with on(labels):
        for sets in plan.launched_together(request):
            _launch(labels, patch_sets, request, sets, sums, results, border, ignore_index)
    return results


def _launch(
    labels: Tensor,
    patch_sets: Sequence[PatchSet],
    request: plan.Request,
    sets: Sequence[int],
    sums: plan.Sums,
    results: Ratios,
    border: str,
    ignore_index: int | None,
) -> None:
    """Count in the sets of these numbers; with many words, in several rounds."""
    source = labels
    if request.soft:
        source = fixed_point(
            labels, request.extents, request.num_classes, ignore_index, request.scale(sets[0])
        )
    for counted in plan.rounds(request, sets, sums):
        table = None
        users = [each for each in counted if each.from_table]
        if users:
            fields, first_word = users[0].fields, users[0].first_word
            if not request.soft:
                table = labels.new_empty(
                    (request.images, users[0].num_words, *request.extents), dtype=fields.dtype
                )
            elif len(users) == len(counted):
                table = source
            else:
                table = torch.empty_like(source)
            words = source if request.soft else None
            sum_segments(
                None if request.soft else labels,
                words,
                table,
                sums.segments,
                first_word,
                fields,
                request.num_classes,
                ignore_index,
            )
        write_ratios(
            source,
            table,
            request,
            patch_sets,
            counted,
            sums.segments,
            results,
            border,
            ignore_index,
            unit=1 / request.scale(sets[0]),
        )
