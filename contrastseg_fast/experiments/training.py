"""The training step of every experiment, the demo's network, and how long its steps take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn

from contrastseg_fast import PDCRLoss, ReceptiveField, attach_pdcr, insert_uafs, receptive_fields
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
    """A network with its losses, optimiser and schedule.

    Args:
        model: gives logits `(B, M, *spatial)`.
        optimizer, schedule: of the model's parameters; the schedule moves on with every step.
        regularizer: of labels `(B, *spatial)`, asked after the model ran; None for none.
        weight: of the regularizer.
        amp: whether the model runs under autocast, in half precision, with a scaled loss.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        regularizer: Callable[[Tensor], Tensor] | None = None,
        weight: float = 0.0,
        amp: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.regularizer = regularizer
        self.weight = weight
        self.amp = amp
        self.scaler = torch.amp.GradScaler(enabled=amp)
        self.criterion = DiceCELoss(to_onehot_y=True, softmax=True)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Learn from one batch, images `(B, C, *spatial)` fp32 and labels `(B, *spatial)` int64.

        Returns the losses, the regularizer's without its weight.
        """
        self.model.train()
        with torch.autocast(images.device.type, enabled=self.amp):
            logits = self.model(images)
        segmentation = self.criterion(logits.float(), labels[:, None])
        losses = {"segmentation": segmentation.item()}
        loss = segmentation
        if self.regularizer is not None:
            regularization = self.regularizer(labels)
            losses["pdcr"] = regularization.item()
            loss = loss + self.weight * regularization
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return losses


def demo_trainer(run: Run, volume: Volume, num_steps: int, seed: int, backend: str = "auto") -> Trainer:
    """The demo's U-Net on slices of a volume; the seed decides the weights it starts from."""
    torch.manual_seed(seed)
    model = UNet(
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
        insert_uafs(model, layers, volume.num_classes, example_input=example, backend=backend)
    pdcr = None
    if run.pdcr:
        pdcr = attach_pdcr(
            model,
            layers,
            volume.num_classes,
            example_input=example,
            class_distance=CLASS_DISTANCE,
            patch_size=PATCH_SIZE,
            backend=backend,
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    return Trainer(model, optimizer, schedule, pdcr, PDCR_WEIGHT)


def boxes(model: nn.Module, inputs: Tensor) -> dict[Any, ReceptiveField]:
    """The patches of the vectors of the demo's layers, as PDCR takes them."""
    fields = receptive_fields(model, (1, *inputs.shape[1:]), list(LAYERS))
    return PDCRLoss(fields, num_classes=2, patch_size=PATCH_SIZE).patches


def step_seconds(
    trainers: dict[str, Trainer], batch: tuple[Tensor, Tensor], rounds: int, tick: Callable[[], object]
) -> dict[str, float]:
    """Median seconds of a training step of each network on a batch as `Trainer.step` takes it, in turn."""
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for round_number in range(rounds + 1):
        for name, trainer in trainers.items():
            begin = time.perf_counter()
            trainer.step(*batch)
            if round_number > 0:  # the first only warms up
                times[name].append(time.perf_counter() - begin)
            tick()
    return {name: median(taken) for name, taken in times.items()}
