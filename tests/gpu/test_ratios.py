"""Foreground ratios on the GPU against counting, and their guarantees."""

from __future__ import annotations

import pytest
import torch
from conftest import blob_labels
from torch import Tensor

from contrastseg_fast import functional
from contrastseg_fast.ops import foreground_ratio as op
from gpu.oracle import counted_on_the_cpu

EXTENTS = {"2D": (67, 93), "3D": (21, 18, 27)}
BORDERS = ["full", "clip", "background"]


def grid(device: torch.device, extents: tuple[int, ...], size: tuple[int, ...], step: int) -> Tensor:
    """Starts at equal steps, beyond the image on both sides."""
    axes = [torch.arange(-length, extent + 1, step) for extent, length in zip(extents, size, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2).to(device)


def scattered(device: torch.device, batch: int, count: int, extents: tuple[int, ...]) -> Tensor:
    places = [torch.randint(-8, extent + 8, (batch, count)) for extent in extents]
    return torch.stack(places, -1).to(device)


def patches(
    device: torch.device, places: str, batch: int, extents: tuple[int, ...], size: tuple[int, ...]
) -> Tensor:
    if places == "grid":
        return grid(device, extents, size, 6)
    return scattered(device, batch, 50, extents)


def assert_counted(labels: Tensor, starts: Tensor, size, num_classes: int, backend: str, **options) -> None:
    actual = functional.foreground_ratio(
        labels, starts, size, num_classes, validate=False, backend=backend, **options
    )
    expected = counted_on_the_cpu(labels, starts, size, num_classes, **options)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize("places", ["grid", "scattered"])
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("ignore_index", [None, 1, 255, -1])
@pytest.mark.parametrize("extents", EXTENTS.values(), ids=EXTENTS)
def test_every_pixel_counts(device, triton: str, extents, ignore_index, border: str, places: str) -> None:
    labels = blob_labels(2, extents, 5).to(device)
    if ignore_index is not None:
        labels[torch.rand(labels.shape, device=device) < 0.2] = ignore_index
    size = (7, 10, 5)[: len(extents)]
    starts = patches(device, places, 2, extents, size)
    assert_counted(labels, starts, size, 5, triton, border=border, ignore_index=ignore_index)


@pytest.mark.parametrize("places", ["grid", "scattered"])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.float32,
        torch.float16,
    ],
)
def test_labels_of_any_dtype(device, triton: str, places: str, dtype: torch.dtype) -> None:
    extents = (40, 61)
    labels = blob_labels(2, extents, 2 if dtype == torch.bool else 4).to(device, dtype)
    starts = patches(device, places, 2, extents, (9, 9))
    assert_counted(labels, starts, (9, 9), 4, triton)
    assert_counted(labels[:, None], starts, (9, 9), 4, triton, border="clip")


@pytest.mark.parametrize("places", ["grid", "scattered"])
@pytest.mark.parametrize("num_classes", [2, 3, 17, 128])
def test_any_number_of_classes(device, triton: str, places: str, num_classes: int) -> None:
    extents = (40, 50)
    labels = torch.randint(num_classes, (2, *extents), device=device)
    starts = patches(device, places, 2, extents, (11, 8))
    assert_counted(labels, starts, (11, 8), num_classes, triton)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.float32])
def test_labels_out_of_range_count_for_no_class(device, triton: str, dtype: torch.dtype) -> None:
    labels = torch.randint(4, (2, 30, 30), device=device)
    labels[:, ::3] = 4
    labels[:, ::4] = -7
    labels[:, ::5] = 30000
    starts = grid(device, (30, 30), (7, 7), 5)
    assert_counted(labels.to(dtype), starts, (7, 7), 4, triton)


@pytest.mark.parametrize("places", ["grid", "scattered"])
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("extents", EXTENTS.values(), ids=EXTENTS)
def test_soft_and_multi_hot_labels(device, triton: str, extents, dtype, border: str, places: str) -> None:
    soft = torch.rand(2, 3, *extents, device=device)
    labels = (soft > 0.5).to(dtype) if dtype == torch.int64 else soft.to(dtype)
    size = (7, 10, 5)[: len(extents)]
    starts = patches(device, places, 2, extents, size)
    actual = functional.foreground_ratio(
        labels, starts, size, 3, border=border, validate=False, backend=triton
    )
    expected = counted_on_the_cpu(labels, starts, size, 3, border=border)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["labels", "soft labels"])
