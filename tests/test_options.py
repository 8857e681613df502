"""What goes beyond the paper: layers, patches and pairs of other kinds, projection heads, warming up."""

from __future__ import annotations

import copy
import io
import itertools
import math
import re
from typing import Any

import pytest
import torch
from conftest import blob_labels
from torch import Tensor, nn

from contrastseg_fast import attach_pdcr, receptive_fields, reference
from contrastseg_fast.functional import WARMUPS, foreground_ratio, pdcr_loss, warmup_weight
from contrastseg_fast.pdcr_loss import PDCRLoss
from contrastseg_fast.receptive_field import ReceptiveField

STEM = ReceptiveField(size=(3, 3), stride=(2, 2), start=(-1, -1))
MIDDLE = ReceptiveField(size=(7, 6), stride=(3, 4), start=(-2, -1))
DEEP = ReceptiveField(size=(11, 9), stride=(4, 4), start=(-5, -3))
FIELDS = {"stem": STEM, "middle": MIDDLE, "deep": DEEP}
CHANNELS = {"stem": 6, "middle": 4, "deep": 6}


def feature_maps(batch: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Maps of images of 24 x 20 pixels."""
    shapes = {"stem": (12, 10), "middle": (8, 5), "deep": (6, 5)}
    return {layer: torch.randn(batch, CHANNELS[layer], *shapes[layer], dtype=dtype) for layer in FIELDS}


def some_labels(batch: int = 3) -> Tensor:
    """Three classes, ignored pixels in the first image, and the last image of one class alone."""
    labels = blob_labels(batch, (24, 20), 3)
    labels[0, :9] = 255
    labels[-1] = 1
    return labels


def vectors_and_ratios(maps: dict[str, Tensor], labels: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """All vectors of a layer and the ratios of their receptive fields."""
    height, width = maps[layer].shape[2:]
    indices = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    field = FIELDS[layer]
    ratios, _ = foreground_ratio(labels, field.starts(indices), field.size, 3)
    return maps[layer].flatten(2).mT, ratios


OPTIONS: list[dict[str, Any]] = [
    {"patch_sizes": (3, 5, 8)},
    {"patch_sizes": [(3, 5), (4, 7)], "reduction": "none", "skip_homogeneous": True},
    {"patch_sizes": (None, {"deep": 5}), "reduction": "sum"},
    {"patch_sizes": (2, 5), "affinity": "bipartite", "sampler": "random"},
    {"pairs": "batch"},
    {"pairs": "batch", "reduction": "none", "border": "clip"},
    {"pairs": "batch", "reduction": "sum", "class_distance": "tv"},
    {"pairs": "batch", "affinity": "diagonal", "variant": "released", "skip_homogeneous": True},
    {"cross_layers": [("deep", "stem")]},
    {"cross_layers": [("deep", "stem")], "reduction": "none", "skip_homogeneous": True},
    {"cross_layers": [("stem", "deep")], "affinity": "diagonal", "reduction": "sum"},
    {"projection": "linear", "projection_channels": 5},
    {"projection": "mlp", "projection_channels": 7, "cross_layers": [["stem", "middle"], ["middle", "deep"]]},
    {"projection": "linear", "cross_layers": [("stem", "middle", "deep")], "reduction": "none"},
    {
        "patch_sizes": (3, 9),
        "pairs": "batch",
        "cross_layers": [("stem", "middle")],
        "projection": "mlp",
        "skip_homogeneous": True,
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_options_agree_with_the_reference(options: dict, masked: bool) -> None:
    maps, labels = feature_maps(), some_labels()
    mask = (torch.rand(3, 1, 24, 20) > 0.3) if masked else None
    results, state = [], None
    for module in (PDCRLoss, reference.PDCRLoss):
        leaves = {layer: x.clone().requires_grad_() for layer, x in maps.items()}
        loss = module(
            FIELDS,
            3,
            ignore_index=255,
            num_samples=13,
            in_channels=CHANNELS,
            generator=torch.Generator().manual_seed(5),
            **options,
        ).double()
        loss.load_state_dict(state or loss.state_dict())
        state = loss.state_dict()
        value = loss(leaves, labels, mask)
        inputs = [*leaves.values(), *loss.parameters()]
        results.append((value, *torch.autograd.grad(value.sum(), inputs, allow_unused=True)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_every_option_compiles_into_one_graph() -> None:
    maps, labels = feature_maps(dtype=torch.float32), some_labels().clamp(max=2)
    pdcr = PDCRLoss(
        FIELDS,
        3,
        patch_sizes=(3, 5),
        pairs="batch",
        cross_layers=[("stem", "middle")],
        projection="mlp",
        in_channels=CHANNELS,
    )
    compiled = torch.compile(pdcr, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(maps, labels), pdcr(maps, labels))


# Several sizes of patches


def test_the_loss_of_several_sizes_is_the_mean_of_theirs() -> None:
    maps, labels = feature_maps(), some_labels()
    options = {"ignore_index": 255, "sampler": "random", "num_samples": 11, "reduction": "none"}

    def loss(**sizes: Any) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return PDCRLoss(FIELDS, 3, generator=generator, **options, **sizes)(maps, labels)

    alone = torch.stack([loss(patch_size=size) for size in (5, 7, (9, 3))])
    assert (alone.amax(0) > alone.amin(0)).any(), "sizes should make a difference"
    torch.testing.assert_close(loss(patch_sizes=[5, 7, (9, 3)]), alone.mean(0))
    torch.testing.assert_close(loss(patch_sizes=[(5, 7)]), loss(patch_size=(5, 7)))


def test_several_sizes_keep_the_vectors_once() -> None:
    maps, labels = feature_maps(dtype=torch.float32), some_labels()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes_saved(sizes: tuple[int, ...]) -> int:
        saved.clear()
        pdcr = PDCRLoss({"stem": STEM}, 3, patch_sizes=sizes, ignore_index=255)
        leaf = maps["stem"].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = pdcr([leaf], labels)
        loss.backward()
        return sum(saved.values())

    per_size = (bytes_saved((3, 5, 7)) - bytes_saved((3,))) / 2
    count = 3 * 120
    assert per_size <= count * (3 * 4 + 4 + 1) + 64  # ratios, log Z and which are valid


# Pairs across images


def test_pairs_of_the_batch_are_those_of_one_large_set() -> None:
    maps, labels = feature_maps(), blob_labels(3, (24, 20), 3)
    pdcr = PDCRLoss({"deep": DEEP}, 3, pairs="batch")
    vectors, ratios = vectors_and_ratios(maps, labels, "deep")
    expected = pdcr_loss(vectors.reshape(1, 90, 6), ratios.reshape(1, 90, 3))
    torch.testing.assert_close(pdcr(maps["deep"], labels), expected)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(pdcr(maps["deep"][order], labels[order]), expected)


def test_the_number_of_valid_vectors_of_the_batch_counts() -> None:
    maps, labels = feature_maps(2), blob_labels(2, (24, 20), 3)
    labels[1] = 255
    options = {"ignore_index": 255, "reduction": "none"}
    batch = PDCRLoss({"deep": DEEP}, 3, pairs="batch", **options)(maps["deep"], labels)
    image = PDCRLoss({"deep": DEEP}, 3, **options)(maps["deep"], labels)
    assert batch.shape == (1, 1)
    assert image.shape == (2, 1)
    torch.testing.assert_close(batch, image[:1])


def test_background_counts_beside_other_images() -> None:
    maps = {"deep": feature_maps(2)["deep"]}
    labels = torch.zeros(2, 24, 20, dtype=torch.long)
    labels[0] = 2
    options = {"skip_homogeneous": True}
    assert PDCRLoss({"deep": DEEP}, 3, border="clip", **options)(maps, labels).item() == 0
    across = PDCRLoss({"deep": DEEP}, 3, pairs="batch", border="clip", **options)
    assert across(maps, labels).item() != 0
    assert across(maps, torch.zeros_like(labels)).item() == 0


@pytest.mark.parametrize("options", [{"pairs": "batch"}, {"cross_layers": [("stem", "deep")]}], ids=str)
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_is_finite_and_connected(options: dict, batch: int) -> None:
    maps = {layer: x.requires_grad_() for layer, x in feature_maps(batch).items()}
    labels = torch.full((batch, 24, 20), 255, dtype=torch.uint8)
    loss = PDCRLoss(FIELDS, 3, ignore_index=255, patch_sizes=(3, 5), skip_homogeneous=True, **options)
    value = loss(maps, labels)
    value.backward()
    assert value.item() == 0
    assert all((x.grad == 0).all() for x in maps.values())


# Pairs across layers


def test_layers_of_a_group_form_one_set() -> None:
    maps, labels = feature_maps(), blob_labels(3, (24, 20), 3)
    parts = [vectors_and_ratios(maps, labels, layer) for layer in ("stem", "deep")]
    together = pdcr_loss(*(torch.cat(both, 1) for both in zip(*parts, strict=True)), reduction="none")
    alone = pdcr_loss(*vectors_and_ratios(maps, labels, "middle"), reduction="none")
    pdcr = PDCRLoss(FIELDS, 3, cross_layers=[("stem", "deep")], reduction="none")
    torch.testing.assert_close(pdcr(maps, labels), torch.stack([alone, together], -1))
    mean = PDCRLoss(FIELDS, 3, cross_layers=[("stem", "deep")])(maps, labels)
    torch.testing.assert_close(mean, (alone.mean() + together.mean()) / 2)


def test_layers_by_position_form_groups_too() -> None:
    maps, labels = feature_maps(), blob_labels(3, (24, 20), 3)
    named = PDCRLoss(FIELDS, 3, cross_layers=[("stem", "deep")])(maps, labels)
    ordered = PDCRLoss(list(FIELDS.values()), 3, cross_layers=[(0, 2)])(list(maps.values()), labels)
    assert torch.equal(ordered, named)


def test_groups_need_equal_channels_or_a_projection() -> None:
    maps, labels = feature_maps(), blob_labels(3, (24, 20), 3)
    message = (
        "cross_layers: expected layers with equal channels, or projection='linear' or 'mlp' to a common "
        "width, got the channels {'stem': 6, 'middle': 4}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        PDCRLoss(FIELDS, 3, cross_layers=[("stem", "middle")])(maps, labels)


def test_groups_need_the_samples_of_all_their_layers() -> None:
    maps, labels = feature_maps(), blob_labels(3, (24, 20), 3)
    pdcr = PDCRLoss(FIELDS, 3, cross_layers=[("stem", "deep")])
    message = "samples: expected samples of the layers ['deep'] too, got ['stem', 'middle']"
    with pytest.raises(ValueError, match=re.escape(message)):
        pdcr.loss([pdcr.sample(maps[layer], layer) for layer in ("stem", "middle")], labels)
    assert pdcr.loss([pdcr.sample(maps["middle"], "middle")], labels).isfinite()


# Projection heads


def test_a_projection_that_changes_nothing() -> None:
    maps, labels = feature_maps(), blob_labels(3, (24, 20), 3)
    pdcr = PDCRLoss({"deep": DEEP}, 3, projection="linear", projection_channels=6, in_channels=6).double()
    expected = PDCRLoss({"deep": DEEP}, 3)(maps["deep"], labels)
    assert not torch.allclose(pdcr(maps["deep"], labels), expected)
    with torch.no_grad():
        nn.init.eye_(pdcr.projections["deep"].weight)
        nn.init.zeros_(pdcr.projections["deep"].bias)
    torch.testing.assert_close(pdcr(maps["deep"], labels), expected)


@pytest.mark.parametrize("channels", [CHANNELS, [6, 4, 6]], ids=str)
def test_parameters_are_the_modules_own(channels: Any) -> None:
    pdcr = PDCRLoss({f"net.{name}": field for name, field in FIELDS.items()}, 3)
    assert not pdcr.state_dict()
    if isinstance(channels, dict):
        channels = {f"net.{name}": count for name, count in channels.items()}
    fields = {f"net.{name}": field for name, field in FIELDS.items()}
    pdcr = PDCRLoss(fields, 3, projection="mlp", projection_channels=16, in_channels=channels)
    shapes = {name: tuple(value.shape) for name, value in pdcr.state_dict().items()}
    assert shapes["projections.net/stem.0.weight"] == (6, 6)
    assert shapes["projections.net/middle.2.weight"] == (16, 4)
    assert len(shapes) == 12
    stream = io.BytesIO()
    torch.save(pdcr.state_dict(), stream)
    stream.seek(0)
    other = PDCRLoss(fields, 3, projection="mlp", projection_channels=16, in_channels=channels)
    other.load_state_dict(torch.load(stream, weights_only=True))
    maps, labels = list(feature_maps(dtype=torch.float32).values()), blob_labels(3, (24, 20), 3)
    assert torch.equal(other(maps, labels), pdcr(maps, labels))
    assert torch.equal(copy.deepcopy(pdcr)(maps, labels), pdcr(maps, labels))
    assert "projection='mlp'" in repr(pdcr)


def test_heads_learn() -> None:
    maps, labels = feature_maps(dtype=torch.float32), blob_labels(3, (24, 20), 3)
    pdcr = PDCRLoss(FIELDS, 3, class_distance="tv", projection="mlp", in_channels=CHANNELS)
    optimizer = torch.optim.Adam(pdcr.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = pdcr(maps, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.abs().max() > 0 for parameter in pdcr.parameters())
    assert losses[-1] < losses[0] - 0.1


def test_half_precision_features_meet_heads_in_full_precision() -> None:
    """As after a forward pass under autocast, whether the loss is computed inside or outside of it."""
    maps, labels = feature_maps(dtype=torch.bfloat16), blob_labels(3, (24, 20), 3)
    pdcr = PDCRLoss(FIELDS, 3, projection="linear", in_channels=CHANNELS)
    expected = pdcr({layer: x.float() for layer, x in maps.items()}, labels)
    assert torch.equal(pdcr(maps, labels), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pdcr(maps, labels)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, expected, rtol=1e-2, atol=1e-2)


# Decoder layers


class SmallUNet(nn.Module):
    """Two levels, with a skip connection and learned up-sampling or interpolation."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)])
        self.bottom = nn.Conv2d(12, 12, 3, 2, 1)
        if transposed:
            self.up = nn.ConvTranspose2d(12, 12, 2, 2)
        else:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.decoder = nn.Conv2d(24, 12, 3, padding=1)
        self.last_up = nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(20, 10, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.encoder[0](x).relu()
        coarse = self.encoder[1](fine).relu()
        up = self.up(self.bottom(coarse).relu())
        deep = self.decoder(torch.cat([up, coarse], 1)).relu()
        return self.last(torch.cat([self.last_up(deep), fine], 1))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"patch_sizes": (5, 7, 9)}], ids=str)
