"""A whole call of `PDCRLoss`: from maps or sampled vectors of all layers, and labels, to the loss.

    loss = mean over sets and sizes of PDCR( vectors of the set, ratios of their patches of the size )

`features` are the layers' maps `(B, C, *spatial)`, or vectors `(B, N, C)` that were taken out of them before,
`positions` the raster positions `(N,)` of layers that follow no plan (empty for others), and `labels` what
`foreground_ratio` takes. Everything else about the call is its plan (call_plan.py). The loss is a scalar, or
with the reduction "none" one element for every image of every set and size. Gradients are like `features`.

`saved` holds, from the kernel below, the vectors taken from maps, then what is compared, which vectors are
valid, log Z, rows and floats, each of all problems. The Triton kernels save three flat tensors: log Z, rows
and floats of all problems. `shapes` are the fields of every layer's `LayerShape`, in a row.

The kernel below joins the operators of the parts. On a GPU, the Triton kernels (kernels/pdcr_call.py) take
all layers together, where all are of one dtype.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastseg_fast._checks import check_ratio_sum
from contrastseg_fast.affinity import Affinity
from contrastseg_fast.call_plan import CallPlan, LayerShape, PatchContents
from contrastseg_fast.ops import foreground_ratio, gather, pdcr
from contrastseg_fast.ops._library import (
    accumulation_dtype,
    define,
    forbid_second_derivative,
    loop_over_batch,
    register_autograd,
)

OPERATION = pdcr.OPERATION
CountPatches = Callable[..., tuple[Tensor, Tensor, Tensor]]  # as the operator foreground_ratio


class ProblemTensors(NamedTuple):
    """Vectors that make pairs with each other.

    Attributes:
        vectors: `(B, N, C)`.
        compared: ratios `(B, N, M)` or categories `(B, N, 1)`.
        valid: which vectors make pairs `(B, N)`, bool.
    """

    vectors: Tensor
    compared: Tensor
    valid: Tensor


def make_problems(
    vectors: Sequence[Tensor],
    positions: Sequence[Tensor],
    labels: Tensor,
    plan: CallPlan,
    min_valid_fraction: float,
    backend: str,
    count: CountPatches = foreground_ratio.foreground_ratio,
) -> list[ProblemTensors]:
    """The problems of a call, a set's one after another, from the vectors `(B, N, C)` of every layer."""
    contents: list[list[PatchContents]] = []
    with_inside = plan.needs_inside
    for of_size in plan.patches:
        contents.append([])
        for layer, patches in enumerate(of_size):
            where = labels if plan.layers[layer].samples is not None else positions[layer]
            ratios, fraction, inside = count(
                labels,
                plan.starts(layer, patches, where),
                list(patches.size),
                plan.num_classes,
                plan.border,
                plan.ignore_index,
                with_inside,
                backend,
            )
            if ratios.numel() > 0:
                check_ratio_sum(ratios, plan.checked_distance)
            valid = fraction >= min_valid_fraction
            contents[-1].append(PatchContents(ratios, valid, inside if with_inside else ratios))
    compared = plan.compare(contents)
    problems = []
    for number, layers in enumerate(plan.sets):
        alone = len(layers) == 1 and not plan.merged
        merged = vectors[layers[0]] if alone else plan.merge([vectors[layer] for layer in layers])
        of_set = compared[number * len(plan.patches) :][: len(plan.patches)]
        problems += [ProblemTensors(merged, *of_size) for of_size in of_set]
    return problems


