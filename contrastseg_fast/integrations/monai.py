"""PDCR and UAFS by MONAI's conventions; needs the extra `monai`.

    from contrastseg_fast.integrations.monai import attach_pdcr, insert_uafs, RegularizedLoss

    insert_uafs(net, "auto", num_classes=3, example_input=x)
    pdcr = attach_pdcr(net, "auto", num_classes=3, example_input=x)
    loss_function = RegularizedLoss(DiceCELoss(to_onehot_y=True, softmax=True), pdcr, weight=0.01)

Nothing else in a training script changes: `RegularizedLoss` is called as any loss, by hand or by an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from contrastseg_fast import _checks, pdcr_loss, uafs
from contrastseg_fast.attach import AttachedPDCR, attach_pdcr, insert_uafs, remove_uafs
from contrastseg_fast.patches import first_label_map
from contrastseg_fast.receptive_field import ReceptiveField

try:
    from monai.networks.blocks import Convolution
    from monai.utils import LossReduction, convert_to_tensor
except ImportError as error:
    raise ImportError(
        "contrastseg_fast.integrations.monai needs MONAI: pip install 'contrastseg_fast[monai]'"
    ) from error

__all__ = ["UAFS", "PDCRLoss", "RegularizedLoss", "attach_pdcr", "insert_uafs", "remove_uafs"]


class PDCRLoss(_Loss):
    """Patch-dragsaw contrastive regularization with the arguments of MONAI's losses.

    Args:
        receptive_fields: the receptive field of each layer, by name or in the order of the layers, as
            `contrastseg_fast.receptive_fields` finds them.
        num_classes: number of classes, background included.
        include_background: whether class 0 counts in the distance of ratios.
        to_onehot_y: whether targets are class labels `(B, 1, *spatial)`; else they are one-hot
            `(B, num_classes, *spatial)`. Neither is converted: the labels are counted as they are.
        reduction: `LossReduction.MEAN`, `SUM` or `NONE`, or its name; see `contrastseg_fast.PDCRLoss`.
        ignore_index: the label of pixels to ignore.
        options: other arguments of `contrastseg_fast.PDCRLoss`: `num_samples`, `temperature`, ...

    Raises:
        TypeError, ValueError: `reduction` is not one of MONAI's, or `contrastseg_fast.PDCRLoss` raises for
            another argument.

    Example:
        >>> import torch
        >>> field = ReceptiveField(size=(3, 3), stride=(2, 2), start=(-1, -1))
        >>> pdcr = PDCRLoss([field], num_classes=3, to_onehot_y=True, reduction=LossReduction.MEAN)
        >>> features = torch.randn(2, 16, 4, 4, requires_grad=True)
        >>> loss = pdcr([features], torch.randint(3, (2, 1, 8, 8)))
        >>> loss.backward()
    """

    def __init__(
        self,
        receptive_fields: Mapping[str, ReceptiveField] | Sequence[ReceptiveField],
        num_classes: int,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        reduction: LossReduction | str = LossReduction.MEAN,
        ignore_index: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        self.to_onehot_y = to_onehot_y
        self.pdcr = pdcr_loss.PDCRLoss(
            receptive_fields,
            num_classes,
            include_background=include_background,
            reduction=self.reduction,
            ignore_index=ignore_index,
            **options,
        )

    def forward(
        self,
        input: Tensor | Sequence[Tensor] | Mapping[Any, Tensor],
        target: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of the feature maps of one batch.

        Args:
            input: a feature map `(B, C, *spatial)` for every layer, by name or in order.
            target: labels of the network's input `(B, 1, *spatial)` or `(B, num_classes, *spatial)`.
            mask: which pixels count `(B, 1, *spatial)`, 0 where they do not; None means all.

        Returns:
            the loss, a plain tensor: a scalar, or `(B, layers)` for `reduction="none"`.

        Raises:
            TypeError, ValueError: `target` does not have one channel (`to_onehot_y=True`) or `num_classes`
                channels (`to_onehot_y=False`), or `input`, `target` or `mask` is not as
                `contrastseg_fast.PDCRLoss` needs it.
        """
        maps = [_plain(x) for x in self.pdcr.in_layer_order(input)]
        target = _plain(target)
        channels = 1 if self.to_onehot_y or self.pdcr.num_classes == 1 else self.pdcr.num_classes
        dims = next(iter(self.pdcr.receptive_fields.values())).spatial_dims
        layout = f"(B, {channels}, *spatial) with {dims} spatial axes, for to_onehot_y={self.to_onehot_y}"
        _checks.tensor("target", target, (dims + 2,), layout)
        if target.shape[1] != channels:
            _checks.fail("target", layout, f"shape {tuple(target.shape)}")
        return self.pdcr(maps, target, None if mask is None else _plain(mask))


