"""Derivatives beyond `backward`, and `vmap`: each works as with the equations, or raises one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import blob_labels, normwise_error, random_ratios
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from contrastseg_fast import UAFS, PDCRLoss, ReceptiveField, attach_pdcr, unchecked
from contrastseg_fast.call_plan import CallPlan, LayerPlan, Patches
from contrastseg_fast.functional import (
    entropy_gate,
    foreground_ratio,
    nt_xent_loss,
    pdcr_loss,
    repelled_fraction,
    sample_grid,
)
from contrastseg_fast.ops import _library
from contrastseg_fast.pdcr_options import LayerSamples
from contrastseg_fast.sample_plan import SamplePlan
from contrastseg_fast.sampling import gather_vectors

Function = Callable[[Tensor], Tensor]
FORWARD_MODE = r": forward-mode derivatives \(.*\) are not implemented; use backend='reference'"
BY_FUNC = r": derivatives within torch\.func \(.*\) are not implemented; .* backend='reference'"


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def scalar(result: Tensor) -> Tensor:
    """A scalar that every element of the result moves by another amount."""
    return (result * torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape)).sum()


GENERATOR = torch.Generator().manual_seed(0)
VECTORS, A, B, FEATURES, LOGITS = (
    random(2, 9, 5),
    random(6, 5),
    random(6, 5),
    random(2, 4, 5, 4),
    random(2, 3, 5, 4),
)
MAP, SAMPLED = random(2, 5, 4, 4), random(2, 16, 5)
INDICES = sample_grid((5, 4), 6)
GATE = {backend: UAFS(2, 4, 3, norm="none", backend=backend).double() for backend in ("auto", "reference")}
GATE["reference"].load_state_dict(GATE["auto"].state_dict())
RATIOS = random_ratios(2, 9, 3, torch.float64)
LABELS = blob_labels(2, (8, 8), 3)
PDCR = {
    backend: PDCRLoss([ReceptiveField((3, 3), (2, 2), (-1, -1))], 3, class_distance="tv", backend=backend)
    for backend in ("auto", "reference")
}
PLACES = PDCR["auto"].place(MAP, 0)
NOWHERE = torch.empty(0, dtype=torch.int64)
CALL = CallPlan(
    layers=(LayerPlan((4, 4), SamplePlan((4, 4), (2, 2)), is_map=False),),
    patches=((Patches((3, 3), PDCR["auto"].patches[0].grids),),),
    sets=((0,),),
    merged=False,
    num_classes=2,
    border="full",
    ignore_index=None,
    skip_homogeneous=False,
    affinity="ratio",
    include_background=True,
    reduction="mean",
    checked_distance="mean",
)
# By name: the function of the differentiated tensor and of the backend, that tensor, who raises.
DIFFERENTIABLE: dict[str, tuple[Callable[[Tensor, str], Tensor], Tensor, str]] = {
    "pdcr_loss": (lambda x, b: pdcr_loss(x, RATIOS, backend=b), VECTORS, "pdcr_loss"),
    "nt_xent_loss of the first view": (lambda x, b: nt_xent_loss(x, B, backend=b), A, "nt_xent_loss"),
    "nt_xent_loss of the second view": (lambda x, b: nt_xent_loss(A, x, backend=b), B, "nt_xent_loss"),
    "entropy_gate of the features": (
        lambda x, b: scalar(entropy_gate(x, LOGITS, backend=b)),
        FEATURES,
        "entropy_gate",
    ),
    "entropy_gate of the logits": (
        lambda x, b: scalar(entropy_gate(FEATURES, x, backend=b)),
        LOGITS,
        "entropy_gate",
    ),
    "the uncertainty": (
        lambda x, b: scalar(entropy_gate(FEATURES, x, return_uncertainty=True, backend=b)[1]),
        LOGITS,
        "entropy_gate",
    ),
    "gather_vectors": (
        lambda x, b: scalar(gather_vectors(x, INDICES, backend=b)),
        FEATURES,
        "gather_vectors",
    ),
    "PDCRLoss": (lambda x, b: PDCR[b]([x], LABELS), MAP, "gather_vectors|pdcr_loss"),
    "PDCRLoss of samples": (
        lambda x, b: PDCR[b].loss([LayerSamples(0, x, PLACES)], LABELS),
        SAMPLED,
        "pdcr_loss",
    ),
    "UAFS": (lambda x, b: scalar(GATE[b](x)), FEATURES, "entropy_gate"),
    "UAFS.uncertainty": (lambda x, b: scalar(GATE[b].uncertainty(x)), FEATURES, "entropy_gate"),
}
EVERY_DIFFERENTIABLE = pytest.mark.parametrize(
    ("function", "x", "raising"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE
)


def dual_level(f: Function, x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def of_the_incoming_gradient(f: Function, x: Tensor) -> Tensor | None:
    """The backward pass is linear in the incoming gradient, which alone has a tangent."""
    x = x.clone().requires_grad_()
    value = f(x)
    with forward_ad.dual_level():
        incoming = forward_ad.make_dual(torch.ones_like(value), torch.ones_like(value))
        (gradient,) = torch.autograd.grad(value, x, incoming)
        return forward_ad.unpack_dual(gradient).tangent


def forward_over_reverse(f: Function, x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), x.cos())
        (gradient,) = torch.autograd.grad(f(dual), dual, create_graph=True)
        return forward_ad.unpack_dual(gradient).tangent


def jvp(f: Function, x: Tensor) -> Tensor:
    return torch.func.jvp(f, (x,), (x.cos(),))[1]


FORWARD_MODES: dict[str, Callable[[Function, Tensor], Tensor | None]] = {
    "jvp": jvp,
    "dual level": dual_level,
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jvp of vmap": lambda f, x: jvp(lambda y: torch.vmap(f)(torch.stack([y, y])).sum(), x),
    "reverse over forward": lambda f, x: torch.func.grad(lambda y: jvp(f, y))(x),
    "forward over reverse": forward_over_reverse,
    "of the incoming gradient": of_the_incoming_gradient,
}
REVERSE_MODES: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f))(x[None])[0],
    "grad of vmap": lambda f, x: torch.func.grad(lambda y: torch.vmap(f)(y[None]).sum())(x),
}


@EVERY_DIFFERENTIABLE
@pytest.mark.parametrize("mode", FORWARD_MODES.values(), ids=FORWARD_MODES)
def test_forward_mode_raises_and_names_the_function(
    mode: Callable, function: Callable, x: Tensor, raising: str
) -> None:
    with pytest.raises(RuntimeError, match=f"^({raising}){FORWARD_MODE}"):
        mode(lambda y: function(y, "auto"), x)


@EVERY_DIFFERENTIABLE
@pytest.mark.parametrize("mode", REVERSE_MODES.values(), ids=REVERSE_MODES)
def test_reverse_mode_of_torch_func_raises_and_names_the_function(
    mode: Callable, function: Callable, x: Tensor, raising: str
) -> None:
    with pytest.raises(RuntimeError, match=f"^({raising}){BY_FUNC}"):
        mode(lambda y: function(y, "auto"), x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@EVERY_DIFFERENTIABLE
def test_vmap_and_its_gradient_are_those_of_a_loop(function: Callable, x: Tensor, raising: str) -> None:
    batch = torch.stack([x, x.flip(0), -x])
    results = []
    for run in (torch.vmap, lambda f: lambda batch: torch.stack([f(y) for y in batch])):
        leaf = batch.clone().requires_grad_()
        values = run(lambda y: function(y, "auto"))(leaf)
        (gradient,) = torch.autograd.grad(values, leaf, torch.tensor([1.0, 2.0, -1.0], dtype=x.dtype))
        results.append((values, gradient))
    torch.testing.assert_close(*results)
    assert results[0][0].std() > 0


@EVERY_DIFFERENTIABLE
def test_batched_gradients_are_those_of_a_loop(function: Callable, x: Tensor, raising: str) -> None:
    x = x.clone().requires_grad_()
    value = function(x, "auto")
    weights = torch.tensor([1.0, -3.0], dtype=value.dtype)
    (batched,) = torch.autograd.grad(value, x, weights, is_grads_batched=True, retain_graph=True)
    (single,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(batched, torch.stack([single, -3 * single]))


@EVERY_DIFFERENTIABLE
def test_the_reference_has_every_derivative(function: Callable, x: Tensor, raising: str) -> None:
    def f(y: Tensor) -> Tensor:
        return function(y, "reference")

    leaf, step = x.clone().requires_grad_(), 1e-5
    (gradient,) = torch.autograd.grad(function(leaf, "auto"), leaf)
    assert gradient.norm() > 1e-3
    finite = (f(x + step * x.cos()) - f(x - step * x.cos())) / (2 * step)
    for tangent in (jvp(f, x), dual_level(f, x), (gradient * x.cos()).sum()):
        torch.testing.assert_close(tangent, finite, rtol=1e-5, atol=1e-7)
    assert normwise_error(torch.func.grad(f)(x), gradient) < 1e-6
    finite = (torch.func.grad(f)(x + step * x.cos()) - torch.func.grad(f)(x - step * x.cos())) / (2 * step)
    torch.testing.assert_close(jvp(torch.func.grad(f), x), finite, rtol=1e-5, atol=1e-7)


@EVERY_DIFFERENTIABLE
@pytest.mark.parametrize("mode", ["jvp", "dual level", "grad"])
def test_compiled_transforms_raise_too(mode: str, function: Callable, x: Tensor, raising: str) -> None:
    derivative = {**FORWARD_MODES, **REVERSE_MODES}[mode]
    expected = FORWARD_MODE if mode in FORWARD_MODES else BY_FUNC
    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"({raising}){expected}"):
        torch.compile(lambda y: derivative(lambda z: function(z, "auto"), y), backend="aot_eager")(x)


@pytest.mark.parametrize("mode", ["dual level", "of the incoming gradient"])
def test_compiled_functions_in_forward_mode_raise(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda y: pdcr_loss(y, RATIOS), backend="aot_eager", fullgraph=True)
    torch_itself = "does not support input tensors that carry a forward-mode AD tangent"  # from 2.14 on
    with pytest.raises(RuntimeError, match=f"^pdcr_loss{FORWARD_MODE}|{torch_itself}"):
        FORWARD_MODES[mode](compiled, VECTORS)


CONSTANT: dict[str, tuple[Callable[[Tensor, str], Tensor], Tensor]] = {
    "ratios": (lambda x, b: pdcr_loss(VECTORS, x, class_distance="sum", backend=b), RATIOS),
    "repelled_fraction": (lambda x, b: repelled_fraction(x, RATIOS, backend=b).sum(), VECTORS),
    "foreground_ratio": (
        lambda x, b: foreground_ratio(x, torch.tensor([[0, 0], [1, 2]]), (3, 2), 3, backend=b)[0].sum(),
        torch.full((2, 3, 5, 4), 1 / 3, dtype=torch.float64),
    ),
    "soft labels of PDCRLoss": (
        lambda x, b: PDCR[b]([MAP], x),
        torch.full((2, 3, 8, 8), 1 / 3, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("function", "x"), CONSTANT.values(), ids=CONSTANT)
def test_what_has_no_gradient_is_a_constant_in_forward_mode_as_well(
    function: Callable, x: Tensor, backend: str
) -> None:
    assert not function(x.clone().requires_grad_(), backend).requires_grad
    assert dual_level(lambda y: function(y, backend), x) is None
    assert not torch.func.grad(lambda y: function(y, backend))(x).any()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("function", "x"), CONSTANT.values(), ids=CONSTANT)
def test_vmap_checks_no_values(function: Callable, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unchecked, "_PAIRS_AT_ONCE", 3 * 9 * 2)
    batch = torch.stack([x, x.flip(1)])
    expected = torch.stack([function(y, "auto") for y in batch])
    torch.testing.assert_close(torch.vmap(lambda y: function(y, "auto"))(batch), expected)


def test_an_attached_regularizer_raises_in_forward_mode() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    pdcr = attach_pdcr(model, ["0"], 3, example_input=torch.randn(1, 1, 8, 8), class_distance="tv")
    x = torch.randn(2, 1, 8, 8)

    def loss(x: Tensor) -> Tensor:
        model(x)
        return pdcr(LABELS)

    assert loss(x).isfinite()
    with pytest.raises(RuntimeError, match=FORWARD_MODE):
        jvp(loss, x)


def without_autograd(name: str) -> bool:
    """Whether an operator has no derivative of its own: it returns constants, or it fills given results."""
    return name in ("foreground_ratio", "labels_in_range") or name.endswith("_launch")


def test_every_differentiable_operator_refuses_tangents_itself() -> None:
    vectors, ratios = random(1, 4, 3), random_ratios(1, 4, 2, torch.float64)
    affinity = [0.5, 0.5, 0.0, 1.0, -1.0, 0.0, 1.0, 0.0]
    features, logits, positions = random(1, 2, 3, 3), random(1, 3, 3, 3), torch.tensor([0, 4])
    saved = (torch.empty(0, dtype=torch.float64), torch.empty(0))
    inputs: dict[str, tuple[Any, ...]] = {
        "pdcr_forward": (vectors, ratios, None, affinity, "mean", "auto"),
        "pdcr_backward": (random(), random(1, 4), vectors, ratios, None, *saved, affinity, "mean", "auto"),
        "pdcr_call_forward": ([vectors], [NOWHERE], LABELS[:1], CALL.numbers, affinity, 0.5, "auto"),
        "pdcr_call_backward": (
            random(),
            [vectors],
            [NOWHERE],
            [ratios, ratios[..., 0] > 0, random(1, 4), *saved],
            [1, 4, 3, 0],
            CALL.numbers,
            affinity,
            "auto",
        ),
        "nt_xent_forward": (vectors, 0.5, "auto"),
        "nt_xent_backward": (random(1), random(1, 4), vectors, *saved, 0.5, "auto"),
        "entropy_gate_forward": (features, logits, "auto"),
        "entropy_gate_backward": (features, None, features, logits, "auto"),
        "gather_vectors": (features, positions, [], "auto"),
        "gather_vectors_backward": (random(1, 2, 2), positions, [], [1, 2, 3, 3], False, "auto"),
    }
    names = {
        name.removeprefix(f"{_library.NAMESPACE}::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(f"{_library.NAMESPACE}::")
    }
    assert {name for name in names if not without_autograd(name)} == set(inputs)
    for name, arguments in inputs.items():
        operator = getattr(torch.ops.contrastseg_fast, name).default
        operator(*arguments)
        leaves, structure = tree_flatten(arguments)
        for number, argument in enumerate(leaves):
            if not isinstance(argument, Tensor) or not argument.is_floating_point():
                continue
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(argument, torch.ones_like(argument))
                with pytest.raises(RuntimeError, match=FORWARD_MODE):
                    operator(*tree_unflatten([*leaves[:number], dual, *leaves[number + 1 :]], structure))
