"""Affinity: its words against the formulas, its fields in C++, and adding one."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import normwise_error, random_ratios

from contrastseg_fast import (
    PDCRLoss,
    ReceptiveField,
    _backend,
    _checks,
    affinity,
    call_plan,
    functional,
    reference,
)
from contrastseg_fast.affinity import Affinity, make_affinity

ROOT = Path(__file__).parent.parent
DEFAULTS = {
    "num_classes": 4,
    "temperature": 0.5,
    "class_distance": "mean",
    "include_background": True,
    "variant": "paper",
}


def weights(ratios: torch.Tensor, word: str, **words) -> tuple[torch.Tensor, torch.Tensor]:
    """w and wbar of all pairs, by the functions that the plain kernels call."""
    options = {**DEFAULTS, "num_classes": ratios.shape[-1], **words}
    scored = affinity.select_compared(ratios, word, options["include_background"])
    pair = make_affinity(word, **options)
    return pair.weights(pair.distance(scored, scored))


def test_words_give_the_formulas_of_the_paper() -> None:
    phi = random_ratios(2, 6, 4, torch.float64)
    difference = (phi[:, :, None] - phi[:, None]).abs()
    for name, d in {
        "mean": difference.mean(-1),
        "sum": difference.sum(-1),
        "tv": difference.sum(-1) / 2,
    }.items():
        torch.testing.assert_close(weights(phi, "ratio", class_distance=name), (1 - d, d))
    d = difference[..., 1:].mean(-1)
    torch.testing.assert_close(weights(phi, "ratio", include_background=False), (1 - d, d))
    half = torch.full_like(d, 0.5)
    torch.testing.assert_close(weights(phi, "constant"), (half, half))
    same = torch.eye(6, dtype=phi.dtype).expand(2, -1, -1)
    torch.testing.assert_close(weights(phi, "diagonal"), (same, 1 - same))
    largest = phi.argmax(-1)
    equal = (largest[:, :, None] == largest[:, None]).double()
    torch.testing.assert_close(weights(phi, "bipartite"), (equal, 1 - equal))


@pytest.mark.parametrize("word", affinity.AFFINITIES)
def test_the_released_form_swaps_the_weights_and_shifts(word: str) -> None:
    phi = random_ratios(1, 5, 3)
    paper, released = (weights(phi, word, variant=variant) for variant in affinity.VARIANTS)
    torch.testing.assert_close(released, paper[::-1])
    assert make_affinity(word, **{**DEFAULTS, "variant": "released"}).shift == 1
    assert make_affinity(word, **DEFAULTS).shift == 0


@pytest.mark.parametrize("word", affinity.AFFINITIES)
def test_the_matrices_of_the_equations_are_those_of_the_kernels(word: str) -> None:
    phi, vectors = random_ratios(2, 7, 3, torch.float64), torch.randn(2, 7, 5, dtype=torch.float64)
    scored = affinity.select_compared(phi, word, True)
    pair = make_affinity(word, **{**DEFAULTS, "num_classes": 3})
    _, w, wbar = pair.matrices(vectors, scored)
    torch.testing.assert_close((w, wbar), weights(phi, word))


def test_numbers_survive_the_way_to_an_operator() -> None:
    pair = make_affinity("bipartite", **DEFAULTS)
    back = Affinity.from_numbers([float(number) for number in pair])
    assert back == pair
    assert back.categorical is True


def test_c_plus_plus_has_the_fields_in_the_same_order() -> None:
    text = (ROOT / "csrc" / "affinity.h").read_text()
    body = re.search(r"struct Affinity \{(.*?)\n\};", text, re.DOTALL)[1]
    declared = [name for names in re.findall(r"^\s*(?:T|bool) ([\w, ]+);", body, re.MULTILINE)
                for name in re.split(r", *", names)]  # fmt: skip
    assert declared[: len(Affinity._fields)] == list(Affinity._fields)


@pytest.mark.skipif(not _backend.has_cpu_extension(), reason="the C++ extension is not installed")
def test_c_plus_plus_refuses_another_number_of_fields() -> None:
    vectors, ratios = torch.randn(1, 4, 3), random_ratios(1, 4, 2)
    numbers = [float(number) for number in make_affinity("ratio", **DEFAULTS)]
    for wrong in (numbers[:-1], [*numbers, 0.0]):
        with pytest.raises(RuntimeError, match=f"affinity: expected 8 numbers, got {len(wrong)}"):
            torch.ops.contrastseg_fast.pdcr_forward(vectors, ratios, None, wrong, "mean", "auto")


@pytest.mark.parametrize("word", ["constant", "diagonal", "bipartite"])
@pytest.mark.parametrize("ignored", [{"class_distance": "tv"}, {"include_background": False}], ids=str)
def test_words_without_effect_are_warned_of(word: str, ignored: dict) -> None:
    vectors, ratios = torch.randn(1, 4, 3), random_ratios(1, 4, 3)
    field = ReceptiveField((3, 3), (1, 1), (-1, -1))
    for call in (
        lambda: functional.pdcr_loss(vectors, ratios, affinity=word, **ignored),
        lambda: functional.repelled_fraction(vectors, ratios, affinity=word, **ignored),
        lambda: PDCRLoss([field], 3, affinity=word, **ignored),
    ):
        with pytest.warns(UserWarning, match=f"have no effect with affinity='{word}'"):
            call()


def test_the_mean_over_more_than_two_classes_is_warned_of_once() -> None:
    field = ReceptiveField((3, 3), (1, 1), (-1, -1))
    _checks.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PDCRLoss([field], 2)
        PDCRLoss([field], 1)
        PDCRLoss([field], 3, class_distance="tv")
        PDCRLoss([field], 3, affinity="constant")
        PDCRLoss([field], 3, include_background=False)  # the mean of two is half of their sum
        PDCRLoss([field], 1, affinity="diagonal")
    with pytest.warns(UserWarning, match="class_distance='tv' does not fade") as caught:
        PDCRLoss([field], 3)
    assert caught[0].filename == __file__, "the user's own line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PDCRLoss([field], 4)


def test_adding_an_affinity_takes_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry of docs/adding-an-affinity.md, on every backend that runs here."""
    page = (ROOT / "docs" / "adding-an-affinity.md").read_text()
    word, entry = re.search(r'^\s*"(\w+)": (_Entry\(.*\)),$', page, re.MULTILINE).groups()
    monkeypatch.setitem(affinity._ENTRIES, word, eval(entry, {"_Entry": affinity._Entry}))
    for module in (affinity, call_plan):
        monkeypatch.setattr(module, "AFFINITIES", (*affinity.AFFINITIES, word))
    vectors = torch.randn(2, 130, 9, dtype=torch.float64, requires_grad=True)
    phi = random_ratios(2, 130, 4, torch.float64)
    d = (phi[:, :, None] - phi[:, None]).abs().mean(-1)
    u = torch.nn.functional.normalize(vectors, dim=-1)
    s = u @ u.mT / 0.5
    expected = ((s * (0.25 + d / 2)).logsumexp(-1, keepdim=True) - s * (0.75 - d / 2)).mean()
    (expected_gradient,) = torch.autograd.grad(expected, vectors)
    for backend in ("auto", "reference"):
        loss = functional.pdcr_loss(vectors, phi, affinity=word, backend=backend)
        (gradient,) = torch.autograd.grad(loss, vectors)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        assert normwise_error(gradient, expected_gradient) < 1e-10
    torch.testing.assert_close(reference.pdcr_loss(vectors, phi, affinity=word), expected)
    field = ReceptiveField((3, 3), (1, 1), (-1, -1))
    x, labels = torch.randn(1, 4, 6, 6), torch.randint(2, (1, 6, 6))
    ours, plain = (module([field], 2, affinity=word)(x, labels) for module in (PDCRLoss, reference.PDCRLoss))
    torch.testing.assert_close(ours, plain)
