"""The functions of the library: losses, ratios and the gate.

Each checks its arguments and calls one operator, or the equations of the paper for `backend="reference"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from contrastseg_fast import _checks, equations, unchecked
from contrastseg_fast.affinity import (
    AFFINITIES,
    CLASS_DISTANCES,
    VARIANTS,
    Affinity,
    check_words,
    make_affinity,
    select_compared,
)
from contrastseg_fast.call_plan import BORDERS, REDUCTIONS
from contrastseg_fast.ops import _dispatch
from contrastseg_fast.ops import entropy_gate as _entropy_gate_op
from contrastseg_fast.ops import foreground_ratio as _foreground_ratio_op
from contrastseg_fast.ops import nt_xent as _nt_xent_op
from contrastseg_fast.ops import pdcr as _pdcr_op
from contrastseg_fast.sampling import sample_grid
from contrastseg_fast.schedule import WARMUPS, warmup_weight

__all__ = [
    "AFFINITIES",
    "BORDERS",
    "CLASS_DISTANCES",
    "REDUCTIONS",
    "VARIANTS",
    "WARMUPS",
    "entropy_gate",
    "foreground_ratio",
    "nt_xent_loss",
    "pdcr_loss",
    "repelled_fraction",
    "sample_grid",
    "warmup_weight",
]


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
        vectors: hidden vectors `(B, N, C)`, fp32, bf16, fp16 or fp64. Their products are summed in fp32 or
            better; on a GPU, those of fp32 vectors are of TF32 where
            `torch.backends.cuda.matmul.fp32_precision` allows it.
        ratios: foreground ratios phi `(B, N, M)` of their patches, fp32 or fp64, from 0 to 1; no gradient.
        temperature: tau.
        affinity: `"ratio"` (w above), `"constant"` (w = d = 0.5), `"diagonal"` (w = 1 for self pairs, else 0)
            or `"bipartite"` (w = 1 where the largest ratio is of the same class, else 0; d = 1 - w).
        class_distance: `"mean"` (d above), `"sum"` (without the 1/M) or `"tv"` (half the sum).
        include_background: False leaves class 0 out of d, with 1/(M-1) in its mean.
        valid: which vectors make pairs `(B, N)` bool; None means all. Image b has N = n_b of them.
        variant: `"paper"`, or `"released"`, the authors' 2D code (w and d swapped, s - 1 for s).
        reduction: `"mean"` (L / n_b^2, averaged over the images that have valid vectors), `"none"` (L /
            n_b^2, 0 without valid vectors) or `"sum"` (L, summed over images).
        backend: `"auto"`, `"reference"`, `"cpu"` or `"triton"`. An explicit backend runs or raises; only
            `"auto"` chooses.

    Returns:
        the loss, a scalar, or `(B,)` for `reduction="none"`; fp32, or fp64 for fp64 vectors. It can be
        differentiated once, by `backward` or `torch.autograd.grad`.

    Raises:
        TypeError: `vectors`, `ratios` or `valid` is not a tensor or has another dtype, or `temperature` is
            not a number.
        ValueError: shapes or devices do not match; there is no channel, or only one class; `temperature` is
            not positive and finite; a word is unknown; or the backend does not serve these tensors. On the
            CPU also: a ratio is outside [0, 1], or ratios sum above 1 (multi-hot labels) without
            `class_distance="mean"`.
        RuntimeError: the backend is not installed. Also a second derivative, one in forward mode, or one
            within `torch.func.grad`, `vjp` or `jacrev`; only `backend="reference"` has these.

    Warns:
        UserWarning: `class_distance` or `include_background` is given with an affinity that does not compare
            ratios.

    Example:
        >>> vectors = torch.tensor([[[1., 0.], [0., 1.]]])
        >>> ratios = torch.tensor([[[1., 0.], [0., 1.]]])
        >>> pdcr_loss(vectors, ratios)
        tensor(-0.3069)
    """
    _checks.one_of("reduction", reduction, REDUCTIONS)
    pair, compared = _check_pairs(
        "pdcr_loss",
        vectors,
        ratios,
        temperature,
        affinity,
        class_distance,
        include_background,
        valid,
        variant,
        backend,
    )
    return unchecked.pdcr_loss(vectors, compared, valid, pair, reduction, backend)


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
    """The share of pairs that the loss drives apart. Where it is near 0, all vectors end up alike.

    A pair i != j repels where dL/ds_ij = 1/tau [ n d_ij e_ij (1/Z_i + 1/Z_j) - 2 w_ij ] > 0, with
    e_ij = exp(s_ij d_ij / tau) and Z_i = sum_k e_ik. Computed in chunks of rows: N x N is never stored.

    Args:
        vectors, ratios, temperature, affinity, class_distance, include_background, valid, variant, backend:
            as for `pdcr_loss`.

    Returns:
        the fraction `(B,)` of each image's pairs of valid vectors, fp32; 0 without pairs. No gradient.

    Raises:
        TypeError, ValueError, RuntimeError: under the conditions of `pdcr_loss`.

    Example:
        >>> vectors = torch.eye(3)[None]
        >>> ratios = torch.tensor([[[1., 0.], [0.9, 0.1], [0., 1.]]])
        >>> repelled_fraction(vectors, ratios)
        tensor([0.6667])
    """
    pair, compared = _check_pairs(
        "repelled_fraction",
        vectors,
        ratios,
        temperature,
        affinity,
        class_distance,
        include_background,
        valid,
        variant,
        backend,
    )
    return unchecked.repelled_fraction(vectors, compared, valid, pair, backend)


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
    """The share of every class in patches of the label map (Eq. 4).

        phi^m = (pixels of class m inside the patch) / (area of the patch)

    Ignored pixels leave numerator and denominator; a denominator of 0 gives ratios 0.

    Args:
        labels: class indices `(B, *spatial)` or `(B, 1, *spatial)`, 2D or 3D, of any integer dtype, bool, or
            a floating dtype that holds integers; or soft or multi-hot labels `(B, M, *spatial)` from 0 to 1.
        starts: first pixel of every patch `(B, N, D)`, or `(N, D)` for the same patches in all images;
            integers, which may lie outside the image.
        size: extent of the patches along each of the D axes, in pixels.
        num_classes: M, at least 2.
        border: the denominator is the whole patch (`"full"`) or its part inside the image (`"clip"`); or what
            lies outside counts as class 0 (`"background"`).
        ignore_index: the label of pixels to leave out; in soft labels, all M channels hold it there.
        validate: whether to check the range of the labels; None checks on the CPU only. Unchecked class
            indices out of range count for no class.
        backend: `"auto"`, `"reference"`, `"cpu"` or `"triton"`. An explicit backend runs or raises; only
            `"auto"` chooses.

    Returns:
        ratios `(B, N, M)`, fp32; and the valid fraction `(B, N)`, fp32: the pixels of a patch that are inside
        the image and not ignored over its pixels inside the image (0 if there are none). No gradient.

    Raises:
        TypeError: `labels` or `starts` is not a tensor or has another dtype, or a number is not an integer.
        ValueError: `labels`, `starts` and `size` differ in their number of axes, batch or device; `labels`
            has neither 1 nor `num_classes` channels; `num_classes` is below 2; an extent is below 1; `border`
            is unknown; a label is out of range; or the backend does not serve these tensors.
        RuntimeError: the backend is not installed.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1], [0, 1, 1]]])
        >>> ratios, valid_fraction = foreground_ratio(labels, torch.tensor([[0, 0], [0, 1]]), (2, 2), 2)
        >>> ratios
        tensor([[[0.7500, 0.2500],
                 [0.2500, 0.7500]]])
    """
    dims = _check_patches(starts, size)
    _checks.integer("num_classes", num_classes, 2)
    _checks.one_of("border", border, BORDERS)
    _checks.optional_integer("ignore_index", ignore_index)
    soft = check_labels(labels, dims, num_classes)
    _checks.same_device("starts", starts, "labels", labels)
    if starts.ndim == 3 and starts.shape[0] != labels.shape[0]:
        _checks.fail("starts", f"a batch of {labels.shape[0]}, that of labels", starts.shape[0])
    if labels.ndim == dims + 2 and not soft:
        labels = labels[:, 0]
    if validate or (validate is None and is_checked(labels)):
        check_label_range(labels, soft, num_classes, ignore_index)
    refused = _foreground_ratio_op.refused_by_triton(labels, size) if backend == "triton" else None
    _dispatch.check(_foreground_ratio_op.OPERATION, backend, labels, refused)
    ratios, valid_fraction, _ = unchecked.foreground_ratio(
        labels, starts, size, num_classes, border, ignore_index, with_inside=False, backend=backend
    )
    return ratios, valid_fraction


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
        logits: prediction F(H) `(B, M, *spatial)` of M >= 2 classes, of any of these dtypes.
        return_uncertainty: whether to return u as well.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`. An explicit backend runs or raises;
            only `"auto"` chooses.

    Returns:
        gated features, shape and dtype of `features`; with `return_uncertainty` also u `(B, 1, *spatial)`,
        from 0 to 1, fp32 (fp64 for fp64). Both carry gradients and can be differentiated once,
        by `backward` or `torch.autograd.grad`.

    Raises:
        TypeError: `features` or `logits` is not a tensor, or has another dtype.
        ValueError: `features` has neither 2 nor 3 spatial axes; `logits` differs from it in batch, spatial
            shape or device, or has fewer than 2 classes; or the backend does not serve these tensors.
        RuntimeError: the backend is not installed. Also a second derivative, one in forward mode, or one
            within `torch.func.grad`, `vjp` or `jacrev`; only `backend="reference"` has these.

    Example:
        >>> features = torch.ones(1, 1, 1, 2)
        >>> logits = torch.tensor([[[[0., 0.]], [[0., 100.]]]])
        >>> entropy_gate(features, logits)
        tensor([[[[1., 2.]]]])
    """
    _check_gate(features, logits)
    _dispatch.check(_entropy_gate_op.OPERATION, backend, features)
    if backend == "reference":
        gated, uncertainty = equations.entropy_gate(features, logits)
    else:
        gated, uncertainty = _entropy_gate_op.entropy_gate_forward(features, logits, backend)
    return (gated, uncertainty) if return_uncertainty else gated


def nt_xent_loss(
    a: Tensor, b: Tensor, *, temperature: float = 0.5, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    """The self-supervised contrastive loss that PDCR starts from, NT-Xent (Eqs. 1 and 2).

    Of the 2B vectors v of both views, i and p(i) come from one image:

        L = 1/2B sum_i -log( exp(s_ip(i) / tau) / sum_{k != i} exp(s_ik / tau) )     s_ij = cos(v_i, v_j)

    No 2B x 2B matrix is stored. A vector of length zero has s = 0 and gets gradient 0. In data-parallel
    training a process contrasts its own batch alone, unless the vectors are gathered before.

    Args:
        a: vectors of the first view of every image `(B, C)`, or of groups of images `(G, B, C)`, each of
            which is contrasted by itself; fp32, bf16, fp16 or fp64.
        b: those of the second view, of the same shape and dtype.
        temperature: tau.
        reduction: `"mean"` (L, averaged over groups), `"none"` (L of each group) or `"sum"` (2B L, summed
            over groups).
        backend: `"auto"`, `"reference"`, `"cpu"` or `"triton"`. An explicit backend runs or raises; only
            `"auto"` chooses.

    Returns:
        the loss, a scalar, or `(G,)` for `reduction="none"` of groups; fp32, or fp64 for fp64 vectors; 0
        without images. It can be differentiated once, by `backward` or `torch.autograd.grad`.

    Raises:
        TypeError: `a` or `b` is not a tensor or has another dtype, or `temperature` is not a number.
        ValueError: `a` and `b` differ in shape or device, or have no channel; `temperature` is not positive
            and finite; `reduction` is unknown; or the backend does not serve these tensors.
        RuntimeError: the backend is not installed. Also a second derivative, one in forward mode, or one
            within `torch.func.grad`, `vjp` or `jacrev`; only `backend="reference"` has these.

    Example:
        >>> a, b = torch.eye(2), torch.eye(2)
        >>> nt_xent_loss(a, b)
        tensor(0.2395)
    """
    _check_views(a, b)
    _checks.positive_finite("temperature", temperature)
    _checks.one_of("reduction", reduction, REDUCTIONS)
    vectors = torch.cat([a, b], -2)
    grouped = vectors if vectors.ndim == 3 else vectors[None]
    _dispatch.check(_nt_xent_op.OPERATION, backend, a, _pdcr_op.refused_by_triton(grouped, "a"))
    if backend == "reference":
        s = equations.cosine_similarity(equations.upcast(vectors))
        loss = equations.nt_xent_loss(s, temperature) / max(1, vectors.shape[-2])
    else:
        loss, *_ = _nt_xent_op.nt_xent_forward(grouped, temperature, backend)
        loss = loss if a.ndim == 3 else loss[0]
    match reduction:
        case "none":
            return loss
        case "sum":
            return loss.sum() * vectors.shape[-2]
        case _:
            return loss.sum() / max(1, loss.numel())


def is_checked(x: Tensor) -> bool:
    """Whether values are checked: on the CPU only, not while compiling, without data or in `torch.func`."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(x, FakeTensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _check_pairs(
    name: str,
    vectors: Tensor,
    ratios: Tensor,
    temperature: float,
    affinity: str,
    class_distance: str,
    include_background: bool,
    valid: Tensor | None,
    variant: str,
    backend: str,
) -> tuple[Affinity, Tensor]:
    """Check the arguments of a function of pairs; returns how they are compared, and what is compared."""
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
    check_words(
        affinity,
        temperature=temperature,
        class_distance=class_distance,
        include_background=include_background,
        variant=variant,
    )
    ratios = ratios.detach()  # constants, in forward mode too
    if is_checked(ratios) and ratios.numel():
        _check_ratio_range(ratios, class_distance)
    operation = _pdcr_op.OPERATION._replace(name=name)
    _dispatch.check(operation, backend, vectors, _pdcr_op.refused_by_triton(vectors))
    pair = make_affinity(
        affinity,
        num_classes=ratios.shape[-1],
        temperature=temperature,
        class_distance=class_distance,
        include_background=include_background,
        variant=variant,
    )
    return pair, select_compared(ratios, affinity, include_background)


def _check_ratio_range(ratios: Tensor, class_distance: str) -> None:
    least, most = (bound.item() for bound in ratios.aminmax())
    if not (least >= 0 and most <= 1 + _checks.RATIO_TOLERANCE):
        _checks.fail("ratios", "values from 0 to 1", f"values from {least:g} to {most:g}")
    _checks.check_ratio_sum(ratios, class_distance)


def _check_patches(starts: Tensor, size: Sequence[int]) -> int:
    """Check the patches' first pixels and extent; returns the number of axes."""
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


def check_labels(labels: Tensor, dims: int, num_classes: int) -> bool:
    """Check the label map's shape and dtype; returns whether it holds soft labels."""
    layout = f"(B, *spatial), (B, 1, *spatial) or (B, {num_classes}, *spatial) with {dims} spatial axes"
    _checks.tensor("labels", labels, (dims + 1, dims + 2), layout)
    if labels.dtype.is_complex:
        _checks.fail_type("labels", "an integer or floating dtype", labels.dtype)
    soft = labels.ndim == dims + 2 and labels.shape[1] != 1
    if soft and labels.shape[1] != num_classes:
        _checks.fail("labels", f"1 or num_classes={num_classes} channels", labels.shape[1])
    return soft


def check_label_range(labels: Tensor, soft: bool, num_classes: int, ignore_index: int | None) -> None:
    """Check the values of class indices `(B, *spatial)`, or of soft labels `(B, M, *spatial)`.

    Raises:
        ValueError: a label is outside [0, num_classes), or not an integer; a soft label is outside [0, 1].
            Labels equal to `ignore_index` pass.
    """
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
