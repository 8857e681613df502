"""Does PDCR help a small U-Net that has few cases to learn from? `python -m benchmarks.accuracy --help`.

Every run trains one network: an arm (what is added to the baseline) with a seed, which decides the training
patients, the weights at the start and the batches, so that arms are compared pair by pair.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate, max_pool2d

from benchmarks import rows
from benchmarks.device import captured
from contrastseg_fast import attach_pdcr, insert_uafs

CHANNELS = (16, 32, 64, 128)
LAYERS = ("encoder.0", "encoder.1", "encoder.2")
TRAINING_PATIENTS, TEST_PATIENTS = 20, 120
BATCH = 8
RATE, DECAY = 1e-3, 1e-5
LOOK_EVERY = 20  # steps between looks at the clock, which wait for the device


@dataclass(frozen=True)
class Arm:
    """What is added to the baseline."""

    weight: float = 0.0  # of PDCR
    uafs: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of PDCR


BASELINE = "baseline"
ARMS = {
    BASELINE: Arm(),
    "released-0.3": Arm(0.3, options={"variant": "released"}),
    "paper-0.03": Arm(0.03),
    "uafs": Arm(uafs=True),
}
DEFAULT_ARMS = (BASELINE, "released-0.3", "paper-0.03")


class Data(NamedTuple):
    """Normalised images `(n, C, H, W)` fp32, labels `(n, H, W)` int64, each image's patient by number."""

    images: Tensor
    labels: Tensor
    patients: Tensor

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


def load(path: Path) -> Data:
    """Read a `.npz` with `image` `(n, H, W)` or `(n, H, W, C)`, `labels` `(n, H, W)`, and `patient` `(n,)`.

    Without `patient` every image is a patient of its own.

    Raises:
        ValueError: an array is missing, or the shapes do not match or cannot be halved three times.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file.items())
    if not {"image", "labels"} <= set(arrays):
        raise ValueError(f"{path}: expected the arrays image and labels, got {sorted(arrays)}")
    image, labels = arrays["image"], arrays["labels"]
    if image.shape[:3] != labels.shape or labels.shape[1] % 8 or labels.shape[2] % 8:
        raise ValueError(
            f"{path}: expected labels (n, H, W) as image has, H and W multiples of 8, "
            f"got {labels.shape} and {image.shape}"
        )
    patient = arrays.get("patient", np.arange(len(image)))
    images = torch.from_numpy(image.reshape(*labels.shape, -1)).movedim(-1, 1).float()
    mean, deviation = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    number = torch.from_numpy(np.unique(patient, return_inverse=True)[1])
    return Data((images - mean) / deviation.clamp(min=1e-6), torch.from_numpy(labels).long(), number)


def pack(folder: Path, path: Path, patient: str) -> None:
    """Write such a file from a folder of `images` and one of `masks`, by the project's own reader."""
    from contrastseg_fast.experiments.datasets import open_dataset

    cases = [(case, sample) for case, sample in open_dataset("pairs", folder, patient=patient).load()]
    images = torch.stack([(255 * sample.image).round().byte().movedim(0, -1) for _, sample in cases])
    labels = torch.stack([sample.labels.byte() for _, sample in cases])
    patients = np.array([case.group or case.name for case, _ in cases])
    np.savez_compressed(path, image=images.numpy(), labels=labels.numpy(), patient=patients)


