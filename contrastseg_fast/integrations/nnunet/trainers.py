"""Trainers for nnU-Net v2 with PDCR in the loss, UAFS in the network, or both."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from contrastseg_fast import (
    UAFS,
    PDCRLoss,
    ReceptiveField,
    _checks,
    attach_pdcr,
    insert_uafs,
)
from contrastseg_fast.attach import AttachedPDCR
from contrastseg_fast.attach.layers import AUTO_STRIDES, select_layers
from contrastseg_fast.attach.uafs import Gates
from contrastseg_fast.functional import warmup_weight
from contrastseg_fast.patches import first_label_map

_PREFIXES = ("pdcr_", "uafs_")  # of settings


class _Configured(nnUNetTrainer):
    """A trainer whose settings are class attributes, all of them known."""

    def initialize(self) -> None:
        """Check the settings, then build the network and the loss.

        Raises:
            AttributeError: an attribute begins with `pdcr_` or `uafs_` and is not a setting of this trainer,
                or a `uafs_` setting is an attribute of the object, not of the class.
        """
        cls = type(self)
        known = {
            name
            for ancestor in cls.__mro__
            if ancestor.__module__ == __name__
            for name in ancestor.__annotations__
            if name.startswith(_PREFIXES)
        }
        for name in [*dir(cls), *vars(self)]:
            if name.lower().startswith(_PREFIXES) and name not in known:
                near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
                raise AttributeError(
                    f"{name}: expected a setting of {cls.__name__}, one of {sorted(known)}; near: {near}"
                )
            if name.startswith("uafs_") and name in vars(self):
                raise AttributeError(
                    f"{name}: expected an attribute of the class, as prediction builds the network from it"
                )
        super().initialize()


class nnUNetTrainerUAFS(_Configured):
    """nnU-Net with uncertainty-aware gates (Eqs. 8 to 10) behind stages of its network.

    The gates are part of the network: checkpoints hold them, and prediction builds them again from the
    trainer's name. All other keys of the state dict are nnU-Net's own.

    Attributes:
        uafs_layers: names or patterns of layers, as for `insert_uafs`; `"auto"` takes every encoder and
            decoder stage.
        uafs_options: other arguments of `UAFS`: `hidden_channels`, `norm`, `backend`.

    Example:
        class nnUNetTrainerUAFSEncoder(nnUNetTrainerUAFS):
            uafs_layers = ("encoder.stages.2", "encoder.stages.3")
    """

    uafs_layers: ClassVar[str | Sequence[str]] = "auto"
    uafs_options: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network of the plans with gates in it; nnU-Net calls this for training and for prediction."""
        network = super().build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        _check_options("uafs_options", cls.uafs_options, UAFS)
        layers = cls.uafs_layers
        if layers == "auto":
            layers = _stages(network, "uafs_layers", "encoder", "decoder")
        return insert_uafs(
            network,
            layers,
            max(2, num_output_channels),  # a single region is foreground against the rest
            example_input=torch.empty(1, num_input_channels, *configuration_manager.patch_size),
            **cls.uafs_options,
        )

    def initialize(self) -> None:
        """Build the network and the loss, and tell in the log where the gates are."""
        super().initialize()
        gates = Gates(self.network)
        if not gates:
            raise TypeError(
                f"{type(self).__name__}: expected this package's trainer first among the bases, as others "
                "build the network too, got a network without gates"
            )
        for name, gate in gates.items():
            layer = name.removeprefix("module.").removeprefix("_orig_mod.")  # of what nnU-Net wrapped
            self.print_to_log_file(f"UAFS {layer}: {gate.extra_repr()}")


