"""PDCR added to a LightningModule by a mixin: python examples/lightning_module.py"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from synthetic import NUM_CLASSES, arguments, batches
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from contrastseg_fast import insert_uafs
from contrastseg_fast.integrations.lightning import PDCRMixin


class Segmentation(lightning.LightningModule):
    """A module as one has it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
            nn.Conv2d(32, NUM_CLASSES, 1),
            nn.Upsample(scale_factor=4, mode="bilinear"),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Regularized(PDCRMixin, Segmentation):
    """The same with UAFS and PDCR."""

    def __init__(self, size: int = 64, weight: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        example = torch.zeros(1, 1, size, size)
        insert_uafs(self.net, "0", NUM_CLASSES, example_input=example)
        options = {"class_distance": "tv", "weight": weight}
        self.attach_pdcr(self.net, ["0", "1"], NUM_CLASSES, example_input=example, **options)


def main() -> None:
    args = arguments(__doc__)
    trainer = lightning.Trainer(
        max_steps=args.steps,
        accelerator="gpu" if args.device.startswith("cuda") else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    loader = DataLoader(list(batches(args.steps, args.size)), batch_size=None)
    trainer.fit(Regularized(args.size, args.weight), loader)
    print({name: round(value.item(), 3) for name, value in trainer.logged_metrics.items()})


if __name__ == "__main__":
    main()
