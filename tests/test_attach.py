"""PDCR attached to models and UAFS inserted into them: what is collected when, and what models keep."""

from __future__ import annotations

import copy
import doctest
import gc
import importlib
import io
import logging
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import blob_labels, normwise_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from contrastseg_fast import PDCRLoss, ReceptiveField, attach_pdcr, insert_uafs, receptive_fields
from contrastseg_fast.attach import AttachedPDCR, find_layers, remove_uafs
from contrastseg_fast.attach.extended import BEFORE, is_extended
from contrastseg_fast.functional import foreground_ratio, repelled_fraction

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
    assert type(model) is Net
    assert type(model.down) is nn.Sequential
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


def caught(function: Callable[[], Any]) -> list[str]:
    """The warnings of the package that a call gives."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in found if str(w.message).startswith("contrastseg_fast")]


def backward(loss: Tensor) -> None:
    loss.backward()


class TestSilence:
    """Where PDCR is off, it says so once, and how to say that this is meant."""

    def test_a_model_in_eval_mode_that_is_trained(self) -> None:
        model, (x, y) = Net().eval(), batch()
        pdcr = attach_pdcr(model, ["stem", "down"], 3, example_input=x)

        def step() -> None:
            (model(x).square().mean() + pdcr(y)).backward()

        (message,) = caught(step)
        assert re.search(r"eval mode.*PDCR is 0.*model\.train\(\).*no_grad\(\).*pdcr\.paused\(\)", message)
        assert not caught(step)
        other = attach_pdcr(model, "deep", 3, example_input=x, patch_size=5)

        def evaluate() -> None:
            with torch.no_grad():
                model(x)
                other(y)

        def meant() -> None:
            with other.paused():
                backward(model(x).mean() + other(y))

        assert not caught(evaluate)
        assert not caught(meant)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # single layers in eval mode do not turn it off
        model.stem.eval()
        model(x)
        assert not caught(lambda: backward(pdcr(y)))

    def test_frozen_layers(self) -> None:
        model, (x, y) = Net(), batch()
        for projection in (None, "linear"):
            pdcr = attach_pdcr(
                model, ["stem", "down", "deep"], 3, example_input=x, patch_size=5, projection=projection
            )
            model.stem.requires_grad_(False)

            def step(regularizer: AttachedPDCR = pdcr) -> None:
                backward(model(x).mean() + regularizer(y))

            (message,) = caught(step)
            assert re.search(r"no gradient at the layers \['stem'\].*frozen.*pdcr\.paused\(\)", message)
            assert not caught(step)
            pdcr.remove()
        fresh = attach_pdcr(model, ["stem"], 3, example_input=x)

        def meant() -> None:
            with fresh.paused():
                output = model(x)
                assert fresh(y) == 0
            backward(output.mean())

        assert not caught(meant)
        model.stem.requires_grad_()
        model(x)
        assert not caught(lambda: backward(fresh(y)))

    def test_more_than_one_pass(self) -> None:
        model, (x, y) = Net(), batch()
        pdcr = attach_pdcr(model, ["stem", "down"], 3, example_input=x)

        def step(first: Callable[[], Any]) -> None:
            first()
            model(x)
            pdcr.repelled_fraction(y)
            backward(pdcr(y))

        def paused() -> None:
            with pdcr.paused():
                model(torch.randn(X))

        def evaluated() -> None:
            with torch.no_grad():
                model(torch.randn(X))

        assert not caught(lambda: step(paused))
        assert not caught(lambda: step(evaluated))
        assert not caught(lambda: step(lambda: None))
        (message,) = caught(lambda: step(lambda: model(torch.randn(X))))
        assert re.search(r"ran more than once.*latest.*`with pdcr\.paused\(\):`", message)
        assert not caught(lambda: step(lambda: model(torch.randn(X))))

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_semi_supervised_step(self, compiled: bool) -> None:
        """Mean teacher: the labelled batch is regularized, the unlabelled one is not, nor is the teacher."""
        torch.compiler.reset()
        (x, y), unlabelled = batch(), torch.randn(X)
        student = insert_uafs(Net(), ["down"], 3, example_input=x)
        pdcr = attach_pdcr(student, ["stem", "down"], 3, example_input=x)
        teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        alone, alone_pdcr = copy.deepcopy((student, pdcr))
        alone(x)
        expected = alone_pdcr(y)
        if compiled:
            student.compile(backend="aot_eager")

        def step() -> Tensor:
            logits = student(x)
            with pdcr.paused():
                guess = student(unlabelled)
            with torch.no_grad():
                target = teacher(unlabelled).softmax(1)
            consistency = (guess.softmax(1) - target).square().mean()
            regularization = pdcr(y)
            (logits.square().mean() + consistency + 0.1 * regularization).backward()
            teacher.update_parameters(student)
            return regularization.detach()

        values: list[Tensor] = []
        assert not caught(lambda: values.extend(step() for _ in range(2)))
        torch.testing.assert_close(values[0], expected.detach())


class TestLabelSize:
    """Labels have the size of the model's input, to the pixel."""

    @pytest.mark.parametrize("dims", [2, 3])
    def test_labels_of_another_size_raise(self, dims: int) -> None:
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        model = nn.Sequential(conv(1, 4, 3, 2, 1), nn.ReLU(), conv(4, 2, 1))
        size = (32, 24, 20)[:dims]
        x, y = torch.randn(2, 1, *size), blob_labels(2, size, 2)
        pdcr = attach_pdcr(model, "1", 2, example_input=x, patch_size=5)
        model(x)
        for wrong in (y[:, 1:], y[..., :-1], [y[:, ::2], y], y[:, None, 2:]):
            for function in (pdcr, pdcr.repelled_fraction):
                with pytest.raises(
                    ValueError, match=r"labels: expected spatial shape \(32, 24.*model's input"
                ):
                    function(wrong)
        assert pdcr([y, y[:, ::2]]).requires_grad
        model(x[:, :, 4:])
        assert pdcr(y[:, None, 4:]).requires_grad

    def test_the_input_is_the_first_tensor_with_enough_axes(self) -> None:
        class Prompted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(1, 4, 3, 2, 1)

            def forward(self, scale: Any = None, image: Tensor | None = None, other: Any = None) -> Tensor:
                return self.conv(scale if image is None else image)

        model, (x, y) = Prompted(), batch()
        pdcr = attach_pdcr(model, "conv", 3, example_input=x)
        model(torch.zeros(7, 2), image=x, other=torch.zeros(1, 1, 3, 3))
        assert pdcr(y).requires_grad

    def test_a_model_that_resizes_its_input(self) -> None:
        class Resizing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(1, 4, 3, 2, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(nn.functional.interpolate(x, scale_factor=2))

        torch.manual_seed(0)
        model, plain = Resizing(), nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1))
        plain[0].load_state_dict(model.conv.state_dict())
        x, y = torch.randn(2, 1, 16, 24), blob_labels(2, (32, 48), 3)
        pdcr = attach_pdcr(model, "conv", 3, example_input=x, label_size=(32, 48), patch_size=5)
        wanted = attach_pdcr(plain, "0", 3, example_input=torch.zeros(2, 1, 32, 48), patch_size=5)
        model(x)
        plain(nn.functional.interpolate(x, scale_factor=2))
        with pytest.raises(ValueError, match=r"labels: expected spatial shape \(32, 48\) \(label_size\)"):
            pdcr(y[:, ::2, ::2])
        torch.testing.assert_close(pdcr(y), wanted(y))
        halved = attach_pdcr(plain, "0", 3, example_input=torch.zeros(2, 1, 32, 48), label_size=[16, 24])
        (field,) = halved.loss.receptive_fields.values()
        assert (field.size, field.stride) == ((2, 2), (1, 1))

    def test_sizes_that_make_no_sense(self) -> None:
        for size, error, message in (
            ((32,), ValueError, "label_size: expected 2 integers"),
            (32, TypeError, "label_size: expected one integer per axis, got int"),
            ((32, 0), ValueError, "label_size: expected an integer of at least 1"),
            ((32, 1.5), TypeError, "label_size: expected an integer"),
        ):
            with pytest.raises(error, match=message):
                attach_pdcr(Net(), "down", 3, example_input=torch.zeros(X), label_size=size)


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


