"""Peak memory of one call: of the process on the CPU, in a fresh one; of CUDA's allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from multiprocessing.connection import Connection

import torch

from benchmarks import registry
from benchmarks.operation import Case, Implementation

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_context = multiprocessing.get_context("forkserver")
# Imports torch once, and computes nothing.
_context.set_forkserver_preload(["benchmarks.memory", "contrastseg_fast.experiments.compare"])


def peak_bytes(case_id: str, name: str) -> int:
    """What one call needs at its highest, in bytes, beyond its inputs; its results are included.

    Raises:
        RuntimeError: the process ended before it had measured.
    """
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_measure, args=(sender, case_id, name))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measuring process ended with status {process.exitcode}") from None
    finally:
        process.join()


def device_peak_bytes(case: Case, implementation: Implementation) -> int:
    """What one call allocates on the GPU at its highest, in bytes, beyond its inputs; results included."""
    inputs = case.operation.make_inputs(case.size, case.device)
    run = implementation.prepare(case.size, inputs)
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del results
    return peak - before


def _measure(sender: Connection, case_id: str, name: str) -> None:
    from contrastseg_fast.experiments.compare import peak_bytes as process_peak_bytes  # needs monai

    case = registry.find(case_id)
    operation, implementation = case.operation, case.operation.implementation(name)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**16)  # freed tensors leave the process at once
    # A first call loads libraries and starts threads; compiled code is made for one size only.
    first = case.size if implementation.compiles else operation.tiny(case.size)
    implementation.prepare(first, operation.make_inputs(first, case.device))()
    run = implementation.prepare(case.size, operation.make_inputs(case.size, case.device))
    _, peak = process_peak_bytes(run)
    sender.send(peak)
