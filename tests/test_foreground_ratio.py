"""The foreground-ratio operator against cropping every box and counting its pixels."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from contrastseg_fast import _backend
from contrastseg_fast.ops import foreground_ratio as ops

BORDERS = ("full", "clip", "background")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

needs_extension = pytest.mark.skipif(
    not _backend.has_cpu_extension(), reason="the C++ extension is not installed"
)


def by_operator(*arguments):
    """Ratios and valid fraction as dispatched: C++ where installed."""
    return ops.foreground_ratio(*arguments, False, "auto")[:2]


def in_plain_pytorch(*arguments):
    return ops._foreground_ratio(*arguments, False)[:2]


IMPLEMENTATIONS = {"op": by_operator, "default": in_plain_pytorch}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return IMPLEMENTATIONS[request.param]


def count_pixels(labels, starts, size, num_classes, border="full", ignore_index=None):
    """Eq. 4 patch by patch: ratios and valid fractions in fp64, rounded to fp32 once."""
    soft = labels.ndim == len(size) + 2
    values = labels.double().numpy()
    if not soft:
        values = values[:, None]
    batch, extents = values.shape[0], values.shape[2:]
    starts = starts.expand(batch, *starts.shape[-2:])
    ratios = np.zeros((batch, starts.shape[1], num_classes))
    fractions = np.zeros((batch, starts.shape[1]))
    for b, n in itertools.product(range(batch), range(starts.shape[1])):
        crop = [
            slice(min(max(first, 0), extent), min(max(first + length, 0), extent))
            for first, length, extent in zip(starts[b, n].tolist(), size, extents, strict=True)
        ]
        box = values[(b, slice(None), *crop)].reshape(values.shape[1], -1)  # (channels, pixels)
        inside = box.shape[1]
        box = box[:, ~(box == (math.nan if ignore_index is None else ignore_index)).all(0)]
        ignored = inside - box.shape[1]
        members = box.sum(1) if soft else np.array([(box == m).sum() for m in range(num_classes)], float)
        if border == "background":
            members[0] += math.prod(size) - inside
        denominator = (inside if border == "clip" else math.prod(size)) - ignored
        if denominator > 0:
            ratios[b, n] = members / denominator
        if inside > 0:
            fractions[b, n] = (inside - ignored) / inside
    return torch.from_numpy(ratios).float(), torch.from_numpy(fractions).float()


def assert_counted(implementation, labels, starts, size, num_classes, border="full", ignore_index=None):
    actual = implementation(labels, starts, size, num_classes, border, ignore_index)
    expected = count_pixels(labels, starts, size, num_classes, border, ignore_index)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    return actual


def grid(extents, size, step) -> Tensor:
    """Corners `(N, D)` at equal steps, hanging over the image at both ends."""
    axes = [torch.arange(-length // 2, extent, step) for extent, length in zip(extents, size, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def scattered(batch, count, extents, size) -> Tensor:
    """Random corners `(B, N, D)`: inside the image, over its border, and wholly outside."""
    axes = [
        torch.randint(-2 * length, extent + length, (batch, count))
        for extent, length in zip(extents, size, strict=True)
    ]
    return torch.stack(axes, -1)


def random_labels(batch, extents, num_classes, *others) -> Tensor:
    """Class indices; each of `others` takes the place of a fifth of them."""
    labels = torch.randint(0, num_classes, (batch, *extents))
    for other in others:
        labels[torch.rand(labels.shape) < 0.2] = other
    return labels


SHAPES = {
    "1d": ((37,), (5,)),
    "2d": ((23, 41), (5, 9)),
    "2d, one pixel": ((11, 13), (1, 1)),
    "2d, larger than the image": ((7, 9), (20, 30)),
    "2d, one row": ((1, 33), (1, 8)),
    "2d, one column": ((33, 1), (8, 1)),
    "3d": ((7, 9, 12), (3, 4, 5)),
    "3d, larger than the image": ((3, 5, 4), (9, 2, 7)),
    "3d, one plane": ((1, 6, 19), (1, 3, 8)),
}


@pytest.mark.parametrize("ignore_index", [None, 1, 255, -1])
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pixel_counts(implementation, shape, border, ignore_index):
    extents, size = SHAPES[shape]
    labels = random_labels(2, extents, 5, 255, -1)
    assert_counted(implementation, labels, grid(extents, size, 4), size, 5, border, ignore_index)
    assert_counted(implementation, labels, scattered(2, 25, extents, size), size, 5, border, ignore_index)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4, 7, 8, 9, 128, 300])
def test_any_number_of_classes(implementation, num_classes):
    labels = random_labels(2, (17, 22), num_classes, 10_000)
    for ignore_index in (None, 10_000, num_classes - 1):
        for starts in (grid((17, 22), (6, 5), 4), torch.tensor([[3, 4]])):
            assert_counted(implementation, labels, starts, (6, 5), num_classes, "full", ignore_index)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS, torch.bool], ids=str)
def test_labels_of_any_dtype(implementation, dtype):
    signed = dtype.is_signed and dtype != torch.bool
    labels = random_labels(2, (19, 27), 5, 100, -2 if signed else 3).to(dtype)
    for ignore_index in (None, -2, 100, 255, 256, 2**40):
        for starts in (grid((19, 27), (4, 7), 3), torch.tensor([[-2, 3]])):
            assert_counted(implementation, labels, starts, (4, 7), 5, "clip", ignore_index)


def test_labels_far_out_of_range_count_for_no_class(implementation):
    extremes = (2**63 - 1, -(2**63), 2**32, 2**32 + 1, 65536, -1, 4, 5)
    labels = random_labels(1, (16, 24), 4, *extremes)
    assert_counted(implementation, labels, grid((16, 24), (5, 5), 3), (5, 5), 4)
    for label in (math.inf, -math.inf, math.nan, 0.5, 3.5, -0.5, 1e30):
        assert_counted(implementation, torch.full((1, 9, 9), label), torch.tensor([[1, 2]]), (5, 5), 4)
    assert implementation(labels, torch.tensor([[0, 0]]), (16, 24), 4, "full", 2**63 - 1)[1] < 1


STRIDES = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 0))[..., 1:, 3:-2],
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "reversed axes": lambda x: x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1]),
    "one image for all": lambda x: x[:1].expand(x.shape),
    "one row for all": lambda x: x[..., :1, :].expand(x.shape),
    "one column for all": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("extents", [(18, 21), (5, 8, 13)])
@pytest.mark.parametrize("kind", ["indices", "float indices", "soft"])
def test_any_strides(implementation, kind, extents, strides):
    if kind == "soft":
        labels = torch.randint(0, 257, (2, 3, *extents)) / 256
    else:
        labels = random_labels(2, extents, 3).to(torch.float32 if kind == "float indices" else torch.int32)
    labels = STRIDES[strides](labels)
    size = (4, 5, 6)[: len(extents)]
    for starts in (grid(extents, size, 3), grid(extents, size, 3).T.contiguous().T[:2]):
        assert_counted(implementation, labels, starts, size, 3, "background")


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("ignore_index", [None, 0, 2])
def test_soft_and_multi_hot_labels(implementation, dtype, border, ignore_index):
    multi_hot = not dtype.is_floating_point
    values = torch.rand(2, 3, 15, 20, dtype=torch.float64)
    labels = (values.round() if multi_hot else values).to(dtype)
    ignored = torch.rand(2, 1, 15, 20) < 0.3
    if ignore_index is not None and dtype != torch.bool:
        labels = labels.masked_fill(ignored, ignore_index)
    for starts in (scattered(2, 30, (15, 20), (4, 6)), torch.tensor([[2, 3]])):
        actual = implementation(labels, starts, (4, 6), 3, border, ignore_index)
        expected = count_pixels(labels, starts, (4, 6), 3, border, ignore_index)
        torch.testing.assert_close(actual[0], expected[0], rtol=2e-7, atol=1e-11)
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0)
        if multi_hot:
            torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)


def test_soft_labels_elsewhere_leave_no_trace(implementation):
    """Differences of running sums in floating point would leave some: 1e-17 instead of 0."""
    labels = torch.rand(1, 2, 40, 60)
    labels[:, 0, 10:30, 20:50] = 0
    labels[:, 1, 10:30, 20:50] = 0.3
    starts = grid((40, 60), (6, 6), 1)
    ratios, _ = implementation(labels, starts, (6, 6), 2, "full", None)
    inside = ((starts >= torch.tensor([10, 20])) & (starts < torch.tensor([25, 45]))).all(1)
    assert inside.sum() == 15 * 25
    assert torch.equal(ratios[0, inside], torch.tensor([0, 0.3]).expand(15 * 25, 2))


def test_duplicate_boxes_and_equal_contents_have_equal_ratios(implementation):
    labels = random_labels(1, (12, 30), 3).repeat(1, 3, 2)
    starts = grid((12, 30), (7, 11), 2)
    starts = starts[(starts >= 0).all(1) & (starts + torch.tensor([7, 11]) <= torch.tensor([12, 30])).all(1)]
    shifts = torch.tensor([[0, 0], [12, 0], [24, 30], [0, 0]])
    for border in BORDERS:
        ratios, _ = implementation(labels, (starts + shifts[:, None]).flatten(0, 1), (7, 11), 3, border, None)
        first, *others = ratios.view(4, len(starts), 3)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("border", BORDERS)
def test_boxes_far_outside(implementation, border):
    far = [0, 2**40, -(2**40), 2**63 - 1, -(2**63), 2**31, -(2**31)]
    for extents in ((10, 12), (4, 5, 6)):
        size = (3, 4, 5)[: len(extents)]
        labels = random_labels(1, extents, 3)
        starts = torch.tensor(list(itertools.product(far, repeat=len(extents))))
        assert_counted(implementation, labels, starts, size, 3, border)
        assert_counted(implementation, labels, -torch.tensor(size)[None] + 1, size, 3, border)
    whole, _ = implementation(labels, torch.full((1, 3), -(2**40)), (2**41,) * 3, 3, "clip", None)
    assert torch.equal(whole, count_pixels(labels, torch.zeros(1, 3).long(), extents, 3)[0])


@pytest.mark.parametrize("starts_dtype", [torch.int64, torch.int32, torch.int16])
def test_starts_for_all_images_or_for_each(implementation, starts_dtype):
    labels = random_labels(3, (14, 15), 3)
    starts = scattered(3, 20, (14, 15), (4, 4)).to(starts_dtype)
    each = assert_counted(implementation, labels, starts, (4, 4), 3)
    shared = assert_counted(implementation, labels, starts[1], (4, 4), 3)
    assert torch.equal(each[0][1], shared[0][1])


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0), (0, 0, 0), (2, 0, 3, 3), (2, 3, 3, 0)])
@pytest.mark.parametrize("count", [0, 4])
def test_nothing_to_count(implementation, shape, count):
    dims = len(shape) - 1
    starts = torch.zeros(count, dims, dtype=torch.int64)
    ratios, valid_fraction = implementation(torch.zeros(shape).long(), starts, [2] * dims, 3, "background", 7)
    assert ratios.shape == (shape[0], count, 3)
    assert torch.equal(ratios, torch.tensor([1.0, 0, 0]).expand(ratios.shape)) or 0 not in shape[1:]
    assert valid_fraction.shape == (shape[0], count)
    assert not valid_fraction.any() or 0 not in shape[1:]


def test_all_pixels_ignored(implementation):
    labels = torch.full((1, 8, 9), 255, dtype=torch.uint8)
    starts = torch.tensor([[2, 2], [-1, -1], [20, 20]])
    for border, expected in (("full", 0), ("clip", 0)):
        ratios, valid_fraction = assert_counted(implementation, labels, starts[:2], (3, 3), 2, border, 255)
        assert ratios[0, 0].tolist() == [expected] * 2
        assert not valid_fraction.any()
    ratios, valid_fraction = assert_counted(implementation, labels, starts, (3, 3), 2, "background", 255)
    assert ratios[0].tolist() == [[0, 0], [1, 0], [1, 0]]
    assert not valid_fraction.any()


# The C++ kernel cuts images into blocks and takes one of three ways: each must be taken.
LARGE = {
    "few boxes": ((300, 200), (90, 70), 5, torch.int64, 4),
    "few tall boxes": ((70_000, 40), (66_000, 3), 1, torch.uint8, 3),
    "boxes sparse at every row": ((257, 190), (35, 35), 150, torch.int64, 4),
    "boxes dense at every row": ((64, 130), (11, 35), 3000, torch.int16, 6),
    "a tall image": ((70_000, 3), (66_000, 2), 40, torch.int32, 3),
    "a tall image of one class": ((20_000, 70), (19_000, 60), 30, torch.uint8, 3),
    "a wide image": ((3, 70_000), (2, 66_000), 40, torch.float32, 3),
    "a volume of several strips": ((4, 300, 700), (2, 260, 250), 30, torch.uint8, 3),
    "a volume with many boxes": ((20, 48, 40), (9, 11, 13), 2000, torch.int8, 5),
}


@needs_extension
@pytest.mark.parametrize("case", LARGE)
def test_every_way_gives_the_same_bits_on_any_number_of_threads(case):
    extents, size, count, dtype, num_classes = LARGE[case]
    labels = random_labels(2, extents, num_classes, 100).to(dtype)
    labels[..., : extents[-1] // 2] = 1
    starts = scattered(2, count, extents, [length // 3 + 1 for length in size])
    starts[:, 0] = 0
    soft = torch.rand(1, 2, *extents) * 2**-30 if math.prod(extents) < 100_000 else None
    expected = in_plain_pytorch(labels, starts, size, num_classes, "full", 100)
    expected_soft = None if soft is None else in_plain_pytorch(soft, starts[:1], size, 2, "clip", None)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5, 32):
            torch.set_num_threads(number)
            actual = by_operator(labels, starts, size, num_classes, "full", 100)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            if soft is not None:
                actual = by_operator(soft, starts[:1], size, 2, "clip", None)
                torch.testing.assert_close(actual, expected_soft, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
    chosen = torch.randint(0, count, (8,))
    assert_counted(by_operator, labels[:1], starts[:1, chosen], size, num_classes, "full", 100)


@needs_extension
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("extents", [(45, 61), (9, 14, 17)])
def test_default_kernel_gives_the_same_bits(extents, border):
    size = (8, 7, 5)[: len(extents)]
    starts = scattered(2, 200, extents, size)
    for labels, num_classes in ((random_labels(2, extents, 6, 99), 6), (torch.rand(2, 3, *extents), 3)):
        actual = by_operator(labels, starts, size, num_classes, border, 99)
        expected = in_plain_pytorch(labels, starts, size, num_classes, border, 99)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# Freshly allocated memory of the C++ code is filled too, by glibc.
@needs_extension
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_other_vector_code_gives_the_same_bits(capability, tmp_path):
    cases = [
        (random_labels(2, (33, 50), 5, 99).to(dtype), grid((33, 50), (7, 9), 2), (7, 9), 5, "full", 99)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS)
    ]
    cases.append((torch.rand(1, 3, 33, 50), scattered(1, 30, (33, 50), (6, 5)), (6, 5), 3, "clip", 1))
    cases.append(
        (random_labels(1, (6, 20, 31), 9), grid((6, 20, 31), (3, 7, 9), 1), (3, 7, 9), 9, "clip", None)
    )
    cases.append((random_labels(1, (90, 90), 9), torch.tensor([[3, 5]]), (13, 19), 9, "clip", None))
    torch.save(cases, tmp_path / "cases.pt")
    code = """