def test_a_compiled_model_is_compiled_once_for_all_steps() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x, projection="linear")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(4):
        output = compiled(x)
        if step % 2:
            pdcr.repelled_fraction(y)
        (output.mean() + pdcr(y)).backward()
        pdcr.repelled_fraction(y)
    assert counter.frame_count == 1


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
        assert type(other.down) is nn.Sequential
    assert is_extended(model.down)
    torch.testing.assert_close(pdcr(y), expected)


def regularized_loss(model: nn.Module, pdcr: AttachedPDCR, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(nn.functional.interpolate(model(x), y.shape[1:]), y) + 0.1 * pdcr(y)


def normalised_by_image() -> Net:
    """A model whose images do not depend on each other, with gates and a regularizer attached later."""
    model = Net()
    model.down[1] = nn.GroupNorm(2, 6)
    return insert_uafs(model, ["down", "deep"], 3, example_input=torch.zeros(X), norm="instance")


def train_on_half_a_batch(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    x, y, states = torch.load(folder / "batch.pt")
    results = []
    for projection, state in states.items():
        model = normalised_by_image()
        pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x, projection=projection)
        if rank == 0:  # DistributedDataParallel copies the parameters of rank 0, the heads among them
            model.load_state_dict(state)
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            regularized_loss(parallel, pdcr, x[rank : rank + 1], y[rank : rank + 1]).backward()
        results.append(gradients(model))
        del parallel  # it holds the group, whose threads must end before the interpreter does
    torch.save(results, folder / f"gradients{rank}.pt")
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_gradients_of_one(tmp_path: Path) -> None:
    x, y = batch()
    states, expected = {}, []
    for projection in (None, "linear"):
        model = normalised_by_image()
        pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x, projection=projection)
        states[projection] = model.state_dict()
        regularized_loss(model, pdcr, x, y).backward()
        expected.append(gradients(model))
        assert len(expected[-1]) == len(list(model.parameters()))
    torch.save((x, y, states), tmp_path / "batch.pt")
    torch.multiprocessing.spawn(train_on_half_a_batch, (tmp_path,), nprocs=2)
    for rank in range(2):
        torch.testing.assert_close(
            torch.load(tmp_path / f"gradients{rank}.pt"), expected, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_mixed_precision_with_scaled_gradients(dtype: torch.dtype, tolerance: float) -> None:
    model, (x, y) = normalised_by_image(), batch()
    pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x)
    weight = model.stem.weight
    (expected,) = torch.autograd.grad(regularized_loss(model, pdcr, x, y), weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", dtype=dtype):
        loss = regularized_loss(model, pdcr, x, y)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert weight.grad is not None
    assert normwise_error(weight.grad, expected) < tolerance
    before = weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(weight.detach(), before - 0.1 * weight.grad)


def test_averaged_copies_keep_out_of_the_way() -> None:
    model, (x, y) = normalised_by_image(), batch()
    pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x)
    expected = pdcr(y)
    model(x)
    averaged(torch.randn(X))
    averaged.eval()
    with torch.no_grad():
        averaged(torch.randn(X))
    value = pdcr(y)
    torch.testing.assert_close(value, expected)
    value.backward()
    optimizer.step()
    averaged.update_parameters(model)  # the first update copies
    assert torch.equal(averaged.module.stem.weight, model.stem.weight)
    assert torch.equal(averaged(x), model.eval()(x))


