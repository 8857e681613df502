"""Receptive fields against a gradient probe: which pixels of the input a feature really depends on."""

from __future__ import annotations

import copy
import doctest
import math
import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrastseg_fast.receptive_field import (
    ReceptiveField,
    field,
    receptive_fields,
    stack_receptive_field,
    trace,
    trace_layers,
)

Interval = tuple[int, int]  # pixels [low, high)


def linear(model: nn.Module) -> nn.Module:
    """The model in float64 with positive weights, averages for maxima, and without norms and activations.

    Its features see the same pixels, and no gradient vanishes.
    """
    model = copy.deepcopy(model).double().eval()
    elementwise = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Dropout)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, elementwise):
                setattr(module, name, nn.Identity())
            elif isinstance(child, (nn.MaxPool2d, nn.MaxPool3d)):
                average = nn.AvgPool2d if isinstance(child, nn.MaxPool2d) else nn.AvgPool3d
                setattr(module, name, average(child.kernel_size, child.stride, child.padding))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
    return model


def probe(
    model: nn.Module, input_shape: tuple[int, ...], layer: str, axis: int, at_most: int
) -> dict[int, Interval]:
    """The pixels along an axis that features see, by index; in the middle of the other axes."""
    model = linear(model)
    outputs: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(torch.zeros(input_shape, dtype=torch.float64))
    count = outputs.pop().shape[2 + axis]
    indices = sorted(range(count), key=lambda i: (0 < i < count - 1, abs(i - count // 2)))[:at_most]
    x = torch.ones((len(indices), *input_shape[1:]), dtype=torch.float64, requires_grad=True)
    model(x)
    features = outputs.pop()
    place = [extent // 2 for extent in features.shape[2:]]
    total = x.new_zeros(())
    for image, place[axis] in enumerate(indices):
        total = total + features[(image, slice(None), *place)].sum()
    (gradient,) = torch.autograd.grad(total, x)
    weight = gradient.abs().amax([dim for dim in range(1, x.ndim) if dim != 2 + axis])
    seen = {}
    for index, row in zip(indices, weight, strict=True):
        pixels = (row > 1e-9 * row.max()).nonzero().flatten().tolist()
        if pixels:
            seen[index] = (pixels[0], pixels[-1] + 1)
    return seen


def smallest_size(intervals: dict[int, Interval], stride: Fraction) -> int:
    """The least size of intervals from `floor(start + i * stride)` that hold these, by trying all starts."""
    unit = Fraction(1, stride.denominator)
    first = min(math.floor(low - i * stride) for i, (low, _) in intervals.items()) - 1
    sizes = []
    for k in range(4 * stride.denominator):
        start = first + k * unit
        if all(math.floor(start + i * stride) <= low for i, (low, _) in intervals.items()):
            sizes.append(max(high - math.floor(start + i * stride) for i, (_, high) in intervals.items()))
    return min(sizes)


def fields_inside(
    model: nn.Module, input_shape: tuple[int, ...], layer: str, margin: int = 0, at_most: int = 99
) -> Iterator[tuple[Fraction, int, dict[int, Interval], dict[int, Interval]]]:
    """For each axis: our stride and size, and our and the true intervals of the features inside the image.

    Checks that our intervals, cut at the rim of the image, hold the true ones of all features.
    """
    field = receptive_fields(model, input_shape, layer)[layer]
    assert not field.is_infinite
    for axis, extent in enumerate(input_shape[2:]):
        true = probe(model, input_shape, layer, axis, at_most)
        stride, start, size = Fraction(field.stride[axis]), field.start[axis], field.size[axis]
        ours = {i: (math.floor(start + i * stride), math.floor(start + i * stride) + size) for i in true}
        for i, (low, high) in true.items():
            assert max(ours[i][0], 0) <= low, (field, axis, i, ours[i], true[i])
            assert min(ours[i][1], extent) >= high, (field, axis, i, ours[i], true[i])
        inside = [i for i in true if ours[i][0] >= margin and ours[i][1] <= extent - margin]
        yield stride, size, {i: ours[i] for i in inside}, {i: true[i] for i in inside}


def check_exact(model: nn.Module, input_shape: tuple[int, ...], layer: str, **options: int) -> None:
    for _, _, ours, true in fields_inside(model, input_shape, layer, **options):
        assert len(true) >= 2
        assert ours == true


def check_smallest(model: nn.Module, input_shape: tuple[int, ...], layer: str, **options: int) -> None:
    for stride, size, _, true in fields_inside(model, input_shape, layer, **options):
        assert len(true) >= 2
        assert smallest_size(true, stride) == size


PLAIN = {
    "convolutions and poolings": nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        nn.Conv2d(2, 2, (3, 5), stride=2, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 3, dilation=2, padding=2),
    ),
    "even kernels, uneven padding, cropping": nn.Sequential(
        nn.ZeroPad2d((1, 0, 2, 1)),
        nn.Conv2d(1, 2, 4, stride=3),
        nn.ZeroPad2d((-1, 0, 0, -2)),
        nn.Conv2d(2, 2, 2),
    ),
    "padding='same'": nn.Sequential(nn.Conv2d(1, 2, 4, padding="same"), nn.Conv2d(2, 1, 3, padding="same")),
    "reflected padding": nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
    ),
    "depthwise": nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 5, groups=4), nn.Conv2d(4, 2, 1)),
    "pixel unshuffle": nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 2, 3), nn.MaxPool2d(2)),
    "pixel shuffle undone": nn.Sequential(
        nn.Conv2d(1, 4, 3, 2),
        nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
        nn.ChannelShuffle(2),
        nn.Conv2d(4, 1, 2),
    ),
}

