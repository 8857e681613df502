"""An encoder of timm, its features handed to the loss without hooks: python examples/timm_features.py"""

from __future__ import annotations

import timm
import torch
from synthetic import NUM_CLASSES, arguments, batches
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from contrastseg_fast import UAFS, PDCRLoss, receptive_fields


class Segmenter(nn.Module):
    """An encoder, a gate behind each of its stages, and a head on all of them at the finest one's size."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model(
            "resnet18", pretrained=False, in_chans=1, features_only=True, out_indices=(0, 1, 2)
        )
        channels = self.encoder.feature_info.channels()
        self.gates = nn.ModuleList(UAFS(2, width, NUM_CLASSES) for width in channels)
        self.head = nn.Conv2d(sum(channels), NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = [gate(h) for gate, h in zip(self.gates, self.encoder(x), strict=True)]
        together = torch.cat([interpolate(h, features[0].shape[2:]) for h in features], 1)
        return interpolate(self.head(together), x.shape[2:], mode="bilinear"), features


def main() -> None:
    args = arguments(__doc__)
    model = Segmenter().to(args.device)

    fields = receptive_fields(model, (1, 1, args.size, args.size), [f"gates.{k}" for k in range(3)])
    for layer, field in fields.items():
        print(layer, field)
    pdcr = PDCRLoss(list(fields.values()), NUM_CLASSES, patch_size=9, class_distance="tv")

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step, (x, y) in enumerate(batches(args.steps, args.size)):
        x, y = x.to(args.device), y.to(args.device)
        logits, features = model(x)
        loss, regularization = cross_entropy(logits, y), pdcr(features, y)
        optimizer.zero_grad()
        (loss + args.weight * regularization).backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}, pdcr {regularization.item():.3f}")


if __name__ == "__main__":
    main()
