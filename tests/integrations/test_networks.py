"""PDCR and UAFS in the networks of segmentation_models_pytorch, timm and torchvision, without weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import blob_labels, normwise_error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

smp = pytest.importorskip("segmentation_models_pytorch", reason="needs the extra integrations")
timm = pytest.importorskip("timm", reason="needs the extra integrations")
pytest.importorskip("torchvision", reason="needs the extra integrations")
from torchvision.models import segmentation  # noqa: E402

from contrastseg_fast import PDCRLoss, attach_pdcr, insert_uafs, receptive_fields  # noqa: E402
from contrastseg_fast.attach import remove_uafs  # noqa: E402

SIDE = 64


def of_smp(name: str, encoder: str = "resnet18") -> nn.Module:
    return getattr(smp, name)(encoder, encoder_weights=None, in_channels=3, classes=3)


def of_torchvision(name: str) -> nn.Module:
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)


ENCODER = ["encoder.layer1", "encoder.layer2"]
BACKBONE = ["backbone.layer1", "backbone.layer2"]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "smp Unet": (lambda: of_smp("Unet"), ENCODER),
    "smp Unet, timm encoder": (lambda: of_smp("Unet", "tu-resnet18"), ["encoder.model.layer[12]"]),
    "smp FPN": (lambda: of_smp("FPN"), [*ENCODER, "decoder.p3"]),
    "smp DeepLabV3Plus": (lambda: of_smp("DeepLabV3Plus"), ENCODER),
    "torchvision DeepLabV3": (lambda: of_torchvision("deeplabv3_resnet50"), BACKBONE),
    "torchvision FCN": (lambda: of_torchvision("fcn_resnet50"), BACKBONE),
}


def batch(side: int = SIDE) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, side, side), blob_labels(2, (side, side), 3)


def logits(output: Tensor | dict[str, Tensor]) -> Tensor:
    return output["out"] if isinstance(output, dict) else output


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_train_as_with_the_reference(network: str) -> None:
    make, layers = NETWORKS[network]
    model, (x, y) = make(), batch(2 * SIDE if network == "smp FPN" else SIDE)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    insert_uafs(model, layers, 3, example_input=x)
    added = set(model.state_dict()) - set(state)
    assert added
    assert all(".uafs." in key for key in added)
    slow = copy.deepcopy(model)
    for gate in slow.uafs.values():
        gate.backend = "reference"
    for net in (model, slow):
        for module in net.modules():
            if isinstance(module, (nn.Dropout, nn.Dropout2d, nn.BatchNorm2d)):
                module.eval()  # with batches this small, normalisation amplifies rounding ten-thousandfold
    results = []
    for net, backend in ((model, "auto"), (slow, "reference")):
        options = {"num_samples": 64, "patch_size": 9, "class_distance": "tv", "backend": backend}
        pdcr = attach_pdcr(net, layers, 3, example_input=x, **options)
        loss = cross_entropy(logits(net(x)), y)
        regularization = pdcr(y)
        (loss + 0.1 * regularization).backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        results.append((loss.detach(), regularization.detach(), gradient))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-4, atol=1e-5)
    assert normwise_error(results[0][2], results[1][2]) < 1e-3
    remove_uafs(model).load_state_dict(state)


@pytest.mark.parametrize(
    ("network", "stages", "tapped"),
    [
        (
            "smp Unet",
            ["encoder.relu", *(f"encoder.layer{k}" for k in range(1, 5))]
            + [f"decoder.blocks.{k}" for k in range(4)]
            + ["decoder"],
            {"encoder.relu": 7, "encoder.layer1": 43, "encoder.layer2": 99},
        ),
        (
            "torchvision FCN",
            ["backbone.relu", "backbone.layer1", "backbone.layer4"],
            {"backbone.relu": 7, "backbone.layer1": 35, "backbone.layer2": 91},
        ),
    ],
)
def test_layers_chosen(network: str, stages: list[str], tapped: dict[str, int]) -> None:
    model = NETWORKS[network][0]()
    x = torch.zeros(1, 3, 200, 200) if network == "torchvision FCN" else torch.zeros(1, 3, 224, 224)
    fields = attach_pdcr(model, "auto", 3, example_input=x).loss.receptive_fields
    assert {name: field.size[0] for name, field in fields.items()} == tapped
    insert_uafs(model, "auto", 3, example_input=x)
    assert sorted(model.uafs) == sorted(stages)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "regnetx_002"])
def test_feature_lists_of_timm(name: str) -> None:
    encoder = timm.create_model(name, pretrained=False, features_only=True, out_indices=(0, 1))
    (x, y), reductions = batch(), encoder.feature_info.reduction()
    # A stage is the module that gives one of the encoder's outputs.
    layers = [info["module"].replace(".", "_") for info in encoder.feature_info.get_dicts()[:2]]
    fields = receptive_fields(encoder, x.shape, layers)
    assert [field.stride[0] for field in fields.values()] == reductions
    maps = encoder(x)
    assert [len(maps), *(h.shape[2] for h in maps)] == [2, *(SIDE // k for k in reductions)]
    options = {"num_samples": 64, "patch_size": 9}
    expected = PDCRLoss(list(fields.values()), 3, **options)(maps, y)
    pdcr = attach_pdcr(encoder, layers, 3, example_input=x, **options)
    encoder(x)
    torch.testing.assert_close(pdcr(y), expected)


def test_squeeze_and_excitation_has_no_receptive_field_but_takes_gates() -> None:
    encoder = timm.create_model("efficientnet_b0", pretrained=False, features_only=True)
    x, y = batch()
    with pytest.raises(ValueError, match=r"INFINITE along axis 0, 1, because of aten\.mean"):
        attach_pdcr(encoder, "blocks.1", 3, example_input=x)
    insert_uafs(encoder, "auto", 3, example_input=x)
    assert len(encoder.uafs) >= 4
    fields = {"blocks.1": receptive_fields(nn.Conv2d(3, 3, 11, 4, 5), x.shape, [""])[""]}
    pdcr = attach_pdcr(encoder, "blocks.1", 3, receptive_fields=fields)
    (sum(h.mean() for h in encoder(x)) + pdcr(y)).backward()
    assert all(parameter.grad is not None for parameter in encoder.uafs.parameters())


class Segmenter(nn.Module):
    """An encoder with a head, to be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model("resnet18", pretrained=False, features_only=True, out_indices=(1, 2))
        self.head = nn.Conv2d(128, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return interpolate(self.head(self.encoder(x)[-1]), x.shape[2:])


def test_compiled_encoders_collect() -> None:
    model, (x, y) = Segmenter(), batch()
    layers = ["encoder.layer1", "encoder.layer2"]
    insert_uafs(model, layers, 3, example_input=x)
    pdcr = attach_pdcr(model, layers, 3, example_input=x, patch_size=9)
    model(x)
    expected = pdcr(y)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(pdcr(y), expected)