def test_passes_in_eval_mode_run_the_same_operators() -> None:
    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.append(func)
            return func(*args, **(kwargs or {}))

    model, (x, _) = Net().eval(), batch()
    counts = []
    for attached in (False, True):
        if attached:
            attach_pdcr(model, "*", 3, example_input=x)
        operators: list[Any] = []
        with torch.no_grad(), Counted():
            model(x)
        counts.append(operators)
    assert counts[0] == counts[1]
    assert len(counts[0]) > 5


def test_heads_live_in_a_model_without_changing_it() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 3, 1)))
    x, labels = torch.randn(2, 1, 24, 20), blob_labels(2, (24, 20), 3)
    expected, keys = model(x), list(model.state_dict())
    pdcr = attach_pdcr(
        model.eval(), ["0", "2.0"], 3, example_input=x, projection="mlp", projection_channels=4
    )
    assert model.pdcr is pdcr.loss.projections
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(x), expected)
    parts = [f"{step}.{kind}" for step in (0, 2) for kind in ("weight", "bias")]
    heads = [f"pdcr.{layer}.{part}" for layer in ("0", "2/0") for part in parts]
    assert list(model.state_dict()) == keys + heads
    model.train().double()
    model(x.double())
    assert pdcr(labels).dtype == torch.float64
    average = AveragedModel(model)
    with torch.no_grad():
        model.pdcr["0"][0].weight.add_(1)
    average.update_parameters(model)
    average.update_parameters(model)
    before, after = (m.pdcr["0"][0].weight for m in (model, average.module))
    torch.testing.assert_close(after, before)
    assert torch.equal(average.eval()(x.double()), model.eval()(x.double()))
    for _ in range(2):
        pdcr.remove()
        assert list(model.state_dict()) == keys
        assert not hasattr(model, "pdcr")
    assert torch.equal(model(x.double()), average(x.double()))


