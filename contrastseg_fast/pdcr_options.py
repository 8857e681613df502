"""What `PDCRLoss` and its reference have in common: their options, checked once, and the layers they name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contrastseg_fast import _checks, functional, sampling
from contrastseg_fast import affinity as pair_scores
from contrastseg_fast.affinity import Affinity
from contrastseg_fast.call_plan import Patches
from contrastseg_fast.ops import pdcr
from contrastseg_fast.patches import PatchSize, patches_by_size
from contrastseg_fast.projection import (
    DEFAULT_CHANNELS,
    PROJECTIONS,
    Layer,
    Projections,
    make_projections,
    submodule_name,
)
from contrastseg_fast.receptive_field import ReceptiveField

PAIRS = ("image", "batch")


class LayerSamples(NamedTuple):
    """Vectors taken out of one layer's feature map.

    Attributes:
        layer: its key in `receptive_fields`.
        vectors: `(B, N, C)`.
        places: where they lay in the map.
    """

    layer: Layer
    vectors: Tensor
    places: sampling.Places

    @property
    def indices(self) -> Tensor:
        """Where the vectors lay in the map `(N, D)`, int64."""
        return self.places.indices

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """The spatial shape of the map."""
        return self.places.spatial_shape


class PDCROptions(nn.Module):
    """The options of `PDCRLoss`, which documents them. Subclasses compute `sample`, `loss` and so on.

    Attributes:
        receptive_fields: the receptive field of every layer.
        spatial_dims: number of spatial axes.
        patches_by_size: the patches of every layer, for each size.
        patches: those of the first size.
        planned_patches: `patches_by_size` as the plan of a call takes them.
        vector_sets: the layers whose vectors make pairs with each other.
        projections: the projection heads, or None.
    """

    def __init__(
        self,
        receptive_fields: Mapping[str, ReceptiveField] | Sequence[ReceptiveField],
        num_classes: int,
        *,
        num_samples: int | None = 1024,
        temperature: float = 0.5,
        sampler: str = "grid",
        generator: torch.Generator | None = None,
        patch_size: PatchSize = None,
        patch_sizes: Sequence[PatchSize] | None = None,
        pairs: str = "image",
        cross_layers: Sequence[Sequence[Layer]] = (),
        projection: str | None = None,
        projection_channels: int | None = None,
        in_channels: int | Sequence[int] | Mapping[Any, int] | None = None,
        affinity: str = "ratio",
        class_distance: str = "mean",
        include_background: bool = True,
        border: str = "full",
        ignore_index: int | None = None,
        min_valid_fraction: float = 0.5,
        skip_homogeneous: bool = False,
        variant: str = "paper",
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.receptive_fields = _named_fields(receptive_fields)
        self.spatial_dims = next(iter(self.receptive_fields.values())).spatial_dims
        self.num_classes = num_classes
        self.num_samples = num_samples
        self.temperature = temperature
        self.sampler = sampler
        self.generator = generator
        self.patch_size = patch_size
        self.patch_sizes = patch_sizes
        self.pairs = pairs
        self.cross_layers = cross_layers
        self.projection = projection
        self.projection_channels = projection_channels
        self.affinity = affinity
        self.class_distance = class_distance
        self.include_background = include_background
        self.border = border
        self.ignore_index = ignore_index
        self.min_valid_fraction = min_valid_fraction
        self.skip_homogeneous = skip_homogeneous
        self.variant = variant
        self.reduction = reduction
        self.backend = backend
        self._check_options()
        layers = list(self.receptive_fields)
        self.in_channels = _channels_by_layer(in_channels, layers)
        self.patches_by_size = patches_by_size(self.receptive_fields, patch_size, patch_sizes)
        if pair_scores.is_at_centre(affinity):
            self.patches_by_size = [
                {layer: patch.centred(1) for layer, patch in patches.items()}
                for patches in self.patches_by_size
            ]
        for layer, patch in (item for patches in self.patches_by_size for item in patches.items()):
            if patch.is_infinite:
                got = f"{patch}; give this layer a patch_size"
                _checks.fail(f"receptive_fields[{layer!r}]", "a finite field", got)
        self.patches = self.patches_by_size[0]
        self.planned_patches = [
            {layer: Patches(patch.size, patch.grids) for layer, patch in patches.items()}  # type: ignore[arg-type]  # finite
            for patches in self.patches_by_size
        ]
        self.vector_sets = _vector_sets(layers, cross_layers)
        self.projections: Projections | None = None
        if projection is not None:
            if self.in_channels is None:
                _checks.fail(
                    "in_channels", f"the channels of every layer, for projection={projection!r}", None
                )
            width = DEFAULT_CHANNELS if projection_channels is None else projection_channels
            self.projections = make_projections(projection, self.in_channels, width)

    @property
    def pair(self) -> Affinity:
        """How pairs are scored."""
        return pair_scores.make_affinity(
            self.affinity,
            num_classes=max(self.num_classes, 2),
            temperature=self.temperature,
            class_distance=self.class_distance,
            include_background=self.counts_background,
            variant=self.variant,
        )

    @property
    def counts_background(self) -> bool:
        """Whether the ratio of class 0 counts: not beside a single foreground channel."""
        return self.include_background and self.num_classes > 1

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. An option that is changed later is checked as in the constructor."""
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        if name in _OPTIONS and "vector_sets" in self.__dict__:  # the constructor is through
            try:
                self._check_options()
            except (TypeError, ValueError):
                super().__setattr__(name, before)  # type: ignore[arg-type]  # an option, no tensor
                raise

    def forward(
        self,
        features: Tensor | Sequence[Tensor] | Mapping[Any, Tensor],
        labels: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of the feature maps of one batch.

        Args:
            features: a map `(B, C, *spatial)` for every layer, by name or in order; C may differ between
                layers, except within `cross_layers` without a projection.
            labels: label map at the resolution of the network's input, as for `foreground_ratio`; of a list
                (deep supervision) the first one.
            mask: which pixels count `(B, 1, *spatial)`, 0 where they do not; None means all.

        Returns:
            the loss, a scalar, or `(B, layers)` for `reduction="none"`; fp32, or fp64 for fp64 vectors.

        Raises:
            TypeError: a map, the labels or the mask is not a tensor, or has another dtype.
            ValueError: a layer is missing; maps, labels and mask differ in batch, number of axes or device;
                a map has other channels than `in_channels`; the labels do not have the resolution of the
                network's input; on the CPU also, a label is out of range.
        """
        maps = self.in_layer_order(features)
        return self.loss(list(map(self.sample, maps, self.receptive_fields)), labels, mask)

    def in_layer_order(self, features: Tensor | Sequence[Tensor] | Mapping[Any, Tensor]) -> list[Tensor]:
        """The feature maps in the order of `receptive_fields`, given by name or in order.

        Raises:
            ValueError: a layer's map is missing, or there are too many.
        """
        layers = list(self.receptive_fields)
        if isinstance(features, Mapping):
            if set(features) != set(layers):
                _checks.fail("features", f"the layers {layers}", list(features))
            return [features[layer] for layer in layers]
        maps = [features] if isinstance(features, Tensor) else list(features)
        if len(maps) != len(layers):
            _checks.fail("features", f"one map for each of {len(layers)} layers", f"{len(maps)} maps")
        return maps

    def sample(self, features: Tensor, layer: Layer) -> LayerSamples:
        """Take vectors out of one layer's feature map."""
        raise NotImplementedError

    def loss(
        self, samples: Iterable[LayerSamples], labels: Tensor | Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """The loss of vectors that were sampled before."""
        raise NotImplementedError

    def project(self, vectors: Tensor, layer: Layer) -> Tensor:
        """The vectors `(B, N, C)` of a layer behind its projection head, if there is one, in the head's
        dtype.
        """
        if self.projections is None:
            return vectors
        head = self.projections[submodule_name(layer)]
        return head(vectors.to(next(head.parameters()).dtype))

    def place(self, features: Tensor, layer: Layer) -> sampling.Places:
        """Check a layer's feature map, and say where to sample it."""
        if layer not in self.receptive_fields:
            _checks.fail("layer", f"one of {list(self.receptive_fields)}", repr(layer))
        dims = self.spatial_dims
        name = f"features[{layer!r}]"
        _checks.tensor(name, features, (dims + 2,), f"(B, C, *spatial) with {dims} spatial axes")
        _checks.dtype(name, features, _checks.FLOAT_DTYPES)
        if self.in_channels is not None and features.shape[1] != self.in_channels[layer]:
            _checks.fail(name, f"in_channels={self.in_channels[layer]} channels", features.shape[1])
        spatial_shape = tuple(features.shape[2:])
        return sampling.place(self.sampler, spatial_shape, self.num_samples, self.generator, features.device)

    def sampled_sets(self, by_layer: Mapping[Layer, Any]) -> list[tuple[Layer, ...]]:
        """The sets of layers that there are samples of.

        Raises:
            ValueError: there is no sample, or a set has those of some of its layers only.
        """
        if not by_layer:
            _checks.fail("samples", "at least one layer's samples", "none")
        sets = [layers for layers in self.vector_sets if not set(layers).isdisjoint(by_layer)]
        if missing := [layer for layers in sets for layer in layers if layer not in by_layer]:
            _checks.fail("samples", f"samples of the layers {missing} too", list(by_layer))
        return sets

    def extra_repr(self) -> str:
        lines = []
        for layer in self.patches:
            patches = ", ".join(str(patches[layer]) for patches in self.patches_by_size)
            lines.append(f"patches[{layer!r}]={patches}")
        for name, parameter in inspect.signature(PDCROptions.__init__).parameters.items():
            if name not in ("self", "receptive_fields", "patch_size", "patch_sizes", "generator"):
                value = getattr(self, name)
                if value != parameter.default:
                    lines.append(f"{name}={value!r}")
        return "\n".join(lines)

    def _check_options(self) -> None:
        _checks.integer("num_classes", self.num_classes, 1)
        if self.num_samples is not None:
            _checks.integer("num_samples", self.num_samples, 1)
        _checks.one_of("sampler", self.sampler, sampling.SAMPLERS)
        _checks.one_of("pairs", self.pairs, PAIRS)
        if self.projection is not None:
            _checks.one_of("projection", self.projection, PROJECTIONS)
        if self.projection_channels is not None:
            _checks.integer("projection_channels", self.projection_channels, 1)
            if self.projection is None:
                _checks.fail("projection_channels", "None without a projection", self.projection_channels)
        pair_scores.check_words(
            self.affinity,
            temperature=self.temperature,
            class_distance=self.class_distance,
            include_background=self.include_background,
            variant=self.variant,
        )
        _checks.one_of("border", self.border, functional.BORDERS)
        _checks.optional_integer("ignore_index", self.ignore_index)
        _checks.fraction("min_valid_fraction", self.min_valid_fraction)
        _checks.boolean("skip_homogeneous", self.skip_homogeneous)
        _checks.one_of("reduction", self.reduction, functional.REDUCTIONS)
        _checks.one_of("backend", self.backend, pdcr.OPERATION.words)
        num_compared = self.num_classes if self.include_background else self.num_classes - 1
        compares = pair_scores.compares_ratios(self.affinity)
        if compares and self.class_distance == "mean" and num_compared > 2:
            _checks.warn_once(
                "class_distance='mean' fades as classes are added, so that with more than two classes few "
                "pairs repel and all vectors may end up alike; class_distance='tv' does not fade "
                "(PDCRLoss.repelled_fraction shows the share of pairs that repel)"
            )


_OPTIONS = frozenset(inspect.signature(PDCROptions.__init__).parameters)


def _named_fields(
    receptive_fields: Mapping[str, ReceptiveField] | Sequence[ReceptiveField],
) -> dict[Layer, ReceptiveField]:
    fields: dict[Layer, ReceptiveField] = {}
    if isinstance(receptive_fields, Mapping):
        fields.update(receptive_fields)
    elif isinstance(receptive_fields, Sequence):
        fields.update(enumerate(receptive_fields))
    else:
        got = type(receptive_fields).__name__
        _checks.fail_type("receptive_fields", "a mapping or a sequence of ReceptiveField", got)
    if not fields:
        _checks.fail("receptive_fields", "at least one layer", "none")
    for layer, field in fields.items():
        name = f"receptive_fields[{layer!r}]"
        if not isinstance(field, ReceptiveField):
            _checks.fail_type(name, "a ReceptiveField", type(field).__name__)
        if field.is_infinite and field.location is None:
            got = f"{field}; choose another layer, or give its receptive field by hand"
            _checks.fail(name, "a finite field, or an infinite one with a location", got)
        if field.spatial_dims not in (2, 3):
            _checks.fail(name, "2 or 3 axes", field)
    if len({field.spatial_dims for field in fields.values()}) > 1:
        _checks.fail("receptive_fields", "fields with the same number of axes", list(fields.values()))
    return fields


def _vector_sets(layers: list[Layer], cross_layers: Sequence[Sequence[Layer]]) -> list[tuple[Layer, ...]]:
    """The layers whose vectors make pairs: those in no group by themselves, then the groups."""
    expected = f"groups of at least two of the layers {layers}, such as [('a', 'b')]"
    if not isinstance(cross_layers, Sequence) or isinstance(cross_layers, str):
        _checks.fail_type("cross_layers", expected, type(cross_layers).__name__)
    groups: list[tuple[Layer, ...]] = []
    for group in cross_layers:
        if not isinstance(group, Sequence) or isinstance(group, str):
            _checks.fail_type("cross_layers", expected, repr(group))
        if len(set(group)) != len(group) or len(group) < 2 or not set(group) <= set(layers):
            _checks.fail("cross_layers", expected, tuple(group))
        groups.append(tuple(group))
    grouped = {layer for group in groups for layer in group}
    return [(layer,) for layer in layers if layer not in grouped] + groups


def _channels_by_layer(
    in_channels: int | Sequence[int] | Mapping[Any, int] | None, layers: list[Layer]
) -> dict[Layer, int] | None:
    match in_channels:
        case None:
            return None
        case Mapping():
            if set(in_channels) != set(layers):
                _checks.fail("in_channels", f"the layers {layers}", list(in_channels))
            found = {layer: in_channels[layer] for layer in layers}
        case Sequence() if not isinstance(in_channels, str):
            if len(in_channels) != len(layers):
                _checks.fail("in_channels", f"one integer for each of {len(layers)} layers", in_channels)
            found = dict(zip(layers, in_channels, strict=True))
        case _:
            found = dict.fromkeys(layers, in_channels)
    for channels in found.values():
        _checks.integer("in_channels", channels, 1)
    return found
