"""The entropy gate on the GPU against the float64 reference, and its guarantees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contrastseg_fast import functional
from gpu.oracle import (
    assert_gate_as_exact_as_plain,
    channels_last,
    gate_results,
    normwise_error,
    strided,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "pixels": (2, 21, 9, 15),
    "voxels": (2, 8, 5, 3, 11),
    "whole vectors": (2, 32, 64, 64),
    "long rows": (1, 5, 41, 401),
    "one channel": (3, 1, 7, 5),
    "many channels": (2, 2048, 4, 3),
    "one location": (2, 33, 1, 1),
    "many images": (70, 4, 3, 3),
    "no location": (2, 3, 0, 4),
    "no image": (0, 3, 4, 4),
}


LAYOUTS = {"contiguous": Tensor.contiguous, "channels_last": channels_last, "strided": strided}


def make_inputs(
    device: torch.device, shape: tuple[int, ...], classes: int, dtype: torch.dtype, scale: float = 3.0
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Features, logits, and the gradients of the gated features and of the uncertainty."""
    features = torch.randn(shape, device=device).to(dtype)
    logits = (scale * torch.randn(shape[0], classes, *shape[2:], device=device)).to(dtype)
    grads = torch.randn(shape, device=device).to(dtype), torch.randn(shape[0], 1, *shape[2:], device=device)
    return features, logits, grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(device, gate_backend: str, determinism: str, shape, layout, dtype) -> None:
    features, logits, grads = make_inputs(device, shape, 3, dtype)
    actual = assert_gate_as_exact_as_plain(
        layout(features), layout(logits), (layout(grads[0]), layout(grads[1])), gate_backend
    )
    if layout is channels_last and 0 not in shape:
        gated = actual[0]
        assert gated.is_contiguous() or channels_last(gated).stride() == gated.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("classes", [2, 3, 5, 19, 128])
def test_any_number_of_classes(device, gate_backend: str, classes: int, layout, dtype) -> None:
    features, logits, grads = make_inputs(device, (2, 12, 17, 23), classes, dtype)
    assert_gate_as_exact_as_plain(layout(features), layout(logits), grads, gate_backend)


@pytest.mark.parametrize("features_dtype", DTYPES)
@pytest.mark.parametrize("logits_dtype", DTYPES)
def test_mixed_dtypes(device, gate_backend: str, features_dtype, logits_dtype) -> None:
    features, logits, grads = make_inputs(device, (2, 24, 10, 13), 4, torch.float32)
    assert_gate_as_exact_as_plain(features.to(features_dtype), logits.to(logits_dtype), grads, gate_backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_layouts(device, gate_backend: str, dtype) -> None:
    features, logits, grads = make_inputs(device, (2, 24, 10, 13), 4, dtype)
    assert_gate_as_exact_as_plain(channels_last(features), logits, grads, gate_backend)
    assert_gate_as_exact_as_plain(features, channels_last(logits), grads, gate_backend)
    gradient = channels_last(grads[0]), grads[1]
    assert_gate_as_exact_as_plain(features, logits, gradient, gate_backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_certain_and_undecided_locations(device, gate_backend: str, dtype) -> None:
    """One-hot and constant logits, and a class ruled out by -inf, give no NaN."""
    features = torch.randn(1, 8, 2, 4, device=device).to(dtype)
    logits = torch.zeros(1, 3, 2, 4, device=device)
    logits[0, 0, 0, 1:] = torch.tensor([50.0, 1e4, 3e4], device=device)
    logits[0, 1, 1, :2] = -torch.inf
    grads = torch.ones_like(features), torch.ones(1, 1, 2, 4, device=device)
    gated, u, *gradients = gate_results(features, logits.to(dtype), grads, gate_backend)
    for result in (gated, u, *gradients):
        assert torch.isfinite(result).all()
    assert u.flatten()[0].item() == pytest.approx(1, abs=1e-6)
    assert u.flatten()[2:4].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert u.flatten()[4].item() == pytest.approx(0.6309, abs=1e-3)


def test_nan_shows_where_it_is(device, gate_backend: str) -> None:
    features, logits, grads = make_inputs(device, (1, 8, 6, 6), 3, torch.float32)
    logits[0, 1, 2, 3] = torch.nan
    gated, u, *_ = gate_results(features, logits, grads, gate_backend)
    assert u.isnan().nonzero().tolist() == [[0, 0, 2, 3]]
    assert gated.isnan().any(1).nonzero().tolist() == [[0, 2, 3]]


def test_expanded_gradients(device, gate_backend: str) -> None:
    features, logits, _ = make_inputs(device, (2, 8, 9, 7), 3, torch.float32)
    one = torch.ones((), device=device)
    grads = one.expand(features.shape), one.expand(2, 1, 9, 7)
    assert_gate_as_exact_as_plain(features, logits, grads, gate_backend)
    assert_gate_as_exact_as_plain(features[:1].expand(2, -1, -1, -1), logits, grads, gate_backend)


@pytest.mark.parametrize("wanted", ["features", "logits"])
def test_one_gradient_alone(device, gate_backend: str, wanted: str) -> None:
    features, logits, grads = make_inputs(device, (2, 8, 9, 7), 3, torch.float32)
    both = gate_results(features, logits, (grads[0], torch.zeros_like(grads[1])), gate_backend)
    leaf = (features if wanted == "features" else logits).requires_grad_()
    gated = functional.entropy_gate(features, logits, backend=gate_backend)
    (gradient,) = torch.autograd.grad(gated, leaf, grads[0])
    assert normwise_error(gradient, both[2 if wanted == "features" else 3]) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
def test_equal_bits(device, gate_backend: str, deterministic, layout, dtype) -> None:
    features, logits, grads = make_inputs(device, (2, 40, 33, 35), 3, dtype)
    first = gate_results(layout(features), layout(logits), grads, gate_backend)
    for _ in range(4):
        again = gate_results(layout(features), layout(logits), grads, gate_backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
def test_offsets_beyond_32_bits(cuda, gate_backend: str, layout) -> None:
    shape = (3, 96, 2048, 3700)
    if torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("needs 45 GB of free memory")
    features = torch.ones(shape, dtype=torch.bfloat16, device=cuda)
    assert features.numel() > 2**31
    features = layout(features)
    features[-1, :, -1, -64:] = torch.randn(96, 64, device=cuda).bfloat16()
    logits = torch.randn(3, 2, *shape[2:], dtype=torch.bfloat16, device=cuda)
    leaf = features.requires_grad_()
    gated, u = functional.entropy_gate(leaf, logits, return_uncertainty=True, backend=gate_backend)
    (gradient,) = torch.autograd.grad(gated, leaf, torch.ones((), device=cuda).bfloat16().expand(shape))
    end = (slice(2, 3), slice(None), slice(-1, None), slice(-64, None))
    exact = functional.entropy_gate(
        features.detach()[end].double(), logits[end].double(), backend="reference"
    )
    assert normwise_error(gated.detach()[end], exact) < 4e-3
    weight = (2 - u[end]).expand_as(gradient[end])
    assert normwise_error(gradient[end], weight) < 4e-3


def test_second_derivatives_raise(device, gate_backend: str) -> None:
    features, logits, _ = make_inputs(device, (1, 4, 5, 5), 3, torch.float32)
    gated = functional.entropy_gate(features.requires_grad_(), logits, backend=gate_backend)
    (gradient,) = torch.autograd.grad(gated.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        gradient.square().sum().backward()
