"""What the package launches on a GPU, compiled for cards that this machine does not need, and counted.

`make test` compiles the calls that are counted for all cards, and the launch tables for sm_90. Of kernels
that differ only in fp16 and bf16, it compiles those in bf16. `make aot` compiles everything for all cards.
"""

from __future__ import annotations

import functools
import itertools
import os
from concurrent.futures import Future, ThreadPoolExecutor

import ahead_of_time
import pytest
from dry_jit import CALLS, PROCESSORS, SOURCES, Count, Recording, Variant

triton = pytest.importorskip("triton")

EVERYTHING = os.environ.get("CONTRASTSEG_FAST_AOT") == "all"
KERNELS = (
    *("pdcr_rows_kernel", "pdcr_fwd_kernel", "pdcr_loss_kernel", "pdcr_bwd_kernel", "pdcr_grad_kernel"),
    *("pdcr_groups_kernel", "pdcr_bwd_groups_kernel", "pdcr_fwd_slab_kernel", "pdcr_pairs_kernel"),
    *("pdcr_small_fwd_kernel", "pdcr_small_bwd_kernel"),
    *("gather_kernel", "locate_kernel", "gather_bwd_kernel"),
    *("patch_ratio_kernel", "segment_sum_kernel", "fixed_point_kernel"),
    *("entropy_gate_fwd_kernel", "entropy_gate_bwd_kernel"),
)
FUSED = ("pdcr_fwd_kernel", "pdcr_bwd_kernel", "pdcr_bwd_groups_kernel")
SMALL = ("pdcr_small_fwd_kernel", "pdcr_small_bwd_kernel")
OVERLAPPED = ("pdcr_bwd_hopper_kernel", "pdcr_bwd_groups_hopper_kernel")  # of sm_90 alone
ALSO_READ = ("pdcr_fwd_slab_kernel", "pdcr_pairs_kernel", "pdcr_rows_kernel", "pdcr_grad_kernel")
READ = (*FUSED, *OVERLAPPED, *SMALL, *ALSO_READ)
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# Bytes at most, where ptxas gives up a few registers for one more block on a processor: each spilled value is
# stored and loaded once, and allowing the first 128 registers removes the stack.
STACKS = {
    "patch_ratio_kernel": 40,
    "segment_sum_kernel": 80,  # of soft and strided labels, 64 words a thread
    "pdcr_fwd_kernel": 24,  # of five to eight classes
    "pdcr_bwd_groups_kernel": 48,  # of 128 channels: between row tiles, not between column tiles
    "pdcr_bwd_groups_hopper_kernel": 104,  # of 256 channels: between row tiles, not between column tiles
    "pdcr_loss_kernel": 16,  # of 32 and 64 channels, with grouped rows
    "pdcr_fwd_slab_kernel": 16,  # of five classes, fp32
    "entropy_gate_bwd_kernel": 16,  # of five to eight classes, bf16
}
# Of many classes, in calls of three widths; of grouped rows of 256 channels, nearly all once a row tile.
STACKS_OF_CARDS = {
    (100, "pdcr_fwd_kernel"): 104,
    (80, "pdcr_bwd_kernel"): 8,
    (80, "pdcr_small_fwd_kernel"): 8,  # of 32 channels
    (100, "pdcr_small_bwd_kernel"): 8,  # of 64 channels
    (100, "pdcr_bwd_groups_kernel"): 160,
}
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    # Triton 3.6 spills where 3.9 does not: a few slabs of fp32; and more of the sums.
    STACKS |= {"pdcr_pairs_kernel": 8, "segment_sum_kernel": 176}
# Asynchronous copies to shared memory, 16 bytes each.
COPY = r"LDGSTS\.E\.(BYPASS\.)?(LTC128B\.)?128"

# Launches of `CALLS`: Triton kernels, and ATen calls that launch. The goal is at most 8 in all for a
# `pdcr_loss` and its gradient, and at most 25 for a whole call of `PDCRLoss` and its gradients.
LAUNCHES = {
    "pdcr_loss, N=128, C=64, bf16": (2, 1),
    "pdcr_loss, N=1024, C=256, bf16": (4, 1),
    "pdcr_loss, N=16384, C=256, bf16": (6, 1),
    "pdcr_loss, N=1024, C=256, fp32": (5, 2),
    "PDCRLoss, three layers, B=8, N=1024": (7, 1),
    "entropy_gate, fp32": (2, 0),
    "entropy_gate, bf16, channels_last": (2, 0),
}


SOME_SOURCES = {80: ("counts",), 90: ("tables", "counts", "overlapped"), 100: ("counts",)}


@functools.cache
def recordings() -> dict[int, Future[Recording]]:
    """The recording of every card; all are made at the same time, while others are compiled."""
    pool = ThreadPoolExecutor(len(ahead_of_time.CAPABILITIES))
    return {
        capability: pool.submit(
            ahead_of_time.record, capability, SOURCES if EVERYTHING else SOME_SOURCES[capability]
        )
        for capability in ahead_of_time.CAPABILITIES
    }


def recorded(capability: int) -> Recording:
    return recordings()[capability].result()


