"""A whole call by the Triton kernels, interpreted on CPU tensors, against its plain operator in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import blob_labels, normwise_error
from torch import Tensor

from contrastseg_fast import PDCRLoss, ReceptiveField, _backend, problems
from contrastseg_fast.ops import pdcr_call

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not _backend.interpreting(), reason="kernels are interpreted with TRITON_INTERPRET=1 only"
)
if _backend.interpreting():
    from contrastseg_fast.kernels.pdcr import plan

FIELDS = {
    "stem": ReceptiveField((3, 3), (2, 2), (-1, -1)),
    "middle": ReceptiveField((7, 7), (2, 2), (-3, -3)),
    "deep": ReceptiveField((15, 15), (4, 4), (-7, -7)),
}
CHANNELS = {"stem": 6, "middle": 40, "deep": 40}
SHAPES = {"stem": (12, 10), "middle": (12, 10), "deep": (6, 5)}
BF16_ERROR = 3e-3  # of rounding a gradient to bf16
OPTIONS: dict[str, dict[str, Any]] = {
    "three layers": {},
    "sum": {"reduction": "sum"},
    "each image": {"reduction": "none"},
    "raster": {"sampler": "raster", "num_samples": 37},
    "random": {"sampler": "random", "num_samples": 30},
    "sizes of patches": {"patch_sizes": (3, (5, 9))},
    "pairs across layers": {"cross_layers": [("middle", "deep"), ("deep", "middle")]},
    "pairs across images": {"pairs": "batch"},
    "pairs across images and layers": {
        "pairs": "batch",
        "cross_layers": [("deep", "middle")],
        "patch_sizes": (3, 7),
    },
    "own categories": {"affinity": "diagonal"},
    "largest class": {"affinity": "bipartite", "cross_layers": [("middle", "deep")]},
    "without background": {"include_background": False, "class_distance": "tv"},
    "homogeneous images left out": {"skip_homogeneous": True, "ignore_index": 2},
    "released": {"variant": "released", "border": "background"},
    "cold": {"temperature": 0.004},
}


def feature_maps(dtype: torch.dtype, channels: dict[str, int] = CHANNELS) -> dict[str, Tensor]:
    maps = {layer: torch.randn(2, channels[layer], *shape) for layer, shape in SHAPES.items()}
    maps["middle"] = maps["middle"].contiguous(memory_format=torch.channels_last)
    return {layer: x.to(dtype) for layer, x in maps.items()}


def some_labels() -> Tensor:
    labels = blob_labels(2, (24, 20), 3)
    labels[1] = 1  # homogeneous
    labels[:, :9, :9] = 2
    return labels


def recorded_call(pdcr: PDCRLoss, run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """The arguments of the operator in a call."""
    calls = []
    operator = pdcr_call.pdcr_call_forward
    with monkeypatch.context() as patch:
        patch.setattr(
            pdcr_call, "pdcr_call_forward", lambda *inputs: calls.append(inputs) or operator(*inputs)
        )
        run()
    (inputs,) = calls
    return inputs


def loss_and_gradients(forward: Any, backward: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The loss and the gradients of a call by functions like the operator and its derivative."""
    features, positions, labels, numbers, affinity, least, _ = inputs
    loss, saved = forward(features, positions, labels, numbers, affinity, least, "triton")
    plan_of_call = pdcr_call.CallPlan.from_numbers(numbers)
    shapes = [n for shape in pdcr_call.layer_shapes(features, positions, plan_of_call) for n in shape]
    grad = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    gradients = backward(grad, features, positions, saved, shapes, numbers, affinity, "triton")
    return [loss, *gradients]


def assert_right(inputs: tuple[Any, ...], tolerance: float) -> None:
    features = inputs[0]
    actual = loss_and_gradients(
        pdcr_call.pdcr_call_forward_on_cuda, pdcr_call.pdcr_call_backward_on_cuda, inputs
    )
    exact_inputs = ([x.double() for x in features], *inputs[1:])
    plain = [lambda *x: pdcr_call._forward(*x[:-1]), lambda *x: pdcr_call._backward(*x[:-1])]
    expected = loss_and_gradients(*plain, exact_inputs)
    assert normwise_error(actual[0], expected[0]) < 1e-6
    for gradient, exact, x in zip(actual[1:], expected[1:], features, strict=True):
        assert gradient.shape == x.shape
        assert gradient.dtype == x.dtype
        assert gradient.stride() == x.stride()
        assert normwise_error(gradient, exact) < tolerance


