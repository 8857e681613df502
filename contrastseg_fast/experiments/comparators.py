"""What the paper compares UAFS with, put behind the same layers: squeeze-and-excitation, and CBAM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import ChannelSELayer
from monai.networks.layers import Conv
from torch import Tensor, nn

from contrastseg_fast.receptive_field import trace_layers

REDUCTION = 16  # of the channels, in the hidden layer of both, as their papers have it


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al., ECCV 2018): channels first, then places.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels C of the features.

    Example:
        >>> CBAM(2, 8)(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, spatial_dims: int, in_channels: int) -> None:
        super().__init__()
        hidden = max(1, in_channels // REDUCTION)
        self.channels = nn.Sequential(
            nn.Linear(in_channels, hidden), nn.ReLU(), nn.Linear(hidden, in_channels)
        )
        self.places = Conv[Conv.CONV, spatial_dims](2, 1, kernel_size=7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features `(B, C, *spatial)`, weighted."""
        pixels = x.flatten(2)
        of_channel = torch.sigmoid(self.channels(pixels.mean(-1)) + self.channels(pixels.amax(-1)))
        x = x * of_channel.reshape(*of_channel.shape, *[1] * (x.ndim - 2))
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.places(pooled))


def insert_comparator(model: nn.Module, kind: str, layers: Sequence[str], example: Tensor) -> None:
    """Put a new `"se"` or `"cbam"` block behind each of the named layers, as the submodule `comparators`."""
    blocks = nn.ModuleDict()
    for name, run in trace_layers(model, example.shape, layers, dtype=example.dtype).items():
        dims, channels = len(run.shape) - 2, run.shape[1]
        block = CBAM(dims, channels) if kind == "cbam" else _squeeze_and_excitation(dims, channels)
        blocks[name.replace(".", "/")] = block
        model.get_submodule(name).register_forward_hook(_Gated(block))
    model.add_module("comparators", blocks)


def _squeeze_and_excitation(dims: int, channels: int) -> nn.Module:
    return ChannelSELayer(dims, channels, r=min(REDUCTION, channels))


class _Gated:
    """Replaces a layer's output by the block's."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        gated: Tensor = self.block(output)
        return gated
