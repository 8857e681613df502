"""PDCR for LightningModules, of `lightning` or `pytorch_lightning`; needs the extra `lightning`.

class Regularized(PDCRMixin, SegmentationModule):    # the mixin first
    def __init__(self):
        super().__init__()
        self.attach_pdcr(self.net, "auto", num_classes=3, example_input=torch.zeros(1, 1, 256, 256))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from contrastseg_fast import _checks, attach
from contrastseg_fast.functional import warmup_weight

if not any(find_spec(name) for name in ("lightning", "pytorch_lightning")):
    raise ImportError(
        "contrastseg_fast.integrations.lightning needs Lightning: pip install 'contrastseg_fast[lightning]'"
    )
if TYPE_CHECKING:
    from lightning import LightningModule as _Base
else:
    _Base = object  # the module's own base comes after the mixin, from either package

_LABEL_KEYS = ("label", "mask", "target", "y")


class PDCRMixin(_Base):
    """Adds PDCR to the loss that a LightningModule's `training_step` returns, and logs it as `train_pdcr`.

    Put it before the module in the list of bases, and call `attach_pdcr` at the end of `__init__`. What the
    trainer does stays the same: devices, precision, accumulation, checkpoints, resuming, validation. The keys
    of checkpoints stay the same too; projection heads add theirs, which begin with the network's name and
    `pdcr`, such as `net.pdcr.1.weight`. Automatic optimization only.

    Example:
        >>> import lightning, torch
        >>> class Segmentation(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return nn.functional.cross_entropy(self.net(x), y)
        >>> class Regularized(PDCRMixin, Segmentation):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attach_pdcr(self.net, "1", num_classes=2, example_input=torch.zeros(1, 1, 16, 16))
        >>> module = Regularized()
        >>> batch = torch.randn(2, 1, 16, 16), torch.randint(2, (2, 16, 16))
        >>> module.training_step(batch, 0).requires_grad
        True
    """

    pdcr: attach.AttachedPDCR | None = None

    def attach_pdcr(
        self,
        net: nn.Module,
        layers: str | Sequence[str],
        num_classes: int,
        *,
        weight: float = 0.01,
        warmup_steps: float = 0,
        **options: Any,
    ) -> None:
        """Attach PDCR to the network inside the module; see `contrastseg_fast.attach_pdcr`.

        Args:
            net: the network that `training_step` calls.
            layers, num_classes: as for `contrastseg_fast.attach_pdcr`.
            weight: weight of the regularizer in the loss.
            warmup_steps: number of optimizer steps over which the weight rises from 0.
            options: other arguments of `contrastseg_fast.attach_pdcr`, above all `example_input`.

        Raises:
            TypeError, ValueError: `weight` or `warmup_steps` is negative, infinite or not a number, or
                `contrastseg_fast.attach_pdcr` raises for another argument.
        """
        _checks.not_negative("weight", weight)
        _checks.not_negative("warmup_steps", warmup_steps)
        self.pdcr = attach.attach_pdcr(net, layers, num_classes, **options)
        self.pdcr_weight = weight
        self.pdcr_warmup_steps = warmup_steps

    def pdcr_labels(self, batch: Any) -> Tensor | Sequence[Tensor]:
        """The labels of a batch, as `PDCRLoss` takes them; override it for batches of other kinds.

        Args:
            batch: what `training_step` gets.

        Returns:
            the second item of a tuple or list; of a mapping, `"label"`, `"mask"`, `"target"` or `"y"`.

        Raises:
            TypeError: the batch is not such a tuple, list or mapping.
        """
        if isinstance(batch, Mapping):
            for key in _LABEL_KEYS:
                if key in batch:
                    return batch[key]
        elif isinstance(batch, (tuple, list)) and len(batch) > 1:
            return batch[1]
        _checks.fail_type(
            "batch",
            f"(input, labels) or a mapping with a key of {_LABEL_KEYS}; override pdcr_labels for others",
            sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__,
        )

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's own training step, its loss with PDCR added.

        Raises:
            RuntimeError: `attach_pdcr` was not called, or the module optimizes by hand.
        """
        if self.pdcr is None or not self.automatic_optimization:
            raise RuntimeError(
                "PDCRMixin: expected attach_pdcr to be called in __init__, and automatic optimization; "
                "to optimize by hand, add contrastseg_fast.attach_pdcr's regularizer to the loss yourself"
            )
        output = super().training_step(batch, *args, **kwargs)
        if output is None:  # the batch is skipped
            return None
        regularization = self.pdcr(self.pdcr_labels(batch))
        weight = warmup_weight(self.global_step, self.pdcr_weight, self.pdcr_warmup_steps)
        self.log("train_pdcr", regularization.detach(), on_step=True, on_epoch=True)
        if isinstance(output, Mapping):
            return {**output, "loss": output["loss"] + weight * regularization}
        return output + weight * regularization
