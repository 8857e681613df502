"""NT-Xent: the operator and the function against Eqs. 1 and 2 in fp64, awkward inputs, and errors."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import normwise_error
from torch import Tensor

from contrastseg_fast import functional, reference
from contrastseg_fast.functional import nt_xent_loss
from contrastseg_fast.ops import nt_xent, pdcr


def two_views(*shape: int, dtype: torch.dtype = torch.float32, noise: float = 1.0) -> Tensor:
    """Vectors `(2, *shape)` of two views, alike up to `noise`."""
    return (torch.randn(1, *shape) + noise * torch.randn(2, *shape)).to(dtype)


def loss_and_gradient(loss: Any, views: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = views.detach().requires_grad_()
    value = loss(leaf[0], leaf[1], **options)
    weights = torch.linspace(1, 2, max(value.numel(), 1), dtype=value.dtype)[: value.numel()]
    (gradient,) = torch.autograd.grad(value, leaf, weights.view(value.shape))
    return value.detach(), gradient


def loss_by_loops(a: list[list[float]], b: list[list[float]], temperature: float) -> float:
    """Eq. 2, summed pair by pair."""
    vectors = a + b

    def exponential(i: int, j: int) -> float:
        product = sum(x * y for x, y in zip(vectors[i], vectors[j], strict=True))
        return math.exp(product / (math.hypot(*vectors[i]) * math.hypot(*vectors[j])) / temperature)

    total = 0.0
    for i in range(len(vectors)):
        positive = exponential(i, (i + len(a)) % len(vectors))
        total -= math.log(positive / sum(exponential(i, k) for k in range(len(vectors)) if k != i))
    return total / len(vectors)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0])
def test_both_paths_agree_with_the_sums_of_the_paper(temperature: float) -> None:
    a, b = two_views(7, 3, dtype=torch.float64)
    expected = loss_by_loops(a.tolist(), b.tolist(), temperature)
    for loss in (nt_xent_loss, reference.nt_xent_loss):
        assert loss(a, b, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 37, 6), (2, 129, 33), (70, 17), (1, 2, 2), (0, 4, 3), (2, 0, 3)])
@pytest.mark.parametrize("reduction", functional.REDUCTIONS)
@pytest.mark.parametrize("temperature", [0.003, 0.07, 0.5, 1e4])
def test_it_agrees_with_the_reference(shape: tuple[int, ...], reduction: str, temperature: float) -> None:
    views = two_views(*shape, dtype=torch.float64)
    options = {"reduction": reduction, "temperature": temperature}
    value, gradient = loss_and_gradient(nt_xent_loss, views, **options)
    expected_value, expected_gradient = loss_and_gradient(reference.nt_xent_loss, views, **options)
    torch.testing.assert_close(value, expected_value, rtol=1e-11, atol=1e-11)
    # Where the positive's share nears 1, the reference's gradient is the small difference of both.
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-13 / temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.5])
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
def test_it_is_as_exact_as_plain_pytorch(dtype: torch.dtype, temperature: float, noise: float) -> None:
    """The more alike the views, the smaller the gradient that is left of the softmax and the positive."""
    views = two_views(131, 24, dtype=dtype, noise=noise)
    value, gradient = loss_and_gradient(nt_xent_loss, views, temperature=temperature)
    exact = loss_and_gradient(reference.nt_xent_loss, views.double(), temperature=temperature)
    plain = loss_and_gradient(reference.nt_xent_loss, views, temperature=temperature)
    rounding = torch.finfo(torch.float32).eps * max(4, 1 / temperature)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert normwise_error(value, exact[0]) <= 2 * normwise_error(plain[0], exact[0]) + rounding
    if exact[1].abs().max() > 10 * torch.finfo(dtype).tiny:
        assert normwise_error(gradient, exact[1]) <= 2 * normwise_error(plain[1], exact[1]) + rounding


@pytest.mark.parametrize("noise", [0.1, 0.01])
def test_nearly_opposite_vectors_keep_their_small_sums(noise: float) -> None:
    """All other vectors are far away, so that the sum of exponentials is tiny against the self pair's."""
    direction = torch.randn(9)
    views = torch.stack([direction, -direction])[:, None] + noise * torch.randn(2, 1, 9)
    views = torch.cat([views, views.flip(0)], 1)  # positives opposite, one negative near
    value, gradient = loss_and_gradient(nt_xent_loss, views, temperature=0.05)
    exact = loss_and_gradient(reference.nt_xent_loss, views.double(), temperature=0.05)
    assert normwise_error(value, exact[0]) < 1e-5
    assert normwise_error(gradient, exact[1]) < 1e-4


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_image_has_nothing_to_be_told_from(sign: float) -> None:
    x = torch.randn(1, 5)
    value, gradient = loss_and_gradient(nt_xent_loss, torch.stack([x, sign * x + 0.01]), temperature=0.01)
    assert value.item() == 0
    assert (gradient == 0).all()


