"""The Triton kernels for the foreground ratios: the default kernel's bits, whichever axes are summed up."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest
import torch
from test_foreground_ratio import (
    BORDERS,
    FLOATS,
    IMPLEMENTATIONS,
    INTEGERS,
    SHAPES,
    STRIDES,
    assert_counted,
    random_labels,
    scattered,
)
from torch import Tensor

from contrastseg_fast import _backend
from contrastseg_fast.ops import foreground_ratio as ops

pytest.importorskip("triton")
if not (torch.cuda.is_available() or _backend.interpreting()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from contrastseg_fast.kernels import foreground_ratio as kernels
from contrastseg_fast.kernels.foreground_ratio import plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
by_default = IMPLEMENTATIONS["default"]


def counted(
    labels: Tensor, starts: Tensor, *options, with_inside: bool, summed_axes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels on the device under test, with results on the CPU."""
    inputs = labels.to(DEVICE), starts.to(DEVICE)
    ratios, valid_fraction, inside_ratios = kernels.foreground_ratio(
        *inputs, *options, with_inside, summed_axes
    )
    return ratios.cpu(), valid_fraction.cpu(), inside_ratios.cpu()


def counted_with(summed_axes: int | None):
    """The ratios and valid fractions that `counted` gives."""

    def count(labels: Tensor, starts: Tensor, *options) -> tuple[Tensor, Tensor]:
        return counted(labels, starts, *options, with_inside=False, summed_axes=summed_axes)[:2]

    return count


def assert_same_bits(labels: Tensor, starts: Tensor, *options) -> None:
    """Equal to the default kernel, from no, the first and all axes summed up."""
    expected = by_default(labels, starts, *options)
    for summed_axes in (0, 1, starts.shape[-1]):
        actual = counted_with(summed_axes)(labels, starts, *options)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_inside(labels: Tensor, starts: Tensor, size, num_classes: int, ignore_index: int | None) -> None:
    """Ratios inside the image are those of border="clip", and change no other result, bit for bit."""
    arguments = (labels, starts, size, num_classes)
    for summed_axes in {0, len(size)}:
        alone = {
            border: counted(*arguments, border, ignore_index, with_inside=False, summed_axes=summed_axes)
            for border in BORDERS
        }
        for border, (ratios, valid_fraction, nothing) in alone.items():
            results = counted(*arguments, border, ignore_index, with_inside=True, summed_axes=summed_axes)
            assert nothing.shape == (*ratios.shape[:2], 0)
            for actual, expected in zip(results, (ratios, valid_fraction, alone["clip"][0]), strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pixel_counts(shape: str, border: str) -> None:
    extents, size = SHAPES[shape]
    labels = random_labels(2, extents, 5, 255, -1)
    starts = scattered(2, 9, extents, size)
    for summed_axes in range(len(size) + 1):
        assert_counted(counted_with(summed_axes), labels, starts, size, 5, border, 255)
    assert_counted(counted_with(None), labels, starts[0], size, 5, border, 1)
    assert_counted(counted_with(None), labels, starts, size, 5, border, None)


@pytest.mark.parametrize("num_classes", [1, 2, 5, 70])
@pytest.mark.parametrize("ignore_index", [None, 0, 200])
def test_any_number_of_classes(num_classes: int, ignore_index: int | None) -> None:
    labels = random_labels(2, (13, 18), num_classes, 200)
    assert_same_bits(labels, scattered(2, 6, (13, 18), (6, 5)), (6, 5), num_classes, "full", ignore_index)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS, torch.uint64, torch.bool], ids=str)
