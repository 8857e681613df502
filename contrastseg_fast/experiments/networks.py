"""The networks of the experiments, from the libraries that keep them, and the names of their stages."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from monai.networks.nets import DynUNet, UNet
from torch import Tensor, nn

from contrastseg_fast.experiments.config import Layers, Network


@dataclass(frozen=True)
class Stages:
    """The layers that end a stage, from the input on: of the encoder, and of the decoder but its logits."""

    encoder: tuple[str, ...]
    decoder: tuple[str, ...] = ()

    def named(self, layers: Layers) -> Layers:
        """The layers that "encoder", "decoder" or "all" stand for; all else as it is."""
        groups = {"encoder": self.encoder, "decoder": self.decoder, "all": self.encoder + self.decoder}
        return groups.get(layers, layers) if isinstance(layers, str) else layers


def build(
    settings: Network, spatial_dims: int, in_channels: int, num_classes: int
) -> tuple[nn.Module, Stages]:
    """A network from images `(B, in_channels, *spatial)` to logits `(B, num_classes, *spatial)`.

    Raises:
        ValueError: the network is for two axes only.
        ImportError: the library that has it is not installed.
    """
    if settings.name in ("fcn", "deeplabv3plus") and spatial_dims != 2:
        raise ValueError(f"network.name: expected unet or dynunet for 3D images, got {settings.name!r}")
    match settings.name:
        case "unet":
            return _unet(settings, spatial_dims, in_channels, num_classes)
        case "dynunet":
            return _dynunet(settings, spatial_dims, in_channels, num_classes)
        case "fcn":
            return _fcn(in_channels, num_classes)
        case _:
            return _deeplabv3plus(in_channels, num_classes)


def _unet(settings: Network, dims: int, in_channels: int, num_classes: int) -> tuple[nn.Module, Stages]:
    depth = len(settings.channels) - 1
    model = UNet(
        spatial_dims=dims,
        in_channels=in_channels,
        out_channels=num_classes,
        channels=settings.channels,
        strides=(2,) * depth,
        num_res_units=settings.residual_units,
        norm=settings.norm,
    )
    levels = ["model" + ".1.submodule" * level for level in range(depth)]
    encoder = tuple(f"{level}.0" for level in levels)
    decoder = tuple(f"{level}.2" for level in levels[:0:-1])
    return model, Stages(encoder, decoder)


def _dynunet(settings: Network, dims: int, in_channels: int, num_classes: int) -> tuple[nn.Module, Stages]:
    depth = len(settings.channels) - 1
    model = DynUNet(
        spatial_dims=dims,
        in_channels=in_channels,
        out_channels=num_classes,
        kernel_size=[3] * (depth + 1),
        strides=[1, *[2] * depth],
        upsample_kernel_size=[2] * depth,
        filters=settings.channels,
        norm_name=settings.norm,
    )
    encoder = ("input_block", *(f"downsamples.{level}" for level in range(depth - 1)), "bottleneck")
    return model, Stages(encoder, tuple(f"upsamples.{level}" for level in range(depth)))


class _LogitsOf(nn.Module):
    """A torchvision model, whose logits come in a dictionary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)["out"]
        return logits


def _fcn(in_channels: int, num_classes: int) -> tuple[nn.Module, Stages]:
    segmentation = _library("torchvision.models.segmentation", "fcn")
    model = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=num_classes)
    if in_channels != 3:
        stem = model.backbone.conv1
        model.backbone.conv1 = nn.Conv2d(
            in_channels, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=False
        )
    return _LogitsOf(model), Stages(tuple(f"model.backbone.layer{k}" for k in range(1, 5)))


def _deeplabv3plus(in_channels: int, num_classes: int) -> tuple[nn.Module, Stages]:
    library = _library("segmentation_models_pytorch", "deeplabv3plus")
    model = library.DeepLabV3Plus(
        "resnet50", encoder_weights=None, in_channels=in_channels, classes=num_classes
    )
    return model, Stages(tuple(f"encoder.layer{k}" for k in range(1, 5)))


def _library(module: str, network: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ImportError(
            f"network.name: {network!r} needs {package}, which is not installed; "
            'install "contrastseg_fast[experiments]"'
        ) from error
