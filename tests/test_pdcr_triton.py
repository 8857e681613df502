"""The Triton kernels of PDCR, interpreted on CPU tensors, against the float64 default implementation."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from test_pdcr import (
    AFFINITIES,
    CATEGORICAL,
    PAPER,
    SHARP,
    assert_as_exact_as_plain,
    by_reference,
    loss_and_gradient,
    make_inputs,
    normwise,
)

from contrastseg_fast import _backend, _checks, functional
from contrastseg_fast.affinity import Affinity
from contrastseg_fast.ops import pdcr
from contrastseg_fast.problems import PADDING, WIDEST_FUSED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not _backend.interpreting(), reason="kernels are interpreted with TRITON_INTERPRET=1 only"
)
if _backend.interpreting():
    from contrastseg_fast.kernels import pdcr as kernels
    from contrastseg_fast.kernels.pdcr import plan, slabs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreting takes long for every program, however little it does."""
    monkeypatch.setattr(plan, "MOST_SMALL", 0)  # which test_pdcr_small_triton.py is for
    monkeypatch.setattr(plan, "ROWS", plan.RowLaunch(1 << 13, 128, 4))
    monkeypatch.setattr(plan, "LOSS_BLOCK", 128)


@pytest.fixture(params=[True, False], ids=["deterministic", "atomic"])
def deterministic(request: pytest.FixtureRequest) -> bool:
    """Rows in one program, or tiles that add up; memory stays poisoned with NaN only in the first."""
    torch.use_deterministic_algorithms(request.param)
    return request.param


def some_valid(vectors: torch.Tensor) -> torch.Tensor:
    valid = torch.rand(vectors.shape[:2]) > 0.3
    valid[:, 0] = True
    return valid


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", AFFINITIES)
def test_every_form_is_as_exact_as_plain_pytorch(form, dtype, deterministic):
    affinity = AFFINITIES[form]
    vectors, ratios = make_inputs(2, 130, 20, 3, DTYPES[dtype], categorical=affinity.categorical)
    assert_as_exact_as_plain(vectors, ratios, some_valid(vectors), affinity, "triton")


@pytest.mark.parametrize(
    ("dtype", "batch", "count", "channels", "classes"),
    [
        ("bf16", 1, 257, 256, 2),
        ("fp16", 2, 63, 100, 2),
        ("bf16", 1, 130, 257, 2),  # too wide for the fused kernels
        ("fp16", 1, 65, 300, 5),
        ("fp32", 1, 300, 7, 2),
        ("bf16", 1, 70, 16, 70),
        ("fp32", 2, 129, 64, 1),
    ],
)
def test_odd_sizes(dtype, batch, count, channels, classes, deterministic):
    vectors, ratios = make_inputs(batch, count, channels, classes, DTYPES[dtype])
    assert_as_exact_as_plain(vectors, ratios, None, PAPER, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_vector(dtype, deterministic):
    vectors, ratios = make_inputs(3, 1, 5, 2, DTYPES[dtype])
    loss, log_z, gradient = loss_and_gradient("triton", vectors, ratios, None, PAPER, torch.ones(3))
    assert loss.tolist() == pytest.approx([-2] * 3, abs=1e-6)  # log 1 - 1 / tau
    assert log_z.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affinity", [PAPER, SHARP], ids=["paper", "sharp"])
def test_clustered_vectors(dtype, affinity):
    """At cosine 0.9999 the gradient is what is left after nearly all of it cancels."""
    vectors = torch.randn(1, 1, 64) + 0.01 * torch.randn(1, 200, 64)
    _, ratios = make_inputs(1, 200, 64, 2, torch.float32)
    assert_as_exact_as_plain(vectors.to(DTYPES[dtype]), ratios, None, affinity, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [1e-30, 3e4])
def test_vectors_of_any_length(dtype, unit):
    if dtype == "fp16":
        unit = max(unit, 1e-4)
    vectors, ratios = make_inputs(1, 100, 24, 2, torch.float32)
    vectors = vectors / vectors.abs().amax() * torch.logspace(-1, 0, 100)[None, :, None] * unit
    vectors = vectors.to(DTYPES[dtype])
    grad = torch.full((1,), unit)  # so that gradients neither vanish nor overflow
    exact = loss_and_gradient("default", vectors.double(), ratios, None, PAPER, grad)
    plain = loss_and_gradient("default", vectors.float(), ratios, None, PAPER, grad)
    actual = loss_and_gradient("triton", vectors, ratios, None, PAPER, grad)
    for a, p, e in zip(actual, plain, exact, strict=True):
        plain_error = (p.to(a.dtype).double() - e).norm()
        assert (a.double() - e).norm() <= 2 * plain_error + 1e-6 * e.norm()


def test_zero_vectors_get_zero_gradients(deterministic):
    for dtype in DTYPES.values():
        vectors, ratios = make_inputs(2, 80, 12, 2, dtype)
        vectors[:, ::3] = 0
        assert_as_exact_as_plain(vectors, ratios, None, PAPER, "triton")
        _, _, gradient = loss_and_gradient("triton", vectors, ratios, None, PAPER, torch.ones(2))
        assert (gradient[:, ::3] == 0).all()


def test_nothing_valid_gives_zero(deterministic):
    vectors, ratios = make_inputs(2, 70, 12, 2, torch.bfloat16)
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[1] = False
    loss, log_z, gradient = loss_and_gradient("triton", vectors, ratios, valid, PAPER, torch.ones(2))
    assert loss[1] == 0
    assert (log_z[1] == 0).all()
    assert (gradient[1] == 0).all()
    assert_as_exact_as_plain(vectors[:1], ratios[:1], valid[:1], PAPER, "triton")
    vectors[1] = torch.nan  # an excluded vector does not matter
    again = loss_and_gradient("triton", vectors, ratios, valid, PAPER, torch.ones(2))
    for value in again:
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.07, 0.02, 0.002])
def test_excluded_vectors_never_overflow(dtype, temperature, deterministic):
    vectors, ratios = make_inputs(1, 70, 12, 2, DTYPES[dtype])
    for form in ((0.0, 1.0, 1.0, -1.0, 1.0), (1.0, -1.0, 0.0, 1.0, -1.0)):
        affinity = Affinity(temperature, 0.5, False, *form)
        values = loss_and_gradient("triton", vectors, ratios, some_valid(vectors), affinity, torch.ones(1))
        for value in values:
            assert torch.isfinite(value).all()


