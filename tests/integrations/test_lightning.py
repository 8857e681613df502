"""The mixin for LightningModules under a real trainer: losses, logs, checkpoints, resuming."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import blob_labels
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning", reason="needs the extra lightning")

from contrastseg_fast import attach_pdcr, insert_uafs  # noqa: E402
from contrastseg_fast.integrations.lightning import PDCRMixin  # noqa: E402

X = torch.zeros(2, 1, 32, 32)


class Segmentation(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(8, 3, 2, 2),
        )
        self.results: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", cross_entropy(self.net(x), y))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.results.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Regularized(PDCRMixin, Segmentation):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        insert_uafs(self.net, "1", 3, example_input=X)
        self.attach_pdcr(self.net, ["1", "3"], 3, **{"example_input": X, "weight": 0.5, **options})


def loader(steps: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    labels = blob_labels(2 * steps, (32, 32), 3)
    images = labels[:, None] + 0.3 * torch.randn(2 * steps, 1, 32, 32, generator=generator)
    return DataLoader(list(zip(images, labels, strict=True)), batch_size=2)


def trainer(folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_the_loss_is_what_one_adds_by_hand(tmp_path: Path) -> None:
    data, module = loader(2), Regularized()
    x, y = next(iter(data))
    net = Segmentation().net
    insert_uafs(net, "1", 3, example_input=X)
    net.load_state_dict(module.net.state_dict())
    pdcr = attach_pdcr(net, ["1", "3"], 3, example_input=X)
    expected = cross_entropy(net(x), y) + 0.5 * pdcr(y)
    run = trainer(tmp_path, max_steps=2, enable_checkpointing=False)
    run.fit(module, data, data)
    assert module.results[0] == pytest.approx(expected.item(), rel=1e-5)
    assert len(module.results) == 2
    assert set(run.logged_metrics) >= {"train_loss", "train_pdcr_step", "train_pdcr_epoch", "val_loss"}


@pytest.mark.parametrize("options", [{}, {"projection": "linear", "projection_channels": 4}])
def test_checkpoints_resume(tmp_path: Path, options: dict[str, Any]) -> None:
    data = loader()
    torch.manual_seed(2)
    whole = Regularized(**options)
    trainer(tmp_path / "whole", max_epochs=2, enable_checkpointing=False).fit(whole, data)
    torch.manual_seed(2)
    first = Regularized(**options)
    run = trainer(tmp_path / "first", max_epochs=1)
    run.fit(first, data)
    path = run.checkpoint_callback.best_model_path
    keys = set(torch.load(path, weights_only=True)["state_dict"])
    gated = insert_uafs(Segmentation().net, "1", 3, example_input=X)
    plain = {f"net.{key}" for key in gated.state_dict()}
    assert keys >= plain
    heads = {f"net.pdcr.{layer}.{name}" for layer in ("1", "3") for name in ("weight", "bias")}
    assert keys - plain == (heads if options else set())
    second = Regularized(**options)
    trainer(tmp_path / "second", max_epochs=2).fit(second, data, ckpt_path=path)
    assert first.results + second.results == pytest.approx(whole.results, rel=1e-5)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value)
    restored = Regularized.load_from_checkpoint(path, **options)
    for name, value in first.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)


def test_accumulation_and_mixed_precision(tmp_path: Path) -> None:
    module = Regularized()
    before = module.net[0].weight.detach().clone()
    run = trainer(
        tmp_path, max_steps=2, accumulate_grad_batches=2, precision="bf16-mixed", enable_checkpointing=False
    )
    run.fit(module, loader(4))
    assert run.global_step == 2
    assert len(module.results) == 4
    assert not torch.equal(module.net[0].weight, before)


class Named(Segmentation):
    """Gives a dict, takes mappings, and skips batches without labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not (batch["label"] > 0).any():
            return None
        logits = self.net(batch["image"])
        return {"loss": cross_entropy(logits, batch["label"]), "logits": logits}


class NamedRegularized(PDCRMixin, Named):
    pass


def test_dicts_and_skipped_batches() -> None:
    x, y = torch.randn(2, 1, 32, 32), blob_labels(2, (32, 32), 3)
    module = NamedRegularized()
    module.attach_pdcr(module.net, "1", 3, example_input=X, weight=0.5)
    plain = Named.training_step(module, {"image": x, "label": y}, 0)
    added = 0.5 * module.pdcr(y)
    output = module.training_step({"image": x, "label": y}, 0)
    torch.testing.assert_close(output["loss"], plain["loss"] + added)
    assert set(output) == {"loss", "logits"}
    assert module.training_step({"image": x, "label": torch.zeros_like(y)}, 0) is None
    module.attach_pdcr(module.net, "1", 3, example_input=X, warmup_steps=10)
    assert torch.equal(module.training_step({"image": x, "label": y}, 0)["loss"], plain["loss"])


def test_what_the_mixin_refuses() -> None:
    x, y = torch.randn(2, 1, 32, 32), blob_labels(2, (32, 32), 3)

    class Forgotten(PDCRMixin, Segmentation):
        pass

    with pytest.raises(RuntimeError, match="PDCRMixin: expected attach_pdcr to be called"):
        Forgotten().training_step((x, y), 0)
    module = Regularized()
    for batch in (x, {"image": x}):
        with pytest.raises(TypeError, match=r"batch: expected .*override pdcr_labels"):
            module.pdcr_labels(batch)
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="automatic optimization"):
        module.training_step((x, y), 0)
    with pytest.raises(ValueError, match="weight"):
        Regularized(weight=-1)


def test_without_lightning_the_import_says_what_to_install() -> None:
    code = (
        "import contrastseg_fast, importlib.util; importlib.util.find_spec = lambda name: None; "
        "import contrastseg_fast.integrations.lightning"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "contrastseg_fast.integrations.lightning needs Lightning: pip install" in result.stderr
