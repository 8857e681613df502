"""Gates and collectors that nothing bypasses: compilers, copies, parts of models, converters and wrappers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import blob_labels
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from contrastseg_fast import UAFS, attach_pdcr, insert_uafs
from contrastseg_fast.attach import AttachedPDCR, remove_uafs
from contrastseg_fast.attach.extended import is_extended

X = (2, 1, 24, 32)
LAYERS = ("stem", "down", "dense", "deep")


class Dense(nn.ModuleDict):
    """Runs its children by iterating over itself, as the dense blocks of torchvision and timm do."""

    def __init__(self) -> None:
        super().__init__({"a": nn.Conv2d(6, 2, 3, padding=1), "b": nn.Conv2d(8, 2, 3, padding=1)})

    def forward(self, x: Tensor) -> Tensor:
        for _, layer in self.items():
            x = torch.cat([x, layer(x)], 1)
        return x


class Net(nn.Module):
    """A bare layer, a sequence, a container with a forward pass of its own, and a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.dense = Dense()
        self.deep = Block(10, 8)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(self.dense(self.down(self.stem(x)))))


class Checkpointed(Net):
    """Computes all but the first and the last layer again in the backward pass."""

    checkpoints = True

    def encode(self, x: Tensor) -> Tensor:
        return self.deep(self.dense(self.down(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(
            checkpoint(self.encode, x, use_reentrant=False) if self.checkpoints else self.encode(x)
        )


class Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def gated(layers: Any = tuple(LAYERS), **options: Any) -> Net:
    model = insert_uafs(make(), layers, 3, example_input=torch.zeros(X), **options)
    with torch.no_grad():
        for gate in model.uafs.values():
            gate.head[-1].weight.mul_(5)  # far from constant logits, whose gate is nearly the identity
    return model


def attached(model: nn.Module, **options: Any) -> AttachedPDCR:
    return attach_pdcr(
        model, list(LAYERS), 3, example_input=torch.zeros(X), num_samples=40, patch_size=5, **options
    )


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(X), blob_labels(X[0], X[2:], 3)


def reloaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def saved_size(value: Any) -> int:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.tell()


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": reloaded,
}


class TestCompiled:
    """torch.compile guards what is attached."""

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    @pytest.mark.parametrize("in_place", [False, True])
    def test_a_second_model_of_a_class_is_not_taken_for_the_first(self, backend: str, in_place: bool) -> None:
        x, y = batch()
        torch.compiler.reset()
        baseline, second = make(), make()
        for model in (baseline, second) if in_place else (baseline,):
            model.compile(backend=backend)
            model(x)
        baseline.eval()(x)
        insert_uafs(second, list(LAYERS), 3, example_input=x)
        eager = copy.deepcopy(second)
        pdcr, expected_pdcr = attached(second), attached(eager)
        if not in_place:
            second.compile(backend=backend)
        for _ in range(2):
            losses = [
                (net(x).square().mean() + reg(y)) for net, reg in ((second, pdcr), (eager, expected_pdcr))
            ]
            torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
            for loss in losses:
                loss.backward()
        for ours, wanted in zip(second.parameters(), eager.parameters(), strict=True):
            assert ours.grad is not None
            torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(second.eval()(x), eager.eval()(x), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(second(x), baseline(x), atol=1e-2)

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("layers", [["stem"], ["stem", "down", "deep"]], ids=["outside", "inside"])
    def test_checkpoints(self, layers: list[str], compiled: bool) -> None:
        """Gates work in compiled checkpoints. PDCR inside one breaks the graph, so the whole is not one."""
        torch.compiler.reset()
        torch.manual_seed(0)
        model, (x, y) = Checkpointed(), batch()
        insert_uafs(model, list(LAYERS), 3, example_input=x, norm="instance")
        for norm in (model.down[1], model.deep.norm):
            norm.momentum = 0.0  # recomputing would move the statistics twice
        plain = copy.deepcopy(model)
        plain.checkpoints = False
        pdcrs = [attach_pdcr(net, layers, 3, example_input=x, patch_size=5) for net in (model, plain)]
        run = torch.compile(model, backend="aot_eager", fullgraph=layers == ["stem"]) if compiled else model
        for _ in range(2):
            losses = [net(x).square().mean() + pdcr(y) for net, pdcr in zip((run, plain), pdcrs, strict=True)]
            torch.testing.assert_close(*losses)
            for net, loss in zip((model, plain), losses, strict=True):
                net.zero_grad()
                loss.backward()
            for ours, wanted in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-3, atol=1e-4)

    def test_steps_compile_once(self) -> None:
        torch.compiler.reset()
        model, (x, y) = gated(), batch()
        pdcr = attached(model)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(4):
                (compiled(x).mean() + pdcr(y)).backward()
        assert counter.frame_count == 1

    def test_many_models_do_not_use_up_the_recompilations_of_each_other(self) -> None:
        torch.compiler.reset()
        x, y = torch.randn(2, 1, 16, 16), blob_labels(2, (16, 16), 2)
        counter = CompileCounterWithBackend("eager")
        count = 2 * torch._dynamo.config.recompile_limit
        for k in range(count):
            name = f"Net{k}"
            cls = type(
                name, (nn.Module,), {"__init__": nn.Module.__init__, "forward": lambda self, x: self.conv(x)}
            )
            model = cls()
            model.conv = nn.Conv2d(1, 4 + k, 3, padding=1)
            pdcr = attach_pdcr(model, "conv", 2, example_input=x)
            torch.compile(model, backend=counter, fullgraph=True)(x)
            assert pdcr(y).requires_grad
        assert counter.frame_count == count

    def test_labels_of_all_sizes_are_checked_in_compiled_models(self) -> None:
        torch.compiler.reset()
        model = gated(["stem"])
        pdcr = attach_pdcr(model, "stem", 3, example_input=torch.zeros(X))
        compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
        for height, width in ((24, 32), (32, 48), (40, 24)):
            y = blob_labels(2, (height, width), 3)
            compiled(torch.randn(2, 1, height, width))
            with pytest.raises(ValueError, match=rf"labels: expected spatial shape \({height}, {width}\)"):
                pdcr(y[:, 1:])
            assert pdcr(y).requires_grad


class TestCopies:
    """Gates go with their layers, and regularizers with their models."""

    @pytest.mark.parametrize("how", COPIES)
    def test_copies_gate_and_collect_on_their_own(self, how: str) -> None:
        model, (x, y) = gated(), batch()
        pdcr = attached(model)
        expected = model(x), pdcr(y)
        other, own = COPIES[how]((model, pdcr))
        assert list(other.uafs) == list(LAYERS)
        torch.testing.assert_close((other(x), own(y)), expected)
        assert not set(other.uafs.values()) & set(model.uafs.values())
        with torch.no_grad():
            other.uafs["deep"].head[-1].weight.mul_(-3)
        assert not torch.equal(other(x), expected[0])
        model.eval()
        other.eval()
        before = model(x)
        assert not torch.equal(other(x), before)
        remove_uafs(other)
        assert torch.equal(model(x), before)

    @pytest.mark.parametrize("how", COPIES)
    @pytest.mark.parametrize("layer", LAYERS)
    def test_layers_go_alone(self, how: str, layer: str) -> None:
        model = gated().eval()
        attached(model)
        plain = make().eval().get_submodule(layer)
        x = torch.randn(2, next(plain.parameters()).shape[1], 12, 16)
        own = COPIES[how](model.get_submodule(layer))
        assert torch.equal(own(x), model.get_submodule(layer)(x))
        assert torch.equal(own(x), model.uafs[layer](plain(x)))
        own.train()(x).sum().backward()  # samples nothing: there is nobody to sample for
        assert all(parameter.grad is not None for parameter in own.parameters())

    def test_saved_layers_do_not_take_the_model_along(self) -> None:
        sizes = {}
        for attach in (False, True):
            model = make()
            model.large = nn.Linear(1000, 1000)
            if attach:
                insert_uafs(model, ["head"], 3, example_input=torch.zeros(X))
                attached(model, projection="mlp")
            sizes[attach] = saved_size(model.deep)
        assert sizes[True] < sizes[False] + 2000

    def test_an_encoder_outlives_its_model(self) -> None:
        model, (x, _) = gated(), batch()
        attached(model)
        deep, wanted = model.deep, model(x)
        hidden = model.dense(model.down(model.stem(x)))
        head = model.head
        del model
        gc.collect()
        torch.testing.assert_close(head(deep(hidden)), wanted)

    def test_a_layer_in_another_model_collects_for_its_own_one(self) -> None:
        model, (x, y) = make(), batch()
        pdcr = attached(model)
        other = nn.Sequential(model.stem, nn.Conv2d(4, 2, 1))
        model(x)
        expected = pdcr(y)
        model(x)
        other(torch.randn(X))
        model.deep(torch.randn(2, 10, 12, 16))
        torch.testing.assert_close(pdcr(y), expected)
        other(x)
        with pytest.raises(RuntimeError, match="pdcr: expected a forward pass of the model"):
            pdcr(y)

    def test_state_dicts_round_trip_and_differ_from_plain_ones(self) -> None:
        model, x = gated().eval(), torch.randn(X)
        own = {f"{layer}.uafs.{key}" for layer, gate in model.uafs.items() for key in gate.state_dict()}
        assert set(model.state_dict()) == {*make().state_dict(), *own}
        other = insert_uafs(make(1), list(LAYERS), 3, example_input=x).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))
        with pytest.raises(RuntimeError, match=r"Unexpected key.*uafs"):
            make().down.load_state_dict(model.down.state_dict())
        with pytest.raises(RuntimeError, match=r"Missing key.*uafs"):
            model.deep.load_state_dict(make().deep.state_dict())

    def test_children_and_slices_keep_gates(self) -> None:
        model, x = gated().eval(), torch.randn(X)
        expected = model.deep(model.dense(model.down(model.stem(x))))
        assert torch.equal(nn.Sequential(*list(model.children())[:-1])(x), expected)
        hidden = model.stem(x)
        assert torch.equal(nn.Sequential(*model.down.children())(hidden), model.down(hidden))
        sequence = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)).eval()
        insert_uafs(sequence, ["0", "1"], 2, example_input=x)
        attach_pdcr(sequence, ["0"], 2, example_input=x)  # which extends the class that slices are made of
        part = sequence[:2]
        assert torch.equal(part(x), sequence[1](sequence[0](x)))
        assert len(sequence) == 3

    def test_moves_between_dtypes_and_devices_reach_gates(self) -> None:
        model = gated().double().to("meta")
        assert {(p.dtype, p.device.type) for p in model.uafs.parameters()} == {(torch.float64, "meta")}
        assert not any(gate.training for gate in model.eval().uafs.values())
        assert all(gate.training for gate in model.train().uafs.values())
        seen: list[nn.Module] = []
        model.apply(seen.append)
        assert set(model.uafs.values()) <= set(seen)

    def test_copies_start_afresh(self) -> None:
        model, (x, y) = gated(), batch()
        pdcr = attached(model)
        with pdcr.paused():
            other, own = copy.deepcopy((model, pdcr))
        other(x)
        assert own(y).requires_grad


