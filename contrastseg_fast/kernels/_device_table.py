"""Integers on a device, copied there once, for kernels that read more numbers than they take as arguments."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor


class Table:
    """Rows of integers, and their copies on devices, which live as long as it does."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.numbers = np.array(rows, dtype=np.int64)
        self._copies: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def on(self, device: torch.device) -> Tensor:
        """The numbers as one int64 tensor on a device, which is made once. It must not be written.

        A graph that is captured with it keeps it, since it reads the numbers as long as it is replayed.

        Args:
            device: with an index, if it is a GPU.

        Raises:
            RuntimeError: the copy does not exist yet, and the current stream is being captured.
        """
        copy = self._copies.get(device)
        if copy is None:
            copy = self._copies.setdefault(device, copied(self.numbers.reshape(-1), device))
        if copy.is_cuda and torch.cuda.is_current_stream_capturing():
            _captured[id(copy)] = copy
        return copy


_captured: dict[int, Tensor] = {}  # what graphs were captured with


def copied(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A new int64 tensor of these numbers, that all streams may read."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a table of integers would have to be copied to the device while a graph is captured: "
            "run the call once, with the same shapes and options, before it is captured"
        )
    return _made_in_a_thread(numbers, device)


def _made_in_a_thread(numbers: np.ndarray, device: torch.device) -> Tensor:
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


def _make(numbers: np.ndarray, device: torch.device) -> Tensor:
    table = torch.tensor(numbers, dtype=torch.int64, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams read it
    return table