def test_zero_vectors_have_cosine_0_and_gradient_0() -> None:
    views = two_views(2, 41, 8, dtype=torch.float64)
    views[0, 0, ::5] = 0
    views[:, 1, 7] = 0
    value, gradient = loss_and_gradient(nt_xent_loss, views, temperature=0.1)
    expected = loss_and_gradient(reference.nt_xent_loss, views, temperature=0.1)
    torch.testing.assert_close((value, gradient), expected, rtol=1e-9, atol=1e-12)
    assert (gradient[views.eq(0).all(-1)] == 0).all()
    nothing = nt_xent_loss(torch.zeros(6, 3), torch.zeros(6, 3))
    assert nothing.item() == pytest.approx(math.log(11))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_lengths_do_not_matter(size: float) -> None:
    views = two_views(33, 8)
    value, gradient = loss_and_gradient(nt_xent_loss, views)
    scaled = views.clone()
    scaled[0, ::2] *= size
    scaled_value, scaled_gradient = loss_and_gradient(nt_xent_loss, scaled)
    torch.testing.assert_close(scaled_value, value)
    torch.testing.assert_close(scaled_gradient[0, ::2].double() * size, gradient[0, ::2].double())
    torch.testing.assert_close(scaled_gradient[:, 1::2], gradient[:, 1::2])


