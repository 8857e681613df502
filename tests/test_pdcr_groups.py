"""Rows grouped by equal ratios, interpreted on CPU tensors: what is skipped, and what results are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pdcr import CATEGORICAL, PAPER, RELEASED, assert_as_exact_as_plain, loss_and_gradient, make_inputs
from torch import Tensor
from torch.nn.functional import one_hot

from contrastseg_fast import _backend, problems
from contrastseg_fast.ops import pdcr
from contrastseg_fast.problems import NUM_GROUPS, PADDING

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not _backend.interpreting(), reason="kernels are interpreted with TRITON_INTERPRET=1 only"
)
if _backend.interpreting():
    import group_kernels

    from contrastseg_fast.kernels import pdcr as kernels
    from contrastseg_fast.kernels._tuning import Launch
    from contrastseg_fast.kernels.pdcr import layout, plan
    from contrastseg_fast.kernels.pdcr.rows import new_packed, pack

MIXED, LEFT_OUT = NUM_GROUPS - 2, NUM_GROUPS - 1
COLD = PAPER._replace(temperature=0.004)


@pytest.fixture(autouse=True)
def groups_of_few_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are always grouped, by few programs: interpreting takes long for every one."""
    monkeypatch.setattr(problems, "FEWEST_GROUPED", 1)
    monkeypatch.setattr(plan, "ROWS", plan.RowLaunch(1 << 13, 128, 4))
    monkeypatch.setattr(plan, "GROUP_ROWS", 256)
    monkeypatch.setattr(plan, "LOSS_BLOCK", 64)


@pytest.fixture(params=[True, False], ids=["deterministic", "atomic"])
def deterministic(request: pytest.FixtureRequest) -> bool:
    torch.use_deterministic_algorithms(request.param)
    return request.param


def mask_ratios(batch: int, count: int, classes: int, pure: float) -> Tensor:
    """Ratios of which a share is of one class alone, most of it of the last ones."""
    classes_of = classes - 1 - (torch.rand(batch, count) ** 3 * classes).long()
    mixed = torch.rand(batch, count, classes).softmax(-1)
    return torch.where(torch.rand(batch, count, 1) < pure, one_hot(classes_of, classes).float(), mixed)


def expected_groups(ratios: Tensor, valid: Tensor, categorical: bool) -> Tensor:
    """The groups of vectors `(N,)`, one after another."""
    groups = []
    for row, included in zip(ratios.tolist(), valid.tolist(), strict=True):
        group = MIXED
        if categorical:
            group = int(row[0]) if row[0] in range(MIXED) else MIXED
        elif all(ratio in (0, 1) for ratio in row) and sum(row) <= 1:
            group = min(row.index(1) + 1 if 1 in row else 0, MIXED)
        groups.append(group if included else LEFT_OUT)
    return torch.tensor(groups)


