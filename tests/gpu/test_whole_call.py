"""Whole calls of `PDCRLoss`, one operator from maps and labels to gradients, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tensor_cores
import torch
from conftest import blob_labels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import device as device_timing
from contrastseg_fast import PDCRLoss, ReceptiveField
from contrastseg_fast.functional import pdcr_loss
from gpu.oracle import (
    FP32_EPS,
    any_order,
    assert_as_exact,
    channels_last,
    normwise_error,
    random_ratios,
    random_vectors,
)

Fit = Callable[[int, int], int]
Inputs = tuple[list[Tensor], Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS = ((24, 2, 7), (40, 4, 15), (40, 4, 31))  # channels, stride, receptive field
SCALE = 1000.0  # of incoming gradients: keeps those of 16-bit maps among the normal numbers
IGNORED = 255
MOST_LAUNCHES = {"call": 9, "loss": 6, "small loss": 4}  # forward and backward, in 16 bits
EVERYTHING: dict[str, Any] = {"patch_sizes": (3, 9), "cross_layers": [(1, 2)], "pairs": "batch"}
OPTIONS: dict[str, dict[str, Any]] = {
    "random places": {"sampler": "random"},
    "raster": {"sampler": "raster"},
    "sizes of patches": {"patch_sizes": (3, (5, 9), 60)},
    "pairs across layers": {"cross_layers": [(1, 2), (2, 1)]},
    "pairs across images": {"pairs": "batch"},
    "all of these": EVERYTHING,
    "homogeneous images left out": {"skip_homogeneous": True, "ignore_index": IGNORED},
    "few valid vectors": {"ignore_index": IGNORED, "min_valid_fraction": 0.9},
    "each image": {"reduction": "none", "patch_sizes": (3, 9)},
    "own categories": {"affinity": "diagonal"},
    "largest class": {"affinity": "bipartite", "cross_layers": [(1, 2)]},
    "without background": {"include_background": False, "class_distance": "sum"},
    "released": {"variant": "released", "border": "background"},
    "cold": {"temperature": 0.004},
}


def make_loss(count: int, backend: str, spatial_dims: int = 2, **options: Any) -> PDCRLoss:
    fields = [
        ReceptiveField((field,) * spatial_dims, (stride,) * spatial_dims, (-(field // 2),) * spatial_dims)
        for _, stride, field in LAYERS
    ]
    options = {"class_distance": "tv", "generator": torch.Generator().manual_seed(1), **options}
    return PDCRLoss(fields, 3, num_samples=count, backend=backend, **options)


def make_inputs(
    device: torch.device,
    dtype: torch.dtype,
    extents: tuple[int, ...],
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous,
    seed: int = 0,
) -> Inputs:
    """Maps of all layers, and labels: the second image is of one class, some pixels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for channels, stride, _ in LAYERS:
        shape = 2, channels, *(extent // stride for extent in extents)
        maps.append(layout(torch.randn(shape, generator=generator).to(device, dtype)).requires_grad_())
    labels = blob_labels(2, extents, 3)
    labels[1] = 1
    labels[:, : extents[0] // 8] = IGNORED
    return maps, labels.to(device)


def step(loss: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """The loss and the gradients of all maps, for incoming gradients that all differ."""
    value = loss(*inputs)
    grad = SCALE * torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device)
    return [value.detach(), *torch.autograd.grad(value, inputs[0], grad.view(value.shape))]


def assert_as_exact_as_plain(count: int, backend: str, inputs: Inputs, **options: Any) -> None:
    """Errors are at most twice those of the reference in fp32; both references run on the CPU."""
    maps, labels = inputs
    temperature = options.get("temperature", 0.5)
    actual = step(make_loss(count, backend, **options), inputs)
    with any_order():
        exact, plain = (
            step(
                make_loss(count, "reference", **options),
                ([x.detach().cpu().to(dtype).requires_grad_() for x in maps], labels.cpu()),
            )
            for dtype in (torch.float64, torch.float32)
        )
    rounding = FP32_EPS * max(4.0, min(1 / temperature, 16.0), 0.25 / temperature)
    truncation = 0.0
    if labels.is_cuda and exact[0].any():
        largest = tensor_cores.largest_loss_error(max(x.shape[1] for x in maps), maps[0].dtype, temperature)
        truncation = largest * exact[0].numel() ** 0.5 / torch.linalg.vector_norm(exact[0]).item()
    assert_as_exact("loss", actual[0].cpu(), plain[0], exact[0], rounding + truncation)
    for layer, (gradient, x) in enumerate(zip(actual[1:], maps, strict=True)):
        assert gradient.dtype == x.dtype
        assert gradient.stride() == x.stride()
        of_plain = plain[1 + layer].to(x.dtype)
        assert_as_exact(f"gradient {layer}", gradient.cpu(), of_plain, exact[1 + layer], rounding)


@contextmanager
def synchronising_raises() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def extents(fit: Fit) -> tuple[int, int]:
    return fit(128, 32), fit(96, 24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("count", [100, 257, 1000, 2000])
def test_every_number_of_vectors(
    device, triton: str, fit: Fit, extents, determinism: str, count: int, layout, dtype
) -> None:
    count = fit(count, 30 + count // 100)
    assert_as_exact_as_plain(count, triton, make_inputs(device, dtype, extents, layout), ignore_index=IGNORED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(device, triton: str, fit: Fit, extents, options: dict[str, Any], dtype) -> None:
    maps, labels = make_inputs(device, dtype, extents, channels_last)
    if "ignore_index" not in options:
        labels = labels.where(labels != IGNORED, 2)
    assert_as_exact_as_plain(fit(300, 40), triton, (maps, labels), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["three layers", "all of these"])
def test_voxels(device, triton: str, fit: Fit, options: dict[str, Any], layout, dtype) -> None:
    if "patch_sizes" in options:
        options = {**options, "patch_sizes": (3, (5, 3, 9))}
    inputs = make_inputs(device, dtype, (fit(32, 8), fit(40, 12), fit(24, 16)), layout)
    assert_as_exact_as_plain(fit(400, 30), triton, inputs, spatial_dims=3, ignore_index=IGNORED, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_vectors_that_were_sampled_before(device, triton: str, fit: Fit, extents, dtype) -> None:
    loss = make_loss(fit(300, 40), triton, ignore_index=IGNORED, cross_layers=[(1, 2)])

    def by_samples(maps: list[Tensor], labels: Tensor) -> Tensor:
        return loss.loss([loss.sample(x, layer) for layer, x in enumerate(maps)], labels)

    inputs = make_inputs(device, dtype, extents)
    for sampled, whole in zip(step(by_samples, inputs), step(loss, inputs), strict=True):
        assert normwise_error(sampled, whole) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["three layers", "all of these"])
def test_equal_bits(device, triton: str, deterministic, fit: Fit, extents, options: dict[str, Any]) -> None:
    loss = make_loss(fit(1000, 40), triton, ignore_index=IGNORED, **options)
    inputs = make_inputs(device, torch.bfloat16, extents)
    first = step(loss, inputs)
    for _ in range(fit(4, 1)):
        assert all(torch.equal(a, b) for a, b in zip(step(loss, inputs), first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "count", "channels"), [(1, 257, 64), (1, 2048, 64), (8, 1024, 256)])
def test_a_backward_pass_gives_equal_bits_without_asking(
    device, triton: str, fit: Fit, batch: int, count: int, channels: int, dtype
) -> None:
    """Several programs compute parts of one row, which are added in one order."""
    count, channels = fit(count, 150), fit(channels, 33)
    vectors = random_vectors(device, batch, count, channels, dtype=dtype).requires_grad_()
    loss = pdcr_loss(vectors, random_ratios(device, batch, count, 2), backend=triton)
    grads = [torch.autograd.grad(SCALE * loss, vectors, retain_graph=True)[0] for _ in range(fit(5, 2))]
    assert grads[0].any()
    assert all(torch.equal(grad, grads[0]) for grad in grads)


SMALL_SIZES = [(1, 17, 64), (1, 128, 64), (3, 100, 33), (8, 256, 128), (2, 256, 256)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("batch", "count", "channels"), SMALL_SIZES)
def test_small_calls_give_equal_bits_without_asking(
    device, triton: str, fit: Fit, batch: int, count: int, channels: int, reduction: str, dtype
) -> None:
    """One program has all sums of a row; the last program adds those of others in one order."""
    count, channels = fit(count, min(count, 40)), fit(channels, 33)
    vectors = random_vectors(device, batch, count, channels, dtype=dtype).requires_grad_()
    ratios = random_ratios(device, batch, count, 2)

    def run() -> list[Tensor]:
        loss = pdcr_loss(vectors, ratios, reduction=reduction, backend=triton)
        return [loss.detach(), *torch.autograd.grad(SCALE * loss.sum(), vectors)]

    first = run()
    assert all(value.any() for value in first)
    for _ in range(fit(20, 1)):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_small_calls_on_many_streams_and_in_graphs_at_once(cuda, triton: str) -> None:
    """Every kernel finds its last program by a counter that no other kernel counts at the same time."""
    vectors = random_vectors(cuda, 8, 256, 64, dtype=torch.bfloat16)
    ratios = random_ratios(cuda, 8, 256, 2)

    def run() -> Tensor:
        return pdcr_loss(vectors, ratios, backend=triton)

    expected = run()
    torch.cuda.synchronize()
    graphs, captured = [torch.cuda.CUDAGraph() for _ in range(3)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            captured.append([run() for _ in range(20)])
    streams = [torch.cuda.Stream() for _ in range(6)]
    results: list[Tensor] = []
    for _ in range(10):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if number < len(graphs):
                    graphs[number].replay()
                else:
                    results += [run() for _ in range(20)]
    torch.cuda.synchronize()
    for result in (*results, *(each for of_graph in captured for each in of_graph)):
        assert torch.equal(result, expected)


class Operators(TorchDispatchMode):
    """The operators of this package that are called, in order; not those that they call.

    The check of the values of labels, which only those of CPU tensors get, is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "contrastseg_fast" and func._opname != "labels_in_range":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["three layers", "all of these"])
def test_one_operator_and_its_derivative(device, triton: str, fit: Fit, extents, options) -> None:
    loss = make_loss(fit(100, 20), triton, ignore_index=IGNORED, **options)
    inputs = make_inputs(device, torch.bfloat16, extents)
    with Operators() as operators:
        step(loss, inputs)
    assert operators.seen == ["pdcr_call_forward", "pdcr_call_backward"]


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["three layers", "all of these"])
def test_launches_of_a_call(cuda, triton: str, extents, options: dict[str, Any]) -> None:
    loss = make_loss(200, triton, ignore_index=IGNORED, **options)
    inputs = make_inputs(cuda, torch.bfloat16, extents)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*inputs), inputs[0])

    run()
    assert device_timing.launches(run) <= MOST_LAUNCHES["call"]


@pytest.mark.parametrize(("count", "name"), [(500, "loss"), (128, "small loss")])
def test_launches_of_a_loss(cuda, triton: str, count: int, name: str) -> None:
    vectors = random_vectors(cuda, 2, count, 64, dtype=torch.bfloat16).requires_grad_()
    ratios = random_ratios(cuda, 2, count, 2)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(pdcr_loss(vectors, ratios, backend=triton), vectors)

    run()
    assert device_timing.launches(run) <= MOST_LAUNCHES[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_waits_for_the_device(cuda, triton: str, extents, options: dict[str, Any], dtype) -> None:
    loss = make_loss(200, triton, **{"ignore_index": IGNORED, **options})
    inputs = make_inputs(cuda, dtype, extents)
    step(loss, inputs)  # copies tables, compiles
    with synchronising_raises():
        step(loss, inputs)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["three layers", "all of these"])
def test_training_after_a_first_call_in_inference_mode(
    device, triton: str, fit: Fit, extents, options: dict[str, Any]
) -> None:
    """What is kept of the first call, tables on the device above all, serves later ones that train."""
    count = fit(211, 37)
    maps, labels = make_inputs(device, torch.bfloat16, extents)
    loss = make_loss(count, triton, ignore_index=IGNORED, **options)
    with torch.inference_mode():
        first = loss([x.detach() for x in maps], labels)
    assert_as_exact_as_plain(count, triton, (maps, labels), ignore_index=IGNORED, **options)
    assert normwise_error(first, loss(maps, labels).detach()) <= 4 * FP32_EPS


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["three layers", "all of these"])
def test_compiled_without_a_break(
    device, triton: str, fit: Fit, extents, options: dict[str, Any], backend: str
) -> None:
    if device.type == "cpu" and backend == "inductor":
        pytest.skip("tests of CUDA compile with inductor")
    torch.compiler.reset()
    loss = make_loss(fit(150, 20), triton, ignore_index=IGNORED, **options)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for seed in range(2):
        inputs = make_inputs(device, torch.bfloat16, extents, channels_last, seed)
        for actual, expected in zip(step(compiled, inputs), step(loss, inputs), strict=True):
            assert normwise_error(actual, expected) <= 1e-2
            assert actual.stride() == expected.stride()


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["three layers", "all of these"])
def test_compiled_into_graphs(cuda, triton: str, deterministic, extents, options: dict[str, Any]) -> None:
    """`mode="reduce-overhead"`: the operator is captured and replayed with other numbers."""
    torch.compiler.reset()
    loss = make_loss(170, triton, ignore_index=IGNORED, **options)
    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # warm-up, capture, replays
        inputs = make_inputs(cuda, torch.bfloat16, extents, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        actual = [each.clone() for each in step(compiled, inputs)]
        assert all(torch.equal(a, e) for a, e in zip(actual, step(loss, inputs), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["three layers", "all of these"])
def test_a_graph_replayed_with_other_numbers(
    cuda, triton: str, deterministic, extents, options: dict[str, Any], dtype
) -> None:
    """Warmed up by one call on the default stream, which leaves the tables on the device."""
    loss = make_loss(180, triton, ignore_index=IGNORED, **options)
    static = make_inputs(cuda, dtype, extents)
    step(loss, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, static)
    for seed in (1, 2):
        maps, labels = make_inputs(cuda, dtype, extents, seed=seed)
        with torch.no_grad():
            for target, source in zip((*static[0], static[1]), (*maps, labels), strict=True):
                target.copy_(source)
        graph.replay()
        replayed = [each.clone() for each in captured]
        assert all(torch.equal(a, e) for a, e in zip(replayed, step(loss, (maps, labels)), strict=True))


def test_a_first_call_in_a_graph_says_what_to_do(cuda, triton: str, extents) -> None:
    maps, labels = make_inputs(cuda, torch.bfloat16, extents)
    known = make_loss(190, triton, ignore_index=IGNORED)
    new = make_loss(189, triton, ignore_index=IGNORED)
    step(known, (maps, labels))  # compiles the kernels, with tables for another number of vectors
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="run the call once, with the same shapes and options, before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        new(maps, labels)
    expected = step(new, (maps, labels))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(new, (maps, labels))
    graph.replay()
    for a, e in zip(captured, expected, strict=True):
        assert normwise_error(a, e) <= 1e-2


def test_tables_of_one_stream_serve_another(cuda, triton: str, deterministic, extents) -> None:
    """The first call of a shape on a busy stream, the second at once on another."""
    loss = make_loss(173, triton, ignore_index=IGNORED)
    inputs = make_inputs(cuda, torch.bfloat16, extents)
    step(make_loss(174, triton, ignore_index=IGNORED), inputs)  # compiles the kernels
    torch.cuda.synchronize()
    found = []
    for number, stream in enumerate((torch.cuda.Stream(), torch.cuda.Stream())):
        with torch.cuda.stream(stream):
            if number == 0:
                torch.cuda._sleep(50_000_000)
            found.append(step(loss, inputs))
    torch.cuda.synchronize()
    expected = step(loss, inputs)
    for actual in found:
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