def test_optimizers_and_state_dicts_see_heads() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x, projection="linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = copy.deepcopy(model.state_dict())
    model(x)
    expected = pdcr(y)
    expected.backward()
    optimizer.step()
    for name, head in model.pdcr.named_parameters():
        assert not torch.equal(head, state[f"pdcr.{name}"])
    model.load_state_dict(state)
    model(x)
    torch.testing.assert_close(pdcr(y), expected)


def test_heads_take_the_dtype_of_the_model() -> None:
    model, (x, y) = Net().double(), batch()
    pdcr = attach_pdcr(model, "down", 3, example_input=x.double(), projection="linear")
    assert model.pdcr["down"].weight.dtype == torch.float64
    model(x.double())
    assert pdcr(y).dtype == torch.float64


def test_a_model_has_one_attribute_for_heads() -> None:
    x = torch.zeros(X)
    for taken in (nn.Identity(), 3):
        model = Net()
        model.pdcr = taken
        with pytest.raises(ValueError, match=rf"model: expected no attribute 'pdcr'.*{type(taken).__name__}"):
            attach_pdcr(model, "down", 3, example_input=x, projection="linear")
        assert model.pdcr is taken
        assert not is_extended(model)
        attach_pdcr(model, "down", 3, example_input=x)
    model = Net()
    first = attach_pdcr(model, "down", 3, example_input=x, projection="linear")
    with pytest.raises(ValueError, match="model: expected no attribute 'pdcr'"):
        attach_pdcr(model, "deep", 3, example_input=x, projection="linear")
    second = attach_pdcr(model, "deep", 3, example_input=x)
    second.remove()
    assert model.pdcr is first.loss.projections
    first.remove()
    attach_pdcr(model, "deep", 3, example_input=x, projection="linear")


class Task(nn.Module):
    """Holds a model and its regularizer, as a LightningModule does."""

    def __init__(self, projection: str | None) -> None:
        super().__init__()
        self.net = Net()
        self.keys = list(self.state_dict())
        self.regularizer = attach_pdcr(
            self.net, "down", 3, example_input=torch.zeros(X), projection=projection
        )


def test_a_regularizer_registers_no_parameters() -> None:
    heads = ["net.pdcr.down.weight", "net.pdcr.down.bias"]
    for task, added in ((Task(None), []), (Task("linear"), heads)):
        assert list(task.state_dict()) == task.keys + added
        names = [name for name, _ in task.named_parameters(remove_duplicate=False)]
        assert names == [f"net.{name}" for name, _ in task.net.named_parameters()]


def regularizer_of(model: nn.Module) -> AttachedPDCR:
    (begin_pass,) = model.__dict__[BEFORE]
    return begin_pass.__self__


def test_copies_project_with_their_own_heads() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x, projection="mlp", projection_channels=4)
    model(x)
    expected = pdcr(y).detach()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        regularizer = regularizer_of(other)
        assert regularizer.loss.projections is other.pdcr
        other(x)
        torch.testing.assert_close(regularizer(y).detach(), expected)
        with torch.no_grad():
            other.pdcr["down"][2].weight.normal_()
        other(x)
        changed = regularizer(y)
        assert not torch.isclose(changed, expected)
        changed.backward()
        assert all(parameter.grad is not None for parameter in other.pdcr.parameters())
        regularizer.remove()
        assert not hasattr(other, "pdcr")
    assert all(parameter.grad is None for parameter in model.parameters())
    model(x)
    torch.testing.assert_close(pdcr(y).detach(), expected)


