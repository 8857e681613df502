"""Integers on a device, copied there once, for kernels that read more numbers than they take as arguments."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

_MOST_KEPT = 4096
_kept: OrderedDict[tuple[tuple[int, ...], torch.device], Tensor] = OrderedDict()
_lock = threading.Lock()


def device_table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """An int64 tensor of these numbers on a device, which is made once and kept. It must not be written.

    Of more than 4096 tables, the one that was not asked for the longest is dropped, but never one that a
    graph was captured with, which keeps reading it.

    Args:
        device: with an index, if it is a GPU.

    Raises:
        RuntimeError: the table does not exist yet, and the current stream is being captured.
    """
    key = numbers, device
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
        else:
            _kept[key] = _copied(numbers, device)
            if len(_kept) > _MOST_KEPT:
                _kept.popitem(last=False)
        _keep_if_captured(_kept[key])
        return _kept[key]


class Table:
    """A table that is too long to be looked up by its numbers. It keeps its own copies while it lives."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.numbers = np.array(rows, dtype=np.int64)
        self._copies: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def on(self, device: torch.device) -> Tensor:
        """Its numbers on a device, as by `device_table`."""
        copy = self._copies.get(device)
        if copy is None:
            copy = self._copies.setdefault(device, _copied(self.numbers.reshape(-1), device))
        _keep_if_captured(copy)
        return copy


_captured: dict[int, Tensor] = {}  # what a graph was captured with: it reads them as long as it is replayed


def _keep_if_captured(table: Tensor) -> None:
    if table.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[id(table)] = table


def _copied(numbers: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a table of integers would have to be copied to the device while a graph is captured: "
            "run the call once, with the same shapes and options, before it is captured"
        )
    return _made_in_a_thread(numbers, device)


def _made_in_a_thread(numbers: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Made in a fresh thread, which has no inference mode, no fake mode and no memory pool of a graph."""
    future: Future[Tensor] = Future()

    def make() -> None:
        try:
            future.set_result(_make(numbers, device))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return future.result()


def _make(numbers: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    table = torch.tensor(numbers, dtype=torch.int64, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams read it
    return table