UPSAMPLED = {
    "transposed convolution": nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.ConvTranspose2d(2, 2, 4, 2, 1)),
    "transposed convolution with gaps": nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 2, 1, 2, output_padding=1), nn.Conv2d(2, 2, 3)
    ),
    "dilated transposed convolution": nn.Sequential(
        nn.ConvTranspose2d(1, 2, (3, 2), (3, 1), (2, 0), dilation=2), nn.Conv2d(2, 2, 3)
    ),
    "pixel shuffle": nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.PixelShuffle(2), nn.Conv2d(1, 1, 3)),
    **{
        f"{mode}, {amount}, align_corners={corners}": nn.Sequential(
            nn.Conv2d(1, 2, 3, 2, padding=1),
            nn.Upsample(**amount, mode=mode, align_corners=corners),
            nn.Conv2d(2, 1, 3, padding=1),
        )
        for mode, corners in [
            ("nearest", None),
            ("nearest-exact", None),
            ("bilinear", False),
            ("bilinear", True),
            ("bicubic", False),
        ]
        for amount in [{"scale_factor": 2}, {"scale_factor": 1.5}, {"size": (20, 24)}]
    },
}


@pytest.mark.parametrize("name", PLAIN)
def test_fields_of_every_layer_are_exact(name: str) -> None:
    for layer in range(len(PLAIN[name])):
        check_exact(PLAIN[name], (1, 1, 40, 36), str(layer))


def test_fields_of_volumes_are_exact() -> None:
    model = nn.Sequential(
        nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1)),
        nn.Conv3d(2, 2, (3, 3, 2), stride=(1, 2, 2)),
        nn.AvgPool3d((1, 2, 2), (1, 1, 2)),
    )
    for layer in range(len(model)):
        check_exact(model, (1, 1, 8, 16, 18), str(layer))


@pytest.mark.parametrize("name", UPSAMPLED)
def test_fields_behind_upsampling_are_the_smallest(name: str) -> None:
    check_smallest(UPSAMPLED[name], (1, 1, 32, 36), str(len(UPSAMPLED[name]) - 1))


def test_fields_behind_trilinear_upsampling_are_the_smallest() -> None:
    up = nn.Upsample(scale_factor=2, mode="trilinear")
    check_smallest(nn.Sequential(nn.Conv3d(1, 1, 3, 2, 1), up, nn.Conv3d(1, 1, 3)), (1, 1, 14, 15, 16), "2")


def test_series_have_one_axis() -> None:
    up = nn.Upsample(scale_factor=2, mode="linear")
    check_smallest(nn.Sequential(nn.Conv1d(1, 1, 3, 2, 1), up, nn.Conv1d(1, 1, 4)), (1, 1, 40), "2")


class Between(nn.Module):
    """A convolution, a function of its output, and a place to look at the result."""

    def __init__(self, function: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.second = nn.Conv2d(2, 2, 3, padding=1)
        self.function = function
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self, self.first(x)))


def paste(net: Between, x: Tensor) -> Tensor:
    canvas = x.new_zeros(x.shape[0], 2, 36, 36)
    canvas[:, :, 2:-2, 2:-2] = x
    return net.second(canvas)


def add_in_place(net: Between, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :1].add_(net.second(net.second(x))[:, :1])
    return y


def window_attention(net: Between, x: Tensor) -> Tensor:
    batch = x.shape[0]
    windows = x.view(batch, 2, 8, 4, 8, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 2)
    mixed = (windows @ windows.mT) @ windows
    return mixed.view(batch, 8, 8, 4, 4, 2).permute(0, 5, 1, 3, 2, 4).reshape(batch, 2, 32, 32)


def haar(net: Between, x: Tensor) -> Tensor:
    up = x.new_zeros(x.shape[0], 2, 64, 64)
    up[:, :, ::2, ::2] = x
    up[:, :, 1::2, ::2] = net.second(x)
    up[:, :, ::2, 1::2] = x
    up[:, :, 1::2, 1::2] = x
    return net.second(up)


def resize_to_skip(net: Between, x: Tensor) -> Tensor:
    low = F.interpolate(F.avg_pool2d(x, 2)[:, :, :15, :15], size=(31, 31), mode="bilinear")
    return x[:, :, :31, :31] + low


def sliding_windows(net: Between, x: Tensor) -> Tensor:
    windows = x.as_strided((x.shape[0], 2, 30, 15, 3, 3), (2048, 1024, 32, 2, 32, 1))
    return windows.sum((4, 5))


def linear_over_tokens(net: Between, x: Tensor) -> Tensor:
    tokens = F.linear(x.flatten(2).mT, x.new_ones(3, 2))
    return tokens.mT.unflatten(2, (32, 32))


def patches_into_channels(net: Between, x: Tensor) -> Tensor:
    patches = x.view(-1, 2, 16, 2, 16, 2).permute(0, 1, 3, 5, 2, 4)
    return F.max_pool2d(patches.reshape(-1, 8, 16, 16), 1, 2)


def inference(net: Between, x: Tensor) -> Tensor:
    with torch.inference_mode(not x.requires_grad):
        x = F.interpolate(net.second(x).reshape(-1, 2, 32, 32), scale_factor=3)
        return F.avg_pool2d(F.interpolate(x, scale_factor=0.5, mode="bilinear"), 2)