def test_projections_find_their_channels() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(
        model, ["down", "deep"], 3, example_input=x, projection="linear", projection_channels=4
    )
    assert pdcr.loss.in_channels == {"down": 6, "deep": 8}
    model(x)
    pdcr(y).backward()
    assert all(parameter.grad is not None for parameter in pdcr.loss.parameters())
    pdcr.remove()
    fields = receptive_fields(model, X, ["down"])
    options = {"projection": "linear", "receptive_fields": fields}
    assert attach_pdcr(model, "down", 3, example_input=x, **options).loss.in_channels == {"down": 6}


def test_data_parallel_is_refused() -> None:
    x = torch.zeros(X)
    for function in (attach_pdcr, insert_uafs):
        for wrapped in (nn.DataParallel(Net()), nn.Sequential(nn.DataParallel(Net()))):
            with pytest.raises(TypeError, match=r"model: expected one without DataParallel.*Distributed"):
                function(wrapped, "*down", 2, example_input=x)
        model = Net()
        function(model, "down", 2, example_input=x)
        model(x)
        module = model if function is attach_pdcr else model.down.uafs
        with pytest.raises(RuntimeError, match="one process per device, got DataParallel"):
            module._replicate_for_data_parallel()(x if module is model else torch.zeros(2, 6, 8, 8))


def test_compiled_models_and_things_that_are_no_models_are_refused() -> None:
    compiled = torch.compile(Net(), backend="eager")
    for function in (attach_pdcr, insert_uafs):
        with pytest.raises(TypeError, match="model: expected one to be compiled afterwards"):
            function(compiled, "down", 2, example_input=torch.zeros(X))
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got function"):
            function(lambda x: x, "down", 2, example_input=torch.zeros(X))


def test_layers_by_pattern() -> None:
    model, (x, _) = Net(), batch()
    fields = attach_pdcr(model, ["d*", "down", "stem"], 3, example_input=x).loss.receptive_fields
    assert list(fields) == ["down", "deep", "stem"]  # what lies inside a match does not count
    assert find_layers(model, "down.*") == ["down.0", "down.1"]
    listed = nn.Module()
    listed.blocks = nn.ModuleList([nn.Conv2d(1, 1, 3), nn.Identity()])
    listed.forward = lambda x: listed.blocks[0](x)
    assert find_layers(listed, "blocks*", x) == ["blocks.0"]  # neither lists nor what does not run
    insert_uafs(model, "down", 2, example_input=x)
    assert find_layers(model, "*") == ["stem", "down", "deep", "up", "head", "relu"]  # no gates
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
    insert_uafs(unet, "auto", 2, example_input=x)
    gated = attach_pdcr(unet, "auto", 2, example_input=x).loss.receptive_fields
    assert list(gated)[:2] == ["model.0", "model.1.submodule.0"]  # the layers, not their gates
    crop = torch.zeros(1, 1, 32, 32, 32)
    residual = nets.UNet(3, 1, 2, (4, 8, 8, 8), (2, 2, 2), num_res_units=2)
    fields = attach_pdcr(residual, "auto", 2, example_input=crop).loss.receptive_fields
    # Of the second stage, whose own field is too large, a whole unit and not the shortcut's bare convolution.
    assert list(fields) == ["model.0", "model.1.submodule.0.conv.unit0"]
    dense = nets.DenseNet121(2, 1, 2, init_features=4, growth_rate=2, block_config=(2, 2, 2, 2))
    fields = attach_pdcr(dense, "auto", 2, example_input=torch.zeros(1, 1, 256, 256)).loss.receptive_fields
    assert "features.denseblock1" in fields  # though its layers join what they get and what they make
    basic = nets.BasicUNet(3, 1, 2, features=(2,) * 6)
    fields = attach_pdcr(basic, "auto", 2, example_input=torch.zeros(1, 1, 64, 64, 64)).loss.receptive_fields
    assert {name: field.size[0] for name, field in fields.items()} == {"down_1": 14, "down_2": 32}
    with pytest.raises(ValueError, match="layers: expected an encoder with layers of stride"):
        attach_pdcr(nn.Conv2d(1, 1, 3), "auto", 2, example_input=x)


