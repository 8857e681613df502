"""MONAI's trainer engine with the regularized loss: nothing but the loss function changes."""

from __future__ import annotations

import pytest
import torch
from conftest import blob_labels

pytest.importorskip("ignite", reason="needs the extra integrations")
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet

from contrastseg_fast.integrations.monai import RegularizedLoss, attach_pdcr, insert_uafs


def test_an_engine_trains_and_validates() -> None:
    labels = blob_labels(8, (32, 32), 2)[:, None]
    items = [{"image": MetaTensor(y + 0.3 * torch.randn(1, 32, 32)), "label": MetaTensor(y)} for y in labels]
    net = BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4))
    insert_uafs(net, "auto", 2, example_input=torch.zeros(1, 1, 32, 32))
    pdcr = attach_pdcr(net, "down_1", 2, example_input=torch.zeros(1, 1, 32, 32))
    loss = RegularizedLoss(DiceCELoss(to_onehot_y=True, softmax=True), pdcr)
    loader = DataLoader(Dataset(items), batch_size=2)
    evaluator = SupervisedEvaluator(device=torch.device("cpu"), val_data_loader=loader, network=net)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=loader,
        network=net,
        optimizer=torch.optim.Adam(net.parameters(), lr=1e-2),
        loss_function=loss,
        train_handlers=[ValidationHandler(interval=1, validator=evaluator)],
    )
    before = net.final_conv.weight.detach().clone()
    trainer.run()
    assert trainer.state.iteration == 8
    assert evaluator.state.iteration == 4
    assert loss.last_pdcr is not None
    assert loss.last_pdcr.isfinite()
    assert not torch.equal(net.final_conv.weight, before)