@functools.cache
def compiled(capability: int) -> dict[Variant, ahead_of_time.Compiled]:
    calls = recorded(capability).variants

    def is_chosen(variant: Variant) -> bool:
        other = variant.in_bf16()
        return EVERYTHING or calls[variant].source == "tables" or other == variant or other not in calls

    return ahead_of_time.compile_all(capability, filter(is_chosen, calls), READ)


def variants(capability: int, kernel: str) -> dict[Variant, ahead_of_time.Compiled]:
    found = {each: result for each, result in compiled(capability).items() if each.kernel == kernel}
    if not found and not EVERYTHING:
        pytest.skip("not among the calls that are compiled without `make aot`")
    return found


def assert_none(failed: list[tuple[Variant, str]], capability: int) -> None:
    """Name every variant that failed, and the call that launches it."""
    calls = recorded(capability).variants
    lines = [f"{why}: {variant.describe()}\n    launched by {calls[variant].name}" for variant, why in failed]
    assert not failed, "\n".join(lines)


def on_their_cards(kernels: tuple[str, ...]) -> list[tuple[int, str]]:
    """Every card with each of some kernels, then those of sm_90."""
    return [*itertools.product(ahead_of_time.CAPABILITIES, kernels), *((90, each) for each in OVERLAPPED)]


@pytest.mark.parametrize(("capability", "kernel"), on_their_cards(KERNELS))
def test_every_launch_compiles_and_fits_the_card(capability: int, kernel: str) -> None:
    """Registers that spill are slow, so only the kernels in `STACKS` may have a stack."""
    found = variants(capability, kernel)
    assert found, "nothing launches it"
    failed = []
    for variant, result in found.items():
        if result.error:
            failed.append((variant, result.error))
        elif result.shared > ahead_of_time.SHARED_MEMORY[capability]:
            failed.append((variant, f"{result.shared} bytes of shared memory"))
        elif result.tensor_memory > ahead_of_time.TENSOR_MEMORY_COLUMNS:
            failed.append((variant, f"{result.tensor_memory} columns of tensor memory"))
        elif result.local or result.stack > STACKS_OF_CARDS.get((capability, kernel), STACKS.get(kernel, 0)):
            failed.append((variant, f"a stack of {result.stack} bytes, {result.registers} registers"))
    assert_none(failed, capability)


@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_every_kernel_of_the_package_is_compiled(capability: int) -> None:
    assert {each.kernel for each in recorded(capability).variants} <= {*KERNELS, *OVERLAPPED}


@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_no_grid_is_too_large(capability: int) -> None:
    assert not recorded(capability).refused


@pytest.mark.parametrize(("capability", "kernel"), on_their_cards(FUSED))
def test_fused_kernels_multiply_on_tensor_cores_and_copy_ahead(capability: int, kernel: str) -> None:
    """Rows arrive by asynchronous copies of 16 bytes, while earlier tiles are multiplied."""
    failed = []
    for variant, result in variants(capability, kernel).items():
        if not result.count(MATRIX_INSTRUCTION[capability]):
            failed.append((variant, f"no {MATRIX_INSTRUCTION[capability]}"))
        if not result.count(COPY):
            failed.append((variant, "no asynchronous copies of 16 bytes"))
        if result.count(r"LDG\.E\.U16"):
            failed.append((variant, "loads of single 16-bit numbers"))
    assert_none(failed, capability)


@pytest.mark.parametrize("kernel", SMALL)
@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_kernels_of_small_calls_multiply_on_tensor_cores_and_read_words(capability: int, kernel: str) -> None:
    """Row tiles are too low for the newest instructions. Packed rows arrive ahead of their products."""
    failed = []
    loads = COPY if kernel == "pdcr_small_bwd_kernel" else r"LDG\.E\.128"
    for variant, result in variants(capability, kernel).items():
        if not result.count(rf"HMMA|{MATRIX_INSTRUCTION[capability]}"):
            failed.append((variant, "no products on tensor cores"))
        if not result.count(loads) or result.count(r"LDG\.E\.U16"):
            failed.append((variant, "loads of fewer than 16 bytes"))
    assert_none(failed, capability)


@pytest.mark.parametrize("kernel", OVERLAPPED)
def test_weights_of_pairs_are_computed_while_products_are_under_way(kernel: str) -> None:
    """In the machine code: the compiler may move waits. There, nothing is spilled."""
    failed = []
    for variant, result in variants(90, kernel).items():
        threads = 32 * variant.option("num_warps")
        pairs = variant.constant("BLOCK_I") * variant.constant("BLOCK_J") // threads
        exponentials = result.count_in_flight(r"MUFU\.EX2")
        if exponentials < pairs:
            failed.append((variant, f"{exponentials} of {pairs} exponentials of a thread"))
        if spilled := result.count_in_flight("LDL|STL"):
            failed.append((variant, f"{spilled} accesses to the stack"))
    assert_none(failed, 90)


def test_kernels_of_triton_wait_for_products() -> None:
    """What is counted above, where nothing overlaps."""
    found = variants(90, "pdcr_bwd_kernel").values()
    assert all(result.count("HGMMA") and not result.count_in_flight(r"MUFU\.EX2") for result in found)


