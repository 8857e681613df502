"""The functions: options against the reference in fp64, awkward inputs, and errors that name the argument."""

from __future__ import annotations

import doctest
import re
from typing import Any

import pytest
import torch
from conftest import blob_labels, blob_ratios, normwise_error, random_ratios
from torch import Tensor

from contrastseg_fast import functional, reference, unchecked
from contrastseg_fast.functional import entropy_gate, foreground_ratio, pdcr_loss, repelled_fraction

OPTIONS = [
    {"affinity": affinity, "variant": variant}
    for affinity in functional.AFFINITIES
    for variant in functional.VARIANTS
] + [
    {"class_distance": distance, "include_background": background}
    for distance in functional.CLASS_DISTANCES
    for background in (True, False)
]


def loss_and_gradient(loss: Any, vectors: Tensor, ratios: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = vectors.detach().requires_grad_()
    value = loss(leaf, ratios, **options)
    weights = torch.linspace(1, 2, max(value.numel(), 1), dtype=value.dtype)[: value.numel()].view(
        value.shape
    )
    (gradient,) = torch.autograd.grad(value, leaf, weights)
    return value.detach(), gradient


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", functional.REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_pdcr_loss_agrees_with_the_reference(options: dict, reduction: str, masked: bool) -> None:
    vectors = torch.randn(3, 37, 6, dtype=torch.float64)
    vectors[0, ::5] = 0
    ratios = blob_ratios(3, 37, 4)
    valid = torch.rand(3, 37) < torch.tensor([[0.7], [0.2], [0.0]]) if masked else None
    options = {**options, "reduction": reduction, "valid": valid, "temperature": 0.2}
    value, gradient = loss_and_gradient(pdcr_loss, vectors, ratios, **options)
    expected_value, expected_gradient = loss_and_gradient(reference.pdcr_loss, vectors, ratios, **options)
    torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=1e-12)
    assert normwise_error(gradient, expected_gradient) < 1e-10
    assert (gradient[vectors.eq(0).all(-1)] == 0).all()


@pytest.mark.parametrize("temperature", [1e-3, 0.07, 1.0, 1e6])
@pytest.mark.parametrize("class_distance", functional.CLASS_DISTANCES)
def test_pdcr_loss_at_any_temperature(temperature: float, class_distance: str) -> None:
    vectors, ratios = torch.randn(2, 65, 16), random_ratios(2, 65, 5)
    options = {"temperature": temperature, "class_distance": class_distance}
    value, gradient = loss_and_gradient(pdcr_loss, vectors, ratios, **options)
    expected = loss_and_gradient(reference.pdcr_loss, vectors.double(), ratios, **options)
    assert normwise_error(value, expected[0]) < 1e-5
    assert normwise_error(gradient, expected[1]) < 1e-5


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 1e38])
def test_pdcr_loss_of_huge_and_tiny_vectors(size: float) -> None:
    vectors, ratios = torch.randn(1, 33, 8).clamp(-2, 2), random_ratios(1, 33, 3)
    vectors[:, ::2] *= size
    value, gradient = loss_and_gradient(pdcr_loss, vectors, ratios)
    expected = loss_and_gradient(reference.pdcr_loss, vectors.double(), ratios)
    assert normwise_error(value, expected[0]) < 1e-5
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        largest = expected[1][:, rows].abs().max()
        if largest < 1e37:  # beyond, the true gradient overflows fp32
            # Gradients below the smallest normal number may be flushed.
            assert normwise_error(gradient[:, rows], expected[1][:, rows]) < 1e-5 or largest < 1e-37


@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_pdcr_loss_dtypes(dtype: torch.dtype, out: torch.dtype) -> None:
    vectors, ratios = torch.randn(2, 40, 9).to(dtype), blob_ratios(2, 40, 3)
    value, gradient = loss_and_gradient(pdcr_loss, vectors, ratios)
    expected = loss_and_gradient(reference.pdcr_loss, vectors.double(), ratios)
    assert value.dtype == out
    assert gradient.dtype == dtype
    assert normwise_error(value, expected[0]) < 1e-5
    assert normwise_error(gradient, expected[1]) < max(1e-5, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("batch", "count"), [(0, 4), (2, 0), (0, 0)])
