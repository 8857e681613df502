"""Samplers cover the map evenly and without repetition; gathering is indexing with an exact gradient."""

from __future__ import annotations

import doctest
import gc
import math
import weakref

import pytest
import torch

from contrastseg_fast import sampling
from contrastseg_fast.sampling import gather_vectors, sample, sample_grid, sample_random, sample_raster

SHAPES = [(1, 1), (64, 64), (5, 7), (256, 3), (1000, 1), (4, 128, 128), (2, 96, 64), (13, 17, 19)]


def flat(indices: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    position = torch.zeros(len(indices), dtype=torch.int64)
    for axis, extent in enumerate(shape):
        position = position * extent + indices[:, axis]
    return position


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_samples", [1, 10, 1000, 10**7, None])
def test_samples_are_distinct_and_inside(
    sampler: str, shape: tuple[int, ...], num_samples: int | None
) -> None:
    indices = sample(sampler, shape, num_samples)
    total = math.prod(shape)
    wanted = total if num_samples is None else min(num_samples, total)
    assert indices.dtype == torch.int64
    assert indices.shape[1] == len(shape)
    assert (indices >= 0).all()
    assert (indices < torch.tensor(shape)).all()
    position = flat(indices, shape)
    assert len(position.unique()) == len(indices)
    if sampler == "grid" and wanted < total:
        assert 0.6 * wanted < len(indices) <= wanted
    else:
        assert len(indices) == wanted
    if sampler != "random" or num_samples is None:
        assert (position.diff() > 0).all()


@pytest.mark.parametrize(
    ("shape", "num_samples", "counts"),
    [
        ((128, 128), 1024, (32, 32)),
        ((512, 512), 1000, (32, 31)),
        ((128, 32), 256, (32, 8)),
        ((32, 32, 32), 1000, (10, 10, 10)),
        ((4, 128, 128), 1024, (1, 32, 32)),
        ((16, 64, 64), 1024, (4, 16, 16)),
    ],
)
def test_grid_steps_are_as_equal_as_the_shape_allows(
    shape: tuple[int, ...], num_samples: int, counts: tuple[int, ...]
) -> None:
    indices = sample_grid(shape, num_samples)
    assert tuple(len(axis.unique()) for axis in indices.unbind(1)) == counts


@pytest.mark.parametrize("shape", [(64, 64), (37, 50), (4, 40, 33)])
@pytest.mark.parametrize("num_samples", [7, 100, 777])
def test_grid_is_centred_with_even_steps(shape: tuple[int, ...], num_samples: int) -> None:
    for axis, extent in zip(sample_grid(shape, num_samples).unbind(1), shape, strict=True):
        points = axis.unique()
        steps = points.diff()
        assert steps.numel() == 0 or steps.max() - steps.min() <= 1
        assert abs(points[0] - (extent - 1 - points[-1])) <= 1


def test_raster_walks_the_map_row_after_row_in_even_steps() -> None:
    steps = flat(sample_raster((9, 11), 30), (9, 11)).diff()
    assert set(steps.tolist()) == {3, 4}


def test_random_draws_follow_the_generator_and_change() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (sample_random((40, 40), 64, generator=generator) for _ in range(2))
    again = sample_random((40, 40), 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_an_empty_map_has_no_samples(sampler: str) -> None:
    assert sample(sampler, (0, 5), 10).shape == (0, 2)


@pytest.mark.parametrize(
    ("shape", "num_samples", "error", "message"),
    [
        ((8, 8), 0, ValueError, "num_samples: expected an integer of at least 1, got 0"),
        ((8, 8), 3.5, TypeError, "num_samples: expected an integer, got float"),
        ((8, -1), 4, ValueError, "spatial_shape: expected an integer of at least 0, got -1"),
        ((8, 2.0), 4, TypeError, "spatial_shape: expected an integer, got float"),
    ],
)
@pytest.mark.parametrize("sampler", [sample_grid, sample_random, sample_raster])
def test_bad_input_is_named(
    sampler: object, shape: tuple, num_samples: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sampler(shape, num_samples)


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(ValueError, match="sampler: expected one of 'grid', 'random', 'raster', got 'hex'"):
        sample("hex", (4, 4), 4)


LAYOUTS = ["contiguous", "channels_last", "cropped", "expanded"]


def feature_map(layout: str, dims: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (2, 5, 6, 7, 4)[: dims + 2]
    match layout:
        case "contiguous":
            return torch.randn(shape, dtype=dtype)
        case "channels_last":
            last = torch.channels_last if dims == 2 else torch.channels_last_3d
            return torch.randn(shape, dtype=dtype).to(memory_format=last)
        case "cropped":
            return torch.randn(2, 9, 8, *shape[3:], dtype=dtype)[:, 2:7, 1:7]
        case _:
            return torch.randn(1, *shape[1:], dtype=dtype).expand(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [2, 3])
def test_gather_equals_indexing_and_so_does_its_gradient(layout: str, dims: int) -> None:
    features = feature_map(layout, dims, torch.float64).requires_grad_()
    indices = sample_random(features.shape[2:], 11)
    vectors = gather_vectors(features, indices)
    at_indices = (slice(None), slice(None), *indices.unbind(1))
    expected = features[at_indices].mT
    assert torch.equal(vectors, expected)
    upstream = torch.randn(1, 1, 1, dtype=torch.float64).expand_as(vectors)
    (grad,) = torch.autograd.grad(vectors, features, upstream)
    (expected_grad,) = torch.autograd.grad(expected, features, upstream)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gather_passes_gradcheck_twice(layout: str) -> None:
    features = feature_map(layout, 2, torch.float64).requires_grad_()
    indices = sample_random(features.shape[2:], 5)
    torch.autograd.gradcheck(lambda x: gather_vectors(x, indices), features)
    torch.autograd.gradgradcheck(lambda x: gather_vectors(x, indices), features)


def test_gradient_of_gather_keeps_the_memory_format() -> None:
    features = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    gather_vectors(features, sample_grid((6, 6), 9)).sum().backward()
    assert features.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gather_keeps_the_dtype(dtype: torch.dtype) -> None:
    features = torch.randn(1, 3, 4, 4, dtype=dtype, requires_grad=True)
    vectors = gather_vectors(features, sample_grid((4, 4), None))
    vectors.backward(torch.ones_like(vectors))
    assert vectors.dtype == dtype
    assert torch.equal(features.grad, torch.ones_like(features))


def test_gather_keeps_no_map_alive_and_stands_in_place_changes() -> None:
    source = torch.randn(1, 3, 32, 32, requires_grad=True)
    features = source * 2
    vectors = gather_vectors(features, sample_grid((32, 32), 16))
    before = vectors.detach().clone()
    features.relu_()
    assert torch.equal(vectors, before)
    alive = weakref.ref(features)
    del features
    gc.collect()
    assert alive() is None
    vectors.sum().backward()
    assert source.grad.sum().item() == 2 * 3 * 16


def test_gather_of_nothing() -> None:
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    vectors = gather_vectors(features, torch.empty(0, 2, dtype=torch.int64))
    assert vectors.shape == (2, 0, 3)
    vectors.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_gather_compiles_whole() -> None:
    features = torch.randn(2, 3, 8, 8, requires_grad=True)

    def squares(x: torch.Tensor) -> torch.Tensor:
        return gather_vectors(x, sample_grid(x.shape[2:], 9)).square().sum()

    squares(features).backward()
    expected, features.grad = features.grad, None
    torch.compile(squares, fullgraph=True, backend="aot_eager")(features).backward()
    torch.testing.assert_close(features.grad, expected)


def test_examples() -> None:
    assert doctest.testmod(sampling).failed == 0
