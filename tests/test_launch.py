"""Launches that do not bind their arguments again, with Triton's binder and a stand-in for the card."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from contrastseg_fast import _backend

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import jit  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

_launch = pytest.importorskip("contrastseg_fast.kernels._launch")


def pointers_kernel(
    x_ptr, maybe_ptr, pair_ptrs, size, count, factor, BLOCK: tl.constexpr, MODE: tl.constexpr = 3
):
    """What is launched here; nothing runs it."""


class Binary:
    """What a compiler would return."""

    function = "function"
    packed_metadata = "packed"

    def __init__(self, launches: list[tuple[Any, ...]], backend: str) -> None:
        self.metadata = SimpleNamespace(target=GPUTarget(backend, 90, 32))
        self._launches = launches

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self._launches.append(arguments)


class Card:
    """The part of Triton's driver that binding takes, and what was bound, compiled and launched on it."""

    def __init__(self) -> None:
        self.device, self.stream, self.backend = 0, 7, "cuda"
        self.bound: list[Any] = []
        self.compiled: list[Any] = []
        self.launches: list[tuple[Any, ...]] = []

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 * device + self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    run = jit.JITFunction.run

    def bind(kernel: Any, *args: Any, **options: Any) -> Any:
        card.bound.append(args)
        return run(kernel, *args, **options)

    def compile_(kernel: Any, key: Any, _signature: Any, device: int, *_: Any) -> Binary:
        binary = Binary(card.launches, card.backend)
        card.compiled.append(binary)
        kernel.device_caches[device][0][key] = binary
        return binary

    monkeypatch.setattr(type(driver), "active", property(lambda _: card))
    monkeypatch.setattr(jit.JITFunction, "run", bind)
    monkeypatch.setattr(jit.JITFunction, "_do_compile", compile_)
    monkeypatch.setattr(_launch, "_kernels", {})
    return card


@pytest.fixture(params=["Triton", "Gluon"])
def kernel(card: Card, request: pytest.FixtureRequest) -> Any:
    if request.param == "Gluon":
        gluon = pytest.importorskip("triton.experimental.gluon")
        return gluon.jit(pointers_kernel, do_not_specialize=["count"])
    return jit.JITFunction(pointers_kernel, do_not_specialize=["count"])


X = torch.zeros(64)
FUSION = {"enable_fp_fusion": True}  # Triton 3.9 warns where it is not said
FIRST: dict[str, Any] = {
    "grid": (5, 2),
    "tensors": (X, None, (X, X)),
    "scalars": (32, 3, 0.5),
    "constants": {"BLOCK": 16, "num_warps": 4, **FUSION},
}


def test_the_second_launch_gets_the_same_without_binding(card: Card, kernel: Any) -> None:
    for _ in range(3):
        _launch.launch(kernel, **FIRST)
    assert len(card.bound) == 1
    first, *others = card.launches
    address = X.data_ptr()
    assert first[:6] == (5, 2, 1, 7, "function", "packed")
    assert first[9:] == (X, None, (X, X), 32, 3, 0.5, 16, 3)
    for other in others:
        assert other == (*first[:6], None, None, None, address, None, (address, address), *first[12:])


@pytest.mark.parametrize(
    "changed",
    [
        {"grid": (9,)},
        {"tensors": (torch.ones(3), None, (X, X))},
        {"tensors": (X[4:], None, (X[8:], X))},  # multiples of 16 bytes
        {"scalars": (48, 3, 0.5)},
        {"scalars": (32, 1, 0.5)},  # not specialised
        {"scalars": (32, 160, 7.25)},
        {"constants": {"BLOCK": 16, "num_warps": 4, **FUSION}},  # another dict
    ],
    ids=str,
)
def test_what_is_not_compiled_for_binds_nothing(card: Card, kernel: Any, changed: dict[str, Any]) -> None:
    card.stream = 8
    _launch.launch(kernel, **FIRST)
    card.stream = 9
    arguments = {**FIRST, **changed}
    _launch.launch(kernel, **arguments)
    assert len(card.bound) == 1
    launched = card.launches[-1]
    assert launched[:4] == (*(*arguments["grid"], 1, 1)[:3], 9)
    assert launched[9] == arguments["tensors"][0].data_ptr()
    assert launched[12:] == (*arguments["scalars"], 16, 3)
    kernel[arguments["grid"]](*arguments["tensors"], *arguments["scalars"], **arguments["constants"])
    assert len(card.compiled) == 1, "Triton itself compiles no other"