def test_labels_of_any_dtype(dtype: torch.dtype) -> None:
    signed = dtype.is_signed and dtype != torch.bool
    labels = random_labels(2, (12, 17), 5, 100, -2 if signed else 3).to(dtype)
    starts = scattered(2, 7, (12, 17), (4, 7))
    for ignore_index in (None, -2, 100, 256, 2**40):
        expected = by_default(labels, starts, (4, 7), 5, "clip", ignore_index)
        for summed_axes in (0, 1):
            actual = counted_with(summed_axes)(labels, starts, (4, 7), 5, "clip", ignore_index)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_labels_far_out_of_range_count_for_no_class() -> None:
    labels = random_labels(1, (16, 24), 4, 2**63 - 1, -(2**63), 2**32, 2**32 + 1, 65536, -1, 4, 5)
    starts = scattered(1, 9, (16, 24), (5, 5))
    for ignore_index in (None, 2**63 - 1, -(2**63), 2**32 + 1):
        assert_counted(counted_with(0), labels, starts, (5, 5), 4, "full", ignore_index)
    for label in (math.inf, -math.inf, math.nan, 0.5, 3.5, -0.5, 1e30):
        assert_counted(counted_with(0), torch.full((1, 9, 9), label), torch.tensor([[1, 2]]), (5, 5), 4)


@pytest.mark.parametrize("num_classes", [3, 10])
def test_running_sums_may_wrap_around(num_classes: int) -> None:
    """In words of 32 and of 64 bits, the field of the last class is full many times over."""
    labels = torch.full((1, 90, 70), num_classes - 1, dtype=torch.uint8)
    labels[:, ::7, ::3] = 0
    starts = scattered(1, 12, (90, 70), (3, 2))
    assert_same_bits(labels, starts, (3, 2), num_classes, "full", None)
    assert_same_bits(labels, starts, (20, 13), num_classes, "full", None)


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(strides: str) -> None:
    starts = scattered(2, 6, (5, 8, 7), (4, 3, 6)).transpose(0, 1).contiguous().transpose(0, 1)
    labels = STRIDES[strides](torch.randint(0, 3, (2, 5, 8, 7), dtype=torch.int16))
    assert_same_bits(labels, starts, (4, 3, 6), 3, "background", 2)
    labels = STRIDES[strides](torch.randint(0, 3, (2, 3, 9, 7)).half())
    assert_same_bits(labels, starts[..., 1:], (3, 6), 3, "background", 2)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8, torch.int64, torch.bool], ids=str)
def test_soft_and_multi_hot_labels(dtype: torch.dtype) -> None:
    values = torch.rand(2, 3, 9, 14, dtype=torch.float64)
    labels = (values if dtype.is_floating_point else values.round()).to(dtype)
    starts = scattered(2, 6, (9, 14), (4, 6))
    assert_same_bits(labels, starts, (4, 6), 3, "clip", None)
    if dtype != torch.bool:
        labels = labels.masked_fill(torch.rand(2, 1, 9, 14) < 0.3, 2)
        assert_same_bits(labels, starts, (4, 6), 3, "background", 2)


@pytest.mark.parametrize("starts_dtype", [torch.int64, torch.int32, torch.int16])
def test_starts_of_any_dtype(starts_dtype: torch.dtype) -> None:
    labels = random_labels(2, (14, 15), 3)
    assert_same_bits(labels, scattered(2, 20, (14, 15), (4, 4)).to(starts_dtype), (4, 4), 3, "full", None)


@pytest.mark.parametrize("border", BORDERS)
def test_patches_far_outside(border: str) -> None:
    far = [0, 2**40, -(2**40), 2**63 - 1, -(2**63), 2**31, -(2**31)]
    labels = random_labels(1, (10, 12), 3)
    starts = torch.tensor(list(itertools.product(far, repeat=2)))
    assert_same_bits(labels, starts, (3, 4), 3, border, None)
    for size in ((2**40, 2**20), (2**31 + 5, 1), (5000, 4000)):
        assert_same_bits(labels, torch.tensor([[-7, -2], [3, 4]]), size, 3, border, 1)


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0), (2, 2, 0, 3, 3), (0, 3, 5, 5)])
@pytest.mark.parametrize("count", [0, 4])
def test_nothing_to_count(shape: tuple[int, ...], count: int) -> None:
    dims = 2 if len(shape) == 3 or shape[1] == 3 else 3
    labels = torch.zeros(shape).long()
    starts = torch.zeros(count, dims, dtype=torch.int64)
    options = ([2] * dims, 2 if dims == 3 else 3, "background", 7)
    expected = by_default(labels, starts, *options)
    torch.testing.assert_close(counted_with(None)(labels, starts, *options), expected, rtol=0, atol=0)
    *_, inside = counted(labels, starts, *options, with_inside=True, summed_axes=None)
    assert torch.equal(inside, by_default(labels, starts, *options[:2], "clip", 7)[0])


