"""Transformers: which layers give feature maps, where their vectors lie, and what both modules do there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contrastseg_fast import PDCRLoss, ReceptiveField, attach_pdcr, insert_uafs
from contrastseg_fast.receptive_field import LayerRun, trace_layers

EXTENTS = {2: (96, 160), 3: (32, 64, 96)}  # of images; no layer has as many channels as a map has rows
CONV = {2: nn.Conv2d, 3: nn.Conv3d}
UP = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class TokenViT(nn.Module):
    """Class and register tokens before the tokens of the image, and a map made of the latter."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.embed = CONV[dims](1, 12, 4, 4)
        self.cls, self.registers = (nn.Parameter(torch.zeros(1, count, 12)) for count in (1, 2))
        layers = [nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, norm_first=True) for _ in range(2)]
        self.blocks = nn.Sequential(*layers)
        self.norm, self.neck = nn.LayerNorm(12), nn.Identity()
        self.head = UP[dims](12, 2, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        tokens = x.flatten(2).transpose(1, 2)
        added = [token.expand(len(x), -1, -1) for token in (self.cls, self.registers)]
        tokens = self.norm(self.blocks(torch.cat([*added, tokens], 1)))[:, 3:]
        return self.head(self.neck(tokens.transpose(1, 2).reshape(x.shape)))


class Hybrid(nn.Module):
    """A convolutional encoder and decoder around an `nn.TransformerEncoder`, like TransUNet."""

    def __init__(self, dims: int, batch_first: bool = True) -> None:
        super().__init__()
        self.one = nn.Sequential(CONV[dims](1, 6, 3, 2, 1), nn.ReLU())
        self.two = nn.Sequential(CONV[dims](6, 12, 3, 2, 1), nn.ReLU())
        self.transformer = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 2, 16, batch_first=batch_first), 1, enable_nested_tensor=False
        )
        self.order = (0, 2, 1) if batch_first else (2, 0, 1)
        self.up = nn.Sequential(UP[dims](12, 6, 2, 2), nn.ReLU())
        self.mix = nn.Sequential(CONV[dims](12, 6, 3, 1, 1), nn.ReLU())
        self.last = UP[dims](6, 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.one(x)
        x = self.two(skip)
        tokens = self.transformer(x.flatten(2).permute(self.order))
        back = [self.order.index(dim) for dim in range(3)]
        x = tokens.permute(back).reshape(x.shape)
        return self.last(self.mix(torch.cat([skip, self.up(x)], 1)))


def swin(dims: int, window: int = 0, **options: Any) -> nn.Module:
    """Windows that need padding at some stages, and shifted ones in two of them."""
    nets = pytest.importorskip("monai.networks.nets")
    pytest.importorskip("einops")
    options |= {"depths": (2, 2, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": window or 6 - dims}
    return nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=dims, **options)


def unetr(dims: int) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    pytest.importorskip("einops")
    sizes = {"feature_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 2}
    return nets.UNETR(1, 2, EXTENTS[dims], spatial_dims=dims, **sizes)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "SwinUNETR": swin,
    "SwinUNETR v2, large windows": lambda dims: swin(dims, 7, use_v2=True),
    "UNETR": unetr,
    "ViT with class and register tokens": TokenViT,
    "hybrid": Hybrid,
    "hybrid, sequence first": lambda dims: Hybrid(dims, batch_first=False),
}
STAGES = {  # layers that "auto" must put a gate behind
    "SwinUNETR": ["swinViT.layers1.0", "swinViT.layers2.0", "swinViT.layers3.0", "decoder5", "decoder1"],
    "SwinUNETR v2, large windows": ["swinViT.layers1c.0", "swinViT.layers3c.0", "decoder3", "decoder2"],
    "UNETR": ["vit.patch_embedding.patch_embeddings", "decoder5", "decoder4", "decoder3", "decoder2"],
    "ViT with class and register tokens": ["neck"],
    "hybrid": ["one", "two", "mix"],
    "hybrid, sequence first": ["one", "two", "mix"],
}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_dims = pytest.mark.parametrize("dims", [2, 3])
trained = pytest.mark.parametrize(  # large windows in volumes are slow
    ("name", "dims"), [(name, dims) for name in NETWORKS for dims in (2, 3) if dims == 2 or "v2" not in name]
)


def strides(run: LayerRun, dims: int) -> list[float]:
    """Pixels for each element along the spatial dimensions of an output, if these all shrank alike."""
    if len(run.shape) != dims + 2:
        return []
    ratios = [extent / small for extent, small in zip(EXTENTS[dims], run.shape[2:], strict=True)]
    return ratios if len(set(ratios)) == 1 else []


@every_dims
@every_network
def test_exactly_the_layers_of_the_image_s_proportions_are_maps(name: str, dims: int) -> None:
    """The tracker looks at no sizes; here they tell the truth, as the image's extents differ."""
    runs = trace_layers(NETWORKS[name](dims), (1, 1, *EXTENTS[dims]), required=())
    wrong = {
        layer: (run.shape, run.why_no_map)
        for layer, run in runs.items()
        if bool(strides(run, dims)) == bool(run.why_no_map)
    }
    assert not wrong
    assert sum(not run.why_no_map for run in runs.values()) >= 4
    assert sum(bool(run.why_no_map) for run in runs.values()) >= 10
    for layer, run in runs.items():
        if not run.why_no_map:
            field = run.receptive_field
            assert (field.location is None) == (not field.is_infinite), layer
            assert list((field.location or field).stride) == strides(run, dims), layer


@every_dims
@pytest.mark.parametrize("name", [name for name in NETWORKS if "hybrid" not in name])
def test_vectors_lie_over_their_own_pixels(name: str, dims: int) -> None:
    """In these networks without a stride inside a kernel, vector i lies over pixels `[s i, s (i + 1))`."""
    runs = trace_layers(NETWORKS[name](dims), (1, 1, *EXTENTS[dims]), required=())
    infinite = 0
    for layer, run in runs.items():
        if not run.why_no_map:
            field = run.receptive_field
            infinite += field.is_infinite
            (stride, *_) = map(int, strides(run, dims))
            indices = torch.arange(min(run.shape[2:]))[:, None].expand(-1, dims)
            assert torch.equal(field.centred(stride).starts(indices), stride * indices), (layer, field)
    assert infinite >= 2


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("SwinUNETR", "swinViT.layers1.0"),
        ("SwinUNETR", "swinViT.layers2.0"),
        ("ViT with class and register tokens", "neck"),
    ],
)
def test_a_change_of_pixels_changes_the_vector_over_them_most(name: str, layer: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name](2).eval()
    field = trace_layers(model, (1, 1, *EXTENTS[2]), [layer])[layer].receptive_field
    assert field.is_infinite
    maps: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: maps.append(output))
    stride = int(field.location.stride[0])
    indices = torch.tensor([[1, 2], [4, 7], [10, 3], [6, 11]])
    before = torch.randn(1, 1, *EXTENTS[2])
    with torch.no_grad():
        model(before)
        for index, start in zip(
            indices.tolist(), field.centred(stride).starts(indices).tolist(), strict=True
        ):
            after = before.clone()
            rows, columns = (slice(first, first + stride) for first in start)
            after[:, :, rows, columns] += 10 * torch.randn(stride, stride)
            model(after)
            change = (maps[-1] - maps[0]).norm(dim=1)[0]
            assert divmod(int(change.argmax()), change.shape[1]) == tuple(index)