import sys, torch
from contrastseg_fast.ops.foreground_ratio import foreground_ratio, labels_in_range
cases = torch.load(sys.argv[1])
results = [foreground_ratio(*case, False, "auto")[:2] for case in cases]
limits = [(case[0], case[3] - i) for case in cases for i in (1, 2)]
checks = [labels_in_range(labels, highest, True, 99).item() for labels, highest in limits]
torch.save((results, checks), sys.argv[2])
"""
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cases.pt", tmp_path / "results.pt"],
        env={**os.environ, "CONTRASTSEG_FAST_CPU": capability, "MALLOC_PERTURB_": "165"},
        cwd=Path(ops.__file__).parents[2],
        check=True,
    )
    results, checks = torch.load(tmp_path / "results.pt")
    torch.testing.assert_close(results, [in_plain_pytorch(*case) for case in cases], rtol=0, atol=0)
    assert checks == [True, False] * 9 + [False, False, True, False, True, False]


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("count", [ops.foreground_ratio, ops._foreground_ratio])
def test_ratios_inside_the_image_come_from_the_same_count(border, count):
    size = (8, 7)
    starts = scattered(2, 100, (45, 61), size)
    soft = torch.rand(2, 3, 45, 61)
    soft[0, :, :20] = 99
    for labels, num_classes in ((random_labels(2, (45, 61), 6, 99), 6), (soft, 3)):
        for ignore_index in (None, 99):
            options = (labels, starts, size, num_classes, border, ignore_index)
            ratios, valid_fraction, inside = count(*options, True, "auto")
            expected = count(*options[:4], "clip", ignore_index, False, "auto")[0]
            assert torch.equal(inside, expected)
            without = count(*options, False, "auto")
            assert torch.equal(ratios, without[0])
            assert torch.equal(valid_fraction, without[1])
            assert without[2].shape == (2, 100, 0)


def check_range(labels, *options) -> bool:
    results = {f(labels, *options).item() for f in (ops.labels_in_range, ops._labels_in_range)}
    assert len(results) == 1
    return results.pop()


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS], ids=str)
def test_range_of_class_indices(dtype):
    labels = torch.randint(0, 4, (3, 17, 19)).to(dtype)
    labels[1, 5, 6] = 3
    assert check_range(labels, 3, True, None)
    assert check_range(labels.mT, 3, True, None)
    assert check_range(labels[:, ::2, ::3], 3, True, None)
    assert not check_range(labels, 2, True, None)
    assert check_range(labels, 2, True, 3)
    assert check_range(labels[:0], 2, True, None)
    for position in itertools.product((0, 2), (0, 16), (0, 18)):
        wrong = labels.clone()
        wrong[position] = 100
        assert not check_range(wrong, 3, True, None)
        assert not check_range(wrong, 3, True, 255)
        assert check_range(wrong, 3, True, 100)
        if dtype.is_signed:
            wrong[position] = -1
            assert not check_range(wrong, 3, True, None)
            assert check_range(wrong, 3, True, -1)
        if dtype.is_floating_point:
            for value in (0.5, math.nan, math.inf, -math.inf, -0.25):
                wrong[position] = value
                assert not check_range(wrong, 3, True, None)
    assert not check_range(torch.full((1, 2, 2), 255, dtype=torch.uint8), 3, True, -1)


def test_range_of_soft_labels():
    labels = torch.rand(2, 3, 9, 11)
    labels[0, 0, 0, 0], labels[1, 2, 8, 10] = 0, 1
    assert check_range(labels, 1, False, None)
    assert not check_range(labels, 1, True, None)
    labels[0, 1, 3, 3] = 1 + 1e-6
    assert not check_range(labels, 1, False, None)
    labels[0, 1, 3, 3] = -9
    assert check_range(labels, 1, False, -9)
    labels[0, 1, 3, 3] = math.nan
    assert not check_range(labels, 1, False, None)


SAMPLES = {
    "indices": (random_labels(2, (9, 10), 3), grid((9, 10), (3, 3), 4), [3, 3], 3, "full", None),
    "ignored": (random_labels(2, (9, 10), 3, 5).byte(), grid((9, 10), (3, 3), 4), [3, 3], 3, "clip", 5),
    "soft": (
        torch.rand(2, 2, 4, 5, 6),
        scattered(2, 5, (4, 5, 6), (2, 2, 2)),
        [2, 2, 2],
        2,
        "background",
        None,
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample):
    torch.library.opcheck(ops.foreground_ratio, (*SAMPLES[sample], False, "auto"))
    torch.library.opcheck(ops.foreground_ratio, (*SAMPLES[sample], True, "auto"))
    torch.library.opcheck(ops.labels_in_range, (SAMPLES[sample][0], 2, False, None))


@pytest.mark.parametrize("sample", SAMPLES)
def test_compiled_as_one_graph(sample):
    labels, starts, size, num_classes, border, ignore_index = SAMPLES[sample]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(labels, starts):
        ratios, valid_fraction = by_operator(labels, starts, size, num_classes, border, ignore_index)
        return ratios * 2, valid_fraction + ops.labels_in_range(labels, 2, False, ignore_index)

    expected = by_operator(*SAMPLES[sample])
    actual = both(labels, starts)
    torch.testing.assert_close(actual, (expected[0] * 2, expected[1] + 1), rtol=0, atol=0)
    default = torch.compile(in_plain_pytorch, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(default(*SAMPLES[sample]), expected, rtol=0, atol=0)


def test_labels_that_require_a_gradient_get_none(implementation):
    labels = torch.rand(1, 2, 6, 6, requires_grad=True)
    weight = torch.ones(2, requires_grad=True)
    ratios, valid_fraction = by_operator(labels, torch.tensor([[1, 1]]), [3, 3], 2, "full", None)
    assert not ratios.requires_grad
    assert not valid_fraction.requires_grad
    (ratios * weight).sum().backward()
    assert labels.grad is None
