"""Where the elements of a tensor lie in an image, also where they see the whole of it.

Behind attention, pooling over the map and the like, every element sees a whole axis. The results are feature
maps nonetheless, if vectors keep their positions. `Positions` follows these, and `Field` has them beside what
the elements see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from contrastseg_fast.receptive_field.algebra import (
    Dim,
    Factor,
    Held,
    Intervals,
    Reach,
    Seen,
    concatenate,
    extent_of,
)

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Positions(Reach):
    """The pixels at the positions of the elements of a tensor.

    As in `Reach`, but only what moves with an element counts, not what the element sees besides. Where
    elements are not in the order of the image any more, the axis is lost: no order is ever made up.
    """

    def plain(self, dim: int) -> Self:
        """The same with at most one factor along `dim`; axes are lost unless positions are in order there."""
        factors, axes = self.dims[dim], self.axes_of(dim)
        if not axes or (len(factors) == 1 and not factors[0].held):
            return self
        axis, span, in_order = factors[0].axis, 0, True
        for k, factor in reversed(list(enumerate(factors))):
            if factor.axis == axis:
                in_order &= factor.step > span
                span += (factor.extent - 1) * factor.step
            else:  # several elements lie at one position, as behind an up-sampling, but next to each other
                in_order &= not factor.axes and not any(inner.axes for inner in factors[k + 1 :])
        if axis is None or not in_order or axes != {axis} or self.places(axis) != {dim}:
            return self.lose(axes)
        return super().plain(dim)

    def slice(self, dim: int, start: int, step: int, count: int) -> Self:
        """The same for the elements `start + step * j`, j < count, as `Reach.slice`.

        A dimension that is only enlarged holds what it was, and gives it back when it is cut to it.
        """
        extent = self.shape[dim]
        if (start, step, count) == (0, 1, extent):
            return self
        factors, axes = self.dims[dim], self.axes_of(dim)
        first = factors[0] if len(factors) == 1 else Factor(extent)
        held = first.held or Held(factors)
        if not first.held and (not axes or self.plain(dim).axes_of(dim)):
            return super().slice(dim, start, step, count)
        size = extent_of(held.factors)
        offset = held.offset - start
        if held.spectrum is not None or step != 1 or offset < 0 or offset + size > count:
            return self.lose(axes).with_dim(dim, count)
        back = held.factors if size == count else (Factor(count, held=Held(held.factors, offset)),)
        return self.normal([*self.dims[:dim], back, *self.dims[dim + 1 :]], self.seen)

    def resample(
        self, dim: int, taps: Callable[[int], Iterable[int]], count: int, period: int = 1, shift: int = 1
    ) -> Self:
        """The same for elements made of the elements `taps(j)`, as `Reach.resample`.

        An axis that lies along another dimension as well is lost, unless each element is made of itself.
        """
        if (period, count) == (shift, self.shape[dim]) and all(set(taps(j)) == {j} for j in range(period)):
            return self
        home = self.settled()
        axes = {axis for axis in home.axes_of(dim) if home.places(axis) != {dim}}
        return super(Positions, home.lose(axes)).resample(dim, taps, count, period, shift)

    def transform(self, dim: int, count: int, forward: bool) -> Self:
        """The same behind a Fourier transform; the inverse one brings back what the spectrum holds."""
        factors = self.dims[dim]
        held = factors[0].held if len(factors) == 1 else None
        if held and held.spectrum is not None:
            fits = held.spectrum != forward and extent_of(held.factors) == count
            back: Dim = held.factors if fits else (Factor(count),)
        else:
            back = (Factor(count, held=Held(factors, spectrum=forward)),) if self.axes_of(dim) else factors
        lost = self.axes_of(dim) - {axis for factor in back for axis in factor.axes}
        made = self.lose(lost)
        return self.normal([*made.dims[:dim], back, *made.dims[dim + 1 :]], made.seen)

    def union(self, other: Self) -> Self:
        """The positions in a tensor made elementwise of this one and another of the same shape.

        A position that one of them knows more exactly counts. Where an axis lies along different dimensions,
        the positions are those of this one, and the axis lies along the other dimensions too.
        """
        if self == other or other.is_constant:
            return self
        if self.is_constant:
            return other
        first, second = self.settled(), other.settled()
        lost: set[int] = set()
        pairs: list[list[tuple[Factor, Factor]]] = []
        for x, y in zip(first.dims, second.dims, strict=True):
            aligned = _aligned(x, y)
            if aligned is None:
                lost.update(axis for factor in (*x, *y) for axis in factor.axes)
                aligned = [(Factor(extent_of(x)), Factor(extent_of(x)))]
            for mine, theirs in aligned:
                if mine.axes and theirs.axes and not _agree(mine, theirs):
                    lost |= mine.axes | theirs.axes
            pairs.append(aligned)
        seen: list[Seen] = [_known(*both) for both in zip(first.seen, second.seen, strict=True)]
        better: dict[int, bool] = {}  # the axes with positions in both; whether the second knows them better
        for axis in range(len(seen)):
            if isinstance(first.seen[axis], Intervals) and isinstance(second.seen[axis], Intervals):
                own, others = (_carriers(pairs, side, axis) for side in (0, 1))
                better[axis] = own.keys() < others.keys()
                if own == others:
                    seen[axis] = first._common(axis, second)
                elif own.keys() == others.keys():
                    lost.add(axis)
                elif better[axis]:
                    seen[axis] = second.seen[axis]
        blurred = {axis for axis, is_better in better.items() if not is_better}

        def taken(mine: Factor, theirs: Factor) -> Factor:
            if not mine.axes:
                return theirs.blurred(blurred)
            return theirs if theirs.axes and any(better.get(axis) for axis in theirs.axes) else mine

        return self.normal([tuple(taken(*pair) for pair in dim) for dim in pairs], seen).lose(lost)

    def _common(self, axis: int, other: Self) -> Intervals:
        """The intervals along an axis that hold those of both, where their factors are the same."""
        mine, theirs = self.seen[axis], other.seen[axis]
        assert isinstance(mine, Intervals)
        assert isinstance(theirs, Intervals)
        leaves = (leaf for dim in self.dims for factor in dim for leaf in factor.leaves)
        count = 1 + sum((leaf.extent - 1) * abs(leaf.step) for leaf in leaves if leaf.axis == axis)
        return mine.union(theirs, count).shortened(count)


@dataclass(frozen=True)
class Field:
    """What the elements of a tensor see of an image, and where they lie in it.

    Attributes:
        reach: what they see.
        positions: where they lie along the axes that `reach` has lost; None if there are none. Along other
            axes their positions are those that they see.
    """

    reach: Reach
    positions: Positions | None = None

    @classmethod
    def image(cls, shape: Sequence[int]) -> Field:
        """The field of an image `(B, C, *spatial)`."""
        return cls(Reach.image(shape))

    @classmethod
    def constant(cls, shape: Sequence[int], axes: int) -> Field:
        """The field of a tensor that sees nothing of the image."""
        return cls(Reach.constant(shape, axes))

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.reach.shape

    @property
    def num_axes(self) -> int:
        """Number of axes of the image."""
        return len(self.reach.seen)

    @property
    def is_constant(self) -> bool:
        """Whether the tensor sees nothing of the image."""
        return self.reach.is_constant

    def axes_of(self, dim: int) -> set[int]:
        """The image axes that lie along a dimension."""
        return self.reach.axes_of(dim) | (self.positions.axes_of(dim) if self.positions else set())

    @property
    def layout(self) -> Positions:
        """Where the elements lie along all axes."""
        return self._positions_along(set(range(self.num_axes)))

    def unbounded(self, axes: Iterable[int] | None = None) -> Field:
        """The field if elements see the whole of these axes, or of all that they see anything of.

        They stay where they are.
        """
        return self._made(self.reach.lose(axes), lambda positions: positions)

    def unbounded_like(self, other: Field) -> Field:
        """The field, unbounded along all axes of which another tensor sees anything."""
        return self._made(self.reach.lose_where(other.reach.lose().seen), lambda positions: positions)

    def lose(self, axes: Iterable[int] | None = None) -> Field:
        """The field, unbounded along these axes, if it is not known either where elements lie."""
        axes = axes if axes is None else set(axes)
        return self._move(lambda part: part.lose(axes))

    def unknown(self, shape: Sequence[int]) -> Field:
        """The field of a tensor that was made of this one in an unknown way."""
        return self._move(lambda part: part.unknown(shape))

    def with_reason(self, reason: str) -> Field:
        """The field, with a reason for each axis that is unbounded, and each position lost, without one."""
        if self.positions is None:
            return self
        return Field(self.reach.with_reason(reason), self.positions.with_reason(reason))

    def union(self, other: Field) -> Field:
        """The field of a tensor made elementwise of this one and another of the same shape."""
        reach = self.reach.union(other.reach)
        return self._made(reach, lambda positions: positions.union(other._positions_along(reach.lost)))

    def with_dim(self, dim: int, extent: int) -> Field:
        """The field with another extent along a dimension that carries no image axis."""
        return self._move(lambda part: part.with_dim(dim, extent))

    def permute(self, order: Sequence[int]) -> Field:
        """The field of `tensor.permute(order)`."""
        return self._move(lambda part: part.permute(order))

    def insert(self, dim: int, extent: int = 1) -> Field:
        """The field with a new dimension before `dim`."""
        return self._move(lambda part: part.insert(dim, extent))

    def squeeze(self, dims: Sequence[int]) -> Field:
        """The field of `tensor.squeeze(dims)`."""
        return self._move(lambda part: part.squeeze(dims))

    def reshape(self, shape: Sequence[int]) -> Field:
        """The field of `tensor.reshape(shape)`."""
        return self._move(lambda part: part.reshape(shape))

    def expand(self, shape: Sequence[int]) -> Field:
        """The field of `tensor.expand(shape)`."""
        return self._move(lambda part: part.expand(shape))

    def slice(self, dim: int, start: int, step: int, count: int) -> Field:
        """The field of the elements `start + step * j`, j < count, also outside the tensor."""
        return self._move(lambda part: part.slice(dim, start, step, count))

    def select(self, dim: int, index: int) -> Field:
        """The field of `tensor.select(dim, index)`."""
        return self._move(lambda part: part.select(dim, index))

    def roll(self, dim: int, shift: int) -> Field:
        """The field of `tensor.roll(shift, dim)`; elements that go round count as if they went on."""
        extent = self.shape[dim]
        first = (extent // 2 - shift) % max(extent, 1) - extent // 2
        seen = self.unbounded(self.axes_of(dim))
        return seen._move(lambda part: part.slice(dim, first, 1, extent))

    def windows(self, dim: int, size: int, step: int, dilation: int, count: int) -> Field:
        """The field of `count` windows along `dim`, `step` apart; their elements lie along a new last one."""
        return self._move(lambda part: part.windows(dim, size, step, dilation, count))

    def strided(self, first: Sequence[int], picks: Sequence[tuple[int | None, int, int]]) -> Field:
        """The field of a view that starts at element `first`, as `Reach.strided`."""
        return self._move(lambda part: part.strided(first, picks))

    def resample(
        self, dim: int, taps: Callable[[int], Iterable[int]], count: int, period: int = 1, shift: int = 1
    ) -> Field:
        """The field of a tensor whose j-th element along `dim` is made of the elements `taps(j)`."""
        return self._move(lambda part: part.resample(dim, taps, count, period, shift))

    def transform(self, dim: int, count: int, forward: bool) -> Field:
        """The field behind a Fourier transform along a dimension, which has `count` elements then."""
        reach = self.reach.lose(self.reach.axes_of(dim)).with_dim(dim, count)
        return self._made(reach, lambda positions: positions.transform(dim, count, forward))

    def mixed(self, dim: int) -> Field:
        """The field if each element along `dim` sees what all of them see."""
        return self._move(lambda part: part.mixed(dim))

    def reduce(self, dims: Sequence[int], keepdim: bool = False) -> Field:
        """The field of a reduction over `dims`."""
        return self._move(lambda part: part.reduce(dims, keepdim))

    @staticmethod
    def concatenate(fields: Sequence[Field], dim: int) -> Field:
        """The field of tensors joined along a dimension."""
        reach = concatenate([field.reach for field in fields], dim)
        parts = [field._positions_along(reach.lost) for field in fields[1:]]
        return fields[0]._made(reach, lambda positions: concatenate([positions, *parts], dim))

    def _move(self, move: Callable[[Any], Any]) -> Field:
        """The field whose parts are made by a function of the parts of this one."""
        return self._made(move(self.reach), move)

    def _made(self, reach: Reach, move: Callable[[Positions], Positions]) -> Field:
        """The field of a tensor that sees `reach`, and whose positions are made of this one's by `move`."""
        if not (lost := reach.lost):
            return Field(reach)
        positions = move(self._positions_along(lost))
        if None in positions.seen:
            known = [seen if positions.seen[axis] is None else None for axis, seen in enumerate(reach.seen)]
            positions = positions.lose_where(known)
        return Field(reach, positions)

    def _positions_along(self, axes: set[int]) -> Positions:
        """Where the elements lie along these axes."""
        seen = [
            seen if axis in axes and isinstance(seen, Intervals) else None
            for axis, seen in enumerate(self.reach.seen)
        ]
        if self.positions is not None and not any(seen):
            return self.positions
        positions = Positions.normal(self.reach.dims, seen)
        return positions if self.positions is None else self.positions.union(positions)