class TestRemoved:
    @pytest.mark.parametrize("remove", [remove_uafs, lambda model, layer: model.uafs.__delitem__(layer)])
    def test_single_gates_can_be_taken_out(self, remove: Any) -> None:
        model, plain, x = gated().eval(), make().eval(), torch.randn(X)
        for layer in LAYERS:
            remove(model, layer)
            assert layer not in getattr(model, "uafs", {})
            assert not any(key.startswith(f"{layer}.uafs") for key in model.state_dict())
        assert torch.equal(model(x), plain(x))
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]

    def test_names_and_patterns_of_gates_are_checked(self) -> None:
        model = gated()
        remove_uafs(model, "d*")
        assert list(model.uafs) == ["stem"]
        with pytest.raises(
            ValueError, match=r"layers: expected some of the layers with a gate, \['stem'\], got 'deep'"
        ):
            remove_uafs(model, ["stem", "deep"])
        with pytest.raises(TypeError, match="layers: expected names of layers, got int"):
            remove_uafs(model, 3)
        with pytest.raises(KeyError, match="deep"):
            del model.uafs["deep"]
        assert list(model.uafs) == ["stem"]
        remove_uafs(model, ["stem"])
        assert not hasattr(model, "uafs")

    def test_gates_and_regularizers_are_removed_in_any_order(self) -> None:
        x, y = batch()
        for first_gates in (True, False):
            model = gated()
            pdcr = attached(model)
            steps = [lambda model=model: remove_uafs(model), pdcr.remove]
            for step in steps if first_gates else reversed(steps):
                step()
            assert not any(is_extended(module) for module in model.modules())
            insert_uafs(model, "deep", 2, example_input=x)
            again = attached(model)
            model(x)
            assert again(y).requires_grad