class RegularizedLoss(_Loss):
    """A segmentation loss plus the weighted PDCR of an attached model, called as any loss of MONAI.

        loss_function = RegularizedLoss(DiceCELoss(to_onehot_y=True, softmax=True), pdcr, weight=0.01)
        loss_function(net(x), y).backward()

    In eval mode or without gradients it is the segmentation loss alone.

    Args:
        loss: the segmentation loss; `DeepSupervisionLoss` around another too.
        pdcr: what `attach_pdcr` returned for the model.
        weight: weight of the regularizer; may be changed between steps.

    Raises:
        TypeError: `loss` is not callable, `pdcr` was not returned by `attach_pdcr`, or `weight` is not a
            number.
        ValueError: `weight` is negative or not finite.

    Attributes:
        last_pdcr: the regularizer's last value, before its weight, without gradient; for logs.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Upsample(scale_factor=2))
        >>> x, y = torch.randn(2, 1, 32, 32), torch.randint(2, (2, 1, 32, 32))
        >>> pdcr = attach_pdcr(net, "0", num_classes=2, example_input=x)
        >>> loss_function = RegularizedLoss(lambda output, target: output.square().mean(), pdcr)
        >>> loss_function(net(x), y).backward()
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], pdcr: AttachedPDCR, weight: float = 0.01) -> None:
        super().__init__()
        if not callable(loss):
            _checks.fail_type("loss", "a loss to call with output and target", type(loss).__name__)
        if not isinstance(pdcr, AttachedPDCR):
            _checks.fail_type("pdcr", "what attach_pdcr returns", type(pdcr).__name__)
        _checks.not_negative("weight", weight)
        self.loss = loss
        self.pdcr = pdcr
        self.weight = weight
        self.last_pdcr: Tensor | None = None

    def forward(self, input: Any, target: Any) -> Tensor:
        """The loss of a batch.

        Args:
            input: the model's output, as the segmentation loss takes it.
            target: labels, as the segmentation loss takes them; of a list PDCR takes the first one, which
                has the highest resolution.

        Returns:
            the segmentation loss plus the weighted regularizer, a plain tensor.

        Raises:
            TypeError, ValueError, RuntimeError: the segmentation loss or the regularizer raises.
        """
        regularization = _plain(self.pdcr(_plain(first_label_map(target))))
        self.last_pdcr = regularization.detach()
        return _plain(self.loss(input, target)) + self.weight * regularization


class UAFS(uafs.UAFS):
    """Uncertainty-aware feature selection, its layers specified as everywhere in MONAI.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels C of the features.
        num_classes: classes that the small network F predicts, at least 2.
        hidden_channels: width of F.
        act: activation and its arguments, as `"RELU"` or `("LEAKYRELU", {"negative_slope": 0.1})`.
        norm: normalisation and its arguments, as `"INSTANCE"` or `("GROUP", {"num_groups": 4})`.
        bias: whether F's first convolution has a bias.
        backend: as for `contrastseg_fast.UAFS`.

    Raises:
        TypeError, ValueError: `spatial_dims` is not 2 or 3, a number of channels or classes is too small or
            not an integer, `act` or `norm` is unknown to MONAI, or `backend` is unknown.

    Example:
        >>> import torch
        >>> gate = UAFS(spatial_dims=3, in_channels=8, num_classes=2, norm=("GROUP", {"num_groups": 4}))
        >>> gate(torch.randn(1, 8, 6, 6, 6)).shape
        torch.Size([1, 8, 6, 6, 6])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        hidden_channels: int = 16,
        *,
        act: tuple | str | None = "RELU",
        norm: tuple | str | None = "BATCH",
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            spatial_dims, in_channels, num_classes, hidden_channels, norm="none", backend=backend
        )
        self.head = nn.Sequential(
            Convolution(
                spatial_dims,
                in_channels,
                hidden_channels,
                kernel_size=3,
                adn_ordering="NA",
                act=act,
                norm=norm,
                bias=bias,
            ),
            Convolution(spatial_dims, hidden_channels, num_classes, kernel_size=1, conv_only=True),
        )


def _plain(data: Any) -> Tensor:
    """A MetaTensor as the tensor within, in the same memory."""
    tensor: Tensor = convert_to_tensor(data, track_meta=False)
    return tensor