EXACT: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "skip connection": lambda net, x: net.second(x) + x,
    "in-place skip connection": add_in_place,
    "concatenation": lambda net, x: torch.cat([net.second(net.second(x)), F.avg_pool2d(x, 3, 1, 1)], 1),
    "cropped skip connection": lambda net, x: F.conv2d(x, net.second.weight) + x[:, :, 1:-1, 1:-1],
    "slicing": lambda net, x: net.second(x)[:, :, 3:-2, 1:],
    "every second pixel": lambda net, x: net.second(x[:, :, ::2, 1::2]),
    "F.pad": lambda net, x: F.conv2d(F.pad(x, (0, 3, 1, 0)), net.second.weight),
    "padding by concatenation": lambda net, x: net.second(torch.cat([torch.zeros_like(x[:, :, :3]), x], 2)),
    "pasting into zeros": paste,
    "split and joined again": lambda net, x: net.second(torch.cat(x.split([10, 22], 2), 2)),
    "Tensor.unfold": lambda net, x: x.unfold(2, 3, 1).unfold(3, 5, 2).mean((-1, -2)),
    "F.unfold": lambda net, x: F.unfold(x, 3, padding=1, stride=2).mean(1).view(-1, 1, 16, 16),
    "as_strided": sliding_windows,
    "linear over channels": lambda net, x: F.linear(x.movedim(1, -1), x.new_ones(3, 2)).movedim(-1, 1),
    "linear over tokens": linear_over_tokens,
    "einsum": lambda net, x: torch.einsum("bchw,dc->bdhw", x, net.second.weight[:, :, 0, 0]),
    "pooling by reshape": lambda net, x: x.view(-1, 2, 16, 2, 16, 2).sum((3, 5)),
    "patches into channels": patches_into_channels,
    "flipped and back": lambda net, x: F.conv2d(x.flip(2, 3), net.second.weight[:, :, :2]).flip(2, 3),
    "flipped": lambda net, x: F.conv2d(x.flip(2, 3), net.second.weight[:, :, :2]),
    "folding patches": lambda net, x: F.fold(x.flatten(2).repeat(1, 4, 1), (64, 64), 2, stride=2),
    "repeat_interleave": lambda net, x: x.repeat_interleave(2, 2).repeat_interleave(3, 3),
}  # fmt: skip

