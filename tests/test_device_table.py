"""Tables of integers on a device: made once, real whatever mode is on, and never within a captured graph."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from contrastseg_fast.kernels import _device_table
from contrastseg_fast.kernels._device_table import device_table

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device_table, "_kept", type(_device_table._kept)())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, FakeTensorMode])
def test_a_table_made_in_any_mode_serves_outside_it(mode) -> None:
    with mode():
        table = device_table((3, -(2**40)), CPU)
    assert not table.is_inference()
    assert not isinstance(table, FakeTensor)
    assert table.dtype == torch.int64
    assert table.tolist() == [3, -(2**40)]
    assert device_table((3, -(2**40)), CPU) is table


def test_the_table_of_other_numbers_or_another_device_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def make(numbers, device):
        threads.append(threading.get_ident())
        return torch.tensor(numbers)

    monkeypatch.setattr(_device_table, "_make", make)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    places = [CPU, torch.device("cuda", 0), torch.device("cuda", 1)]
    tables = [device_table(numbers, place) for place in places for numbers in ((1, 2), (1, 3))]
    assert len({id(table) for table in tables}) == len(threads) == 6
    assert threading.get_ident() not in threads


def test_the_table_that_was_not_used_the_longest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device_table, "_MOST_KEPT", 3)
    tables = [device_table((number,), CPU) for number in range(3)]
    assert device_table((0,), CPU) is tables[0]
    device_table((3,), CPU)
    assert [numbers for numbers, _ in _device_table._kept] == [(2,), (0,), (3,)]


def test_no_table_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(_device_table, "_make", lambda numbers, _device: torch.tensor(numbers))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device = torch.device("cuda", 0)
    table = device_table((1, 2), device)
    capturing = True
    assert device_table((1, 2), device) is table
    with pytest.raises(RuntimeError, match="before it is captured"):
        device_table((1, 2, 3), device)


def test_what_fails_in_the_thread_is_raised() -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)overflow"):
        device_table((2**70,), CPU)
