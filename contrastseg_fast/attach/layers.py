"""The choice of layers: by name, by pattern, or by `"auto"`."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from contrastseg_fast import _checks
from contrastseg_fast.attach.extended import Gate
from contrastseg_fast.attach.model_checks import check_example
from contrastseg_fast.projection import Projections
from contrastseg_fast.receptive_field import LayerRun, trace_layers, unknown_layer

AUTO_STRIDES = (2, 4, 8)  # of the layers that "auto" chooses for PDCR
_MIN_AUTO_FIELD = 5  # pixels, of the receptive fields of these layers
_PLAIN = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class Selection(NamedTuple):
    """The layers chosen in a model, and what one forward pass without data tells about them."""

    names: list[str]
    runs: dict[str, LayerRun]  # of the chosen layers and perhaps of others, in the order in which they ran


def find_layers(
    model: nn.Module, layers: str | Sequence[str], example_input: Tensor | None = None
) -> list[str]:
    """The layers that names and patterns stand for.

    If a pattern matches a layer and also layers inside it, only the outer one is used. Patterns never match
    gates or projection heads.

    Args:
        model: a module.
        layers: names of layers as in `model.named_modules()`, or patterns such as `"encoder.*.conv2"`.
        example_input: an input `(B, C, *spatial)` of the model. If it is given, patterns match only layers
            that run and return tensors, for example no `nn.ModuleList`. To find these layers, the model runs
            once without data, if there are patterns.

    Returns:
        the names of the layers, in the order of `layers`. A layer with several names is returned once.

    Raises:
        TypeError: `layers` is not a name or an iterable of names, or `example_input` is not a tensor.
        ValueError: `layers` is empty or matches no layer, or `example_input` is not 4- or 5-dimensional.
        RuntimeError: the model does not run on an input without data.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()), nn.Conv2d(8, 2, 1))
        >>> find_layers(model, ["1", "*"])
        ['1', '0']
    """
    request = _Request(model, layers)
    if example_input is None:
        return request.matches()
    example = check_example(example_input)
    return request.matches(trace(model, example, request.watched) if request.candidates else None)


def select_layers(model: nn.Module, layers: str | Sequence[str], example_input: Tensor | None) -> Selection:
    """The layers that names and patterns stand for, with their runs; the model runs once, without data.

    The arguments, the choice and the errors are those of `find_layers`. Besides, it is an error if the
    example input is None, or if a layer that is given by name does not run.
    """
    request = _Request(model, layers)
    runs = trace(model, check_example(example_input), request.watched, required=request.names)
    return Selection(request.matches(runs), runs)


def select_encoder_layers(model: nn.Module, example: Tensor, also: Sequence[str] = ()) -> Selection:
    """What `"auto"` chooses for PDCR: one encoder layer for each stride, where there is one.

    The receptive field of a chosen layer has at least 5 pixels along some axis, and at most half of the image
    along every axis. The runs include the layers named in `also`, which must run.
    """
    runs = _trace_all(model, example, also)
    by_stride: list[tuple[int, _Candidate]] = []
    for candidate in _encoder_and_decoder(model, example, runs)[0]:
        field = candidate.run.receptive_field
        stride = max(field.stride)
        fits = all(size <= extent / 2 for size, extent in zip(field.size, example.shape[2:], strict=True))
        if stride in AUTO_STRIDES and max(field.size) >= _MIN_AUTO_FIELD and fits:
            by_stride.append((int(stride), candidate))
    if not by_stride:
        _checks.fail(
            "layers",
            f"an encoder with layers of stride {AUTO_STRIDES} whose receptive field has at least "
            f"{_MIN_AUTO_FIELD} pixels and at most half of the image",
            "none for 'auto' to choose; name them",
        )
    return Selection(_one_of_each(model, by_stride), runs)


def select_stages(model: nn.Module, example: Tensor) -> Selection:
    """What `"auto"` chooses for gates: one encoder and one decoder layer for each resolution."""
    runs = _trace_all(model, example)
    names: list[str] = []
    for candidates in _encoder_and_decoder(model, example, runs):
        names += _one_of_each(model, [(_halvings(each.run, example), each) for each in candidates])
    if not names:
        _checks.fail("layers", "a model with feature maps inside", "none for 'auto' to choose; name them")
    return Selection(names, runs)


def trace(
    model: nn.Module, example: Tensor, names: Iterable[str], required: Sequence[str] = ()
) -> dict[str, LayerRun]:
    """The runs of named layers in one forward pass without data; those of `required` must run."""
    watched = list(dict.fromkeys(names))
    return trace_layers(model, example.shape, watched, dtype=example.dtype, required=required)


def _trace_all(model: nn.Module, example: Tensor, also: Sequence[str] = ()) -> dict[str, LayerRun]:
    """The runs of all layers, each under its first name, and of those named in `also`, which must run."""
    return trace(model, example, [*(name for name, _ in model.named_modules()), *also], required=also)


class _Request:
    """Names and patterns of layers, checked against the names that a model has.

    Attributes:
        names: those that are names of layers.
        candidates: the layers that patterns may match; none if there are no patterns.
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str]) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        if isinstance(layers, nn.Module) or not isinstance(layers, Iterable):
            _checks.fail_type("layers", "names of layers", type(layers).__name__)
        self._wanted = [layers] if isinstance(layers, str) else list(layers)
        if not self._wanted:
            _checks.fail("layers", "at least one layer", layers)
        for name in self._wanted:
            if not isinstance(name, str):
                _checks.fail_type("layers", "names of layers", type(name).__name__)
            if name not in self._modules and not fnmatch.filter(self._modules, name):
                raise ValueError(unknown_layer(name, self._modules))
        self.names = [name for name in self._wanted if name in self._modules]
        self.candidates: list[str] = []
        if len(self.names) < len(self._wanted):
            added = _not_layers(model)
            self.candidates = [name for name, _ in model.named_modules() if name and name not in added]

    @property
    def watched(self) -> list[str]:
        """The layers to watch in a forward pass that decides what patterns match."""
        return [*self.names, *self.candidates]

    def matches(self, running: Container[str] | None = None) -> list[str]:
        """The layers asked for, each once; patterns match only candidates that run, if these are known."""
        candidates = [name for name in self.candidates if running is None or name in running]
        found: dict[nn.Module, str] = {}
        for name in self._wanted:
            matches = [name] if name in self._modules else _outermost(fnmatch.filter(candidates, name))
            if not matches:
                raise ValueError(unknown_layer(name, self._modules))
            for match in matches:
                found.setdefault(self._modules[match], match)
        return list(found.values())