def test_decoder_layers_serve_like_any_other(transposed: bool, sizes: dict) -> None:
    model, labels = SmallUNet(transposed).double(), blob_labels(2, (24, 20), 3)
    x = torch.randn(2, 1, 24, 20, dtype=torch.float64)
    layers = ["decoder", "last"]
    fields = receptive_fields(model, (1, 1, 24, 20), layers)
    encoder = receptive_fields(model, (1, 1, 24, 20), ["bottom"])["bottom"]
    assert [max(field.stride) for field in fields.values()] == [2, 1]
    assert all(min(field.size) >= max(encoder.size) for field in fields.values())
    options = {"num_samples": 15, "class_distance": "tv", **sizes}
    pdcr = attach_pdcr(model, layers, 3, example_input=x, **options)
    outputs: dict[str, Tensor] = {}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: outputs.__setitem__(layer, output)
        )
    model(x)
    attached = pdcr(labels)
    torch.testing.assert_close(attached, PDCRLoss(fields, 3, **options)(outputs, labels))
    expected = reference.PDCRLoss(fields, 3, **options)(outputs, labels)
    torch.testing.assert_close(attached, expected, rtol=1e-7, atol=1e-9)
    actual = torch.autograd.grad(attached, model.bottom.weight, retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, model.bottom.weight))