@trained
def test_auto_gates_the_stages_that_are_maps(name: str, dims: int) -> None:
    model, x = NETWORKS[name](dims), torch.randn(1, 1, *EXTENTS[dims])
    runs = trace_layers(model, x.shape, required=())
    insert_uafs(model, "auto", 2, example_input=x)
    assert set(STAGES[name]) <= set(model.uafs)
    for gate in model.uafs:
        assert not runs[gate].why_no_map
    if dims == 3:  # slow
        return
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.uafs.parameters())


@every_dims
def test_gates_of_a_swin_fit_images_of_other_sizes(dims: int) -> None:
    model = insert_uafs(swin(dims), "auto", 2, example_input=torch.zeros(1, 1, *EXTENTS[dims])).eval()
    with torch.no_grad():
        for size in (64, 96)[: 4 - dims]:
            assert model(torch.randn(1, 1, *[size] * dims)).shape[2:] == (size,) * dims


NO_MAPS = {
    "swinViT.layers1.0.blocks.0": r"\(1, 48, 80, 12\) is not: axis 0 of the image lies along dimension 1",
    "swinViT.layers1.0.blocks.1.attn": r"axis 0 of the image lies along dimensions \[0, 1\], axis 1",
    "swinViT.layers1.0.blocks.1.attn.softmax": r"axis 0 .* along dimensions \[0, 2, 3\], axis 1",
    "swinViT.layers2.0.downsample": r"\(1, 12, 20, 48\) is not: axis 0 .* 1, axis 1 .* along dimension 2",
}


