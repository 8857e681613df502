"""The functions of the library: losses, ratios and the gate, and the warm-up of a weight.

Each checks its arguments and calls one operator, or the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from contrastseg_fast import _backend, _checks
from contrastseg_fast.ops import entropy_gate as _entropy_gate_op
from contrastseg_fast.ops import foreground_ratio as _foreground_ratio_op
from contrastseg_fast.ops import nt_xent as _nt_xent_op
from contrastseg_fast.ops import pdcr as _pdcr_op
from contrastseg_fast.sampling import sample_grid

__all__ = [
    "entropy_gate",
    "foreground_ratio",
    "nt_xent_loss",
    "pdcr_loss",
    "repelled_fraction",
    "sample_grid",
    "warmup_weight",
]

AFFINITIES = ("ratio", "constant", "diagonal", "bipartite")
CLASS_DISTANCES = ("mean", "sum", "tv")
VARIANTS = ("paper", "released")
REDUCTIONS = ("none", "mean", "sum")
BORDERS = ("full", "clip", "background")
WARMUPS = ("linear", "cosine", "sigmoid")

_PAIRS_AT_ONCE = 1 << 22  # of all images, in repelled_fraction
_RATIO_TOLERANCE = 1e-4


def pdcr_loss(
    vectors: Tensor,
    ratios: Tensor,
    *,
    temperature: float = 0.5,
    affinity: str = "ratio",
    class_distance: str = "mean",
    include_background: bool = True,
    valid: Tensor | None = None,
    variant: str = "paper",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Patch-dragsaw contrastive regularization of the hidden vectors of each image (Eqs. 3, 6 and 7).

        s_ij = v_i . v_j / (|v_i| |v_j|)       d_ij = 1/M sum_m |phi_i^m - phi_j^m|       w_ij = 1 - d_ij
        L    = sum_i sum_j -log( exp(s_ij w_ij / tau) / sum_k exp(s_ik d_ik / tau) )

    All pairs count, self pairs included. A vector of length zero has s = 0 and gets gradient 0.

    Args:
        vectors: hidden vectors `(B, N, C)`, fp32, bf16, fp16 or fp64.
        ratios: foreground ratios phi `(B, N, M)` of their patches, fp32 or fp64, from 0 to 1; no gradient.
        temperature: tau.
        affinity: `"ratio"` (w above), `"constant"` (w = d = 0.5), `"diagonal"` (w = 1 for self pairs, else 0)
            or `"bipartite"` (w = 1 where the largest ratio is of the same class, else 0; d = 1 - w).
        class_distance: `"mean"` (d above), `"sum"` (without the 1/M) or `"tv"` (half the sum).
        include_background: False leaves class 0 out of d, with 1/(M-1) in its mean.
        valid: which vectors take part `(B, N)` bool; None means all. Image b has N = n_b of them.
        variant: `"paper"`, or `"released"`, the authors' 2D code (w and d swapped, s - 1 for s).
        reduction: `"mean"` (L / n_b^2, averaged over the images that have valid vectors), `"none"` (L /
            n_b^2, 0 without valid vectors) or `"sum"` (L, summed over images).
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`; only `"auto"` chooses by itself.

    Returns:
        the loss, a scalar, or `(B,)` for `reduction="none"`; fp32, or fp64 for fp64 vectors. It can be
        differentiated once.

    Raises:
        TypeError, ValueError: an argument does not fit; on the CPU also ratios outside [0, 1], and ratios
            that sum above 1 (multi-hot labels) unless `class_distance="mean"`.
        RuntimeError: the backend is not installed.

    Example:
        >>> vectors = torch.tensor([[[1., 0.], [0., 1.]]], requires_grad=True)
        >>> ratios = torch.tensor([[[1., 0.], [0., 1.]]])
        >>> pdcr_loss(vectors, ratios)
        tensor(-0.3069, grad_fn=<DivBackward0>)
    """
    _check_pairs(vectors, ratios, temperature, affinity, class_distance, include_background, valid, variant)
    _checks.one_of("reduction", reduction, REDUCTIONS)
    _check_pair_backend("pdcr_loss", backend, "vectors", vectors)
    ratios = ratios.detach()
    match backend:
        case "reference":
            from contrastseg_fast import reference

            return reference.pdcr_loss(
                vectors,
                ratios,
                temperature=temperature,
                affinity=affinity,
                class_distance=class_distance,
                include_background=include_background,
                valid=valid,
                variant=variant,
                reduction=reduction,
            )
        case _:
            form = _pair_form(ratios, affinity, class_distance, include_background, variant)
            image_loss, _ = _pdcr_op.pdcr_forward(vectors, form.labels, valid, temperature, *form[1:])
    num_vectors = torch.full_like(image_loss, vectors.shape[1]) if valid is None else valid.sum(1)
    match reduction:
        case "none":
            return image_loss
        case "sum":
            return (image_loss * num_vectors**2).sum()
        case _:
            return image_loss.sum() / (num_vectors > 0).sum().clamp(min=1)