def test_large_incoming_gradient_in_fp16():
    vectors, ratios = make_inputs(1, 150, 16, 2, torch.float16)
    grad = torch.full((1,), 2.0**16)
    exact = loss_and_gradient("default", vectors.double(), ratios, None, PAPER, grad)
    actual = loss_and_gradient("triton", vectors, ratios, None, PAPER, grad)
    assert torch.isfinite(actual[2]).all()
    assert ((actual[2].double() - exact[2]).norm() / exact[2].norm()) < 2e-3


def test_strided_inputs_and_expanded_gradients():
    vectors, ratios = make_inputs(2, 90, 20, 3, torch.bfloat16)
    apart = torch.empty(2, 20, 90, dtype=torch.bfloat16).mT.copy_(vectors)
    shared = ratios[:1].expand(2, -1, -1)
    grad = torch.ones(()).expand(2)
    actual = loss_and_gradient("triton", apart, shared, None, PAPER, grad)
    expected = loss_and_gradient("triton", vectors, shared.contiguous(), None, PAPER, torch.ones(2))
    for a, e in zip(actual, expected, strict=True):  # channels are summed in another order
        torch.testing.assert_close(a, e, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("affinity", "classes"),
    [(PAPER, 2), (PAPER, 3), (PAPER._replace(temperature=0.004), 2)],
    ids=["2", "3", "overflowing"],
)
def test_whole_tiles_of_equal_ratios(classes, affinity, deterministic):
    vectors, _ = make_inputs(1, 450, 20, classes, torch.float16)
    ratios = torch.nn.functional.one_hot((torch.arange(450)[None] > 180).long(), classes).float()
    ratios[:, :20] = torch.rand(1, 20, classes).softmax(-1)
    for valid in (None, torch.arange(450)[None] % 10 > 0):
        assert_as_exact_as_plain(vectors, ratios, valid, affinity, "triton")


@pytest.mark.parametrize(("most", "height"), [(1, 32), (2 * 384 * 4 * 96, 96), (2 * 384 * 4 * 140, 128)])
def test_several_slabs_agree_with_one(most, height, monkeypatch, deterministic):
    vectors, ratios = make_inputs(2, 300, 40, 2, torch.float32)
    expected = loss_and_gradient("triton", vectors, ratios, None, PAPER, torch.ones(2))
    heights = []
    product = slabs.product
    monkeypatch.setattr(slabs, "product", lambda a, b: heights.append(a.shape[1]) or product(a, b))
    monkeypatch.setattr(slabs, "_SLAB_BYTES", (most, most))
    actual = loss_and_gradient("triton", vectors, ratios, None, PAPER, torch.ones(2))
    for a, e in zip(actual, expected, strict=True):
        assert ((a - e).norm() / e.norm()) < 1e-6
    assert set(heights) == {height}


