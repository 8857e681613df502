"""MONAI in 3D, from transforms to PDCR and UAFS: python examples/monai_3d.py"""

from __future__ import annotations

import numpy as np
import torch
from monai.data import DataLoader, Dataset, create_test_image_3d
from monai.losses import DiceCELoss
from monai.networks.nets import SegResNet
from monai.transforms import Compose, EnsureChannelFirstd, RandFlipd, ScaleIntensityd
from synthetic import arguments

from contrastseg_fast.integrations.monai import RegularizedLoss, attach_pdcr, insert_uafs

NUM_CLASSES = 3


def main() -> None:
    args = arguments(__doc__)
    side = args.size // 2
    state = np.random.RandomState(0)
    volumes = [
        create_test_image_3d(
            side, side, side, rad_max=side // 4, rad_min=3, num_seg_classes=2, random_state=state
        )
        for _ in range(2 * args.steps)
    ]
    transforms = Compose(
        [
            EnsureChannelFirstd(("image", "label"), channel_dim="no_channel"),
            ScaleIntensityd("image"),
            RandFlipd(("image", "label"), prob=0.5, spatial_axis=0),
        ]
    )
    data = Dataset([{"image": image, "label": label} for image, label in volumes], transforms)

    net = SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=NUM_CLASSES).to(args.device)
    example = torch.zeros(1, 1, side, side, side, device=args.device)
    insert_uafs(net, "down_layers.*", NUM_CLASSES, example_input=example)  # the encoder's four stages
    pdcr = attach_pdcr(
        net, "down_layers.1", NUM_CLASSES, example_input=example, class_distance="tv", patch_size=7
    )  # what this layer sees of so small a volume is most of it
    loss_function = RegularizedLoss(DiceCELoss(to_onehot_y=True, softmax=True), pdcr, args.weight)

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step, batch in enumerate(DataLoader(data, batch_size=2, shuffle=True)):
        x, y = batch["image"].to(args.device), batch["label"].to(args.device)  # MetaTensors
        optimizer.zero_grad()
        loss = loss_function(net(x), y)
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}, pdcr {loss_function.last_pdcr.item():.3f}")


if __name__ == "__main__":
    main()
