"""Projection heads: small networks that the vectors of a layer pass before the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

Layer = str | int  # name, or position, of a layer
PROJECTIONS = ("linear", "mlp")
DEFAULT_CHANNELS = 128


class Projections(nn.ModuleDict):
    """Projection heads by layer. As a step of an `nn.Sequential` it returns its input."""

    def forward(self, x: Any) -> Any:
        return x


def submodule_name(layer: Layer) -> str:
    """A layer's name as the name of a submodule, which may not contain dots."""
    return str(layer).replace(".", "/")


def make_projections(kind: str, in_channels: Mapping[Layer, int], out_channels: int) -> Projections:
    """A head of the given kind, one of `PROJECTIONS`, for each layer."""
    heads = {
        submodule_name(layer): _head(kind, channels, out_channels) for layer, channels in in_channels.items()
    }
    return Projections(heads)


def _head(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    last = nn.Linear(in_channels, out_channels)
    if kind == "linear":
        return last
    return nn.Sequential(nn.Linear(in_channels, in_channels), nn.ReLU(inplace=True), last)