@pytest.mark.parametrize("reduction", functional.REDUCTIONS)
def test_pdcr_loss_of_nothing_is_zero_and_connected(batch: int, count: int, reduction: str) -> None:
    vectors = torch.randn(batch, count, 4, requires_grad=True)
    loss = pdcr_loss(vectors, random_ratios(batch, count, 2), reduction=reduction)
    assert loss.tolist() == ([0] * batch if reduction == "none" else 0)
    loss.sum().backward()
    assert vectors.grad.shape == vectors.shape


@pytest.mark.parametrize("reduction", functional.REDUCTIONS)
def test_pdcr_loss_of_single_vectors_and_invalid_images(reduction: str) -> None:
    vectors, ratios = torch.randn(3, 2, 4, requires_grad=True), random_ratios(3, 2, 2)
    valid = torch.tensor([[True, False], [False, False], [False, True]])
    loss = pdcr_loss(vectors, ratios, valid=valid, reduction=reduction)
    loss.sum().backward()
    expected = {"none": [-2, 0, -2], "mean": -2, "sum": -4}[reduction]  # -1/tau for a self pair
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert vectors.grad.abs().max() < 1e-5
    nothing = pdcr_loss(vectors, ratios, valid=torch.zeros_like(valid), reduction=reduction)
    assert nothing.requires_grad
    assert nothing.abs().sum().item() == 0


def strided_pairs(layout: str) -> tuple[Tensor, Tensor]:
    vectors, ratios = torch.randn(2, 21, 6), random_ratios(2, 21, 3)
    match layout:
        case "transposed":
            return vectors.mT.contiguous().mT, ratios.mT.contiguous().mT
        case "every other":
            return vectors.repeat_interleave(2, 1)[:, ::2], ratios.repeat_interleave(2, 2)[..., ::2]
        case _:
            return vectors[:1].expand(2, -1, -1), ratios[:, :1].expand(-1, 21, -1)


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded"])
def test_pdcr_loss_of_strided_inputs(layout: str) -> None:
    vectors, ratios = strided_pairs(layout)
    assert not vectors.is_contiguous()
    valid = torch.tensor([[True, False, True]]).repeat(2, 7)[:, ::1]
    actual = loss_and_gradient(pdcr_loss, vectors, ratios, valid=valid, reduction="none")
    contiguous = loss_and_gradient(
        pdcr_loss, vectors.contiguous(), ratios.contiguous(), valid=valid, reduction="none"
    )
    torch.testing.assert_close(actual, contiguous)


