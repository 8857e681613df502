"""A training step of segmentation networks on chest CT, with and without PDCR at three layers and UAFS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.masks import chest_crops, chest_images, chest_slices
from benchmarks.operation import OURS, Implementation, Inputs, Operation, Result, Run, Unavailable
from benchmarks.ratios import ratios_by_cumsum
from contrastseg_fast import ReceptiveField, receptive_fields, reference
from contrastseg_fast.attach import attach_pdcr, insert_uafs
from contrastseg_fast.functional import sample_grid

NUM_CLASSES = 5
PDCR_WEIGHT = 0.01
PATCH_SIZE = 15  # of the deepest layer, which sees most of the image

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Network:
    """How to build a network, and the encoder's layers at three strides that PDCR and UAFS are put at."""

    build: Callable[[], nn.Module]
    layers: tuple[str, str, str]
    spatial_dims: int = 2
    in_channels: int = 1
    least_extent: int = 0  # of the images it takes


def _monai(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from monai.networks import nets

        return getattr(nets, name)(**options)

    return build


def _unet(dims: int) -> Network:
    build = _monai(
        "UNet",
        spatial_dims=dims,
        in_channels=1,
        out_channels=NUM_CLASSES,
        channels=(16, 32, 64, 128),
        strides=(2, 2, 2),
        num_res_units=2,
        norm="batch",
    )
    return Network(build, ("model.0", "model.1.submodule.0", "model.1.submodule.1.submodule.0"), dims)


def _basic_unet(dims: int) -> Network:
    build = _monai("BasicUNet", spatial_dims=dims, in_channels=1, out_channels=NUM_CLASSES)
    return Network(build, ("down_1", "down_2", "down_3"), dims)


def _seg_res_net(dims: int) -> Network:
    build = _monai("SegResNet", spatial_dims=dims, init_filters=16, in_channels=1, out_channels=NUM_CLASSES)
    return Network(build, ("down_layers.1", "down_layers.2", "down_layers.3"), dims)


def _dynunet(dims: int) -> Network:
    """nnU-Net's architecture, by MONAI."""
    build = _monai(
        "DynUNet",
        spatial_dims=dims,
        in_channels=1,
        out_channels=NUM_CLASSES,
        kernel_size=[3] * 5,
        strides=[1, 2, 2, 2, 2],
        upsample_kernel_size=[2] * 4,
        filters=(32, 64, 128, 256, 320),
    )
    return Network(build, ("downsamples.0", "downsamples.1", "downsamples.2"), dims)


def _nnunet(dims: int) -> Network:
    """nnU-Net's own, as its planner makes it for images of these sizes."""

    def build() -> nn.Module:
        from dynamic_network_architectures.architectures.unet import PlainConvUNet

        features = (32, 64, 128, 256, 512, 512, 512) if dims == 2 else (32, 64, 128, 256, 320)
        return PlainConvUNet(
            input_channels=1,
            n_stages=len(features),
            features_per_stage=features,
            conv_op=(nn.Conv2d, nn.Conv3d)[dims - 2],
            kernel_sizes=3,
            strides=[1] + [2] * (len(features) - 1),
            n_conv_per_stage=2,
            num_classes=NUM_CLASSES,
            n_conv_per_stage_decoder=2,
            conv_bias=True,
            norm_op=(nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 2],
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        )

    layers = ("encoder.stages.1", "encoder.stages.2", "encoder.stages.3")
    return Network(build, layers, dims, least_extent=(128, 32)[dims - 2])


def _torchvision(name: str) -> Network:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from torchvision.models import segmentation

            make = getattr(segmentation, name)
            self.network = make(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)["out"]

    layers = ("network.backbone.layer1", "network.backbone.layer2", "network.backbone.layer3")
    return Network(Logits, layers, in_channels=3)


def _smp(name: str) -> Network:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)("resnet34", encoder_weights=None, in_channels=1, classes=NUM_CLASSES)

    return Network(build, ("encoder.layer1", "encoder.layer2", "encoder.layer3"))


NETWORKS: dict[str, Network] = {
    "U-Net": _unet(2),
    "U-Net 3D": _unet(3),
    "BasicUNet": _basic_unet(2),
    "BasicUNet 3D": _basic_unet(3),
    "SegResNet": _seg_res_net(2),
    "SegResNet 3D": _seg_res_net(3),
    "DynUNet": _dynunet(2),
    "DynUNet 3D": _dynunet(3),
    "nnU-Net": _nnunet(2),
    "nnU-Net 3D": _nnunet(3),
    "FCN, ResNet-50": _torchvision("fcn_resnet50"),
    "DeepLabV3, ResNet-50": _torchvision("deeplabv3_resnet50"),
    "DeepLabV3+, ResNet-34": _smp("DeepLabV3Plus"),
    "U-Net, ResNet-34": _smp("Unet"),
}


@dataclass(frozen=True)
class Size:
    """A batch of square or cubic images, and vectors sampled from every layer; bf16 means autocast."""

    samples: int = 1024
    batch: int = 4
    extent: int = 256
    network: str = "U-Net"
    dtype: str = "fp32"

    def __str__(self) -> str:
        image = "x".join([str(self.batch), *[str(self.extent)] * NETWORKS[self.network].spatial_dims])
        autocast = "" if self.dtype == "fp32" else f",{self.dtype}"
        return f"{self.network},{image},N={self.samples}{autocast}"