def test_stages_chosen_for_gates() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    x, volume = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 32, 32, 32)
    stages = [
        (
            nets.BasicUNet(2, 1, 3, features=(4, 4, 8, 8, 16, 4)),
            x,
            ["conv_0", "down_1", "down_2", "down_3", "down_4", "upcat_4", "upcat_3", "upcat_2", "upcat_1"],
        ),
        (
            nets.SegResNet(3, 8, 1, 3),
            volume,
            ["act_mod", *(f"down_layers.{k}" for k in range(4)), "up_layers.0", "up_layers.1"],
        ),
        (
            nets.DynUNet(3, 1, 3, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 8], deep_supervision=True),
            volume,
            ["input_block", "downsamples.0", "bottleneck", "upsamples.0", "upsamples.1"],
        ),
        (
            nets.UNet(2, 1, 3, (4, 8, 8), (2, 2), num_res_units=2),
            x,
            ["model.0", "model.1.submodule", "model.1.submodule.1"],  # no skip connections on the way up
        ),
    ]
    for model, example, names in stages:
        keys = list(model.state_dict())
        insert_uafs(model, "auto", 2, example_input=example)
        assert sorted(model.uafs) == sorted(names)
        assert list(remove_uafs(model).state_dict()) == keys


class Shared(nn.Module):
    """Runs one activation in place behind every convolution, and gives maps at once and pooled to points."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.both = Block(lambda x: (x, x + 1))
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.both(x)
        x = self.down(self.relu(self.stem(x)) + first)
        return self.relu(self.head(x + self.pool(x)))


class Branching(nn.Module):
    """Reads values, so that it cannot run without data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return y if y.sum() > 0 else -y


PASSES: list[str] = []


class Counted(Net):
    """Counts its forward passes, those without data too."""

    def forward(self, x: Tensor) -> Tensor:
        PASSES.append("pass")
        return super().forward(x)


@pytest.mark.parametrize("layers", ["down", ["stem", "d*"], "*", "auto"])
@pytest.mark.parametrize("projection", [None, "linear"])
def test_layers_and_their_fields_are_found_in_one_pass(layers: Any, projection: str | None) -> None:
    x, field = torch.zeros(1, 1, 64, 64), ReceptiveField((3, 3), (2, 2), (-1, -1))
    options = {"example_input": x, "projection": projection}
    for given in ({}, {"down": field}):
        PASSES.clear()
        attach_pdcr(Counted(), layers, 3, receptive_fields=given, **options)
        assert len(PASSES) == (0 if given and layers == "down" and projection is None else 1)
    PASSES.clear()
    insert_uafs(Counted(), "d*" if layers == "*" else layers, 3, example_input=x)
    assert len(PASSES) == 2  # one more with the gates
    find_layers(Counted(), "d*", x)
    assert len(PASSES) == 3


def test_patterns_and_auto_choose_no_heads() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 5, 2, 2), nn.ReLU(), nn.Conv2d(4, 3, 3, 2, 1))
    x = torch.zeros(1, 1, 64, 64)
    for layers in ("auto", "*"):
        model = copy.deepcopy(plain)
        expected = attach_pdcr(model, layers, 3, example_input=x).loss.receptive_fields
        attach_pdcr(model, "0", 3, example_input=x, projection="mlp")
        assert attach_pdcr(model, layers, 3, example_input=x).loss.receptive_fields == expected
        assert find_layers(model, "*") == ["0", "1", "2"]


def test_patterns_need_no_run_where_fields_are_given_or_nothing_matches() -> None:
    x, fields = torch.zeros(X), {"stem": ReceptiveField((3, 3), (1, 1), (-1, -1))}
    pdcr = attach_pdcr(Branching(), "st*", 2, example_input=x, receptive_fields=fields)
    assert list(pdcr.loss.receptive_fields) == ["stem"]
    with pytest.raises(ValueError, match=r"layers: expected names of layers.*near names: 'stem'"):
        attach_pdcr(Branching(), "sten", 2, example_input=x)
    with pytest.raises(RuntimeError, match="does not read values of tensors"):
        attach_pdcr(Branching(), "st*", 2, example_input=x)


def test_gates_are_not_gated() -> None:
    model, x = insert_uafs(Net(), "auto", 2, example_input=torch.zeros(X)), torch.zeros(X)
    with pytest.raises(ValueError, match=r"layers: expected names, as the model has gates.*got 'auto'"):
        insert_uafs(model, "auto", 2, example_input=x)
    before = list(model.uafs)
    insert_uafs(model, "head", 2, example_input=x)
    assert list(model.uafs) == [*before, "head"]


