"""The PDCR operator against the float64 default implementation and against its own guarantees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from contrastseg_fast import _backend, functional, unchecked
from contrastseg_fast.affinity import AFFINITIES as WORDS
from contrastseg_fast.affinity import Affinity, make_affinity
from contrastseg_fast.ops import pdcr

needs_extension = pytest.mark.skipif(
    not _backend.has_cpu_extension(), reason="the C++ extension is not installed"
)


def paper_form(word: str, variant: str = "paper", temperature: float = 0.5) -> Affinity:
    """An affinity by its word, for two classes."""
    return make_affinity(
        word,
        num_classes=2,
        temperature=temperature,
        class_distance="mean",
        include_background=True,
        variant=variant,
    )


PAPER = paper_form("ratio")
SHARP = paper_form("ratio", temperature=0.07)
OVERFLOWING = paper_form("ratio", temperature=0.002)  # exp(d / tau) exceeds fp32
RELEASED = paper_form("ratio", "released")._replace(distance_scale=1.0)
CATEGORICAL = paper_form("bipartite")
# Every word, those with equal numbers once, and forms that are hard on the arithmetic.
_BY_NUMBERS = {paper_form(word): word for word in WORDS}
AFFINITIES = {word: affinity for affinity, word in _BY_NUMBERS.items()}
AFFINITIES |= {"sharp": SHARP, "overflowing": OVERFLOWING, "released": RELEASED}


def make_inputs(
    batch: int, count: int, channels: int, classes: int, dtype: torch.dtype, *, categorical: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random vectors, and ratios of which half are shared by many vectors, as with real masks."""
    generator = torch.Generator().manual_seed(count * 31 + channels)
    vectors = torch.randn(batch, count, channels, generator=generator).to(dtype)
    if categorical:
        return vectors, torch.randint(0, 4, (batch, count, 1), generator=generator).float()
    ratios = torch.rand(batch, count, classes, generator=generator)
    ratios = ratios / ratios.sum(-1, keepdim=True)
    ratios[:, : count // 3] = ratios[:, :1]
    ratios[:, count // 3 : count // 2] = ratios[:, -1:]
    return vectors, ratios[:, torch.randperm(count, generator=generator)]


def loss_and_gradient(implementation, vectors, ratios, valid, affinity, grad, reduction="none"):
    """`(loss, log_z, gradient)` by the operator, its plain-PyTorch default, or Triton's."""
    how = ([*affinity], reduction, "auto")
    match implementation:
        case "op":
            forward, backward = pdcr.pdcr_forward, pdcr.pdcr_backward
        case "default":
            forward, backward = pdcr._forward, pdcr._backward
        case "triton":
            forward, backward = pdcr.pdcr_forward_on_cuda, pdcr.pdcr_backward_on_cuda
            how = (*how[:2], "triton")
    loss, log_z, *saved = forward(vectors, ratios, valid, *how)
    return loss, log_z, backward(grad.to(loss.dtype), log_z, vectors, ratios, valid, *saved, *how)


def by_reference(vectors, ratios, valid, affinity, grad, reduction):
    """`(loss, gradient)` by the equations."""
    leaf = vectors.detach().requires_grad_()
    loss = unchecked.pdcr_loss(leaf, ratios, valid, affinity, reduction, "reference")
    return loss.detach(), torch.autograd.grad(loss, leaf, grad.to(loss.dtype))[0]


def normwise(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def assert_as_exact_as_plain(vectors, ratios, valid, affinity, implementation="op") -> None:
    """The error against float64 is at most twice that of plain PyTorch which upcasts to fp32 first.

    A few roundings come on top, of numbers near 1 or of exponents up to 1 / temperature.
    """
    grad = torch.linspace(0.5, 1.5, vectors.shape[0])
    exact = loss_and_gradient("default", vectors.double(), ratios, valid, affinity, grad)
    plain = loss_and_gradient("default", vectors.float(), ratios, valid, affinity, grad)
    actual = loss_and_gradient(implementation, vectors, ratios, valid, affinity, grad)
    assert actual[2].dtype == vectors.dtype
    rounding = torch.finfo(torch.float32).eps * max(4, 0.25 / affinity.temperature)
    for name, a, p, e in zip(("loss", "log_z", "gradient"), actual, plain, exact, strict=True):
        assert torch.isfinite(a).all(), name
        plain_error = normwise(p.to(a.dtype), e)
        assert normwise(a, e) <= 2 * plain_error + rounding, f"{name}: {normwise(a, e)} against {plain_error}"


@needs_extension
@pytest.mark.parametrize("name", AFFINITIES)
@pytest.mark.parametrize(
    ("batch", "count", "channels", "classes"),
    [(2, 257, 33, 2), (1, 500, 16, 5), (3, 63, 100, 3), (1, 96, 2, 2), (2, 97, 7, 4), (1, 3300, 24, 2)],
)
def test_fp32_is_as_exact_as_plain_pytorch(name, batch, count, channels, classes):
    affinity = AFFINITIES[name]
    vectors, ratios = make_inputs(
        batch, count, channels, classes, torch.float32, categorical=affinity.categorical
    )
    assert_as_exact_as_plain(vectors, ratios, None, affinity)


@needs_extension
@pytest.mark.parametrize("name", AFFINITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_as_exact_as_plain_pytorch(name, dtype):
    affinity = AFFINITIES[name]
    vectors, ratios = make_inputs(2, 300, 40, 3, dtype, categorical=affinity.categorical)
    assert_as_exact_as_plain(vectors, ratios, None, affinity)


@needs_extension
@pytest.mark.parametrize("name", AFFINITIES)
def test_fp64_agrees_to_rounding(name):
    affinity = AFFINITIES[name]
    vectors, ratios = make_inputs(2, 211, 19, 3, torch.float64, categorical=affinity.categorical)
    grad = torch.ones(2, dtype=torch.float64)
    exact = loss_and_gradient("default", vectors, ratios, None, affinity, grad)
    actual = loss_and_gradient("op", vectors, ratios, None, affinity, grad)
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == torch.float64
        assert normwise(a, e) < 1e-12


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affinity", [PAPER, SHARP], ids=["paper", "sharp"])
def test_clustered_vectors(dtype, affinity):
    """At cosine 0.9999 the gradient is what is left after nearly all of it cancels."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 1, 64, generator=generator) + 0.01 * torch.randn(2, 500, 64, generator=generator)
    _, ratios = make_inputs(2, 500, 64, 2, dtype)
    assert_as_exact_as_plain(vectors.to(dtype), ratios, None, affinity)


@needs_extension
def test_invalid_vectors_are_excluded():
    vectors, ratios = make_inputs(3, 410, 20, 2, torch.float32)
    valid = torch.rand(3, 410, generator=torch.Generator().manual_seed(1)) > 0.4
    valid[1] = False
    assert_as_exact_as_plain(vectors, ratios, valid, PAPER)
    loss, log_z, gradient = loss_and_gradient("op", vectors, ratios, valid, PAPER, torch.ones(3))
    assert loss[1] == 0
    assert (gradient[~valid] == 0).all()
    assert (log_z[~valid] == 0).all()
    keep = valid[0]
    alone = loss_and_gradient("op", vectors[:1, keep], ratios[:1, keep], None, PAPER, torch.ones(1))
    torch.testing.assert_close(loss[:1], alone[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[:1, keep], alone[2], rtol=1e-4, atol=1e-8)


def images_of_any_number(case: str) -> torch.Tensor | None:
    """Which of `(4, 130)` vectors are valid: in all images, in some or in none."""
    if case == "all":
        return None
    share = torch.tensor([0.6, 0.0, 1.0, 0.0] if case == "some" else [0.0] * 4)
    return torch.rand(4, 130, generator=torch.Generator().manual_seed(5)) < share[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["all", "some", "none"])
@pytest.mark.parametrize("reduction", functional.REDUCTIONS)
@pytest.mark.parametrize("implementation", ["default", pytest.param("op", marks=needs_extension)])
def test_losses_are_reduced_as_in_the_reference(implementation, reduction, case, dtype):
    vectors, ratios = make_inputs(4, 130, 12, 3, dtype)
    inputs = (ratios, images_of_any_number(case), PAPER)
    grad = torch.linspace(-1, 2, 4) if reduction == "none" else torch.tensor(-1.7)
    exact = by_reference(vectors.double(), *inputs, grad, reduction)
    plain = by_reference(vectors.float(), *inputs, grad, reduction)
    loss, _, gradient = loss_and_gradient(implementation, vectors, *inputs, grad, reduction)
    assert loss.shape == exact[0].shape
    assert (loss.dtype, gradient.dtype) == (torch.promote_types(dtype, torch.float32), dtype)
    rounding = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    for actual, p, e in zip((loss, gradient), plain, exact, strict=True):
        plain_error = 0 if dtype == torch.float64 else normwise(p.to(actual.dtype), e)
        assert normwise(actual, e) <= 2 * plain_error + rounding
    if case == "none":
        assert not loss.any()
        assert not gradient.any()


@needs_extension
def test_means_are_rounded_once():
    """Losses of many images are added in fp64."""
    vectors, ratios = make_inputs(4000, 3, 2, 2, torch.float32)
    images, *_ = pdcr.pdcr_forward(vectors, ratios, None, [*PAPER], "none", "auto")
    mean, *_ = pdcr.pdcr_forward(vectors, ratios, None, [*PAPER], "mean", "auto")
    total, *_ = pdcr.pdcr_forward(vectors, ratios, None, [*PAPER], "sum", "auto")
    for actual, expected in ((mean, images.double().mean()), (total, 9 * images.double().sum())):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("forward", [pdcr.pdcr_forward, pdcr._forward])
def test_an_unknown_reduction_is_named(forward):
    """An exported program may bring it, where no check came before."""
    vectors, ratios = make_inputs(1, 5, 3, 2, torch.float32)
    with pytest.raises(
        (ValueError, RuntimeError), match="reduction: expected 'none', 'mean' or 'sum', got 'max'"
    ):
        forward(vectors, ratios, None, [*PAPER], "max", "auto")


@needs_extension
def test_skipped_tiles_change_nothing():
    """Blocks of equal ratios are skipped; the same pairs with ratios a hair apart are computed."""
    vectors, _ = make_inputs(1, 900, 32, 2, torch.float64)
    ratios = torch.zeros(1, 900, 2)
    ratios[:, :600, 0] = 1
    ratios[:, 600:, 1] = 1
    apart = ratios + torch.linspace(0, 1e-7, 900)[None, :, None]
    grad = torch.ones(1, dtype=torch.float64)
    skipped = loss_and_gradient("op", vectors, ratios, None, PAPER, grad)
    computed = loss_and_gradient("op", vectors, apart, None, PAPER, grad)
    for a, b in zip(skipped, computed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@needs_extension
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_rows_of_any_length(scale):
    vectors, ratios = make_inputs(1, 200, 24, 2, torch.float32)
    scales = torch.ones(200)
    scales[::3] = scale
    grad = torch.ones(1)
    loss, _, gradient = loss_and_gradient("op", vectors * scales[:, None], ratios, None, PAPER, grad)
    loss_1, _, gradient_1 = loss_and_gradient("op", vectors, ratios, None, PAPER, grad)
    torch.testing.assert_close(loss, loss_1, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient.double() * scales[:, None].double(), gradient_1.double(), rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("affinity", AFFINITIES.values(), ids=AFFINITIES)
def test_zero_vectors_get_no_gradient(affinity):
    vectors, ratios = make_inputs(2, 130, 12, 2, torch.float32, categorical=affinity.categorical)
    vectors[:, ::4] = 0
    vectors[1] = 0
    loss, _, gradient = loss_and_gradient("op", vectors, ratios, None, affinity, torch.ones(2))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    assert (gradient[:, ::4] == 0).all()
    assert (gradient[1] == 0).all()
    assert gradient[0].abs().sum() > 0
    assert_as_exact_as_plain(vectors, ratios, None, affinity)


@pytest.mark.parametrize(
    ("batch", "count", "channels"), [(0, 5, 4), (2, 0, 4), (2, 1, 4), (2, 2, 4), (2, 5, 0)]
)
def test_degenerate_sizes(batch, count, channels):
    vectors = torch.randn(batch, count, channels, requires_grad=True)
    ratios = torch.rand(batch, count, 2)
    loss, log_z, *_ = pdcr.pdcr_forward(vectors, ratios, None, [*PAPER], "none", "auto")
    assert loss.shape == (batch,)
    assert log_z.shape == (batch, count)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(vectors.grad).all()
    if count == 1:
        torch.testing.assert_close(vectors.grad, torch.zeros_like(vectors), rtol=0, atol=1e-6)


@needs_extension
def test_one_channel_has_no_gradient():
    """Vectors on a line have cosine 1 or -1, whatever their lengths."""
    vectors, ratios = make_inputs(1, 96, 1, 2, torch.float32)
    gradient = loss_and_gradient("op", vectors, ratios, None, PAPER, torch.ones(1))[2]
    assert (gradient * vectors).abs().max() < 1e-7


@needs_extension
@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 0.1, 1.0, 1e3, 1e6])
def test_any_temperature(temperature):
    vectors, ratios = make_inputs(1, 230, 16, 2, torch.float32)
    assert_as_exact_as_plain(vectors, ratios, None, PAPER._replace(temperature=temperature))


@needs_extension
def test_strided_inputs():
    vectors, ratios = make_inputs(2, 150, 20, 3, torch.float32)
    expected = loss_and_gradient("op", vectors, ratios, None, PAPER, torch.ones(2))
    features = vectors.mT.contiguous().mT
    wide = torch.zeros(2, 150, 60)
    wide[..., ::3] = vectors
    spread = ratios.mT.contiguous().mT
    for strided in (features, wide[..., ::3]):
        assert not strided.is_contiguous()
        actual = loss_and_gradient("op", strided, spread, None, PAPER, torch.ones(1).expand(2))
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp64_ratios(dtype):
    vectors, ratios = make_inputs(2, 150, 20, 3, dtype)
    exact = ratios.double() + torch.linspace(0, 1e-9, 150, dtype=torch.float64)[None, :, None]
    assert_as_exact_as_plain(vectors, exact, None, PAPER)
    grad = torch.ones(2, dtype=dtype)
    actual = loss_and_gradient("op", vectors, exact, None, PAPER, grad)
    expected = loss_and_gradient("default", vectors, exact, None, PAPER, grad)
    for a, e in zip(actual, expected, strict=True):
        assert normwise(a, e.double()) < (1e-12 if dtype == torch.float64 else 1e-6)


@needs_extension
@pytest.mark.parametrize("count", [90, 180, 260, 400, 3168, 3400])  # 1, 2, 3 and 5 blocks; 17 and 18 groups
def test_every_pair_counts_once_with_equal_bits_for_any_number_of_threads(count):
    vectors, ratios = make_inputs(2, count, 8, 2, torch.float64)
    expected = loss_and_gradient("default", vectors, ratios, None, PAPER, torch.ones(2))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(loss_and_gradient("op", vectors, ratios, None, PAPER, torch.ones(2)))
    finally:
        torch.set_num_threads(threads)
    for a, e in zip(results[0], expected, strict=True):
        assert normwise(a, e) < 1e-12
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@needs_extension
def test_nan_shows_whatever_its_bits():
    vectors, ratios = make_inputs(1, 200, 40, 2, torch.float32)
    vectors[0, 7, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    loss, _, gradient = loss_and_gradient("op", vectors, ratios, None, PAPER, torch.ones(1))
    assert loss.isnan().all()
    assert gradient.isnan().any()


@pytest.mark.parametrize("reduction", functional.REDUCTIONS)
@pytest.mark.parametrize("implementation", ["op", "default"])
def test_gradcheck(implementation, reduction):
    vectors, ratios = make_inputs(2, 23, 6, 3, torch.float64)
    vectors.requires_grad_()
    valid = torch.rand(2, 23, generator=torch.Generator().manual_seed(3)) > 0.2
    if implementation == "op":
        assert torch.autograd.gradcheck(
            lambda v: pdcr.pdcr_forward(v, ratios, valid, [*PAPER], reduction, "auto")[0], (vectors,)
        )
        return
    how = ([*PAPER], reduction)
    loss, log_z, *saved = pdcr._forward(vectors, ratios, valid, *how)
    grad = torch.ones_like(loss)
    expected = torch.autograd.grad(loss, vectors, grad)[0]
    actual = pdcr._backward(grad, log_z.detach(), vectors.detach(), ratios, valid, *saved, *how)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reduction", functional.REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype, reduction):
    vectors, ratios = make_inputs(2, 30, 8, 2, dtype)
    valid = torch.ones(2, 30, dtype=torch.bool)
    how = ([*PAPER], reduction, "auto")
    torch.library.opcheck(pdcr.pdcr_forward, (vectors.requires_grad_(), ratios, valid, *how))
    loss, log_z, *saved = pdcr.pdcr_forward(vectors.detach(), ratios, None, *how)
    torch.library.opcheck(
        pdcr.pdcr_backward, (torch.ones_like(loss), log_z, vectors.detach(), ratios, None, *saved, *how)
    )


def test_second_derivatives_raise():
    vectors, ratios = make_inputs(1, 20, 8, 2, torch.float32)
    vectors.requires_grad_()
    loss, *_ = pdcr.pdcr_forward(vectors, ratios, None, [*PAPER], "mean", "auto")
    (gradient,) = torch.autograd.grad(loss, vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        gradient.square().sum().backward()


def test_autocast_leaves_products_in_fp32():
    vectors, ratios = make_inputs(1, 300, 32, 2, torch.float32)
    expected = loss_and_gradient("op", vectors, ratios, None, PAPER, torch.ones(1))
    default = loss_and_gradient("default", vectors, ratios, None, PAPER, torch.ones(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_and_gradient("op", vectors, ratios, None, PAPER, torch.ones(1))
        default_inside = loss_and_gradient("default", vectors, ratios, None, PAPER, torch.ones(1))
    for a, e in zip((*inside, *default_inside), (*expected, *default), strict=True):
        assert torch.equal(a, e)


_CAPABILITY_CHECK = """
import torch
import test_pdcr as t
for name, affinity in t.AFFINITIES.items():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        vectors, ratios = t.make_inputs(2, 205, 37, 3, dtype, categorical=affinity.categorical)
        if dtype == torch.float64:
            t.test_fp64_agrees_to_rounding(name)
        else:
            t.assert_as_exact_as_plain(vectors, ratios, None, affinity)
"""


@needs_extension
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_other_vector_code(capability):
    """The binary's other kernels, where this machine would choose better ones."""
    environment = {
        **os.environ,
        "CONTRASTSEG_FAST_CPU": capability,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(
        [sys.executable, "-c", _CAPABILITY_CHECK],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
