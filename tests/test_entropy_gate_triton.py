"""The entropy gate's Triton kernels, on a card or interpreted, against the reference in float64."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from conftest import normwise_error
from test_entropy_gate import (
    FLOATS,
    assert_as_exact_as_plain,
    by_gate,
    by_reference,
    channels_last,
    extreme_logits,
    make_inputs,
    strided,
)
from torch import Tensor

from contrastseg_fast import _backend, _checks
from contrastseg_fast.functional import entropy_gate
from contrastseg_fast.ops import entropy_gate as op

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="no CUDA device, and TRITON_INTERPRET is not 1",
)

LAYOUTS = [torch.clone, channels_last]


def forward(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return op.entropy_gate_forward_on_cuda(features, logits, "triton")


def backward(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    return op.entropy_gate_backward_on_cuda(*inputs, "triton")


TRITON = (forward, backward)


def on_device(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The inputs where the kernels run, in memory of the same layout."""

    def move(x: Tensor | None) -> Tensor | None:
        if x is None or DEVICE == "cpu":
            return x
        memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(DEVICE)
        return memory.as_strided(x.shape, x.stride(), x.storage_offset())

    return tuple(move(x) for x in inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [(1, 21, 9, 15), (1, 6, 3, 3, 5), (1, 8, 4, 40), (1, 131, 2, 8), (2, 1, 3, 5), (2, 16, 67), (3, 12)],
)
def test_against_the_reference(dtype: torch.dtype, layout, shape: tuple[int, ...]) -> None:
    inputs = on_device(*(layout(x) for x in make_inputs(shape, dtype=dtype)))
    actual = by_gate(TRITON, *inputs)
    assert_as_exact_as_plain(actual, inputs)
    for result, like in zip(actual, (inputs[0], inputs[3], inputs[0], inputs[1]), strict=True):
        assert result.is_contiguous() == like.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [*range(2, 10), 33])
def test_numbers_of_classes(classes: int, layout) -> None:
    inputs = on_device(*(layout(x) for x in make_inputs((1, 6, 3, 5), classes)))
    assert_as_exact_as_plain(by_gate(TRITON, *inputs), inputs)


