"""Gates and PDCR in models that accelerate prepares or that peft wraps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the extra integrations")
pytest.importorskip("peft", reason="needs the extra integrations")
from accelerate import Accelerator, load_checkpoint_in_model
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from conftest import blob_labels
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from contrastseg_fast import attach_pdcr, insert_uafs
from contrastseg_fast.attach import AttachedPDCR
from contrastseg_fast.attach.extended import Gate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Conv2d(1, 8, 3, 2, 1)
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(self.enc(x).relu()))


def prepared() -> tuple[Net, AttachedPDCR, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 32, 32), blob_labels(2, (32, 32), 2)
    model = insert_uafs(Net(), ["enc", "deep"], 2, example_input=x, norm="instance")
    return model, attach_pdcr(model, ["enc", "deep"], 2, example_input=x), x, y


def gradients(model: nn.Module, loss: Tensor) -> list[Any]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-6), ("bf16", 0.2)])
def test_accelerate_prepares_gated_models(precision: str, tolerance: float, tmp_path: Path) -> None:
    model, pdcr, x, y = prepared()
    expected = gradients(model, model(x).square().mean() + pdcr(y))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run, optimizer = accelerator.prepare(model, optimizer)
    model.zero_grad()
    with accelerator.autocast():
        loss = run(x).square().mean() + pdcr(y)
    accelerator.backward(loss)
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad - wanted).norm() <= tolerance * wanted.norm() + 1e-4
    optimizer.step()
    accelerator.save_model(run, tmp_path)
    restored, *_ = prepared()
    load_checkpoint_in_model(restored, tmp_path)
    for ours, wanted in zip(restored.uafs.parameters(), model.uafs.parameters(), strict=True):
        assert torch.equal(ours, wanted)
    if precision == "bf16":  # accelerate has replaced the forward pass of the model
        with pytest.raises(
            ValueError, match="model: expected modules whose forward pass is that of their class"
        ):
            attach_pdcr(run, "enc", 2, example_input=x)


def test_hooks_of_accelerate_come_afterwards() -> None:
    model, _, x, _ = prepared()
    expected = model(x)
    add_hook_to_module(model.enc, ModelHook())
    torch.testing.assert_close(model(x), expected)
    fresh = Net()
    add_hook_to_module(fresh.enc, ModelHook())
    with pytest.raises(
        ValueError, match=r"layers \('enc'\): .*accelerate for example; insert gates, attach PDCR"
    ):
        insert_uafs(fresh, "enc", 2, example_input=x)


@pytest.mark.parametrize(("targets", "saved"), [(["enc", "deep.0"], None), (["head"], ["uafs"])])
def test_peft_adds_to_gated_layers(targets: list[str], saved: list[str] | None) -> None:
    model, _, x, y = prepared()
    model.eval()
    expected = model(x)
    tuned = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=saved))
    torch.testing.assert_close(tuned(x), expected)
    assert len(tuned.base_model.model.uafs) == 2
    pdcr = attach_pdcr(tuned, [f"base_model.model.{name}" for name in ("enc", "deep")], 2, example_input=x)
    merged = copy.deepcopy(tuned).merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    tuned.train()
    (tuned(x).square().mean() + pdcr(y)).backward()
    trained = {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    assert any("lora_B" in name for name in trained)
    assert any(".uafs." in name for name in trained) == (saved is not None)
    with torch.no_grad():
        for gate in tuned.modules():
            if isinstance(gate, Gate):
                gate.head[-1].weight.mul_(-3)
    assert not torch.allclose(tuned.eval()(x), expected)
