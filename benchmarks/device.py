"""Timing on CUDA: events behind a head start, inputs that no cache holds, and captured graphs."""

from __future__ import annotations

import ctypes
import itertools
import time
from math import ceil
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.operation import Inputs, Result, Run

SAMPLE_SECONDS = 0.002  # shorter calls are repeated within one sample
MOST_CALLS = 40  # in a sample: more launches than fit into the driver's queue would be timed one by one
_MOST_SETS = 16
_CLOCK = 2e9  # cycles a second at most, of the head start's sleep
_LONGEST_HEAD_START = 0.05


class Timed(NamedTuple):
    """Seconds of one call."""

    on_device: float  # between the device's events, work queued ahead
    on_host: float  # until the call returned


def input_sets(inputs: Inputs) -> list[Inputs]:
    """The inputs and copies of them, together twice what the L2 cache holds."""
    cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    held = sum(each.nbytes for each in inputs)
    count = min(_MOST_SETS, max(1, ceil(2 * cache / max(held, 1))))
    return [inputs, *(tuple(each.clone() for each in inputs) for _ in range(count - 1))]


def taking_turns(runs: list[Run]) -> Run:
    """Each call runs the next of them."""
    upcoming = itertools.cycle(runs)
    return lambda: next(upcoming)()


def captured(run: Run, pool: tuple[int, int] | None = None) -> Run:
    """Replays of a call's graph; graphs that never run at the same time can share the memory of a `pool`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = run()

    def replay() -> Result:
        graph.replay()
        return results

    return replay


def timed(run: Run, calls: int, host_seconds: float = _LONGEST_HEAD_START) -> Timed:
    """Time `calls` calls behind a sleep on the device that outlasts queueing them, `host_seconds` each."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    head_start = min(1.5 * calls * host_seconds + 1e-4, _LONGEST_HEAD_START)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(head_start * _CLOCK))
    begin.record()
    since = time.perf_counter()
    for _ in range(calls):
        run()
    on_host = time.perf_counter() - since
    end.record()
    end.synchronize()
    return Timed(begin.elapsed_time(end) / 1e3 / calls, on_host / calls)


def host_seconds(run: Run, calls: int = 9) -> float:
    """Median seconds until a call returns, the device idle before each."""
    seconds = []
    for _ in range(calls):
        torch.cuda.synchronize()
        since = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - since)
    return median(seconds)


def launches(run: Run) -> int:
    """How many kernels, copies and fills a call puts on the device: the nodes of its graph."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        run()
    count = ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    status = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    if status != 0:
        raise RuntimeError(f"cuGraphGetNodes returned {status}")
    return count.value


def replayed_seconds(run: Run, rounds: int = 3) -> float:
    """Median seconds of a call on the device, replayed from its graph."""
    replay = captured(run)
    first = timed(replay, 1)
    calls = min(MOST_CALLS, ceil(SAMPLE_SECONDS / max(first.on_device, 1e-7)))
    return median(timed(replay, calls, first.on_host).on_device for _ in range(rounds))


def check_still_works() -> None:
    """Raise what an earlier kernel did to the device: nothing measured after a fault is worth anything."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