def test_what_makes_pdcr_useless_is_warned_of() -> None:
    model, x = Net(), torch.zeros(X)
    half = {"deep": ReceptiveField((12, 16), (4, 4), (-4, -6))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_pdcr(model, ["stem", "down"], 2, example_input=x)
        attach_pdcr(model, "deep", 2, example_input=x, receptive_fields=half)
        attach_pdcr(model, "deep", 2, example_input=x, patch_size=(24, 16))
        attach_pdcr(model, "deep", 2, example_input=x, patch_size=24, affinity="bipartite")
    with pytest.warns(
        UserWarning, match=r"more than half of the \(24, 32\).*\('deep', \(13, 17\)\).*patch_size"
    ):
        attach_pdcr(model, ["stem", "deep"], 2, example_input=x, patch_size={"deep": (13, 17)})
    with pytest.warns(UserWarning, match="insert gates first, then attach PDCR"):
        insert_uafs(model, "stem", 2, example_input=x)


def test_an_example_that_the_model_refuses_is_named(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    for function in (attach_pdcr, insert_uafs):
        with pytest.raises(RuntimeError, match=r"input of shape \(2, 3, 24, 32\) \(example_input.*got "):
            function(Net(), "down", 2, example_input=torch.zeros(2, 3, 24, 32))
    logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert logger.isEnabledFor(logging.ERROR)


def test_the_repelled_fraction_is_that_of_the_latest_pass() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["stem", "down"], 3, example_input=x, num_samples=40, class_distance="tv")
    model(x)
    fractions = pdcr.repelled_fraction(y)
    samples = [
        pdcr.loss.sample(f, name) for name, f in zip(["stem", "down"], stem_and_down(model, x), strict=True)
    ]
    for k, sample in enumerate(samples):
        box = pdcr.loss.patches[sample.layer]
        ratios, _ = foreground_ratio(y, box.starts(sample.indices), [int(n) for n in box.size], 3)
        expected = repelled_fraction(sample.vectors, ratios, class_distance="tv")
        torch.testing.assert_close(fractions[:, k], expected)
    assert 0 < fractions.min() < fractions.max() < 1
    value = pdcr(y)
    assert value.requires_grad
    value.backward()
    torch.testing.assert_close(pdcr.repelled_fraction(y), fractions)
    with pytest.raises(RuntimeError, match="pdcr: expected a forward pass"):
        pdcr(y)
    torch.testing.assert_close(pdcr.repelled_fraction(y), fractions)
    model(torch.randn(X))
    later = pdcr.repelled_fraction(y)
    assert not torch.equal(later, fractions)
    pdcr(y)
    with torch.no_grad():
        torch.testing.assert_close(pdcr.repelled_fraction(y), later)
    with pdcr.paused():
        model(x)
    torch.testing.assert_close(pdcr.repelled_fraction(y), later)


def test_there_is_no_repelled_fraction_of_passes_that_do_not_count() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["stem", "down"], 3, example_input=x)
    for context, training in ((torch.no_grad, True), (torch.enable_grad, False)):
        model.train()
        model(x)
        pdcr(y)
        pdcr.repelled_fraction(y)
        model.train(training)
        with context():
            model(x)
        with pytest.raises(RuntimeError, match="pdcr: expected a forward pass"):
            pdcr.repelled_fraction(y)
    model.train()
    model(x)
    pdcr.remove()
    with pytest.raises(RuntimeError, match="pdcr: expected a forward pass"):
        pdcr.repelled_fraction(y)


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_a_used_pass_keeps_no_graph() -> None:
    model, (x, y) = Net(), batch()
    pdcr = attach_pdcr(model, ["down", "deep"], 3, example_input=x)
    saved: list[weakref.ref[Saved]] = []

    def pack(tensor: Tensor) -> Saved:
        kept = Saved(tensor.detach())  # else a saved output and the graph would keep each other
        saved.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        model(x)
    gc.collect()
    assert any(reference() is not None for reference in saved)
    pdcr(y)
    gc.collect()
    assert all(reference() is None for reference in saved)
    assert pdcr.repelled_fraction(y).isfinite().all()