def test_deterministic_bits():
    for affinity in (PAPER, CATEGORICAL):
        vectors, ratios = make_inputs(1, 200, 20, 2, torch.bfloat16, categorical=affinity.categorical)
        first, second = (
            loss_and_gradient("triton", vectors, ratios, None, affinity, torch.ones(1)) for _ in range(2)
        )
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("count", [1 << 14, 1 << 17])
def test_pair_weights_fit_fp16(count):
    terms = plan.terms_of(PAPER, torch.float16, count, 2)
    scale, undo = 2.0 ** terms.pair_weight["log_weight_scale"], terms.gradient["g_scale"]
    factor = math.log2(math.e) / PAPER.temperature
    # one pair has all of both rows' sums, at distance 1
    largest = (count * factor * 2 + 2 * factor) * scale + abs(terms.pair_weight["offset"])
    assert largest < torch.finfo(torch.float16).max
    assert scale * undo * factor == pytest.approx(1)
    assert plan.terms_of(PAPER, torch.bfloat16, count, 2).gradient["g_scale"] == 1


@pytest.mark.parametrize("table", [plan.FORWARD, plan.BACKWARD] if _backend.interpreting() else [])
def test_launch_tables_serve_every_width(table):
    for by_mode in table.values():
        for by_width in by_mode.values():
            assert max(by_width) == WIDEST_FUSED
            for launch in (launch for entry in by_width.values() for launch in entry):
                assert PADDING % launch.block_i == PADDING % launch.block_j == 0
                assert launch.block_i % launch.block_j == 0


@pytest.mark.parametrize("reduction", functional.REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_are_reduced_as_in_the_reference(dtype, reduction, monkeypatch):
    monkeypatch.setattr(_backend, "unavailable", lambda backend, device: None)
    vectors, ratios = make_inputs(3, 70, 12, 2, DTYPES[dtype])
    grad = torch.linspace(-1, 2, 3) if reduction == "none" else torch.tensor(-1.7)
    how = ([*PAPER], reduction, "triton")
    for valid in (None, some_valid(vectors) & torch.tensor([True, False, True])[:, None]):
        exact = by_reference(vectors.double(), ratios, valid, PAPER, grad, reduction)
        plain = by_reference(vectors.float(), ratios, valid, PAPER, grad, reduction)
        loss, log_z, *saved = pdcr.pdcr_forward_on_cuda(vectors, ratios, valid, *how)
        gradient = pdcr.pdcr_backward_on_cuda(grad, log_z, vectors, ratios, valid, *saved, *how)
        assert (loss.shape, loss.dtype) == (exact[0].shape, torch.float32)
        for actual, p, e in zip((loss, gradient), plain, exact, strict=True):
            rounding = 4 * torch.finfo(torch.float32).eps
            assert normwise(actual, e) <= 2 * normwise(p.to(actual.dtype), e) + rounding


def test_cuda_tensors_take_triton_or_say_once_why_not(monkeypatch):
    """The dispatch of CUDA tensors, on CPU tensors."""
    vectors, ratios = make_inputs(1, 40, 8, 2, torch.float32)
    called = []
    forward, backward = kernels.forward, kernels.backward
    monkeypatch.setattr(kernels, "forward", lambda *inputs: called.append("forward") or forward(*inputs))
    monkeypatch.setattr(kernels, "backward", lambda *inputs: called.append("backward") or backward(*inputs))
    monkeypatch.setattr(_backend, "unavailable", lambda backend, device: None)
    loss, log_z, *saved = pdcr.pdcr_forward_on_cuda(vectors, ratios, None, PAPER, "mean", "auto")
    pdcr.pdcr_backward_on_cuda(torch.tensor(1.0), log_z, vectors, ratios, None, *saved, PAPER, "mean", "auto")
    assert called == ["forward", "backward"]
    for unserved in (vectors.double(), vectors[:, :0], vectors[:0]):
        their_ratios = ratios[: len(unserved), : unserved.shape[1]].double()
        pdcr.pdcr_forward_on_cuda(unserved, their_ratios, None, PAPER, "mean", "auto")
    assert called == ["forward", "backward"]
    monkeypatch.setattr(_backend, "unavailable", lambda backend, device: "Triton is not installed")
    _checks.warn_once.cache_clear()
    with pytest.warns(
        RuntimeWarning, match="runs in plain PyTorch, as the Triton kernels cannot run: Triton is not"
    ):
        plain, *_ = pdcr.pdcr_forward_on_cuda(vectors, ratios, None, PAPER, "mean", "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdcr.pdcr_forward_on_cuda(vectors, ratios, None, PAPER, "mean", "auto")
    assert plain.item() == pytest.approx(loss.item(), rel=1e-5)
    assert called == ["forward", "backward"]


def test_fp64_is_refused_by_name():
    vectors, ratios = make_inputs(1, 4, 3, 2, torch.float64)
    with pytest.raises(ValueError, match=r"vectors: expected fp32, bf16 or fp16 for backend='triton'"):
        pdcr.pdcr_forward_on_cuda(vectors, ratios, None, [*PAPER], "mean", "triton")
