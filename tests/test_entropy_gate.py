"""The entropy-gate operator against the reference in float64, and against its own guarantees."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from conftest import normwise_error
from torch import Tensor

from contrastseg_fast import _backend, reference
from contrastseg_fast.ops import entropy_gate as op

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {
    "pixels": (2, 21, 9, 15),
    "voxels": (2, 8, 5, 3, 11),
    "long rows": (1, 5, 41, 401),  # a strip and a bit
    "one channel": (3, 1, 7, 5),
    "one location": (2, 33, 1, 1),
    "sequence": (2, 16, 67),
    "no space": (70, 12),
}

needs_extension = pytest.mark.skipif(
    not _backend.has_cpu_extension(), reason="the C++ extension is not installed"
)


def entropy_gate_forward(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """As dispatched: C++ where installed."""
    return op.entropy_gate_forward(features, logits, "auto")


def entropy_gate_backward(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    return op.entropy_gate_backward(*inputs, "auto")


@pytest.fixture(params=["op", "default"])
def gate(request: pytest.FixtureRequest):
    """Forward and backward: as dispatched (C++ where installed), and the plain-PyTorch default."""
    if request.param == "op":
        return entropy_gate_forward, entropy_gate_backward
    return op._forward, op._backward


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def extreme_logits(dtype: torch.dtype) -> Tensor:
    """`(1, 3, 13)`: four certain locations, three undecided, two between two classes, four undefined."""
    big = min(1e30, torch.finfo(dtype).max)
    inf, nan = torch.inf, torch.nan
    certain = [[0, big, -big], [-inf, 7, -inf], [-big, -big, big], [0, 0, 3000]]
    constant = [[0, 0, 0], [big, big, big], [-big, -big, -big]]
    two_left = [[-inf, 3, 3], [big, -inf, big]]
    undefined = [[nan, 0, 0], [0, 0, nan], [inf, 0, 0], [-inf, -inf, -inf]]
    return torch.tensor([certain + constant + two_left + undefined], dtype=dtype).mT


def channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.to(memory_format=formats[x.dim()]) if x.dim() in formats else x


def make_inputs(
    shape: tuple[int, ...], classes: int = 3, dtype: torch.dtype = torch.float32, scale: float = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, logits, and the gradients of both results."""
    features = torch.randn(shape).to(dtype)
    logits = (scale * torch.randn(shape[0], classes, *shape[2:])).to(dtype)
    grad_uncertainty = torch.randn(shape[0], 1, *shape[2:], dtype=op._accumulation_dtype(features, logits))
    return features, logits, torch.randn(shape).to(dtype), grad_uncertainty


