"""What slicing, reshaping, joining and reducing a tensor does to what its elements see of an image.

`Intervals` says what is seen along one axis of the image, `Reach` what a whole tensor sees. Both are made of
integers; no tensor is touched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

_LONGEST_PATTERN = 2048
_SIMPLE_DENOMINATOR = 8

Interval = tuple[int, int]  # pixels [low, high)
R = TypeVar("R", bound="Reach")


@dataclass(frozen=True)
class Intervals:
    """One interval of pixels along one image axis for every integer index.

    An index that sees no pixel has None. Interval `i + len(pattern)` is interval `i` moved by `shift` pixels.
    Patterns longer than 1 occur behind up-sampling, where neighbouring features see intervals of different
    sizes.
    """

    pattern: tuple[Interval | None, ...]
    shift: int

    @classmethod
    def pixels(cls) -> Intervals:
        """Every index sees the pixel of that number."""
        return cls(((0, 1),), 1)

    @property
    def stride(self) -> Fraction:
        """Pixels from one interval to the next, on average."""
        return Fraction(self.shift, len(self.pattern))

    def __getitem__(self, index: int) -> Interval | None:
        turn, phase = divmod(index, len(self.pattern))
        return _moved(self.pattern[phase], turn * self.shift)

    def hulls(self, taps: Callable[[int], Iterable[int]], period: int = 1, shift: int = 1) -> Intervals:
        """For every j the hull of the intervals `taps(j)`; `taps(j + period)` must be `taps(j) + shift`."""
        repeats = len(self.pattern) // math.gcd(len(self.pattern), shift)
        pattern = tuple(_hull(self[index] for index in taps(j)) for j in range(period * repeats))
        return _shortest(pattern, self.shift * shift * repeats // len(self.pattern))

    def every(self, step: int) -> Intervals:
        """The intervals whose j-th is interval `j * step` of these."""
        return self if step == 1 else self.hulls(lambda j: (j * step,), 1, step)

    def union(self, other: Intervals, count: int) -> Intervals:
        """For every index the hull of both intervals.

        If the strides differ, the hulls of the indices [0, count) are kept and continued on both sides.
        """
        if not any(other.pattern):
            return self
        if not any(self.pattern):
            return other
        if self.stride == other.stride:
            length = math.lcm(len(self.pattern), len(other.pattern))
            pattern = tuple(_hull((self[i], other[i])) for i in range(length))
            return _shortest(pattern, self.shift * length // len(self.pattern))
        stride = min(self.stride, other.stride, key=lambda stride: stride.denominator)
        length = 2 * count + -2 * count % stride.denominator
        hulls = [_hull((self[i], other[i])) for i in range(count)]
        beyond = length - count
        after = [_moved(hulls[-1], math.floor(k * stride)) for k in range(1, beyond - beyond // 2 + 1)]
        before = [_moved(hulls[0], math.floor((length - k) * stride)) for k in range(beyond // 2, 0, -1)]
        return _shortest((*hulls, *after, *before), int(stride * length))

    def cover(self, stride: Fraction, count: int) -> Intervals:
        """The smallest equal intervals, `stride` apart, that contain those of the indices [0, count)."""
        size, start = _smallest_grid(((i, self[i]) for i in range(count)), stride)
        lows = [math.floor(start + i * stride) for i in range(stride.denominator)]
        return _shortest(tuple((low, low + size) for low in lows), stride.numerator)

    def shortened(self, count: int) -> Intervals:
        """These intervals, or a cover of those of the indices [0, count) if their pattern is too long."""
        if len(self.pattern) <= _LONGEST_PATTERN:
            return self
        return self.cover(self.stride.limit_denominator(_LONGEST_PATTERN), count)

    def grid(self, count: int) -> tuple[int, Fraction, Fraction]:
        """Size, stride and start of the smallest equal intervals that contain those of [0, count).

        Their stride is the stride of these, or a simple fraction near it that needs no larger size.
        """
        intervals = [(i, self[i]) for i in range(count)]
        strides = {self.stride, self.stride.limit_denominator(_SIMPLE_DENOMINATOR) or self.stride}
        fits = [(*_smallest_grid(intervals, stride), stride) for stride in strides]
        size, start, stride = min(fits, key=lambda fit: (fit[0], fit[2].denominator))
        return size, stride, start


def _hull(intervals: Iterable[Interval | None]) -> Interval | None:
    seen = [interval for interval in intervals if interval is not None]
    return (min(low for low, _ in seen), max(high for _, high in seen)) if seen else None


def _moved(interval: Interval | None, pixels: int) -> Interval | None:
    return interval and (interval[0] + pixels, interval[1] + pixels)


def _shortest(pattern: tuple[Interval | None, ...], shift: int) -> Intervals:
    """The intervals of a pattern, with the shortest pattern that repeats to it."""
    total = len(pattern)
    for length in range(1, total // 2 + 1):
        if total % length == 0 and shift * length % total == 0:
            intervals = Intervals(pattern[:length], shift * length // total)
            if all(intervals[i] == pattern[i] for i in range(length, total)):
                return intervals
    return Intervals(pattern, shift)


def _smallest_grid(
    intervals: Iterable[tuple[int, Interval | None]], stride: Fraction
) -> tuple[int, Fraction]:
    """The least size of intervals that start at `floor(start + i * stride)`, and a start that allows it."""
    seen = [(i, interval) for i, interval in intervals if interval is not None]
    if not seen:
        return 0, Fraction(0)
    unit = Fraction(1, stride.denominator)
    latest = min(low - i * stride for i, (low, _) in seen) + 1 - unit
    size = max(high - math.floor(latest + i * stride) for i, (_, high) in seen)
    earliest = max(high - size - i * stride for i, (_, high) in seen)
    return size, earliest + (latest - earliest) // (2 * unit) * unit


class Held(NamedTuple):
    """Factors that a dimension holds within, and that come back when it is cut to them.

    Their elements begin at index `offset`, behind class tokens for instance. For a spectrum, `spectrum` says
    whether a forward transform made it, and the other transform brings the factors back.
    """

    factors: tuple[Factor, ...]
    offset: int = 0
    spectrum: bool | None = None


class Factor(NamedTuple):
    """A factor of a dimension's extent; one step along it is `step` intervals along image axis `axis`.

    Step 0 says that the axis lies along this factor as well, but that it does not tell where elements lie.
    """

    extent: int
    axis: int | None = None
    step: int = 0
    held: Held | None = None

    @property
    def axes(self) -> set[int]:
        """The image axes that lie along it, those that it holds included."""
        if self.held:
            return {factor.axis for factor in self.held.factors if factor.axis is not None}
        return set() if self.axis is None else {self.axis}

    @property
    def leaves(self) -> tuple[Factor, ...]:
        """The factors that it holds, or itself."""
        return self.held.factors if self.held else (self,)

    def blurred(self, axes: Container[int]) -> Factor:
        """The factor with step 0 along these axes."""
        if self.held:
            return self._replace(
                held=self.held._replace(factors=tuple(f.blurred(axes) for f in self.held.factors))
            )
        return self._replace(step=0) if self.axis in axes else self

    def split(self, inner: int) -> tuple[Factor, Factor]:
        """The factor as one around another of `inner` elements; what it holds is lost."""
        outer = Factor(self.extent // inner, self.axis, self.step * inner)
        return outer, Factor(inner, self.axis, self.step)

    def without(self, axes: Container[int]) -> Factor:
        """The factor, plain if it carries one of these axes."""
        return Factor(self.extent) if any(axis in axes for axis in self.axes) else self


class Lost(NamedTuple):
    """There are no intervals along an axis any more; `reason` names the operator behind which."""

    reason: str = ""


Seen = Intervals | Lost | None
Dim = tuple[Factor, ...]  # outermost factor first; () is an extent of 1


@dataclass(frozen=True)
class Reach:
    """How far the elements of a tensor see in an image.

    Along each axis of the image an element sees one interval of `seen[axis]`. Its number is
    `sum_k index_k step_k`, over the factors of the tensor's dimensions that belong to the axis. Elements that
    differ only in other factors, such as channels, see the same. `seen[axis]` is `Lost` if elements see the
    whole axis or it cannot be known how much of it, and None if they see nothing of it.
    """

    dims: tuple[Dim, ...]
    seen: tuple[Seen, ...]

    @classmethod
    def normal(cls, dims: Iterable[Dim], seen: Sequence[Seen]) -> Self:
        """In normal form: as few factors as possible, and step 1 along an axis with one factor.

        An axis without a factor is lost.
        """
        seen = list(seen)
        gone = {axis for axis, intervals in enumerate(seen) if not isinstance(intervals, Intervals)}
        rows = [_merged(factor.without(gone) for factor in dim) for dim in dims]
        for axis, intervals in enumerate(seen):
            if isinstance(intervals, Intervals):
                along = [(d, k, f) for d, row in enumerate(rows) for k, f in enumerate(row) if axis in f.axes]
                if not any(leaf.axis == axis and leaf.step for _, _, f in along for leaf in f.leaves):
                    seen[axis] = Lost()
                    rows = [_merged(factor.without({axis}) for factor in row) for row in rows]
                elif len(along) == 1 and not along[0][2].held:
                    ((d, k, factor),) = along
                    seen[axis] = intervals.every(factor.step)
                    rows[d][k] = factor._replace(step=1)
        return cls(tuple(tuple(row) for row in rows), tuple(seen))

    @classmethod
    def image(cls, shape: Sequence[int]) -> Self:
        """That of an image `(B, C, *spatial)`."""
        axes = len(shape) - 2
        dims = [(Factor(extent),) for extent in shape[:2]]
        dims += [(Factor(extent, axis, 1),) for axis, extent in enumerate(shape[2:])]
        return cls.normal(dims, (Intervals.pixels(),) * axes)

    @classmethod
    def constant(cls, shape: Sequence[int], axes: int) -> Self:
        """That of a tensor that sees nothing of the image."""
        return cls.normal([(Factor(extent),) for extent in shape], (None,) * axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(extent_of(dim) for dim in self.dims)

    @property
    def is_constant(self) -> bool:
        """Whether the tensor sees nothing of the image."""
        return all(seen is None for seen in self.seen)

    @property
    def lost(self) -> set[int]:
        """The axes that are lost."""
        return {axis for axis, seen in enumerate(self.seen) if isinstance(seen, Lost)}

    def axes_of(self, dim: int) -> set[int]:
        """The image axes that lie along a dimension."""
        return {axis for factor in self.dims[dim] for axis in factor.axes}

    def places(self, axis: int) -> set[int]:
        """The dimensions that an image axis lies along."""
        return {dim for dim in range(len(self.dims)) if axis in self.axes_of(dim)}

    def lose(self, axes: Iterable[int] | None = None) -> Self:
        """The same without the given axes; None means all axes of which the tensor sees anything."""
        gone = {a for a, seen in enumerate(self.seen) if seen is not None} if axes is None else set(axes)
        return self.lose_where([Lost() if axis in gone else None for axis in range(len(self.seen))])

    def lose_where(self, other: Sequence[Seen]) -> Self:
        """The same without the axes that are lost in `other`."""
        pairs = zip(self.seen, other, strict=True)
        seen = [a if isinstance(a, Lost) or not isinstance(b, Lost) else b for a, b in pairs]
        return self.normal(self.dims, seen)

    def unknown(self, shape: Sequence[int]) -> Self:
        """That of a tensor that was made of this one in an unknown way."""
        return self.constant(shape, len(self.seen)).lose_where(self.lose().seen)

    def with_reason(self, reason: str) -> Self:
        """The same with a reason for each axis that is lost without one."""
        if Lost() not in self.seen:
            return self
        return replace(self, seen=tuple(Lost(reason) if old == Lost() else old for old in self.seen))

    def with_dim(self, dim: int, extent: int) -> Self:
        """The same with another extent along a dimension that carries no image axis."""
        return self.normal([*self.dims[:dim], (Factor(extent),), *self.dims[dim + 1 :]], self.seen)

    def permute(self, order: Sequence[int]) -> Self:
        """The reach of `tensor.permute(order)`."""
        return self.normal([self.dims[dim] for dim in order], self.seen)

    def insert(self, dim: int, extent: int = 1) -> Self:
        """The same with a new dimension before `dim`."""
        return self.normal([*self.dims[:dim], (Factor(extent),), *self.dims[dim:]], self.seen)

    def squeeze(self, dims: Iterable[int]) -> Self:
        """The reach of `tensor.squeeze(dims)`; axes along a removed dimension move to its neighbour."""
        kept: list[Dim] = []
        removed: Dim = ()
        for dim, factors in enumerate(self.dims):
            if dim in dims and extent_of(factors) == 1:
                removed += factors
            else:
                kept.append(removed + factors)
                removed = ()
        if kept:
            kept[-1] += removed
        return self.normal(kept, self.seen)

    def reshape(self, shape: Sequence[int]) -> Self:
        """The reach of `tensor.reshape(shape)`; all is lost if a new dimension ends inside a factor."""
        if tuple(shape) == self.shape:
            return self
        dims = _regroup(_merged([f for dim in self.dims for f in dim or (Factor(1),)], keep_ones=True), shape)
        if dims is None:
            return self.unknown(shape)
        return self.normal(dims, self.seen)

    def expand(self, shape: Sequence[int]) -> Self:
        """The reach of `tensor.expand(shape)`."""
        reach = self
        for _ in range(len(shape) - len(self.dims)):
            reach = reach.insert(0)
        for dim, extent in enumerate(shape):
            if extent != reach.shape[dim]:
                reach = reach.lose(reach.axes_of(dim)).with_dim(dim, extent)
        return reach

    def slice(self, dim: int, start: int, step: int, count: int) -> Self:
        """The reach of the elements `start + step * j`, j < count.

        Elements outside the tensor see what a longer tensor would see there.
        """
        if (start, step, count) == (0, 1, self.shape[dim]):
            return self
        reach = self.plain(dim)
        axes = reach.axes_of(dim)
        if not axes:
            return reach.with_dim(dim, count)
        (factor,), (axis,) = reach.dims[dim], axes
        reach = reach._hulls_at(axis, [start * factor.step])
        dims = list(reach.dims)
        dims[dim] = (Factor(count, axis, factor.step * step),)
        return self.normal(dims, reach.seen)

    def select(self, dim: int, index: int) -> Self:
        """The reach of `tensor.select(dim, index)`; an axis of that dimension alone is lost."""
        reach = self.slice(dim, index, 1, 1)
        return self.normal([*reach.dims[:dim], *reach.dims[dim + 1 :]], reach.seen)

    def windows(self, dim: int, size: int, step: int, dilation: int, count: int) -> Self:
        """The reach of `count` windows along `dim`, `step` apart; their elements lie along a new last one."""
        reach = self.plain(dim)
        axes = reach.axes_of(dim)
        if not axes:
            return reach.with_dim(dim, count).insert(len(self.dims), size)
        (factor,), (axis,) = reach.dims[dim], axes
        dims = list(reach.dims)
        dims[dim] = (Factor(count, axis, factor.step * step),)
        return self.normal([*dims, (Factor(size, axis, factor.step * dilation),)], reach.seen)

    def strided(self, first: Sequence[int], picks: Sequence[tuple[int | None, int, int]]) -> Self:
        """The reach of a view that starts at element `first`.

        `picks` has `(source, extent, step)` for each dimension of the view: it takes every step-th element
        along dimension `source` of the tensor. If `source` is None, it repeats one element.
        """
        reach = self
        for dim in range(len(self.dims)):
            reach = reach.plain(dim)
        for dim, index in enumerate(first):
            for factor in reach.dims[dim]:
                if factor.axis is not None:
                    reach = reach._hulls_at(factor.axis, [index * factor.step])
        dims: list[Dim] = []
        for source, extent, step in picks:
            axis_factors = [] if source is None else [f for f in reach.dims[source] if f.axis is not None]
            dims.append(
                tuple(f._replace(extent=extent, step=f.step * step) for f in axis_factors)
                or (Factor(extent),)
            )
        return self.normal(dims, reach.seen)

    def resample(
        self, dim: int, taps: Callable[[int], Iterable[int]], count: int, period: int = 1, shift: int = 1
    ) -> Self:
        """The reach of a tensor whose j-th element along `dim` is made of the elements `taps(j)`.

        `taps(j + period)` must be `taps(j) + shift`. Taps outside the tensor see what a longer tensor would
        see there.
        """
        reach = self
        for other, axis in itertools.product(range(len(self.dims)), self.axes_of(dim)):
            if other != dim and axis in self.axes_of(other):
                reach = reach.mixed(other)
        reach = reach.plain(dim)
        axes = reach.axes_of(dim)
        if not axes:
            return reach.with_dim(dim, count)
        (axis,) = axes
        seen, dims = list(reach.seen), list(reach.dims)
        intervals = reach.seen[axis]
        assert isinstance(intervals, Intervals)
        seen[axis] = intervals.hulls(taps, period, shift).shortened(count)
        dims[dim] = (Factor(count, axis, 1),)
        return self.normal(dims, seen)

    def mixed(self, dim: int) -> Self:
        """The same if each element along `dim` sees what all of them see.

        An axis that lies along no other dimension is lost.
        """
        reach = self
        for axis in self.axes_of(dim):
            own = [f for f in self.dims[dim] if f.axis == axis]
            if self.places(axis) != {dim}:
                steps = itertools.product(*({k * f.step for k in range(f.extent)} for f in own))
                reach = reach._hulls_at(axis, [sum(offset) for offset in steps])
        dims = list(reach.dims)
        dims[dim] = (Factor(self.shape[dim]),)
        return self.normal(dims, reach.seen)

    def reduce(self, dims: Iterable[int], keepdim: bool = False) -> Self:
        """The reach of a reduction over `dims`."""
        reach = self
        for dim in sorted(dims, reverse=True):
            reach = reach.mixed(dim).with_dim(dim, 1)
            if not keepdim:
                reach = self.normal([*reach.dims[:dim], *reach.dims[dim + 1 :]], reach.seen)
        return reach

    def plain(self, dim: int) -> Self:
        """The same with at most one factor along `dim`; axes of which there is none are lost."""
        factors = self.dims[dim]
        axes = self.axes_of(dim)
        if len(factors) <= 1 or not axes:
            return self
        axis, outer = factors[0].axis, factors[0]
        if axis is None or axes != {axis} or self.places(axis) != {dim}:
            return self.mixed(dim)
        inner = math.prod(f.extent for f in factors[1:])

        def taps(j: int) -> Iterable[int]:
            index, rest = divmod(j, inner)
            position = index * outer.step
            for factor in reversed(factors[1:]):
                rest, digit = divmod(rest, factor.extent)
                position += digit * factor.step
            return (position,)

        seen, dims = list(self.seen), list(self.dims)
        intervals = self.seen[axis]
        assert isinstance(intervals, Intervals)
        seen[axis] = intervals.hulls(taps, inner, outer.step).shortened(self.shape[dim])
        dims[dim] = (Factor(self.shape[dim], axis, 1),)
        return self.normal(dims, seen)

    def union(self, other: Self) -> Self:
        """The reach of a tensor made elementwise of this one and another of the same shape."""
        if self == other or other.is_constant:
            return self
        if self.is_constant:
            return other
        a, b = self.lose_where(other.seen), other.lose_where(self.seen)
        for dim in range(len(a.dims)):
            if a.axes_of(dim) and b.axes_of(dim) and a.dims[dim] != b.dims[dim]:
                a, b = a.plain(dim), b.plain(dim)
        for axis, (mine, theirs) in enumerate(zip(a.seen, b.seen, strict=True)):
            if isinstance(mine, Intervals) and isinstance(theirs, Intervals):
                for dim in range(len(a.dims)):
                    if (axis in a.axes_of(dim)) != (axis in b.axes_of(dim)):
                        a, b = a.mixed(dim), b.mixed(dim)
        for dim in range(len(a.dims)):
            if a.axes_of(dim) and b.axes_of(dim) and a.dims[dim] != b.dims[dim]:
                lost = a.axes_of(dim) | b.axes_of(dim)
                a, b = a.lose(lost), b.lose(lost)
        a, b = a.lose_where(b.seen), b.lose_where(a.seen)
        dims = [x if a.axes_of(dim) else y for dim, (x, y) in enumerate(zip(a.dims, b.dims, strict=True))]
        seen: list[Seen] = []
        for axis, (mine, theirs) in enumerate(zip(a.seen, b.seen, strict=True)):
            if isinstance(mine, Intervals) and isinstance(theirs, Intervals):
                count = 1 + sum((f.extent - 1) * abs(f.step) for dim in dims for f in dim if f.axis == axis)
                seen.append(mine.union(theirs, count).shortened(count))
            else:
                seen.append(theirs if mine is None else mine)
        return self.normal(dims, seen)

    def as_map(self) -> Self:
        """The same with one factor along each spatial dimension and none along the channels, if it can.

        Channels may hold the parts of a place, as behind a pixel unshuffle, but not the places themselves.
        """
        axes = range(len(self.seen))
        if len(self.dims) != len(axes) + 2:
            return self
        reach = self.settled()
        if all(reach._span(1, axis) < reach._span(2 + axis, axis) for axis in reach.axes_of(1)):
            reach = reach.mixed(1)
        for axis in axes:
            if reach.axes_of(2 + axis) == {axis}:
                reach = reach.plain(2 + axis)
        return reach

    def settled(self) -> Self:
        """The same with each axis of one element along its spatial dimension, if nothing else lies there.

        Reshaping may leave such an axis at any dimension of extent 1.
        """
        if len(self.dims) != len(self.seen) + 2 or all(self.dims[2:]):
            return self
        dims = list(self.dims)
        for axis, seen in enumerate(self.seen):
            if isinstance(seen, Intervals) and not dims[2 + axis]:
                along = [(d, f) for d, dim in enumerate(dims) for f in dim if axis in f.axes]
                if len(along) == 1 and along[0][1].extent == 1:
                    ((d, factor),) = along
                    dims[d] = tuple(f for f in dims[d] if f is not factor)
                    dims[2 + axis] = (factor,)
        return self if dims == list(self.dims) else replace(self, dims=tuple(dims))

    def _span(self, dim: int, axis: int) -> float:
        """How many intervals along an axis a dimension reaches over; infinity if its order is not theirs."""
        factors = [factor for factor in self.dims[dim] if axis in factor.axes]
        if not all(factor.step for factor in factors):
            return math.inf
        return sum((factor.extent - 1) * abs(factor.step) for factor in factors)

    def _hulls_at(self, axis: int, offsets: Sequence[int]) -> Self:
        """The same where interval i of an axis is the hull of the intervals `i + offset`."""
        seen = list(self.seen)
        intervals = self.seen[axis]
        assert isinstance(intervals, Intervals)
        seen[axis] = intervals.hulls(lambda i: [i + offset for offset in offsets])
        return replace(self, seen=tuple(seen))


def concatenate(parts: Sequence[R], dim: int) -> R:
    """That of tensors joined along a dimension: each element sees what any part would see there."""
    total = sum(part.shape[dim] for part in parts)
    first, moved = 0, []
    for part in parts:
        moved.append(part.slice(dim, -first, 1, total))
        first += part.shape[dim]
    joined = moved[0]
    for part in moved[1:]:
        joined = joined.union(part)
    return joined


def _merged(factors: Iterable[Factor], keep_ones: bool = False) -> list[Factor]:
    """The factors, with neighbours merged where together they are one factor."""
    merged: list[Factor] = []
    for factor in factors:
        if factor.extent == 1 and not factor.axes and not keep_ones:
            continue
        last = merged[-1] if merged else None
        if (
            last
            and last.axis == factor.axis
            and last.step == factor.step * factor.extent
            and 1 not in (last.extent, factor.extent)
            and not (last.held or factor.held)
        ):
            merged[-1] = factor._replace(extent=last.extent * factor.extent)
        else:
            merged.append(factor)
    return merged


def _regroup(factors: list[Factor], shape: Sequence[int]) -> list[Dim] | None:
    """Distribute row-major factors over the dimensions of a new shape; None if a factor does not divide."""
    if math.prod(f.extent for f in factors) != math.prod(shape) or 0 in shape:
        return None
    queue = factors[::-1]
    dims: list[Dim] = []
    for extent in shape:
        taken: list[Factor] = []
        rest = extent
        if extent == 1 and queue and queue[-1].extent == 1:
            taken.append(queue.pop())
        while rest > 1:
            factor = queue.pop()
            if rest % factor.extent == 0:
                taken.append(factor)
                rest //= factor.extent
            elif factor.extent % rest == 0:
                outer, inner = factor.split(factor.extent // rest)
                taken.append(outer)
                queue.append(inner)
                rest = 1
            else:
                return None
        dims.append(tuple(taken))
    if dims:
        dims[-1] += tuple(reversed(queue))
    return dims


def extent_of(dim: Dim) -> int:
    """The extent of a dimension."""
    return math.prod(factor.extent for factor in dim)