@pytest.mark.parametrize("kernel", ["pdcr_fwd_slab_kernel", "pdcr_pairs_kernel"])
@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_slabs_are_read_in_words_of_16_bytes(capability: int, kernel: str) -> None:
    failed = [
        (variant, "no loads of 16 bytes")
        for variant, result in variants(capability, kernel).items()
        if not result.count(rf"LDG\.E\.128|{COPY}")
    ]
    assert_none(failed, capability)


@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_lanes_of_sums_lie_along_columns(capability: int) -> None:
    """Else every lane reads another row, and words pass through shared memory on their way."""
    failed, checked = [], 0
    for variant, result in variants(capability, "segment_sum_kernel").items():
        if variant.constant("labels_stride_c") == 1 and not variant.constant("SUM_COLUMNS"):
            checked += 1
            if result.shared > 0:
                failed.append((variant, f"{result.shared} bytes of shared memory"))
    assert checked > 0
    assert_none(failed, capability)


@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_vectors_and_gradients_move_in_words_where_strides_allow(capability: int) -> None:
    """For dense vectors of a multiple of 16 channels. Numbers of tables take up to 8 bytes."""
    from contrastseg_fast.kernels.pdcr.rows import BY_WORD

    failed, checked = [], set()
    for variant, result in variants(capability, "pdcr_rows_kernel").items():
        if set(variant.constant("ORDERS")) == {BY_WORD.value} and variant.is_divisible("sources"):
            checked.add("rows")
            if not result.count(r"LDG\.E\.128") or result.count(r"LDG\.E\.U16"):
                failed.append((variant, "loads of fewer than 16 bytes"))
    for variant, result in variants(capability, "pdcr_grad_kernel").items():
        if variant.constant("WORDS") and variant.is_divisible("outs"):
            checked.add("gradients")
            if not result.count(r"STG\.E\.128") or result.count(r"STG\.E\.U16"):
                failed.append((variant, "stores of fewer than 16 bytes"))
    assert checked == {"rows", "gradients"}
    assert_none(failed, capability)


@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_every_entry_of_the_launch_tables_is_compiled(capability: int) -> None:
    """At every width that it serves, alone and with narrower ones in one launch."""
    if not EVERYTHING and "tables" not in SOME_SOURCES[capability]:
        pytest.skip("only `make aot` compiles the tables of this card")
    from contrastseg_fast.kernels._tuning import Launch
    from contrastseg_fast.kernels.pdcr import plan
    from contrastseg_fast.problems import NARROWEST_FUSED, WIDEST_FUSED

    widths = [1 << bits for bits in range(NARROWEST_FUSED.bit_length() - 1, WIDEST_FUSED.bit_length())]
    for table, kernel in ((plan.FORWARD, "pdcr_fwd_kernel"), (plan.BACKWARD, "pdcr_bwd_kernel")):
        launched = {
            (
                takes_fewest_registers(each),
                each.constant("WIDTHS"),
                Launch(*(each.constant(name) for name in ("BLOCK_I", "BLOCK_J")),
                       *(each.option(name) for name in ("num_warps", "num_stages"))),
            )
            for each in variants(capability, kernel)
        }  # fmt: skip
        for fewest, by_width in table[capability].items():
            for width in widths:
                entry = by_width[min(each for each in by_width if each >= width)]
                assert {(fewest, (width,), launch) for launch in entry} <= launched
            assert {(fewest, (64, 128, 256), launch) for launch in by_width[256]} <= launched
    for small, kernel in zip((plan.SMALL_FORWARD, plan.SMALL_BACKWARD), SMALL, strict=True):
        launched = {
            (
                each.constant("WIDTHS"),
                Launch(*(each.constant(name) for name in ("BLOCK_I", "BLOCK_J")),
                       *(each.option(name) for name in ("num_warps", "num_stages"))),
            )
            for each in variants(capability, kernel)
        }  # fmt: skip
        for width in widths:
            assert ((width,), small[min(each for each in small if each >= width)]) in launched
        assert ((64, 128, 256), small[256]) in launched


def takes_fewest_registers(variant: Variant) -> bool:
    """What the keys of the launch tables say of a variant of a fused kernel."""
    bounded = variant.constant("SYMMETRIC" if variant.kernel == "pdcr_fwd_kernel" else "BOUNDED")
    few_classes = variant.constant("CLASSES") <= 2 and not variant.constant("MORE_CLASSES")
    return variant.constant("PLAIN") and few_classes and bounded


@pytest.mark.parametrize("name", CALLS)
def test_launches_of_a_call(name: str) -> None:
    """Fewer is better: lower the numbers when a change earns it."""
    count: Count = recorded(90).counts[name]
    assert (sum(count.triton.values()), sum(count.aten.values())) == LAUNCHES[name], count


def test_cards_are_known() -> None:
    assert set(PROCESSORS) == set(ahead_of_time.CAPABILITIES) == set(ahead_of_time.SHARED_MEMORY)