def repelled_fraction(
    vectors: Tensor,
    ratios: Tensor,
    *,
    temperature: float = 0.5,
    affinity: str = "ratio",
    class_distance: str = "mean",
    include_background: bool = True,
    valid: Tensor | None = None,
    variant: str = "paper",
    backend: str = "auto",
) -> Tensor:
    """The share of pairs that the loss drives apart; where it is near 0, all vectors end up alike.

    A pair i != j repels where dL/ds_ij = 1/tau [ n d_ij e_ij (1/Z_i + 1/Z_j) - 2 w_ij ] > 0, with
    e_ij = exp(s_ij d_ij / tau) and Z_i = sum_k e_ik. Computed in row chunks: N x N is never stored.

    Args:
        vectors, ratios, temperature, affinity, class_distance, include_background, valid, variant, backend:
            as for `pdcr_loss`.

    Returns:
        the fraction `(B,)` of each image's pairs of valid vectors, fp32; 0 without pairs. No gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as `pdcr_loss`.

    Example:
        >>> vectors = torch.eye(3)[None]
        >>> ratios = torch.tensor([[[1., 0.], [0.9, 0.1], [0., 1.]]])
        >>> repelled_fraction(vectors, ratios)
        tensor([0.6667])
    """
    _check_pairs(vectors, ratios, temperature, affinity, class_distance, include_background, valid, variant)
    _check_pair_backend("repelled_fraction", backend, "vectors", vectors)
    match backend:
        case "reference":
            from contrastseg_fast import reference

            return reference.repelled_fraction(
                vectors,
                ratios,
                temperature=temperature,
                affinity=affinity,
                class_distance=class_distance,
                include_background=include_background,
                valid=valid,
                variant=variant,
            )
        case _:
            form = _pair_form(ratios, affinity, class_distance, include_background, variant)
            return _count_repelled(vectors, form, valid, temperature)