@pytest.mark.parametrize("layer", NO_MAPS)
def test_named_layers_that_are_no_maps_are_refused(layer: str) -> None:
    model, x = swin(2), torch.zeros(1, 1, *EXTENTS[2])
    state = list(model.state_dict())
    for attach in (
        lambda: insert_uafs(model, [layer], 2, example_input=x),
        lambda: attach_pdcr(model, [layer], 2, example_input=x, patch_size=7),
    ):
        with pytest.raises(ValueError, match=f"got '{layer}', whose output .*{NO_MAPS[layer]}"):
            attach()
    assert list(model.state_dict()) == state


LAYERS = {
    "SwinUNETR": ["swinViT.layers1.0", "decoder3"],
    "SwinUNETR v2, large windows": ["swinViT.layers2c.0", "swinViT.layers2.0"],
    "UNETR": ["encoder3", "decoder5"],
    "ViT with class and register tokens": ["embed", "neck"],
    "hybrid": ["two", "mix"],
    "hybrid, sequence first": ["up"],
}


@trained
def test_pdcr_trains_with_a_patch_size(name: str, dims: int) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name](dims), torch.randn(1, 1, *EXTENTS[dims])
    labels = torch.zeros(1, *EXTENTS[dims], dtype=torch.long)
    labels[..., 20:50] = 1
    with pytest.raises(
        ValueError, match=r"expected a finite field, .*INFINITE .*aten\..*; give .* a patch_size"
    ):
        attach_pdcr(model, LAYERS[name], 2, example_input=x)
    pdcr = attach_pdcr(model, LAYERS[name], 2, example_input=x, patch_size=7, num_samples=64)
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x)
    loss = pdcr(labels)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    model(x)
    with pytest.raises(ValueError, match=r"labels: expected spatial shape .*model's input"):
        pdcr(labels[..., ::4])


FINITE = ReceptiveField((3, 3), (2, 2), (-1, -1))
ATTENDED = ReceptiveField(
    (math.inf, math.inf), (0, 0), (0, 0), "attention", ReceptiveField((4, 4), (4, 4), (0, 0))
)


def test_infinite_fields_need_patches_for_each_layer() -> None:
    fields = {"a": FINITE, "b": ATTENDED}
    for options in ({}, {"patch_size": {"a": 5}}, {"patch_sizes": [5, {"a": 5}]}):
        with pytest.raises(
            ValueError, match=r"receptive_fields\['b'\].*because of attention\); give this layer"
        ):
            PDCRLoss(fields, 2, **options)
    assert PDCRLoss(fields, 2, patch_size={"b": 6}).patches["b"] == ReceptiveField((6, 6), (4, 4), (-1, -1))
    (patches,) = PDCRLoss(fields, 2, affinity="bipartite").patches_by_size
    assert patches["b"] == ReceptiveField((1, 1), (4, 4), (2, 2))
    lost = ReceptiveField((math.inf, 3), (1, 1), (0, 0), "sorting")
    for options in ({}, {"patch_size": 5}, {"affinity": "bipartite"}):
        with pytest.raises(
            ValueError, match=r"\[0\]: expected a finite field, or an infinite one with a loc"
        ):
            PDCRLoss([lost], 2, **options)
