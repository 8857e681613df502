"""What each operator does to receptive fields and positions; without a rule both are unknown.

Rules are looked up by the operator's name and take its arguments by name. For an operator that only moves
elements of one tensor, the rule in `MOVES` returns a function for each result, from the tensor's field to the
result's. For every other operator, the rule in `RULES` returns the field of its results.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contrastseg_fast.receptive_field.positions import Field

Move = Callable[[Field], Field]
Lookup = Callable[[Tensor], Field]
Taps = Callable[[int], Iterable[int]]

MOVES: dict[str, Callable[..., list[Move]]] = {}
RULES: dict[str, Callable[..., Field]] = {}

# Elementwise operators that torch does not tag as such, or not in every version (leaky_relu).
# fmt: off
_ELEMENTWISE = frozenset([
    "_prelu_kernel", "_to_copy", "bernoulli", "cauchy", "complex", "copy", "exponential", "fill",
    "floor_divide", "geometric", "hardswish", "leaky_relu", "lift_fresh", "log_normal", "log_sigmoid_forward",
    "mish", "native_dropout", "normal", "polar", "random", "rrelu_with_noise", "rsub", "uniform", "where",
    "zero",
])
# fmt: on


def is_elementwise(func: torch._ops.OpOverload) -> bool:
    """Whether each element of the results is made of the elements at the same place; also in-place forms."""
    if func.namespace != "aten":
        return torch.Tag.pointwise in func.tags
    name = func.overloadpacket.__name__.removesuffix("_")
    packet = getattr(torch.ops.aten, name, func.overloadpacket)
    tagged = any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
    return name in _ELEMENTWISE or tagged


def makes_constant(name: str) -> bool:
    """Whether an operator of torch uses only its argument's shape; names of other libraries have a dot."""
    return "." not in name and (name.endswith("_like") or name.startswith("new_"))


def elementwise(fields: Iterable[Field], shape: Sequence[int], axes: int) -> Field:
    """The field of the result of an elementwise operator that broadcasts."""
    joined = Field.constant(shape, axes)
    for field in fields:
        joined = joined.union(field.expand(shape))
    return joined


def write_back(
    name: str, source: Tensor, results: Sequence[Tensor], args: dict[str, Any]
) -> list[Move | None]:
    """For each result, a view of `source`: how writing to it changes the field of `source`, if known."""
    if name not in ("slice", "select", "split", "split_with_sizes", "unbind"):
        return [None] * len(results)
    dim = args["dim"] % source.ndim
    extent = source.shape[dim]

    def part(start: int, step: int) -> Move:
        def spread(index: int) -> Iterable[int]:
            turn, rest = divmod(index - start, step)
            return () if rest else (turn,)

        return lambda field: field.resample(dim, spread, extent, step, 1)

    match name:
        case "select" | "unbind":
            return [lambda field: field.insert(dim, extent)] * len(results)
        case "slice":
            return [part(_first(args["start"], extent), args["step"])]
        case _:
            counts = [result.shape[dim] for result in results]
            return [part(sum(counts[:k]), 1) for k in range(len(counts))]


def _move(*names: str) -> Callable[[Callable[..., list[Move]]], Callable[..., list[Move]]]:
    def register(rule: Callable[..., list[Move]]) -> Callable[..., list[Move]]:
        MOVES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _rule(*names: str) -> Callable[[Callable[..., Field]], Callable[..., Field]]:
    def register(rule: Callable[..., Field]) -> Callable[..., Field]:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


@_move("view", "_unsafe_view", "_reshape_alias")
def _reshape(source: Tensor, results: Sequence[Tensor], **_: Any) -> list[Move]:
    return [lambda field: field.reshape(results[0].shape)]


@_move("alias", "detach", "detach_", "_conj", "_neg_view")
def _same(source: Tensor, results: Sequence[Tensor], **_: Any) -> list[Move]:
    return [lambda field: field]


@_move("permute")
def _permute(source: Tensor, results: Sequence[Tensor], *, dims: Sequence[int], **_: Any) -> list[Move]:
    return [lambda field: field.permute([dim % source.ndim for dim in dims])]