def test_groups_are_contrasted_among_themselves() -> None:
    a, b = two_views(3, 19, 6, dtype=torch.float64)
    alone = torch.stack([nt_xent_loss(x, y) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(nt_xent_loss(a, b, reduction="none"), alone)
    torch.testing.assert_close(nt_xent_loss(a, b), alone.mean())
    torch.testing.assert_close(nt_xent_loss(a, b, reduction="sum"), alone.sum() * 38)
    assert nt_xent_loss(a[0], b[0], reduction="none").ndim == 0


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_pdcrs_default_kernels_serve_too(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    views = two_views(2, 45, 7, dtype=torch.float64)
    expected = loss_and_gradient(nt_xent_loss, views, temperature=temperature)
    monkeypatch.setattr(nt_xent, "pdcr_forward", pdcr._forward)
    monkeypatch.setattr(nt_xent, "pdcr_backward", pdcr._backward)
    actual = loss_and_gradient(nt_xent_loss, views, temperature=temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


def test_strided_views_and_an_expanded_gradient() -> None:
    views = two_views(2, 21, 6)
    strided = views.mT.contiguous().mT
    expected = loss_and_gradient(nt_xent_loss, views, reduction="none")
    torch.testing.assert_close(loss_and_gradient(nt_xent_loss, strided, reduction="none"), expected)
    leaf = views.clone().requires_grad_()
    loss = nt_xent_loss(leaf[0], leaf[1], reduction="none")
    (expanded,) = torch.autograd.grad(loss, leaf, torch.tensor(0.7).expand(2), retain_graph=True)
    torch.testing.assert_close(expanded, torch.autograd.grad(loss, leaf, torch.full((2,), 0.7))[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_not_hidden(value: float) -> None:
    a, b = two_views(2, 9, 3)
    a[0, 4, 1] = value
    assert nt_xent_loss(a, b, reduction="none").isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    vectors = torch.randn(2, 26, 5).to(dtype)
    torch.library.opcheck(nt_xent.nt_xent_forward, (vectors.requires_grad_(), 0.5, "auto"))
    loss, log_n, *saved = nt_xent.nt_xent_forward(vectors.detach(), 0.5, "auto")
    torch.library.opcheck(
        nt_xent.nt_xent_backward, (torch.ones_like(loss), log_n, vectors.detach(), *saved, 0.5, "auto")
    )


def test_gradcheck() -> None:
    vectors = torch.randn(2, 14, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: nt_xent.nt_xent_forward(v, 0.2, "auto")[0], (vectors,))


def test_second_derivatives_raise() -> None:
    views = two_views(9, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(nt_xent_loss(views[0], views[1]), views, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.square().sum().backward()


def test_autocast_leaves_products_in_fp32() -> None:
    views = two_views(150, 16)
    expected = loss_and_gradient(nt_xent_loss, views)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss_and_gradient(nt_xent_loss, views)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


_PEAK_OF_A_LARGE_BATCH = """
import resource, torch
from contrastseg_fast.functional import nt_xent_loss
views = torch.randn(2, 6000, 4, requires_grad=True)
nt_xent_loss(*views[:, :8]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nt_xent_loss(*views).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_pairs_are_never_stored() -> None:
    """12000^2 pairs in fp32 are 576 MB; the vectors and a chunk of pairs are far less."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PEAK_OF_A_LARGE_BATCH]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 12000**2 * 4 / 2


VIEW = torch.ones(2, 5, 3)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"a": [1.0]}, TypeError, "a: expected a tensor (B, C) or (G, B, C), got list"),
        ({"a": VIEW[0, 0]}, ValueError, "a: expected a tensor (B, C) or (G, B, C), got shape (3,)"),
        ({"b": None}, TypeError, "b: expected a tensor (B, C) or (G, B, C), got NoneType"),
        ({"b": VIEW[0]}, ValueError, "b: expected shape (2, 5, 3) (that of a), got (5, 3)"),
        ({"b": VIEW[:, :4]}, ValueError, "b: expected shape (2, 5, 3) (that of a), got (2, 4, 3)"),
        ({"a": VIEW.long()}, TypeError, "a: expected dtype float32 or bfloat16 or float16 or float64, got"),
        ({"b": VIEW.half()}, TypeError, "b: expected dtype float32, got torch.float16"),
        ({"b": VIEW.to("meta")}, ValueError, "b: expected device cpu, where a is, got meta"),
        ({"a": VIEW[..., :0], "b": VIEW[..., :0]}, ValueError, "a: expected at least one channel, got shape"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive, finite number, got 0.0"),
        ({"temperature": None}, TypeError, "temperature: expected a number, got NoneType"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of 'none', 'mean', 'sum', got 'max'"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
        ({"backend": "triton"}, ValueError, "backend='triton' expects CUDA tensors, got cpu tensors"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        nt_xent_loss(**{"a": VIEW, "b": VIEW, **changed})


def test_the_reference_is_a_backend() -> None:
    a, b = two_views(2, 13, 4)
    for reduction in functional.REDUCTIONS:
        expected = reference.nt_xent_loss(a, b, reduction=reduction, temperature=0.2)
        actual = nt_xent_loss(a, b, reduction=reduction, temperature=0.2, backend="reference")
        assert torch.equal(actual, expected)


def test_it_compiles_into_one_graph() -> None:
    views = two_views(2, 17, 5)
    compiled = torch.compile(nt_xent_loss, backend="aot_eager", fullgraph=True)
    expected = loss_and_gradient(nt_xent_loss, views, temperature=0.1)
    torch.testing.assert_close(loss_and_gradient(compiled, views, temperature=0.1), expected)
