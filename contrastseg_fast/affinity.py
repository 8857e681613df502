"""How a pair of vectors is scored: one small tuple of numbers, which every backend takes.

    d_ij    = distance_scale * sum_m |phi_i^m - phi_j^m|      distance of two vectors' ratios (Eq. 3)
    w_ij    = num_bias + num_slope * d_ij                     weight in the numerator of Eq. 7
    wbar_ij = den_bias + den_slope * d_ij                     weight in its denominator
    s_ij    = cos(v_i, v_j) - shift

A categorical affinity compares one category per vector instead of M ratios: d_ij is 0 where the categories of
i and j are equal, and 1 where they differ.

An affinity that is affine in d is one entry of `_ENTRIES`; docs/adding-an-affinity.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from contrastseg_fast import _checks, equations

CLASS_DISTANCES = ("mean", "sum", "tv")
VARIANTS = ("paper", "released")


class Affinity(NamedTuple):
    """The numbers of the equations above, and the temperature tau. Operators take them as `float[]`."""

    temperature: float
    distance_scale: float
    categorical: bool
    num_bias: float
    num_slope: float
    den_bias: float
    den_slope: float
    shift: float

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Affinity:
        """The affinity that an operator got as a list of numbers."""
        affinity = cls(*numbers)  # type: ignore[arg-type]
        return affinity._replace(categorical=bool(affinity.categorical))

    @property
    def is_plain(self) -> bool:
        """Whether exponents are s d / tau, with s the cosine: a pair at distance 0 has exponential 1."""
        return (self.den_bias, self.den_slope, self.shift) == (0, 1, 0)

    def distance(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Distances d `(B, R, N)` between the ratios or categories of rows `(B, R, M)` and of `(B, N, M)`."""
        if self.categorical:
            return (rows != columns.mT).to(rows.dtype)
        total = rows.new_zeros((rows.shape[0], rows.shape[1], columns.shape[1]))
        for m in range(columns.shape[-1]):  # (B, R, N, M) is never stored
            total += (rows[..., m, None] - columns[:, None, :, m]).abs()
        return total * self.distance_scale

    def weights(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """The weights w and wbar of pairs at the given distances."""
        return self.num_bias + self.num_slope * distance, self.den_bias + self.den_slope * distance

    def matrices(self, vectors: Tensor, compared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s, w and wbar of all pairs, each `(B, N, N)`, as the functions of `equations` take them."""
        s = equations.cosine_similarity(equations.upcast(vectors))
        compared = compared.to(s.dtype)
        if self.categorical:
            distance = equations.category_distance(compared)
        else:
            distance = equations.class_distance(compared, self.distance_scale)
        return s - self.shift, *self.weights(distance)


class _Entry(NamedTuple):
    """One affinity by its word: the weights as (bias, slope) in d, and what a categorical one compares."""

    numerator: tuple[float, float]
    denominator: tuple[float, float]
    categories: Callable[[Tensor], Tensor] | None = None  # ratios (B, N, M) to categories (B, N, 1)
    at_centre: bool = False  # whether modules count the pixel at the centre of the patch alone


def _own_category(ratios: Tensor) -> Tensor:
    """Every vector is a category of its own."""
    own = torch.arange(ratios.shape[1], dtype=ratios.dtype, device=ratios.device)
    return own.expand(ratios.shape[:2])[..., None]


def _largest_class(ratios: Tensor) -> Tensor:
    """The class with the largest ratio."""
    return ratios.argmax(-1, keepdim=True).to(ratios.dtype)


_ENTRIES = {
    "ratio": _Entry((1.0, -1.0), (0.0, 1.0)),
    "constant": _Entry((0.5, 0.0), (0.5, 0.0)),
    "diagonal": _Entry((1.0, -1.0), (0.0, 1.0), _own_category),
    "bipartite": _Entry((1.0, -1.0), (0.0, 1.0), _largest_class, at_centre=True),
}
AFFINITIES = tuple(_ENTRIES)


def compares_ratios(affinity: str) -> bool:
    """Whether the ratios' distance matters, and with it `class_distance` and `include_background`."""
    entry = _ENTRIES[affinity]
    return entry.categories is None and (entry.numerator[1], entry.denominator[1]) != (0, 0)


def is_at_centre(affinity: str) -> bool:
    """Whether modules count the pixel at the centre of the patch alone."""
    return _ENTRIES[affinity].at_centre


def make_affinity(
    affinity: str,
    *,
    num_classes: int,
    temperature: float,
    class_distance: str,
    include_background: bool,
    variant: str,
) -> Affinity:
    """The tuple for the public words of `pdcr_loss`; `num_classes` is M, the number of ratios per vector."""
    num, den, categories, _ = _ENTRIES[affinity]
    if variant == "released":
        num, den = den, num
    num_compared = num_classes if include_background else num_classes - 1
    scale = {"mean": 1 / num_compared, "sum": 1.0, "tv": 0.5}[class_distance]
    return Affinity(
        temperature=temperature,
        distance_scale=1.0 if categories else scale,
        categorical=categories is not None,
        num_bias=num[0],
        num_slope=num[1],
        den_bias=den[0],
        den_slope=den[1],
        shift=1.0 if variant == "released" else 0.0,
    )


def select_compared(ratios: Tensor, affinity: str, include_background: bool) -> Tensor:
    """What the distance d compares: categories `(B, N, 1)`, or the ratios of the classes that count."""
    categories = _ENTRIES[affinity].categories
    if categories is not None:
        return categories(ratios)
    return ratios if include_background else ratios[..., 1:]


def check_words(
    affinity: str, *, temperature: float, class_distance: str, include_background: bool, variant: str
) -> None:
    """Check the public words, and warn of those that have no effect.

    Raises:
        TypeError: `temperature` is not a number, or `include_background` not a bool.
        ValueError: `temperature` is not positive and finite, or a word is unknown.
    """
    _checks.positive_finite("temperature", temperature)
    _checks.one_of("affinity", affinity, AFFINITIES)
    _checks.one_of("class_distance", class_distance, CLASS_DISTANCES)
    _checks.one_of("variant", variant, VARIANTS)
    _checks.boolean("include_background", include_background)
    if not compares_ratios(affinity) and (class_distance != "mean" or not include_background):
        _checks.warn(
            f"class_distance={class_distance!r} and include_background={include_background} have no effect "
            f"with affinity={affinity!r}, which does not compare ratios"
        )