@_move("transpose", "transpose_", "t", "t_")
def _transpose(
    source: Tensor, results: Sequence[Tensor], *, dim0: int = 0, dim1: int = -1, **_: Any
) -> list[Move]:
    order = list(range(source.ndim))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return [lambda field: field.permute(order)]


@_move("unsqueeze", "unsqueeze_")
def _unsqueeze(source: Tensor, results: Sequence[Tensor], *, dim: int, **_: Any) -> list[Move]:
    return [lambda field: field.insert(dim % (len(field.shape) + 1))]


@_move("view_as_real")
def _view_as_real(source: Tensor, results: Sequence[Tensor], **_: Any) -> list[Move]:
    return [lambda field: field.insert(source.ndim, 2)]


@_move("view_as_complex")
def _view_as_complex(source: Tensor, results: Sequence[Tensor], **_: Any) -> list[Move]:
    return [lambda field: field.reduce([source.ndim - 1])]


@_move("squeeze", "squeeze_")
def _squeeze(
    source: Tensor, results: Sequence[Tensor], *, dim: int | Sequence[int] | None = None, **_: Any
) -> list[Move]:
    return [lambda field: field.squeeze(_dims(dim, len(field.shape)))]


@_move("expand")
def _expand(source: Tensor, results: Sequence[Tensor], **_: Any) -> list[Move]:
    return [lambda field: field.expand(results[0].shape)]


@_move("slice")
def _slice(
    source: Tensor, results: Sequence[Tensor], *, dim: int, start: int | None, step: int, **_: Any
) -> list[Move]:
    dim %= source.ndim
    first, count = _first(start, source.shape[dim]), results[0].shape[dim]
    return [lambda field: field.slice(dim, first, step, count)]


@_move("select")
def _select(source: Tensor, results: Sequence[Tensor], *, dim: int, index: int, **_: Any) -> list[Move]:
    return [lambda field: field.select(dim % source.ndim, index % source.shape[dim])]


@_move("unbind")
def _unbind(source: Tensor, results: Sequence[Tensor], *, dim: int, **_: Any) -> list[Move]:
    def part(index: int) -> Move:
        return lambda field: field.select(dim % source.ndim, index)

    return [part(index) for index in range(len(results))]


@_move("split", "split_with_sizes")
def _split(source: Tensor, results: Sequence[Tensor], *, dim: int, **_: Any) -> list[Move]:
    def part(first: int, count: int) -> Move:
        return lambda field: field.slice(dim % source.ndim, first, 1, count)

    counts = [result.shape[dim] for result in results]
    return [part(sum(counts[:k]), count) for k, count in enumerate(counts)]


@_move("unfold", "unfold_copy")
def _unfold(
    source: Tensor, results: Sequence[Tensor], *, dimension: int, size: int, step: int, **_: Any
) -> list[Move]:
    dim = dimension % source.ndim
    count = results[0].shape[dim]
    return [lambda field: field.windows(dim, size, step, 1, count)]