SMALLEST: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "writing every second pixel": haar,
    "attention within windows": window_attention,
    "skip connection to a resized map": resize_to_skip,
    "convolution behind repeat_interleave": lambda net, x: net.second(x.repeat_interleave(2, 2)),
    "inference mode": inference,
    "down and up": lambda net, x: (
        x + F.interpolate(net.second(F.avg_pool2d(x, 2)), scale_factor=2, mode="bilinear")
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_operators_that_keep_fields_equal(name: str) -> None:
    check_exact(Between(EXACT[name]), (1, 1, 32, 32), "out", margin=2)


@pytest.mark.parametrize("name", SMALLEST)
def test_operators_that_make_fields_differ(name: str) -> None:
    check_smallest(Between(SMALLEST[name]), (1, 1, 32, 32), "out")


class RandomNetwork(nn.Module):
    """Up to six random steps along one axis: kernels of all sizes, strides, dilations, and resizing."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        kinds = ["conv", "conv", "pool", "nearest", "linear", "transposed", "slice", "skip", "flip", "pad"]
        self.steps = [
            (
                rng.choice(kinds),
                rng.randint(1, 5),
                rng.randint(1, 3),
                rng.randint(1, 2),
                rng.choice([2, 3, 1.5]),
            )
            for _ in range(rng.randint(2, 6))
        ]

    def forward(self, x: Tensor) -> Tensor:
        for kind, kernel, stride, dilation, scale in self.steps:
            taps = torch.ones(1, 1, kernel, dtype=x.dtype)
            match kind:
                case "conv" if x.shape[-1] > 14:
                    x = F.conv1d(x, taps, stride=stride, padding=kernel // 2, dilation=dilation)
                case "pool" if x.shape[-1] > 14:
                    x = F.avg_pool1d(x, kernel, stride)
                case "slice" if x.shape[-1] > 14:
                    x = x[..., kernel::stride]
                case "nearest" | "linear" if x.shape[-1] < 120:
                    x = F.interpolate(x, scale_factor=scale, mode=kind)
                case "transposed" if x.shape[-1] < 120:
                    x = F.conv_transpose1d(x, taps, stride=stride, dilation=dilation)
                case "skip":
                    x = x + F.conv1d(F.pad(x, (kernel - 1, 0)), taps)
                case "flip":
                    x = F.conv1d(x.flip(-1), taps, padding=kernel // 2).flip(-1)
                case "pad":
                    x = F.pad(x, (kernel, -stride))
        return x


@pytest.mark.parametrize("seed", range(60))
def test_random_networks(seed: int) -> None:
    for stride, size, _, true in fields_inside(RandomNetwork(seed), (1, 1, 96), "", margin=8):
        if len(true) > 2 * stride.denominator:  # all sizes that occur are among them
            assert smallest_size(true, stride) == size


MONAI: dict[str, tuple[str, dict[str, Any], tuple[int, ...], list[str], list[str]]] = {
    # name of the class, arguments, input shape, layers before and layers behind up-sampling
    "UNet": (
        "UNet",
        {"spatial_dims": 2, "channels": (2, 3, 4), "strides": (2, 2), "num_res_units": 2},
        (1, 1, 64, 72),
        ["model.0", "model.1.submodule.0", "model.1.submodule.1"],
        ["model.1.submodule.2.0", "model.1", "model.2"],
    ),
    "UNet 3D": (
        "UNet",
        {"spatial_dims": 3, "channels": (2, 2), "strides": (2,), "num_res_units": 1},
        (1, 1, 16, 24, 16),
        ["model.0", "model.1"],
        ["model.2"],
    ),
    "BasicUNet": (
        "BasicUNet",
        {"spatial_dims": 2, "features": (2,) * 6},
        (1, 1, 200, 200),
        ["conv_0", "down_1", "down_2"],
        ["upcat_4"],
    ),
    "BasicUNet with bilinear up-sampling": (
        "BasicUNet",
        {"spatial_dims": 2, "features": (2,) * 6, "upsample": "nontrainable"},
        (1, 1, 216, 216),
        [],
        ["upcat_4"],
    ),
    "SegResNet": (
        "SegResNet",
        {"spatial_dims": 2, "init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)},
        (1, 1, 72, 80),
        ["down_layers.0", "down_layers.1", "down_layers.2"],
        ["up_samples.0", "up_layers.0", "conv_final"],
    ),
    "SegResNet 3D": (
        "SegResNet",
        {"spatial_dims": 3, "init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)},
        (1, 1, 22, 22, 22),
        ["down_layers.1"],
        ["up_samples.0"],
    ),
    "DynUNet": (
        "DynUNet",
        {
            "spatial_dims": 2,
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [2, 2, 2],
        },
        (1, 1, 72, 64),
        ["input_block", "downsamples.0", "bottleneck"],
        ["upsamples.0", "output_block"],
    ),
    "DynUNet 3D, anisotropic": (
        "DynUNet",
        {
            "spatial_dims": 3,
            "kernel_size": [(1, 3, 3), (3, 3, 3), 3],
            "strides": [1, (1, 2, 2), 1],
            "upsample_kernel_size": [(1, 2, 2), 1],
            "filters": [2, 2, 2],
            "res_block": True,
        },
        (1, 1, 18, 36, 36),
        ["downsamples.0"],
        ["output_block"],
    ),
}


@pytest.mark.parametrize("name", MONAI)
def test_monai_networks(name: str) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    network, options, input_shape, before, behind = MONAI[name]
    model = getattr(nets, network)(in_channels=1, out_channels=2, **options)
    for layer in before:
        check_exact(model, input_shape, layer, at_most=6)
    for layer in behind:
        check_smallest(model, input_shape, layer, at_most=6)


def test_a_stack_agrees_with_equation_5() -> None:
    kernels, strides, paddings, dilations = (
        [3, (3, 5), 2, 4],
        [2, (1, 2), 2, 1],
        [1, (1, 2), 0, 3],
        [1, 1, 1, (2, 1)],
    )
    layers = [nn.Conv2d(1, 1, *row) for row in zip(kernels, strides, paddings, dilations, strict=True)]
    expected = receptive_fields(nn.Sequential(*layers), (1, 1, 99, 101), "3")["3"]
    assert stack_receptive_field(kernels, strides, paddings, dilations) == expected


INFINITE: dict[str, tuple[Callable[[Between, Tensor], Tensor], tuple[int, ...], str]] = {
    # function, axes along which the field is infinite, operator that is named as the reason
    "global average": (lambda net, x: x * x.mean((2, 3), keepdim=True), (0, 1), "aten.mean"),
    "average of each row": (lambda net, x: x * x.mean(3, keepdim=True), (1,), "aten.mean"),
    "adaptive pooling": (lambda net, x: F.adaptive_max_pool2d(x, 4), (0, 1), "aten.adaptive_max_pool2d"),
    "linear over rows": (lambda net, x: x @ x.new_ones(32, 32), (1,), "aten.mm"),
    "attention": (
        lambda net, x: F.scaled_dot_product_attention(*[x.flatten(2).mT] * 3).mT.unflatten(2, (32, 32)),
        (0, 1),
        "aten.",
    ),
    "attention by products": (
        lambda net, x: ((x.flatten(2).mT @ x.flatten(2)) @ x.flatten(2).mT).mT.unflatten(2, (32, 32)),
        (0, 1),
        "aten.bmm",
    ),
    "attention over channels": (
        lambda net, x: ((x.flatten(2) @ x.flatten(2).mT) @ x.flatten(2)).unflatten(2, (32, 32)),
        (0, 1),
        "aten.bmm",
    ),
    "FFT": (lambda net, x: torch.fft.ifft2(torch.fft.fft2(x)).real, (0, 1), "aten._fft_c2c"),
    "softmax over columns": (lambda net, x: x.softmax(2), (0,), "aten._softmax"),
    "roll": (lambda net, x: x.roll(1, 3), (1,), "aten.roll"),
    "sorting": (lambda net, x: x.sort(2).values, (0,), "aten.sort"),
    "sampling on a grid": (
        lambda net, x: F.grid_sample(x, x.new_zeros(1, 4, 4, 2), align_corners=False),
        (0, 1),
        "aten.grid_sampler_2d",
    ),
    "x + x.T": (lambda net, x: x + x.mT, (0, 1), "aten.add"),
    "indexing rows": (lambda net, x: x[:, :, torch.arange(3)], (0,), "aten.index"),
    "kernels made of the image": (lambda net, x: F.conv2d(x, x[:, :, :3, :3]), (0, 1), "aten.convolution"),
    "writing rows by index": (
        lambda net, x: x.new_zeros(1, 2, 32, 32).index_put((torch.tensor([0]), torch.tensor([0])), x[0, 0]),
        (0, 1),
        "aten.index_put",
    ),
}


@pytest.mark.parametrize("name", INFINITE)
def test_what_cannot_be_known_is_infinite(name: str) -> None:
    function, axes, reason = INFINITE[name]
    field = receptive_fields(Between(function), (1, 1, 32, 32), "out")["out"]
    assert field.is_infinite
    assert [axis for axis in (0, 1) if field.size[axis] == math.inf] == list(axes)
    assert [field.size[axis] for axis in (0, 1) if axis not in axes] == [3] * (2 - len(axes))
    assert reason in field.reason
    assert f"INFINITE along axis {', '.join(map(str, axes))}, because of {reason}" in repr(field)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def attended(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x) + x


def shifted(x: Tensor) -> Tensor:
    return x.roll((1, 1), (2, 3))


def with_class_token(net: Between, x: Tensor) -> Tensor:
    added = attended(torch.cat([x.new_zeros(1, 1, 2), tokens(x), x.new_zeros(1, 3, 2)], 1))
    return added[:, 1:-3].mT.reshape(x.shape)


def fast_path(net: Between, x: Tensor) -> Tensor:
    layer = nn.TransformerEncoderLayer(2, 1, 4)
    parts = [getattr(layer, name) for name in ("norm1", "norm2", "linear1", "linear2")]
    weights = [value for part in parts for value in (part.weight, part.bias)]
    heads = layer.self_attn
    projections = [heads.in_proj_weight, heads.in_proj_bias, heads.out_proj.weight, heads.out_proj.bias]
    done, _ = torch._native_multi_head_attention(*[tokens(x)] * 3, 2, 1, *projections)
    done = torch._transformer_encoder_layer_fwd(done, 2, 1, *projections, False, False, 1e-5, *weights)
    return done.mT.reshape(x.shape)


def fewer_keys(net: Between, x: Tensor) -> Tensor:
    queries, keys = tokens(x), tokens(F.avg_pool2d(x, 4))
    return ((queries @ keys.mT).softmax(-1) @ keys).mT.reshape(x.shape)


def shifted_windows(net: Between, x: Tensor) -> Tensor:
    """Windows of 5 that need padding, with attention inside."""
    y = F.pad(x, (0, 3, 0, 3)).roll((-2, -2), (2, 3))
    y = y.view(1, 2, 7, 5, 7, 5).permute(0, 2, 4, 3, 5, 1).reshape(49, 25, 2)
    y = ((y @ y.mT).softmax(-1) @ y).view(1, 7, 7, 5, 5, 2).permute(0, 5, 1, 3, 2, 4).reshape(1, 2, 35, 35)
    return x + y.roll((2, 2), (2, 3))[:, :, :32, :32]


def merged_patches(net: Between, x: Tensor) -> Tensor:
    last = shifted(x).roll((-1, -1), (2, 3)).permute(0, 2, 3, 1)
    parts = torch.cat([last[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
    return F.linear(parts, x.new_ones(2, 8)).permute(0, 3, 1, 2)


def axial(net: Between, x: Tensor) -> Tensor:
    columns = attended(x.permute(0, 3, 2, 1).reshape(32, 32, 2))
    return columns.view(1, 32, 32, 2).permute(0, 3, 2, 1)


def spectral(net: Between, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x)
    mixed = F.conv2d(torch.cat([spectrum.real, spectrum.imag], 1), x.new_ones(4, 4, 1, 1))
    return torch.fft.irfft2(torch.complex(*mixed.chunk(2, 1)), s=x.shape[2:])


LOCATED: dict[str, tuple[Callable[[Between, Tensor], Tensor], int, int | Fraction, int]] = {
    # function; size, stride and start of the location
    "squeeze and excitation": (lambda net, x: x * x.mean((2, 3), keepdim=True), 3, 1, -1),
    "convolution behind it": (lambda net, x: net.second(x * x.mean((2, 3), keepdim=True)), 5, 1, -2),
    "attention with class and register tokens": (with_class_token, 3, 1, -1),
    "fast path of a transformer layer": (fast_path, 3, 1, -1),
    "attention to fewer keys": (fewer_keys, 3, 1, -1),
    "attention over channels": (
        lambda net, x: ((x.flatten(2) @ tokens(x)) @ x.flatten(2)).view(x.shape),
        3,
        1,
        -1,
    ),
    "shifted windows": (shifted_windows, 3, 1, -1),
    "merged patches": (merged_patches, 4, 2, -1),
    "axial attention and back": (lambda net, x: axial(net, axial(net, x).mT).mT, 3, 1, -1),
    "Fourier transform and back": (spectral, 3, 1, -1),
    "shift": (lambda net, x: shifted(x), 3, 1, -2),
    "up-sampling by repetition": (
        lambda net, x: shifted(x).repeat_interleave(2, 2).repeat_interleave(2, 3),
        3,
        Fraction(1, 2),
        -2,
    ),
    "several bins": (lambda net, x: F.adaptive_avg_pool2d(x, 4), 10, 8, -1),
    "pyramid of poolings": (
        lambda net, x: torch.cat([x, F.interpolate(F.adaptive_avg_pool2d(x, 1), size=32)], 1),
        3,
        1,
        -1,
    ),
    "pixel unshuffle": (lambda net, x: F.pixel_unshuffle(shifted(x), 2), 4, 2, -2),
    "patches into channels": (
        lambda net, x: F.unfold(shifted(x), 3, padding=1).view(1, 18, 32, 32),
        5,
        1,
        -3,
    ),
}


@pytest.mark.parametrize("name", LOCATED)
def test_infinite_fields_know_where_their_vectors_lie(name: str) -> None:
    function, size, stride, start = LOCATED[name]
    run = trace_layers(Between(function), (1, 1, 32, 32), ["out"])["out"]
    assert not run.why_no_map
    field = run.receptive_field
    assert field.is_infinite
    assert field.location == ReceptiveField((size,) * 2, (stride,) * 2, (start,) * 2)


def token_lost(net: Between, x: Tensor) -> Tensor:
    added = attended(torch.cat([x.new_zeros(1, 1, 2), tokens(x)], 1))
    return added[:, :-1].mT.reshape(x.shape)


NO_MAPS: dict[str, tuple[Callable[[Between, Tensor], Tensor], str]] = {
    "channels last": (lambda net, x: x.movedim(1, 3), r"axis 0 .* along dimension 1, axis 1 .* dimension 2"),
    "channels last, shifted": (
        lambda net, x: shifted(x).movedim(1, 3),
        r"axis 0 .* dimension 1, axis 1 .* 2",
    ),
    "transposed": (lambda net, x: shifted(x).mT, r"axis 0 .* along dimension 3, axis 1 .* along dimension 2"),
    "tokens": (
        lambda net, x: attended(tokens(x)),
        r"axis 0 .* along dimension 1, axis 1 .* along dimension 1",
    ),
    "attention weights": (
        lambda net, x: (tokens(x) @ x.flatten(2)).softmax(-1)[:, None],
        r"axis 0 .* along dimensions \[2, 3\], axis 1 .* along dimensions \[2, 3\]",
    ),
    "attention weights of columns": (
        lambda net, x: (x.permute(0, 3, 2, 1) @ x.permute(0, 3, 1, 2)).softmax(-1).permute(0, 3, 2, 1),
        r"axis 0 .* along dimensions \[1, 2\], axis 1 .* along dimension 3",
    ),
    "windows in the batch": (
        lambda net, x: shifted(x).view(2, 8, 4, 8, 4).permute(1, 3, 0, 2, 4).reshape(64, 2, 4, 4),
        r"axis 0 .* along dimensions \[0, 2\], axis 1 .* along dimensions \[0, 3\]",
    ),
    "interleaved rows": (
        lambda net, x: shifted(x).view(1, 2, 8, 4, 32).transpose(2, 3).reshape(x.shape),
        "axis 0 of the image lies not in order along dimension 2, axis 1",
    ),
    "interleaved rows of finite fields": (
        lambda net, x: x.view(1, 2, 8, 4, 32).transpose(2, 3).reshape(x.shape),
        "axis 0 of the image lies not in order along dimension 2, axis 1",
    ),
    "spectrum": (
        lambda net, x: torch.fft.fft2(x).abs(),
        r"axis 0 .* not in order .* 2, axis 1 .* not in ord",
    ),
    "class token among the others": (
        token_lost,
        r"aten\.slice\.Tensor hid where axis 0 .* lies, aten\.slice",
    ),
    "sorted": (
        lambda net, x: x.sort(2).values,
        r"aten\.sort\.\w+ hid where axis 0 .* lies, axis 1 .* dimension 3",
    ),
    "mixed rows": (
        lambda net, x: x.mT @ x.new_ones(32, 32),
        r"aten\.\w+\.default hid where axis 0 .* lies, axis 1 .* dimension 2",
    ),
    "one pixel for all": (
        lambda net, x: F.interpolate(x.mean((2, 3), keepdim=True), size=32),
        r"aten\.mean\.dim hid where axis 0 of the image lies, aten\.mean\.dim hid where axis 1",
    ),
    "recurrent layer": (lambda net, x: nn.GRU(32, 32)(x[0])[0][None], "hid where axis 0 .*hid where axis 1"),
}


# Here no axis is known to lie along a wrong dimension.
LOST = ("class token among the others", "sorted", "one pixel for all", "recurrent layer")


@pytest.mark.parametrize("name", NO_MAPS)
def test_what_is_no_map_is_never_called_one(name: str) -> None:
    function, reason = NO_MAPS[name]
    run = trace_layers(Between(function), (1, 1, 32, 32), ["out"])["out"]
    assert re.search(reason, run.why_no_map)
    with pytest.raises(ValueError, match=f"layers: expected layers whose output is a feature map .*{reason}"):
        run.check_map()
    if name not in LOST:
        with pytest.raises(ValueError, match=reason):
            _ = run.receptive_field
    else:
        field = run.receptive_field
        assert field.is_infinite
        assert field.location is None
        assert re.search(reason, field.reason)


def test_linear_over_space_is_infinite() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 5))
    field = receptive_fields(model, (1, 1, 8, 8), ["2"])["2"]
    assert field.size == (math.inf, math.inf)


def test_normalisation_counts_as_elementwise() -> None:
    norms = [
        nn.InstanceNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 30, 30]),
        nn.BatchNorm2d(4, track_running_stats=False),
    ]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), *norms)
    assert receptive_fields(model, (1, 1, 32, 32), "4")["4"].size == (3, 3)


IN_PLACE = ("CELU", "ELU", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "Mish", "RReLU", "ReLU")
IN_PLACE += ("ReLU6", "SELU", "SiLU")
ACTIVATIONS = (*IN_PLACE, "GELU", "Hardshrink", "LogSigmoid", "PReLU", "Sigmoid", "Softplus", "Softshrink")
ACTIVATIONS += ("Softsign", "Tanh", "Tanhshrink")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_elementwise(name: str) -> None:
    """Also those that some version of torch does not tag so."""
    for options in [{}, {"inplace": True}] if name in IN_PLACE else [{}]:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), getattr(nn, name)(**options))
        assert receptive_fields(model, (1, 1, 32, 32), "1")["1"].size == (3, 3)


def test_circular_padding_lies_outside_the_image() -> None:
    circular, zeros = (
        nn.Sequential(nn.Conv2d(1, 2, 5, 2, 2, padding_mode=mode)) for mode in ("circular", "zeros")
    )
    assert receptive_fields(circular, (1, 1, 32, 32), "0") == receptive_fields(zeros, (1, 1, 32, 32), "0")


class Changeable(nn.Module):
    """Does in its forward pass whatever a module should not, and uses every source of randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3))
        self.norm = nn.BatchNorm2d(2)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(3))
        self.plain = torch.zeros(2)
        self.seen: dict[str, list[Tensor]] = {"x": []}
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.count.add_(1)
        self.count += 1
        self.plain.add_(1)
        self.seen["x"].append(x)
        self.last = x
        self.train()
        random.random()
        np.random.rand()  # noqa: NPY002
        x = self.norm(self.conv(x)) * torch.rand(2, 1, 1)
        if "fail" in self.seen:
            raise KeyError("fail")
        return {"out": self.drop(x), "other": x}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = Changeable().half()
    model.drop.eval()
    if fails:
        model.seen["fail"] = []
    hooked: list[int] = []
    model.conv.register_forward_hook(lambda *_: hooked.append(1))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    generators = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()]  # noqa: NPY002
    if fails:
        with pytest.raises(KeyError, match="fail"):
            receptive_fields(model, (1, 1, 8, 8), ["drop"])
    else:
        assert receptive_fields(model, (1, 1, 8, 8), ["drop", ""])[""].size == (3, 3)
    assert hooked == [1]
    assert [module.training for module in model.modules()] == [m is not model.drop for m in model.modules()]
    assert model.seen["x"] == []
    assert model.last is None
    assert torch.equal(model.plain, torch.zeros(2))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for name, module in model.named_modules():
        assert module.__dict__.keys() == attributes[name].keys()
        assert all(module.__dict__[key] is value for key, value in attributes[name].items())
        assert not any(hook for hook in module._forward_hooks.values() if "watch" in repr(hook))
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()  # noqa: NPY002