def test_pdcr_loss_takes_an_expanded_gradient() -> None:
    vectors, ratios = torch.randn(4, 19, 5, requires_grad=True), random_ratios(4, 19, 3)
    loss = pdcr_loss(vectors, ratios, reduction="none")
    upstream = torch.tensor(0.7)
    (expanded,) = torch.autograd.grad(loss, vectors, upstream.expand(4), retain_graph=True)
    (plain,) = torch.autograd.grad(loss, vectors, torch.full((4,), 0.7))
    torch.testing.assert_close(expanded, plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_not_hidden(value: float) -> None:
    vectors = torch.randn(2, 9, 3)
    vectors[0, 4, 1] = value
    loss = pdcr_loss(vectors, random_ratios(2, 9, 2), reduction="none")
    assert loss.isnan().tolist() == [True, False]


def test_ratios_get_no_gradient() -> None:
    vectors, ratios = torch.randn(1, 9, 3, requires_grad=True), random_ratios(1, 9, 2).requires_grad_()
    for backend in ("auto", "reference"):
        pdcr_loss(vectors, ratios, backend=backend).backward()
        assert ratios.grad is None


def test_second_derivatives_of_the_loss_raise() -> None:
    vectors = torch.randn(1, 9, 3, requires_grad=True)
    loss = pdcr_loss(vectors, random_ratios(1, 9, 2))
    (gradient,) = torch.autograd.grad(loss, vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_repelled_fraction_agrees_with_the_reference(
    options: dict, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unchecked, "_PAIRS_AT_ONCE", 3 * 37 * 8)
    vectors = torch.randn(3, 37, 6, dtype=torch.float64)
    vectors[0, ::5] = 0
    ratios = random_ratios(3, 37, 4)
    valid = torch.rand(3, 37) < torch.tensor([[0.7], [0.2], [0.0]]) if masked else None
    actual = repelled_fraction(vectors, ratios, valid=valid, temperature=0.3, **options)
    expected = reference.repelled_fraction(vectors, ratios, valid=valid, temperature=0.3, **options)
    torch.testing.assert_close(actual, expected)
    assert actual.dtype == torch.float32
    assert not actual.requires_grad


def test_repelled_fraction_shows_the_collapse_of_many_classes() -> None:
    vectors, ratios = (
        torch.randn(1, 200, 16),
        torch.nn.functional.one_hot(torch.arange(200) % 8, 8)[None].float(),
    )
    assert repelled_fraction(vectors, ratios, class_distance="mean").item() == 0
    assert repelled_fraction(vectors, ratios, class_distance="tv").item() > 0.8


VECTORS, RATIOS = torch.ones(2, 5, 3), torch.full((2, 5, 2), 0.5)


@pytest.mark.parametrize("function", [pdcr_loss, repelled_fraction])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"vectors": [1.0]}, TypeError, "vectors: expected a tensor (B, N, C), got list"),
        ({"vectors": VECTORS[0]}, ValueError, "vectors: expected a tensor (B, N, C), got shape (5, 3)"),
        ({"vectors": VECTORS.long()}, TypeError, "vectors: expected dtype float32 or bfloat16"),
        ({"vectors": VECTORS[..., :0]}, ValueError, "vectors: expected at least one channel"),
        ({"ratios": None}, TypeError, "ratios: expected a tensor (B, N, M), got NoneType"),
        ({"ratios": RATIOS[:, :4]}, ValueError, "ratios: expected shape (2, 5, 2) (B and N of vectors)"),
        (
            {"ratios": RATIOS.half()},
            TypeError,
            "ratios: expected dtype float32 or float64, got torch.float16",
        ),
        ({"ratios": RATIOS[..., :1]}, ValueError, "ratios: expected at least 2 classes, got shape (2, 5, 1)"),
        (
            {"ratios": RATIOS.to("meta")},
            ValueError,
            "ratios: expected device cpu, where vectors is, got meta",
        ),
        ({"ratios": RATIOS - 1}, ValueError, "ratios: expected values from 0 to 1, got values from -0.5"),
        ({"ratios": RATIOS * 4}, ValueError, "ratios: expected values from 0 to 1, got values from 2 to 2"),
        (
            {"ratios": RATIOS * float("nan")},
            ValueError,
            "ratios: expected values from 0 to 1, got values from nan",
        ),
        (
            {"ratios": RATIOS * 2, "class_distance": "tv"},
            ValueError,
            "(multi-hot labels need 'mean'), got a sum of 2",
        ),
        ({"valid": RATIOS[..., 0]}, TypeError, "valid: expected dtype bool, got torch.float32"),
        ({"valid": RATIOS > 0}, ValueError, "valid: expected a tensor (B, N), got shape (2, 5, 2)"),
        ({"valid": RATIOS[:1, :, 0] > 0}, ValueError, "valid: expected shape (2, 5)"),
        ({"temperature": 0}, ValueError, "temperature: expected a positive, finite number, got 0"),
        (
            {"temperature": float("inf")},
            ValueError,
            "temperature: expected a positive, finite number, got inf",
        ),
        (
            {"temperature": float("nan")},
            ValueError,
            "temperature: expected a positive, finite number, got nan",
        ),
        ({"temperature": "warm"}, TypeError, "temperature: expected a number, got str"),
        ({"affinity": "ratios"}, ValueError, "affinity: expected one of 'ratio', 'constant', 'diagonal'"),
        (
            {"class_distance": "max"},
            ValueError,
            "class_distance: expected one of 'mean', 'sum', 'tv', got 'max'",
        ),
        ({"variant": "2d"}, ValueError, "variant: expected one of 'paper', 'released', got '2d'"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
        ({"backend": "triton"}, ValueError, "backend='triton' expects CUDA tensors, got cpu tensors"),
    ],
)
def test_bad_input_of_the_loss_is_named(
    function: Any, changed: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(**{"vectors": VECTORS, "ratios": RATIOS, **changed})


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(ValueError, match="reduction: expected one of 'none', 'mean', 'sum', got 'max'"):
        pdcr_loss(VECTORS, RATIOS, reduction="max")


def test_multi_hot_ratios_are_taken_by_the_mean() -> None:
    ratios = torch.rand(2, 5, 2)
    actual = pdcr_loss(VECTORS + torch.rand(5, 1), ratios, class_distance="mean")
    assert actual.isfinite()


# Foreground ratios


@pytest.mark.parametrize("border", functional.BORDERS)
@pytest.mark.parametrize("ignore_index", [None, 255, 0])
@pytest.mark.parametrize(("shape", "size"), [((23, 19), (5, 4)), ((9, 12, 7), (3, 4, 5))])
def test_foreground_ratio_agrees_with_the_reference(
    border: str, ignore_index: int | None, shape: tuple[int, ...], size: tuple[int, ...]
) -> None:
    labels = blob_labels(2, shape, 4)
    if ignore_index is not None:
        labels[:, :6] = ignore_index
    for starts in (torch.randint(-6, 20, (31, len(shape))), torch.randint(-6, 20, (2, 31, len(shape)))):
        actual = foreground_ratio(labels, starts, size, 4, border=border, ignore_index=ignore_index)
        expected = reference.foreground_ratio(
            labels, starts, size, 4, border=border, ignore_index=ignore_index
        )
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS, torch.bool], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_class_indices_of_any_dtype_with_and_without_channel(dtype: torch.dtype, backend: str) -> None:
    labels, starts = blob_labels(2, (17, 14), 2), torch.randint(-3, 14, (13, 2))
    expected = reference.foreground_ratio(labels, starts, (6, 5), 2)
    for form in (labels.to(dtype), labels.to(dtype)[:, None]):
        actual = foreground_ratio(form, starts, (6, 5), 2, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8, torch.bool], ids=str)