def use_another_device(card: Card, _monkeypatch: pytest.MonkeyPatch) -> None:
    card.device = 1


def turn_on_debugging(_card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "debug", True)


@pytest.mark.parametrize(
    "changed",
    [
        {"tensors": (X[1:], None, (X, X))},  # not a multiple of 16 bytes
        {"tensors": (X, None, (X, X[1:]))},
        {"tensors": (X.half(), None, (X, X))},
        {"tensors": (X, None, (X, X.double()))},
        {"tensors": (X, X, (X, X))},
        {"tensors": (X, None, (X, None))},
        {"tensors": (X, None, (X, X, X))},
        {"scalars": (33, 3, 0.5)},
        {"scalars": (1, 3, 0.5)},
        {"scalars": (1 << 40, 3, 0.5)},
        {"scalars": (32, 1 << 40, 0.5)},
        {"scalars": (32, 3, 2)},
        {"scalars": (32.0, 3, 0.5)},
        {"scalars": (None, 3, 0.5)},
        {"constants": {"BLOCK": 32, "num_warps": 4, **FUSION}},
        {"constants": {"BLOCK": 16, "num_warps": 8, **FUSION}},
        {"constants": {"BLOCK": 16, "num_warps": 4, **FUSION, "MODE": 1}},
        {"constants": {"BLOCK": 16, "num_stages": 4, **FUSION}},
        use_another_device,
        turn_on_debugging,
    ],
    ids=lambda changed: getattr(changed, "__name__", str(changed)),
)
def test_what_is_compiled_for_binds_once_more(
    card: Card, kernel: Any, changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _launch.launch(kernel, **FIRST)
    arguments = FIRST if callable(changed) else {**FIRST, **changed}
    if callable(changed):
        changed(card, monkeypatch)
    for _ in range(2):
        _launch.launch(kernel, **arguments)
    assert len(card.bound) == 2
    assert len(card.compiled) == 2, "Triton compiles another"
    assert card.launches[2][3] == card.launches[1][3]
    tensors = card.launches[1][9:12]
    assert card.launches[2][9:12] == tuple(_launch._pointers(tensors)[0])
    assert card.launches[2][12:] == card.launches[1][12:]


def add_a_launch_hook(_kernel: Any, _card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])


def set_a_launch_hook(_kernel: Any, _card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", print)


def add_a_hook_of_the_kernel(kernel: Any, _card: Card, _monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.add_pre_run_hook(lambda *_args, **_options: None)


def take_an_unknown_triton(_kernel: Any, _card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_IS_KNOWN", False)


def compile_for_another_backend(_kernel: Any, card: Card, _monkeypatch: pytest.MonkeyPatch) -> None:
    card.backend = "hip"


def compile_nothing(_kernel: Any, _card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.JITFunction, "_do_compile", lambda *_: None)


@pytest.mark.parametrize(
    "prepare",
    [
        add_a_launch_hook,
        set_a_launch_hook,
        add_a_hook_of_the_kernel,
        take_an_unknown_triton,
        compile_for_another_backend,
        compile_nothing,
    ],
)
def test_every_launch_binds_where_it_must(
    card: Card, kernel: Any, prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(kernel, card, monkeypatch)
    for _ in range(3):
        _launch.launch(kernel, **FIRST)
    assert len(card.bound) == 3


def test_hooks_that_come_later_are_called(card: Card, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        _launch.launch(kernel, **FIRST)
    seen: list[Any] = []
    kernel.add_pre_run_hook(lambda *args, **_options: seen.append(args))
    _launch.launch(kernel, **FIRST)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("version", "is_known"),
    [("3.5.1", False), ("3.6.0", True), ("3.9.1+git12ab", True), ("3.10.0", False), ("4.0.0", False)],
)
def test_versions_that_were_not_looked_at_are_unknown(version: str, is_known: bool) -> None:
    assert _launch._is_known(version) == is_known


@pytest.mark.skipif(
    not _backend.interpreting(), reason="kernels are interpreted with TRITON_INTERPRET=1 only"
)
def test_interpreted_kernels_run() -> None:
    @triton.jit
    def add_kernel(x_ptr, out_ptr, more, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, tl.load(x_ptr + at) + more)

    x = torch.arange(16.0)
    for more in (1.0, 2.0):
        out = torch.empty(16)
        _launch.launch(add_kernel, (2,), (x, out), (more,), {"BLOCK": 8})
        assert torch.equal(out, x + more)
