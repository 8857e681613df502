"""Choosing launch parameters by measurement, with a clock that tells what the test says."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
_tuning = pytest.importorskip("contrastseg_fast.kernels._tuning")

DEFAULT = _tuning.Launch(128, 64, 8, 2)
FAST = _tuning.Launch(64, 64, 4, 2)
BIG = _tuning.Launch(128, 128, 8, 4)
CARD = SimpleNamespace(is_cuda=True, device="cuda:0")


@pytest.fixture
def timed(monkeypatch, tmp_path) -> list:
    """What was timed; FAST takes 1 ms, BIG does not fit, all else 2 ms."""
    seen = []

    def do_bench(work, **_):
        work()
        return 1.0 if seen[-1] == FAST else 2.0

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_tuning, "_chosen", {})
    monkeypatch.setenv("CONTRASTSEG_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONTRASTSEG_FAST_AUTOTUNE", "1")
    return seen


def choose(seen: list, family: str = "family"):
    def run(launch) -> None:
        seen.append(launch)
        if launch == BIG:
            raise triton.runtime.errors.OutOfResources(300, 200, "shared memory")

    return _tuning.tuned(family, DEFAULT, [BIG, FAST, DEFAULT], CARD, run)


def test_the_fastest_is_kept_in_memory_and_on_disk(timed, tmp_path, monkeypatch):
    assert choose(timed) == FAST
    assert timed == [DEFAULT, BIG, FAST]
    assert choose(timed) == FAST
    assert len(timed) == 3
    monkeypatch.setattr(_tuning, "_chosen", {})  # as in another process
    assert choose(timed) == FAST
    assert len(timed) == 3
    choose(timed, "another family")
    file = tmp_path / "cache" / "launch.json"
    assert sorted(key.split(": ")[1] for key in json.loads(file.read_text())) == ["another family", "family"]
    assert list(file.parent.iterdir()) == [file]


def test_a_forced_launch_overrules_tables_and_tuning_for_its_families(timed):
    with _tuning.forced("fam", BIG):
        assert choose(timed) == BIG
        assert choose(timed, "another family") == FAST
    timed.clear()
    assert choose(timed) == FAST
    assert timed == [DEFAULT, BIG, FAST]


def test_a_forced_launch_ends_with_its_block_whatever_happens(timed):
    with pytest.raises(RuntimeError, match="no room"), _tuning.forced("family", BIG):
        raise RuntimeError("no room")
    assert choose(timed) == FAST


def test_nothing_is_timed_unless_asked_for_nor_in_a_graph(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(timed) == DEFAULT
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("CONTRASTSEG_FAST_AUTOTUNE")
    assert choose(timed) == DEFAULT
    assert timed == []