class UNet(nn.Module):
    """Four levels of two convolutions with batch norm, halved by pooling, and skip connections."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        befores = (in_channels, *CHANNELS)
        self.encoder = nn.ModuleList(_block(*pair) for pair in zip(befores, CHANNELS, strict=False))
        self.decoder = nn.ModuleList(
            _block(coarse + fine, fine)
            for fine, coarse in zip(CHANNELS[-2::-1], CHANNELS[:0:-1], strict=True)
        )
        self.head = nn.Conv2d(CHANNELS[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            x = block(max_pool2d(x, 2) if level else x)
            skipped.append(x)
        skipped.pop()
        for block in self.decoder:
            x = block(torch.cat([interpolate(x, scale_factor=2.0), skipped.pop()], 1))
        return self.head(x)


def _block(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(True)]
    return nn.Sequential(*layers)


class _Batches:
    """Augmented batches of images on the device; what is drawn lies in tensors that a graph reads anew."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self._images, self._labels = images, labels
        self._generator = torch.Generator().manual_seed(seed)
        self._chosen = torch.zeros(BATCH, dtype=torch.long, device=images.device)
        self._places = torch.zeros(BATCH, 2, 3, device=images.device)
        self._light = torch.zeros(2, BATCH, 1, 1, 1, device=images.device)

    def draw(self) -> None:
        """Which images, how they are turned, scaled, sheared, mirrored and shifted, and their brightness."""
        angle = (self._uniform() - 0.5) * math.pi / 3
        scale = 0.8 + 0.4 * self._uniform()
        mirrored = (self._uniform() < 0.5).float() * 2 - 1
        sheared = (self._uniform() - 0.5) * 0.3
        shifted = (torch.rand(BATCH, 2, generator=self._generator) - 0.5) * 0.2
        across = torch.stack(
            [angle.cos() * scale * mirrored, -angle.sin() * scale + sheared, shifted[:, 0]], 1
        )
        down = torch.stack([angle.sin() * scale, angle.cos() * scale, shifted[:, 1]], 1)
        light = torch.stack([0.9 + 0.2 * self._uniform(), (self._uniform() - 0.5) * 0.2])
        self._chosen.copy_(torch.randint(len(self._images), (BATCH,), generator=self._generator))
        self._places.copy_(torch.stack([across, down], 1))
        self._light.copy_(light.view(2, BATCH, 1, 1, 1))

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the last draw."""
        images, labels = self._images[self._chosen], self._labels[self._chosen, None].float()
        grid = affine_grid(self._places, images.shape, align_corners=False)
        options: dict[str, Any] = {"padding_mode": "border", "align_corners": False}
        images = grid_sample(images, grid, **options) * self._light[0] + self._light[1]
        labels = grid_sample(labels, grid, mode="nearest", **options)
        return images.contiguous(memory_format=torch.channels_last), labels[:, 0].long()

    def _uniform(self) -> Tensor:
        return torch.rand(BATCH, generator=self._generator)


def split(patients: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the images to train on and of those to test on, of different patients."""
    generator = torch.Generator().manual_seed(seed)
    of_all = patients.unique()
    drawn = of_all[torch.randperm(len(of_all), generator=generator)]
    if len(drawn) <= TRAINING_PATIENTS:
        raise ValueError(f"expected more than {TRAINING_PATIENTS} patients, got {len(drawn)}")
    tested = drawn[TRAINING_PATIENTS:][-TEST_PATIENTS:]
    return tuple(torch.isin(patients, part).nonzero()[:, 0] for part in (drawn[:TRAINING_PATIENTS], tested))


