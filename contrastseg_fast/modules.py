"""The paper's two modules: the PDCR loss over several layers, and the UAFS gate."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contrastseg_fast import _backend, _checks, functional, sampling
from contrastseg_fast.receptive_field import ReceptiveField

NORMS = ("batch", "instance", "group", "none")


class LayerSamples(NamedTuple):
    """Vectors taken out of one layer's feature map."""

    layer: str | int  # name, or position, of the layer
    vectors: Tensor  # (B, N, C)
    indices: Tensor  # (N, D), where they lay in the map
    spatial_shape: tuple[int, ...]  # of the map


def finest(labels: Tensor | Sequence[Tensor]) -> Tensor:
    """The first label map of a list (deep supervision), or the only one."""
    return labels[0] if isinstance(labels, (list, tuple)) and labels else labels  # type: ignore[return-value]


class PDCRLoss(nn.Module):
    """Patch-dragsaw contrastive regularization of the features of several layers (Algorithm 1).

    Samples vectors from every feature map, finds the foreground ratios of their receptive fields in the
    labels, and averages `pdcr_loss` over images and layers. It has no parameters, and computes in eval mode
    as in training. Add it to the segmentation loss with a small weight, 0.01 for example; its strength goes
    with weight / temperature.

    The loss attracts vectors of alike boxes and repels the others. Where nearly all boxes look alike to it,
    all vectors end up alike, which `repelled_fraction` shows: so take layers of stride 2 to 4, or
    `patch_size` where receptive fields cover much of the image, and `class_distance="tv"` for more than two
    classes.

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
        affinity, class_distance, include_background, variant, reduction: as for `pdcr_loss`. `"bipartite"`
            takes the label at the box's centre. `reduction="none"` gives `(B, layers)`.
        border: as for `foreground_ratio`.
        ignore_index: the label of pixels to leave out.
        min_valid_fraction: vectors with a smaller share of pixels that count take no part.
        skip_homogeneous: whether to leave out images whose boxes all look alike, such as crops of background,
            whose vectors only attract each other.
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
        patch_size: int | Sequence[int] | Mapping[Any, int | Sequence[int]] | None = None,
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
        _checks.integer("num_classes", num_classes, 1)
        if num_samples is not None:
            _checks.integer("num_samples", num_samples, 1)
        _checks.positive_finite("temperature", temperature)
        _checks.one_of("sampler", sampler, sampling.SAMPLERS)
        _checks.one_of("affinity", affinity, functional.AFFINITIES)
        _checks.one_of("class_distance", class_distance, functional.CLASS_DISTANCES)
        _checks.one_of("border", border, functional.BORDERS)
        _checks.optional_integer("ignore_index", ignore_index)
        _checks.fraction("min_valid_fraction", min_valid_fraction)
        _checks.one_of("variant", variant, functional.VARIANTS)
        _checks.one_of("reduction", reduction, functional.REDUCTIONS)
        _checks.one_of("backend", backend, _backend.BACKENDS)
        self.receptive_fields = _named_fields(receptive_fields)
        self.num_classes = num_classes
        self.num_samples = num_samples
        self.temperature = temperature
        self.sampler = sampler
        self.generator = generator
        self.patch_size = patch_size
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
        self.boxes = _boxes(self.receptive_fields, patch_size)
        if affinity == "bipartite":
            self.boxes = {layer: box.centred(1) for layer, box in self.boxes.items()}

    def forward(
        self,
        features: Tensor | Sequence[Tensor] | Mapping[Any, Tensor],
        labels: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of the feature maps of one batch.

        Args:
            features: a map `(B, C, *spatial)` for every layer, by name or in order; C may differ between
                layers.
            labels: label map at the resolution of the network's input, as for `foreground_ratio`; of a list
                (deep supervision) the first one.
            mask: which pixels count `(B, 1, *spatial)`, 0 where they do not; None means all.

        Returns:
            the loss, a scalar, or `(B, layers)` for `reduction="none"`; fp32, or fp64 for fp64 features.

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

    def sample(self, features: Tensor, layer: str | int) -> LayerSamples:
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
        samples = list(samples)
        if not samples:
            _checks.fail("samples", "at least one layer's samples", "none")
        labels, ignore_index = self._prepare_labels(finest(labels), mask, samples)
        layer_losses = []
        for position, (layer, vectors, indices, _) in enumerate(samples):
            validate = None if position == 0 else False
            ratios, valid = self._ratios(self.boxes[layer], indices, labels, ignore_index, validate)
            layer_losses.append(
                functional.pdcr_loss(
                    vectors,
                    ratios,
                    temperature=self.temperature,
                    affinity=self.affinity,
                    class_distance=self.class_distance,
                    include_background=self.include_background and self.num_classes > 1,
                    valid=valid,
                    variant=self.variant,
                    reduction=self.reduction,
                    backend=self.backend,
                )
            )
        losses = torch.stack(layer_losses, -1)
        return losses if self.reduction == "none" else losses.mean()

    def _ratios(
        self,
        box: ReceptiveField,
        indices: Tensor,
        labels: Tensor,
        ignore_index: int | None,
        validate: bool | None,
    ) -> tuple[Tensor, Tensor]:
        """The ratios `(B, N, M)` of the boxes, and which of them take part `(B, N)`."""
        starts = box.starts(indices)
        size = [int(extent) for extent in box.size]
        num_classes = max(self.num_classes, 2)
        count = functools.partial(
            functional.foreground_ratio,
            labels,
            starts,
            size,
            num_classes,
            ignore_index=ignore_index,
            backend=self.backend,
        )
        ratios, valid_fraction = count(border=self.border, validate=validate)
        valid = valid_fraction >= self.min_valid_fraction
        if self.skip_homogeneous and indices.shape[0] > 0:
            # Inside the image: elsewhere a box at its rim may differ from one in its middle by the rim alone.
            contents = ratios if self.border == "clip" else count(border="clip", validate=False)[0]
            least = contents.masked_fill(~valid[..., None], math.inf).amin(1)
            most = contents.masked_fill(~valid[..., None], -math.inf).amax(1)
            valid = valid & (least < most).any(-1, keepdim=True)
        return ratios, valid

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
        lines = [f"boxes[{layer!r}]={box}" for layer, box in self.boxes.items()]
        for name, parameter in inspect.signature(PDCRLoss.__init__).parameters.items():
            if name not in ("self", "receptive_fields", "patch_size", "generator"):
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
) -> dict[str | int, ReceptiveField]:
    fields: dict[str | int, ReceptiveField] = {}
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


def _boxes(
    fields: Mapping[str | int, ReceptiveField],
    patch_size: int | Sequence[int] | Mapping[Any, int | Sequence[int]] | None,
) -> dict[str | int, ReceptiveField]:
    """The receptive fields, or patches around their centres."""
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


def _check_resolution(
    field: ReceptiveField, map_shape: Sequence[int], label_shape: Sequence[int], layer: str | int
) -> None:
    """Check that the boxes of a map are centred on the label map, as they are on the network's input."""
    for axis, (count, extent) in enumerate(zip(map_shape, label_shape, strict=True)):
        size, stride, start = field.size[axis], field.stride[axis], field.start[axis]
        input_extent = 2 * start + (count - 1) * stride + size
        if count > 0 and abs(input_extent - extent) > stride + extent / 4:
            _checks.fail(
                "labels",
                f"the resolution of the network's input, for features[{layer!r}] of shape {tuple(map_shape)} "
                f"about {float(input_extent):.0f} pixels along spatial axis {axis}",
                f"shape {tuple(label_shape)}",
            )