def to_group_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        else:
            to_group_norm(child)


class Lora(nn.Module):
    """Adds a trainable product of low rank to a frozen layer, as peft does."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = nn.Conv2d(base.in_channels, 1, base.kernel_size, base.stride, base.padding, bias=False)
        self.b = nn.Conv2d(1, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


class TestConverted:
    """A converter replaces layers: the gate acts behind the new one, or the converter raises."""

    def test_synchronised_batch_norm_keeps_gates(self) -> None:
        x = torch.randn(X)
        model = gated(["down.1", "deep.norm", "deep", "stem"]).eval()
        expected = model(x)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert isinstance(converted.down[1], nn.SyncBatchNorm)
        assert isinstance(converted.deep.norm.uafs.head[1], nn.SyncBatchNorm)
        assert sorted(converted.uafs) == ["deep", "deep.norm", "down.1", "stem"]
        torch.testing.assert_close(converted(x), expected)
        other = copy.deepcopy(converted)
        del other.uafs["down.1"]
        assert type(other.down[1]) is nn.SyncBatchNorm
        assert not torch.allclose(other(x), expected)

    def test_converters_that_drop_a_gate_raise(self) -> None:
        model, x = gated(["down.1", "stem"], norm="instance").eval(), torch.randn(X)
        expected = model(x)
        with pytest.raises(
            RuntimeError,
            match=r"Sequential\.1: .*keeps the 1 UAFS gate.*BatchNorm2d.*got a GroupNorm; call remove_uafs",
        ):
            to_group_norm(model)
        for value in (nn.Conv2d(1, 4, 3), nn.Identity(), None):
            with pytest.raises(RuntimeError, match=r"Net\.stem: expected a layer that keeps the 1 UAFS gate"):
                model.stem = value
        with pytest.raises(RuntimeError, match=r"Net\.down"):
            model.add_module("down", nn.Sequential())
        torch.testing.assert_close(model(x), expected)
        remove_uafs(model, "stem")
        model.stem = nn.Identity()

    def test_layers_are_free_to_change_where_no_gate_is_lost(self) -> None:
        model = gated(["down.1"])
        to_group_norm(model.deep)
        model.down[1].uafs.head[1] = nn.Identity()
        model.down = nn.Sequential(model.down, nn.ReLU())
        model.head = None
        assert list(model.uafs) == ["down.0.1"]

    def test_wrappers_that_contain_the_layer_keep_its_gate(self) -> None:
        model, x = gated(["stem", "deep.conv"]).eval(), torch.randn(X)
        expected = model(x)
        pdcr = attached(model)
        model.stem = Lora(model.stem)
        model.deep.conv = Lora(model.deep.conv)
        assert sorted(model.uafs) == ["deep.conv.base_layer", "stem.base_layer"]
        torch.testing.assert_close(model(x), expected)
        model.train()(x).mean().backward()
        assert all(parameter.grad is None for parameter in model.stem.base_layer.parameters())
        pdcr.remove()

    def test_torch_does_not_fuse_a_gated_layer(self) -> None:
        model = gated(["down.1"]).eval()
        with pytest.raises(AssertionError, match="did not find fuser method"):
            torch.ao.quantization.fuse_modules(model, [["down.0", "down.1"]])

    @pytest.mark.filterwarnings("ignore:.*deprecated")
    def test_dynamic_quantization_keeps_gates(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
        x = torch.randn(2, 1, 8, 8)
        insert_uafs(model, ["0"], 2, example_input=x)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        assert list(quantized.uafs) == ["0"]
        torch.testing.assert_close(quantized(x), model(x), rtol=0.1, atol=0.05)

    def test_a_replaced_layer_collects_nothing_and_says_so(self) -> None:
        model, (x, y) = make(), batch()
        pdcr = attached(model)
        model.stem = nn.Conv2d(1, 4, 3, padding=1)
        model(x)
        with pytest.raises(RuntimeError, match=r"layers \['stem'\].*replaced after attach_pdcr"):
            pdcr(y)

    def test_parametrizations_come_afterwards(self) -> None:
        x = torch.randn(X)
        model = make()
        parametrizations.spectral_norm(model.stem)
        for function in (insert_uafs, attach_pdcr):
            with pytest.raises(
                ValueError, match=r"layers \('stem'\): expected modules that are not parametrized"
            ):
                function(model, "stem", 3, example_input=x)
        model = gated(["stem"], norm="instance").eval()
        expected = model(x)
        pdcr = attached(model)
        parametrizations.weight_norm(model.stem)
        torch.testing.assert_close(model(x), expected)
        parametrize.remove_parametrizations(model.stem, "weight")
        torch.testing.assert_close(model(x), expected)
        model.train()(x)
        assert pdcr(batch()[1]).requires_grad
        pdcr.remove()
        remove_uafs(model)
        assert type(model.stem) is nn.Conv2d


class Children(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Indirect(Children):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        for child in self._modules.values():
            x = child(x)
        return x


class Decorated(Children):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Sliced(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        for layer in self[1:]:
            x = layer(x)
        return x


class Chosen(nn.Sequential):
    """Its iteration, and so its forward pass, leaves children out."""

    def __iter__(self) -> Any:
        return iter([child for child in self._modules.values() if isinstance(child, nn.Conv2d)])


class Reduced(nn.Module):
    """Says itself how it is pickled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self._modules, "training": self.training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self._modules.update(state["modules"])
        self.training = state["training"]

    def __reduce__(self) -> Any:
        return type(self), (self.channels,), self.__getstate__()