def test_multi_hot_labels_of_any_dtype(dtype: torch.dtype) -> None:
    labels, starts = torch.rand(2, 3, 17, 14).round().to(dtype), torch.randint(-3, 14, (13, 2))
    actual = foreground_ratio(labels, starts, (6, 5), 3)
    expected = reference.foreground_ratio(labels, starts, (6, 5), 3)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("border", functional.BORDERS)
def test_soft_labels_with_ignored_pixels(border: str) -> None:
    labels, starts = torch.rand(2, 3, 17, 14).softmax(1), torch.randint(-3, 14, (13, 2))
    labels.masked_fill_(torch.rand(2, 1, 17, 14) < 0.4, -1)
    actual = foreground_ratio(labels, starts, (6, 5), 3, border=border, ignore_index=-1)
    expected = reference.foreground_ratio(labels, starts, (6, 5), 3, border=border, ignore_index=-1)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("starts_dtype", [torch.int32, torch.int64, torch.int16])
def test_strided_labels_and_starts_of_any_integer_dtype(starts_dtype: torch.dtype) -> None:
    labels = blob_labels(2, (34, 14), 3)[:, ::2].mT
    starts = torch.randint(-3, 14, (2, 26), dtype=starts_dtype).T
    actual = foreground_ratio(labels, starts, (4, 5), 3)
    torch.testing.assert_close(actual, reference.foreground_ratio(labels, starts, (4, 5), 3), rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "count"), [(0, 3), (2, 0)])
