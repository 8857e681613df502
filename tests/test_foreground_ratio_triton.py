"""The Triton kernels for the foreground ratios: the default kernel's bits, whichever axes are summed up."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

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

from contrastseg_fast import ReceptiveField, _backend, sampling
from contrastseg_fast.ops import foreground_ratio as ops
from contrastseg_fast.sample_plan import SamplePlan

pytest.importorskip("triton")
if not (torch.cuda.is_available() or _backend.interpreting()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from contrastseg_fast.kernels import _device_table
from contrastseg_fast.kernels import foreground_ratio as kernels
from contrastseg_fast.kernels.foreground_ratio import PatchSet, plan

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


def planned(
    size: tuple[int, ...], sampler: str, shape: tuple[int, ...], num_samples: int, field: ReceptiveField
) -> tuple[PatchSet, Tensor]:
    """The patches of a planned sample of a map, and where they start."""
    extents, counts = SamplePlan.make(sampler, shape, num_samples)
    starts = field.starts(sampling.sample(sampler, shape, num_samples))
    return PatchSet(size, None, shape, extents, counts, field.grids), starts


def given(size: tuple[int, ...], starts: Tensor) -> tuple[PatchSet, Tensor]:
    """Patches whose starts are on the device under test, and the starts."""
    return PatchSet(size, starts.to(DEVICE)), starts


def assert_sets(
    labels: Tensor,
    sets: Sequence[tuple[PatchSet, Tensor]],
    num_classes: int,
    border: str = "full",
    ignore_index: int | None = None,
    sums: Sequence[plan.Sums | int | None] = (None,),
) -> None:
    """The results of all sets lie one after another, each with the bits of the default kernel."""
    one_by_one = [
        (
            *by_default(labels, starts, patches.size, num_classes, border, ignore_index),
            by_default(labels, starts, patches.size, num_classes, "clip", ignore_index)[0],
        )
        for patches, starts in sets
    ]
    expected = [torch.cat([each.flatten() for each in results]) for results in zip(*one_by_one, strict=True)]
    patch_sets = [patches for patches, _ in sets]
    options = labels.to(DEVICE), patch_sets, num_classes, border, ignore_index
    for table, with_inside in ((sums[0], False), *((table, True) for table in sums)):
        results = kernels.foreground_ratios(*options, with_inside, table)
        wanted = [*expected[:2], expected[2] if with_inside else expected[2][:0]]
        for actual, right in zip(results, wanted, strict=True):
            assert torch.equal(actual.cpu(), right), (table, with_inside)


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
def test_sums_may_wrap_around(num_classes: int) -> None:
    """In words of 32 and of 64 bits, the field of the last class is full many times over."""
    labels = torch.full((1, 90, 70), num_classes - 1, dtype=torch.uint8)
    labels[:, ::7, ::3] = 0
    for size in ((3, 2), (20, 13)):
        starts = scattered(1, 12, (90, 70), size)
        patches = PatchSet(size, starts)
        for segments in ((64,), (64, 64)):
            assert_sets(labels, [(patches, starts)], num_classes, sums=[plan.Sums(segments, (True,))])


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


FIELDS_2D = (
    ReceptiveField((5, 9), (2, 3), (-2, -7)),
    ReceptiveField((5, 9), (Fraction(5, 3), Fraction(7, 4)), (Fraction(-9, 2), Fraction(-1, 3))),
    ReceptiveField((5, 9), (-3, 4), (20, -4)),
)
FIELDS_3D = (
    ReceptiveField((3, 4, 5), (2, 2, 1), (-4, 0, -3)),
    ReceptiveField((3, 4, 5), (Fraction(1, 2), Fraction(7, 3), 3), (Fraction(-5, 3), -2, Fraction(1, 7))),
)


@pytest.mark.parametrize(
    ("kind", "ignore_index", "border"),
    [
        ("indices", None, "full"),
        ("indices", 1, "background"),
        ("soft", 1, "clip"),
        ("soft", None, "background"),
    ],
)
def test_sets_of_patches_planned_and_given(kind: str, ignore_index: int | None, border: str) -> None:
    extents, classes = (23, 41), 3
    labels = random_labels(2, extents, classes, 255)
    if kind == "soft":
        labels = torch.rand(2, classes, *extents).masked_fill(torch.rand(2, 1, *extents) < 0.3, 1)
    sets = [
        planned((5, 9), "grid", (7, 9), 20, FIELDS_2D[0]),
        given((1, 1), scattered(1, 5, extents, (1, 1))[0].int()),
        planned((30, 50), "raster", (6, 5), 11, FIELDS_2D[1]),
        given((13, 2), scattered(2, 6, extents, (13, 2)).transpose(0, 1).contiguous().transpose(0, 1)),
        given((4, 4), torch.empty(0, 2, dtype=torch.int64)),
        planned((2, 11), "grid", (4, 3), 100, FIELDS_2D[2]),
    ]
    mixed = plan.Sums((8,), (True, False, True, False, True, True))
    sums = (None, 2, mixed) if kind == "soft" else (None, 0, 1, 2, mixed)
    assert_sets(labels, sets, classes, border, ignore_index, sums)
    if kind == "indices":
        assert_sets(labels, sets[1:2], classes, border, ignore_index)
        assert_sets(
            labels[:, 3], [given((4,), scattered(2, 9, (41,), (4,)))], classes, border, ignore_index, (0, 1)
        )


@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_sets_of_patches_of_volumes(kind: str) -> None:
    extents = (9, 11, 13)
    labels = random_labels(2, extents, 4, 7)
    if kind == "soft":
        labels = torch.rand(2, 4, *extents)
    sets = [
        planned((3, 4, 5), "grid", (4, 5, 6), 17, FIELDS_3D[0]),
        planned((6, 20, 3), "raster", (3, 4, 2), 10, FIELDS_3D[1]),
        given((2, 9, 9), scattered(2, 5, extents, (2, 9, 9))),
    ]
    two_of_three = plan.Sums((4, 2), (True, False, True))
    sums = (None, two_of_three) if kind == "soft" else (None, 0, 1, 2, 3, two_of_three)
    assert_sets(labels, sets, 4, "background", 7, sums)
    assert_sets(
        labels.movedim(-1, -2), [sets[2]], 4, "clip", None, sums=(3,) if kind == "soft" else (1, 2, 3)
    )


def test_patches_that_begin_and_end_where_segments_do() -> None:
    """All begins and lengths around the ends of segments of 4, along one, two and three axes."""
    places = torch.tensor(list(itertools.product(range(-5, 15), (0, 4)))).flip(1)
    labels = random_labels(1, (6, 13), 3)
    for length in (1, 4, 5, 13, 30):
        for labels_, starts, size, segments in (
            (labels, places, (4, length), [(4,), (1, 2)]),
            (labels.mT, places.flip(1), (length, 4), [(4, 4)]),
        ):
            sums = [plan.Sums(each, (True,)) for each in segments]
            assert_sets(labels_, [given(size, starts)], 3, "clip", 2, sums)
    volume = random_labels(1, (9, 9, 9), 3)
    starts = torch.tensor(list(itertools.product((-4, 0, 3, 4, 8), repeat=3)))
    for size in ((4, 4, 4), (1, 5, 9)):
        sums = [plan.Sums(segments, (True,)) for segments in ((4,), (4, 4), (4, 4, 4))]
        assert_sets(volume, [given(size, starts)], 3, "full", None, sums)


def test_sets_with_words_of_their_own_and_tables_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 classes, small patches take fewer words than large ones, which come a few words at a time."""
    monkeypatch.setattr(plan, "_TABLE_BYTES", 2 * 2 * 15 * 11 * 8)
    sets = [given(size, scattered(2, 5, (15, 11), size)) for size in ((2, 3), (15, 11), (9, 40))]
    request = plan.Request(2, (15, 11), 40, True, 8, False, tuple(plan.Boxes(p.size, 5) for p, _ in sets))
    sums = plan.Sums((4,), (False, True, True))
    launches = plan.rounds(request, [0, 1, 2], sums)
    assert [[each.number for each in launch] for launch in launches] == [[0, 1, 2]] + (len(launches) - 1) * [
        [1, 2]
    ]
    assert len(launches) > 2
    labels = random_labels(2, (15, 11), 40, 99)
    assert_sets(labels, sets, 40, "full", 99, (sums,))


