"""PDCRLoss: patch-dragsaw contrastive regularization of several layers, as a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from contrastseg_fast import _checks, functional, sampling, unchecked
from contrastseg_fast.call_plan import CallPlan, LayerPlan
from contrastseg_fast.ops import _dispatch, foreground_ratio, gather, pdcr, pdcr_call
from contrastseg_fast.patches import check_resolution, first_label_map, prepare_labels
from contrastseg_fast.pdcr_options import LayerSamples, PDCROptions
from contrastseg_fast.projection import Layer


class PDCRLoss(PDCROptions):
    """Patch-dragsaw contrastive regularization of the features of several layers (Algorithm 1).

    Samples vectors from every feature map, finds the foreground ratios of their patches in the labels, and
    averages `pdcr_loss` over images and layers. It has no parameters unless it projects, and computes in eval
    mode as in training. Add it to the segmentation loss with a small weight, 0.01 for example
    (`warmup_weight` fades it in). Its strength is proportional to weight / temperature.

    The loss attracts vectors whose patches are alike and repels the others. Where it finds nearly all patches
    alike, all vectors end up alike, which `repelled_fraction` shows. So take layers of stride 2 to 4, or
    `patch_size` where receptive fields cover much of the image, and `class_distance="tv"` for more than two
    classes. Decoder layers serve as well, with `patch_size` or `patch_sizes`: their receptive fields contain
    those of the deepest layer, and look alike.

    Args:
        receptive_fields: the receptive field of every layer, by layer name or in the order of the layers.
        num_classes: number of classes M, background included; 1 means one foreground channel: labels 0 and 1
            (or soft ones between), of which only the foreground's ratio counts.
        num_samples: how many vectors to take from a map at most; None takes all.
        temperature: tau.
        sampler: `"grid"`, `"random"` (drawn anew at each call) or `"raster"`.
        generator: source of the random sampler's draws, on any device; None takes torch's own.
        patch_size: extent of the patches, in pixels, around the centres of the receptive fields; an integer,
            one per axis, or a mapping from layer to either. Layers that are not in the mapping, and all
            layers with None, take their receptive fields as patches.
        patch_sizes: several such extents at once, each as `patch_size` takes it: (5, 7, 9) are three sizes,
            ((3, 9, 9), (5, 15, 15)) are two with an extent per axis. The loss is the mean over the sizes, of
            the same vectors; it costs as much as all of them. The authors' release, where this is called
            "hierarchical", takes 5, 7 and 9.
        pairs: which vectors make pairs: those of each image (`"image"`), or those of the whole batch
            (`"batch"`). With `"batch"`, B N vectors replace N, and the valid ones of the batch replace n_b,
            at the cost of B^2 N^2 pairs. In data-parallel training a process sees its own batch alone.
        cross_layers: groups of layers whose vectors make pairs with each other: `[("enc2", "enc3")]` makes
            one set of the N1 + N2 vectors of both, each with the ratios of its own patch, in which all pairs
            count. Such a set counts as one layer in the average, and replaces its layers; a layer may be in
            several. The layers of a group need equal channels, or a projection.
        projection: a head for each layer that the vectors pass before the loss: `"linear"`, `"mlp"` (two
            layers with a ReLU between them, as wide as the layer), or None. The heads are the submodule
            `projections`, and train, move and save with the module that holds it. `attach_pdcr` puts them
            into the model.
        projection_channels: width of the projected vectors; None means 128.
        in_channels: channels C of the layers, by layer or in their order, or one number for all; needed for
            a projection, else checked where given.
        affinity, class_distance, include_background, variant: as for `pdcr_loss`. `"bipartite"` takes the
            label at the centre of the patch.
        reduction: as for `pdcr_loss`, averaged over the layers. `"none"` gives `(B, layers)`; with
            `pairs="batch"` B is 1, and with `cross_layers` the groups come after the layers that are in none.
        border: as for `foreground_ratio`.
        ignore_index: the label of pixels to leave out.
        min_valid_fraction: vectors whose patch has a smaller share of pixels that count are excluded.
        skip_homogeneous: whether to leave out images whose patches all look alike, such as crops of
            background, whose vectors only attract each other; with `pairs="batch"`, whole batches.
        backend: as for `pdcr_loss`. An explicit backend counts, and gathers where it has a kernel for that.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a receptive field is infinite, and its layer has no `patch_size` or the field has no
            `location`; a receptive field has another number of axes than the others; a number is out of
            range; a word or layer is unknown; `in_channels` is missing with a projection, or
            `projection_channels` is given without one.

    Warns:
        UserWarning: `class_distance` or `include_background` has no effect; once, `class_distance="mean"`
            with more than two classes.

    Example:
        >>> from contrastseg_fast import ReceptiveField
        >>> field = ReceptiveField(size=(3, 3), stride=(2, 2), start=(-1, -1))
        >>> pdcr = PDCRLoss([field], num_classes=2)
        >>> features = torch.randn(1, 16, 4, 4, requires_grad=True)
        >>> loss = pdcr([features], torch.eye(8, dtype=torch.long)[None])
        >>> loss.backward()
    """

    def forward(
        self,
        features: Tensor | Sequence[Tensor] | Mapping[Any, Tensor],
        labels: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        maps = dict(zip(self.receptive_fields, self.in_layer_order(features), strict=True))
        if self.projections is not None or self.backend == "reference":
            return self.loss([self.sample(x, layer) for layer, x in maps.items()], labels, mask)
        places = {layer: self.place(x, layer) for layer, x in maps.items()}
        return self._call(maps, places, True, labels, mask)

    forward.__doc__ = PDCROptions.forward.__doc__

    def sample(self, features: Tensor, layer: Layer) -> LayerSamples:
        """Take vectors out of one layer's feature map `(B, C, *spatial)`; the map itself is not kept.

        Args:
            features: the map.
            layer: its key in `receptive_fields`.

        Returns:
            the samples, for `loss` and `repelled_fraction`.

        Raises:
            TypeError: `features` is not a tensor, or not of a floating dtype.
            ValueError: the layer is unknown, or `features` has another number of axes than its receptive
                field, or other channels than `in_channels`.

        Example:
            >>> from contrastseg_fast import ReceptiveField
            >>> field = ReceptiveField((3, 3), (1, 1), (-1, -1))
            >>> pdcr = PDCRLoss({"stem": field}, num_classes=2, num_samples=4)
            >>> pdcr.sample(torch.zeros(2, 8, 6, 6), "stem").vectors.shape
            torch.Size([2, 4, 8])
        """
        places = self.place(features, layer)
        backend = "auto" if self.backend == "cpu" else self.backend  # plain PyTorch gathers on the CPU
        if backend not in ("auto", "reference"):
            _dispatch.check(gather.OPERATION, backend, features)
        return LayerSamples(layer, sampling.gather_at(features, places, backend), places)

    def loss(
        self, samples: Iterable[LayerSamples], labels: Tensor | Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """The loss of vectors that were sampled before, one `LayerSamples` for each layer.

        Args:
            samples: what `sample` returned for each layer.
            labels, mask: as for `forward`.

        Returns:
            the loss, as `forward`.

        Raises:
            TypeError: the labels or the mask is not a tensor, or has another dtype.
            ValueError: there is no sample, or samples, labels and mask differ in batch, resolution or device.

        Example:
            >>> from contrastseg_fast import ReceptiveField
            >>> pdcr = PDCRLoss([ReceptiveField((3, 3), (1, 1), (-1, -1))], num_classes=2, num_samples=4)
            >>> samples = [pdcr.sample(torch.ones(1, 8, 6, 6), 0)]
            >>> pdcr.loss(samples, torch.zeros(1, 6, 6, dtype=torch.long))
            tensor(-0.6137)
        """
        vectors, places = self._sampled(samples)
        if self.backend != "reference":
            return self._call(vectors, places, False, labels, mask)
        plan, problems = self._problems(vectors, places, labels, mask)
        losses = [unchecked.pdcr_loss(*each, self.pair, self.reduction, self.backend) for each in problems]
        if self.reduction == "none":
            return self._by_image(torch.cat(losses), plan)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def repelled_fraction(
        self, samples: Iterable[LayerSamples], labels: Tensor | Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """The share of pairs that `loss` drives apart. Where it is near 0, all vectors end up alike.

        Args:
            samples, labels, mask: as for `loss`.

        Returns:
            the fractions `(B, layers)`, fp32, of the same sets of vectors as `loss` with
            `reduction="none"`, averaged over several sizes of patches. No gradient.

        Raises:
            TypeError, ValueError: under the conditions of `loss`.

        Example:
            >>> from contrastseg_fast import ReceptiveField
            >>> pdcr = PDCRLoss([ReceptiveField((3, 3), (1, 1), (-1, -1))], num_classes=2, num_samples=4)
            >>> samples = [pdcr.sample(torch.ones(1, 8, 6, 6), 0)]
            >>> pdcr.repelled_fraction(samples, torch.zeros(1, 6, 6, dtype=torch.long))
            tensor([[0.]])
        """
        plan, problems = self._problems(*self._sampled(samples), labels, mask)
        fractions = [unchecked.repelled_fraction(*each, self.pair, self.backend) for each in problems]
        return self._by_image(torch.cat(fractions), plan)

    def _sampled(
        self, samples: Iterable[LayerSamples]
    ) -> tuple[dict[Layer, Tensor], dict[Layer, sampling.Places]]:
        """The vectors `(B, N, C)` of every layer, behind their heads, and where they lay."""
        by_layer = {sample.layer: sample for sample in samples}
        vectors = {layer: self.project(sample.vectors, layer) for layer, sample in by_layer.items()}
        return vectors, {layer: sample.places for layer, sample in by_layer.items()}

    def _call(
        self,
        features: Mapping[Layer, Tensor],
        places: Mapping[Layer, sampling.Places],
        are_maps: bool,
        labels: Tensor | Sequence[Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """The loss of maps, or of vectors that were taken out of them."""
        plan, label_map, positions = self._plan(features, places, are_maps, labels, mask)
        loss, _ = pdcr_call.pdcr_call_forward(
            list(features.values()),
            positions,
            label_map,
            plan.numbers,
            [*self.pair],
            self.min_valid_fraction,
            self.backend,
        )
        return self._by_image(loss, plan) if self.reduction == "none" else loss

    def _problems(
        self,
        vectors: Mapping[Layer, Tensor],
        places: Mapping[Layer, sampling.Places],
        labels: Tensor | Sequence[Tensor],
        mask: Tensor | None,
    ) -> tuple[CallPlan, list[pdcr_call.ProblemTensors]]:
        """The vectors that make pairs, with the contents of their patches of each size."""
        plan, label_map, positions = self._plan(vectors, places, False, labels, mask)
        problems = pdcr_call.make_problems(
            list(vectors.values()),
            positions,
            label_map,
            plan,
            self.min_valid_fraction,
            self.backend,
            unchecked.foreground_ratio,
        )
        return plan, problems

    def _plan(
        self,
        features: Mapping[Layer, Tensor],
        places: Mapping[Layer, sampling.Places],
        are_maps: bool,
        labels: Tensor | Sequence[Tensor],
        mask: Tensor | None,
    ) -> tuple[CallPlan, Tensor, list[Tensor]]:
        """Check the call; returns its plan, the label map, and positions of layers that follow no plan."""
        sets = self.sampled_sets(features)
        labels = first_label_map(labels)
        label_map = prepare_labels(labels, mask, self.spatial_dims, self.num_classes, self.ignore_index)
        self._check_layers(features, places, label_map.labels)
        for layers in sets:
            if len(layers) > 1:
                _check_channels({layer: features[layer].shape[1 if are_maps else 2] for layer in layers})
        nothing = label_map.labels.new_empty((0,), dtype=torch.int64)
        positions = [nothing if place.plan is not None else place.positions for place in places.values()]
        sum_checked = label_map.soft and functional.is_checked(label_map.labels)
        plan = CallPlan(
            layers=tuple([LayerPlan(place.spatial_shape, place.plan, are_maps) for place in places.values()]),
            patches=tuple([tuple([of_size[layer] for layer in places]) for of_size in self.planned_patches]),
            sets=tuple([tuple(map([*places].index, layers)) for layers in sets]),
            merged=self.pairs == "batch",
            num_classes=max(self.num_classes, 2),
            border=self.border,
            ignore_index=label_map.ignore_index,
            skip_homogeneous=self.skip_homogeneous,
            affinity=self.affinity,
            include_background=self.counts_background,
            reduction=self.reduction,
            checked_distance=self.class_distance if sum_checked else "mean",
        )
        return plan, label_map.labels.detach(), positions  # constants, in forward mode too

    def _check_layers(
        self, features: Mapping[Layer, Tensor], places: Mapping[Layer, sampling.Places], labels: Tensor
    ) -> None:
        """Check that the labels belong to the layers, and that an explicit backend can serve both."""
        for layer, x in features.items():
            _checks.same_device("labels", labels, f"features[{layer!r}]", x)
            if labels.shape[0] != x.shape[0]:
                _checks.fail("labels", f"a batch of {x.shape[0]}, that of the features", labels.shape[0])
            label_shape, map_shape = labels.shape[-self.spatial_dims :], places[layer].spatial_shape
            check_resolution(self.receptive_fields[layer], map_shape, label_shape, layer)
            if self.backend in ("auto", "reference"):
                continue
            _dispatch.check(pdcr.OPERATION, self.backend, x, pdcr.refused_by_triton(x))
            for patches in self.patches_by_size:
                size = patches[layer].size
                refused = foreground_ratio.refused_by_triton(labels, size)  # type: ignore[arg-type]
                _dispatch.check(foreground_ratio.OPERATION, self.backend, labels, refused)

    def _by_image(self, numbers: Tensor, plan: CallPlan) -> Tensor:
        """The numbers of all problems as `(B, sets)`, averaged over the sizes."""
        return numbers.view(len(plan.sets), len(plan.patches), -1).mean(1).mT


def _check_channels(channels: Mapping[Layer, int]) -> None:
    """Check that layers whose vectors make pairs with each other have equal channels."""
    if len(set(channels.values())) > 1:
        _checks.fail(
            "cross_layers",
            "layers with equal channels, or projection='linear' or 'mlp' to a common width",
            f"the channels {channels}",
        )
