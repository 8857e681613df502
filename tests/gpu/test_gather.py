"""Vectors taken out of feature maps on the GPU, and the maps' dense gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contrastseg_fast import _backend, sampling
from contrastseg_fast.sampling import gather_vectors
from gpu.oracle import any_order, channels_last, normwise_error, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "pixels": (2, 21, 9, 15),
    "voxels": (2, 8, 5, 3, 11),
    "one channel": (3, 1, 37, 5),
    "many channels": (1, 2048, 6, 7),
    "one place": (2, 33, 1, 1),
}


def take(features: Tensor, indices: Tensor) -> Tensor:
    return features[(slice(None), slice(None), *indices.unbind(1))].mT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last, strided])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_vectors_and_gradients(
    device, determinism: str, shape: tuple[int, ...], repeated: bool, layout, dtype
) -> None:
    """Places taken several times add up, in fp32; all others get 0."""
    features = layout(torch.randn(shape, device=device).to(dtype))
    count = 70 if repeated else max(1, features[0, 0].numel() // 2)
    order = torch.randperm(features[0, 0].numel(), device=device)
    if repeated:
        order = torch.randint(features[0, 0].numel(), (count,), device=device)
    indices = torch.stack(torch.unravel_index(order[:count], shape[2:]), -1)
    grad = torch.randn(shape[0], count, shape[1], device=device).to(dtype)
    leaf = features.detach().requires_grad_()
    vectors = gather_vectors(leaf, indices)
    (gradient,) = torch.autograd.grad(vectors, leaf, grad)
    with any_order():
        exact = features.double().requires_grad_()
        (expected,) = torch.autograd.grad(take(exact, indices), exact, grad.double())
    assert torch.equal(vectors, take(features, indices))
    assert gradient.dtype == dtype
    if repeated:
        assert normwise_error(gradient, expected) <= 4 * torch.finfo(dtype).eps
        assert not gradient[expected == 0].any()
    else:
        assert torch.equal(gradient.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last, strided])
@pytest.mark.parametrize("sampler", ["grid", "raster"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_planned_vectors_and_gradients(device, sampler: str, shape: tuple[int, ...], layout, dtype) -> None:
    features = layout(torch.randn(shape, device=device).to(dtype)).requires_grad_()
    places = sampling.place(sampler, shape[2:], 20, None, device)
    vectors = sampling.gather_at(features, places, "auto")
    expected = take(features, places.indices)
    assert torch.equal(vectors, expected)
    grad = torch.randn_like(vectors)
    with any_order():
        (exact,) = torch.autograd.grad(expected, features, grad)
    assert torch.equal(torch.autograd.grad(vectors, features, grad)[0], exact)


def test_a_map_whose_numbers_need_64_bits(device, fit) -> None:
    extent = fit(256, 12)
    features = torch.arange(extent**3, dtype=torch.float64, device=device).view(1, 1, extent, extent, extent)
    features.requires_grad_()
    places = sampling.place("raster", tuple(features.shape[2:]), 4096, None, device)
    vectors = sampling.gather_at(features, places, "auto")
    assert torch.equal(vectors.flatten().long(), places.positions)
    (gradient,) = torch.autograd.grad(vectors, features, vectors + 1)
    assert torch.equal(gradient.flatten()[places.positions], vectors.flatten() + 1)
    assert gradient.count_nonzero() == vectors.numel()


def test_gradients_of_several_maps_in_one_launch(device) -> None:
    if reason := _backend.unavailable("triton", device):
        pytest.skip(reason)
    from contrastseg_fast.kernels.gather import gather_vectors_backward, scatter_gradients

    grads, given, plans, shapes, last, expected = [], [], [], [], [], []
    for layer, shape in enumerate((*SHAPES.values(), *SHAPES.values())):
        sampler = ("grid", "random", "raster")[layer % 3]
        places = sampling.place(sampler, shape[2:], 20, None, device)
        plan = [] if places.plan is None else places.plan.numbers
        grads.append(
            torch.randn(shape[0], len(places.positions), shape[1], device=device).to(DTYPES[layer % 3])
        )
        given.append(places.given)
        plans.append(places.plan)
        shapes.append(shape)
        last.append(layer % 2 == 1)
        expected.append(gather_vectors_backward(grads[-1], places.given, plan, shape, last[-1]))
    results = scatter_gradients(grads, given, plans, shapes, last)
    for result, single, shape, is_last in zip(results, expected, shapes, last, strict=True):
        assert result.shape == shape
        assert (result.movedim(1, -1) if is_last else result).is_contiguous()
        assert torch.equal(result, single)


def test_strided_gradients_and_no_vectors(device) -> None:
    features = torch.randn(2, 5, 6, 7, device=device, requires_grad=True)
    indices = torch.tensor([[1, 2], [5, 6]], device=device)
    (gradient,) = torch.autograd.grad(gather_vectors(features, indices).sum(), features)
    assert gradient.sum() == 2 * 2 * 5
    none = gather_vectors(features, indices[:0])
    assert none.shape == (2, 0, 5)
    (gradient,) = torch.autograd.grad(none.sum(), features)
    assert not gradient.any()


def test_equal_bits(device, deterministic) -> None:
    features = torch.randn(2, 40, 16, 16, device=device, requires_grad=True)
    indices = torch.randint(16, (900, 2), device=device)
    grad = torch.randn(2, 900, 40, device=device)
    first = torch.autograd.grad(gather_vectors(features, indices), features, grad)[0]
    for _ in range(4):
        assert torch.equal(torch.autograd.grad(gather_vectors(features, indices), features, grad)[0], first)