def test_foreground_ratio_of_nothing(batch: int, count: int) -> None:
    labels, starts = torch.zeros(batch, 8, 8, dtype=torch.uint8), torch.zeros(count, 2, dtype=torch.int64)
    ratios, valid_fraction = foreground_ratio(labels, starts, (3, 3), 5)
    assert ratios.shape == (batch, count, 5)
    assert valid_fraction.shape == (batch, count)


def test_unchecked_labels_out_of_range_count_for_no_class() -> None:
    labels = torch.tensor([[[0, 1, 2, 3], [-1, 1, 9, 0]]])
    ratios, valid_fraction = foreground_ratio(labels, torch.tensor([[0, 0]]), (2, 4), 3, validate=False)
    assert ratios.tolist() == [[[0.25, 0.25, 0.125]]]
    assert valid_fraction.tolist() == [[1]]


def test_a_mark_that_the_dtype_cannot_hold_marks_nothing() -> None:
    labels = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="from 0 to 1, or ignore_index=-1, got 255"):
        foreground_ratio(labels, torch.tensor([[0, 0]]), (2, 2), 2, ignore_index=-1)
    for backend in ("auto", "reference"):
        ratios, valid_fraction = foreground_ratio(
            labels, torch.tensor([[0, 0]]), (2, 2), 2, ignore_index=-1, validate=False, backend=backend
        )
        assert ratios.tolist() == [[[0, 0]]]
        assert valid_fraction.tolist() == [[1]]


LABELS, STARTS = torch.zeros(2, 8, 8, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"labels": LABELS.tolist()},
            TypeError,
            "labels: expected a tensor (B, *spatial), (B, 1, *spatial) or (B, 2",
        ),
        ({"labels": LABELS[0]}, ValueError, "with 2 spatial axes, got shape (8, 8)"),
        (
            {"labels": LABELS[:, None].expand(-1, 4, -1, -1)},
            ValueError,
            "labels: expected 1 or num_classes=2 channels",
        ),
        ({"labels": LABELS.to(torch.complex64)}, TypeError, "labels: expected an integer or floating dtype"),
        ({"labels": LABELS + 2}, ValueError, "labels: expected integers from 0 to 1, got 2"),
        ({"labels": LABELS - 1}, ValueError, "labels: expected integers from 0 to 1, got -1"),
        ({"labels": LABELS + 0.5}, ValueError, "labels: expected integers from 0 to 1, got 0.5"),
        ({"labels": LABELS * float("nan")}, ValueError, "labels: expected integers from 0 to 1, got nan"),
        ({"labels": LABELS - 1, "ignore_index": 255}, ValueError, "from 0 to 1, or ignore_index=255, got -1"),
        (
            {"labels": torch.full((2, 2, 8, 8), 1.5)},
            ValueError,
            "labels: expected values from 0 to 1, got 1.5",
        ),
        ({"starts": STARTS.float()}, TypeError, "starts: expected an integer dtype, got torch.float32"),
        ({"starts": [[0, 0]]}, TypeError, "starts: expected a tensor (N, D) or (B, N, D), got list"),
        ({"starts": STARTS[:, :1]}, ValueError, "starts: expected 2 coordinates, as many as size has, got 1"),
        (
            {"starts": STARTS.expand(3, -1, -1)},
            ValueError,
            "starts: expected a batch of 2, that of labels, got 3",
        ),
        ({"starts": STARTS.to("meta")}, ValueError, "starts: expected device cpu, where labels is, got meta"),
        ({"size": (3, 0)}, ValueError, "size: expected an integer of at least 1, got 0"),
        ({"size": (3, 2.0)}, TypeError, "size: expected an integer, got float"),
        ({"size": 3}, ValueError, "size: expected 2 or 3 integers, one for each axis, got 3"),
        ({"size": (3,)}, ValueError, "size: expected 2 or 3 integers, one for each axis, got (3,)"),
        ({"num_classes": 1}, ValueError, "num_classes: expected an integer of at least 2, got 1"),
        ({"num_classes": 2.0}, TypeError, "num_classes: expected an integer, got float"),
        ({"border": "zero"}, ValueError, "border: expected one of 'full', 'clip', 'background', got 'zero'"),
        ({"ignore_index": "x"}, TypeError, "ignore_index: expected an integer or None, got str"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' expects CUDA tensors, got cpu tensors"),
    ],
)
def test_bad_input_of_foreground_ratio_is_named(
    backend: str, changed: dict, error: type[Exception], message: str
) -> None:
    arguments = {"labels": LABELS, "starts": STARTS, "size": (3, 3), "num_classes": 2, "backend": backend}
    with pytest.raises(error, match=re.escape(message)):
        foreground_ratio(**{**arguments, **changed})