def _inputs(size: Size, device: str) -> Inputs:
    network = NETWORKS[size.network]
    if network.spatial_dims == 3:
        images, labels = chest_crops(size.batch, size.extent, NUM_CLASSES)
    else:
        images = chest_images(size.batch, size.extent)
        labels = chest_slices(size.batch, size.extent, NUM_CLASSES)
    return images.repeat_interleave(network.in_channels, 1).to(device), labels.to(device)


class _CumsumPDCR:
    """PDCR by the reference's loss, its ratios from cumulative sums, on vectors that hooks sample."""

    def __init__(self, model: nn.Module, network: Network, images: Tensor, num_samples: int) -> None:
        fields = receptive_fields(model, (1, *images.shape[1:]), network.layers)
        fields[network.layers[-1]] = fields[network.layers[-1]].centred(PATCH_SIZE)
        self._samples: list[tuple[ReceptiveField, Tensor, Tensor]] = []
        self._num_samples = num_samples
        for layer, field in fields.items():
            model.get_submodule(layer).register_forward_hook(self._hook(field))

    def __call__(self, labels: Tensor) -> Tensor:
        losses = []
        for field, indices, vectors in self._samples:
            box = [int(extent) for extent in field.size]
            ratios = ratios_by_cumsum(labels, field.starts(indices), box, NUM_CLASSES)
            losses.append(reference.pdcr_loss(vectors, ratios, class_distance="tv"))
        self._samples.clear()
        return torch.stack(losses).mean()

    def _hook(self, field: ReceptiveField) -> Callable[[nn.Module, Any, Tensor], None]:
        def sample(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            indices = sample_grid(output.shape[2:], self._num_samples, device=output.device)
            places: tuple[Any, ...] = (slice(None), slice(None), *indices.unbind(1))
            vectors = output[places].mT
            self._samples.append((field, indices, vectors))

        return sample


def _criterion() -> Criterion:
    """The criterion of MONAI's tutorials, where it is installed."""
    try:
        from monai.losses import DiceCELoss
    except ImportError:
        return cross_entropy
    dice_ce = DiceCELoss(to_onehot_y=True, softmax=True)
    return lambda logits, labels: dice_ce(logits, labels[:, None])


def _step(pdcr: str | None = None, uafs: str | None = None) -> Callable[[Size, Inputs], Run]:
    """A step with PDCR and UAFS by these backends; PDCR also by `"cumsum"`; None leaves one out."""

    def prepare(size: Size, inputs: Inputs) -> Run:
        images, labels = inputs
        network = NETWORKS[size.network]
        torch.manual_seed(0)
        try:
            model = network.build().to(images)
        except ImportError as error:
            raise Unavailable(str(error)) from error
        if uafs is not None:
            insert_uafs(model, network.layers, NUM_CLASSES, example_input=images, backend=uafs)
        regularizer: Callable[[Tensor], Tensor] | None = None
        if pdcr == "cumsum":
            regularizer = _CumsumPDCR(model, network, images, size.samples)
        elif pdcr is not None:
            regularizer = attach_pdcr(
                model,
                network.layers,
                NUM_CLASSES,
                example_input=images,
                num_samples=size.samples,
                class_distance="tv",
                patch_size={network.layers[-1]: PATCH_SIZE},
                backend=pdcr,
            )
        criterion = _criterion()
        torch.backends.cudnn.benchmark = images.is_cuda
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
        autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=size.dtype == "bf16")
        model.train()

        def run() -> Result:
            with autocast:
                loss = criterion(model(images), labels)
                if regularizer is not None:
                    loss = loss + PDCR_WEIGHT * regularizer(labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return (loss.detach(),)

        return run

    return prepare


_with_reference = _step(pdcr="reference", uafs="reference")


def _oracle(size: Size, inputs: Inputs) -> Result:
    images, labels = inputs
    return _with_reference(replace(size, dtype="fp32"), (images.double(), labels))()


def _tiny(size: Size) -> Size:
    network = NETWORKS[size.network]
    extent = max((64, 32)[network.spatial_dims - 2], network.least_extent)
    return replace(size, samples=16, batch=min(size.batch, 2), extent=extent)


def _loops_too_long(size: Size, device: str) -> str | None:
    boxes = 3 * size.batch * size.samples
    return f"waits for the device at each of {boxes} boxes" if device == "cuda" and boxes > 256 else None


def _checked(size: Size) -> Size:
    # DeepLab normalises pooled features over the batch, which takes two images.
    return replace(size, batch=min(size.batch, 2), samples=min(size.samples, 256))


OPERATION = Operation(
    name="training_step",
    make_inputs=_inputs,
    oracle=_oracle,
    checked=_checked,
    tiny=_tiny,
    tolerance=lambda size: 1e-4 if size.dtype == "fp32" else 2e-2,
    rotates=False,
    implementations=(
        Implementation(OURS, _step(pdcr="auto", uafs="auto")),
        Implementation("reference", _with_reference, refuse=_loops_too_long),
        Implementation("reference, cumsum ratios", _step(pdcr="cumsum", uafs="reference")),
        Implementation("PDCR alone", _step(pdcr="auto"), yardstick=True),
        Implementation("UAFS alone", _step(uafs="auto"), yardstick=True),
        Implementation("baseline", _step(), yardstick=True),
    ),
)
