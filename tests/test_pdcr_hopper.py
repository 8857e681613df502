"""The backward kernels for sm_90 in Gluon, by an interpreter that does what is asynchronous late."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

import pytest
import torch
from test_pdcr import CATEGORICAL, PAPER, assert_as_exact_as_plain, loss_and_gradient, make_inputs
from torch import Tensor
from torch.nn.functional import one_hot

from contrastseg_fast import _backend, problems

pytest.importorskip("triton.experimental.gluon")
pytestmark = pytest.mark.skipif(
    not _backend.interpreting(), reason="kernels are interpreted with TRITON_INTERPRET=1 only"
)
if _backend.interpreting():
    from gluon_interpreter import Interpreter, Race
    from triton.runtime.jit import JITFunction

    from contrastseg_fast.kernels import _tuning
    from contrastseg_fast.kernels.pdcr import hopper, plan

    backward = importlib.import_module("contrastseg_fast.kernels.pdcr.backward")  # the package has a function

SHAPES = {  # images, vectors, channels, classes, columns of a tile
    "two chunks of one tile": (1, 100, 256, 2, 64),
    "two tiles": (4, 128, 256, 5, 64),
    "one tile": (2, 90, 128, 1, 128),
    "chunks of many tiles": (2, 600, 128, 8, 64),
    "an odd number of tiles": (1, 380, 256, 3, 32),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST_SMALL", 0)  # few vectors take these kernels too
    monkeypatch.setattr(plan, "ROWS", plan.RowLaunch(1 << 13, 128, 4))
    monkeypatch.setattr(plan, "LOSS_BLOCK", 128)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs kernels in Gluon and compares every launch with Triton's kernel; the names of those that ran."""
    ran: list[str] = []
    interpreter, run_kernel = Interpreter(), backward.run_kernel

    def run(kernel: Any, grid: Any, tensors: Any, scalars: Any, constants: Any) -> None:
        if not isinstance(kernel, JITFunction):
            return run_kernel(kernel, grid, tensors, scalars, constants)
        *inputs, g = tensors
        name = kernel.fn.__name__
        triton_g = g.clone()
        in_triton = getattr(backward, name.replace("_hopper", ""))
        run_kernel(in_triton, grid, [*inputs, triton_g], scalars, constants)
        interpreter.launch(kernel, grid, tensors, scalars, constants)
        written = triton_g.isfinite()
        assert torch.equal(g.isfinite(), written)
        assert written.any()
        # Both round the same weights, but for exponentials that differ in their last bits.
        assert (g - triton_g)[written].norm() <= 1e-4 * triton_g[written].norm()
        ran.append(name)

    monkeypatch.setattr(backward, "run_kernel", run)
    monkeypatch.setattr(backward, "overlapped_kernels", lambda: hopper)
    return ran


def forced(block_j: int) -> Any:
    return _tuning.forced("pdcr_backward ", _tuning.Launch(128, block_j, 8, 3, overlapped=True))


def some_valid(vectors: Tensor) -> Tensor:
    valid = torch.rand(vectors.shape[:2]) > 0.3
    valid[:, 0] = True
    return valid


@pytest.mark.parametrize(
    ("affinity", "dtype"),
    [(PAPER, torch.bfloat16), (CATEGORICAL, torch.float16)],
    ids=["ratios", "categorical"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_launch_gives_what_triton_gives(shape, affinity, dtype, compared):
    batch, count, channels, classes, block_j = SHAPES[shape]
    vectors, ratios = make_inputs(batch, count, channels, classes, dtype, categorical=affinity.categorical)
    with forced(block_j):
        for valid in (None, some_valid(vectors)):
            assert_as_exact_as_plain(vectors, ratios, valid, affinity, "triton")
    assert compared == ["pdcr_bwd_hopper_kernel"] * 2


@pytest.mark.parametrize(("channels", "classes", "block_j"), [(128, 2, 128), (256, 3, 64), (256, 5, 32)])
def test_grouped_rows_skip_the_same_pairs(channels, classes, block_j, compared, monkeypatch):
    monkeypatch.setattr(problems, "FEWEST_GROUPED", 1)
    monkeypatch.setattr(plan, "GROUP_ROWS", 256)
    count = 700
    vectors, _ = make_inputs(2, count, channels, classes, torch.bfloat16)
    ratios = one_hot((torch.rand(2, count) ** 3 * classes).long(), classes).float()
    ratios[:, ::9] = torch.rand(2, 78, classes).softmax(-1)
    with forced(block_j):
        assert_as_exact_as_plain(vectors, ratios, some_valid(vectors), PAPER, "triton")
    assert compared == ["pdcr_bwd_groups_hopper_kernel"]


def test_what_the_kernels_do_not_serve_takes_triton(compared):
    with forced(64):
        for channels, classes, affinity in (
            (64, 2, PAPER),
            (256, 9, PAPER),
            (128, 2, PAPER._replace(temperature=0.004)),
        ):
            vectors, ratios = make_inputs(1, 130, channels, classes, torch.bfloat16)
            assert_as_exact_as_plain(vectors, ratios, None, affinity, "triton")
    assert compared == []


SYNCHRONISATION = {
    "wait for the first copies": ("_await_copies(1)", "_barrier()"),
    "wait for copies": ("        _await_copies(0)\n", "        _barrier()\n"),
    "fence": ("    fence_async_shared()\n", ""),
    "barrier of copies": ("    fence_async_shared()\n    _barrier()\n", "    fence_async_shared()\n"),
    "barrier of row tiles": ("    _barrier()  # the products", "    # the products"),
    "wait for the first product": ("mma_wait(0, deps=[product])", "mma_wait(1, deps=[product])"),
    "wait for products": ("mma_wait(1, deps=[product])", "mma_wait(2, deps=[product])"),
    "wait for the sum": ("        g = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[g]))\n", ""),
    "wait for the last sum": ("g = warpgroup_mma_wait(0, deps", "g = warpgroup_mma_wait(1, deps"),
    "one tile of the ring": ("_RING = gl.constexpr(3)", "_RING = gl.constexpr(2)"),
}  # fmt: skip


@pytest.mark.parametrize("removed", SYNCHRONISATION)
def test_the_interpreter_sees_what_is_not_waited_for(removed, compared, monkeypatch, tmp_path):
    """Several row tiles in one program, each of several column tiles."""
    old, new = SYNCHRONISATION[removed]
    source = inspect.getsource(hopper)
    assert source.count(old) == 1
    file = tmp_path / "broken.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("broken", file)
    spec.loader.exec_module(broken := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(backward, "overlapped_kernels", lambda: broken)
    monkeypatch.setattr(problems, "FEWEST_GROUPED", 1)
    monkeypatch.setattr(plan, "one_wave", lambda *_: 1)
    vectors, ratios = make_inputs(1, 250, 128, 1, torch.bfloat16)
    with forced(64), pytest.raises((Race, AssertionError)):
        loss_and_gradient("triton", vectors, ratios, None, PAPER, torch.ones(1))
    monkeypatch.setattr(backward, "overlapped_kernels", lambda: hopper)
    with forced(64):
        loss_and_gradient("triton", vectors, ratios, None, PAPER, torch.ones(1))