def _outermost(names: Sequence[str]) -> list[str]:
    """The names of layers that are not inside another of them."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _not_layers(model: nn.Module) -> set[str]:
    """The names of gates, projection heads and all inside them, and of wrappers of compiled modules."""
    added: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if "_orig_mod" in module._modules:
            added.add(prefix)
        if isinstance(module, (Gate, Projections)):
            added.update(name for name, _ in module.named_modules(prefix=prefix, remove_duplicate=False))
    return added


class _Candidate(NamedTuple):
    """A layer that `"auto"` may choose."""

    run: LayerRun
    unfinished: bool  # whether an activation, or the mixing of a skip connection, is still to come


def _one_of_each(model: nn.Module, candidates: Sequence[tuple[int, _Candidate]]) -> list[str]:
    """The names of the best candidates, one for each number that candidates come with.

    Finished features are better than unfinished ones, then outer layers than inner ones, then later layers
    than earlier ones.
    """
    best: dict[int, tuple[bool, int, str]] = {}
    for number, (run, unfinished) in candidates:
        rank = (unfinished, _depth(model, run.name))
        if number not in best or rank <= best[number][:2]:
            best[number] = (*rank, run.name)
    return [name for _, _, name in best.values()]


def _depth(model: nn.Module, name: str) -> int:
    """The number of modules that a layer is inside of, without lists and dicts of modules."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:k])) for k in range(1, len(parts)))
    return sum(not isinstance(module, (nn.ModuleList, nn.ModuleDict)) for module in around)


def _encoder_and_decoder(
    model: nn.Module, example: Tensor, runs: Mapping[str, LayerRun]
) -> tuple[list[_Candidate], list[_Candidate]]:
    """The layers that return one feature map and run once, in the order in which they run.

    The encoder ends with the last layer before the resolution rises above the lowest one. If several layers
    return the same tensor, the one that made it is used, or the outermost layer around that one. From the
    lowest resolution on, layers with as many channels as the model's output are left out.
    """
    added = _not_layers(model)
    makers: dict[tuple[int, int], LayerRun] = {}  # by tensor and version
    without_activation: set[tuple[int, int]] = set()
    for run in runs.values():
        key = (id(run.output), run.version)
        if run.name and _is_plain(model.get_submodule(run.name)):
            without_activation.add(key)
        if run.name in added:  # a gated layer returns what its gate made
            continue
        maker = makers.get(key)
        if run.name and run.is_single and (maker is None or maker.name.startswith(f"{run.name}.")):
            makers[key] = run
    maps = [(key, run) for key, run in makers.items() if run.times == 1 and _is_map(run, example)]
    lowest = max((_halvings(run, example) for _, run in maps), default=0)
    encoder: list[_Candidate] = []
    decoder: list[_Candidate] = []
    reached_lowest = False
    for key, run in maps:
        halvings = _halvings(run, example)
        reached_lowest |= halvings == lowest
        if reached_lowest and run.shape[1:2] == runs[""].shape[1:2]:
            continue
        if decoder or (reached_lowest and halvings < lowest):
            decoder.append(_Candidate(run, key in without_activation or run.is_join))
        else:
            encoder.append(_Candidate(run, key in without_activation))
    return encoder, decoder


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own convolutions or normalisations."""
    return isinstance(module, _PLAIN) and type(module).__module__.startswith("torch.nn.")


def _is_map(run: LayerRun, example: Tensor) -> bool:
    """Whether a layer returns a feature map `(B, C, *spatial)` that is not pooled to a single point.

    A map that sees one pixel per feature, such as the image itself, is none.
    """
    if run.why_no_map or run.shape[0] != example.shape[0]:
        return False
    field = run.receptive_field
    return not (field.is_infinite and 1 in run.shape[2:]) and max(field.size) > 1


def _halvings(run: LayerRun, example: Tensor) -> int:
    """How often the image is halved to get the size of a map, along the axis where this is most."""
    ratios = (extent / small for extent, small in zip(example.shape[2:], run.shape[2:], strict=True))
    return round(math.log2(max(ratios)))
