"""Gathering vectors: both kernels against indexing and its gradient, at planned and at given positions."""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from contrastseg_fast import _backend
from contrastseg_fast.ops import gather as ops
from contrastseg_fast.sample_plan import SamplePlan

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # of the map, and the number of vectors
    "2d": ((2, 5, 9, 11), 23),
    "3d": ((2, 70, 4, 5, 6), 40),
    "one channel": ((3, 1, 8, 8), 10),
    "one position": ((2, 33, 1, 1), 1),
    "aligned": ((1, 64, 8, 16), 32),
    "every vector": ((1, 17, 7, 13), 91),
    "flat": ((1, 40, 1, 9, 20), 30),
    "one vector": ((2, 3, 4, 6, 5), 1),
}
PLACES = ("given", "grid", "raster")
LAYOUTS = ("contiguous", "channels_last", "cropped", "expanded", "some channels")


def _kernels():
    pytest.importorskip("triton")
    if not (torch.cuda.is_available() or _backend.interpreting()):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    from contrastseg_fast.kernels import gather

    return gather.gather_vectors, gather.gather_vectors_backward


@pytest.fixture(params=["default", "triton"])
def implementation(request):
    """Forward and backward function, and the device they run on."""
    if request.param == "default":
        return ops._gather, ops._backward, "cpu"
    return *_kernels(), DEVICE