def by_reference(
    features: Tensor,
    logits: Tensor,
    grad_gated: Tensor,
    grad_uncertainty: Tensor,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Gated features, uncertainty and both gradients, computed in `dtype`."""
    features, logits = (x.detach().to(dtype).requires_grad_() for x in (features, logits))
    gated, u = reference.entropy_gate(features, logits, return_uncertainty=True)
    grads = (grad_gated.to(dtype), grad_uncertainty.to(dtype))
    return [gated.detach(), u.detach(), *torch.autograd.grad((gated, u), (features, logits), grads)]


def by_gate(
    gate, features: Tensor, logits: Tensor, grad_gated: Tensor, grad_uncertainty: Tensor
) -> list[Tensor]:
    forward, backward = gate
    return [*forward(features, logits), *backward(grad_gated, grad_uncertainty, features, logits)]


def assert_as_exact_as_plain(actual: list[Tensor], inputs: tuple[Tensor, ...]) -> None:
    """The error against float64 is at most twice that of plain PyTorch in fp32, rounded as the results are.

    In fp64 plain PyTorch is the oracle itself, and a few roundings are allowed.
    """
    exact = by_reference(*inputs)
    computed = op._accumulation_dtype(*inputs[:2])
    plain = by_reference(*inputs, dtype=computed)
    dtypes = (inputs[0].dtype, computed, inputs[0].dtype, inputs[1].dtype)
    names = ("gated", "uncertainty", "features' gradient", "logits' gradient")
    for name, dtype, a, p, e in zip(names, dtypes, actual, plain, exact, strict=True):
        assert a.dtype == dtype, name
        assert a.shape == e.shape, name
        if e.numel() > 0:
            roundings = 4 if dtype == torch.float64 else 1
            allowed = 2 * normwise_error(p.to(dtype), e) + roundings * torch.finfo(dtype).eps
            assert normwise_error(a, e) <= allowed, f"{name}: {normwise_error(a, e)} against {allowed}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", [torch.clone, channels_last])
@pytest.mark.parametrize("dtype", FLOATS)
def test_against_the_reference(gate, dtype: torch.dtype, layout, shape: tuple[int, ...]) -> None:
    inputs = tuple(layout(x) for x in make_inputs(shape, dtype=dtype))
    actual = by_gate(gate, *inputs)
    assert_as_exact_as_plain(actual, inputs)
    for result, like in zip(actual, (inputs[0], inputs[3], inputs[0], inputs[1]), strict=True):
        assert result.is_contiguous() == like.is_contiguous()
        assert channels_last(result).data_ptr() == result.data_ptr() or result.is_contiguous()


@pytest.mark.parametrize("classes", [2, 4, 5, 19, 128])
def test_numbers_of_classes(gate, classes: int) -> None:
    for layout in (torch.clone, channels_last):
        inputs = tuple(layout(x) for x in make_inputs((2, 6, 7, 9), classes))
        assert_as_exact_as_plain(by_gate(gate, *inputs), inputs)


@pytest.mark.parametrize("feature_dtype", FLOATS)
@pytest.mark.parametrize("logit_dtype", FLOATS)
def test_mixed_dtypes(gate, feature_dtype: torch.dtype, logit_dtype: torch.dtype) -> None:
    features, logits, grad_gated, _ = make_inputs((2, 9, 5, 8))
    features, grad_gated, logits = (
        features.to(feature_dtype),
        grad_gated.to(feature_dtype),
        logits.to(logit_dtype),
    )
    grad_uncertainty = torch.randn(2, 1, 5, 8, dtype=op._accumulation_dtype(features, logits))
    inputs = (features, logits, grad_gated, grad_uncertainty)
    assert_as_exact_as_plain(by_gate(gate, *inputs), inputs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_large_maps(dtype: torch.dtype, layout) -> None:
    """Large enough to be written past the caches, shared out among threads, with channels left over."""
    shape = (2, 35, 256, 256) if dtype.itemsize == 2 else (2, 18, 256, 256)
    inputs = tuple(layout(x) for x in make_inputs(shape, 2, dtype))
    gated, u, grad_features, grad_logits = by_gate((entropy_gate_forward, entropy_gate_backward), *inputs)
    torch.testing.assert_close(gated, (inputs[0] * (2 - u)).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(grad_features, (inputs[2] * (2 - u)).to(dtype), rtol=0, atol=0)
    expected = by_reference(*inputs)
    assert normwise_error(u, expected[1]) <= 4 * torch.finfo(u.dtype).eps
    assert normwise_error(grad_logits, expected[3]) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_memory_fresh_from_the_system(layout) -> None:
    """Results of more than 32 MiB, which allocators map anew, and which nothing has touched yet."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    features, logits, grad_gated, _ = (layout(x) for x in make_inputs((1, 16, 760, 752), 2))
    gated, u = entropy_gate_forward(features, logits)
    torch.testing.assert_close(gated, features * (2 - u), rtol=0, atol=0)
    grad_features, _ = entropy_gate_backward(grad_gated, None, features, logits)
    torch.testing.assert_close(grad_features, grad_gated * (2 - u), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_logits(gate, dtype: torch.dtype) -> None:
    logits = extreme_logits(dtype)
    features, grad_gated = torch.randn(2, 1, 5, 13, dtype=torch.float64).to(dtype)
    gated, u = gate[0](features, logits)
    expected = (
        [0] * 4
        + [1] * 3
        + [torch.log(torch.tensor(2.0)) / torch.log(torch.tensor(3.0))] * 2
        + [torch.nan] * 4
    )
    torch.testing.assert_close(
        u.flatten().tolist(), [float(x) for x in expected], rtol=1e-6, atol=0, equal_nan=True
    )
    torch.testing.assert_close(gated, (features * (2 - u)).to(dtype), equal_nan=True)
    grad_features, grad_logits = gate[1](grad_gated, None, features, logits)
    torch.testing.assert_close(grad_features, (grad_gated * (2 - u)).to(dtype), equal_nan=True)
    torch.testing.assert_close(grad_logits[..., :9], torch.zeros_like(logits[..., :9]), rtol=0, atol=1e-5)
    assert grad_logits[..., 9:].isnan().any(1).all()


def test_values_beyond_the_range_of_fp16_and_what_is_not_a_number(gate) -> None:
    logits = torch.zeros(1, 2, 8, dtype=torch.float16)
    logits[:, 1] = -50  # certain: the gate is 2
    x = torch.tensor([65504, 40000, -40000, torch.inf, torch.nan, 6e-8, 3e-5, -0.0]).half()
    for dtype in (torch.float16, torch.bfloat16):
        features = x.to(dtype)[None, None]
        gated, _ = gate[0](features, logits)
        torch.testing.assert_close(gated, features * 2, rtol=0, atol=0, equal_nan=True)
        assert gated.signbit()[..., -1].all(), "-0.0 stays"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_as_torch_does(dtype: torch.dtype) -> None:
    """Every 16-bit number times gates between 1 and 2, channel by channel and channels last."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 16, 64, 64)
    logits = 4 * torch.randn(1, 2, 64, 64)
    for layout in (torch.clone, channels_last):
        gated, u = entropy_gate_forward(layout(numbers), logits)
        torch.testing.assert_close(gated, (numbers * (2 - u)).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("threads")
def test_equal_bits_for_any_number_of_threads() -> None:
    for shape in ((3, 19, 65, 63), (1, 300, 33, 7)):
        for layout in (torch.clone, channels_last):
            inputs = tuple(layout(x) for x in make_inputs(shape, 5))
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(by_gate((entropy_gate_forward, entropy_gate_backward), *inputs))
            for result in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory."""
    doubled = torch.cat([torch.full_like(x, torch.nan), x], 1)
    return {
        "slice of channels": doubled[:, x.shape[1] :],
        "slice of channels, channels last": channels_last(doubled)[:, x.shape[1] :],
        "transposed": x.mT.contiguous().mT,
        "every other location": torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
        "channels last": channels_last(x),
        "batch innermost": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "contiguous": x.contiguous(),
    }


@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_inputs_of_any_strides(gate, layout) -> None:
    inputs = tuple(layout(x) for x in make_inputs((2, 6, 8, 10), 4))
    expected = by_gate(gate, *inputs)
    for position in range(4):
        for kind, other in strided(inputs[position]).items():
            actual = by_gate(gate, *inputs[:position], other, *inputs[position + 1 :])
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, msg=f"input {position} {kind}")
    if layout is torch.clone:
        transposed = gate[0](inputs[0].mT.contiguous().mT, inputs[1])[0]
        assert transposed.is_contiguous()


@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_expanded_and_missing_gradients(gate, layout) -> None:
    features, logits, grad_gated, grad_uncertainty = (layout(x) for x in make_inputs((2, 6, 8, 10), 4))
    one = torch.tensor(0.5)
    backward = gate[1]
    for gated_grad in (one.expand(2, 6, 8, 10), grad_gated[:, :1].expand(-1, 6, -1, -1), None):
        for uncertainty_grad in (one.expand(2, 1, 8, 10), grad_uncertainty, None):
            actual = backward(gated_grad, uncertainty_grad, features, logits)
            dense = [
                torch.zeros(2, channels, 8, 10) if grad is None else grad.contiguous()
                for channels, grad in ((6, gated_grad), (1, uncertainty_grad))
            ]
            for a, e in zip(actual, by_reference(features, logits, *dense)[2:], strict=True):
                torch.testing.assert_close(a, e.float(), rtol=1e-5, atol=1e-6)


def test_gradients_that_nothing_asks_for() -> None:
    features, logits, _, _ = make_inputs((2, 4, 5, 6))
    features.requires_grad_()
    gated, u = entropy_gate_forward(features, logits.requires_grad_())
    (grad_features,) = torch.autograd.grad(gated.sum(), features, retain_graph=True)
    torch.testing.assert_close(grad_features, (2 - u).expand_as(features).detach())
    grads = torch.autograd.grad(u.sum(), (features, logits), retain_graph=True)
    assert not grads[0].any()
    assert grads[1].any()
    assert not entropy_gate_forward(features.detach(), logits.detach())[0].requires_grad
    assert entropy_gate_forward(features.detach(), logits)[0].requires_grad


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0, 3), (0, 0, 0)])
def test_nothing_to_gate(gate, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(shape)
    for a, e in zip(by_gate(gate, *inputs), by_reference(*inputs), strict=True):
        torch.testing.assert_close(a, e.float())


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 2, 3), (1, 2, 2, 2, 2)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    features, logits, _, _ = make_inputs(shape, dtype=torch.float64, scale=1)
    inputs = (features.requires_grad_(), logits.requires_grad_())
    assert torch.autograd.gradcheck(entropy_gate_forward, inputs)