def expected_cores(numbers: Sequence[int]) -> list[int]:
    """What the kernels keep about the groups, from their numbers of vectors."""
    start, first_tiles, num_tiles = 0, [], []
    for group, number in enumerate(numbers):
        first = -(-start // PADDING)
        first_tiles.append(first)
        num_tiles.append(max((start + number) // PADDING - first, 0) if group < MIXED else 0)
        start += number
    valid_tiles = -(-sum(numbers[:LEFT_OUT]) // PADDING)
    return [*first_tiles, *num_tiles, valid_tiles, valid_tiles**2 - sum(each**2 for each in num_tiles)]


@pytest.mark.parametrize("case", ["two classes", "fifteen classes", "categories", "soft categories"])
def test_rows_lie_by_groups_in_the_order_of_vectors(case):
    batch, count, categorical = 2, 700, "categories" in case
    ratios = mask_ratios(batch, count, 15 if "fifteen" in case else 2, 0.9)
    if categorical:
        ratios = (torch.rand(batch, count, 1) ** 4 * 20 - 1) / (1 if "soft" in case else 0.25)
        ratios = ratios if "soft" in case else ratios.floor()
        ratios[0, :3] = torch.tensor([torch.nan, torch.inf, 1e20])[:, None]
    elif "fifteen" in case:
        ratios[0, :, 14] += ratios[0, :, 0] * (torch.rand(count) > 0.7)  # two ones, or more than one in all
    else:
        ratios = ratios[..., 1:]
    valid = torch.rand(batch, count) > 0.2
    affinity = CATEGORICAL if categorical else PAPER
    vectors = torch.arange(1.0, 1 + batch * count).view(batch, count, 1).repeat(1, 1, 8).bfloat16()
    call = pdcr._call(vectors, ratios.stride(0), ratios.shape[2], affinity)
    inputs = kernels.Inputs((vectors,), ratios, ratios.stride()[1:], valid)
    packed = new_packed(call, inputs.sources[0])
    scratch, _ = pack(call, inputs, packed, kernels._terms(call, affinity, torch.bfloat16))
    assert call.grouped
    assert (packed.rows.numel(), packed.floats.numel()) == call.saved_sizes()
    for image, record in enumerate(layout.lay_out(call, plan.ROWS).images):
        groups = expected_groups(ratios[image], valid[image], categorical)
        order = torch.argsort(groups, stable=True)
        place = packed.floats[record.rows_of_vectors :][: record.padded]
        assert torch.equal(place[order], torch.arange(float(count)))
        assert torch.equal(place[count:], torch.arange(float(count), record.padded))
        numbers = torch.bincount(groups, minlength=NUM_GROUPS).tolist()
        cores = expected_cores(numbers)
        assert packed.floats[record.cores :][: len(cores)].tolist() == cores
        rows = packed.rows[record.rows :][: record.padded * record.width].view(record.padded, -1)
        scale = packed.floats[record.scale :][: record.padded]
        length = vectors[image, order].float().norm(dim=1) * valid[image, order]
        shrunk = torch.where(length > 0, length / torch.exp2(length.log2().floor()), 0)
        torch.testing.assert_close(rows[:count].float().norm(dim=1), shrunk, rtol=1e-5, atol=0)
        assert torch.equal(scale[:count] < 0, ~valid[image, order])
        skipped = scratch[record.z :][: record.padded]
        for row, number in enumerate(skipped.tolist()):
            inside = [n for first, n in zip(cores[:MIXED], cores[NUM_GROUPS:], strict=False)
                      if first <= row // PADDING < first + n]  # fmt: skip
            assert number == PADDING * sum(inside)


def test_categories_of_any_number_are_whole_ones():
    """So that expected groups are those of the kernel for all numbers that fp32 holds."""
    ratios = torch.tensor([[0.0], [13.0], [14.0], [-1.0], [0.5], [3.0]])
    assert expected_groups(ratios, torch.ones(6, dtype=torch.bool), True).tolist() == [0, 13, 14, 14, 14, 3]


@settings(max_examples=12, deadline=None)
@given(
    some=st.dictionaries(
        st.integers(0, LEFT_OUT), st.sampled_from([1, 100, 128, 200, 256, 300, 500]), min_size=1, max_size=4
    ),
    shares=st.integers(1, 9),
    most=st.integers(1, 5),
    blocks=st.sampled_from([(128, 128), (128, 64), (64, 64), (128, 32), (64, 32)]),
)
def test_computed_and_skipped_pairs_are_all_pairs(some, shares, most, blocks):
    numbers = [some.get(group, 0) for group in range(NUM_GROUPS)]
    numbers[LEFT_OUT] += -sum(numbers) % PADDING
    block_i, block_j = blocks
    tiles = sum(numbers) // PADDING
    kept = expected_cores(numbers)
    expected = torch.zeros(tiles, tiles, dtype=torch.int64)
    expected[: kept[-2], : kept[-2]] = 1
    for first, number in zip(kept[:MIXED], kept[NUM_GROUPS:], strict=False):
        expected[first : first + number, first : first + number] = 0
    assert expected.sum() == kept[-1]
    expected = expected.repeat_interleave(PADDING // block_i, 0).repeat_interleave(PADDING // block_j, 1)
    cores = torch.tensor(kept, dtype=torch.float32)

    counts = torch.zeros_like(expected)
    least = -(-tiles // most)
    items = torch.tensor([[0, 0, number, shares, least, 0] for number in range(shares)])
    parts = torch.full((shares + len(expected),), -1)
    group_kernels.mark_backward(items, cores, counts, parts, block_i, block_j)
    assert torch.equal(counts, expected)
    first, number = group_kernels.parts_of_row_tiles(items, cores, len(expected), block_i)
    for tile in range(len(expected)):
        mine = (parts == tile).nonzero().flatten().tolist()
        assert len(mine) == number[tile]
        assert mine == list(range(int(first[tile]), int(first[tile] + number[tile])))
        assert len(mine) <= most + 1
    assert (parts < 1 << 20).all()

    counts = torch.zeros_like(expected)
    group_kernels.mark_forward(cores, counts, 3, block_i, block_j)
    row, column = torch.meshgrid(*map(torch.arange, expected.shape), indexing="ij")
    assert torch.equal(counts, expected * ((column + 1) * block_j > row * block_i))


MIXTURES = {
    "two classes": (2, 0.85, PAPER),
    "one class": (1, 0.9, PAPER),
    "five classes": (5, 0.95, PAPER),
    "twelve classes": (12, 0.95, PAPER),
    "none pure": (3, 0.0, PAPER),
    "all pure": (2, 1.0, PAPER),
    "overflowing": (2, 0.9, COLD),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_results_are_as_exact_as_plain_pytorch(mixture, deterministic):
    classes, pure, affinity = MIXTURES[mixture]
    dtype = torch.float16 if deterministic else torch.bfloat16
    vectors = torch.randn(1, 530, 24).to(dtype)
    ratios = mask_ratios(1, 530, classes, pure)
    if classes == 1:
        ratios = torch.rand(1, 530, 1) * (torch.rand(1, 530, 1) > 0.8)  # no foreground in most patches
    valid = torch.rand(1, 530) > 0.2
    assert_as_exact_as_plain(vectors, ratios, valid, affinity, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_group_of_all_vectors_leaves_nothing_to_compute(dtype, deterministic):
    """But for those beyond its last whole tile."""
    vectors = torch.randn(2, 300, 40).to(dtype)
    ratios = one_hot(torch.ones(2, 300, dtype=torch.int64), 3).float()
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[1, 256:] = False
    assert_as_exact_as_plain(vectors, ratios, valid, PAPER, "triton")


def test_categories(deterministic):
    vectors, categories = make_inputs(1, 600, 20, 1, torch.bfloat16, categorical=True)
    assert_as_exact_as_plain(vectors, categories.clamp(max=1), None, CATEGORICAL, "triton")
    own = torch.arange(300.0).view(1, 300, 1)
    assert_as_exact_as_plain(vectors[:, :300], own, None, CATEGORICAL, "triton")


def images_of_different_mixtures() -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, ratios and which are valid, of four images."""
    ratios = torch.cat([mask_ratios(1, 290, 2, pure) for pure in (1.0, 0.0, 0.9, 0.9)])
    ratios[0] = torch.tensor([1.0, 0.0])
    valid = torch.rand(4, 290) > 0.1
    valid[3] = False
    return torch.randn(4, 290, 16).bfloat16(), ratios, valid


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_images_of_different_mixtures(reduction, deterministic):
    vectors, ratios, valid = images_of_different_mixtures()
    grad = torch.linspace(-1, 2, 4) if reduction == "none" else torch.tensor(-1.7)
    exact = loss_and_gradient("default", vectors.double(), ratios, valid, PAPER, grad, reduction)
    plain = loss_and_gradient("default", vectors.float(), ratios, valid, PAPER, grad, reduction)
    actual = loss_and_gradient("triton", vectors, ratios, valid, PAPER, grad, reduction)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.shape == e.shape
        plain_error = (p.to(a.dtype).double() - e).norm()
        assert (a.double() - e).norm() <= 2 * plain_error + 5e-7 * e.norm()


def test_bits_are_equal_in_every_run():
    vectors, ratios, valid = images_of_different_mixtures()
    first, second = (
        loss_and_gradient("triton", vectors, ratios, valid, PAPER, torch.ones(4)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_nan_shows_where_its_pairs_are_skipped():
    vectors = torch.randn(2, 300, 16).bfloat16()
    vectors[0, 7, 3] = torch.nan
    ratios = one_hot(torch.zeros(2, 300, dtype=torch.int64), 2).float()
    loss, _, gradient = loss_and_gradient("triton", vectors, ratios, None, PAPER, torch.ones(2))
    assert loss.isnan().tolist() == [True, False]
    assert gradient.isnan().any(2).any(1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("count", "dtype", "channels", "affinity", "grouped"),
    [
        (99, torch.bfloat16, 256, PAPER, False),
        (100, torch.bfloat16, 256, PAPER, True),
        (100, torch.float16, 8, CATEGORICAL, True),
        (200, torch.float16, 8, PAPER, True),
        (201, torch.float16, 8, PAPER, False),
        (100, torch.bfloat16, 257, PAPER, False),
        (100, torch.float32, 256, PAPER, False),
        (100, torch.bfloat16, 256, RELEASED, False),
    ],
)
def test_rows_are_grouped_where_it_pays(count, dtype, channels, affinity, grouped, monkeypatch):
    monkeypatch.setattr(problems, "FEWEST_GROUPED", 100)
    monkeypatch.setattr(problems, "MOST_GROUPED", 200)
    call = pdcr._call(torch.zeros(1, count, channels, dtype=dtype), 0, 2, affinity)
    assert call.grouped == grouped


def test_shares_of_an_image_are_as_many_as_its_cost():
    """Of two images, the one with twice the rows gets most programs, and each at least one."""
    source = [problems.Source.dense((1, count, 64), (0, 64, 1)) for count in (8192, 16384)]
    one = [problems.Problem((problems.Segment(number, 0, 0, 0, 0),)) for number in range(2)]
    call = problems.Call.make(source, one, 2, torch.bfloat16, PAPER)
    tiles = layout.shares(call, plan.ROWS, Launch(128, 64, 8, 2), 100)
    assert tiles.spans.numbers[:, 1].tolist() == [40, 160]
    assert tiles.numbers == (200 + 64 + 128) * 128 * 64
    assert len(tiles.items) == 200