def feature_map(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    match layout:
        case "contiguous":
            return torch.randn(shape).to(dtype)
        case "channels_last":
            return torch.randn(shape[0], *shape[2:], shape[1]).to(dtype).movedim(-1, 1)
        case "cropped":
            return torch.randn(*shape[:2], *(extent + 2 for extent in shape[2:])).to(dtype)[
                (slice(None), slice(None), *(slice(1, 1 + extent) for extent in shape[2:]))
            ]
        case "expanded":
            return torch.randn(1, *shape[1:]).to(dtype).expand(shape)
        case _:
            return torch.randn(shape[0], 2 * shape[1], *shape[2:]).to(dtype)[:, ::2]


def positions(shape: tuple[int, ...], count: int) -> Tensor:
    return torch.randperm(math.prod(shape[2:]))[:count]


class Places(NamedTuple):
    """What the operators take, `given` and `plan`, and the positions that both mean."""

    given: Tensor | None
    plan: list[int]
    positions: Tensor


def make_places(kind: str, shape: tuple[int, ...], count: int) -> Places:
    if kind == "given":
        position = positions(shape, count).to(DEVICE)
        return Places(position, [], position)
    plan = SamplePlan.make(kind, shape[2:], count)
    return Places(None, plan.numbers, plan.positions(torch.device(DEVICE)))


def scattered_exactly(grad: Tensor, position: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The dense gradient in fp64."""
    dense = torch.zeros(shape, dtype=torch.float64).flatten(2)
    for n, where in enumerate(position.tolist()):
        dense[:, :, where] += grad[:, n].double()
    return dense.view(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", PLACES)
def test_vectors_are_those_of_the_map(implementation, kind: str, shape: str, layout: str) -> None:
    forward, _, device = implementation
    extents, count = SHAPES[shape]
    places = make_places(kind, extents, count)
    for dtype in DTYPES if shape == "2d" else (torch.float32,):
        features = feature_map(layout, extents, dtype).to(device)
        vectors = forward(features, places.given, places.plan)
        assert vectors.is_contiguous()
        assert torch.equal(vectors, features.flatten(2)[:, :, places.positions].mT)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", PLACES)
def test_the_gradient_is_dense_and_exact(implementation, kind: str, shape: str, channels_last: bool) -> None:
    _, backward, device = implementation
    extents, count = SHAPES[shape]
    places = make_places(kind, extents, count)
    for dtype in DTYPES if shape == "2d" else (torch.float32,):
        grad = torch.randn(extents[0], len(places.positions), extents[1]).to(dtype)
        actual = backward(grad.to(device), places.given, places.plan, list(extents), channels_last)
        assert actual.dtype == dtype
        assert (actual.movedim(1, -1) if channels_last else actual).is_contiguous()
        assert torch.equal(actual.cpu().double(), scattered_exactly(grad, places.positions, extents))


@pytest.mark.parametrize("kinds", [("grid", "raster"), PLACES, (*PLACES, *PLACES, *PLACES)], ids=len)
def test_gradients_of_several_maps_are_those_of_each(kinds: tuple[str, ...]) -> None:
    """In other dtypes, shapes and memory formats, one of them empty."""
    backward, kernels = _kernels()[1], importlib.import_module("contrastseg_fast.kernels.gather")
    sizes = [*SHAPES.values(), ((0, 3, 4, 4), 5)]
    grads, given, plans, shapes, channels_last, expected = [], [], [], [], [], []
    for layer, kind in enumerate(kinds):
        shape, count = sizes[-1 - layer % len(sizes)]
        places = make_places(kind, shape, count)
        grads.append(torch.randn(shape[0], len(places.positions), shape[1]).to(DEVICE, DTYPES[layer % 4]))
        given.append(places.given)
        plans.append(SamplePlan.from_numbers(places.plan) if places.given is None else None)
        shapes.append(shape)
        channels_last.append(layer % 3 == 1)
        expected.append(backward(grads[-1], places.given, places.plan, shape, channels_last[-1]))
    results = kernels.scatter_gradients(grads, given, plans, shapes, channels_last)
    for result, single in zip(results, expected, strict=True):
        assert result.dtype == single.dtype
        assert result.stride() == single.stride()
        assert torch.equal(result, single)


PLANNED = [(1, 1), (1, 7), (5, 7), (64, 3), (4, 12, 9), (1, 16, 16), (13, 1, 11), (2, 3, 5), (30,), (37, 41)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("sampler", ["grid", "raster"])
def test_kernels_compute_planned_positions_and_their_inverse(sampler: str, dtype: torch.dtype) -> None:
    """For many numbers of samples, at every position of many maps."""
    _kernels()
    from plan_kernels import compute

    def rows(plan: SamplePlan, results: Tensor) -> Tensor:
        numbers = torch.tensor(plan.three().numbers)[:, None].expand(6, len(results))
        return torch.cat([torch.arange(len(results))[None], numbers, results[None]])

    positions_of_vectors, vectors_at_positions = [], []
    for shape in PLANNED:
        total = math.prod(shape)
        counts = {*range(1, total + 1, max(1, total // 40)), total}
        for plan in {SamplePlan.make(sampler, shape, count) for count in counts}:
            position = plan.positions(torch.device("cpu"))
            vectors = torch.full((total,), -1).index_copy(0, position, torch.arange(len(position)))
            positions_of_vectors.append(rows(plan, position))
            vectors_at_positions.append(rows(plan, vectors))
    for parts, inverse in ((positions_of_vectors, False), (vectors_at_positions, True)):
        table = torch.cat(parts, 1).to(DEVICE, dtype)
        assert torch.equal(compute(table[0], table[1:7], inverse), table[7])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", PLACES)
def test_maps_whose_numbers_need_64_bits(kind: str, channels_last: bool, monkeypatch) -> None:
    forward, backward = _kernels()
    sample_plan = importlib.import_module("contrastseg_fast.kernels.sample_plan")
    assert sample_plan.fits(SamplePlan.make("grid", (1024, 1024), None))
    assert not sample_plan.fits(SamplePlan.make("raster", (256, 256, 256), 4096))
    assert not sample_plan.fits(SamplePlan.make("grid", (1 << 15, 1 << 15), 100))
    monkeypatch.setattr("contrastseg_fast.kernels.gather.fits", lambda plan: False)
    shape, count = SHAPES["3d"]
    given, plan, position = make_places(kind, shape, count)
    features = torch.randn(shape, device=DEVICE)
    vectors = forward(features, given, plan)
    assert torch.equal(vectors, features.flatten(2)[:, :, position].mT)
    grad = backward(vectors, given, plan, shape, channels_last)
    assert torch.equal(grad.cpu().double(), scattered_exactly(vectors.cpu(), position, shape))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_positions_add_up(implementation, dtype: torch.dtype, channels_last: bool) -> None:
    _, backward, device = implementation
    shape = (2, 7, 9, 10)
    position = torch.cat([torch.randint(20, 70, (40,)), torch.tensor([5, 89, 5, 5, 0, 89])])
    grad = torch.randn(2, len(position), 7).to(dtype)
    expected = scattered_exactly(grad, position, shape)
    results = [
        backward(grad.to(device), position.to(device), [], list(shape), channels_last).cpu() for _ in range(2)
    ]
    assert torch.equal(*results)
    if dtype in (torch.float16, torch.bfloat16):  # sums in fp32, rounded once
        assert torch.equal(results[0], expected.to(dtype))
    else:
        torch.testing.assert_close(results[0].double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("channels_last", [False, True])
def test_incoming_gradients_of_any_strides(implementation, channels_last: bool) -> None:
    _, backward, device = implementation
    shape = (2, 20, 6, 7)
    position = positions(shape, 11)
    for grad in (
        torch.randn(1, 1, 1).expand(2, 11, 20),
        torch.randn(2, 1, 20).expand(2, 11, 20),
        torch.randn(2, 20, 11).mT,
        torch.randn(11, 2, 20).transpose(0, 1),
    ):
        actual = backward(grad.to(device), position.to(device), [], list(shape), channels_last)
        assert torch.equal(actual.cpu().double(), scattered_exactly(grad, position, shape))


@pytest.mark.parametrize(
    ("shape", "count"), [((2, 3, 4, 4), 0), ((0, 3, 4, 4), 5), ((2, 3, 0, 4), 0), ((2, 0, 4, 4), 5)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_to_gather(implementation, shape: tuple[int, ...], count: int, channels_last: bool) -> None:
    forward, backward, device = implementation
    position = torch.arange(count, device=device)
    for given, plan in ((position, []), (None, SamplePlan.make("raster", shape[2:], count).numbers)):
        vectors = forward(torch.randn(shape, device=device), given, plan)
        assert vectors.shape == (shape[0], count, shape[1])
        grad = backward(torch.ones_like(vectors), given, plan, list(shape), channels_last)
        assert grad.shape == shape
        assert count > 0 or not grad.any()


def test_a_long_map_and_many_vectors() -> None:
    """Several programs along every axis."""
    forward, backward = _kernels()
    features = torch.randn(2, 70, 19, 16, device=DEVICE)
    for kind in PLACES:
        given, plan, position = make_places(kind, tuple(features.shape), 70)
        for layout in (features, features.contiguous(memory_format=torch.channels_last)):
            vectors = forward(layout, given, plan)
            assert torch.equal(vectors, features.flatten(2)[:, :, position].mT)
            grad = backward(vectors, given, plan, list(features.shape), layout is not features)
            assert torch.equal(forward(grad, given, plan), vectors)
            assert grad.count_nonzero() == vectors.count_nonzero()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", ["2d", "3d"])
@pytest.mark.parametrize("kind", PLACES)
def test_opcheck(kind: str, shape: str, layout: str) -> None:
    extents, count = SHAPES[shape]
    features = feature_map(layout, extents, torch.float32).to(DEVICE).requires_grad_()
    given, plan, position = make_places(kind, extents, count)
    torch.library.opcheck(ops.gather_vectors, (features, given, plan, "auto"))
    grad = torch.randn(extents[0], len(position), extents[1], device=DEVICE, requires_grad=True)
    arguments = (grad, given, plan, list(extents), layout == "channels_last", "auto")
    torch.library.opcheck(ops.gather_vectors_backward, arguments)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_derivatives_of_any_order(planned: bool, channels_last: bool) -> None:
    layout = "channels_last" if channels_last else "contiguous"
    features = feature_map(layout, (2, 3, 4, 5), torch.float64).to(DEVICE).requires_grad_()
    given = None if planned else torch.tensor([3, 7, 3, 19], device=DEVICE)
    plan = [4, 5, 2, 2] if planned else []
    torch.autograd.gradcheck(lambda x: ops.gather_vectors(x, given, plan, "auto"), features)
    torch.autograd.gradgradcheck(lambda x: ops.gather_vectors(x, given, plan, "auto"), features)
    grad = torch.randn(2, 4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x: ops.gather_vectors_backward(x, given, plan, [2, 3, 4, 5], channels_last, "auto"), grad
    )


def test_autograd_keeps_the_given_positions_alone() -> None:
    features = torch.randn(1, 3, 6, 6, device=DEVICE, requires_grad=True)
    position = torch.tensor([1, 30], device=DEVICE)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.gather_vectors(features, position, [], "auto")
        ops.gather_vectors(features, None, [36, 5], "auto")
    assert [tensor.data_ptr() for tensor in saved] == [position.data_ptr()]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", PLACES)
def test_compiled_as_one_graph_for_all_sizes(kind: str, layout: str) -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def squares(features: Tensor, position: Tensor | None) -> Tensor:
        plan = SamplePlan.make(kind, features.shape[2:], 40).numbers if position is None else []
        return ops.gather_vectors(features * 2, position, plan, "auto").square().sum()

    for extent, count in ((6, 5), (9, 17)):
        features = feature_map(layout, (2, 4, extent, 8), torch.float32).to(DEVICE).requires_grad_()
        given, _, position = make_places(kind, tuple(features.shape), 40 if kind != "given" else count)
        squares(features, given).backward()
        expected = features.detach().clone().requires_grad_()
        (expected * 2).flatten(2)[:, :, position].square().sum().backward()
        torch.testing.assert_close(features.grad, expected.grad)