def test_a_decoders_patches_lie_around_its_pixels() -> None:
    """A label of one pixel is in the patches of exactly the vectors whose pixel is near."""
    model = SmallUNet(transposed=True)
    field = receptive_fields(model, (1, 1, 24, 20), ["last"])["last"].centred(3)
    labels = torch.zeros(1, 24, 20, dtype=torch.long)
    labels[0, 11, 7] = 1
    indices = torch.cartesian_prod(torch.arange(24), torch.arange(20))
    ratios, _ = foreground_ratio(labels, field.starts(indices), field.size, 2)
    near = indices[ratios[0, :, 1] > 0]
    assert near.shape == (9, 2)
    centre = near.double().mean(0) - torch.tensor([11.0, 7.0])
    assert centre.abs().max() <= 1


# Through the plug-in


def test_every_option_reaches_the_plug_in() -> None:
    model, labels = SmallUNet(transposed=True), blob_labels(2, (24, 20), 3)
    x = torch.randn(2, 1, 24, 20)
    layers = ["encoder.1", "decoder"]
    pdcr = attach_pdcr(
        model,
        layers,
        3,
        example_input=x,
        patch_sizes=(5, 9),
        pairs="batch",
        cross_layers=[layers],
        projection="linear",
        projection_channels=6,
        in_channels={"encoder.1": 12, "decoder": 12},
    )
    model(x)
    loss = warmup_weight(3, 0.01, 10) * pdcr(labels)
    loss.backward()
    assert pdcr.loss.vector_sets == [tuple(layers)]
    heads = list(pdcr.loss.projections.parameters())
    assert len(heads) == 4
    for parameter in (*heads, model.encoder[0].weight, model.bottom.weight, model.up.weight):
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"patch_sizes": 5},
            TypeError,
            "patch_sizes: expected a sequence of sizes, each as patch_size takes",
        ),
        ({"patch_sizes": "579"}, TypeError, "patch_sizes: expected a sequence of sizes"),
        ({"patch_sizes": ()}, ValueError, "patch_sizes: expected at least one size, got none"),
        ({"patch_sizes": (5,), "patch_size": 5}, ValueError, "patch_sizes: expected None beside patch_size"),
        ({"patch_sizes": (5, 0)}, ValueError, "patch_size: expected an integer of at least 1, got 0"),
        ({"patch_sizes": (5, (3, 3, 3))}, ValueError, "patch_size: expected one integer, or 2, one per axis"),
        ({"patch_sizes": (5, 2.5)}, TypeError, "patch_size: expected an integer, one per axis, or a mapping"),
        ({"pairs": "all"}, ValueError, "pairs: expected one of 'image', 'batch', got 'all'"),
        ({"cross_layers": "stem"}, TypeError, "cross_layers: expected groups of at least two of the layers"),
        ({"cross_layers": ("stem", "deep")}, TypeError, "such as [('a', 'b')], got 'stem'"),
        ({"cross_layers": [("stem",)]}, ValueError, "cross_layers: expected groups of at least two"),
        ({"cross_layers": [("stem", "stem")]}, ValueError, "cross_layers: expected groups of at least two"),
        (
            {"cross_layers": [("stem", "neck")]},
            ValueError,
            "cross_layers: expected groups of at least two of the layers ['stem', 'middle', 'deep'], such as "
            "[('a', 'b')], got ('stem', 'neck')",
        ),
        ({"projection": "conv"}, ValueError, "projection: expected one of 'linear', 'mlp', got 'conv'"),
        (
            {"projection": "mlp"},
            ValueError,
            "in_channels: expected the channels of every layer, for projection='mlp', got None",
        ),
        ({"projection_channels": 0}, ValueError, "projection_channels: expected an integer of at least 1"),
        (
            {"in_channels": {"stem": 6}},
            ValueError,
            "in_channels: expected the layers ['stem', 'middle', 'deep'], got ['stem']",
        ),
        ({"in_channels": [6, 4]}, ValueError, "in_channels: expected one integer for each of 3 layers, got"),
        ({"in_channels": 0}, ValueError, "in_channels: expected an integer of at least 1, got 0"),
        ({"in_channels": "6"}, TypeError, "in_channels: expected an integer, got str"),
    ],
)
def test_bad_options_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        PDCRLoss(FIELDS, 3, **options)