def _known(mine: Seen, theirs: Seen) -> Seen:
    """What is known along an axis from either of two tensors, from the first if from both."""
    return mine if isinstance(mine, Intervals) or theirs is None else theirs


def _agree(mine: Factor, theirs: Factor) -> bool:
    """Whether two factors carry the same axes in the same way, perhaps in other steps."""
    return mine == theirs or (not mine.held and not theirs.held and mine.axis == theirs.axis)


def _carriers(
    pairs: Sequence[Sequence[tuple[Factor, Factor]]], side: int, axis: int
) -> dict[tuple[int, int], Factor]:
    """The factors of one side that carry an axis, by dimension and place in it."""
    return {
        (dim, k): pair[side]
        for dim, aligned in enumerate(pairs)
        for k, pair in enumerate(aligned)
        if axis in pair[side].axes
    }


def _aligned(x: Dim, y: Dim) -> list[tuple[Factor, Factor]] | None:
    """Two lists of factors of one dimension, split into pairs of equal extents; None if they do not match."""
    if x == y:
        return list(zip(x, y, strict=True))
    mine, theirs = list(x), list(y)
    pairs: list[tuple[Factor, Factor]] = []
    while mine or theirs:
        a = mine.pop() if mine else Factor(1)
        b = theirs.pop() if theirs else Factor(1)
        if a.extent > b.extent:
            outer, a = _split(a, b.extent)
            mine.append(outer)
        elif b.extent > a.extent:
            outer, b = _split(b, a.extent)
            theirs.append(outer)
        if a.extent != b.extent:
            return None
        pairs.append((a, b))
    return pairs[::-1]


def _split(factor: Factor, extent: int) -> tuple[Factor, Factor]:
    """The factor around another of `extent` elements, or of 1 around itself if it cannot be split so."""
    if extent == 1:
        return factor, Factor(1)
    return (Factor(1), factor) if factor.held or factor.extent % extent else factor.split(extent)
