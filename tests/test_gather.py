"""Gathering vectors: both kernels against indexing and its gradient, with positions that repeat."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from contrastseg_fast import _backend
from contrastseg_fast.ops import gather as ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # of the map, and the number of vectors
    "2d": ((2, 5, 9, 11), 23),
    "3d": ((2, 70, 4, 5, 6), 40),
    "one channel": ((3, 1, 8, 8), 10),
    "one position": ((2, 33, 1, 1), 1),
    "aligned": ((1, 64, 8, 16), 32),
    "every vector": ((1, 17, 7, 13), 91),
}
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


def scattered_exactly(grad: Tensor, position: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The dense gradient in fp64."""
    dense = torch.zeros(shape, dtype=torch.float64).flatten(2)
    for n, where in enumerate(position.tolist()):
        dense[:, :, where] += grad[:, n].double()
    return dense.view(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_vectors_are_those_of_the_map(implementation, shape: str, layout: str) -> None:
    forward, _, device = implementation
    extents, count = SHAPES[shape]
    for dtype in DTYPES if shape == "2d" else (torch.float32,):
        features = feature_map(layout, extents, dtype).to(device)
        position = positions(extents, count).to(device)
        vectors = forward(features, position)
        assert vectors.is_contiguous()
        assert torch.equal(vectors, features.flatten(2)[:, :, position].mT)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_dense_and_exact(implementation, shape: str, channels_last: bool) -> None:
    _, backward, device = implementation
    extents, count = SHAPES[shape]
    for dtype in DTYPES if shape == "2d" else (torch.float32,):
        grad = torch.randn(extents[0], count, extents[1]).to(dtype)
        position = positions(extents, count)
        actual = backward(grad.to(device), position.to(device), list(extents), channels_last)
        assert actual.dtype == dtype
        assert (actual.movedim(1, -1) if channels_last else actual).is_contiguous()
        assert torch.equal(actual.cpu().double(), scattered_exactly(grad, position, extents))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_positions_add_up(implementation, dtype: torch.dtype, channels_last: bool) -> None:
    _, backward, device = implementation
    shape = (2, 7, 9, 10)
    position = torch.cat([torch.randint(20, 70, (40,)), torch.tensor([5, 89, 5, 5, 0, 89])])
    grad = torch.randn(2, len(position), 7).to(dtype)
    expected = scattered_exactly(grad, position, shape)
    results = [
        backward(grad.to(device), position.to(device), list(shape), channels_last).cpu() for _ in range(2)
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
        actual = backward(grad.to(device), position.to(device), list(shape), channels_last)
        assert torch.equal(actual.cpu().double(), scattered_exactly(grad, position, shape))


@pytest.mark.parametrize(
    ("shape", "count"), [((2, 3, 4, 4), 0), ((0, 3, 4, 4), 5), ((2, 3, 0, 4), 0), ((2, 0, 4, 4), 5)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_to_gather(implementation, shape: tuple[int, ...], count: int, channels_last: bool) -> None:
    forward, backward, device = implementation
    position = torch.arange(count, device=device)
    vectors = forward(torch.randn(shape, device=device), position)
    assert vectors.shape == (shape[0], count, shape[1])
    grad = backward(torch.ones_like(vectors), position, list(shape), channels_last)
    assert grad.shape == shape
    assert count > 0 or not grad.any()


def test_a_long_map_and_many_vectors() -> None:
    """Several programs along every axis."""
    forward, backward = _kernels()
    features = torch.randn(2, 150, 19, 16, device=DEVICE)
    position = positions(features.shape, 70).to(DEVICE)
    for layout in (features, features.contiguous(memory_format=torch.channels_last)):
        vectors = forward(layout, position)
        assert torch.equal(vectors, features.flatten(2)[:, :, position].mT)
        grad = backward(vectors, position, list(features.shape), layout is not features)
        assert torch.equal(forward(grad, position), vectors)
        assert grad.count_nonzero() == vectors.count_nonzero()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", ["2d", "3d"])
def test_opcheck(shape: str, layout: str) -> None:
    extents, count = SHAPES[shape]
    features = feature_map(layout, extents, torch.float32).to(DEVICE).requires_grad_()
    position = positions(extents, count).to(DEVICE)
    torch.library.opcheck(ops.gather_vectors, (features, position, "auto"))
    grad = torch.randn(extents[0], count, extents[1], device=DEVICE, requires_grad=True)
    arguments = (grad, position, list(extents), layout == "channels_last", "auto")
    torch.library.opcheck(ops.gather_vectors_backward, arguments)


@pytest.mark.parametrize("channels_last", [False, True])
def test_derivatives_of_any_order(channels_last: bool) -> None:
    layout = "channels_last" if channels_last else "contiguous"
    features = feature_map(layout, (2, 3, 4, 5), torch.float64).to(DEVICE).requires_grad_()
    position = torch.tensor([3, 7, 3, 19], device=DEVICE)
    torch.autograd.gradcheck(lambda x: ops.gather_vectors(x, position, "auto"), features)
    torch.autograd.gradgradcheck(lambda x: ops.gather_vectors(x, position, "auto"), features)
    grad = torch.randn(2, 4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x: ops.gather_vectors_backward(x, position, [2, 3, 4, 5], channels_last, "auto"), grad
    )


def test_autograd_keeps_the_positions_alone() -> None:
    features = torch.randn(1, 3, 6, 6, device=DEVICE, requires_grad=True)
    position = torch.tensor([1, 30], device=DEVICE)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.gather_vectors(features, position, "auto")
    assert [tensor.data_ptr() for tensor in saved] == [position.data_ptr()]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_as_one_graph_for_all_sizes(layout: str) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def squares(features: Tensor, position: Tensor) -> Tensor:
        return ops.gather_vectors(features * 2, position, "auto").square().sum()

    for extent, count in ((6, 5), (9, 17)):
        features = feature_map(layout, (2, 4, extent, 8), torch.float32).to(DEVICE).requires_grad_()
        position = positions(features.shape, count).to(DEVICE)
        squares(features, position).backward()
        expected = features.detach().clone().requires_grad_()
        (expected * 2).flatten(2)[:, :, position].square().sum().backward()
        torch.testing.assert_close(features.grad, expected.grad)
