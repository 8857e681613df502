"""The kernels of small calls, interpreted on CPU tensors, against the float64 default implementation."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from test_pdcr import (
    AFFINITIES,
    PAPER,
    SHARP,
    assert_as_exact_as_plain,
    by_reference,
    loss_and_gradient,
    make_inputs,
    normwise,
)
from test_pdcr_call_triton import (
    BF16_ERROR,
    FIELDS,
    OPTIONS,
    assert_right,
    feature_maps,
    recorded_call,
    some_labels,
)

from contrastseg_fast import PDCRLoss, _backend, functional
from contrastseg_fast.ops import pdcr
from contrastseg_fast.problems import PADDING, WIDEST_FUSED, Call, Problem, Segment, Source

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not _backend.interpreting(), reason="kernels are interpreted with TRITON_INTERPRET=1 only"
)
if _backend.interpreting():
    from contrastseg_fast.kernels import _counters
    from contrastseg_fast.kernels.pdcr import plan, small

    MOST_PACKED = plan.MOST_PACKED

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALL_KERNELS = ["pdcr_small_fwd_kernel", "pdcr_small_bwd_kernel"]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all kernels of PDCR in the order of their launches; memory is poisoned with NaN."""
    names: list[str] = []

    def recording(run: Any) -> Any:
        return lambda kernel, *others: names.append(kernel.fn.__name__) or run(kernel, *others)

    for name in ("rows", "forward", "loss", "backward", "gradient", "small"):
        module = importlib.import_module(f"contrastseg_fast.kernels.pdcr.{name}")
        monkeypatch.setattr(module, "run_kernel", recording(module.run_kernel))
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(plan, "MOST_PACKED", 1 << 20)  # whatever is faster
    return names


def some_valid(vectors: torch.Tensor) -> torch.Tensor:
    valid = torch.rand(vectors.shape[:2]) > 0.3
    valid[:, 0] = True
    return valid


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "count", "channels", "classes"),
    [(2, 17, 64, 2), (1, 64, 112, 1), (3, 100, 16, 5), (1, 128, 256, 2), (1, 200, 48, 9), (1, 256, 64, 8)],
)
def test_every_size_is_as_exact_as_plain_pytorch(dtype, batch, count, channels, classes, launched):
    vectors, ratios = make_inputs(batch, count, channels, classes, DTYPES[dtype])
    assert_as_exact_as_plain(vectors, ratios, some_valid(vectors), PAPER, "triton")
    assert_as_exact_as_plain(vectors, ratios, None, SHARP, "triton")
    assert launched == 2 * SMALL_KERNELS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", AFFINITIES)
def test_every_form_is_as_exact_as_plain_pytorch(form, dtype, launched):
    affinity = AFFINITIES[form]
    vectors, ratios = make_inputs(2, 140, 32, 3, DTYPES[dtype], categorical=affinity.categorical)
    assert_as_exact_as_plain(vectors, ratios, some_valid(vectors), affinity, "triton")
    assert launched == SMALL_KERNELS


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_vector(dtype):
    vectors, ratios = make_inputs(3, 1, 16, 2, DTYPES[dtype])
    value, log_z, gradient = loss_and_gradient("triton", vectors, ratios, None, PAPER, torch.ones(3))
    assert value.tolist() == pytest.approx([-2] * 3, abs=1e-6)  # log 1 - 1 / tau
    assert log_z.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_zero_vectors_among_vectors_of_any_length(unit):
    vectors, ratios = make_inputs(1, 100, 32, 2, torch.float32)
    vectors = vectors * torch.logspace(-1, 0, 100)[None, :, None] * unit
    vectors[:, ::3] = 0
    vectors = vectors.bfloat16()
    grad = torch.full((1,), unit)  # so that gradients neither vanish nor overflow
    exact = loss_and_gradient("default", vectors.double(), ratios, None, PAPER, grad)
    actual = loss_and_gradient("triton", vectors, ratios, None, PAPER, grad)
    for a, e, bound in zip(actual, exact, (1e-6, 1e-6, BF16_ERROR), strict=True):
        assert normwise(a, e) < bound
    assert (actual[2][:, ::3] == 0).all()


