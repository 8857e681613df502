"""A MONAI U-Net trained with and without PDCR and UAFS, and the time of its training step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor

from contrastseg_fast import attach_pdcr, insert_uafs
from contrastseg_fast.experiments.data import Volume, to_input

# The encoder's outputs at stride 2, 4 and 8; the last sees a third of the image, so it gets smaller patches.
LAYERS = {"model.0": 2, "model.1.submodule.0": 4, "model.1.submodule.1.submodule.0": 8}
PATCH_SIZE = {"model.1.submodule.1.submodule.0": 15}
CLASS_DISTANCE = "tv"  # does not fade as classes are added
PDCR_WEIGHT = 0.01


@dataclass(frozen=True)
class Run:
    """What is added to the baseline."""

    name: str
    pdcr: bool = False
    uafs: bool = False


RUNS = (
    Run("baseline"),
    Run("+ PDCR", pdcr=True),
    Run("+ UAFS", uafs=True),
    Run("+ both", pdcr=True, uafs=True),
)


class Trainer:
    """One network with its losses and optimiser; the seed decides the weights it starts from."""

    def __init__(self, run: Run, volume: Volume, num_steps: int, seed: int, backend: str = "auto") -> None:
        torch.manual_seed(seed)
        self.model = UNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=volume.num_classes,
            channels=(16, 32, 64, 128),
            strides=(2, 2, 2),
            num_res_units=2,
            norm="batch",
        )
        layers, example = list(LAYERS), to_input(volume.image[:1])
        if run.uafs:
            insert_uafs(self.model, layers, volume.num_classes, example_input=example, backend=backend)
        self.pdcr = None
        if run.pdcr:
            self.pdcr = attach_pdcr(
                self.model,
                layers,
                volume.num_classes,
                example_input=example,
                class_distance=CLASS_DISTANCE,
                patch_size=PATCH_SIZE,
                backend=backend,
            )
        self.criterion = DiceCELoss(to_onehot_y=True, softmax=True)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, weight_decay=1e-5)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_steps)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Learn from one batch, `(B, H, W)` uint8 each; returns the losses, PDCR's without its weight."""
        self.model.train()
        target = labels.long()
        segmentation = self.criterion(self.model(to_input(images)), target[:, None])
        losses = {"segmentation": segmentation.item()}
        loss = segmentation
        if self.pdcr is not None:
            regularization = self.pdcr(target)
            losses["pdcr"] = regularization.item()
            loss = loss + PDCR_WEIGHT * regularization
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return losses


def step_seconds(
    trainers: dict[str, Trainer], batch: tuple[Tensor, Tensor], rounds: int, tick: Callable[[], object]
) -> dict[str, float]:
    """Median seconds of a training step of each network, one step of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for round_number in range(rounds + 1):
        for name, trainer in trainers.items():
            begin = time.perf_counter()
            trainer.step(*batch)
            if round_number > 0:  # the first only warms up
                times[name].append(time.perf_counter() - begin)
            tick()
    return {name: median(taken) for name, taken in times.items()}