def train(
    data: Data, arm: Arm, seed: int, steps: int, device: str, deadline: float = math.inf
) -> dict[str, Any] | None:
    """Train and test one network; its scores, or why there are none, or None once the deadline has passed."""
    since = time.monotonic()
    for_training, for_testing = split(data.patients, seed)
    images, labels = data.images[for_training].to(device), data.labels[for_training].to(device)
    torch.manual_seed(seed)
    model = UNet(images.shape[1], data.num_classes).to(device, memory_format=torch.channels_last)
    if arm.uafs:
        insert_uafs(model, LAYERS, data.num_classes, example_input=images[:2])
    pdcr = None
    if arm.weight:
        pdcr = attach_pdcr(
            model, LAYERS, data.num_classes, example_input=images[:2], num_samples=512, **arm.options
        )
    rate = torch.tensor(RATE, device=device)
    optimizer = torch.optim.Adam(model.parameters(), rate, weight_decay=DECAY, capturable=device == "cuda")
    batches = _Batches(images, labels, seed)
    shown = torch.zeros((), device=device)  # the loss
    model.train()

    def step() -> tuple[Tensor, ...]:
        x, y = batches.batch()
        with torch.autocast(device, torch.bfloat16, device == "cuda", cache_enabled=False):
            logits = model(x)
        loss = _segmentation_loss(logits.float(), y)
        if pdcr is not None:
            loss = loss + arm.weight * pdcr(y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        shown.copy_(loss.detach())
        return ()

    batches.draw()
    run: Callable[[], object] = captured(step) if device == "cuda" else step
    for number in range(steps):
        batches.draw()
        rate.fill_(RATE * 0.5 * (1 + math.cos(math.pi * number / steps)))
        run()
        if number % LOOK_EVERY == 0:
            if shown.isnan().item():
                return {"failed": f"the loss is not a number at step {number}"}
            if time.monotonic() > deadline:
                return None
    dice = evaluate(model, data, for_testing, device)
    return {"dice": dice, "loss": shown.item(), "steps": steps, "seconds": round(time.monotonic() - since, 1)}


def _segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, and 1 minus the mean Dice of the foreground classes."""
    found = logits.softmax(1)[:, 1:]
    wanted = (
        labels[:, None] == torch.arange(1, logits.shape[1], device=labels.device).view(-1, 1, 1)
    ).float()
    both = 2 * (found * wanted).sum((2, 3)) + 1
    dice = both / (found.sum((2, 3)) + wanted.sum((2, 3)) + 1)
    return cross_entropy(logits, labels) + 1 - dice.mean()


def evaluate(model: nn.Module, data: Data, chosen: Tensor, device: str) -> float:
    """Mean Dice over test images and the foreground classes that occur in the image or the prediction."""
    model.eval()
    scores = []
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, device == "cuda"):
        for part in chosen.split(50):
            images = data.images[part].to(device).contiguous(memory_format=torch.channels_last)
            found, labels = model(images).argmax(1).cpu(), data.labels[part]
            for m in range(1, data.num_classes):
                sizes = (found == m).sum((1, 2)) + (labels == m).sum((1, 2))
                both = ((found == m) & (labels == m)).sum((1, 2))
                scores.append((2 * both / sizes)[sizes > 0])
    return torch.cat(scores).mean().item()


def jobs(arms: Sequence[str], first_seed: int, seeds: int) -> list[tuple[int, str]]:
    """Seed after seed, each with every arm: what the time does not reach leaves whole pairs."""
    return [(seed, arm) for seed in range(first_seed, first_seed + seeds) for arm in arms]


def summarise(found: list[rows.Row]) -> dict[str, Any]:
    """For each arm its runs, its mean Dice, and its difference to the baseline of the same seeds."""
    from contrastseg_fast.experiments.paired import paired_difference

    by_arm: dict[str, dict[int, float]] = {}
    for row in found:
        if "dice" in row:
            by_arm.setdefault(row["arm"], {})[row["seed"]] = row["dice"]
    baseline = by_arm.get(BASELINE, {})
    summary: dict[str, Any] = {}
    for arm, dice in by_arm.items():
        summary[arm] = {"runs": len(dice), "dice": sum(dice.values()) / len(dice)}
        common = sorted(dice.keys() & baseline.keys())
        if arm != BASELINE and common:
            pairs = [dice[seed] for seed in common], [baseline[seed] for seed in common]
            summary[arm]["difference"] = paired_difference(*pairs)
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--data", type=Path, help=".npz with image, labels and patient")
    parser.add_argument(
        "--pack", type=Path, metavar="FOLDER", help="write --data from a folder's images and masks"
    )
    parser.add_argument(
        "--patient", default="^[^_]+", help="with --pack: regex of the patient in a file's name"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=DEFAULT_ARMS, help="(%(default)s)")
    parser.add_argument("--first-seed", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=40, help="at most (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no run goes on")
    parser.add_argument("--share", default="0/1", metavar="K/N", help="every Nth run, from the Kth")
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    parser.add_argument(
        "--trial", action="store_true", help="two steps on a few small crops of --data, on the CPU"
    )
    parser.add_argument("--out", type=Path, help="file that gets a row for each run")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("--data is needed")
    if options.pack is not None:
        pack(options.pack, options.data, options.patient)
        return 0
    deadline = time.monotonic() + options.seconds
    torch.backends.cudnn.benchmark = True
    data = load(options.data)
    if options.trial:
        options.device, options.steps = "cpu", 2
        data = Data(
            *(each[40 : 42 + TRAINING_PATIENTS, ..., 32:64, 32:64] for each in data[:2]),
            data.patients[: 2 + TRAINING_PATIENTS],
        )
    for seed, arm in rows.share(jobs(options.arms, options.first_seed, options.seeds), options.share):
        found = train(data, ARMS[arm], seed, options.steps, options.device, deadline)
        if found is None:
            break
        rows.append(options.out, {"seed": seed, "arm": arm, **found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