@pytest.mark.parametrize("reduction", functional.REDUCTIONS)
@pytest.mark.parametrize("valid_images", [(True, True, True), (True, False, True), (False, False, False)])
def test_losses_are_reduced_as_in_the_reference(reduction, valid_images, monkeypatch, launched):
    monkeypatch.setattr(small, "_IMAGES_AT_ONCE", 2)
    vectors, ratios = make_inputs(3, 70, 16, 2, torch.bfloat16)
    vectors[~torch.tensor(valid_images)] = torch.nan  # an excluded vector does not matter
    valid = some_valid(vectors) & torch.tensor(valid_images)[:, None]
    grad = torch.linspace(-1, 2, 3) if reduction == "none" else torch.tensor(-1.7)
    oracle = vectors.double().nan_to_num(0)
    exact = by_reference(oracle, ratios, valid, PAPER, grad, reduction)
    value, log_z, gradient = loss_and_gradient("triton", vectors, ratios, valid, PAPER, grad, reduction)
    assert launched == SMALL_KERNELS
    assert value.shape == exact[0].shape
    assert normwise(value, exact[0]) < 1e-6
    assert normwise(gradient, exact[1]) < BF16_ERROR
    assert (gradient[~valid] == 0).all()
    assert (log_z[~valid] == 0).all()


