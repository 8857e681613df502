"""A training step of MONAI's U-Net on chest CT, with and without PDCR at three layers and UAFS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.masks import chest_images, chest_slices
from benchmarks.operation import OURS, Implementation, Inputs, Operation, Result, Run, Unavailable
from contrastseg_fast.plugin import attach_pdcr, insert_uafs

NUM_CLASSES = 5
# The encoder's outputs at stride 2, 4 and 8; the last sees most of the image, so it gets smaller patches.
LAYERS = ("model.0", "model.1.submodule.0", "model.1.submodule.1.submodule.0")
PATCH_SIZE = {LAYERS[2]: 15}
PDCR_WEIGHT = 0.01


@dataclass(frozen=True)
class Size:
    """A batch of square images, and vectors sampled from every layer."""

    samples: int = 1024
    batch: int = 4
    extent: int = 256

    def __str__(self) -> str:
        return f"U-Net,{self.batch}x{self.extent}x{self.extent},N={self.samples}"


def _inputs(size: Size, device: str) -> Inputs:
    images = chest_images(size.batch, size.extent)
    return images.to(device), chest_slices(size.batch, size.extent, NUM_CLASSES).to(device)


def _step(*, pdcr: bool, uafs: bool, backend: str) -> Callable[[Size, Inputs], Run]:
    def prepare(size: Size, inputs: Inputs) -> Run:
        try:
            from monai.losses import DiceCELoss
            from monai.networks.nets import UNet
        except ImportError as error:
            raise Unavailable(f"monai cannot be imported: {error}") from error

        images, labels = inputs
        torch.manual_seed(0)
        model = UNet(2, 1, NUM_CLASSES, (16, 32, 64, 128), (2, 2, 2), num_res_units=2, norm="batch")
        model = model.to(images)
        if uafs:
            insert_uafs(model, LAYERS, NUM_CLASSES, example_input=images, backend=backend)
        regularizer = None
        if pdcr:
            regularizer = attach_pdcr(
                model,
                LAYERS,
                NUM_CLASSES,
                example_input=images,
                num_samples=size.samples,
                class_distance="tv",
                patch_size=PATCH_SIZE,
                backend=backend,
            )
        criterion = DiceCELoss(to_onehot_y=True, softmax=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
        model.train()

        def run() -> Result:
            loss = criterion(model(images), labels[:, None])
            if regularizer is not None:
                loss = loss + PDCR_WEIGHT * regularizer(labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return (loss.detach(),)

        return run

    return prepare


_with_reference = _step(pdcr=True, uafs=True, backend="reference")


def _oracle(size: Size, inputs: Inputs) -> Result:
    images, labels = inputs
    return _with_reference(size, (images.double(), labels))()


OPERATION = Operation(
    name="training_step",
    make_inputs=_inputs,
    oracle=_oracle,
    checked=lambda size: replace(size, batch=1),
    tiny=lambda size: replace(size, samples=16, batch=1, extent=64),
    tolerance=lambda _size: 1e-4,
    implementations=(
        Implementation(OURS, _step(pdcr=True, uafs=True, backend="auto")),
        Implementation("reference", _with_reference),
        Implementation("PDCR alone", _step(pdcr=True, uafs=False, backend="auto"), yardstick=True),
        Implementation("UAFS alone", _step(pdcr=False, uafs=True, backend="auto"), yardstick=True),
        Implementation("baseline", _step(pdcr=False, uafs=False, backend="auto"), yardstick=True),
    ),
)