class Twice(nn.Sequential):
    """Runs itself by iteration and by index."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        assert len(self) == 2
        return self[-1](x) + super().forward(x)


class Own(nn.Module):
    """Runs a UAFS of its own, under the name that gates have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.uafs = UAFS(2, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.uafs(self.conv(x))


class TestLayers:
    """What layers may be, and what they may not."""

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_containers_do_not_run_their_gate(self, backend: str) -> None:
        torch.compiler.reset()
        torch.manual_seed(0)
        x = torch.randn(2, 4, 8, 8)
        model = nn.Sequential(Twice(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()), nn.Conv2d(4, 2, 1)).eval()
        plain = copy.deepcopy(model)
        insert_uafs(model, ["0"], 2, example_input=x)
        expected = plain[1](model.uafs["0"](plain[0](x)))
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), expected)
        assert isinstance(model[0][1], nn.ReLU)
        assert len(model[0]) == len(list(model[0])) == 2
        dense = gated(["dense"]).dense
        assert list(dense) == list(dense.keys()) == [name for name, _ in dense.items()] == ["a", "b"]
        assert len(dense) == len(dense.values()) == 2

    @pytest.mark.parametrize("cls", [Children, Indirect, Decorated])
    def test_layers_that_run_all_children_take_no_gate(self, cls: type[nn.Sequential]) -> None:
        x = torch.zeros(1, 1, 16, 16)
        model = nn.Sequential(cls(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()), nn.Conv2d(4, 2, 1))
        with pytest.raises(ValueError, match=r"layers: .* does not run all .*, got '0'; name other"):
            insert_uafs(model, ["0", "1"], 2, example_input=x)
        assert not any(is_extended(module) for module in model.modules())
        insert_uafs(model, "auto", 2, example_input=x)
        assert "0" not in model.uafs
        attach_pdcr(model, "0", 2, example_input=x, patch_size=3)

    @pytest.mark.parametrize("cls", [Chosen, Sliced])
    def test_sequences_with_ways_of_their_own_take_gates(self, cls: type[nn.Sequential]) -> None:
        x = torch.randn(2, 1, 16, 16)
        model = nn.Sequential(cls(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()), nn.Conv2d(4, 2, 1)).eval()
        hidden = model[0](x)
        insert_uafs(model, "0", 2, example_input=x)
        assert torch.equal(model[0](x), model.uafs["0"](hidden))

    def test_a_layer_that_runs_with_different_channels_takes_no_gate(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.relu = nn.Conv2d(1, 4, 3), nn.ReLU()
                self.second = nn.Conv2d(4, 6, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.relu(self.second(self.relu(self.first(x))))

        model = Shared()
        with pytest.raises(RuntimeError, match="expected 6 channels, got 4"):
            insert_uafs(model, ["first", "relu"], 2, example_input=torch.zeros(X))
        assert not any(is_extended(module) for module in model.modules())
        assert not hasattr(model, "uafs")

    def test_layers_with_several_names_and_wrappers_that_delegate(self) -> None:
        x = torch.randn(2, 1, 16, 16)
        model = nn.Sequential(*(nn.Conv2d(k, 4, 3, padding=1) for k in (1, 4)), nn.Conv2d(4, 2, 1))
        model[2].again = nn.ModuleList([model[1]])
        insert_uafs(model, "2.again.0", 2, example_input=x)
        assert model.uafs["2.again.0"] is model.uafs["1"]
        remove_uafs(model, "2.again.0")
        insert_uafs(model, "0", 2, example_input=x)
        model[0] = torch.compile(model[0], backend="eager")
        assert list(model.uafs) == ["0._orig_mod"]
        model[1] = torch.compile(model[1], backend="eager")
        for function in (insert_uafs, attach_pdcr):
            with pytest.raises(ValueError, match=r"layers \('1'\): expected .* not compiled.*'_orig_mod'"):
                function(model, "1", 2, example_input=x)
        remove_uafs(model)
        insert_uafs(model, "auto", 2, example_input=x)
        assert set(model.uafs) <= {"0._orig_mod", "1._orig_mod"}

    def test_classes_with_registries_and_reductions_of_their_own(self) -> None:
        made: list[str] = []

        class Registered(nn.Conv2d):
            def __init_subclass__(cls, *, key: str) -> None:
                made.append(key)

        model, x = (
            nn.Sequential(Registered(1, 4, 3), Reduced(4), nn.Conv2d(4, 2, 1)).eval(),
            torch.randn(1, 1, 8, 8),
        )
        insert_uafs(model, ["0", "1"], 2, example_input=x)
        assert not made
        own = pickle.loads(pickle.dumps(model[1]))
        hidden = torch.randn(1, 4, 5, 5)
        assert torch.equal(own(hidden), model[1](hidden))

    def test_what_is_no_gate_is_not_run(self) -> None:
        model, x = gated(["stem", "deep"]).eval(), torch.randn(X)
        del model.stem.uafs
        model.stem.uafs = UAFS(2, 4, 2)  # the layer's own, which its forward pass does not run
        del model.uafs["deep"]
        torch.testing.assert_close(model(x), make().eval()(x))

    def test_a_gate_of_the_model_itself_is_left_alone(self) -> None:
        model, x = nn.Sequential(Own(), nn.Conv2d(4, 2, 1)).eval(), torch.randn(2, 1, 8, 8)
        y = blob_labels(2, (8, 8), 2)
        expected = model(x)
        pdcr = attach_pdcr(model, "0", 2, example_input=x)
        torch.testing.assert_close(model(x), expected)
        model.train()(x)
        assert pdcr(y).requires_grad
        with pytest.raises(ValueError, match=r"layers \('0'\): expected layers without an attribute 'uafs'"):
            insert_uafs(model, "0", 2, example_input=x)

    def test_a_model_whose_encoder_was_gated_before(self) -> None:
        model, x = make(), torch.zeros(X)
        wrapped = nn.Sequential(model, nn.Identity())
        insert_uafs(model, "deep", 2, example_input=x)
        insert_uafs(wrapped, "0.stem", 2, example_input=x)
        assert list(wrapped.uafs) == ["0.stem", "0.deep"]
        assert list(model.uafs) == ["stem", "deep"]
        with pytest.raises(ValueError, match=r"layers \('0'\): expected layers without an attribute 'uafs'"):
            insert_uafs(wrapped, "0", 2, example_input=x)

    def test_forward_passes_that_were_replaced_are_refused(self) -> None:
        x = torch.zeros(X)
        model = make()
        model.stem.forward = model.stem.forward  # what accelerate does
        for function in (insert_uafs, attach_pdcr):
            with pytest.raises(
                ValueError, match=r"layers \('stem'\): expected .* that of their class.*accelerate"
            ):
                function(model, "stem", 3, example_input=x)
        model = make()
        model.forward = model.forward
        with pytest.raises(
            ValueError, match="model: expected modules whose forward pass is that of their class"
        ):
            attach_pdcr(model, "stem", 3, example_input=x)
        model = gated(["stem"]).eval()
        expected = model(x)
        model.stem.forward = model.stem.forward  # afterwards it is right
        torch.testing.assert_close(model(x), expected)

    @pytest.mark.filterwarnings("ignore:.*deprecated")
    def test_generated_code_is_refused(self) -> None:
        x = torch.zeros(1, 1, 8, 8)
        parts = {
            "a ScriptModule": torch.jit.script(nn.Conv2d(1, 4, 3)),
            "an fx.GraphModule": fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 4, 3))),
        }
        for kind, part in parts.items():
            model = nn.Sequential(OrderedDict(part=part, head=nn.Conv2d(4, 2, 1)))
            for function in (insert_uafs, attach_pdcr):
                with pytest.raises(TypeError, match=rf"layers.*: expected .* Python code.*got .*{kind}"):
                    function(model, "part", 2, example_input=x)

    @pytest.mark.filterwarnings("ignore:.*deprecated")
    def test_tracing_and_export_work_and_scripting_raises(self) -> None:
        x = torch.randn(X)
        model = gated(["stem"]).eval()
        with pytest.raises(
            RuntimeError, match=r"torch\.jit\.script does not support Conv2d with a UAFS gate.*export"
        ):
            torch.jit.script(model)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
        model = make()
        attached(model)
        traced = fx.symbolic_trace(model.eval())
        torch.testing.assert_close(traced(x), model(x))
        exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
        torch.testing.assert_close(exported.module()(x), model(x))