@pytest.mark.parametrize("size", [(7, 10), (61, 40)])
def test_ratios_inside_the_image_are_those_of_clip(
    device, triton: str, size: tuple[int, int], kind: str
) -> None:
    """Bit for bit, whether pixels are read one by one or summed up, and whatever the border."""
    labels = blob_labels(2, (67, 93), 3).to(device)
    labels[:, ::5] = 1
    if kind == "soft labels":
        labels = torch.rand(2, 3, 67, 93, device=device).masked_fill_((labels == 1)[:, None], 1)
    starts = scattered(device, 2, 50, (67, 93))

    def count(border: str, with_inside: bool) -> tuple[Tensor, Tensor, Tensor]:
        return op.foreground_ratio(labels, starts, list(size), 3, border, 1, with_inside, triton)

    clipped, valid_fraction, _ = count("clip", False)
    for border in BORDERS:
        ratios, fraction, inside = count(border, True)
        assert torch.equal(inside, clipped)
        assert torch.equal(fraction, valid_fraction)
        assert torch.equal(ratios, count(border, False)[0])


def test_equal_contents_have_equal_ratios(device, triton: str) -> None:
    """To the bit, however they are counted."""
    pattern = torch.randint(4, (1, 16, 16), device=device)
    labels = pattern.repeat(1, 8, 8)
    starts = grid(device, (112, 112), (11, 11), 16)
    starts = starts[(starts >= 0).all(1)]
    ratios, _ = functional.foreground_ratio(labels, starts - starts % 16, (11, 11), 4, backend=triton)
    assert torch.equal(ratios, ratios[:, :1].expand_as(ratios))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(device, triton: str, layout: str) -> None:
    labels = blob_labels(2, (40, 46), 3).to(device)
    if layout == "transposed":
        labels = labels.mT
    elif layout == "sliced":
        labels = labels[:, 3:, ::2]
    else:
        labels = labels[:1].expand(3, -1, -1)
    starts = grid(device, tuple(labels.shape[1:]), (6, 9), 7)
    assert_counted(labels, starts, (6, 9), 3, triton)
    assert_counted(labels, starts.int()[None].expand(labels.shape[0], -1, -1), (6, 9), 3, triton)


@pytest.mark.parametrize(("shape", "count"), [((0, 9, 9), 3), ((2, 9, 9), 0), ((2, 0, 9), 3)])
def test_nothing_to_count(device, triton: str, shape: tuple[int, ...], count: int) -> None:
    labels = torch.zeros(shape, dtype=torch.long, device=device)
    starts = torch.zeros(count, 2, dtype=torch.long, device=device)
    ratios, fraction = functional.foreground_ratio(labels, starts, (3, 3), 3, backend=triton)
    assert ratios.shape == (shape[0], count, 3)
    assert torch.isfinite(ratios).all()
    assert torch.isfinite(fraction).all()


@pytest.mark.parametrize("places", ["grid", "scattered"])
@pytest.mark.parametrize(
    ("batch", "extents", "size"), [(8, (512, 512), (11, 11)), (2, (133, 128, 128), (11, 11, 11))]
)
def test_training_sizes_give_the_default_kernels_bits(
    device, triton: str, fit, places: str, batch: int, extents, size
) -> None:
    batch, extents = fit(batch, 1), tuple(fit(extent, 40) for extent in extents)
    labels = blob_labels(batch, extents, 4, scale=16).to(device)
    starts = (
        functional.sample_grid(extents, 1024, device=device)
        if places == "grid"
        else scattered(device, batch, 1024, extents)
    )
    actual = functional.foreground_ratio(labels, starts, size, 4, validate=False, backend=triton)
    default = torch._C.DispatchKey.CompositeExplicitAutograd
    options = (list(size), 4, "full", None, False, "auto")
    expected = op.foreground_ratio._op_dk(default, labels, starts, *options)
    for a, e in zip(actual, expected[:2], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_a_patch_as_large_as_the_image(device, triton: str, fit) -> None:
    extent = fit(4096, 64)
    labels = torch.randint(3, (1, extent, extent), dtype=torch.uint8, device=device)
    starts = torch.zeros(1, 2, dtype=torch.long, device=device)
    ratios, _ = functional.foreground_ratio(
        labels, starts, (extent, extent), 3, validate=False, backend=triton
    )
    expected = torch.stack([(labels == m).sum() for m in range(3)]).double() / extent**2
    assert torch.equal(ratios[0, 0], expected.float())


def test_validate_checks_the_range_on_any_device(device, triton: str) -> None:
    labels = torch.full((1, 9, 9), 3, device=device)
    starts = torch.zeros(1, 2, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="labels: expected integers from 0 to 2, got 3"):
        functional.foreground_ratio(labels, starts, (3, 3), 3, validate=True, backend=triton)
