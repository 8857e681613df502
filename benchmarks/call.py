"""A whole call of `PDCRLoss`: from the features of three layers and the labels to the features' gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import pdcr
from benchmarks.masks import chest_slices
from benchmarks.operation import OURS, Implementation, Inputs, Operation, Result, Run, Work
from benchmarks.ratios import cumsum_table, ratios_by_cumsum, ratios_of_table
from contrastseg_fast import PDCRLoss, ReceptiveField, reference
from contrastseg_fast.functional import sample_grid

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Channels, stride and receptive field of the second, third and fourth stage of a U-Net's encoder.
LAYERS = ((64, 4, 11), (128, 8, 35), (256, 16, 91))

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]
PairLoss = Callable[[Tensor, Tensor], Tensor]  # of vectors and ratios
COMPILED_LOSSES = "torch.compile, each loss"


@dataclass(frozen=True)
class Size:
    """A batch of square label maps, and vectors sampled from each of the three layers."""

    samples: int = 1024
    batch: int = 8
    extent: int = 512
    classes: int = 4
    dtype: str = "bf16"

    def __str__(self) -> str:
        image = f"{self.batch}x{self.extent}x{self.extent}"
        return f"three layers,{image},M={self.classes},N={self.samples},{self.dtype}"


def _fields() -> list[ReceptiveField]:
    return [ReceptiveField((field,) * 2, (stride,) * 2, (-(field // 2),) * 2) for _, stride, field in LAYERS]


def _inputs(size: Size, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    labels = chest_slices(size.batch, size.extent, size.classes)
    features = []
    for channels, stride, _ in LAYERS:
        extent = size.extent // stride
        drawn = torch.randn(size.batch, channels, extent, extent, generator=generator, device=device)
        features.append(drawn.to(DTYPES[size.dtype]))
    return labels.to(device), *features


def _with_gradients(make_loss: Callable[[Size, torch.device], Loss]) -> Callable[[Size, Inputs], Run]:
    def prepare(size: Size, inputs: Inputs) -> Run:
        labels, *features = inputs
        loss = make_loss(size, labels.device)

        def run() -> Result:
            leaves = [each.detach().requires_grad_() for each in features]
            value = loss(leaves, labels)
            return value.detach(), *torch.autograd.grad(value, leaves)

        return run

    return prepare


def _ours(size: Size, _device: torch.device) -> Loss:
    return PDCRLoss(_fields(), size.classes, num_samples=size.samples)


def _reference(size: Size, _device: torch.device) -> Loss:
    return reference.PDCRLoss(_fields(), size.classes, num_samples=size.samples)


def _with_cumsum(pair_loss: PairLoss) -> Callable[[Size, torch.device], Loss]:
    """Vectors by index and ratios by cumulative sums, of places that are known beforehand."""

    def make_loss(size: Size, device: torch.device) -> Loss:
        layers = []
        for field, (_, stride, _) in zip(_fields(), LAYERS, strict=True):
            places = sample_grid((size.extent // stride,) * 2, size.samples, device=device)
            layers.append((places, field.starts(places), [int(extent) for extent in field.size]))

        def loss(features: Sequence[Tensor], labels: Tensor) -> Tensor:
            losses, table = [], cumsum_table(labels, size.classes)
            for feature_map, (places, starts, box) in zip(features, layers, strict=True):
                vectors = feature_map[:, :, places[:, 0], places[:, 1]].mT
                losses.append(pair_loss(vectors, ratios_of_table(table, starts, box)))
            return torch.stack(losses).mean()

        return loss

    return make_loss


def _compiled(pair_loss: PairLoss) -> Callable[[Size, torch.device], Loss]:
    make_loss = _with_cumsum(pair_loss)
    return lambda size, device: torch.compile(make_loss(size, device), dynamic=False, fullgraph=True)


def _compiled_losses(size: Size, device: torch.device) -> Loss:
    """The losses compiled one by one, and the rest eager: compiled whole on a CPU, torch 2.13 has crashed."""
    return _with_cumsum(torch.compile(reference.pdcr_loss, dynamic=False, fullgraph=True))(size, device)


def _oracle(size: Size, inputs: Inputs) -> Result:
    labels, *features = inputs
    return _with_gradients(_reference)(size, (labels, *(each.double() for each in features)))()


def _work(size: Size, inputs: Inputs) -> Work:
    """Labels read once, vectors read twice, dense gradients written once; the products and exponentials."""
    labels, *features = inputs
    moved, flops, exponentials = float(labels.nbytes), 0.0, 0.0
    for feature_map, field in zip(features, _fields(), strict=True):
        indices = sample_grid(feature_map.shape[2:], size.samples, device=labels.device)
        box = [int(extent) for extent in field.size]
        ratios = ratios_by_cumsum(labels, field.starts(indices), box, size.classes)
        batch, count, _ = ratios.shape
        channels = feature_map.shape[1]
        pairs = batch * count**2 * pdcr.pairs_that_differ(ratios)
        moved += feature_map.nbytes + 2 * batch * count * channels * feature_map.itemsize
        flops += 4 * pairs * channels
        exponentials += pairs
    return Work(bytes=moved, flops=flops, exponentials=exponentials, dtype=size.dtype)


def _loops_too_long(size: Size, _device: str) -> str | None:
    boxes = size.batch * size.samples * len(LAYERS)
    return f"crops {boxes} boxes one by one" if boxes > 2048 else None


OPERATION = Operation(
    name="pdcr_call",
    make_inputs=_inputs,
    oracle=_oracle,
    checked=lambda size: replace(size, batch=min(size.batch, 2), samples=min(size.samples, 256)),
    tiny=lambda size: replace(size, batch=1, samples=16, extent=128),
    tolerance=lambda size: 1e-5 if size.dtype == "fp32" else 1e-2,
    work=_work,
    implementations=(
        Implementation(OURS, _with_gradients(_ours)),
        Implementation("reference", _with_gradients(_reference), refuse=_loops_too_long),
        Implementation("reference, cumsum ratios", _with_gradients(_with_cumsum(reference.pdcr_loss))),
        Implementation("torch.compile", _with_gradients(_compiled(reference.pdcr_loss)), compiles=True),
        Implementation(COMPILED_LOSSES, _with_gradients(_compiled_losses), devices=("cpu",), compiles=True),
        Implementation(
            pdcr.COMPILED_16_BIT,
            _with_gradients(_compiled(pdcr.loss_by_16_bit_products)),
            refuse=pdcr.needs_16_bit,
            devices=("cuda",),
            compiles=True,
        ),
    ),
)