def _forward(
    features: Sequence[Tensor],
    positions: Sequence[Tensor],
    labels: Tensor,
    numbers: Sequence[int],
    affinity: Sequence[float],
    min_valid_fraction: float,
    backend: str = "auto",
) -> tuple[Tensor, list[Tensor]]:
    plan = CallPlan.from_numbers(numbers)
    of_parts = "auto" if backend == "cpu" else backend  # plain PyTorch gathers on the CPU
    taken, vectors = [], []
    for x, where, layer in zip(features, positions, plan.layers, strict=True):
        if layer.is_map:
            where = where if layer.samples is None else layer.samples.positions(x.device)
            taken.append(gather.gather_vectors(x, where, [], of_parts))
        vectors.append(taken[-1] if layer.is_map else x)
    results = []
    for problem in make_problems(vectors, positions, labels, plan, min_valid_fraction, backend):
        loss, *saved = pdcr.pdcr_forward(*problem, affinity, plan.reduction, backend)
        results.append((loss.reshape(-1), *problem[1:], *saved))
    losses, compared, valid, *others = zip(*results, strict=True)
    loss = torch.cat(losses) if plan.reduction == "none" else torch.cat(losses).mean()
    return loss, [*taken, *_own([*compared, *valid]), *itertools.chain(*others)]