class nnUNetTrainerPDCR(_Configured):
    """nnU-Net with patch-dragsaw contrastive regularization (Eqs. 3 to 7) of its encoder in the loss.

    Training adds `weight * pdcr` to nnU-Net's loss; validation and prediction are as without. The network
    and its checkpoints are nnU-Net's own.

    Attributes:
        pdcr_weight: weight of the regularization; its strength is weight / temperature.
        pdcr_warmup_epochs: epochs over which the weight rises linearly from 0.
        pdcr_layers: names or patterns of layers, as for `attach_pdcr`; `"auto"` takes the encoder stages of
            stride 2, 4 and 8 (the largest over the axes, where they differ).
        pdcr_patch_size: size of the patches whose foreground ratios are compared, as for `PDCRLoss`; None
            takes the receptive fields. `"auto"` takes the receptive field of a layer if it is at most half of
            nnU-Net's crop along every axis. Otherwise it takes 2 * stride + 1 pixels around the centre, so
            that neighbouring patches overlap by half, but never more than the field or half of the crop.
        pdcr_num_samples: vectors per image and layer at most; None takes all.
        pdcr_temperature, pdcr_class_distance, pdcr_variant: as for `PDCRLoss`. With region-based labels,
            which overlap, `class_distance` is always `"mean"`, over the regions.
        pdcr_options: other arguments of `PDCRLoss`, except `projection`: prediction builds the network
            without heads and could not load them. `skip_homogeneous` is True unless it is set here, because
            most of nnU-Net's crops are random, and many show only background.

    Example:
        class nnUNetTrainerPDCRStrong(nnUNetTrainerPDCR):
            pdcr_weight = 0.1
            pdcr_warmup_epochs = 50
    """

    pdcr_weight: ClassVar[float] = 0.01
    pdcr_warmup_epochs: ClassVar[int] = 0
    pdcr_layers: ClassVar[str | Sequence[str]] = "auto"
    pdcr_patch_size: ClassVar[str | int | Sequence[int] | Mapping[str, Any] | None] = "auto"
    pdcr_num_samples: ClassVar[int | None] = 1024
    pdcr_temperature: ClassVar[float] = 0.5
    pdcr_class_distance: ClassVar[str] = "tv"
    pdcr_variant: ClassVar[str] = "paper"
    pdcr_options: ClassVar[Mapping[str, Any]] = {}

    pdcr: AttachedPDCR  # made with the network

    def initialize(self) -> None:
        """Build the network and the loss."""
        _checks.not_negative("pdcr_weight", self.pdcr_weight)
        _checks.integer("pdcr_warmup_epochs", self.pdcr_warmup_epochs, 0)
        _check_options("pdcr_options", self.pdcr_options, PDCRLoss)
        # PDCR is attached to the trainer's network only; the predictor builds its own from the class.
        self.__dict__["build_network_architecture"] = self._build_network_with_pdcr
        super().initialize()

    def _build_network_with_pdcr(
        self,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        network = type(self).build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        crop = tuple(configuration_manager.patch_size)
        has_regions = self.label_manager.has_regions
        options: dict[str, Any] = {
            "skip_homogeneous": True,
            "num_samples": self.pdcr_num_samples,
            "temperature": self.pdcr_temperature,
            "class_distance": "mean" if has_regions else self.pdcr_class_distance,
            "variant": self.pdcr_variant,
            **self.pdcr_options,
        }
        if options.get("projection") is not None:
            _checks.fail(
                "pdcr_options",
                "no projection, as prediction builds the network without heads",
                self.pdcr_options,
            )
        automatic = self.pdcr_layers == "auto"
        layers = _stages(network, "pdcr_layers", "encoder") if automatic else self.pdcr_layers
        example = torch.empty(1, num_input_channels, *crop)
        selection = select_layers(network, layers, example)
        found = {name: selection.runs[name].receptive_field for name in selection.names}
        fields = {
            name: field for name, field in found.items() if not automatic or max(field.stride) in AUTO_STRIDES
        }
        if not {"patch_size", "patch_sizes"} & set(options):
            size = self.pdcr_patch_size
            options["patch_size"] = _patches_within_half(fields, crop) if size == "auto" else size
        self.pdcr = attach_pdcr(
            network, list(fields), num_output_channels, receptive_fields=fields, **options
        )
        labels = "regions" if has_regions else "classes"
        self.print_to_log_file(
            f"PDCR of {num_output_channels} {labels} on patches of {crop} pixels: weight {self.pdcr_weight} "
            f"after {self.pdcr_warmup_epochs} epochs, {options}"
        )
        for name, field in fields.items():
            self.print_to_log_file(f"  {name}: {field}")
        return network

    def _build_loss(self) -> nn.Module:
        return RegularizedLoss(
            super()._build_loss(), self.pdcr, self.label_manager.ignore_label, self.label_manager.has_regions
        )

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.loss.weight = warmup_weight(self.current_epoch, self.pdcr_weight, self.pdcr_warmup_epochs)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        mean = self.loss.pop_mean()
        self.print_to_log_file(f"PDCR weight {self.loss.weight:.4g}, mean {mean:.4f}")


class nnUNetTrainerPDCRUAFS(nnUNetTrainerPDCR, nnUNetTrainerUAFS):
    """nnU-Net with gates in its network and PDCR of the gated features in its loss."""


class RegularizedLoss(nn.Module):
    """A segmentation loss of nnU-Net plus `weight * pdcr`, which is 0 in validation steps.

    Args:
        segmentation: the loss of the network's outputs and the targets, lists with deep supervision.
        pdcr: the regularizer of the network.
        ignore_label: the label of pixels to leave out, or None; with regions the targets' last channel
            marks them instead.
        has_regions: whether the targets are regions, one channel each `(B, R, *spatial)`, and not one map of
            labels `(B, 1, *spatial)`.

    Attributes:
        weight: weight of the regularization, set anew each epoch.
    """

    def __init__(
        self, segmentation: nn.Module, pdcr: AttachedPDCR, ignore_label: int | None, has_regions: bool
    ) -> None:
        super().__init__()
        self.segmentation = segmentation
        self.pdcr = pdcr
        self.ignore_label = ignore_label
        self.has_regions = has_regions
        self.weight = 0.0
        self._values: list[Tensor] = []

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """The loss, a scalar.

        Args:
            output: logits of the network; with deep supervision a list, highest resolution first.
            target: what nnU-Net's data loader gives: a label map or channels, or a list of them likewise.
        """
        loss = self.segmentation(output, target)
        labels, mask = self._labels_and_mask(first_label_map(target))
        value = self.pdcr(labels, mask)
        if value.requires_grad:
            self._values.append(value.detach())
        return loss + self.weight * value

    def pop_mean(self) -> float:
        """The mean regularization of the training steps since the last call; NaN without any."""
        mean = torch.stack(self._values).mean().item() if self._values else math.nan
        self._values.clear()
        return mean

    def _labels_and_mask(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.ignore_label is None:
            return (target.float() if self.has_regions else target), None
        if not self.has_regions:
            return target, target != self.ignore_label
        return target[:, :-1].float(), target[:, -1:] == 0


def _stages(network: nn.Module, setting: str, *parts: str) -> list[str]:
    """The names of the stages of a network's encoder or decoder, as nnU-Net's architectures call them."""
    names = []
    for part in parts:
        stages = getattr(getattr(network, part, None), "stages", None)
        if stages is None:
            _checks.fail(setting, f"layers of {type(network).__name__}, which has no {part}.stages", "'auto'")
        names += [f"{part}.stages.{name}" for name, _ in stages.named_children()]
    return names


def _check_options(setting: str, options: Mapping[str, Any], module: type[nn.Module]) -> None:
    """Check that a setting's options are arguments of a module, and name the near ones of what is not."""
    parameters = inspect.signature(module).parameters.values()
    known = [
        each.name for each in parameters if each.default is not each.empty
    ]  # the others are the trainer's
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            _checks.fail_type(setting, f"arguments of {module.__name__}", f"{name!r}; near names: {near}")


def _patches_within_half(
    fields: Mapping[str, ReceptiveField], crop: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """The sizes of the fields, or 2 * stride + 1 pixels if a field exceeds half of the crop along an axis."""
    patches: dict[str, tuple[int, ...]] = {}
    for name, field in fields.items():
        if all(size <= extent / 2 for size, extent in zip(field.size, crop, strict=True)):
            patches[name] = tuple(int(size) for size in field.size)
        else:
            axes = zip(field.size, field.stride, crop, strict=True)
            patches[name] = tuple(
                int(min(size, 2 * int(stride) + 1, max(1, extent // 2))) for size, stride, extent in axes
            )
    return patches
