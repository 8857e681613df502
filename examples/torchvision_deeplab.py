"""DeepLabV3 of torchvision with PDCR and UAFS: python examples/torchvision_deeplab.py"""

from __future__ import annotations

import torch
from synthetic import NUM_CLASSES, arguments, batches
from torch.nn.functional import cross_entropy
from torchvision.models.segmentation import deeplabv3_resnet50

from contrastseg_fast import attach_pdcr, insert_uafs


def main() -> None:
    args = arguments(__doc__)
    model = deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES, aux_loss=True
    ).to(args.device)
    example = torch.zeros(1, 3, args.size, args.size, device=args.device)

    layers = ["backbone.layer1", "backbone.layer2"]
    insert_uafs(model, layers, NUM_CLASSES, example_input=example)
    pdcr = attach_pdcr(model, layers, NUM_CLASSES, example_input=example, patch_size=9, class_distance="tv")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step, (x, y) in enumerate(batches(args.steps, args.size, channels=3)):
        x, y = x.to(args.device), y.to(args.device)
        outputs = model(x)  # a dict
        loss = cross_entropy(outputs["out"], y) + 0.4 * cross_entropy(outputs["aux"], y)
        regularization = pdcr(y)
        optimizer.zero_grad()
        (loss + args.weight * regularization).backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}, pdcr {regularization.item():.3f}")


if __name__ == "__main__":
    main()