# Entropy gate


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "num_classes"), [((2, 5, 7, 9), 2), ((1, 3, 4, 5, 6), 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_entropy_gate_agrees_with_the_reference(
    dtype: torch.dtype, shape: tuple[int, ...], num_classes: int, channels_last: bool
) -> None:
    features = torch.randn(shape).to(dtype)
    logits = (3 * torch.randn(shape[0], num_classes, *shape[2:])).to(dtype)
    if channels_last:
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        features, logits = features.to(memory_format=last), logits.to(memory_format=last)
    upstream = torch.randn(shape).to(dtype), torch.randn(shape[0], 1, *shape[2:])

    def run(gate: Any, *inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        gated, u = gate(*leaves, return_uncertainty=True)
        grads = torch.autograd.grad(
            [gated, u], leaves, [upstream[0].to(gated.dtype), upstream[1].to(u.dtype)]
        )
        return [gated.detach(), u.detach(), *grads]

    actual = run(entropy_gate, features, logits)
    expected = run(reference.entropy_gate, features.double(), logits.double())
    assert actual[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for got, want, precision in zip(actual, expected, (dtype, torch.float32, dtype, dtype), strict=True):
        assert normwise_error(got, want) < 4 * torch.finfo(precision).eps
    assert actual[0].dtype == actual[2].dtype == actual[3].dtype == dtype


def test_entropy_gate_of_mixed_dtypes_as_under_autocast() -> None:
    features = torch.randn(2, 4, 5, 5, requires_grad=True)
    logits = torch.randn(2, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    gated = entropy_gate(features, logits)
    gated.sum().backward()
    expected = reference.entropy_gate(features, logits)
    torch.testing.assert_close(gated, expected)
    assert logits.grad.dtype == torch.bfloat16
    half = entropy_gate(features.half(), logits.float())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=2e-3, atol=2e-3)


def test_entropy_gate_without_uncertainty_and_its_gradient() -> None:
    features, logits = (
        torch.randn(1, 2, 3, 3, requires_grad=True),
        torch.randn(1, 4, 3, 3, requires_grad=True),
    )
    gated, u = entropy_gate(features, logits, return_uncertainty=True)
    torch.testing.assert_close(entropy_gate(features, logits), gated)
    (of_gate,) = torch.autograd.grad(gated.sum(), logits, retain_graph=True)
    (of_u,) = torch.autograd.grad((-features.detach().sum(1, keepdim=True) * u).sum(), logits)
    torch.testing.assert_close(of_gate, of_u)


def test_second_derivatives_of_the_gate_raise() -> None:
    features, logits = (
        torch.randn(1, 2, 3, 3, requires_grad=True),
        torch.randn(1, 4, 3, 3, requires_grad=True),
    )
    gradients = torch.autograd.grad(
        entropy_gate(features, logits).sum(), (features, logits), create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives"):
        sum(g.square().sum() for g in gradients).backward()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 1, 1, 0)])
def test_entropy_gate_of_nothing(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, requires_grad=True)
    logits = torch.randn(shape[0], 2, *shape[2:], requires_grad=True)
    gated, u = entropy_gate(features, logits, return_uncertainty=True)
    (gated.sum() + u.sum()).backward()
    assert gated.shape == features.grad.shape == shape
    assert logits.grad.shape == logits.shape


FEATURES, LOGITS = torch.ones(2, 5, 4, 3), torch.ones(2, 2, 4, 3)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"features": 1.0},
            TypeError,
            "features: expected a tensor (B, C, *spatial) with 2 or 3 spatial axes, got float",
        ),
        ({"features": FEATURES[0]}, ValueError, "features: expected a tensor (B, C, *spatial) with 2 or 3"),
        ({"features": FEATURES.long()}, TypeError, "features: expected dtype float32"),
        ({"logits": LOGITS.int()}, TypeError, "logits: expected dtype float32"),
        (
            {"logits": LOGITS[..., None]},
            ValueError,
            "logits: expected a tensor (B, M, *spatial) with the spatial axes",
        ),
        (
            {"logits": LOGITS[..., :2]},
            ValueError,
            "logits: expected shape (2, 2, 4, 3) (B and spatial shape of features)",
        ),
        ({"logits": LOGITS[:1]}, ValueError, "logits: expected shape (2, 2, 4, 3)"),
        (
            {"logits": LOGITS[:, :1]},
            ValueError,
            "logits: expected at least 2 classes, got shape (2, 1, 4, 3)",
        ),
        (
            {"logits": LOGITS.to("meta")},
            ValueError,
            "logits: expected device cpu, where features is, got meta",
        ),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_input_of_the_gate_is_named(
    backend: str, changed: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        entropy_gate(**{"features": FEATURES, "logits": LOGITS, "backend": backend, **changed})


# All together


def training_step(features: Tensor, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
    gated = entropy_gate(features, logits)
    starts = indices * 2 - 1
    ratios, valid_fraction = foreground_ratio(labels, starts, (3, 3), 3, ignore_index=255)
    vectors = gated[:, :, indices[:, 0], indices[:, 1]].mT
    return pdcr_loss(vectors, ratios, valid=valid_fraction >= 0.5)


def test_all_three_compile_into_one_graph() -> None:
    features, logits = (
        torch.randn(2, 6, 8, 8, requires_grad=True),
        torch.randn(2, 3, 8, 8, requires_grad=True),
    )
    labels = blob_labels(2, (16, 16), 3)
    labels[:, :5] = 255
    indices = functional.sample_grid((8, 8), 16)
    expected = training_step(features, logits, labels, indices)
    expected_grads = torch.autograd.grad(expected, (features, logits))
    compiled = torch.compile(training_step, fullgraph=True)(features, logits, labels, indices)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, (features, logits)), expected_grads)


def test_numbers_may_be_dynamic_when_compiled() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(vectors: Tensor, ratios: Tensor, temperature: float) -> Tensor:
        return pdcr_loss(vectors, ratios, temperature=temperature)

    for count, temperature in ((7, 0.5), (12, 0.07), (9, 3.0)):
        vectors, ratios = torch.randn(2, count, 6), torch.rand(2, count, 3) / 3
        expected = pdcr_loss(vectors, ratios, temperature=temperature)
        torch.testing.assert_close(compiled(vectors, ratios, temperature), expected)


def test_autocast_leaves_the_sums_in_fp32() -> None:
    features, logits = torch.randn(2, 6, 8, 8), torch.randn(2, 3, 8, 8)
    labels, indices = blob_labels(2, (16, 16), 3), functional.sample_grid((8, 8), 16)
    plain = training_step(features, logits, labels, indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = training_step(features, logits, labels, indices)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain)


def test_examples() -> None:
    assert doctest.testmod(functional).failed == 0
