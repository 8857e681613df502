"""The paper's two modules: the PDCR loss over several layers, and the UAFS gate."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contrastseg_fast import _backend, _checks, functional, sampling
from contrastseg_fast.receptive_field import ReceptiveField

NORMS = ("batch", "instance", "group", "none")
PAIRS = ("image", "batch")
PROJECTIONS = ("linear", "mlp")

Layer = str | int  # name, or position, of a layer
PatchSize = int | Sequence[int] | Mapping[Any, int | Sequence[int]] | None


class LayerSamples(NamedTuple):
    """Vectors taken out of one layer's feature map."""

    layer: Layer
    vectors: Tensor  # (B, N, C)
    indices: Tensor  # (N, D), where they lay in the map
    spatial_shape: tuple[int, ...]  # of the map


class BoxContents(NamedTuple):
    """What the labels hold in the boxes of a set of vectors."""

    ratios: Tensor  # (B, N, M)
    valid: Tensor  # (B, N), which of them take part
    inside: Tensor  # (B, N, M), the ratios within the image, where these are needed; else `ratios`


def finest(labels: Tensor | Sequence[Tensor]) -> Tensor:
    """The first label map of a list (deep supervision), or the only one."""
    return labels[0] if isinstance(labels, (list, tuple)) and labels else labels  # type: ignore[return-value]


