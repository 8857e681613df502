"""UAFS: the gate of uncertainty-aware feature selection, as a module."""

from __future__ import annotations

import math

from torch import Tensor, nn

from contrastseg_fast import _checks, functional
from contrastseg_fast._backend import BACKENDS

NORMS = ("batch", "instance", "group", "none")


class UAFS(nn.Module):
    """Uncertainty-aware feature selection: features weighted by how certain a small network is (Eqs. 8 to
    10).

        A = softmax(F(H))        F = conv3 -> norm -> ReLU -> conv1        Hhat = H * (1 + (1 - u(A)))

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels C of the features H.
        num_classes: classes M that F predicts, at least 2.
        hidden_channels: width of F.
        norm: `"batch"`, `"instance"`, `"group"` (at most 8 groups) or `"none"`.
        backend: as for `entropy_gate`.

    Raises:
        TypeError: a number is not an integer.
        ValueError: `spatial_dims` is neither 2 nor 3, a number is too small, or `norm` or `backend` is
            unknown.

    Example:
        >>> import torch
        >>> gate = UAFS(spatial_dims=2, in_channels=8, num_classes=3)
        >>> gate(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        hidden_channels: int = 16,
        *,
        norm: str = "batch",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            _checks.fail("spatial_dims", "2 or 3", repr(spatial_dims))
        _checks.integer("in_channels", in_channels, 1)
        _checks.integer("num_classes", num_classes, 2)
        _checks.integer("hidden_channels", hidden_channels, 1)
        _checks.one_of("norm", norm, NORMS)
        _checks.one_of("backend", backend, BACKENDS)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.backend = backend
        conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        self.head = nn.Sequential(
            conv(in_channels, hidden_channels, kernel_size=3, padding=1),
            _norm(norm, spatial_dims, hidden_channels),
            nn.ReLU(inplace=True),
            conv(hidden_channels, num_classes, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The gated features.

        Args:
            x: features H `(B, C, *spatial)`.

        Returns:
            Hhat, shape and dtype of `x`.

        Raises:
            TypeError: `x` is not a tensor, or not of a floating dtype.
            ValueError: `x` has another number of axes or channels than the gate.
        """
        gated, _ = self._gate(x)
        return gated

    def uncertainty(self, x: Tensor) -> Tensor:
        """The uncertainty map u `(B, 1, *spatial)` of features `(B, C, *spatial)`, from 0 to 1 (Eq. 9)."""
        _, u = self._gate(x)
        return u

    def extra_repr(self) -> str:
        return (
            f"spatial_dims={self.spatial_dims}, in_channels={self.in_channels}, "
            f"num_classes={self.num_classes}, backend={self.backend!r}"
        )

    def _gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gated features, and their uncertainty."""
        self._check(x)
        return functional.entropy_gate(x, self.head(x), return_uncertainty=True, backend=self.backend)

    def _check(self, x: Tensor) -> None:
        layout = f"(B, {self.in_channels}, *spatial) with {self.spatial_dims} spatial axes"
        _checks.tensor("x", x, (self.spatial_dims + 2,), layout)
        if x.shape[1] != self.in_channels:
            _checks.fail("x", f"{self.in_channels} channels", x.shape[1])


def _norm(name: str, spatial_dims: int, channels: int) -> nn.Module:
    match name:
        case "batch":
            return nn.BatchNorm2d(channels) if spatial_dims == 2 else nn.BatchNorm3d(channels)
        case "instance":
            return nn.InstanceNorm2d(channels) if spatial_dims == 2 else nn.InstanceNorm3d(channels)
        case "group":
            return nn.GroupNorm(math.gcd(8, channels), channels)
        case _:
            return nn.Identity()