def test_the_last_run_of_a_layer_counts() -> None:
    conv = nn.Conv2d(1, 1, 3)
    fields = receptive_fields(nn.Sequential(conv, nn.ReLU(), conv), (1, 1, 16, 16), ["0", "1", "2"])
    assert [fields[name].size for name in "012"] == [(5, 5), (3, 3), (5, 5)]


def test_a_compiled_part_runs_uncompiled() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), torch.compile(nn.Conv2d(2, 2, 3)))
    assert receptive_fields(model, (1, 1, 16, 16), "1")["1"].size == (5, 5)


def test_layers_that_do_not_exist() -> None:
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(nn.Conv2d(1, 1, 3), nn.Identity()))
    with pytest.raises(ValueError, match=r"layers: .*got 'encoder\.3'; near names: 'encoder"):
        receptive_fields(model, (1, 1, 8, 8), ["encoder", "encoder.3"])
    with pytest.raises(ValueError, match=r"got '1'; near names: 'encoder\.1'"):
        receptive_fields(model, (1, 1, 8, 8), "1")
    with pytest.raises(ValueError, match=r"got 'zzz'; first names: \['encoder', 'encoder.0'"):
        receptive_fields(model, (1, 1, 8, 8), ["zzz"])


class Skips(nn.Module):
    """Has a layer that does not run, one that does not see the input, and two that return no map."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.constant, self.tokens, self.last = (nn.Identity() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.constant(torch.ones_like(x))
        self.tokens(x.flatten(2).mT)
        self.last(x.movedim(1, -1))
        return x


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("idle", "layers: expected layers that run and return tensors, got 'idle'"),
        ("constant", "layers: the output of 'constant' does not depend on the model's input"),
        ("tokens", r"layers: expected layers whose output is a feature map .* got 'tokens'.*\(1, 64, 1\)"),
        ("last", r"layers: expected layers whose output is a feature map .* got 'last'.*\(1, 8, 8, 1\)"),
    ],
)
def test_layers_without_a_field(layer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        receptive_fields(Skips(), (1, 1, 8, 8), [layer])


def test_watched_layers_need_not_run_unless_required() -> None:
    model, shape = Skips(), (1, 1, 8, 8)
    names = ["idle", "constant", "last"]
    with pytest.raises(ValueError, match="layers: expected layers that run and return tensors, got 'idle'"):
        trace_layers(model, shape, names)
    assert list(trace_layers(model, shape, names, required=())) == ["constant", "last"]
    assert list(trace_layers(model, shape, names, required=["last"])) == ["constant", "last"]
    assert list(trace_layers(model, shape, ["last"], required=["constant"])) == ["constant", "last"]
    for watched in (names, None):
        with pytest.raises(ValueError, match="got 'idle', which did not"):
            trace_layers(model, shape, watched, required=["last", "idle"])
        with pytest.raises(ValueError, match="got 'lost'; near names: 'last'"):
            trace_layers(model, shape, watched, required=["lost"])


def test_layers_are_watched_under_each_name_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())
    model.add_module("again", model[0])
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    runs = trace_layers(model, (1, 1, 16, 16), names, required=())
    assert set(runs) == {"", "0", "1", "again"}
    assert runs["0"].output is runs["again"].output
    assert runs["again"].receptive_field.size == (5, 5)
    assert runs["again"].times == 2
    assert set(trace_layers(model, (1, 1, 16, 16))) == {"", "0", "1"}
    assert set(trace_layers(model, (1, 1, 16, 16), required=["again"])) == {"", "0", "1", "again"}


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_models_that_cannot_run_without_data() -> None:
    with pytest.raises(RuntimeError, match="model: expected one that does not read values of tensors"):
        receptive_fields(Branches(), (1, 1, 8, 8), "")
    with pytest.raises(ValueError, match="model: expected initialised parameters, got lazy ones"):
        receptive_fields(nn.LazyConv2d(2, 3), (1, 1, 8, 8), "")


@pytest.mark.parametrize("shape", [(1, 8), "11", (1, 1, 0, 8), 8])
def test_input_shapes_that_do_not_fit(shape: Any) -> None:
    with pytest.raises(ValueError, match="input_shape: expected"):
        receptive_fields(nn.Conv2d(1, 1, 3), shape, "")


def test_starts_are_exact() -> None:
    strides = [3, Fraction(2, 3), Fraction(-1, 2), 0]
    starts = [Fraction(-7, 2), -5, Fraction(10**9, 7), Fraction(-1, 3)]
    field = ReceptiveField((5,) * 4, tuple(strides), tuple(starts))
    indices = torch.randint(0, 10**6, (50, 4), dtype=torch.int32)
    expected = [
        [math.floor(start + i * stride) for start, i, stride in zip(starts, row, strides, strict=True)]
        for row in indices.tolist()
    ]
    assert field.starts(indices).tolist() == expected
    assert field.starts(indices).dtype == torch.int64
    assert field.starts(indices[:0]).shape == (0, 4)
    for axis, grid in enumerate(field.grids):
        column = indices[:, axis].long()
        assert [grid.first_pixel(index) for index in column.tolist()] == field.starts(indices)[
            :, axis
        ].tolist()
        assert np.array_equal(grid.first_pixel(column.numpy()), field.starts(indices)[:, axis].numpy())


def test_starts_compile_into_one_graph() -> None:
    field = ReceptiveField((5, 4), (Fraction(2, 3), 4), (Fraction(-7, 2), -5))
    compiled = torch.compile(field.starts, backend="eager", fullgraph=True, dynamic=True)
    for count in (3, 5):
        indices = torch.randint(0, 100, (count, 2))
        assert torch.equal(compiled(indices), field.starts(indices))


def test_patches_of_infinite_fields_are_centred_where_their_vectors_lie() -> None:
    location = ReceptiveField((4, 6), (4, 2), (0, -1))
    field = ReceptiveField((math.inf, 6), (0, 2), (0, -1), "attention", location)
    assert field.centred((3, 2)) == location.centred((3, 2)) == ReceptiveField((3, 2), (4, 2), (1, 1))
    assert field == ReceptiveField((math.inf, 6), (0, 2), (0, -1))
    with pytest.raises(ValueError, match="starts: expected a finite receptive field"):
        field.starts(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="location: expected a ReceptiveField or None, got tuple"):
        ReceptiveField((math.inf, 6), (0, 2), (0, -1), location=(4, 6))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="location: expected None for a finite field"):
        ReceptiveField((4, 6), (4, 2), (0, -1), location=location)
    for wrong in (field, ReceptiveField((3,), (1,), (0,))):
        with pytest.raises(ValueError, match="location: expected a finite field with 2 axes"):
            ReceptiveField((math.inf, 6), (0, 2), (0, -1), location=wrong)


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("patch", [1, 2, 3, 8, 9])
def test_centred_patches_share_the_centre_pixel(size: int, patch: int) -> None:
    field = ReceptiveField((size, size + 1), (Fraction(3, 2), 2), (-2, Fraction(-5, 2)))
    indices = torch.arange(10).view(5, 2)
    small = field.centred(patch)
    assert small.size == (patch, patch)
    centres = field.starts(indices) + torch.tensor([size // 2, (size + 1) // 2])
    assert torch.equal(small.starts(indices) + patch // 2, centres)
    assert field.centred((patch, 7)).size == (patch, 7)


def test_fields_compare_and_show_themselves() -> None:
    field = ReceptiveField((3, 4), (Fraction(1, 2), Fraction(4, 2)), (0, -1))
    assert repr(field) == "ReceptiveField(size=(3, 4), stride=(1/2, 2), start=(0, -1))"
    assert field == ReceptiveField((3, 4), (Fraction(1, 2), 2), (0, -1))
    assert hash(field) == hash(copy.deepcopy(field))
    infinite = ReceptiveField((math.inf, 4), (1, 2), (0, -1), "attention")
    assert infinite == ReceptiveField((math.inf, 4), (0, 2), (7, -1))
    assert repr(infinite).endswith("start=(-inf, -1); INFINITE along axis 0, because of attention)")
    for method in (lambda: infinite.starts(torch.zeros(1, 2, dtype=torch.long)), lambda: infinite.centred(3)):
        with pytest.raises(ValueError, match=r"expected a finite receptive field, got .*INFINITE"):
            method()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((3, 3), (1,), (0, 0)), ValueError, "stride: expected one number per axis, 2 in all"),
        (((), (), ()), ValueError, "size: expected one number per axis"),
        ((3, 1, 0), TypeError, "size: expected a tuple"),
        (((0, 3), (1, 1), (0, 0)), ValueError, "size: expected an integer of at least 1, got 0"),
        (((3.0, 3), (1, 1), (0, 0)), TypeError, "size: expected an integer, got float"),
        (((3, 3), (0.5, 1), (0, 0)), TypeError, "stride: expected integers or fractions.Fraction, got 0.5"),
        (((3, 3), (1, 1), (0, True)), TypeError, "start: expected integers or fractions.Fraction, got True"),
    ],
)
def test_fields_that_do_not_fit(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ReceptiveField(*arguments)


def test_indices_and_patches_that_do_not_fit() -> None:
    field = ReceptiveField((3, 3), (1, 1), (0, 0))
    with pytest.raises(ValueError, match="indices: expected shape"):
        field.starts(torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="indices: expected an integer dtype"):
        field.starts(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="patch_size: expected an integer of at least 1, got 0"):
        field.centred(0)
    with pytest.raises(ValueError, match="patch_size: expected one integer, or 2, one per axis"):
        field.centred((3, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 3], [1]), "stride: expected one entry per layer, 2 in all"),
        (([3, (3, 3, 3)],), "kernel_size: expected an integer, or 2, one per axis"),
        (([3, 0],), "kernel_size: expected an integer of at least 1, got 0"),
    ],
)
def test_stacks_that_do_not_fit(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack_receptive_field(*arguments)


@pytest.mark.parametrize("module", [field, trace])
def test_examples(module: ModuleType) -> None:
    examples = doctest.testmod(module)
    assert examples.attempted > 0
    assert examples.failed == 0
