"""PDCR attached to models and UAFS inserted into them: what is collected when, and what models keep."""

from __future__ import annotations

import copy
import doctest
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from conftest import blob_labels
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from contrastseg_fast import PDCRLoss, ReceptiveField, attach_pdcr, insert_uafs, plugin, receptive_fields

X = (2, 1, 24, 32)


class Net(nn.Module):
    """An encoder, checkpointed if asked to, and a decoder, with activations in place behind all layers."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6))
        self.deep = nn.Conv2d(6, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Conv2d(6, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.reentrant = reentrant

    def encode(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        return self.relu(self.deep(self.relu(self.down(x))))

    def forward(self, x: Tensor) -> Tensor:
        deep = (
            self.encode(x)
            if self.reentrant is None
            else checkpoint(self.encode, x, use_reentrant=self.reentrant)
        )
        return self.head(self.relu(self.up(deep)))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(X), blob_labels(X[0], X[2:], 3)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "options", [{}, {"num_samples": 17, "patch_size": 5, "class_distance": "tv", "temperature": 0.2}]
)
def test_agrees_with_the_loss_of_collected_maps(options: dict[str, Any]) -> None:
    model = Net()
    x, y = batch()
    names = ["stem", "down", "deep"]
    fields = receptive_fields(model, X, names)
    maps: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        maps[name] = output.clone()

    for name in names:
        model.get_submodule(name).register_forward_hook(partial(keep, name))
    pdcr = attach_pdcr(model, names, 3, example_input=x, **options)
    model(x)
    value = pdcr(y)
    expected = PDCRLoss(fields, 3, **options)(maps, y)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    (actual,) = torch.autograd.grad(value, model.stem.weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, model.stem.weight)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-8)
    assert actual.abs().max() > 0


def test_masks_and_deep_supervision_reach_the_loss() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, "down", 3, example_input=x)
    mask = torch.ones(2, 1, 24, 32)
    mask[:, :, :12] = 0
    model(x)
    whole = pdcr(y)
    model(x)
    assert pdcr([y, y[:, ::2, ::2]], mask) != whole


def test_outputs_and_state_dict_stay_as_they_are() -> None:
    model, (x, _) = Net().eval(), batch()
    expected, keys = model(x), list(model.state_dict())
    pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x)
    assert torch.equal(model(x), expected)
    model.train()
    model(x)
    assert list(model.state_dict()) == keys
    pdcr.remove()
    pdcr.remove()
    assert not model._forward_pre_hooks
    assert not model.down._forward_hooks
    model(x)
    with pytest.raises(RuntimeError, match="pdcr: expected a forward pass"):
        pdcr(batch()[1])


def test_nothing_is_collected_in_eval_mode_or_without_gradients() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["down"], 3, example_input=x)
    for context, training in [
        (torch.no_grad, True),
        (torch.enable_grad, False),
        (torch.inference_mode, False),
    ]:
        model.train()
        model(x)
        model.train(training)
        with context():
            model(x)
            value = pdcr(y)
        assert value == 0
        assert value.grad_fn is None
        assert not value.requires_grad
        model.train()
        with pytest.raises(RuntimeError, match=r"pdcr: expected a forward pass .* layers \['down'\]"):
            pdcr(y)


def test_each_pass_counts_once() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["down"], 3, example_input=x)
    with pytest.raises(RuntimeError, match="pdcr: expected a forward pass"):
        pdcr(y)
    model(x)
    pdcr(y)
    with pytest.raises(RuntimeError, match="before each call"):
        pdcr(y)
    model(x)
    with pytest.raises(ValueError, match="labels"):
        pdcr(y[:, :5])
    pdcr(y)  # a call that raises does not use the pass up


def test_the_last_pass_counts_and_paused_ones_do_not() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x)
    model(x)
    expected = pdcr(y)
    model(torch.randn(X))
    other = pdcr(y)
    assert other != expected
    model(torch.randn(X))
    model(x)
    with pdcr.paused():
        with pdcr.paused():
            model(torch.randn(X))
        model(torch.randn(X))
    torch.testing.assert_close(pdcr(y), expected)
    model.eval()
    with pdcr.paused():
        model(x)


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["stem", "deep"], 3, example_input=x)
    model(x)
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(2, 3, 24, 32))
    with pytest.raises(RuntimeError, match="pdcr: expected a forward pass"):
        pdcr(y)


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_checkpointing_recomputes_without_sampling(sampler: str) -> None:
    x, y = batch()
    plain = Net()
    plain.down[1].momentum = 0.0  # recomputing would move the statistics twice
    recomputed = copy.deepcopy(plain)
    recomputed.reentrant = False
    results = []
    for model in (plain, recomputed):
        generator = torch.Generator().manual_seed(0)
        pdcr = attach_pdcr(
            model,
            ["stem", "down", "deep"],
            3,
            example_input=x,
            num_samples=9,
            sampler=sampler,
            generator=generator,
        )
        for _ in range(2):  # two passes before the backward pass
            first = model(x).square().mean() + pdcr(y)
        (first + model(x).mean() + pdcr(y)).backward()
        results.append((first.detach(), gradients(model)))
        assert not pdcr._samples
    torch.testing.assert_close(*results)


def test_a_reentrant_checkpoint_is_refused() -> None:
    model, (x, y) = Net(reentrant=True), batch()
    x.requires_grad_()
    pdcr = attach_pdcr(model, ["down", "up"], 3, example_input=x)
    model(x).mean().backward()
    with pytest.raises(RuntimeError, match=r"layers \['down'\].*use_reentrant=False"):
        pdcr(y)


def test_a_compiled_model_collects_in_its_graph() -> None:
    model, (x, y) = Net(), batch()
    insert_uafs(model, "deep", 2, example_input=x)
    pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x)
    model(x)
    expected = pdcr(y)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(x)
        torch.testing.assert_close(pdcr(y), expected)
    with torch.no_grad():
        compiled(x)
    with pytest.raises(RuntimeError, match="pdcr: expected a forward pass"):
        pdcr(y)


def test_maps_are_not_kept_alive() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["head"], 3, example_input=x)
    output = weakref.ref(model(x))
    gc.collect()
    assert output() is None
    pdcr(y).backward()


def test_receptive_fields_may_be_found_while_vectors_wait() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["down"], 3, example_input=x)
    model(x)
    receptive_fields(model, X, ["deep"])
    assert pdcr(y).requires_grad


def test_copies_and_pickles_take_the_regularizer_along() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x)
    model(x)
    expected = pdcr(y)
    model(x)
    buffer = io.BytesIO()
    torch.save((model, pdcr), buffer)
    buffer.seek(0)
    for other, regularizer in (
        copy.deepcopy((model, pdcr)),
        pickle.loads(pickle.dumps((model, pdcr))),
        torch.load(buffer, weights_only=False),
    ):
        with pytest.raises(RuntimeError, match="pdcr: expected a forward pass"):
            regularizer(y)
        other(x)
        torch.testing.assert_close(regularizer(y), expected)
        regularizer.remove()
        assert not other.down._forward_hooks
    assert model.down._forward_hooks
    torch.testing.assert_close(pdcr(y), expected)


def test_layers_by_pattern() -> None:
    model, (x, _) = Net(), batch()
    fields = attach_pdcr(model, ["d*", "down", "stem"], 3, example_input=x).loss.receptive_fields
    assert list(fields) == ["down", "down.0", "down.1", "deep", "stem"]
    shared = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())
    shared.add_module("again", shared[0])
    assert list(attach_pdcr(shared, ["again", "0"], 2, example_input=x).loss.receptive_fields) == ["again"]


def test_layers_chosen_by_stride() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    x = torch.zeros(1, 1, 96, 96)
    unet = nets.UNet(2, 1, 2, (4, 8, 8, 8), (2, 2, 2), num_res_units=1)
    fields = attach_pdcr(unet, "auto", 2, example_input=x).loss.receptive_fields
    assert {name: field.stride[0] for name, field in fields.items()} == {
        "model.1.submodule.0": 4,
        "model.1.submodule.1.submodule.1": 8,
    }
    basic = nets.BasicUNet(3, 1, 2, features=(2,) * 6)
    fields = attach_pdcr(basic, "auto", 2, example_input=torch.zeros(1, 1, 64, 64, 64)).loss.receptive_fields
    assert {name: field.size[0] for name, field in fields.items()} == {"down_1": 14, "down_2": 32}
    with pytest.raises(ValueError, match="layers: expected an encoder with layers of stride"):
        attach_pdcr(nn.Conv2d(1, 1, 3), "auto", 2, example_input=x)


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, 2, 1)
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.out(x * x.mean((2, 3), keepdim=True))


def test_receptive_fields_by_hand() -> None:
    model, (x, y) = Squeeze(), batch()
    with pytest.raises(
        ValueError, match=r"receptive_fields\['out'\].*INFINITE along axis 0, 1, because of aten.mean"
    ):
        attach_pdcr(model, ["conv", "out"], 3, example_input=x)
    field = ReceptiveField((3, 3), (2, 2), (-1, -1))
    pdcr = attach_pdcr(model, ["conv", "out"], 3, example_input=x, receptive_fields={"out": field})
    assert pdcr.loss.receptive_fields == {"conv": field, "out": field}
    model(x)
    assert pdcr(y).requires_grad
    assert attach_pdcr(model, "out", 3, receptive_fields={"out": field}).loss.receptive_fields == {
        "out": field
    }
    with pytest.raises(ValueError, match=r"receptive_fields: expected some of the layers \['out'\]"):
        attach_pdcr(model, "out", 3, receptive_fields={"conv": field})


class Pair(NamedTuple):
    features: Tensor
    extra: int


class Wrapped(nn.Module):
    """Gives its features wrapped in a container."""

    def __init__(self, wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.block = Block(wrap)
        self.unwrap = unwrap

    def forward(self, x: Tensor) -> Tensor:
        return self.unwrap(self.block(x))


class Block(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.conv(x))


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: Pair(x, 3), lambda pair: pair.features),
        (lambda x: {"a": [x, x + 1], "b": None}, lambda parts: parts["a"][0]),
        (lambda x: (None, x), lambda parts: parts[1]),
    ],
)
def test_the_first_tensor_of_an_output_counts(wrap: Any, unwrap: Any) -> None:
    model, (x, y) = Wrapped(wrap, unwrap), batch()
    plain = model(x)
    pdcr = attach_pdcr(model, "block", 3, example_input=x)
    model(x)
    assert pdcr(y).requires_grad
    insert_uafs(model, "block", 2, example_input=x)
    torch.testing.assert_close(model(x), model.uafs["block"](plain))


def test_gates_replace_outputs_and_keep_every_key() -> None:
    model, (x, _) = Net().eval(), batch()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = copy.deepcopy(model)
    assert (
        insert_uafs(model, ["down", "deep"], 3, example_input=x, hidden_channels=5, norm="instance") is model
    )
    after = model.state_dict()
    assert list(after)[: len(state)] == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert {key.split(".")[0] for key in list(after)[len(state) :]} == {"uafs"}
    gate = model.uafs["deep"]
    assert (gate.in_channels, gate.num_classes, gate.head[0].out_channels) == (8, 3, 5)
    assert not gate.training
    relu = torch.relu
    down = model.uafs["down"](plain.down(relu(plain.stem(x))))
    deep = gate(plain.deep(relu(down)))
    torch.testing.assert_close(model(x), plain.head(relu(plain.up(relu(deep)))))
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    model.train()
    model(x).mean().backward()
    assert all(parameter.grad is not None for parameter in model.uafs.parameters())


def test_gates_in_sequences_and_volumes() -> None:
    model = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Conv3d(4, 2, 1)))
    x = torch.randn(1, 1, 6, 7, 8)
    plain = copy.deepcopy(model)
    insert_uafs(model, ["0"], 2, example_input=x)
    insert_uafs(model, ["1.0"], 3, example_input=x)
    assert list(model.uafs) == ["0", "1/0"]
    model.eval()
    hidden = model.uafs["1/0"](torch.relu(model.uafs["0"](plain[0](x))))
    torch.testing.assert_close(model(x), plain[1][1](hidden))


def test_gates_follow_dtype_copies_and_pickles() -> None:
    model, (x, _) = Net().double().eval(), batch()
    insert_uafs(model, ["down"], 2, example_input=x.double())
    assert model.uafs["down"].head[0].weight.dtype == torch.float64
    expected = model(x.double())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x.double()), expected)
        with torch.no_grad():
            other.uafs["down"].head[3].weight.mul_(5)
        assert not torch.equal(other(x.double()), expected)
    assert torch.equal(model(x.double()), expected)


def test_gates_belong_to_the_receptive_field() -> None:
    model, (x, y) = Net(), batch()
    insert_uafs(model, ["down"], 2, example_input=x)
    pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x)
    plain = receptive_fields(Net(), X, ["down", "deep"])
    gated = pdcr.loss.receptive_fields
    assert [gated["down"].size[0] - plain["down"].size[0], gated["deep"].size[0] - plain["deep"].size[0]] == [
        4,
        4,
    ]
    model(x)
    pdcr(y).backward()
    assert all(parameter.grad is not None for parameter in model.uafs.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "dwon"}, "layers: expected names of layers .* near names: 'down'"),
        ({"layers": "x*"}, r"layers: expected names of layers .* got 'x\*'"),
        ({"layers": []}, "layers: expected at least one layer"),
        ({"example_input": torch.zeros(3, 3)}, "example_input: expected a tensor"),
        ({"num_classes": 0}, "num_classes: expected"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    arguments = {"layers": "down", "num_classes": 2, "example_input": torch.zeros(X), **options}
    for function in (attach_pdcr, insert_uafs):
        model = Net()
        with pytest.raises(ValueError, match=message):
            function(model, **arguments)
        assert not model.down._forward_hooks
        assert not hasattr(model, "uafs")


def test_arguments_of_other_types() -> None:
    with pytest.raises(TypeError, match=r"example_input: expected a tensor .* got NoneType"):
        attach_pdcr(Net(), "down", 2)
    with pytest.raises(TypeError, match="layers: expected names of layers, got int"):
        insert_uafs(Net(), [1], 2, example_input=torch.zeros(X))
    with pytest.raises(TypeError, match="temperature"):
        attach_pdcr(Net(), "down", 2, example_input=torch.zeros(X), temperature="hot")


def test_gates_that_cannot_be_inserted() -> None:
    x = torch.zeros(X)
    model = insert_uafs(Net(), "down", 2, example_input=x)
    for layer in ("down", ""):
        with pytest.raises(
            ValueError, match="layers: expected layers inside the model that have no gate yet"
        ):
            insert_uafs(model, layer, 2, example_input=x)
    with pytest.raises(ValueError, match="layers: expected layers whose output is a feature map"):
        insert_uafs(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2)), "1", 2, example_input=x)
    taken = Net()
    taken.uafs = nn.Identity()
    with pytest.raises(ValueError, match="model: expected no attribute 'uafs'"):
        insert_uafs(taken, "down", 2, example_input=x)


def test_examples() -> None:
    assert doctest.testmod(plugin).failed == 0