def channels_last(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    maps = feature_maps(dtype, {"stem": 16, "middle": 48, "deep": 80})
    return {layer: x.contiguous(memory_format=torch.channels_last) for layer, x in maps.items()}


@pytest.mark.parametrize("name", ["three layers", "each image", "raster", "random", "cold"])
def test_layers_share_the_launch(name: str, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """Vectors out of maps, by a plan and by given places, of several widths."""
    loss = PDCRLoss(FIELDS, 3, **{"num_samples": 70, "class_distance": "tv", **OPTIONS[name]})
    maps, labels = channels_last(torch.bfloat16), some_labels()
    inputs = recorded_call(loss, lambda: loss(maps, labels), monkeypatch)
    launched.clear()
    assert_right(inputs, BF16_ERROR)
    assert launched == SMALL_KERNELS


def test_vectors_sampled_before(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    loss = PDCRLoss(FIELDS, 3, num_samples=70, class_distance="tv")
    samples = [loss.sample(x, layer) for layer, x in channels_last(torch.float16).items()]
    inputs = recorded_call(loss, lambda: loss.loss(samples, some_labels()), monkeypatch)
    launched.clear()
    assert_right(inputs, BF16_ERROR)
    assert launched == SMALL_KERNELS


def test_a_forward_pass_leaves_what_every_backward_pass_takes(monkeypatch, launched):
    """All padding is written, and either kernels make the same gradient of it."""
    vectors, ratios = make_inputs(2, 150, 48, 3, torch.bfloat16)
    valid, grad = some_valid(vectors), torch.ones(())
    how = ([*PAPER], "mean", "triton")
    _, log_z, packed, floats = pdcr.pdcr_forward_on_cuda(vectors, ratios, valid, *how)
    monkeypatch.setattr(_backend, "unavailable", lambda *_: None)
    assert torch.isfinite(packed).all()
    assert (packed.view(2, -1, 64)[:, 150:] == 0).all()
    inputs = (grad, log_z, vectors, ratios, valid, packed, floats, *how)
    by_small = pdcr.pdcr_backward_on_cuda(*inputs)
    monkeypatch.setattr(plan, "MOST_SMALL", 0)
    by_tiles = pdcr.pdcr_backward_on_cuda(*inputs)
    assert launched == [*SMALL_KERNELS, "pdcr_bwd_kernel", "pdcr_grad_kernel"]
    assert normwise(by_small, by_tiles.double()) < BF16_ERROR
    _, _, *by_others = pdcr.pdcr_forward_on_cuda(vectors, ratios, valid, *how)
    assert [each.shape for each in by_others] == [packed.shape, floats.shape]
    assert torch.equal(by_others[0], packed)


@pytest.mark.parametrize(
    ("count", "channels", "along_channels"),
    [(128, 64, True), (140, 64, True), (40, 33, True), (40, 32, False)],
    ids=["few", "many", "no words", "far apart"],
)
def test_many_vectors_and_odd_ones_are_packed_once(
    count, channels, along_channels, request, monkeypatch, launched
):
    monkeypatch.setattr(plan, "MOST_PACKED", MOST_PACKED)
    vectors, ratios = make_inputs(1, count, channels, 2, torch.bfloat16)
    if not along_channels:
        vectors = torch.empty(1, channels, count, dtype=torch.bfloat16).mT.copy_(vectors)
    assert_as_exact_as_plain(vectors, ratios, None, PAPER, "triton")
    is_small = request.node.callspec.id == "few"
    others = ["pdcr_rows_kernel", "pdcr_fwd_kernel"]
    assert launched == [*(SMALL_KERNELS[:1] if is_small else others), SMALL_KERNELS[1]]


def test_equal_bits_without_asking():
    torch.use_deterministic_algorithms(False)
    vectors, ratios = make_inputs(2, 100, 32, 2, torch.bfloat16)
    grad = torch.tensor(1.0)
    first, second = (
        loss_and_gradient("triton", vectors, ratios, None, PAPER, grad, "mean") for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert all(not counter.any() for counter in _counters._of_streams.values())


def dense(count: int, channels: int = 64, dtype: torch.dtype = torch.bfloat16, **problem: Any) -> Call:
    source = Source.dense((2, count, channels), (count * channels, channels, 1))
    segment = Segment(0, 0, 0, 0, 0)
    return Call.make([source], [Problem((segment,), **problem)], 2, dtype, AFFINITIES["ratio"])


def test_which_calls_are_small():
    assert plan.is_small(dense(256))
    for other in (dense(257), dense(64, 257), dense(64, dtype=torch.float32), dense(64, merged=True)):
        assert not plan.is_small(other)
    (source,), (problem,), *others = dense(64)
    (segment,) = problem.segments
    twice = Call((source,), (problem, problem), *others)
    across = Call((source, source), (Problem((segment, segment._replace(source=1))),), *others)
    unused = Call((source, source), (problem,), *others)
    for other in (twice, across, unused):
        assert not plan.is_small(other)


@pytest.mark.parametrize("table", ["SMALL_FORWARD", "SMALL_BACKWARD"])
def test_launch_tables_serve_every_width(table):
    launches = getattr(plan, table)
    assert max(launches) == WIDEST_FUSED
    for launch in launches.values():
        assert PADDING % launch.block_i == PADDING % launch.block_j == 0


def test_counters_belong_to_one_stream_or_one_captured_kernel(monkeypatch):
    device, state = torch.device("cuda", 0), {"stream": 1, "capturing": False}
    zeros = torch.zeros
    monkeypatch.setattr(_counters, "_of_streams", {})
    monkeypatch.setattr(_counters, "_free", {})
    monkeypatch.setattr(_counters, "_COUNTERS_AT_ONCE", 4)
    monkeypatch.setattr(_counters, "copied", lambda numbers, _device: torch.tensor(numbers))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda _device: type("Stream", (), {"cuda_stream": state["stream"]})
    )

    def address(stream: int, capturing: bool = False) -> int:
        state.update(stream=stream, capturing=capturing)
        taken.append(_counters.zero_counter(device))  # keeps memory from being used again
        assert taken[-1].dtype == torch.int64
        assert not taken[-1].any()
        return taken[-1].data_ptr()

    taken: list[torch.Tensor] = []
    first, second = address(1), address(2)
    assert first != second
    assert (address(1), address(2)) == (first, second)
    captured = [address(1, True) for _ in range(4)]  # two of them after the last free one
    assert len({first, second, *captured}) == 6
    assert address(3) not in {first, second, *captured}
