"""Which kernels a call takes: explicit backends run or raise, and only "auto" chooses."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from contrastseg_fast import (
    PDCRLoss,
    ReceptiveField,
    _backend,
    _checks,
    attach_pdcr,
    functional,
    insert_uafs,
    receptive_fields,
    sampling,
)
from contrastseg_fast.ops import entropy_gate, foreground_ratio, gather, nt_xent, pdcr
from contrastseg_fast.ops._dispatch import Operation, check, pick

OPERATIONS = [each.OPERATION for each in (entropy_gate, foreground_ratio, gather, nt_xent, pdcr)]
ON_CARD: Any = SimpleNamespace(device=torch.device("cuda", 0))


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Why backends cannot run on the card, by name; none is missing at first."""
    reasons: dict[str, str] = {}
    monkeypatch.setattr(_backend, "unavailable", lambda backend, _device: reasons.get(backend))
    _checks.warn_once.cache_clear()
    return reasons


@pytest.mark.parametrize("operation", OPERATIONS)
def test_auto_takes_the_first_that_can_run_and_says_so_once(
    operation: Operation, missing: dict[str, str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick(operation, "auto", ON_CARD) == operation.on_cuda[0]
    missing[operation.on_cuda[0]] = "it is not there"
    expected = (*operation.on_cuda[1:], "plain")[0]
    with pytest.warns(RuntimeWarning, match=f"{operation.name} runs in .*, as the .* cannot run: it is not"):
        assert pick(operation, "auto", ON_CARD) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick(operation, "auto", ON_CARD) == expected


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_explicit_backend_runs_or_raises(operation: Operation, missing: dict[str, str]) -> None:
    for backend in operation.on_cuda:
        assert pick(operation, backend, ON_CARD) == backend
        missing[backend] = "it is not there"
        with pytest.raises(
            RuntimeError, match=f"{operation.name} with backend={backend!r} cannot run: it is"
        ):
            pick(operation, backend, ON_CARD)
    with pytest.raises(ValueError, match="'cpu' expects CPU tensors, got cuda tensors"):
        pick(operation, "cpu", ON_CARD)


def test_what_triton_refuses_raises_where_triton_is_asked_for(missing: dict[str, str]) -> None:
    refused = pdcr.refused_by_triton(torch.empty(65536, 1, 1, device="meta"))
    message = "vectors: expected at most 65535 images for backend='triton', got 65536"
    assert refused == message
    for function in (check, pick):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(pdcr.OPERATION, "triton", ON_CARD, refused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick(pdcr.OPERATION, "auto", ON_CARD, refused) == "plain"
    assert pdcr.refused_by_triton(torch.empty(65535, 1, 1, device="meta")) is None
    assert "got torch.float64" in pdcr.refused_by_triton(torch.empty(1, 1, 1, dtype=torch.float64))


def test_patches_that_triton_cannot_count_are_refused() -> None:
    large = torch.empty(1, 2**16, 2**16, device="meta")
    assert foreground_ratio.refused_by_triton(large, (2**16, 2**15 - 1)) is None
    assert "fewer than 2^31 pixels" in foreground_ratio.refused_by_triton(large, (2**16, 2**15))
    small = torch.empty(1, 4, 4, device="meta")
    assert "area below 2^63" in foreground_ratio.refused_by_triton(small, (2**40, 2**40))


def test_words_without_a_kernel_are_refused() -> None:
    vectors, ratios = torch.randn(1, 4, 3), torch.full((1, 4, 2), 0.5)
    x, indices = torch.randn(1, 2, 4, 4), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="expects CPU tensors, got meta tensors"):
        functional.pdcr_loss(vectors.to("meta"), ratios.to("meta"), backend="cpu")
    with pytest.raises(
        ValueError, match=re.escape("expects one of ('auto', 'reference', 'triton'), got 'cpu'")
    ):
        sampling.gather_vectors(x, indices, backend="cpu")
    with pytest.raises(ValueError, match="backend='triton' expects CUDA tensors, got cpu tensors"):
        sampling.gather_vectors(x, indices, backend="triton")
    assert "cuda" not in pdcr.OPERATION.words
    field = ReceptiveField((3, 3), (1, 1), (-1, -1))
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'reference', 'cpu', 'triton'"):
        PDCRLoss([field], 2, backend="cuda")
    with pytest.raises(ValueError, match="backend='triton' expects CUDA tensors, got cpu tensors"):
        PDCRLoss([field], 2, backend="triton")(x, torch.zeros(1, 4, 4, dtype=torch.long))


@pytest.mark.skipif(not _backend.has_cpu_extension(), reason="the C++ extension is not installed")
def test_the_cpu_kernels_refuse_other_words() -> None:
    """An exported program may bring them, where no check came before."""
    vectors, ratios = torch.randn(1, 4, 3), torch.full((1, 4, 2), 0.5)
    affinity = [0.5, 0.5, 0.0, 1.0, -1.0, 0.0, 1.0, 0.0]
    calls = [
        lambda word: pdcr.pdcr_forward(vectors, ratios, None, affinity, "mean", word),
        lambda word: entropy_gate.entropy_gate_forward(
            torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3), word
        ),
        lambda word: foreground_ratio.foreground_ratio(
            torch.zeros(1, 4, 4), torch.zeros(1, 2).long(), [2, 2], 2, "full", None, False, word
        ),
    ]
    for call in calls:
        call("cpu")
        with pytest.raises(RuntimeError, match="backend"):
            call("triton")


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton", "cuda"])
def test_receptive_fields_are_found_whatever_the_gates_backend(backend: str) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 2, 3))

    x = torch.zeros(1, 1, 32, 32)
    gated = insert_uafs(model(), ["0", "1"], 2, example_input=x, backend=backend)
    expected = insert_uafs(model(), ["0", "1"], 2, example_input=x)
    assert receptive_fields(gated, x.shape, ["1", "2"]) == receptive_fields(expected, x.shape, ["1", "2"])
    assert not attach_pdcr(gated, ["1"], 2, example_input=x).loss.receptive_fields["1"].is_infinite
