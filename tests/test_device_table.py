"""Tables of integers on a device: made once, real whatever mode is on, and never within a captured graph."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from contrastseg_fast.kernels import _device_table
from contrastseg_fast.kernels._device_table import Table

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, FakeTensorMode])
def test_a_table_made_in_any_mode_serves_outside_it(mode) -> None:
    numbers = Table([[3], [-(2**40)]])
    with mode():
        table = numbers.on(CPU)
    assert not table.is_inference()
    assert not isinstance(table, FakeTensor)
    assert table.dtype == torch.int64
    assert table.tolist() == [3, -(2**40)]
    assert numbers.on(CPU) is table


def test_every_device_has_one_copy_made_in_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def make(numbers, device):
        threads.append(threading.get_ident())
        return torch.tensor(numbers)

    monkeypatch.setattr(_device_table, "_make", make)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    places = [CPU, torch.device("cuda", 0), torch.device("cuda", 1)]
    tables = [Table([[1, 2]]), Table([[1, 3]])]
    copies = {id(table.on(place)) for _ in range(2) for place in places for table in tables}
    assert len(copies) == len(threads) == 6
    assert threading.get_ident() not in threads


def test_no_table_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(_device_table, "_make", lambda numbers, _device: torch.tensor(numbers))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device, numbers = torch.device("cuda", 0), Table([[1, 2]])
    table = numbers.on(device)
    capturing = True
    assert numbers.on(device) is table
    with pytest.raises(RuntimeError, match="before it is captured"):
        Table([[1, 2, 3]]).on(device)


def test_what_fails_in_the_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(numbers, device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(_device_table, "_make", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        Table([[1]]).on(CPU)