@_move("im2col")
def _im2col(
    source: Tensor,
    results: Sequence[Tensor],
    *,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    **_: Any,
) -> list[Move]:
    n = source.ndim

    def move(field: Field) -> Field:
        for axis, (k, s, p, d) in enumerate(_options(2, kernel_size, stride, padding, dilation)):
            dim = n - 2 + axis
            extent = source.shape[dim] + 2 * p
            field = field.slice(dim, -p, 1, extent).windows(dim, k, s, d, (extent - d * (k - 1) - 1) // s + 1)
        return field.permute([*range(n - 2), n, n + 1, n - 2, n - 1]).reshape(results[0].shape)

    return [move]


@_move("as_strided")
def _as_strided(
    source: Tensor,
    results: Sequence[Tensor],
    *,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None,
    **_: Any,
) -> list[Move]:
    strides = source.stride()
    offset = 0 if storage_offset is None else storage_offset - int(source.storage_offset())
    first = [0] * source.ndim
    by_stride = sorted(
        (dim for dim in range(source.ndim) if strides[dim] and source.shape[dim] > 1),
        key=strides.__getitem__,
        reverse=True,
    )
    for dim in by_stride:
        first[dim], offset = divmod(offset, strides[dim])
    last = list(first)
    picks: list[tuple[int | None, int, int]] = []
    for extent, step in zip(size, stride, strict=True):
        divides = [dim for dim in by_stride if step % strides[dim] == 0]
        if step == 0 or extent == 1:
            picks.append((None, extent, 0))
        elif divides:
            picks.append((divides[0], extent, step // strides[divides[0]]))
            last[divides[0]] += (extent - 1) * picks[-1][2]
    inside = all(a >= 0 and b < n for a, b, n in zip(first, last, source.shape, strict=True))
    if offset or not inside or len(picks) < len(size):
        return [lambda field: field.unknown(size)]
    return [lambda field: field.strided(first, picks)]


@_move("flip")
def _flip(source: Tensor, results: Sequence[Tensor], *, dims: Sequence[int], **_: Any) -> list[Move]:
    def mirror(extent: int) -> Taps:
        return lambda j: (extent - 1 - j,)

    def move(field: Field) -> Field:
        for dim in _dims(dims, source.ndim) if dims else ():
            field = field.resample(dim, mirror(source.shape[dim]), source.shape[dim], 1, -1)
        return field

    return [move]


@_move("roll")
def _roll(
    source: Tensor, results: Sequence[Tensor], *, shifts: Sequence[int], dims: Sequence[int], **_: Any
) -> list[Move]:
    def move(field: Field) -> Field:
        if not dims:
            return field.lose()
        for dim, shift in zip(_dims(dims, source.ndim), shifts, strict=True):
            field = field.roll(dim, shift)
        return field

    return [move]


@_move("repeat")
def _repeat(source: Tensor, results: Sequence[Tensor], **_: Any) -> list[Move]:
    def move(field: Field) -> Field:
        for _ in range(results[0].ndim - source.ndim):
            field = field.insert(0)
        for dim, extent in enumerate(results[0].shape):
            if field.shape[dim] != extent:
                field = field.lose(field.axes_of(dim)).with_dim(dim, extent)
        return field

    return [move]


@_move("pixel_shuffle")
def _pixel_shuffle(source: Tensor, results: Sequence[Tensor], *, upscale_factor: int, **_: Any) -> list[Move]:
    *batch, channels, height, width = source.shape
    r, n = upscale_factor, len(batch)

    def move(field: Field) -> Field:
        field = field.reshape([*batch, channels // r**2, r, r, height, width])
        return field.permute([*range(n + 1), n + 3, n + 1, n + 4, n + 2]).reshape(results[0].shape)

    return [move]


@_move("pixel_unshuffle")
def _pixel_unshuffle(
    source: Tensor, results: Sequence[Tensor], *, downscale_factor: int, **_: Any
) -> list[Move]:
    *batch, channels, height, width = source.shape
    r, n = downscale_factor, len(batch)

    def move(field: Field) -> Field:
        field = field.reshape([*batch, channels, height // r, r, width // r, r])
        return field.permute([*range(n + 1), n + 2, n + 4, n + 1, n + 3]).reshape(results[0].shape)

    return [move]


@_move("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(source: Tensor, results: Sequence[Tensor], **_: Any) -> list[Move]:
    return [lambda field: field.mixed(1)]


@_move("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@_move("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _pad(
    source: Tensor,
    results: Sequence[Tensor],
    *,
    pad: Sequence[int] = (),
    padding: Sequence[int] = (),
    **_: Any,
) -> list[Move]:
    def move(field: Field) -> Field:
        for k, before in enumerate((pad or padding)[::2]):
            dim = source.ndim - 1 - k
            field = field.slice(dim, -before, 1, results[0].shape[dim])
        return field

    return [move]


@_rule("cat", "stack")
def _concatenate(name: str, get: Lookup, result: Tensor, *, tensors: Sequence[Tensor], dim: int) -> Field:
    dim %= result.ndim
    fields = [get(part) for part in tensors if part.numel()]
    return Field.concatenate([field.insert(dim) for field in fields] if name == "stack" else fields, dim)


@_rule("convolution")
def _convolution(
    name: str,
    get: Lookup,
    result: Tensor,
    *,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    **_: Any,
) -> Field:
    field = get(input).unbounded_like(get(weight)).mixed(1).with_dim(1, result.shape[1])
    window = _spread_window if transposed else _window
    options = _options(weight.ndim - 2, weight.shape[2:], stride, padding, dilation)
    for dim, (k, s, p, d) in enumerate(options, start=2):
        field = window(field, dim, result.shape[dim], k, s, p, d)
    return field


@_rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d")
def _pool(
    name: str,
    get: Lookup,
    result: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1,),
    **args: Any,
) -> Field:
    field = get(args["self"])
    axes = _axes(name)
    options = _options(axes, kernel_size, stride or kernel_size, padding, dilation)
    for dim, (k, s, p, d) in enumerate(options, start=result.ndim - axes):
        field = _window(field, dim, result.shape[dim], k, s, p, d)
    return field


@_rule("col2im")
def _col2im(
    name: str,
    get: Lookup,
    result: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    **args: Any,
) -> Field:
    lead = result.ndim - 2
    options = list(_options(2, kernel_size, stride, padding, dilation))
    blocks = [
        (result.shape[lead + i] + 2 * p - d * (k - 1) - 1) // s + 1 for i, (k, s, p, d) in enumerate(options)
    ]
    field = get(args["self"]).mixed(lead - 1).with_dim(lead - 1, result.shape[lead - 1])
    field = field.reshape([*result.shape[:lead], *blocks])
    for dim, (k, s, p, d) in enumerate(options, start=lead):
        field = _spread_window(field, dim, result.shape[dim], k, s, p, d)
    return field


@_rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
@_rule("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
def _upsample_nearest(name: str, get: Lookup, result: Tensor, **args: Any) -> Field:
    field = get(args["self"])
    for dim, given in _scales(name, result, args):
        count, extent = result.shape[dim], field.shape[dim]
        if count != extent:
            ratio = _ratio(count, extent, given)
            taps = _nearest_taps(count, ratio, given, Fraction(1, 2) if "exact" in name else Fraction(0))
            field = field.resample(dim, taps, count, ratio.denominator, ratio.numerator)
    return field


@_rule("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
def _upsample_linear(name: str, get: Lookup, result: Tensor, *, align_corners: bool, **args: Any) -> Field:
    field = get(args["self"])
    reach = range(-1, 3) if "cubic" in name else range(2)
    for dim, given in _scales(name, result, args):
        count, extent = result.shape[dim], field.shape[dim]
        if align_corners:
            ratio = Fraction(extent - 1, count - 1) if count > 1 else Fraction(0)
            offset = Fraction(0)
        else:
            ratio = _ratio(count, extent, given)
            offset = (ratio - 1) / 2
        taps = _linear_taps(ratio, offset, reach)
        field = field.resample(dim, taps, count, ratio.denominator, ratio.numerator)
    return field


@_rule("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv")
def _product(name: str, get: Lookup, result: Tensor, **args: Any) -> Field:
    fields = [get(value) for value in args.values() if isinstance(value, Tensor)]
    added = [fields.pop(0)] if name.startswith(("add", "badd")) else []
    left, right = fields
    if name == "dot":
        left = left.insert(0)
    if name in ("mv", "dot", "addmv"):
        right = right.insert(1)
    product = _matmul(left, right).reshape(result.shape)
    return elementwise([product, *added], result.shape, product.num_axes)


@_rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@_rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
@_rule("_scaled_dot_product_fused_attention_overrideable")
def _attention(
    name: str,
    get: Lookup,
    result: Tensor,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    **_: Any,
) -> Field:
    bias = attn_mask if attn_bias is None else attn_bias
    return _attended(get(query), get(key), get(value), None if bias is None else get(bias))


@_rule("_native_multi_head_attention")
def _multi_head_attention(
    name: str, get: Lookup, result: Tensor, *, query: Tensor, key: Tensor, value: Tensor, **_: Any
) -> Field:
    return _attended(*(get(tensor).mixed(2) for tensor in (query, key, value)))


@_rule("_transformer_encoder_layer_fwd")
def _encoder_layer(name: str, get: Lookup, result: Tensor, *, src: Tensor, **_: Any) -> Field:
    field = get(src).mixed(2)
    return field.union(_attended(field, field, field))


@_rule("all", "amax", "amin", "any", "argmax", "argmin", "count_nonzero", "linalg_vector_norm", "logsumexp")
@_rule(
    "max", "mean", "median", "min", "mode", "nanmedian", "nansum", "norm", "prod", "std", "std_mean", "sum"
)
@_rule("var", "var_mean", "kthvalue")
def _reduction(
    name: str,
    get: Lookup,
    result: Tensor,
    *,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    **args: Any,
) -> Field:
    field = get(args["self"])
    return field.reduce(_dims(dim, len(field.shape)), keepdim)


@_rule("_log_softmax", "_safe_softmax", "_softmax", "cummax", "cummin", "cumprod", "cumsum", "logcumsumexp")
def _along(name: str, get: Lookup, result: Tensor, *, dim: int, **args: Any) -> Field:
    field = get(args["self"])
    return field.unbounded(field.axes_of(dim % result.ndim)) if result.ndim else field


@_rule("gather", "glu", "index_select", "sort", "topk")
def _picked(name: str, get: Lookup, result: Tensor, *, dim: int, **args: Any) -> Field:
    field = get(args["self"])
    if "index" in args:
        field = field.unbounded_like(get(args["index"]))
    dim %= result.ndim
    return field.lose(field.axes_of(dim)).with_dim(dim, result.shape[dim])


@_rule("index")
def _index(name: str, get: Lookup, result: Tensor, *, indices: Sequence[Tensor | None], **args: Any) -> Field:
    field = get(args["self"])
    used = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    for dim, index in used:
        if len(used) == 1 and index.ndim == 1 and get(index).is_constant:
            return field.lose(field.axes_of(dim)).with_dim(dim, result.shape[dim])
    return field.unknown(result.shape)


@_rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_pool(name: str, get: Lookup, result: Tensor, **args: Any) -> Field:
    """Counts as unbounded, since what a bin sees grows with the image."""
    field = get(args["self"])
    axes = _axes(name)
    for dim in range(result.ndim - axes, result.ndim):
        ratio = Fraction(field.shape[dim], result.shape[dim])
        field = field.unbounded(field.axes_of(dim))
        field = field.resample(dim, _bins(ratio), result.shape[dim], ratio.denominator, ratio.numerator)
    return field


@_rule("_fft_c2c", "_fft_c2r", "_fft_r2c")
def _fourier(
    name: str, get: Lookup, result: Tensor, *, dim: Sequence[int], forward: bool | None = None, **args: Any
) -> Field:
    field = get(args["self"])
    for d in _dims(dim, result.ndim):
        field = field.transform(d, result.shape[d], name == "_fft_r2c" if forward is None else forward)
    return field


@_rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@_rule("cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update")
@_rule("native_layer_norm", "native_group_norm", "_fused_rms_norm")
def _normalisation(name: str, get: Lookup, result: Tensor, *, input: Tensor, **args: Any) -> Field:
    """Counts as elementwise, although the statistics may come from the whole map."""
    field = get(input)
    for other in args.values():
        if isinstance(other, Tensor):
            field = field.unbounded_like(get(other))
    return field


@_rule("contrastseg_fast.entropy_gate_forward")
def _entropy_gate(
    name: str, get: Lookup, result: Tensor, *, features: Tensor, logits: Tensor, **_: Any
) -> Field:
    """The gate mixes channels and is elementwise in space."""
    shape = (result.shape[0], 1, *result.shape[2:])
    parts = [get(part).reduce([1], keepdim=True) for part in (features, logits)]
    return elementwise(parts, shape, parts[0].num_axes).expand(result.shape)


def _matmul(left: Field, right: Field) -> Field:
    """The field of a product of matrices, or of batches of them."""
    shape = (*left.shape[:-1], right.shape[-1])
    k = len(shape) - 1
    parts = [left.reduce([k], keepdim=True), right.reduce([k - 1], keepdim=True)]
    return elementwise(parts, shape, left.num_axes)


def _attended(query: Field, key: Field, value: Field, bias: Field | None = None) -> Field:
    """The field of scaled dot-product attention, batches of `(N, C)`."""
    k = len(query.shape) - 1
    weights = _matmul(query, key.permute([*range(k - 1), k, k - 1]))
    if bias is not None:
        weights = elementwise([weights, bias], weights.shape, weights.num_axes)
    return _matmul(weights.unbounded(weights.axes_of(k)), value)


def _bins(ratio: Fraction) -> Taps:
    """The elements of each bin of an adaptive pooling, `ratio` elements apart."""
    return lambda j: range(math.floor(j * ratio), math.ceil((j + 1) * ratio))


def _window(field: Field, dim: int, count: int, k: int, s: int, p: int, d: int) -> Field:
    """Convolution or pooling along one dimension: kernel, stride, padding, dilation."""
    return field.resample(dim, lambda j: range(j * s - p, j * s - p + k * d, d), count, 1, s)


def _spread_window(field: Field, dim: int, count: int, k: int, s: int, p: int, d: int) -> Field:
    """Transposed convolution along one dimension: element i goes to results `i * s - p + tap * d`."""

    def taps(j: int) -> Iterable[int]:
        return [(j + p - tap * d) // s for tap in range(k) if (j + p - tap * d) % s == 0]

    return field.resample(dim, taps, count, s, 1)


def _nearest_taps(count: int, ratio: Fraction, given: float | None, offset: Fraction) -> Taps:
    """The element `floor((j + offset) * ratio)`, and the one that torch takes if fp32 rounds it elsewhere."""
    period, shift = ratio.denominator, ratio.numerator
    scale = np.float32(1 / given if given else np.float32(shift) / np.float32(period))
    choices = [{math.floor((phase + offset) * ratio)} for phase in range(period)]
    for j in range(count):
        turn, phase = divmod(j, period)
        choices[phase].add(math.floor(np.float32((j + float(offset)) * scale)) - turn * shift)
    return lambda j: [choice + j // period * shift for choice in choices[j % period]]


def _linear_taps(ratio: Fraction, offset: Fraction, reach: Iterable[int]) -> Taps:
    """The elements around the position `j * ratio + offset`; one element if that is an integer."""

    def taps(j: int) -> Iterable[int]:
        position = j * ratio + offset
        low = math.floor(position)
        return (low,) if position == low else [low + step for step in reach]

    return taps


def _ratio(count: int, extent: int, given: float | None) -> Fraction:
    """How many elements of the argument one element of the result advances."""
    return 1 / Fraction(given).limit_denominator(1000) if given else Fraction(extent, count)


def _scales(name: str, result: Tensor, args: dict[str, Any]) -> Iterator[tuple[int, float | None]]:
    """The dimensions that an up-sampling resizes, each with the scale given for it, or None."""
    axes = _axes(name)
    for axis, key in enumerate(("scales",) if axes == 1 else ("scales_d", "scales_h", "scales_w")[-axes:]):
        yield result.ndim - axes + axis, args[key]


def _axes(name: str) -> int:
    match = re.search(r"([123])d", name)
    assert match
    return int(match[1])


def _options(axes: int, *values: int | Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Kernel, stride and so on of each axis."""
    rows = [[value] if isinstance(value, int) else list(value) for value in values]
    return zip(*(row * axes if len(row) == 1 else row for row in rows), strict=True)


def _dims(dim: int | Sequence[int] | None, ndim: int) -> list[int]:
    """Dimensions as non-negative numbers; None or an empty list means all."""
    chosen = [dim] if isinstance(dim, int) else list(dim or range(ndim))
    return [d % max(ndim, 1) for d in chosen]


def _first(start: int | None, extent: int) -> int:
    """The first element of a slice."""
    start = 0 if start is None else start
    return min(max(start + extent if start < 0 else start, 0), extent)
