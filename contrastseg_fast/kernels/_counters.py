"""Counters on a device that are zero before and after every kernel, which takes no launch to make them so."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from contrastseg_fast.kernels._device_table import copied

_COUNTERS_AT_ONCE = 4096
_APART = 2  # of 8 bytes each: Triton compiles for addresses that are multiples of 16
_lock = threading.Lock()
_free: dict[torch.device, list[Tensor]] = {}
_of_streams: dict[tuple[torch.device, int], Tensor] = {}


def zero_counter(device: torch.device) -> Tensor:
    """An integer that is 0, for one kernel on the current stream, which has to leave it 0 again.

    Kernels of a stream run one after another, so they share a counter. A kernel that is captured into a graph
    may be replayed on any stream, beside others, so it has one of its own, for good: replays of one graph
    never overlap.

    Args:
        device: with an index, if it is a GPU.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        with _lock:
            if _free.get(device):
                return _free[device].pop()
        return torch.zeros(_APART, dtype=torch.int64, device=device)  # set to 0 whenever it is replayed
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _lock:
        if (device, stream) not in _of_streams:
            if not _free.get(device):
                numbers = np.zeros(_COUNTERS_AT_ONCE * _APART, dtype=np.int64)
                _free[device] = list(copied(numbers, device).split(_APART))
            _of_streams[device, stream] = _free[device].pop()
        return _of_streams[device, stream]
