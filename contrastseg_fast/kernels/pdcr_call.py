"""A whole call of `PDCRLoss` on a GPU: ratios, loss and gradient of all layers together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from contrastseg_fast.affinity import Affinity, compares_ratios
from contrastseg_fast.call_plan import CallPlan, LayerShape, PatchContents
from contrastseg_fast.kernels import pdcr
from contrastseg_fast.kernels.foreground_ratio import Ratios, foreground_ratios
from contrastseg_fast.kernels.foreground_ratio.plan import PatchSet
from contrastseg_fast.kernels.gather import scatter_gradients
from contrastseg_fast.problems import Call, Problem, Segment, Source


def _patch_sets(plan: CallPlan, positions: Sequence[Tensor]) -> list[PatchSet]:
    """The patches of every size and layer."""
    sets = []
    for of_size in plan.patches:
        for number, (layer, patches) in enumerate(zip(plan.layers, of_size, strict=True)):
            if layer.samples is None:
                sets.append(PatchSet(patches.size, starts=plan.starts(number, patches, positions[number])))
            else:
                extents, counts = layer.samples
                sets.append(PatchSet(patches.size, None, layer.spatial_shape, extents, counts, patches.grids))
    return sets


def _sources(features: Sequence[Tensor], shapes: Sequence[LayerShape], plan: CallPlan) -> Iterator[Source]:
    """How the features are read, maps with their spatial axes flattened."""
    given = 0
    for x, shape, layer in zip(features, shapes, plan.layers, strict=True):
        if not layer.is_map:
            yield Source.dense(shape[:3], x.stride())
            continue
        batch, channel, position = x.stride()
        strides = batch, position, channel
        if layer.samples is None:
            nothing = (1, 1, 1)
            yield Source(*shape[:3], strides, nothing, nothing, given)
            given += shape.num_vectors
        else:
            extents, counts = layer.samples.three()
            yield Source(*shape[:3], strides, extents, counts)  # type: ignore[arg-type]  # of three axes


def _where_counted(shapes: Sequence[LayerShape], plan: CallPlan) -> list[Problem]:
    """The problems of ratios and fractions that lie where `foreground_ratios` writes them."""
    places: list[list[Segment]] = []
    ratios = fractions = 0
    for _ in plan.patches:
        places.append([])
        for layer, shape in enumerate(shapes):
            first = ratios + (not plan.include_background)
            places[-1].append(
                Segment(layer, first, shape.num_vectors * plan.num_classes, fractions, shape.num_vectors)
            )
            fractions += shape.batch * shape.num_vectors
            ratios += shape.batch * shape.num_vectors * plan.num_classes
    return [
        Problem(tuple(of_size[layer] for layer in layers), plan.merged)
        for layers in plan.sets
        for of_size in places
    ]


def _contents(
    found: Ratios, shapes: Sequence[LayerShape], plan: CallPlan, least: float
) -> list[list[PatchContents]]:
    """The contents of the patches of every size and layer, views of the flat results."""
    contents: list[list[PatchContents]] = []
    at = 0
    for _ in plan.patches:
        contents.append([])
        for batch, count, *_ in shapes:
            stop, wide = at + batch * count, plan.num_classes
            fraction = found.valid_fraction[at:stop].view(batch, count)
            ratios = found.ratios[at * wide : stop * wide].view(batch, count, wide)
            inside = (
                found.inside[at * wide : stop * wide].view(batch, count, wide)
                if plan.needs_inside
                else ratios
            )
            contents[-1].append(PatchContents(ratios, fraction >= least, inside))
            at = stop
    return contents


def forward(
    features: Sequence[Tensor],
    shapes: Sequence[LayerShape],
    positions: Sequence[Tensor],
    labels: Tensor,
    plan: CallPlan,
    affinity: Affinity,
    min_valid_fraction: float,
) -> tuple[Tensor, list[Tensor]]:
    """As the operator, of features of one dtype that hold at least one number each."""
    found = foreground_ratios(
        labels,
        _patch_sets(plan, positions),
        plan.num_classes,
        plan.border,
        plan.ignore_index,
        plan.needs_inside,
    )
    flat = [x.flatten(2) if layer.is_map else x for x, layer in zip(features, plan.layers, strict=True)]
    given = [
        where
        for where, layer in zip(positions, plan.layers, strict=True)
        if layer.samples is None and layer.is_map
    ]
    where = None if not given else given[0] if len(given) == 1 else torch.cat(given)
    sources = tuple(flat)
    num_compared = plan.num_compared(affinity.categorical)
    if compares_ratios(plan.affinity) and not plan.skip_homogeneous:
        problems = _where_counted(shapes, plan)
        inputs = pdcr.Inputs(
            sources, found.ratios, (plan.num_classes, 1), found.valid_fraction, where, min_valid_fraction
        )
    else:
        joined = plan.compare(_contents(found, shapes, plan, min_valid_fraction))
        problems = plan.joined_problems(shapes, num_compared)
        inputs = pdcr.Inputs(
            sources,
            torch.cat([each.compared.flatten() for each in joined]),
            (num_compared, 1),
            torch.cat([each.valid.flatten() for each in joined]),
            where,
        )
    call = Call.make(_sources(flat, shapes, plan), problems, num_compared, flat[0].dtype, affinity)
    loss, log_z, packed = pdcr.forward(call, inputs, affinity, plan.reduction)
    return loss, [log_z, *packed]


def backward(
    grad: Tensor,
    positions: Sequence[Tensor],
    saved: Sequence[Tensor],
    shapes: Sequence[LayerShape],
    plan: CallPlan,
    affinity: Affinity,
) -> list[Tensor]:
    """As the operator, from what `forward` saved."""
    log_z, rows, floats = saved
    call = plan.sizes(shapes, affinity, rows.dtype)
    outs = tuple(rows.new_empty(shape[:3]) for shape in shapes)
    pdcr.backward(call, pdcr.Packed(rows, floats), log_z, affinity, grad, outs)
    maps = [number for number, layer in enumerate(plan.layers) if layer.is_map]
    if not maps:
        return list(outs)
    layers = [plan.layers[number] for number in maps]
    dense = scatter_gradients(
        [outs[number] for number in maps],
        [positions[number] if plan.layers[number].samples is None else None for number in maps],
        [layer.samples for layer in layers],
        [
            (shapes[number].batch, shapes[number].channels, *plan.layers[number].spatial_shape)
            for number in maps
        ],
        [bool(shapes[number].channels_last) for number in maps],
    )
    results = list(outs)
    for number, gradient in zip(maps, dense, strict=True):
        results[number] = gradient
    return results
