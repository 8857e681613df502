"""The benchmarks' way of timing on CUDA."""

from __future__ import annotations

import pytest
import torch

from benchmarks import ceilings, memory, registry, timing
from benchmarks import device as device_timing
from benchmarks.operation import OURS


def test_seconds_are_those_of_the_device(cuda) -> None:
    cycles = 20_000_000

    def run() -> tuple[torch.Tensor, ...]:
        torch.cuda._sleep(cycles)
        return ()

    once = device_timing.timed(run, 1, 1e-5)
    thrice = device_timing.timed(run, 3, 1e-5)
    assert cycles / 4e9 < once.on_device < cycles / 1e8
    assert once.on_device == pytest.approx(thrice.on_device, rel=0.5)
    assert thrice.on_host < once.on_device


def test_input_sets_are_equal_and_exceed_the_cache(cuda) -> None:
    cache = torch.cuda.get_device_properties(cuda).L2_cache_size
    inputs = (torch.randn(cache // 16, device=cuda),)  # a quarter of the cache
    sets = device_timing.input_sets(inputs)
    assert len(sets) == 8
    assert all(torch.equal(each[0], inputs[0]) for each in sets)
    assert len({each[0].data_ptr() for each in sets}) == len(sets)
    assert len(device_timing.input_sets((torch.randn(cache, device=cuda),))) == 1


def test_replays_read_the_inputs_anew(cuda) -> None:
    x = torch.ones(100, device=cuda)
    replay = device_timing.captured(lambda: (2 * x,))
    x.fill_(5)
    assert torch.equal(replay()[0], torch.full_like(x, 10))


def test_peak_memory_is_that_of_the_allocator(cuda) -> None:
    case = registry.GPU_RATIOS
    peak = memory.device_peak_bytes(case, case.operation.implementation("one-hot + cumsum"))
    pixels = case.size.batch * case.size.extent**2
    assert peak > 8 * pixels * case.size.classes  # one_hot writes int64


def test_a_case_is_measured(cuda) -> None:
    case = registry.trial(registry.PARTS["gate"])[0]
    on_cuda = type(case)(case.operation, case.size, "cuda", without=("torch.compile",), graph=True)
    entries = timing.measure_times(on_cuda, on_cuda.implementations, timing.Settings(rounds=3, seconds=0.1))
    assert entries[OURS]["status"] == "measured", entries[OURS]
    assert entries[OURS]["graph"] == "captured"
    assert len(entries[OURS]["seconds"]) == 3
    assert all(second > 0 for second in entries[OURS]["seconds"])


def test_no_ceiling_is_out_of_this_world(cuda) -> None:
    found = ceilings.measure("cuda")
    assert 1e11 < found["copy_bytes_per_second"] < 3e13
    assert 1e12 < found["flops_per_second"]["bf16"] < 1e16
    assert found["flops_per_second"]["tf32"] > found["flops_per_second"]["fp32"]