class PDCRLoss(nn.Module):
    """Patch-dragsaw contrastive regularization of the features of several layers (Algorithm 1).

    Samples vectors from every feature map, finds the foreground ratios of their receptive fields in the
    labels, and averages `pdcr_loss` over images and layers. It has no parameters unless it projects, and
    computes in eval mode as in training. Add it to the segmentation loss with a small weight, 0.01 for
    example (`warmup_weight` fades it in); its strength goes with weight / temperature.

    The loss attracts vectors of alike boxes and repels the others. Where nearly all boxes look alike to it,
    all vectors end up alike, which `repelled_fraction` shows: so take layers of stride 2 to 4, or
    `patch_size` where receptive fields cover much of the image, and `class_distance="tv"` for more than two
    classes. Decoder layers serve as well, with `patch_size` or `patch_sizes`: their receptive fields hold
    those of the deepest layer, and look alike.

    Args:
        receptive_fields: the box of every vector, by layer name or in the order of the layers.
        num_classes: number of classes M, background included; 1 means one foreground channel: labels 0 and 1
            (or soft ones between), of which only the foreground's ratio counts.
        num_samples: how many vectors to take from a map at most; None takes all.
        temperature: tau.
        sampler: `"grid"`, `"random"` (anew at each call) or `"raster"`.
        generator: source of the random sampler's draws, on any device; None takes torch's own.
        patch_size: extent of the boxes, in pixels, around the centres of the receptive fields; an integer,
            one per axis, or a mapping from layer to either, whose other layers keep their receptive fields.
            None keeps all.
        patch_sizes: several such extents at once, each as `patch_size` takes it: (5, 7, 9) are three sizes,
            ((3, 9, 9), (5, 15, 15)) are two with an extent per axis. The loss is the mean of those with each
            size, of the same vectors; it costs as much as all of them. The authors' release, where this is
            "hierarchical", takes 5, 7 and 9.
        pairs: which vectors make pairs: those of each image (`"image"`), or those of the whole batch
            (`"batch"`): then B N vectors stand for N, and the valid ones of the batch for n_b, at the cost
            of B^2 N^2 pairs. A process of data-parallel training sees its own batch alone.
        cross_layers: groups of layers whose vectors make pairs with each other: `[("enc2", "enc3")]` makes
            one set of the N1 + N2 vectors of both, each with the ratios of its own box, in which all pairs
            count. Such a set counts as one layer in the average, and stands for its layers; a layer may be
            in several. The layers of a group need equal channels, or a projection.
        projection: a head for each layer that the vectors pass before the loss: `"linear"`, `"mlp"` (two
            layers with a ReLU between, as wide as the layer), or None. Its parameters are those of
            `projections`: make that a submodule of the model, `model.add_module("pdcr", pdcr.projections)`,
            so that they move, train and save with it, and DistributedDataParallel averages their gradients
            (without `find_unused_parameters`, which sees no use of them in the model's outputs).
        projection_channels: width of the projected vectors.
        in_channels: channels C of the layers, by layer or in their order, or one number for all; needed for
            a projection, else checked where given.
        affinity, class_distance, include_background, variant: as for `pdcr_loss`. `"bipartite"` takes the
            label at the box's centre.
        reduction: as for `pdcr_loss`, averaged over the layers. `"none"` gives `(B, layers)`; with
            `pairs="batch"` B is 1, and with `cross_layers` the sets come after the layers that are in none.
        border: as for `foreground_ratio`.
        ignore_index: the label of pixels to leave out.
        min_valid_fraction: vectors with a smaller share of pixels that count take no part.
        skip_homogeneous: whether to leave out images whose boxes all look alike, such as crops of background,
            whose vectors only attract each other; with `pairs="batch"`, whole batches.
        backend: as for `pdcr_loss`.

    Raises:
        TypeError, ValueError: an argument does not fit, or a receptive field is infinite.
        RuntimeError: the backend is not installed.

    Example:
        >>> field = ReceptiveField(size=(3, 3), stride=(2, 2), start=(-1, -1))
        >>> pdcr = PDCRLoss([field], num_classes=2)
        >>> features = torch.randn(1, 16, 4, 4, requires_grad=True)
        >>> loss = pdcr([features], torch.eye(8, dtype=torch.long)[None])
        >>> loss.backward()
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
        projection_channels: int = 128,
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
        self.in_channels = _channels_by_layer(in_channels, list(self.receptive_fields))
        self.boxes_by_size = _boxes_by_size(self.receptive_fields, patch_size, patch_sizes)
        if affinity == "bipartite":
            self.boxes_by_size = [
                {layer: box.centred(1) for layer, box in boxes.items()} for boxes in self.boxes_by_size
            ]
        self.boxes = self.boxes_by_size[0]
        self.vector_sets = _vector_sets(list(self.receptive_fields), cross_layers)
        self.projections: Projections | None = None
        if projection is not None:
            if self.in_channels is None:
                _checks.fail(
                    "in_channels", f"the channels of every layer, for projection={projection!r}", None
                )
            self.projections = Projections(
                {
                    submodule_name(layer): _projection(projection, channels, projection_channels)
                    for layer, channels in self.in_channels.items()
                }
            )

    def _check_options(self) -> None:
        _checks.integer("num_classes", self.num_classes, 1)
        if self.num_samples is not None:
            _checks.integer("num_samples", self.num_samples, 1)
        _checks.positive_finite("temperature", self.temperature)
        _checks.one_of("sampler", self.sampler, sampling.SAMPLERS)
        _checks.one_of("pairs", self.pairs, PAIRS)
        if self.projection is not None:
            _checks.one_of("projection", self.projection, PROJECTIONS)
        _checks.integer("projection_channels", self.projection_channels, 1)
        _checks.one_of("affinity", self.affinity, functional.AFFINITIES)
        _checks.one_of("class_distance", self.class_distance, functional.CLASS_DISTANCES)
        _checks.one_of("border", self.border, functional.BORDERS)
        _checks.optional_integer("ignore_index", self.ignore_index)
        _checks.fraction("min_valid_fraction", self.min_valid_fraction)
        _checks.one_of("variant", self.variant, functional.VARIANTS)
        _checks.one_of("reduction", self.reduction, functional.REDUCTIONS)
        _checks.one_of("backend", self.backend, _backend.BACKENDS)

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
            TypeError, ValueError: an argument does not fit.
        """
        maps = self.in_layer_order(features)
        samples = [self.sample(x, layer) for layer, x in zip(self.receptive_fields, maps, strict=True)]
        return self.loss(samples, labels, mask)

    def in_layer_order(self, features: Tensor | Sequence[Tensor] | Mapping[Any, Tensor]) -> list[Tensor]:
        """The feature maps in the order of `receptive_fields`, whichever way they come."""
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
        """Take vectors out of one layer's feature map `(B, C, *spatial)`; the map itself is not kept.

        Args:
            features: the map.
            layer: its key in `receptive_fields`.

        Returns:
            the samples, to be handed to `loss`.

        Raises:
            TypeError, ValueError: the layer is unknown, or the map does not fit its receptive field.

        Example:
            >>> field = ReceptiveField((3, 3), (1, 1), (-1, -1))
            >>> pdcr = PDCRLoss({"stem": field}, num_classes=2, num_samples=4)
            >>> pdcr.sample(torch.zeros(2, 8, 6, 6), "stem").vectors.shape
            torch.Size([2, 4, 8])
        """
        if layer not in self.receptive_fields:
            _checks.fail("layer", f"one of {list(self.receptive_fields)}", repr(layer))
        dims = self.receptive_fields[layer].spatial_dims
        name = f"features[{layer!r}]"
        _checks.tensor(name, features, (dims + 2,), f"(B, C, *spatial) with {dims} spatial axes")
        _checks.dtype(name, features, _checks.FLOAT_DTYPES)
        if self.in_channels is not None and features.shape[1] != self.in_channels[layer]:
            _checks.fail(name, f"in_channels={self.in_channels[layer]} channels", features.shape[1])
        spatial_shape = tuple(features.shape[2:])
        indices = sampling.sample(
            self.sampler, spatial_shape, self.num_samples, self.generator, features.device
        )
        return LayerSamples(layer, sampling.gather_vectors(features, indices), indices, spatial_shape)

    def loss(
        self, samples: Iterable[LayerSamples], labels: Tensor | Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """The loss of vectors sampled before, one `LayerSamples` for each layer.

        Args:
            samples: what `sample` returned for each layer.
            labels, mask: as for `forward`.

        Returns:
            as `forward`.

        Raises:
            TypeError, ValueError: there is no sample, or the labels or the mask do not fit.

        Example:
            >>> pdcr = PDCRLoss([ReceptiveField((3, 3), (1, 1), (-1, -1))], num_classes=2, num_samples=4)
            >>> samples = [pdcr.sample(torch.ones(1, 8, 6, 6), 0)]
            >>> pdcr.loss(samples, torch.zeros(1, 6, 6, dtype=torch.long))
            tensor(-0.6137)
        """
        losses = []
        for vectors, contents in self._sets(samples, labels, mask):
            losses.append(torch.stack([self._set_loss(vectors, held) for held in contents]).mean(0))
        stacked = torch.stack(losses, -1)
        return stacked if self.reduction == "none" else stacked.mean()

    @torch.no_grad()
    def repelled_fraction(
        self, samples: Iterable[LayerSamples], labels: Tensor | Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """The share of pairs that `loss` drives apart; where it is near 0, all vectors end up alike.

        Args:
            samples, labels, mask: as for `loss`.

        Returns:
            the fractions `(B, layers)`, fp32, of the same sets of vectors as `loss` with
            `reduction="none"`, and means over several sizes of boxes. No gradient.

        Raises:
            TypeError, ValueError: there is no sample, or the labels or the mask do not fit.

        Example:
            >>> pdcr = PDCRLoss([ReceptiveField((3, 3), (1, 1), (-1, -1))], num_classes=2, num_samples=4)
            >>> samples = [pdcr.sample(torch.ones(1, 8, 6, 6), 0)]
            >>> pdcr.repelled_fraction(samples, torch.zeros(1, 6, 6, dtype=torch.long))
            tensor([[0.]])
        """
        fractions = []
        for vectors, contents in self._sets(samples, labels, mask):
            fraction = [
                functional.repelled_fraction(vectors, held.ratios, **self._pair_options(held))
                for held in contents
            ]
            fractions.append(torch.stack(fraction).mean(0))
        return torch.stack(fractions, -1)

    def _sets(
        self, samples: Iterable[LayerSamples], labels: Tensor | Sequence[Tensor], mask: Tensor | None
    ) -> Iterator[tuple[Tensor, list[BoxContents]]]:
        """The vectors `(B, N, C)` that make pairs with each other, and what their boxes of each size hold."""
        by_layer = {sample.layer: sample for sample in samples}
        if not by_layer:
            _checks.fail("samples", "at least one layer's samples", "none")
        vector_sets = [layers for layers in self.vector_sets if any(layer in by_layer for layer in layers)]
        if missing := [layer for layers in vector_sets for layer in layers if layer not in by_layer]:
            _checks.fail("samples", f"samples of the layers {missing} too", list(by_layer))
        labels, ignore_index = self._prepare_labels(finest(labels), mask, list(by_layer.values()))
        vectors = {layer: self.project(sample.vectors, layer) for layer, sample in by_layer.items()}
        contents: list[dict[Layer, BoxContents]] = []  # of each size of boxes
        validate = None  # the labels, the first time
        for boxes in self.boxes_by_size:
            contents.append({})
            for layer, sample in by_layer.items():
                contents[-1][layer] = self._count(boxes[layer], sample, labels, ignore_index, validate)
                validate = False
        for layers in vector_sets:
            _check_channels(layers, [vectors[layer] for layer in layers])
            merged = []
            for held in contents:
                parts = zip(*(held[layer] for layer in layers), strict=True)
                merged.append(BoxContents(*map(self._merge, parts)))
            yield self._merge([vectors[layer] for layer in layers]), merged

    def project(self, vectors: Tensor, layer: Layer) -> Tensor:
        """The vectors `(B, N, C)` of a layer behind its head, if there is one, in the head's dtype."""
        if self.projections is None:
            return vectors
        head = self.projections[submodule_name(layer)]
        return head(vectors.to(next(head.parameters()).dtype))

    def _count(
        self,
        box: ReceptiveField,
        sample: LayerSamples,
        labels: Tensor,
        ignore_index: int | None,
        validate: bool | None,
    ) -> BoxContents:
        """What the boxes of one layer hold."""
        count = functools.partial(
            functional.foreground_ratio,
            labels,
            box.starts(sample.indices),
            [int(extent) for extent in box.size],
            max(self.num_classes, 2),
            ignore_index=ignore_index,
            backend=self.backend,
        )
        ratios, valid_fraction = count(border=self.border, validate=validate)
        inside = ratios
        if self.skip_homogeneous and self.border != "clip":
            inside, _ = count(border="clip", validate=False)
        return BoxContents(ratios, valid_fraction >= self.min_valid_fraction, inside)

    def _merge(self, parts: Sequence[Tensor]) -> Tensor:
        """One set of `(B, N, ...)` of several layers' parts, and of all images as if they were one."""
        merged = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
        return merged.flatten(0, 1)[None] if self.pairs == "batch" else merged

    def _set_loss(self, vectors: Tensor, contents: BoxContents) -> Tensor:
        options = self._pair_options(contents)
        return functional.pdcr_loss(vectors, contents.ratios, reduction=self.reduction, **options)

    def _pair_options(self, contents: BoxContents) -> dict[str, Any]:
        """How pairs are scored, and which vectors make any."""
        _, valid, inside = contents
        if self.skip_homogeneous and valid.shape[1] > 0:
            # Inside the image: elsewhere a box at its rim may differ from one in its middle by the rim alone.
            least = inside.masked_fill(~valid[..., None], math.inf).amin(1)
            most = inside.masked_fill(~valid[..., None], -math.inf).amax(1)
            valid = valid & (least < most).any(-1, keepdim=True)
        return {
            "temperature": self.temperature,
            "affinity": self.affinity,
            "class_distance": self.class_distance,
            "include_background": self.include_background and self.num_classes > 1,
            "valid": valid,
            "variant": self.variant,
            "backend": self.backend,
        }

    def _prepare_labels(
        self, labels: Tensor, mask: Tensor | None, samples: Sequence[LayerSamples]
    ) -> tuple[Tensor, int | None]:
        """Labels for `foreground_ratio`, with masked pixels marked as ignored, and the mark."""
        dims = next(iter(self.receptive_fields.values())).spatial_dims
        _checks.tensor("labels", labels, (dims + 1, dims + 2), f"(B, [M,] *spatial) with {dims} spatial axes")
        spatial_shape = labels.shape[-dims:]
        for layer, vectors, _, map_shape in samples:
            _checks.same_device("labels", labels, f"features[{layer!r}]", vectors)
            if labels.shape[0] != vectors.shape[0]:
                _checks.fail(
                    "labels", f"a batch of {vectors.shape[0]}, that of the features", labels.shape[0]
                )
            _check_resolution(self.receptive_fields[layer], map_shape, spatial_shape, layer)
        if mask is not None:
            _checks.tensor("mask", mask, (dims + 2,), f"(B, 1, *spatial) with {dims} spatial axes")
            _checks.shape("mask", mask, (labels.shape[0], 1, *spatial_shape), "B and spatial shape of labels")
            _checks.same_device("mask", mask, "labels", labels)
        ignore_index = self.ignore_index
        has_channel = labels.ndim == dims + 2
        if mask is not None:
            ignore_index = _UNUSED_LABEL if ignore_index is None else ignore_index
            if not labels.dtype.is_floating_point:
                labels = labels.int()
            labels = labels.masked_fill(mask == 0 if has_channel else mask[:, 0] == 0, ignore_index)
        if self.num_classes == 1 and has_channel and labels.dtype.is_floating_point:
            background = 1 - labels
            if ignore_index is not None:
                background = background.masked_fill(labels == ignore_index, ignore_index)
            labels = torch.cat([background, labels], 1)
        return labels, ignore_index

    def extra_repr(self) -> str:
        lines = []
        for layer in self.boxes:
            boxes = ", ".join(str(boxes[layer]) for boxes in self.boxes_by_size)
            lines.append(f"boxes[{layer!r}]={boxes}")
        for name, parameter in inspect.signature(PDCRLoss.__init__).parameters.items():
            if name not in ("self", "receptive_fields", "patch_size", "patch_sizes", "generator"):
                value = getattr(self, name)
                if value != parameter.default:
                    lines.append(f"{name}={value!r}")
        return "\n".join(lines)


_UNUSED_LABEL = -(2**15)  # marks masked pixels; exact in every floating dtype


class UAFS(nn.Module):
    """Uncertainty-aware feature selection: features weighted by how certain a small network is (Eqs. 8 to
    10).

        A = softmax(F(H))        F = conv3 -> norm -> ReLU -> conv1        Hhat = H * (1 + (1 - u(A)))

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels C of the features H.
        num_classes: classes M that F predicts, at least 2.
        hidden_channels: width of F.
        norm: `"batch"`, `"instance"`, `"group"` (at most 8 groups) or `"none"`.
        backend: as for `entropy_gate`.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Example:
        >>> gate = UAFS(spatial_dims=2, in_channels=8, num_classes=3)
        >>> gate(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        hidden_channels: int = 16,
        *,
        norm: str = "batch",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            _checks.fail("spatial_dims", "2 or 3", repr(spatial_dims))
        _checks.integer("in_channels", in_channels, 1)
        _checks.integer("num_classes", num_classes, 2)
        _checks.integer("hidden_channels", hidden_channels, 1)
        _checks.one_of("norm", norm, NORMS)
        _checks.one_of("backend", backend, _backend.BACKENDS)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.backend = backend
        conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        self.head = nn.Sequential(
            conv(in_channels, hidden_channels, kernel_size=3, padding=1),
            _norm(norm, spatial_dims, hidden_channels),
            nn.ReLU(inplace=True),
            conv(hidden_channels, num_classes, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The gated features.

        Args:
            x: features H `(B, C, *spatial)`.

        Returns:
            Hhat, shape and dtype of `x`.

        Raises:
            TypeError, ValueError: `x` does not fit.
        """
        self._check(x)
        return functional.entropy_gate(x, self.head(x), backend=self.backend)

    def uncertainty(self, x: Tensor) -> Tensor:
        """The uncertainty map u `(B, 1, *spatial)` of features `(B, C, *spatial)`, from 0 to 1 (Eq. 9)."""
        self._check(x)
        _, u = functional.entropy_gate(x, self.head(x), return_uncertainty=True, backend=self.backend)
        return u

    def extra_repr(self) -> str:
        return (
            f"spatial_dims={self.spatial_dims}, in_channels={self.in_channels}, "
            f"num_classes={self.num_classes}, backend={self.backend!r}"
        )

    def _check(self, x: Tensor) -> None:
        layout = f"(B, {self.in_channels}, *spatial) with {self.spatial_dims} spatial axes"
        _checks.tensor("x", x, (self.spatial_dims + 2,), layout)
        if x.shape[1] != self.in_channels:
            _checks.fail("x", f"{self.in_channels} channels", x.shape[1])


def _norm(name: str, spatial_dims: int, channels: int) -> nn.Module:
    match name:
        case "batch":
            return nn.BatchNorm2d(channels) if spatial_dims == 2 else nn.BatchNorm3d(channels)
        case "instance":
            return nn.InstanceNorm2d(channels) if spatial_dims == 2 else nn.InstanceNorm3d(channels)
        case "group":
            return nn.GroupNorm(math.gcd(8, channels), channels)
        case _:
            return nn.Identity()


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
        if field.is_infinite:
            _checks.fail(name, "a finite field", field)
        if field.spatial_dims not in (2, 3):
            _checks.fail(name, "2 or 3 axes", field)
    if len({field.spatial_dims for field in fields.values()}) > 1:
        _checks.fail("receptive_fields", "fields with the same number of axes", list(fields.values()))
    return fields


def _boxes_by_size(
    fields: Mapping[Layer, ReceptiveField],
    patch_size: PatchSize,
    patch_sizes: Sequence[PatchSize] | None,
) -> list[dict[Layer, ReceptiveField]]:
    """The layers' boxes for each size: receptive fields, or patches around their centres."""
    if patch_sizes is None:
        return [_boxes(fields, patch_size)]
    if patch_size is not None:
        _checks.fail("patch_sizes", "None beside patch_size", patch_sizes)
    if not isinstance(patch_sizes, Sequence) or isinstance(patch_sizes, str):
        got = type(patch_sizes).__name__
        _checks.fail_type("patch_sizes", "a sequence of sizes, each as patch_size takes one", got)
    if not patch_sizes:
        _checks.fail("patch_sizes", "at least one size", "none")
    return [_boxes(fields, size) for size in patch_sizes]


def _boxes(fields: Mapping[Layer, ReceptiveField], patch_size: PatchSize) -> dict[Layer, ReceptiveField]:
    if patch_size is None:
        patch_size = {}
    if not isinstance(patch_size, (int, Sequence, Mapping)):
        got = type(patch_size).__name__
        _checks.fail_type("patch_size", "an integer, one per axis, or a mapping from layer to either", got)
    if not isinstance(patch_size, Mapping):
        return {layer: field.centred(patch_size) for layer, field in fields.items()}
    if not set(patch_size) <= set(fields):
        _checks.fail("patch_size", f"some of the layers {list(fields)}", list(patch_size))
    return {
        layer: field.centred(patch_size[layer]) if layer in patch_size else field
        for layer, field in fields.items()
    }


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


class Projections(nn.ModuleDict):
    """Projection heads by layer; as a step of an `nn.Sequential` they pass on what they get."""

    def forward(self, x: Any) -> Any:
        return x


def submodule_name(layer: Layer) -> str:
    """A layer's name as the name of a submodule, which may not have dots."""
    return str(layer).replace(".", "/")


def _projection(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    last = nn.Linear(in_channels, out_channels)
    if kind == "linear":
        return last
    return nn.Sequential(nn.Linear(in_channels, in_channels), nn.ReLU(inplace=True), last)


def _check_channels(layers: tuple[Layer, ...], vectors: Sequence[Tensor]) -> None:
    if len({v.shape[-1] for v in vectors}) > 1:
        channels = {layer: v.shape[-1] for layer, v in zip(layers, vectors, strict=True)}
        _checks.fail(
            "cross_layers",
            "layers with equal channels, or projection='linear' or 'mlp' to a common width",
            f"the channels {channels}",
        )


def _check_resolution(
    field: ReceptiveField, map_shape: Sequence[int], label_shape: Sequence[int], layer: Layer
) -> None:
    """Check that the boxes of a map are centred on the label map, as they are on the network's input."""
    for axis, (count, extent) in enumerate(zip(map_shape, label_shape, strict=True)):
        stride, start, unit = field.grids[axis]
        input_extent = 2 * start + (count - 1) * stride + field.size[axis] * unit  # in 1 / unit of a pixel
        if count > 0 and 4 * abs(input_extent - extent * unit) > 4 * stride + extent * unit:
            _checks.fail(
                "labels",
                f"the resolution of the network's input, for features[{layer!r}] of shape {tuple(map_shape)} "
                f"about {input_extent / unit:.0f} pixels along spatial axis {axis}",
                f"shape {tuple(label_shape)}",
            )
