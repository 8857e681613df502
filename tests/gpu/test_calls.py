"""Whole calls on the GPU: no synchronisation, graphs, streams, devices, compilation, and refusals."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import blob_labels
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from contrastseg_fast import UAFS, PDCRLoss, ReceptiveField
from contrastseg_fast.functional import entropy_gate, foreground_ratio, pdcr_loss
from gpu.oracle import normwise_error, random_ratios, random_vectors

FIELDS = [
    ReceptiveField((7, 7), (2, 2), (-3, -3)),
    ReceptiveField((15, 15), (4, 4), (-7, -7)),
    ReceptiveField((31, 31), (8, 8), (-15, -15)),
]
EXTENT = 64
Inputs = tuple[list[Tensor], Tensor]


def make_inputs(device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Feature maps of three layers, and the labels of their input."""
    generator = torch.Generator().manual_seed(seed)
    features = [
        torch.randn(2, channels, EXTENT // stride, EXTENT // stride, generator=generator).to(device, dtype)
        for channels, stride in ((16, 2), (40, 4), (96, 8))
    ]
    labels = torch.randint(3, (2, EXTENT // 16, EXTENT // 16), generator=generator)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2).to(device)
    return [each.requires_grad_() for each in features], labels


class Whole(nn.Module):
    """The gate on the finest features, then the loss of all layers."""

    def __init__(self, device: torch.device, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = UAFS(2, 16, 3, norm="instance").to(device)
        self.loss = PDCRLoss(FIELDS, 3, num_samples=200, class_distance="tv", **options)

    def forward(self, features: list[Tensor], labels: Tensor) -> Tensor:
        return self.loss([self.gate(features[0]), *features[1:]], labels)


def step(whole: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """The loss, and the gradients of all feature maps."""
    loss = whole(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs[0])]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.isfinite(a).all()
        assert normwise_error(a, e) <= tolerance


@contextmanager
def synchronising_raises() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["grid", "random", "raster"])
def test_against_the_reference(device, sampler: str, dtype: torch.dtype) -> None:
    """Modules and kernels together, from features and labels to the features' gradients."""
    features, labels = make_inputs(device, 0, dtype)
    ours, exact = (
        PDCRLoss(
            FIELDS,
            3,
            num_samples=200,
            sampler=sampler,
            generator=torch.Generator().manual_seed(1),
            backend=backend,
        )
        for backend in ("auto", "reference")
    )
    doubled = [each.detach().double().requires_grad_() for each in features]
    expected = step(exact, (doubled, labels.cpu().to(device)))
    assert_close(step(ours, (features, labels)), expected, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler", ["grid", "random", "raster"])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_waits_for_the_device(cuda, sampler: str, masked: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(cuda, 0, dtype)
    whole = Whole(cuda, sampler=sampler, ignore_index=255, skip_homogeneous=masked).to(dtype)
    mask = torch.ones(2, 1, EXTENT, EXTENT, device=cuda) if masked else None

    def run() -> None:
        features, labels = inputs
        loss = whole.loss([whole.gate(features[0]), *features[1:]], labels, mask)
        loss.backward()

    run()  # loads and compiles
    with synchronising_raises():
        run()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_graph_capture_and_replay(cuda, deterministic, memory_format: torch.memory_format) -> None:
    """Replays with changed inputs give the bits that eager calls give."""
    whole = Whole(cuda)

    def laid_out(seed: int) -> Inputs:
        features, labels = make_inputs(cuda, seed)
        return [
            each.detach().contiguous(memory_format=memory_format).requires_grad_() for each in features
        ], labels

    static = laid_out(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(whole, static)
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(whole, static)
    for seed in (1, 2, 3):
        features, labels = laid_out(seed)
        with torch.no_grad():
            for target, source in zip(static[0], features, strict=True):
                target.copy_(source)
            static[1].copy_(labels)
        graph.replay()
        replayed = [each.clone() for each in captured]
        expected = step(whole, (features, labels))
        assert all(torch.equal(a, e) for a, e in zip(replayed, expected, strict=True))


@pytest.mark.parametrize("count", [1000, 6000])
def test_graph_of_the_loss_alone(cuda, triton: str, count: int) -> None:
    """With other ratios in every replay."""
    vectors = random_vectors(cuda, 2, count, 64, dtype=torch.bfloat16).requires_grad_()
    ratios = random_ratios(cuda, 2, count, 3)

    def run() -> list[Tensor]:
        loss = pdcr_loss(vectors, ratios, backend=triton)
        return [loss.detach(), *torch.autograd.grad(loss, vectors)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for shift in (1, 7):
        with torch.no_grad():
            vectors.copy_(vectors.roll(shift, 1))
            ratios.copy_(ratios.roll(3 * shift, 1))
        graph.replay()
        replayed = [each.clone() for each in captured]
        assert_close(replayed, run(), 1e-2)
        assert normwise_error(replayed[0], run()[0]) < 1e-5


def test_work_goes_to_the_current_stream(cuda) -> None:
    """On a stream that is still busy writing the inputs, kernels wait for them."""
    whole = Whole(cuda)
    expected = step(whole, make_inputs(cuda, 5))
    late, source = make_inputs(cuda, 0), make_inputs(cuda, 5)
    step(whole, late)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        with torch.no_grad():
            for target, origin in zip((*late[0], late[1]), (*source[0], source[1]), strict=True):
                target.copy_(origin)
        actual = step(whole, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(actual, expected)


def test_two_streams_at_once(cuda, deterministic) -> None:
    whole = Whole(cuda)
    inputs = [make_inputs(cuda, seed) for seed in (1, 2)]
    expected = [step(whole, each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = []
    for _ in range(20):
        for each, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(whole, each))
    torch.cuda.synchronize()
    for position, actual in enumerate(found):
        assert all(torch.equal(a, e) for a, e in zip(actual, expected[position % 2], strict=True))


def test_the_device_of_the_inputs_not_the_current_one(cuda) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    expected = step(Whole(cuda), make_inputs(cuda, 0))
    actual = step(Whole(other), make_inputs(other, 0))
    assert all(each.device == other for each in actual)
    assert_close([each.to(cuda) for each in actual], expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_without_a_break(device, memory_format: torch.memory_format) -> None:
    torch.compiler.reset()
    whole = Whole(device)
    if device.type == "cuda":
        compiled = torch.compile(whole, fullgraph=True, mode="reduce-overhead")
    else:
        compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for seed in range(4):  # warm-up, capture, replays
        features, labels = make_inputs(device, seed)
        features = [
            each.detach().contiguous(memory_format=memory_format).requires_grad_() for each in features
        ]
        torch.compiler.cudagraph_mark_step_begin()
        actual = [each.clone() for each in step(compiled, (features, labels))]
        assert_close(actual, step(whole, (features, labels)), 1e-4)


def test_compiled_once_for_all_numbers_of_vectors(device, triton: str) -> None:
    torch.compiler.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    graphs = []

    def loss(vectors: Tensor, ratios: Tensor) -> Tensor:
        return pdcr_loss(vectors, ratios, backend=triton)

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for count in (65, 90, 130):
        vectors, ratios = random_vectors(device, 2, count, 16), random_ratios(device, 2, count, 3)
        torch.testing.assert_close(compiled(vectors, ratios), loss(vectors, ratios), rtol=1e-5, atol=1e-6)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[1]


def test_channels_last_features_give_channels_last_gradients(device) -> None:
    whole = Whole(device)
    features, labels = make_inputs(device, 0)
    expected = step(whole, (features, labels))
    laid_out = [
        each.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for each in features
    ]
    assert_close(step(whole, (laid_out, labels)), expected)


def test_labels_out_of_range_count_for_no_class(cuda) -> None:
    """Without a check, since that would wait for the device."""
    features, labels = make_inputs(cuda, 0)
    wild = torch.where(labels == 2, 77, labels)
    loss = PDCRLoss(FIELDS, 3, num_samples=100)
    assert torch.isfinite(loss(features, wild))
    indices = torch.tensor([[0, 0], [30, 30]], device=cuda)
    ratios, _ = foreground_ratio(wild, indices, (9, 9), 3)
    assert not ratios[..., 2].any()
    with pytest.raises(ValueError, match="labels: expected integers from 0 to 2"):
        foreground_ratio(wild, indices, (EXTENT, EXTENT), 3, validate=True)


class TestRefusals:
    def test_cpu_tensors(self) -> None:
        vectors, ratios = torch.randn(1, 5, 4), torch.rand(1, 5, 2)
        with pytest.raises(ValueError, match="backend: pdcr_loss with backend='triton' expects CUDA tensors"):
            pdcr_loss(vectors, ratios, backend="triton")
        with pytest.raises(
            ValueError, match="backend: entropy_gate with backend='cuda' expects CUDA tensors"
        ):
            entropy_gate(torch.randn(1, 3, 4, 4), torch.randn(1, 2, 4, 4), backend="cuda")

    def test_cuda_tensors_on_the_cpu_backend(self, cuda) -> None:
        with pytest.raises(ValueError, match="backend: pdcr_loss with backend='cpu' expects CPU tensors"):
            pdcr_loss(torch.randn(1, 5, 4, device=cuda), torch.rand(1, 5, 2, device=cuda), backend="cpu")

    def test_mixed_devices(self, cuda) -> None:
        vectors, ratios = torch.randn(1, 5, 4, device=cuda), torch.rand(1, 5, 2)
        with pytest.raises(ValueError, match="ratios: expected device cuda"):
            pdcr_loss(vectors, ratios)
        with pytest.raises(ValueError, match="logits: expected device cuda"):
            entropy_gate(torch.randn(1, 3, 4, 4, device=cuda), torch.randn(1, 2, 4, 4))
        with pytest.raises(ValueError, match="starts: expected device cuda"):
            foreground_ratio(torch.zeros(1, 9, 9, device=cuda), torch.zeros(1, 2).long(), (3, 3), 2)
        features, labels = make_inputs(cuda, 0)
        with pytest.raises(ValueError, match="labels: expected device cuda"):
            PDCRLoss(FIELDS, 3)(features, labels.cpu())


def test_training_labels_of_blobs(device) -> None:
    """An image of one class, and one of many, side by side."""
    features, labels = make_inputs(device, 0)
    labels[1] = 0
    labels[0] = blob_labels(1, (EXTENT, EXTENT), 3)[0].to(device)
    loss, *gradients = step(PDCRLoss(FIELDS, 3, skip_homogeneous=True), (features, labels))
    assert torch.isfinite(loss)
    assert gradients[0][0].any()
    assert not gradients[0][1].any()
