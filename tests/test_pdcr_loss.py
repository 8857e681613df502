"""PDCRLoss: options against the reference, label maps of every form, and errors."""

from __future__ import annotations

import copy
import doctest
import fractions
import pickle
import re
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import blob_labels
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from contrastseg_fast import _backend, functional, pdcr_loss, reference, sample_plan
from contrastseg_fast.ops import pdcr_call
from contrastseg_fast.pdcr_loss import PDCRLoss
from contrastseg_fast.receptive_field import ReceptiveField

STEM = ReceptiveField(size=(3, 3), stride=(2, 2), start=(-1, -1))
DEEP = ReceptiveField(size=(11, 9), stride=(4, 4), start=(-5, -3))
FIELDS = {"stem": STEM, "deep": DEEP}
LAYERS = tuple(FIELDS)


def feature_maps(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Maps of two images of 24 x 20 pixels."""
    stem, deep = torch.randn(2, 5, 12, 10, dtype=dtype), torch.randn(2, 8, 6, 5, dtype=dtype)
    return {"stem": stem, "deep": deep.to(memory_format=torch.channels_last)}


def labels_with_holes() -> Tensor:
    labels = blob_labels(2, (24, 20), 3)
    labels[0, :9] = 255
    return labels


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_samples": 17},
    {"num_samples": None, "sampler": "raster"},
    {"sampler": "random", "num_samples": 9},
    {"patch_size": 5},
    {"patch_size": (4, 6)},
    {"patch_size": {"deep": (3, 4)}},
    {"affinity": "bipartite"},
    {"affinity": "constant", "reduction": "none"},
    {"affinity": "diagonal", "reduction": "sum"},
    {"class_distance": "tv", "include_background": False},
    {"class_distance": "sum", "temperature": 0.1},
    {"variant": "released", "border": "clip"},
    {"border": "background", "min_valid_fraction": 0.9},
    {"min_valid_fraction": 0.0},
    {"skip_homogeneous": True},
    {"skip_homogeneous": True, "border": "background", "affinity": "bipartite"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_pdcr_module_agrees_with_algorithm_1(options: dict, masked: bool) -> None:
    features, labels = feature_maps(), labels_with_holes()
    labels[1] = 2
    mask = (torch.rand(2, 1, 24, 20) > 0.4) if masked else None
    results = []
    for module in (PDCRLoss, reference.PDCRLoss):
        leaves = {layer: x.clone().requires_grad_() for layer, x in features.items()}
        loss = module(FIELDS, 3, ignore_index=255, generator=torch.Generator().manual_seed(5), **options)
        value = loss(leaves, labels, mask)
        results.append((value, *torch.autograd.grad(value.sum(), list(leaves.values()))))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def test_features_come_by_name_or_in_order() -> None:
    maps, labels = feature_maps(), blob_labels(2, (24, 20), 3)
    named, ordered = PDCRLoss(FIELDS, 3), PDCRLoss([STEM, DEEP], 3)
    expected = named(maps, labels)
    assert torch.equal(named(dict(reversed(maps.items())), labels), expected)
    assert torch.equal(named(list(maps.values()), labels), expected)
    assert torch.equal(ordered(tuple(maps.values()), labels), expected)
    alone = PDCRLoss([STEM], 3)
    assert torch.equal(alone(maps["stem"], labels), alone([maps["stem"]], labels))


def test_reductions_average_over_images_and_layers() -> None:
    maps, labels = feature_maps(), blob_labels(2, (24, 20), 3)
    each = PDCRLoss(FIELDS, 3, reduction="none")(maps, labels)
    assert each.shape == (2, 2)
    torch.testing.assert_close(PDCRLoss(FIELDS, 3)(maps, labels), each.mean())
    counts = torch.tensor([120.0, 30.0])
    total = PDCRLoss(FIELDS, 3, reduction="sum")(maps, labels)
    torch.testing.assert_close(total, (each * counts**2).sum(0).mean())


def test_vectors_sampled_early_give_the_same_loss_later() -> None:
    maps, labels = feature_maps(), blob_labels(2, (24, 20), 3)
    pdcr = PDCRLoss(FIELDS, 3, num_samples=20)
    expected = pdcr(maps, labels)
    samples = [pdcr.sample(x, layer) for layer, x in maps.items()]
    for x in maps.values():
        x.zero_()
    assert torch.equal(pdcr.loss(iter(samples), labels), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_a_mask_is_the_same_as_ignored_labels(dtype: torch.dtype) -> None:
    maps, labels = feature_maps(), blob_labels(2, (24, 20), 3)
    mask = torch.rand(2, 1, 24, 20) > 0.5
    expected = PDCRLoss(FIELDS, 3, ignore_index=7)(maps, labels.masked_fill(~mask[:, 0], 7))
    for given_mask in (mask, mask.to(dtype)):
        assert torch.equal(PDCRLoss(FIELDS, 3)(maps, labels.to(dtype), given_mask), expected)
        assert torch.equal(PDCRLoss(FIELDS, 3)(maps, labels.to(dtype)[:, None], given_mask), expected)
    one_hot = nn.functional.one_hot(labels, 3).movedim(-1, 1).to(dtype)
    torch.testing.assert_close(PDCRLoss(FIELDS, 3)(maps, one_hot, mask), expected)


def test_of_a_list_of_label_maps_the_first_counts() -> None:
    maps, labels = feature_maps(), blob_labels(2, (24, 20), 3)
    pdcr = PDCRLoss(FIELDS, 3)
    assert torch.equal(pdcr(maps, [labels, labels[:, ::2, ::2]]), pdcr(maps, labels))


def test_one_class_is_one_foreground_channel() -> None:
    maps, labels = feature_maps(), blob_labels(2, (24, 20), 2)
    expected = PDCRLoss(FIELDS, 2, include_background=False)(maps, labels)
    one = PDCRLoss(FIELDS, 1)
    for form in (labels, labels[:, None], labels.bool(), labels.float(), labels[:, None].float()):
        torch.testing.assert_close(one(maps, form), expected)


def test_one_soft_foreground_channel() -> None:
    maps, soft = feature_maps(), torch.rand(2, 1, 24, 20)
    mask = torch.rand(2, 1, 24, 20) > 0.3
    two = PDCRLoss(FIELDS, 2, include_background=False)(maps, torch.cat([1 - soft, soft], 1), mask)
    torch.testing.assert_close(PDCRLoss(FIELDS, 1)(maps, soft, mask), two)
    marked = soft.masked_fill(~mask, 255)
    torch.testing.assert_close(PDCRLoss(FIELDS, 1, ignore_index=255)(maps, marked), two)


@pytest.mark.parametrize("border", functional.BORDERS)
def test_homogeneous_images_are_left_out_on_request(border: str) -> None:
    maps, labels = feature_maps(), blob_labels(2, (24, 20), 3)
    labels[1] = 0
    plain, skipping = (PDCRLoss(FIELDS, 3, border=border, skip_homogeneous=skip) for skip in (False, True))
    first = {layer: x[:1] for layer, x in maps.items()}
    torch.testing.assert_close(skipping(maps, labels), plain(first, labels[:1]))
    assert not torch.equal(plain(maps, labels), plain(first, labels[:1]))
    x = maps["stem"].requires_grad_()
    nothing = skipping({**maps, "stem": x}, torch.zeros_like(labels))
    nothing.backward()
    assert nothing.item() == 0
    assert (x.grad == 0).all()


def test_bipartite_affinity_takes_the_label_at_the_centre() -> None:
    labels = blob_labels(1, (12, 10), 3, scale=2)
    x = torch.randn(1, 4, 12, 10)
    field = ReceptiveField(size=(5, 4), stride=(1, 1), start=(-2, -2))
    actual = PDCRLoss([field], 3, affinity="bipartite", num_samples=None)(x, labels)
    one_hot = nn.functional.one_hot(labels, 3).float().flatten(1, 2)
    expected = functional.pdcr_loss(x.flatten(2).mT, one_hot, affinity="bipartite")
    torch.testing.assert_close(actual, expected)


def test_volumes_with_anisotropic_fields() -> None:
    field = ReceptiveField(size=(3, 5, 5), stride=(1, 2, 2), start=(-1, -2, -2))
    x, labels = torch.randn(1, 6, 4, 9, 8, dtype=torch.float64), blob_labels(1, (4, 18, 16), 4)
    options = {"num_samples": 50, "class_distance": "tv"}
    expected = reference.PDCRLoss([field], 4, **options)(x, labels)
    torch.testing.assert_close(PDCRLoss([field], 4, **options)(x, labels), expected, rtol=1e-6, atol=0)


def test_empty_batches_and_all_pixels_ignored_are_finite_and_connected() -> None:
    labels = torch.full((2, 24, 20), 255, dtype=torch.uint8)
    pdcr = PDCRLoss(FIELDS, 3, ignore_index=255)
    for batch in (0, 2):
        maps = {layer: x[:batch].requires_grad_() for layer, x in feature_maps().items()}
        loss = pdcr(maps, labels[:batch])
        loss.backward()
        assert loss.item() == 0
        assert all((x.grad == 0).all() for x in maps.values())


def test_it_computes_in_eval_mode_too() -> None:
    maps, labels = feature_maps(), blob_labels(2, (24, 20), 3)
    pdcr = PDCRLoss(FIELDS, 3)
    assert torch.equal(pdcr.eval()(maps, labels), pdcr.train()(maps, labels))


def test_gradients_pull_a_network_towards_its_labels() -> None:
    """Features learn to tell two regions apart: cosines within rise above cosines across."""
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[:, :, 4:] = 1
    x = torch.randn(1, 8, 8, 8, requires_grad=True)
    pdcr = PDCRLoss([ReceptiveField((1, 1), (1, 1), (0, 0))], 2)
    optimizer = torch.optim.SGD([x], lr=60.0)
    for _ in range(20):
        optimizer.zero_grad()
        pdcr(x, labels).backward()
        optimizer.step()
    u = nn.functional.normalize(x.detach()[0].flatten(1).T, dim=1)
    same = labels.flatten()[:, None] == labels.flatten()[None]
    cosine = u @ u.T
    assert cosine[same].mean() > 0.8
    assert cosine[~same].mean() < 0.0


@pytest.mark.parametrize(
    "options",
    [{}, {"patch_size": 5}, {"sampler": "raster"}, {"affinity": "diagonal"}, {"include_background": False}],
    ids=str,
)
def test_images_may_change_their_size_when_compiled(options: dict[str, Any]) -> None:
    torch.compiler.reset()  # what other cases compiled counts for the limit of recompilations
    pdcr = PDCRLoss([STEM], num_classes=3, num_samples=40, **options)
    compiled = torch.compile(pdcr, fullgraph=True, backend="aot_eager", dynamic=True)
    for height, width in ((24, 20), (32, 28), (16, 40)):
        features, labels = torch.randn(2, 5, height // 2, width // 2), blob_labels(2, (height, width), 3)
        results = []
        for run in (compiled, pdcr):
            leaf = features.clone().requires_grad_()
            value = run([leaf], labels)
            results.append((value, *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("given", ["maps", "vectors"])
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none", "patch_sizes": (3, 5)},
        {"affinity": "diagonal", "pairs": "batch"},
        {"include_background": False, "skip_homogeneous": True},
        {"projection": "mlp", "projection_channels": 4, "in_channels": (5, 8), "cross_layers": [LAYERS]},
    ],
    ids=str,
)
def test_opcheck_of_a_whole_call(
    options: dict[str, Any], given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    operator = pdcr_call.pdcr_call_forward
    pdcr = PDCRLoss(FIELDS, 3, num_samples=17, **options)
    maps = {layer: x.requires_grad_() for layer, x in feature_maps(torch.float32).items()}
    with monkeypatch.context() as patch:
        patch.setattr(
            pdcr_call, "pdcr_call_forward", lambda *inputs: calls.append(inputs) or operator(*inputs)
        )
        if given == "maps":
            pdcr(maps, labels_with_holes().clamp(max=2))
        else:
            samples = [pdcr.sample(x, layer) for layer, x in maps.items()]
            pdcr.loss(samples, labels_with_holes().clamp(max=2))
    features, *others = calls[0]
    leaves = [x.detach().requires_grad_() for x in features]
    torch.library.opcheck(operator, (leaves, *others))


def test_second_derivatives_raise_instead_of_vanishing() -> None:
    maps = {layer: x.requires_grad_() for layer, x in feature_maps().items()}
    value = PDCRLoss(FIELDS, 3, num_samples=17)(maps, labels_with_holes().clamp(max=2))
    gradients = torch.autograd.grad(value, [*maps.values()], create_graph=True)
    penalty = sum(each.square().sum() for each in gradients) + value
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        penalty.backward()


def test_layers_may_have_several_dtypes() -> None:
    maps = feature_maps(torch.float32)
    maps["deep"] = maps["deep"].double()
    maps = {layer: x.requires_grad_() for layer, x in maps.items()}
    labels = labels_with_holes().clamp(max=2)
    results = []
    for module in (PDCRLoss, reference.PDCRLoss):
        value = module(FIELDS, 3, num_samples=17)(maps, labels)
        results.append((value, *torch.autograd.grad(value, [*maps.values()])))
    torch.testing.assert_close(*results)


PACKAGE = str(Path(pdcr_loss.__file__).parent)
MOST_CALLS = 121


@pytest.mark.skipif(not _backend.has_cpu_extension(), reason="plain kernels are made of many functions")
def test_a_call_of_three_layers_makes_few_calls() -> None:
    """Of the package's own Python functions, forward and backward: fewer is better, so lower the bar."""
    fields = [
        ReceptiveField((7, 7), (2, 2), (-3, -3)),
        ReceptiveField((15, 15), (4, 4), (-7, -7)),
        ReceptiveField((31, 31), (8, 8), (-15, -15)),
    ]
    maps = [torch.randn(2, 8, 64 // field.stride[0], 64 // field.stride[0]) for field in fields]
    maps = [each.requires_grad_() for each in maps]
    labels = blob_labels(2, (64, 64), 3)
    pdcr = PDCRLoss(fields, 3, num_samples=256, class_distance="tv")
    pdcr(maps, labels).backward()  # what is made once is made here
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1

    profiler = sys.getprofile()
    sys.setprofile(note)
    try:
        pdcr(maps, labels).backward()
    finally:
        sys.setprofile(profiler)
    assert calls["pdcr_call.py:_differentiate"] == 1
    assert calls.total() <= MOST_CALLS, calls


@pytest.mark.parametrize("sampler", ["grid", "raster"])
def test_places_are_kept_by_shape_and_serve_in_every_mode(sampler: str) -> None:
    """First used under inference mode or without data, they are whole afterwards."""
    maps, labels = feature_maps(), blob_labels(2, (24, 20), 3)
    expected = reference.PDCRLoss(FIELDS, 3, num_samples=23, sampler=sampler)(maps, labels)
    pdcr = PDCRLoss(FIELDS, 3, num_samples=23, sampler=sampler)
    for cache in (sample_plan._kept_positions, sample_plan._kept_starts):
        cache.cache_clear()
    with torch.inference_mode():
        torch.testing.assert_close(pdcr(maps, labels), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert (
            pdcr({layer: torch.empty_like(x) for layer, x in maps.items()}, torch.empty_like(labels)).shape
            == ()
        )
    leaves = {layer: x.clone().requires_grad_() for layer, x in maps.items()}
    value = pdcr(leaves, labels)
    value.backward()
    torch.testing.assert_close(value, expected)
    samples = [pdcr.sample(x, layer) for layer, x in maps.items()]
    for sample in samples:
        sample.places.positions.zero_()  # a user's own copy
    torch.testing.assert_close(pdcr(maps, labels), expected)
    assert sample_plan._kept_positions.cache_info().currsize == 2


FRACTIONAL = ReceptiveField(size=(5, 6), stride=(Fraction(3, 2), 2), start=(Fraction(-9, 4), -2))


@pytest.mark.parametrize("options", [*OPTIONS, {"patch_sizes": (3, (5, 4))}], ids=str)
def test_a_call_runs_no_code_of_fractions(options: dict[str, Any]) -> None:
    """torch.compile of torch 2.11 breaks at it."""
    features = {"stem": torch.randn(2, 5, 12, 10), "deep": torch.randn(2, 8, 16, 10)}
    features = {layer: each.requires_grad_() for layer, each in features.items()}
    labels, mask = labels_with_holes(), torch.ones(2, 1, 24, 20)
    pdcr = PDCRLoss({"stem": STEM, "deep": FRACTIONAL}, 3, ignore_index=255, **options)
    met = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename == fractions.__file__:
            met.append(frame.f_code.co_name)

    profiler = sys.getprofile()
    sys.setprofile(note)
    try:
        pdcr(features, labels, mask).sum().backward()
    finally:
        sys.setprofile(profiler)
    assert not met
    assert all(each.grad.any() for each in features.values())


def test_fractional_strides_compile() -> None:
    torch.compiler.reset()  # the limit of recompilations counts those of other tests
    pdcr = PDCRLoss([FRACTIONAL], 3, num_samples=40)
    compiled = torch.compile(pdcr, fullgraph=True, backend="aot_eager", dynamic=True)
    for height, width in ((24, 20), (33, 28), (18, 40)):
        features, labels = torch.randn(2, 5, height * 2 // 3, width // 2), blob_labels(2, (height, width), 3)
        torch.testing.assert_close(compiled([features], labels), pdcr([features], labels))


def test_random_sampling_goes_on_after_copying_and_pickling() -> None:
    maps, labels = feature_maps(), blob_labels(2, (24, 20), 3)
    pdcr = PDCRLoss(FIELDS, 3, num_samples=9, sampler="random", generator=torch.Generator().manual_seed(1))
    pdcr(maps, labels)
    others = [copy.deepcopy(pdcr), pickle.loads(pickle.dumps(pdcr))]
    following = [pdcr(maps, labels) for _ in range(2)]
    assert not torch.equal(*following)
    for other in others:
        assert torch.equal(torch.stack([other(maps, labels) for _ in range(2)]), torch.stack(following))


def test_pdcr_says_what_it_is() -> None:
    text = repr(PDCRLoss(FIELDS, 3, patch_size={"deep": 5}, temperature=0.1))
    assert "patches['stem']=ReceptiveField(size=(3, 3), stride=(2, 2), start=(-1, -1))" in text
    assert "patches['deep']=ReceptiveField(size=(5, 5), stride=(4, 4), start=(-2, -1))" in text
    assert "num_classes=3" in text
    assert "temperature=0.1" in text
    assert "affinity" not in text


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temperature", -1.0, ValueError),
        ("temperature", "warm", TypeError),
        ("reduction", "max", ValueError),
        ("border", "wrap", ValueError),
        ("sampler", "hex", ValueError),
        ("skip_homogeneous", "no", TypeError),
        ("include_background", 3, TypeError),
    ],
)
def test_options_that_change_later_are_checked_too(name: str, value: Any, error: type[Exception]) -> None:
    maps, labels = feature_maps(), blob_labels(2, (24, 20), 3)
    pdcr = PDCRLoss(FIELDS, 3)
    expected = pdcr(maps, labels)
    with pytest.raises(error, match=f"{name}: expected"):
        setattr(pdcr, name, value)
    assert torch.equal(pdcr(maps, labels), expected)
    pdcr.temperature = 0.1
    torch.testing.assert_close(pdcr(maps, labels), PDCRLoss(FIELDS, 3, temperature=0.1)(maps, labels))


@pytest.mark.parametrize("distance", ["sum", "tv"])
def test_multi_hot_labels_need_the_mean(distance: str) -> None:
    maps = feature_maps()
    labels = torch.ones(2, 3, 24, 20)
    labels[..., :10] = 0
    message = f"a sum of at most 1 for class_distance='{distance}' (multi-hot labels need 'mean')"
    with pytest.raises(ValueError, match=re.escape(message)):
        PDCRLoss(FIELDS, 3, class_distance=distance)(maps, labels)
    assert PDCRLoss(FIELDS, 3)(maps, labels).isfinite()
    one_hot = nn.functional.one_hot(blob_labels(2, (24, 20), 3), 3).movedim(-1, 1).float()
    assert PDCRLoss(FIELDS, 3, class_distance=distance)(maps, one_hot).isfinite()


@pytest.mark.skipif(not _backend.has_cpu_extension(), reason="the C++ extension is not installed")
def test_an_explicit_backend_compiles_into_one_graph() -> None:
    torch.compiler.reset()
    maps, labels = feature_maps(torch.float32), blob_labels(2, (24, 20), 3)
    pdcr = PDCRLoss(FIELDS, 3, backend="cpu")
    compiled = torch.compile(pdcr, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(maps, labels), pdcr(maps, labels))


INFINITE = ReceptiveField(size=(float("inf"), 3), stride=(1, 1), start=(0, 0), reason="attention")
VOLUME = ReceptiveField(size=(3, 3, 3), stride=(2, 2, 2), start=(-1, -1, -1))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"receptive_fields": {}}, ValueError, "receptive_fields: expected at least one layer, got none"),
        ({"receptive_fields": 3}, TypeError, "receptive_fields: expected a mapping or a sequence of Rec"),
        (
            {"receptive_fields": {"a": (3, 3)}},
            TypeError,
            "receptive_fields['a']: expected a ReceptiveField, got tuple",
        ),
        (
            {"receptive_fields": [STEM, INFINITE]},
            ValueError,
            "receptive_fields[1]: expected a finite field, or an infinite one with a location, got Recep",
        ),
        (
            {"receptive_fields": [STEM, VOLUME]},
            ValueError,
            "receptive_fields: expected fields with the same number of",
        ),
        ({"num_classes": 0}, ValueError, "num_classes: expected an integer of at least 1, got 0"),
        ({"num_samples": 0}, ValueError, "num_samples: expected an integer of at least 1, got 0"),
        ({"num_samples": 10.0}, TypeError, "num_samples: expected an integer, got float"),
        ({"temperature": -0.5}, ValueError, "temperature: expected a positive, finite number, got -0.5"),
        ({"sampler": "hex"}, ValueError, "sampler: expected one of 'grid', 'random', 'raster', got 'hex'"),
        ({"patch_size": 2.5}, TypeError, "patch_size: expected an integer, one per axis, or a mapping"),
        ({"patch_size": 0}, ValueError, "patch_size: expected an integer of at least 1, got 0"),
        (
            {"patch_size": (3, 3, 3)},
            ValueError,
            "patch_size: expected one integer, or 2, one per axis, got (3, 3, 3)",
        ),
        (
            {"patch_size": {"neck": 3}},
            ValueError,
            "patch_size: expected some of the layers ['stem', 'deep'], got ['neck",
        ),
        ({"affinity": "soft"}, ValueError, "affinity: expected one of"),
        ({"class_distance": "l2"}, ValueError, "class_distance: expected one of"),
        ({"border": "wrap"}, ValueError, "border: expected one of"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an integer or None, got float"),
        (
            {"min_valid_fraction": 1.5},
            ValueError,
            "min_valid_fraction: expected a number from 0 to 1, got 1.5",
        ),
        ({"variant": "3d"}, ValueError, "variant: expected one of"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
        (
            {"projection_channels": 64},
            ValueError,
            "projection_channels: expected None without a projection, got 64",
        ),
    ],
)
def test_bad_options_are_named(changed: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        PDCRLoss(**{"receptive_fields": FIELDS, "num_classes": 3, **changed})


MAPS, LABELS = feature_maps(torch.float32), torch.zeros(2, 24, 20, dtype=torch.long)


@pytest.mark.parametrize(
    ("features", "labels", "mask", "error", "message"),
    [
        (
            [MAPS["stem"]],
            LABELS,
            None,
            ValueError,
            "features: expected one map for each of 2 layers, got 1 maps",
        ),
        (
            {"stem": MAPS["stem"]},
            LABELS,
            None,
            ValueError,
            "features: expected the layers ['stem', 'deep'], got ['stem'",
        ),
        (
            [MAPS["stem"][0]] * 2,
            LABELS,
            None,
            ValueError,
            "features['stem']: expected a tensor (B, C, *spatial) with 2",
        ),
        ([MAPS["stem"].int()] * 2, LABELS, None, TypeError, "features['stem']: expected dtype float32"),
        (
            MAPS,
            LABELS.tolist(),
            None,
            TypeError,
            "labels: expected a tensor (B, [M,] *spatial) with 2 spatial axes, got",
        ),
        (
            MAPS,
            [],
            None,
            TypeError,
            "labels: expected a tensor (B, [M,] *spatial) with 2 spatial axes, got list",
        ),
        (
            MAPS,
            LABELS[0],
            None,
            ValueError,
            "labels: expected a tensor (B, [M,] *spatial) with 2 spatial axes, got",
        ),
        (MAPS, LABELS[:1], None, ValueError, "labels: expected a batch of 2, that of the features, got 1"),
        (
            MAPS,
            LABELS.to("meta"),
            None,
            ValueError,
            "labels: expected device cpu, where features['stem'] is, got meta",
        ),
        (MAPS, LABELS + 3, None, ValueError, "labels: expected integers from 0 to 2, got 3"),
        (
            MAPS,
            LABELS[:, ::2, ::2],
            None,
            ValueError,
            "labels: expected the resolution of the network's input, for f",
        ),
        (
            MAPS,
            LABELS.repeat(1, 1, 2),
            None,
            ValueError,
            "labels: expected the resolution of the network's input, for",
        ),
        (
            MAPS,
            LABELS,
            LABELS,
            ValueError,
            "mask: expected a tensor (B, 1, *spatial) with 2 spatial axes, got shape",
        ),
        (
            MAPS,
            LABELS,
            LABELS[:, None, :9],
            ValueError,
            "mask: expected shape (2, 1, 24, 20) (B and spatial shape of",
        ),
        (
            MAPS,
            LABELS,
            LABELS[:, None].to("meta"),
            ValueError,
            "mask: expected device cpu, where labels is, got meta",
        ),
    ],
)
def test_bad_inputs_are_named(
    features: Any, labels: Any, mask: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        PDCRLoss(FIELDS, 3)(features, labels, mask)


def test_bad_calls_of_the_two_halves_are_named() -> None:
    pdcr = PDCRLoss(FIELDS, 3)
    with pytest.raises(ValueError, match=re.escape("layer: expected one of ['stem', 'deep'], got 'neck'")):
        pdcr.sample(MAPS["stem"], "neck")
    with pytest.raises(ValueError, match="samples: expected at least one layer's samples, got none"):
        pdcr.loss([], LABELS)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extent"),
    [
        (3, 2, 1, 24),
        (3, 2, 1, 25),
        (2, 2, 0, 25),
        (4, 4, 0, 27),
        (7, 1, 0, 24),
        (5, 3, 2, 23),
        (11, 4, 5, 24),
    ],
)
def test_maps_of_every_usual_convolution_fit_their_labels(
    kernel: int, stride: int, padding: int, extent: int
) -> None:
    x = nn.functional.conv2d(
        torch.randn(1, 2, extent, 40), torch.randn(3, 2, kernel, kernel), None, stride, padding
    )
    field = ReceptiveField((kernel,) * 2, (stride,) * 2, (-padding,) * 2)
    assert PDCRLoss([field], 2)(x, blob_labels(1, (extent, 40), 2)).isfinite()


def test_examples() -> None:
    assert doctest.testmod(pdcr_loss).failed == 0