@pytest.fixture(params=[True, False], ids=["deterministic", "atomic"])
def deterministic(request: pytest.FixtureRequest) -> None:
    torch.use_deterministic_algorithms(request.param)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images have several parts in every kernel, though they are small."""
    monkeypatch.setattr(plan, "MOST_SMALL", 0)  # which test_pdcr_small_triton.py is for
    monkeypatch.setattr(plan, "ROWS", plan.RowLaunch(1 << 11, 64, 4))
    monkeypatch.setattr(plan, "LOSS_BLOCK", 32)
    monkeypatch.setattr(plan, "processors", lambda _tensor: 64)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_maps_of_bf16(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)
    pdcr = PDCRLoss(FIELDS, 3, **{"num_samples": 70, "class_distance": "mean", **options})
    maps, labels = feature_maps(torch.bfloat16), some_labels()
    inputs = recorded_call(pdcr, lambda: pdcr(maps, labels), monkeypatch)
    assert_right(inputs, BF16_ERROR)


@pytest.mark.parametrize(
    "options",
    [
        {"patch_sizes": (1,)},
        {"pairs": "batch", "cross_layers": [("deep", "middle")], "patch_sizes": (1,), "reduction": "sum"},
        {"include_background": False, "class_distance": "tv", "sampler": "random", "patch_sizes": (1,)},
        {"affinity": "bipartite", "cross_layers": [("middle", "deep")], "reduction": "none"},
    ],
    ids=str,
)
def test_grouped_rows_of_several_layers(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of images with many vectors; some layers have groups of whole tiles, some have none."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(problems, "FEWEST_GROUPED", 1)
    monkeypatch.setattr(plan, "ROWS", plan.RowLaunch(1 << 13, 64, 4))
    monkeypatch.setattr(plan, "processors", lambda _tensor: 9)
    pdcr = PDCRLoss(FIELDS, 3, **{"num_samples": 400, "class_distance": "mean", **options})
    maps = {
        layer: torch.nn.functional.interpolate(x.float(), scale_factor=2).bfloat16()
        + 0.1 * torch.randn(*x.shape[:2], *(2 * extent for extent in x.shape[2:])).bfloat16()
        for layer, x in feature_maps(torch.bfloat16).items()
    }
    labels = some_labels().repeat_interleave(2, 1).repeat_interleave(2, 2)
    labels[0, 20:] = 0
    inputs = recorded_call(pdcr, lambda: pdcr(maps, labels), monkeypatch)
    assert_right(inputs, BF16_ERROR)


@pytest.mark.parametrize(
    ("dtype", "channels"), [(torch.float32, CHANNELS), (torch.bfloat16, {**CHANNELS, "deep": 260})], ids=str
)
def test_maps_that_no_fused_kernel_takes(
    dtype: torch.dtype, channels: dict[str, int], deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pdcr = PDCRLoss(FIELDS, 3, num_samples=40, class_distance="tv")
    maps, labels = feature_maps(dtype, channels), some_labels()
    inputs = recorded_call(pdcr, lambda: pdcr(maps, labels), monkeypatch)
    assert_right(inputs, 1e-5 if dtype == torch.float32 else BF16_ERROR)


@pytest.mark.parametrize("options", [{}, {"pairs": "batch", "cross_layers": [("middle", "deep")]}], ids=str)
def test_vectors_sampled_before(
    options: dict[str, Any], deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pdcr = PDCRLoss(FIELDS, 3, num_samples=70, class_distance="tv", **options)
    samples = [pdcr.sample(x, layer) for layer, x in feature_maps(torch.float16).items()]
    inputs = recorded_call(pdcr, lambda: pdcr.loss(samples, some_labels()), monkeypatch)
    assert_right(inputs, BF16_ERROR)


def test_layers_of_several_dtypes_take_the_operators_of_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pdcr = PDCRLoss(FIELDS, 3, num_samples=20, class_distance="tv")
    maps = feature_maps(torch.bfloat16)
    maps["deep"] = maps["deep"].float()
    inputs = recorded_call(pdcr, lambda: pdcr(maps, some_labels()), monkeypatch)
    _, saved = pdcr_call.pdcr_call_forward_on_cuda(*inputs[:-1], "auto")
    assert len(saved) == 3 + 5 * 3  # taken vectors, then what is saved of every problem
