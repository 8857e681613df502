"""UAFS: the gate against the reference, its state, and errors."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
import re
from typing import Any

import pytest
import torch

from contrastseg_fast import reference, uafs
from contrastseg_fast.uafs import UAFS


@pytest.mark.parametrize("norm", uafs.NORMS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gate_agrees_with_the_reference_and_shares_its_state(norm: str, spatial_dims: int) -> None:
    fast = UAFS(spatial_dims, 4, 3, 12, norm=norm)
    plain = reference.UAFS(spatial_dims, 4, 3, 12, norm=norm)
    assert list(fast.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(2, 4, 7, 6, 5)[..., 0] if spatial_dims == 2 else torch.randn(2, 4, 7, 6, 5)
    for mode in (True, False):
        fast.train(mode)
        plain.train(mode)
        torch.testing.assert_close(fast(x), plain(x))
    fast(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fast.parameters())
    assert fast.head[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("norm", uafs.NORMS)
def test_logits_are_not_constant_at_the_start(norm: str) -> None:
    logits = UAFS(2, 4, 3, norm=norm).head(torch.randn(2, 4, 16, 16))
    assert logits.std((0, 2, 3)).min() > 1e-3
    assert logits.std(1).mean() > 1e-3


def test_uncertainty_explains_the_gate() -> None:
    gate, x = UAFS(2, 4, 3).eval(), torch.randn(2, 4, 16, 16)
    u = gate.uncertainty(x)
    assert u.shape == (2, 1, 16, 16)
    assert u.min() >= 0
    assert u.max() <= 1 + 1e-6
    torch.testing.assert_close(gate(x), x * (2 - u))


def test_gate_under_autocast_and_in_half_precision() -> None:
    gate, x = UAFS(2, 4, 3).eval(), torch.randn(2, 4, 16, 16)
    expected = gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(gate(x), expected, rtol=2e-2, atol=2e-2)
        assert gate(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(gate.bfloat16()(x.bfloat16()).float(), expected, rtol=5e-2, atol=5e-2)


def test_gate_copies_pickles_and_loads_strictly() -> None:
    gate, x = UAFS(2, 4, 3).eval(), torch.randn(1, 4, 8, 8)
    stream = io.BytesIO()
    torch.save(gate.state_dict(), stream)
    stream.seek(0)
    loaded = UAFS(2, 4, 3, backend="reference").eval()
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    for other in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), loaded):
        torch.testing.assert_close(other(x), gate(x))
    assert "spatial_dims=2, in_channels=4, num_classes=3, backend='auto'" in repr(gate)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"spatial_dims": 1}, ValueError, "spatial_dims: expected 2 or 3, got 1"),
        ({"in_channels": 0}, ValueError, "in_channels: expected an integer of at least 1, got 0"),
        ({"num_classes": 1}, ValueError, "num_classes: expected an integer of at least 2, got 1"),
        ({"hidden_channels": 1.0}, TypeError, "hidden_channels: expected an integer, got float"),
        (
            {"norm": "layer"},
            ValueError,
            "norm: expected one of 'batch', 'instance', 'group', 'none', got 'layer'",
        ),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_options_of_the_gate_are_named(changed: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        UAFS(**{"spatial_dims": 2, "in_channels": 4, "num_classes": 3, **changed})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x: expected a tensor (B, 4, *spatial) with 2 spatial axes, got list"),
        (
            torch.ones(4, 8, 8),
            ValueError,
            "x: expected a tensor (B, 4, *spatial) with 2 spatial axes, got shape",
        ),
        (torch.ones(1, 5, 8, 8), ValueError, "x: expected 4 channels, got 5"),
    ],
)
def test_bad_inputs_of_the_gate_are_named(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        UAFS(2, 4, 3)(x)


def test_examples() -> None:
    assert doctest.testmod(uafs).failed == 0