WRAPPERS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "fully_shard": fully_shard,
}


def try_wrapped_models(_: int, rendezvous: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    x = torch.zeros(X)
    for name, wrap in WRAPPERS.items():
        for function in (insert_uafs, attach_pdcr):
            wrapped = wrap(make())
            for model in (wrapped, nn.Sequential(wrapped)):
                with pytest.raises(TypeError, match=rf"model: .* wrapped afterwards, got .*{name}; insert g"):
                    function(model, "*stem", 3, example_input=x)
            del wrapped, model
    gc.collect()
    torch.distributed.destroy_process_group()


def train_half(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    x, y, state = torch.load(folder / "batch.pt")
    results = []
    for wrap in ("ddp", "fsdp", "fsdp of each child"):
        for compiled in (False, True)[: 1 if wrap == "fsdp" else 2]:
            torch.compiler.reset()
            model = independent()
            model.load_state_dict(state)
            pdcr = attached(model)
            if wrap == "fsdp of each child":
                for child in model.children():
                    if not isinstance(child, nn.ModuleDict):  # refused by torch 2.11
                        fully_shard(child)
            parallel = (
                fully_shard(model) if wrap.startswith("fsdp") else nn.parallel.DistributedDataParallel(model)
            )
            run = torch.compile(parallel, backend="aot_eager") if compiled else parallel
            for _ in range(2):
                model.zero_grad()
                (run(x[rank : rank + 1]).square().mean() + pdcr(y[rank : rank + 1])).backward()
            grads = [
                p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()
            ]
            results.append([g.clone() for g in grads])
            del parallel, run, model, pdcr  # they hold the group; its threads must end before Python does
    torch.save(results, folder / f"gradients{rank}.pt")
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def independent() -> Net:
    """A gated model whose images do not depend on each other."""
    model = make()
    model.down[1] = nn.GroupNorm(2, 6)
    model.deep.norm = nn.GroupNorm(2, 8)
    return insert_uafs(model, list(LAYERS), 3, example_input=torch.zeros(X), norm="instance")


class TestWrapped:
    def test_wrapped_models_are_refused_and_the_order_named(self, tmp_path: Path) -> None:
        torch.multiprocessing.spawn(try_wrapped_models, (f"file://{tmp_path}/rendezvous",), nprocs=1)

    def test_parallel_and_sharded_models_find_the_gradients_of_one(self, tmp_path: Path) -> None:
        x, y = batch()
        model = independent()
        state = copy.deepcopy(model.state_dict())
        pdcr = attached(model)
        (model(x).square().mean() + pdcr(y)).backward()
        expected = [parameter.grad for parameter in model.parameters()]
        torch.save((x, y, state), tmp_path / "batch.pt")
        torch.multiprocessing.spawn(train_half, (tmp_path,), nprocs=2)
        for rank in range(2):
            for found in torch.load(tmp_path / f"gradients{rank}.pt"):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