def test_words_that_come_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_TABLE_BYTES", 2 * 2 * 15 * 11 * 8)
    labels = random_labels(2, (15, 11), 40, 99)
    starts = scattered(2, 5, (15, 11), (9, 8))
    assert_same_bits(labels, starts, (9, 8), 40, "full", 99)
    assert_inside(labels, starts, (9, 8), 40, 99)


@pytest.mark.parametrize("ignore_index", [None, 1])
@pytest.mark.parametrize("shape", ["1d", "2d, larger than the image", "3d"])
def test_ratios_inside_the_image(shape: str, ignore_index: int | None) -> None:
    extents, size = SHAPES[shape]
    starts = scattered(2, 6, extents, size)
    assert_inside(random_labels(2, extents, 3, 255), starts, size, 3, ignore_index)
    soft = torch.rand(2, 3, *extents)
    soft.masked_fill_(torch.rand(2, 1, *extents) < 0.3, 1)
    assert_inside(soft, starts, size, 3, ignore_index)


def test_ratios_inside_the_image_of_patches_far_beyond_it() -> None:
    """Of areas above 2^24, whose quotients are divisions."""
    labels = random_labels(1, (10, 12), 3)
    assert_inside(labels, torch.tensor([[-7, -2], [-4995, -3990], [3, 20]]), (5000, 4000), 3, 1)


def test_quotients_of_small_counts_are_those_of_ieee_division() -> None:
    """All shares of an area just below 2^24, and of odd ones, of patches inside and outside the image."""
    labels = torch.ones(1, 1, 4001, dtype=torch.uint8)
    starts = torch.stack([torch.zeros(160).long(), torch.randint(-4092, 0, (160,))], -1)
    for size in ((4099, 4093), (3, 4001)):
        expected = by_default(labels, starts, size, 2, "background", None)
        actual = counted_with(2)(labels, starts, size, 2, "background", None)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_fields_have_room_for_every_patch() -> None:
    for num_classes, has_ignore, area in itertools.product(
        (1, 2, 3, 16, 17, 300), (False, True), (0, 1, 15, 121, 8281, 2**20, 2**31 - 1)
    ):
        fields = plan.choose_fields(num_classes, has_ignore, area)
        used = (fields.classes_per_word + has_ignore) * fields.bits
        assert area < 1 << fields.bits
        assert used < torch.iinfo(fields.dtype).bits
        assert fields.num_words * fields.classes_per_word >= num_classes
        assert (fields.num_words - 1) * fields.classes_per_word < num_classes


def test_axes_are_summed_where_patches_are_large_or_many() -> None:
    def choose(num_patches: int, size: tuple[int, ...], extents: tuple[int, ...] = (512, 512)) -> int:
        return plan.choose_summed_axes(8, num_patches, 1, extents, size, 8)

    assert choose(1024, (11, 11)) == 0
    assert choose(1, (400, 400)) > 0
    assert choose(1024, (91, 91)) > 0
    assert choose(16384, (300, 300)) == 2
    assert choose(1000, (3, 3, 3), (96, 96, 96)) == 0
    assert choose(1000, (64, 64, 64), (96, 96, 96)) > 0
    assert choose(5, (3, 3), (0, 7)) == 0


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_op_takes_these_kernels() -> None:
    labels = random_labels(2, (40, 50), 3, 9).cuda()
    starts = scattered(2, 30, (40, 50), (7, 7)).cuda()
    arguments = (labels, starts, [7, 7], 3, "full", 9)
    actual = ops.foreground_ratio(*arguments, True, "triton")
    torch.testing.assert_close(actual, kernels.foreground_ratio(*arguments, True), rtol=0, atol=0)
    torch.testing.assert_close(actual[:2], by_default(*arguments), rtol=0, atol=0)
    torch.library.opcheck(ops.foreground_ratio, (*arguments, True, "triton"))


def test_examples() -> None:
    assert doctest.testmod(plan).failed == 0