@pytest.mark.parametrize(("block_c", "block_l"), [(2, 128), (4, 64), (64, 16)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_any_sizes(layout, block_c: int, block_l: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from contrastseg_fast.kernels import entropy_gate as kernels

    monkeypatch.setattr(kernels, "choose_launch", lambda *_: kernels.Launch(block_c, block_l, 4))
    inputs = on_device(*(layout(x) for x in make_inputs((2, 24, 5, 40), 11)))
    assert_as_exact_as_plain(by_gate(TRITON, *inputs), inputs)


def test_small_maps_get_narrow_blocks_and_many_programs() -> None:
    from contrastseg_fast.kernels.entropy_gate import choose_launch

    def blocks(*shape: int, channels_last: bool = False) -> tuple[int, int]:
        return choose_launch(torch.empty(shape, dtype=torch.bfloat16, device="meta"), channels_last)[:2]

    assert blocks(1, 64, 1 << 20) == (16, 128)
    assert blocks(1, 64, 1 << 20, channels_last=True) == (64, 32)
    assert blocks(1, 3, 1 << 20, channels_last=True) == (4, 512)
    assert blocks(1, 512, 64) == (128, 16)
    assert blocks(1, 512, 64, channels_last=True) == (128, 16)
    assert blocks(1, 3, 64) == (4, 16)


@pytest.mark.parametrize("logit_dtype", FLOATS)
@pytest.mark.parametrize("feature_dtype", FLOATS)
def test_mixed_dtypes(feature_dtype: torch.dtype, logit_dtype: torch.dtype) -> None:
    features, logits, grad_gated, grad_uncertainty = make_inputs((2, 9, 5, 8))
    features, grad_gated, logits = (
        features.to(feature_dtype),
        grad_gated.to(feature_dtype),
        logits.to(logit_dtype),
    )
    is_double = torch.float64 in (feature_dtype, logit_dtype)
    grad_uncertainty = grad_uncertainty.to(torch.float64 if is_double else torch.float32)
    inputs = on_device(features, logits, grad_gated, grad_uncertainty)
    assert_as_exact_as_plain(by_gate(TRITON, *inputs), inputs)


@pytest.mark.filterwarnings("ignore:.*invalid value:RuntimeWarning", "ignore:.*overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_logits(dtype: torch.dtype) -> None:
    logits = extreme_logits(dtype)
    features, grad_gated = torch.randn(2, 1, 5, 13, dtype=torch.float64).to(dtype)
    features, logits, grad_gated = on_device(features, logits, grad_gated)
    gated, u = forward(features, logits)
    default = torch._C.DispatchKey.CompositeExplicitAutograd
    expected_gated, expected_u = op.entropy_gate_forward._op_dk(default, features, logits, "auto")
    torch.testing.assert_close(u, expected_u, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(gated, expected_gated, equal_nan=True)
    grad_features, grad_logits = backward(grad_gated, None, features, logits)
    torch.testing.assert_close(grad_features, (grad_gated * (2 - u)).to(dtype), equal_nan=True)
    torch.testing.assert_close(grad_logits[..., :9], torch.zeros_like(logits[..., :9]), rtol=0, atol=1e-5)
    assert grad_logits[..., 9:].isnan().any(1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_strides(layout) -> None:
    inputs = tuple(layout(x) for x in make_inputs((2, 8, 2, 4), 2))
    expected = by_gate(TRITON, *on_device(*inputs))
    for position in range(4):
        for kind, other in strided(inputs[position]).items():
            actual = by_gate(TRITON, *on_device(*inputs[:position], other, *inputs[position + 1 :]))
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, msg=f"input {position} {kind}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expanded_and_missing_gradients(layout) -> None:
    features, logits, grad_gated, grad_uncertainty = (layout(x) for x in make_inputs((2, 6, 4, 5), 4))
    one = torch.tensor(0.5)
    for gated_grad in (one.expand(2, 6, 4, 5), grad_gated, None):
        for uncertainty_grad in (one.expand(2, 1, 4, 5), grad_uncertainty, None):
            dense = [
                torch.zeros(2, channels, 4, 5) if grad is None else grad.contiguous()
                for channels, grad in ((6, gated_grad), (1, uncertainty_grad))
            ]
            actual = backward(*on_device(gated_grad, uncertainty_grad, features, logits))
            for a, e in zip(actual, by_reference(features, logits, *dense)[2:], strict=True):
                torch.testing.assert_close(a.cpu(), e.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0, 3), (0, 0, 0)])
def test_nothing_to_gate(shape: tuple[int, ...]) -> None:
    inputs = on_device(*make_inputs(shape))
    for a, e in zip(by_gate(TRITON, *inputs), by_reference(*inputs), strict=True):
        torch.testing.assert_close(a, e.float())


@pytest.fixture
def operators() -> Iterator[None]:
    """Let the operators take the Triton kernels on the device under test."""
    if DEVICE == "cuda":
        yield
        return
    library = torch.library.Library("contrastseg_fast", "IMPL")
    library.impl("entropy_gate_forward", op.entropy_gate_forward_on_cuda, "CPU", allow_override=True)
    library.impl("entropy_gate_backward", op.entropy_gate_backward_on_cuda, "CPU", allow_override=True)
    yield
    library._destroy()


def test_gradients_flow_and_second_derivatives_raise(operators: None) -> None:
    features, logits, _, _ = (
        x.requires_grad_() for x in on_device(*make_inputs((1, 3, 2, 4), dtype=torch.float64))
    )
    assert torch.autograd.gradcheck(op.entropy_gate_forward, (features, logits, "triton"))
    gated, _ = op.entropy_gate_forward(features, logits, "triton")
    (grad,) = torch.autograd.grad(gated.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_opcheck(operators: None) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares runs: memory must not be poisoned
    features, logits, grad_gated, grad_uncertainty = on_device(*make_inputs((2, 5, 4, 3)))
    leaves = features.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.library.opcheck(op.entropy_gate_forward, (*leaves, "triton"))
    inputs = (grad_gated, grad_uncertainty, features, logits, "triton")
    torch.library.opcheck(op.entropy_gate_backward, inputs)


def test_compiled_without_graph_breaks(operators: None) -> None:
    def function(features: Tensor, logits: Tensor) -> Tensor:
        gated, u = op.entropy_gate_forward(features.relu(), logits, "triton")
        return (gated * gated).mean() + u.mean()

    inputs = [x.requires_grad_() for x in on_device(*make_inputs((1, 5, 6, 7)))[:2]]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, function))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_cpu_tensors_are_refused() -> None:
    features, logits, _, _ = make_inputs((1, 5, 6, 7))
    with pytest.raises(ValueError, match="backend: entropy_gate with backend='triton' expects CUDA tensors"):
        entropy_gate(features, logits, backend="triton")


def _fill_nothing(*_: object) -> None:
    """Stands in for a launch."""


class TestChoice:
    """Which kernels CUDA tensors get with backend="auto", on CPU tensors, with reasons made up."""

    @pytest.fixture(autouse=True)
    def forget_warnings(self) -> None:
        _checks.warn_once.cache_clear()

    @pytest.mark.parametrize(
        ("missing", "choice", "words"),
        [
            ((), "triton", None),
            (("cuda",), "triton", None),
            (
                ("triton",),
                "cuda",
                "entropy_gate runs in CUDA kernels, as the Triton kernels cannot run: no triton",
            ),
            (
                ("triton", "cuda"),
                "default",
                "entropy_gate runs in plain PyTorch, .* cannot run: no triton",
            ),
        ],
    )
    @pytest.mark.filterwarnings("error")
    def test_order_and_its_single_warning(self, monkeypatch, missing, choice, words) -> None:
        monkeypatch.setattr(_backend, "unavailable", lambda b, _: f"no {b}" if b in missing else None)
        chosen = []
        monkeypatch.setattr(op, "_launches", lambda name: (chosen.append(name) or _fill_nothing,) * 2)
        features, logits, _, _ = make_inputs((1, 5, 4, 3))

        def run() -> None:
            chosen.clear()
            op.entropy_gate_forward_on_cuda(features, logits, "auto")
            assert chosen == ([] if choice == "default" else [choice])

        if words is not None:
            with pytest.warns(RuntimeWarning, match=words):
                run()
        run()  # without a second warning

    @pytest.mark.filterwarnings("ignore:contrastseg_fast. entropy_gate runs in")
    @pytest.mark.parametrize("missing", [(), ("cuda", "triton")], ids=["triton", "default"])
    def test_what_is_chosen_runs(self, monkeypatch, missing: tuple[str, ...]) -> None:
        monkeypatch.setattr(_backend, "unavailable", lambda b, _: f"no {b}" if b in missing else None)
        inputs = on_device(*make_inputs((1, 5, 4, 3)))
        gated = op.entropy_gate_forward_on_cuda(*inputs[:2], "auto")
        gradients = op.entropy_gate_backward_on_cuda(inputs[2], inputs[3], *inputs[:2], "auto")
        for a, e in zip((*gated, *gradients), by_reference(*inputs), strict=True):
            assert normwise_error(a, e) < 1e-6

    def test_cuda_tensors_have_that_choice(self) -> None:
        for direction in ("forward", "backward"):
            name = f"contrastseg_fast::entropy_gate_{direction}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