def test_second_derivatives_raise() -> None:
    features, logits, _, _ = (x.requires_grad_() for x in make_inputs((2, 4, 5, 6)))
    gated, u = entropy_gate_forward(features, logits)
    for output in (gated, u):
        grads = torch.autograd.grad(output.sum(), (features, logits), create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            grads[1].sum().backward()


@pytest.mark.parametrize("layout", [torch.clone, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(layout, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares runs, poisoned memory has no part in it
    features, logits, grad_gated, grad_uncertainty = (
        layout(x) for x in make_inputs((2, 5, 4, 3), dtype=dtype)
    )
    inputs = (features.requires_grad_(), logits.requires_grad_(), "auto")
    torch.library.opcheck(op.entropy_gate_forward, inputs)
    for grads in ((grad_gated, grad_uncertainty), (grad_gated, None), (None, grad_uncertainty)):
        torch.library.opcheck(op.entropy_gate_backward, (*grads, features.detach(), logits.detach(), "auto"))
    strided = features.mT.contiguous().mT.detach()
    torch.library.opcheck(op.entropy_gate_forward, (strided, logits.detach(), "auto"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_graph_breaks(dynamic: bool) -> None:
    def function(features: Tensor, logits: Tensor) -> Tensor:
        gated, u = entropy_gate_forward(features.relu(), logits)
        return (gated * gated).mean() + u.mean()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 5, 6, 7), (1, 4, 9, 8)):
        for layout in (torch.clone, channels_last):
            features, logits, _, _ = (layout(x).requires_grad_() for x in make_inputs(shape))
            actual, expected = (
                (value, *torch.autograd.grad(value, (features, logits)))
                for value in (compiled(features, logits), function(features, logits))
            )
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e)
                assert a.stride() == e.stride()


def test_autocast_changes_nothing(gate) -> None:
    inputs = make_inputs((2, 9, 5, 8))
    expected = by_gate(gate, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = by_gate(gate, *inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):  # as in a network: convolutions give 16-bit logits
        features = inputs[0].requires_grad_()
        weight = torch.randn(3, 9, 1, 1, requires_grad=True)
        logits = torch.nn.functional.conv2d(features, weight)
        gated, u = entropy_gate_forward(features, logits)
    assert (logits.dtype, gated.dtype, u.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    gated.sum().backward()
    assert features.grad.isfinite().all()
    assert weight.grad.any()


@needs_extension
def test_arguments_that_do_not_fit_are_refused() -> None:
    features, logits, grad_gated, grad_uncertainty = make_inputs((2, 4, 5, 6))
    for wrong in (logits[:1], logits[:, :1], logits[..., :3], logits[..., 0], logits.long()):
        with pytest.raises(RuntimeError, match="entropy_gate"):
            entropy_gate_forward(features, wrong)
    with pytest.raises(RuntimeError, match="entropy_gate"):
        entropy_gate_backward(grad_gated[:1], None, features, logits)
    with pytest.raises(RuntimeError, match="entropy_gate"):
        entropy_gate_backward(None, grad_uncertainty.expand(-1, 2, -1, -1), features, logits)


@needs_extension
@pytest.mark.skipif("CONTRASTSEG_FAST_CPU" in os.environ, reason="already run for one capability")
@pytest.mark.parametrize("capability", ["avx2", "baseline"])
def test_lesser_capabilities(capability: str) -> None:
    tests = "(reference or classes or large or extreme or fp16 or rounds or threads) and not default"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests, __file__]
    environment = {**os.environ, "CONTRASTSEG_FAST_CPU": capability}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