def _own(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, copied where they are not dense or share memory, as results of an operator must not."""
    seen: set[int] = set()
    own = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        shares = storage._cdata in seen or storage.nbytes() != tensor.nbytes
        if shares or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage()._cdata)
        own.append(tensor)
    return own


def _backward(
    grad: Tensor,
    features: Sequence[Tensor],
    positions: Sequence[Tensor],
    saved: Sequence[Tensor],
    shapes: Sequence[int],
    numbers: Sequence[int],
    affinity: Sequence[float],
    backend: str = "auto",
) -> list[Tensor]:
    plan = CallPlan.from_numbers(numbers)
    num_taken = [layer.is_map for layer in plan.layers].count(True)
    taken, others = iter(saved[:num_taken]), saved[num_taken:]
    given = iter(features)
    vectors = [next(taken) if layer.is_map else next(given) for layer in plan.layers]
    count = plan.num_problems
    compared, valid, log_z, rows, floats = [others[part * count :][:count] for part in range(5)]
    totals: list[Tensor | None] = [None] * len(plan.layers)
    grads = grad.view(count, -1) if plan.reduction == "none" else (grad / count).expand(count)
    for number in range(count):
        layers = plan.sets[number // len(plan.patches)]
        alone = len(layers) == 1 and not plan.merged
        merged = vectors[layers[0]] if alone else plan.merge([vectors[layer] for layer in layers])
        gradient = pdcr.pdcr_backward(
            grads[number].to(log_z[number].dtype),
            log_z[number],
            merged,
            compared[number],
            valid[number],
            rows[number],
            floats[number],
            affinity,
            plan.reduction,
            backend,
        )
        if alone:
            parts: Sequence[Tensor] = [gradient]
        else:
            counts = [vectors[layer].shape[1] for layer in layers]
            parts = plan.split(gradient, counts, vectors[layers[0]].shape[0])
        for index, part in zip(layers, parts, strict=True):
            part, before = part.to(vectors[index].dtype), totals[index]
            totals[index] = part if before is None else before + part
    results = []
    for number, (layer, total, shape) in enumerate(zip(plan.layers, totals, _unflatten(shapes), strict=True)):
        total = torch.zeros_like(vectors[number]) if total is None else total
        if not layer.is_map:
            results += _own([total])
            continue
        batch, _, channels, channels_last = shape
        results.append(
            gather.gather_vectors_backward(
                total,
                positions[number] if layer.samples is None else layer.samples.positions(total.device),
                [],
                [batch, channels, *layer.spatial_shape],
                bool(channels_last),
                "auto" if backend == "cpu" else backend,
            )
        )
    return results


def _is_from_triton(saved: Sequence[Tensor]) -> bool:
    """Whether the Triton kernels saved these: flat tensors."""
    return saved[0].ndim == 1


def _takes_triton(features: Sequence[Tensor], labels: Tensor, plan: CallPlan, backend: str) -> bool:
    """Whether the Triton kernels take the whole call together."""
    refused = None
    for of_size in plan.patches:
        for patches in of_size:
            refused = refused or foreground_ratio.refused_by_triton(labels, patches.size)
    return pdcr.takes_triton(features, backend, refused)


def pdcr_call_forward_on_cuda(
    features: Sequence[Tensor],
    positions: Sequence[Tensor],
    labels: Tensor,
    numbers: Sequence[int],
    affinity: Sequence[float],
    min_valid_fraction: float,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    plan = CallPlan.from_numbers(numbers)
    if not _takes_triton(features, labels, plan, backend):
        return _forward(features, positions, labels, numbers, affinity, min_valid_fraction, backend)
    from contrastseg_fast.kernels import pdcr_call as kernels

    shapes = layer_shapes(features, positions, plan)
    return kernels.forward(
        features, shapes, positions, labels, plan, Affinity.from_numbers(affinity), min_valid_fraction
    )


def pdcr_call_backward_on_cuda(
    grad: Tensor,
    features: Sequence[Tensor],
    positions: Sequence[Tensor],
    saved: Sequence[Tensor],
    shapes: Sequence[int],
    numbers: Sequence[int],
    affinity: Sequence[float],
    backend: str,
) -> list[Tensor]:
    plan = CallPlan.from_numbers(numbers)
    if not _is_from_triton(saved):
        return _backward(grad, features, positions, saved, shapes, numbers, affinity, backend)
    from contrastseg_fast.kernels import pdcr_call as kernels

    return kernels.backward(grad, positions, saved, _unflatten(shapes), plan, Affinity.from_numbers(affinity))


def layer_shapes(features: Sequence[Tensor], positions: Sequence[Tensor], plan: CallPlan) -> list[LayerShape]:
    """The shapes of all layers' vectors."""
    shapes = []
    for x, where, layer in zip(features, positions, plan.layers, strict=True):
        if not layer.is_map:
            shapes.append(LayerShape(x.shape[0], x.shape[1], x.shape[2], False))
            continue
        count = where.shape[0] if layer.samples is None else layer.samples.num_vectors
        shapes.append(LayerShape(x.shape[0], count, x.shape[1], gather.is_channels_last(x)))
    return shapes


def _forward_fake(
    features: Sequence[Tensor],
    positions: Sequence[Tensor],
    labels: Tensor,
    numbers: Sequence[int],
    affinity: Sequence[float],
    _min_valid_fraction: float,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    plan, first = CallPlan.from_numbers(numbers), features[0]
    shapes = layer_shapes(features, positions, plan)
    call = plan.sizes(shapes, Affinity.from_numbers(affinity), first.dtype)
    sizes = [(call.images(problem), call.count(problem)) for problem in call.problems]
    num_losses = sum(images for images, _ in sizes)
    dtype = accumulation_dtype(functools.reduce(torch.promote_types, (x.dtype for x in features)))
    loss = first.new_empty((num_losses,) if plan.reduction == "none" else (), dtype=dtype)
    if first.is_cuda and _takes_triton(features, labels, plan, backend):
        log_z = first.new_empty((sum(images * count for images, count in sizes),), dtype=torch.float32)
        rows, floats = call.saved_sizes()
        return loss, [log_z, first.new_empty((rows,)), first.new_empty((floats,), dtype=torch.float32)]
    taken = [
        x.new_empty(shape[:3])
        for x, shape, layer in zip(features, shapes, plan.layers, strict=True)
        if layer.is_map
    ]
    saved = []
    for number, size in enumerate(sizes):
        layers = plan.sets[number // len(plan.patches)]
        of_set = functools.reduce(torch.promote_types, (features[layer].dtype for layer in layers))
        vectors = first.new_empty((*size, shapes[layers[0]].channels), dtype=of_set)
        rows, floats = pdcr.saved_sizes(vectors, call.num_compared, affinity, backend)
        saved.append(
            (
                labels.new_empty((*size, call.num_compared), dtype=torch.float32),
                labels.new_empty(size, dtype=torch.bool),
                first.new_empty(size, dtype=accumulation_dtype(of_set)),
                vectors.new_empty((rows,)),
                vectors.new_empty((floats,), dtype=torch.float32),
            )
        )
    return loss, [*taken, *itertools.chain(*zip(*saved, strict=True))]


def _backward_fake(
    _grad: Tensor,
    features: Sequence[Tensor],
    _positions: Sequence[Tensor],
    saved: Sequence[Tensor],
    shapes: Sequence[int],
    numbers: Sequence[int],
    *_others: Any,
) -> list[Tensor]:
    plan = CallPlan.from_numbers(numbers)
    by_triton = _is_from_triton(saved)
    given, taken = iter(features), iter(saved)
    results = []
    for layer, shape in zip(plan.layers, _unflatten(shapes), strict=True):
        like = saved[1] if by_triton else next(taken) if layer.is_map else next(given)
        if not layer.is_map:
            results.append(like.new_empty(shape[:3]))
        elif bool(shape.channels_last):
            empty = like.new_empty((shape.batch, *layer.spatial_shape, shape.channels))
            results.append(empty.movedim(-1, 1))
        else:
            results.append(like.new_empty((shape.batch, shape.channels, *layer.spatial_shape)))
    return results


def _unflatten(shapes: Sequence[int]) -> list[LayerShape]:
    fields = [iter(shapes)] * 4
    return [LayerShape(*numbers) for numbers in zip(*fields, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    features, positions, _, ctx.numbers, ctx.affinity, _, ctx.backend = inputs
    _, saved = output
    plan = CallPlan.from_numbers(ctx.numbers)
    shapes = layer_shapes(features, positions, plan)
    ctx.shapes = [
        number for *shape, last in shapes for number in (*shape, int(last))
    ]  # no bool beside symbols
    given = (
        []
        if saved[0].ndim == 1
        else [x for x, layer in zip(features, plan.layers, strict=True) if not layer.is_map]
    )
    ctx.num_features, ctx.num_positions = len(given), len(positions)
    ctx.save_for_backward(*given, *positions, *saved)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _by_linearity(differentiate: Callable[[Tensor], list[Tensor]], grad: Tensor) -> list[Tensor]:
    """The gradients from those of every element of the loss alone."""
    size = grad.numel()
    units = torch.eye(size, dtype=grad.dtype, device=grad.device)
    elements = grad.reshape(size)
    total: list[Tensor] = []
    for number in range(size):
        parts = [part * elements[number] for part in differentiate(units[number].view(grad.shape))]
        total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
    return total


def _differentiate(ctx: Any, grad: Tensor | None, _grads: Any) -> tuple[Any, ...]:
    nothing = [None] * ctx.num_positions
    gradients: list[Tensor | None] = [None] * (len(ctx.shapes) // 4)
    if grad is not None:
        if torch.is_grad_enabled() and not grad.requires_grad:  # with create_graph
            grad = grad.detach().requires_grad_()  # so that second derivatives raise
        tensors = list(ctx.saved_tensors)
        given, tensors = tensors[: ctx.num_features], tensors[ctx.num_features :]
        positions, saved = tensors[: ctx.num_positions], tensors[ctx.num_positions :]

        def differentiate(grad: Tensor) -> list[Tensor]:
            return pdcr_call_backward(
                grad, given, positions, saved, ctx.shapes, ctx.numbers, ctx.affinity, ctx.backend
            )

        if torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched, which takes no lists
            gradients = [*_by_linearity(differentiate, grad)]
        else:
            gradients = [*differentiate(grad)]
    return gradients, nothing, None, None, None, None, None


pdcr_call_forward = define(
    "pdcr_call_forward(Tensor[] features, Tensor[] positions, Tensor labels, SymInt[] plan, "
    "float[] affinity, float min_valid_fraction, str backend) -> (Tensor loss, Tensor[] saved)",
    _forward,
    _forward_fake,
    pdcr_call_forward_on_cuda,
)
pdcr_call_backward = define(
    "pdcr_call_backward(Tensor grad, Tensor[] features, Tensor[] positions, Tensor[] saved, SymInt[] shapes, "
    "SymInt[] plan, float[] affinity, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
    pdcr_call_backward_on_cuda,
)
register_autograd(pdcr_call_forward, OPERATION.name, _differentiate, _setup_context)
forbid_second_derivative(pdcr_call_backward, OPERATION.name)
loop_over_batch(pdcr_call_forward)
loop_over_batch(pdcr_call_backward)
