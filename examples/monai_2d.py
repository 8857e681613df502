"""MONAI's 2D training loop with PDCR and UAFS: python examples/monai_2d.py"""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from synthetic import NUM_CLASSES, arguments, batches

from contrastseg_fast.integrations.monai import RegularizedLoss, attach_pdcr, insert_uafs


def main() -> None:
    args = arguments(__doc__)
    net = BasicUNet(
        spatial_dims=2, in_channels=1, out_channels=NUM_CLASSES, features=(16, 16, 32, 32, 64, 16)
    ).to(args.device)
    example = torch.zeros(1, 1, args.size, args.size, device=args.device)

    insert_uafs(net, "auto", NUM_CLASSES, example_input=example)
    pdcr = attach_pdcr(
        net, ["down_1", "down_2"], NUM_CLASSES, example_input=example, class_distance="tv", patch_size=9
    )
    loss_function = RegularizedLoss(DiceCELoss(to_onehot_y=True, softmax=True), pdcr, args.weight)

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)  # after insert_uafs: the gates train too
    for step, (x, y) in enumerate(batches(args.steps, args.size)):
        x, y = x.to(args.device), y[:, None].to(args.device)
        optimizer.zero_grad()
        loss = loss_function(net(x), y)
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}, pdcr {loss_function.last_pdcr.item():.3f}")


if __name__ == "__main__":
    main()