def stem_and_down(model: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    stem = model.stem(x)
    return stem, model.down(stem.relu())


def test_layers_not_chosen() -> None:
    model = insert_uafs(Shared(), "auto", 2, example_input=torch.zeros(X))
    assert list(model.uafs) == ["stem", "down"]
    with pytest.raises(ValueError, match="layers: expected a model with feature maps inside"):
        insert_uafs(nn.Flatten(), "auto", 2, example_input=torch.zeros(X))


def test_gates_can_be_taken_out() -> None:
    model, (x, y) = Net().eval(), batch()
    expected, keys = model(x), list(model.state_dict())
    with pytest.raises(ValueError, match="model: expected one that insert_uafs put gates into, got Net"):
        remove_uafs(model)
    insert_uafs(model, ["down"], 2, example_input=x)
    insert_uafs(model, ["deep"], 2, example_input=x)
    gated = model(x)
    other = copy.deepcopy(model)
    assert remove_uafs(other) is other
    assert torch.equal(other(x), expected)
    assert list(other.state_dict()) == keys
    assert not any(is_extended(module) for module in other.modules())
    assert vars(other).keys() == vars(Net()).keys()
    assert torch.equal(model(x), gated)
    with pytest.raises(ValueError, match="gates"):
        remove_uafs(other)
    insert_uafs(other, ["down"], 2, example_input=x)
    pdcr = attach_pdcr(other.train(), ["down"], 3, example_input=x)
    other(x)
    assert pdcr(y).requires_grad


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
    options = {"example_input": torch.zeros(1, 1, 96, 96), "projection": "mlp"}
    with pytest.raises(ValueError, match=r"receptive_fields: expected layers of the model, got \['cnov'\]"):
        attach_pdcr(Net(), "auto", 3, receptive_fields={"cnov": field}, **options)
    added = attach_pdcr(Net(), "auto", 3, receptive_fields={"up": field}, **options)
    assert added.loss.in_channels == {"up": 6, "down": 6, "deep": 8}


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
    pdcr.remove()
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
    assert [key for key in after if ".uafs." not in key] == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    added = {key.split(".uafs.")[0] for key in after if key not in state}
    assert added == set(model.uafs) == {"down", "deep"}
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
    assert list(model.uafs) == ["0", "1.0"]
    model.eval()
    hidden = model.uafs["1.0"](torch.relu(model.uafs["0"](plain[0](x))))
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


def test_examples_may_lie_on_another_device() -> None:
    model, (x, y) = Net(), batch()
    elsewhere = torch.empty(X, device="meta")
    insert_uafs(model, "down", 2, example_input=elsewhere)
    pdcr = attach_pdcr(model, "deep", 3, example_input=elsewhere, projection="mlp")
    assert {parameter.device.type for parameter in [*model.parameters(), *pdcr.loss.parameters()]} == {"cpu"}
    model(x)
    assert pdcr(y).requires_grad


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
        assert not any(is_extended(module) for module in model.modules())
        assert not hasattr(model, "uafs")


def test_arguments_of_other_types() -> None:
    with pytest.raises(TypeError, match=r"example_input: expected a tensor .* got NoneType"):
        attach_pdcr(Net(), "down", 2)
    attach_pdcr(Net(), {"down": 1}.keys(), 2, example_input=torch.zeros(X))
    for layers, got in (([1], "int"), (Net().down, "Sequential"), (None, "NoneType")):
        for function in (attach_pdcr, insert_uafs):
            with pytest.raises(TypeError, match=f"layers: expected names of layers, got {got}"):
                function(Net(), layers, 2, example_input=torch.zeros(X))
    with pytest.raises(TypeError, match="temperature"):
        attach_pdcr(Net(), "down", 2, example_input=torch.zeros(X), temperature="hot")


def test_gates_that_cannot_be_inserted() -> None:
    x = torch.zeros(X)
    model = insert_uafs(Net(), "down", 2, example_input=x)
    for layer in ("down", ""):
        with pytest.raises(
            ValueError, match=r"layers: expected layers (inside the model, got ''|without a gate, got 'down')"
        ):
            insert_uafs(model, layer, 2, example_input=x)
    with pytest.raises(ValueError, match="layers: expected layers whose output is a feature map"):
        insert_uafs(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2)), "1", 2, example_input=x)
    taken = Net()
    taken.uafs = nn.Identity()
    with pytest.raises(ValueError, match="model: expected no attribute 'uafs'"):
        insert_uafs(taken, "down", 2, example_input=x)


def test_examples() -> None:
    for name in ("layers", "pdcr", "uafs"):
        result = doctest.testmod(importlib.import_module(f"contrastseg_fast.attach.{name}"))
        assert result.attempted > 0
        assert result.failed == 0