def test_maps_with_other_channels_are_named() -> None:
    message = "features['middle']: expected in_channels=6 channels, got 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        PDCRLoss(FIELDS, 3, in_channels=6)(feature_maps(), blob_labels(3, (24, 20), 3))


# Warming up


def test_the_weight_rises_to_its_value_and_stays() -> None:
    for kind in WARMUPS:
        weights = [warmup_weight(step, 0.1, 40, kind) for step in range(100)]
        assert weights[0] == pytest.approx(0.1 * math.exp(-5) if kind == "sigmoid" else 0)
        assert all(earlier < later for earlier, later in itertools.pairwise(weights[:41]))
        assert weights[40:] == [0.1] * 60


def test_the_weight_half_way() -> None:
    assert warmup_weight(5, 0.2, 10) == pytest.approx(0.1)
    assert warmup_weight(0.5, 0.2, 1.0, "cosine") == pytest.approx(0.1)
    assert warmup_weight(2.5, 1.0, 10, "cosine") == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert warmup_weight(5, 1.0, 10, "sigmoid") == pytest.approx(math.exp(-1.25))


@pytest.mark.parametrize("kind", WARMUPS)
def test_no_steps_mean_no_warm_up(kind: str) -> None:
    assert warmup_weight(0, 0.3, 0, kind) == 0.3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0.1, 10), ValueError, "step: expected a finite number of at least 0, got -1"),
        (("1", 0.1, 10), TypeError, "step: expected a number, got str"),
        ((1, float("nan"), 10), ValueError, "weight: expected a finite number of at least 0, got nan"),
        ((1, 0.1, -10), ValueError, "warmup_steps: expected a finite number of at least 0, got -10"),
        ((1, 0.1, 10, "exp"), ValueError, "kind: expected one of 'linear', 'cosine', 'sigmoid', got 'exp'"),
    ],
)
def test_bad_arguments_of_the_warm_up_are_named(
    arguments: tuple, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        warmup_weight(*arguments)
