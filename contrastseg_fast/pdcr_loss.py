"""PDCRLoss: patch-dragsaw contrastive regularization of several layers, as a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from contrastseg_fast import _checks, functional, sampling, unchecked
from contrastseg_fast.affinity import select_compared
from contrastseg_fast.ops import _dispatch, foreground_ratio, gather, pdcr
from contrastseg_fast.patches import (
    PatchContents,
    check_resolution,
    first_label_map,
    prepare_labels,
    without_homogeneous,
)
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
        return LayerSamples(layer, sampling.gather_at(features, places.positions, backend), places)

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
        pair, background, losses = self.pair, self.counts_background, []
        for vectors, sizes in self._sets(samples, labels, mask):
            by_size = []
            for contents in sizes:
                compared = select_compared(contents.ratios, self.affinity, background)
                valid = contents.valid
                by_size.append(
                    unchecked.pdcr_loss(vectors, compared, valid, pair, self.reduction, self.backend)
                )
            losses.append(_mean(by_size))
        stacked = torch.stack(losses, -1)
        return stacked if self.reduction == "none" else stacked.mean()

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
        pair, background, fractions = self.pair, self.counts_background, []
        for vectors, sizes in self._sets(samples, labels, mask):
            by_size = []
            for contents in sizes:
                compared = select_compared(contents.ratios, self.affinity, background)
                by_size.append(
                    unchecked.repelled_fraction(vectors, compared, contents.valid, pair, self.backend)
                )
            fractions.append(_mean(by_size))
        return torch.stack(fractions, -1)

    def _sets(
        self, samples: Iterable[LayerSamples], labels: Tensor | Sequence[Tensor], mask: Tensor | None
    ) -> list[tuple[Tensor, list[PatchContents]]]:
        """The vectors `(B, N, C)` that make pairs, and the contents of their patches of each size."""
        by_layer = {sample.layer: sample for sample in samples}
        vector_sets = self.sampled_sets(by_layer)
        contents = self._count(by_layer, first_label_map(labels), mask)
        vectors = {layer: self.project(sample.vectors, layer) for layer, sample in by_layer.items()}
        sets = []
        for layers in vector_sets:
            if len(layers) == 1 and self.pairs == "image":
                of_set, sizes = vectors[layers[0]], [held[layers[0]] for held in contents]
            else:
                of_set = self._merge(_equally_wide(layers, vectors))
                sizes = []
                for held in contents:
                    parts = zip(*[held[layer] for layer in layers], strict=True)
                    sizes.append(PatchContents(*map(self._merge, parts)))
            if self.skip_homogeneous:
                sizes = [c._replace(valid=without_homogeneous(c.valid, c.inside)) for c in sizes]
            sets.append((of_set, sizes))
        return sets

    def _count(
        self, by_layer: dict[Layer, LayerSamples], labels: Tensor, mask: Tensor | None
    ) -> list[dict[Layer, PatchContents]]:
        """What the patches of each size hold, by layer."""
        label_map = prepare_labels(labels, mask, self.spatial_dims, self.num_classes, self.ignore_index)
        labels = label_map.labels
        for layer, sample in by_layer.items():
            _checks.same_device("labels", labels, f"features[{layer!r}]", sample.vectors)
            if labels.shape[0] != sample.vectors.shape[0]:
                batch = sample.vectors.shape[0]
                _checks.fail("labels", f"a batch of {batch}, that of the features", labels.shape[0])
            label_shape, map_shape = labels.shape[-self.spatial_dims :], sample.places.spatial_shape
            check_resolution(self.receptive_fields[layer], map_shape, label_shape, layer)
            if self.backend not in ("auto", "reference"):
                self._check_backend(sample.vectors, labels, layer)
        contents: list[dict[Layer, PatchContents]] = []
        with_inside = self.skip_homogeneous and self.border != "clip"  # whose ratios are those inside
        for patches in self.patches_by_size:
            contents.append({})
            for layer, sample in by_layer.items():
                patch = patches[layer]
                ratios, valid_fraction, inside = unchecked.foreground_ratio(
                    labels,
                    sample.places.starts(patch),
                    patch.size,  # type: ignore[arg-type]  # finite
                    max(self.num_classes, 2),
                    self.border,
                    label_map.ignore_index,
                    with_inside,
                    self.backend,
                )
                if label_map.soft and functional.is_checked(ratios) and ratios.numel() > 0:
                    functional.check_ratio_sum(ratios, self.class_distance)
                valid = valid_fraction >= self.min_valid_fraction
                contents[-1][layer] = PatchContents(ratios, valid, inside if with_inside else ratios)
        return contents

    def _check_backend(self, vectors: Tensor, labels: Tensor, layer: Layer) -> None:
        """Check that an explicit backend can count the patches and compute the loss of a layer."""
        _dispatch.check(pdcr.OPERATION, self.backend, vectors, pdcr.refused_by_triton(vectors))
        for patches in self.patches_by_size:
            size = patches[layer].size
            refused = foreground_ratio.refused_by_triton(labels, size)  # type: ignore[arg-type]
            _dispatch.check(foreground_ratio.OPERATION, self.backend, labels, refused)

    def _merge(self, parts: Sequence[Tensor]) -> Tensor:
        """One set of `(B, N, ...)` of several layers' parts, and of all images as if they were one."""
        merged = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
        return merged.flatten(0, 1)[None] if self.pairs == "batch" else merged


def _mean(by_size: list[Tensor]) -> Tensor:
    """The mean over the sizes of patches, without a copy of a single one."""
    return by_size[0] if len(by_size) == 1 else torch.stack(by_size).mean(0)


def _equally_wide(layers: Sequence[Layer], vectors: Mapping[Layer, Tensor]) -> list[Tensor]:
    """The vectors of layers that make pairs with each other, which need equal channels."""
    channels = {layer: vectors[layer].shape[-1] for layer in layers}
    if len(set(channels.values())) > 1:
        _checks.fail(
            "cross_layers",
            "layers with equal channels, or projection='linear' or 'mlp' to a common width",
            f"the channels {channels}",
        )
    return [vectors[layer] for layer in layers]