def test_soft_labels_keep_the_precision_of_each_set() -> None:
    """Large patches have fewer bits behind the binary point, and do not take them from small ones."""
    labels = torch.rand(1, 2, 70, 75)
    sets = [given(size, scattered(1, 4, (70, 75), size)) for size in ((3, 3), (70, 75), (40, 70))]
    request = plan.Request(1, (70, 75), 2, False, 8, True, tuple(plan.Boxes(p.size, 4) for p, _ in sets))
    assert plan.launched_together(request) == [[0, 2], [1]]
    assert_sets(labels, sets, 2, sums=(None, 0, 1, plan.Sums((16,), (False, True, True))))


@pytest.mark.parametrize("is_wide", [False, True])
def test_planned_starts_far_out(is_wide: bool) -> None:
    """Where numbers do not fit into 32 bits, they are computed in 64."""
    stride = 2**32 if is_wide else 2**20
    field = ReceptiveField((3, 4), (stride, Fraction(stride, 3)), (-3 * stride + 2, -stride))
    patches = planned((3, 4), "grid", (9, 9), 81, field)
    assert patches[0].is_wide == is_wide
    assert (patches[1] < 0).any()
    labels = random_labels(1, (10, 12), 3)
    assert_sets(labels, [patches, given((3, 4), torch.tensor([[2, 3]]))], 3, "background", None, (0, 1))
    raster = planned((3, 4), "raster", (2**13, 2**12), 80, ReceptiveField((3, 4), (1, 1), (-4000, -2000)))
    assert raster[0].is_wide
    assert_sets(labels, [raster], 3)


def test_calls_with_new_starts_take_the_records_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records depend on shapes alone: a captured call is not captured again for other starts."""
    made = []
    monkeypatch.setattr(
        _device_table,
        "_make",
        lambda numbers, device: made.append(numbers) or torch.tensor(numbers, device=device),
    )
    labels = random_labels(1, (10, 12), 3)
    for _ in range(3):
        assert_sets(labels, [given((3, 5), scattered(1, 37, (10, 12), (3, 5)))], 3)
    assert len(made) <= 1


def test_axes_are_summed_where_patches_are_large_or_many() -> None:
    def choose(num_patches: int, *sizes: tuple[int, ...], extents: tuple[int, ...] = (512, 512)) -> plan.Sums:
        boxes = tuple(plan.Boxes(size, num_patches) for size in sizes)
        return plan.choose_sums(plan.Request(8, extents, 2, False, 8, False, boxes))

    assert choose(1024, (11, 11)).segments == ()
    assert len(choose(1, (400, 400)).segments) > 0
    assert len(choose(1024, (91, 91)).segments) == 1
    assert len(choose(16384, (300, 300)).segments) == 2
    assert choose(1000, (3, 3, 3), extents=(96, 96, 96)).segments == ()
    assert len(choose(1000, (64, 64, 64), extents=(96, 96, 96)).segments) > 0
    assert choose(5, (3, 3), extents=(0, 7)).segments == ()
    assert choose(1024, (3, 3), (91, 91)).used[1]


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