def foreground_ratio(
    labels: Tensor,
    starts: Tensor,
    size: Sequence[int],
    num_classes: int,
    *,
    border: str = "full",
    ignore_index: int | None = None,
    validate: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The share of every class in boxes of the label map (Eq. 4).

        phi^m = (pixels of class m inside the box) / (area of the box)

    Ignored pixels leave numerator and denominator; a denominator of 0 gives ratios 0.

    Args:
        labels: class indices `(B, *spatial)` or `(B, 1, *spatial)`, 2D or 3D, of any integer dtype, bool, or
            a floating dtype that holds integers; or soft or multi-hot labels `(B, M, *spatial)` from 0 to 1.
        starts: first pixel of every box `(B, N, D)`, or `(N, D)` for the same boxes in all images; integers,
            which may lie outside the image.
        size: the boxes' extent along each of the D axes, in pixels.
        num_classes: M, at least 2.
        border: the denominator is the whole box (`"full"`) or its part inside the image (`"clip"`); or what
            lies outside counts as class 0 (`"background"`).
        ignore_index: the label of pixels to leave out; in soft labels, all M channels hold it there.
        validate: whether to check the range of the labels; None checks on the CPU only. Unchecked class
            indices out of range count for no class.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`; only `"auto"` chooses by itself.

    Returns:
        ratios `(B, N, M)`, fp32; and the valid fraction `(B, N)`, fp32: a box's pixels that are inside the
        image and not ignored over its pixels inside the image (0 if there are none). No gradient.

    Raises:
        TypeError, ValueError: an argument does not fit, a box has no area, or a label is out of range.
        RuntimeError: the backend is not installed.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1], [0, 1, 1]]])
        >>> ratios, valid_fraction = foreground_ratio(labels, torch.tensor([[0, 0], [0, 1]]), (2, 2), 2)
        >>> ratios
        tensor([[[0.7500, 0.2500],
                 [0.2500, 0.7500]]])
    """
    dims = _check_boxes(starts, size)
    _checks.integer("num_classes", num_classes, 2)
    _checks.one_of("border", border, BORDERS)
    _checks.optional_integer("ignore_index", ignore_index)
    soft = _check_labels(labels, dims, num_classes)
    _checks.same_device("starts", starts, "labels", labels)
    if starts.ndim == 3 and starts.shape[0] != labels.shape[0]:
        _checks.fail("starts", f"a batch of {labels.shape[0]}, that of labels", starts.shape[0])
    if labels.ndim == dims + 2 and not soft:
        labels = labels[:, 0]
    if validate is None:
        validate = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if validate:
        _check_label_range(labels, soft, num_classes, ignore_index)
    _backend.check("foreground_ratio", backend, labels.device)
    match backend:
        case "reference":
            from contrastseg_fast import reference

            return reference.foreground_ratio(
                labels, starts, size, num_classes, border=border, ignore_index=ignore_index
            )
        case _:
            return _foreground_ratio_op.foreground_ratio(
                labels, starts, list(size), num_classes, border, ignore_index
            )


@overload
def entropy_gate(
    features: Tensor, logits: Tensor, *, return_uncertainty: Literal[False] = False, backend: str = "auto"
) -> Tensor: ...
@overload
def entropy_gate(
    features: Tensor, logits: Tensor, *, return_uncertainty: Literal[True], backend: str = "auto"
) -> tuple[Tensor, Tensor]: ...
def entropy_gate(
    features: Tensor, logits: Tensor, *, return_uncertainty: bool = False, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """Features weighted by how certain an auxiliary prediction is (Eqs. 8 to 10).

        A = softmax(logits)        u = -sum_m a_m log2 a_m / log2 M        gated = features * (1 + (1 - u))

    Args:
        features: feature map H `(B, C, *spatial)`, fp32, bf16, fp16 or fp64.
        logits: prediction F(H) `(B, M, *spatial)` of M >= 2 classes, of such a dtype too.
        return_uncertainty: whether to return u as well.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`; only `"auto"` chooses by itself.

    Returns:
        gated features, shape and dtype of `features`; with `return_uncertainty` also u `(B, 1, *spatial)`,
        from 0 to 1, fp32 (fp64 for fp64). Both carry gradients and can be differentiated once.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: the backend is not installed.

    Example:
        >>> features = torch.ones(1, 1, 1, 2)
        >>> logits = torch.tensor([[[[0., 0.]], [[0., 100.]]]])
        >>> entropy_gate(features, logits)
        tensor([[[[1., 2.]]]])
    """
    _check_gate(features, logits)
    _backend.check("entropy_gate", backend, features.device, ("cpu", "triton", "cuda"))
    match backend:
        case "reference":
            from contrastseg_fast import reference

            gated, uncertainty = reference.entropy_gate(features, logits, return_uncertainty=True)
        case _:
            gated, uncertainty = _entropy_gate_op.FORWARD[backend](features, logits)
    return (gated, uncertainty) if return_uncertainty else gated


def nt_xent_loss(
    a: Tensor, b: Tensor, *, temperature: float = 0.5, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    """The self-supervised contrastive loss that PDCR starts from, NT-Xent (Eqs. 1 and 2).

    Of the 2B vectors v of both views, i and p(i) come from one image:

        L = 1/2B sum_i -log( exp(s_ip(i) / tau) / sum_{k != i} exp(s_ik / tau) )     s_ij = cos(v_i, v_j)

    No 2B x 2B matrix is stored. A vector of length zero has s = 0 and gets gradient 0. A process of
    data-parallel training contrasts its own batch alone, unless the vectors are gathered before.

    Args:
        a: vectors of the first view of every image `(B, C)`, or of groups of images that are contrasted
            among themselves alone `(G, B, C)`; fp32, bf16, fp16 or fp64.
        b: those of the second view, of the same shape and dtype.
        temperature: tau.
        reduction: `"mean"` (L, averaged over groups), `"none"` (L of each group) or `"sum"` (2B L, summed
            over groups).
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`; only `"auto"` chooses by itself.

    Returns:
        the loss, a scalar, or `(G,)` for `reduction="none"` of groups; fp32, or fp64 for fp64 vectors; 0
        without images. It can be differentiated once.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: the backend is not installed.

    Example:
        >>> a, b = torch.eye(2), torch.eye(2)
        >>> nt_xent_loss(a, b)
        tensor(0.2395)
    """
    _check_views(a, b)
    _checks.positive_finite("temperature", temperature)
    _checks.one_of("reduction", reduction, REDUCTIONS)
    _check_pair_backend("nt_xent_loss", backend, "a", a)
    match backend:
        case "reference":
            from contrastseg_fast import reference

            return reference.nt_xent_loss(a, b, temperature=temperature, reduction=reduction)
        case _:
            vectors = torch.cat([a, b], -2)
            grouped = vectors if vectors.ndim == 3 else vectors[None]
            loss, _ = _nt_xent_op.nt_xent_forward(grouped, temperature)
    match reduction:
        case "none":
            return loss if a.ndim == 3 else loss[0]
        case "sum":
            return loss.sum() * vectors.shape[-2]
        case _:
            return loss.sum() / max(1, loss.shape[0])


def warmup_weight(step: float, weight: float, warmup_steps: float, kind: str = "linear") -> float:
    """The weight of a regularizer that is faded in, so that a network first learns to segment.

        linear: t        cosine: (1 - cos(pi t)) / 2        sigmoid: exp(-5 (1 - t)^2)

    times `weight`, with t = step / warmup_steps and at most 1. In a training loop, with `attach_pdcr`:

        loss = criterion(model(x), y) + warmup_weight(step, 0.01, warmup_steps=1000) * pdcr(y)

    Args:
        step: where training is, in steps or epochs, from 0; fractions are fine.
        weight: the weight after the warm-up.
        warmup_steps: length of the warm-up, in the unit of `step`; 0 means none.
        kind: `"linear"`, `"cosine"`, or `"sigmoid"`, the ramp-up of semi-supervised learning, which begins
            at 0.0067 of the weight.

    Returns:
        the weight at that step.

    Raises:
        TypeError, ValueError: an argument is not a number, is negative or not finite, or the kind is unknown.

    Example:
        >>> [round(warmup_weight(epoch, 0.01, 10), 4) for epoch in (0, 5, 10, 100)]
        [0.0, 0.005, 0.01, 0.01]
    """
    _checks.not_negative("step", step)
    _checks.not_negative("weight", weight)
    _checks.not_negative("warmup_steps", warmup_steps)
    _checks.one_of("kind", kind, WARMUPS)
    t = min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0
    match kind:
        case "linear":
            return weight * t
        case "cosine":
            return weight * (1 - math.cos(math.pi * t)) / 2
        case _:
            return weight * math.exp(-5 * (1 - t) ** 2)


class _PairForm(NamedTuple):
    """What the pdcr operator computes: distances between labels, and weights affine in them."""

    labels: Tensor  # (B, N, M), or (B, N, 1) with categorical
    distance_scale: float = 1.0
    categorical: bool = False
    num_bias: float = 1.0
    num_slope: float = -1.0
    den_bias: float = 0.0
    den_slope: float = 1.0
    shift: float = 0.0


def _pair_form(
    ratios: Tensor, affinity: str, class_distance: str, include_background: bool, variant: str
) -> _PairForm:
    match affinity:
        case "bipartite":
            form = _PairForm(ratios.argmax(-1, keepdim=True).to(ratios.dtype), categorical=True)
        case "diagonal":
            own_label = torch.arange(ratios.shape[1], dtype=ratios.dtype, device=ratios.device)
            form = _PairForm(own_label.expand(ratios.shape[:2])[..., None], categorical=True)
        case _:
            kept = ratios if include_background else ratios[..., 1:]
            scale = {"mean": 1 / kept.shape[-1], "sum": 1.0, "tv": 0.5}[class_distance]
            form = _PairForm(kept, distance_scale=scale)
    if affinity == "constant":
        form = form._replace(num_bias=0.5, num_slope=0.0, den_bias=0.5, den_slope=0.0)
    if variant == "released":
        form = form._replace(
            num_bias=form.den_bias,
            num_slope=form.den_slope,
            den_bias=form.num_bias,
            den_slope=form.num_slope,
            shift=1.0,
        )
    return form


@torch.no_grad()
def _count_repelled(vectors: Tensor, form: _PairForm, valid: Tensor | None, temperature: float) -> Tensor:
    labels, scale, categorical, num_bias, num_slope, den_bias, den_slope, shift = form
    _, log_z = _pdcr_op.pdcr_forward(vectors, labels, valid, temperature, *form[1:])
    batch, count, _ = vectors.shape
    if valid is None:
        valid = torch.ones(batch, count, dtype=torch.bool, device=vectors.device)
    num_vectors = valid.sum(1)
    repelled = torch.zeros_like(num_vectors)
    with torch.autocast(vectors.device.type, enabled=False):
        unit = vectors.to(log_z.dtype)
        largest = unit.abs().amax(-1, keepdim=True)
        unit = torch.nn.functional.normalize(unit / largest.masked_fill(largest == 0, 1), dim=-1)
        labels = labels.to(log_z.dtype)
        step = max(1, _PAIRS_AT_ONCE // max(1, batch * count))
        for first in range(0, count, step):
            rows = slice(first, first + step)
            if categorical:
                distance = (labels[:, rows] != labels.mT).to(log_z.dtype)
            else:
                distance = torch.cdist(labels[:, rows], labels, p=1.0) * scale
            den_weight = den_bias + den_slope * distance
            exponent = (unit[:, rows] @ unit.mT - shift) * den_weight / temperature
            share = (exponent - log_z[:, rows, None]).exp() + (exponent - log_z[:, None, :]).exp()
            repels = num_vectors[:, None, None] * den_weight * share > 2 * (num_bias + num_slope * distance)
            pair_counts = (valid[:, rows, None] & valid[:, None, :]).tril(first - 1)  # each pair once
            repelled += (repels & pair_counts).sum((1, 2))
    return repelled / (num_vectors * (num_vectors - 1) // 2).clamp(min=1)


def _check_pair_backend(op: str, backend: str, name: str, vectors: Tensor) -> None:
    _backend.check(op, backend, vectors.device)
    if backend == "triton" and vectors.dtype == torch.float64:
        _checks.fail(name, "fp32, bf16 or fp16 for backend='triton'", vectors.dtype)


def _check_pairs(
    vectors: Tensor,
    ratios: Tensor,
    temperature: float,
    affinity: str,
    class_distance: str,
    include_background: bool,
    valid: Tensor | None,
    variant: str,
) -> None:
    _checks.tensor("vectors", vectors, (3,), "(B, N, C)")
    _checks.dtype("vectors", vectors, _checks.FLOAT_DTYPES)
    if vectors.shape[-1] == 0:
        _checks.fail("vectors", "at least one channel", f"shape {tuple(vectors.shape)}")
    _checks.tensor("ratios", ratios, (3,), "(B, N, M)")
    _checks.dtype("ratios", ratios, (torch.float32, torch.float64))
    _checks.shape("ratios", ratios, (*vectors.shape[:2], ratios.shape[-1]), "B and N of vectors")
    _checks.same_device("ratios", ratios, "vectors", vectors)
    if ratios.shape[-1] < 2:
        _checks.fail("ratios", "at least 2 classes", f"shape {tuple(ratios.shape)}")
    if valid is not None:
        _checks.tensor("valid", valid, (2,), "(B, N)")
        _checks.dtype("valid", valid, (torch.bool,))
        _checks.shape("valid", valid, vectors.shape[:2], "B and N of vectors")
        _checks.same_device("valid", valid, "vectors", vectors)
    _checks.positive_finite("temperature", temperature)
    _checks.one_of("affinity", affinity, AFFINITIES)
    _checks.one_of("class_distance", class_distance, CLASS_DISTANCES)
    _checks.one_of("variant", variant, VARIANTS)
    if ratios.device.type == "cpu" and ratios.numel() and not torch.compiler.is_compiling():
        _check_ratio_range(ratios, class_distance)


def _check_ratio_range(ratios: Tensor, class_distance: str) -> None:
    least, most = (bound.item() for bound in ratios.aminmax())
    if not (least >= 0 and most <= 1 + _RATIO_TOLERANCE):
        _checks.fail("ratios", "values from 0 to 1", f"values from {least:g} to {most:g}")
    if class_distance != "mean" and (total := ratios.sum(-1).max().item()) > 1 + _RATIO_TOLERANCE:
        _checks.fail(
            "ratios",
            f"a sum of at most 1 for class_distance={class_distance!r} (multi-hot labels need 'mean')",
            f"a sum of {total:g}",
        )


def _check_boxes(starts: Tensor, size: Sequence[int]) -> int:
    """Check the boxes' corners and extent; returns the number of axes."""
    if not isinstance(size, Sequence) or len(size) not in (2, 3):
        _checks.fail("size", "2 or 3 integers, one for each axis", repr(size))
    for extent in size:
        _checks.integer("size", extent, 1)
    _checks.tensor("starts", starts, (2, 3), "(N, D) or (B, N, D)")
    if starts.dtype.is_floating_point or starts.dtype.is_complex or starts.dtype == torch.bool:
        _checks.fail_type("starts", "an integer dtype", starts.dtype)
    if starts.shape[-1] != len(size):
        _checks.fail("starts", f"{len(size)} coordinates, as many as size has", starts.shape[-1])
    return len(size)


def _check_labels(labels: Tensor, dims: int, num_classes: int) -> bool:
    """Check the label map's shape and dtype; returns whether it holds soft labels."""
    layout = f"(B, *spatial), (B, 1, *spatial) or (B, {num_classes}, *spatial) with {dims} spatial axes"
    _checks.tensor("labels", labels, (dims + 1, dims + 2), layout)
    if labels.dtype.is_complex:
        _checks.fail_type("labels", "an integer or floating dtype", labels.dtype)
    soft = labels.ndim == dims + 2 and labels.shape[1] != 1
    if soft and labels.shape[1] != num_classes:
        _checks.fail("labels", f"1 or num_classes={num_classes} channels", labels.shape[1])
    return soft


def _check_label_range(labels: Tensor, soft: bool, num_classes: int, ignore_index: int | None) -> None:
    highest = 1 if soft else num_classes - 1
    if _foreground_ratio_op.labels_in_range(labels, highest, not soft, ignore_index):
        return
    values = labels.double()
    wrong = ~((values >= 0) & (values <= highest))
    if not soft:
        wrong |= values != values.round()
    if ignore_index is not None:
        wrong &= values != ignore_index
    expected = "values from 0 to 1" if soft else f"integers from 0 to {highest}"
    besides = "" if ignore_index is None else f", or ignore_index={ignore_index}"
    hint = "; ignore_index leaves a label out" if ignore_index is None else ""
    got = f"{values[wrong][0].item():g} (num_classes={num_classes}{hint})"
    _checks.fail("labels", expected + besides, got)


def _check_gate(features: Tensor, logits: Tensor) -> None:
    _checks.tensor("features", features, (4, 5), "(B, C, *spatial) with 2 or 3 spatial axes")
    _checks.tensor("logits", logits, (features.ndim,), "(B, M, *spatial) with the spatial axes of features")
    _checks.dtype("features", features, _checks.FLOAT_DTYPES)
    _checks.dtype("logits", logits, _checks.FLOAT_DTYPES)
    expected = (features.shape[0], logits.shape[1], *features.shape[2:])
    _checks.shape("logits", logits, expected, "B and spatial shape of features")
    _checks.same_device("logits", logits, "features", features)
    if logits.shape[1] < 2:
        _checks.fail("logits", "at least 2 classes", f"shape {tuple(logits.shape)}")


def _check_views(a: Tensor, b: Tensor) -> None:
    _checks.tensor("a", a, (2, 3), "(B, C) or (G, B, C)")
    _checks.tensor("b", b, (2, 3), "(B, C) or (G, B, C)")
    _checks.dtype("a", a, _checks.FLOAT_DTYPES)
    _checks.dtype("b", b, (a.dtype,))
    _checks.shape("b", b, a.shape, "that of a")
    _checks.same_device("b", b, "a", a)
    if a.shape[-1] == 0:
        _checks.fail("a", "at least one channel", f"shape {tuple(a.shape)}")
