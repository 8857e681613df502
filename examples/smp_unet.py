"""A network of segmentation_models_pytorch with PDCR and UAFS: python examples/smp_unet.py"""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch
from synthetic import NUM_CLASSES, arguments, batches

from contrastseg_fast import attach_pdcr, insert_uafs


def main() -> None:
    args = arguments(__doc__)
    model = smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=NUM_CLASSES).to(args.device)
    example = torch.zeros(1, 1, args.size, args.size, device=args.device)

    insert_uafs(model, "auto", NUM_CLASSES, example_input=example)
    pdcr = attach_pdcr(
        model,
        ["encoder.layer1", "encoder.layer2"],
        NUM_CLASSES,
        example_input=example,
        patch_size=9,
        class_distance="tv",
    )

    criterion = smp.losses.DiceLoss("multiclass")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # after insert_uafs: the gates train too
    for step, (x, y) in enumerate(batches(args.steps, args.size)):
        x, y = x.to(args.device), y.to(args.device)
        dice = criterion(model(x), y)
        regularization = pdcr(y)
        optimizer.zero_grad()
        (dice + args.weight * regularization).backward()
        optimizer.step()
        print(f"step {step}: dice loss {dice.item():.3f}, pdcr {regularization.item():.3f}")


if __name__ == "__main__":
    main()
