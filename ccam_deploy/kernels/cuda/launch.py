"""Launches the kernels on a stream: device arrays in, device arrays out.

Nothing here allocates, copies or waits once the buffers stand, so that a stream's launches can be
captured in a CUDA graph. The functions are to be called in the order in which they are written;
each works on what the ones before it left in the buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ccam_deploy.kernels.cuda import combine, cut, masks, scores, statistics, sums, ward
from ccam_deploy.kernels.cuda.collectives import WARP, Array
from ccam_deploy.kernels.cuda.geometry import Geometry, Spec


@dataclass(frozen=True)
class Buffers:
    """The arrays of one slot, of the shapes that Geometry.specs tells.

    Results, for P pairs, L layers, C channels of all layers and n masks:
    psi: [P, C, 4].   labels: [P, C], numbered within each layer.   counts: [P, L], collections;
    0 where a layer's statistics are not finite, which the caller must refuse.
    quality: [P, L, k_max], from k_min on; -1 after the last number of collections that was tried.
    rounds: [P, L], rounds of merging.
    sums: [P, k_max · pixels], the collection sums in [0, 1].
    starts: [P · L + 1], the first mask of each pair and layer; the last one in use, how many.
    masks: [n, H · W].   flat: [n].   owner_of_mask: [n], images.
    targets: [P], classes.   scores: [n].   weights: [n].
    raw, saliency: [P, H · W], before and after scaling to [0, 1].
    The others are tables and working space.
    """

    table: Array
    low: Array
    share: Array
    psi: Array
    labels: Array
    counts: Array
    quality: Array
    rounds: Array
    sums: Array
    starts: Array
    masks: Array
    flat: Array
    owner_of_mask: Array
    targets: Array
    scores: Array
    weights: Array
    raw: Array
    saliency: Array
    scaled_psi: Array
    exact: Array
    coarse: Array
    links: Array
    scales: Array
    unscaled: Array
    finished: Array

    @classmethod
    def allocate(
        cls, geometry: Geometry, allocate: Callable[[str, Spec], Array], stream: Any
    ) -> Buffers:
        """Let the caller allocate each array by its name; fill on the stream what never changes."""
        specs = geometry.specs()
        arrays = {field.name: allocate(field.name, specs[field.name]) for field in fields(cls)}
        low, share = geometry.interpolation()
        for name, values in {"table": geometry.table(), "low": low, "share": share}.items():
            arrays[name].copy_to_device(values, stream)
        for name, spec in specs.items():
            if spec.zeroed:
                arrays[name].copy_to_device(np.zeros(spec.shape, spec.dtype), stream)
        return cls(**arrays)


@dataclass(frozen=True)
class Inputs:
    """One batch, in device memory.

    features, gradients: 1-D, float32 or float16; the layers' arrays [images, C, h, w] and
        [pairs, C, h, w], each where the geometry says.
    owner: [P] int32, the image of each pair.
    k_range: [2] int32, the fewest and the most collections of a layer; not above the geometry's.
    """

    features: Array
    gradients: Array
    owner: Array
    k_range: Array

    @property
    def pairs(self) -> int:
        """P."""
        return int(self.owner.shape[0])


@dataclass(frozen=True)
class Head:
    """What the classes of one batch are chosen from, in device memory.

    logits: [B, classes] float32 or float16.
    wanted: [P] int32, a class, or -1 - r for the class of rank r by its logit, from 0.
    gradient: [P, classes] float32 or float16, written: the gradient graph's input.
    """

    logits: Array
    wanted: Array
    gradient: Array


@dataclass(frozen=True)
class Threads:
    """Threads per block, multiples of 32. Results do not depend on them."""

    statistics: int = 128
    search: int = 256
    partition: int = 512
    sums: int = 256
    masks: int = 512
    scores: int = 128
    combine: int = 256
    scaling: int = 512


class CollectionKernels:
    """The kernels of Collection-CAM for one geometry, on one slot's buffers."""

    def __init__(
        self, geometry: Geometry, buffers: Buffers, threads: Threads | None = None
    ) -> None:
        self.geometry = geometry
        self.buffers = buffers
        self.threads = threads or Threads()

    def cast(self, images: Array, target: Array, stream: Any) -> None:
        """Images [n] float32 in the engine's type, both 1-D."""
        grid = -(-target.shape[0] // self.threads.combine)
        scores.cast[grid, self.threads.combine, stream](images, target)

    def gather(self, inputs: Inputs, source: Array, target: Array, stream: Any) -> None:
        """Rows [P, n] of the pairs' images, out of [B, n]."""
        grid = -(-target.shape[1] // self.threads.combine), inputs.pairs
        scores.gather[grid, self.threads.combine, stream](source, inputs.owner, target)

    def output_gradient(
        self, inputs: Inputs, head: Head, gradient_scale: float, probability: bool, stream: Any
    ) -> None:
        """Each pair's class, and the gradient of its score times the scale."""
        scores.output_gradient[inputs.pairs, self.threads.scores, stream](
            head.logits,
            inputs.owner,
            head.wanted,
            np.float32(gradient_scale),
            int(probability),
            self.buffers.targets,
            head.gradient,
        )

    def statistics(self, inputs: Inputs, gradient_scale: float, stream: Any) -> None:
        """Channel statistics ψ; gradients are divided by their scale."""
        grid = self.geometry.channels, inputs.pairs
        statistics.channel_statistics[grid, self.threads.statistics, stream](
            self.buffers.table,
            inputs.features,
            inputs.gradients,
            inputs.owner,
            1.0 / gradient_scale,
            self.buffers.psi,
        )

    def partition(self, inputs: Inputs, standardise: bool, stream: Any) -> None:
        """Ward's partition of each layer, from ψ or from ψ scaled to equal deviations."""
        b, layers, pairs = self.buffers, len(self.geometry.layers), inputs.pairs
        psi = b.psi
        if standardise:
            psi = b.scaled_psi
            grid = 4, layers, pairs
            statistics.standardise[grid, self.threads.search, stream](b.table, b.psi, psi)
        hierarchy = b.exact, b.coarse, b.links
        ward.begin[(layers, pairs), self.threads.search, stream](
            b.table, psi, *hierarchy, b.scales, b.counts
        )
        rows = self.threads.search // WARP
        largest = max(layer.channels for layer in self.geometry.layers)
        ward.search[(-(-largest // rows), layers, pairs), self.threads.search, stream](
            b.table, *hierarchy, b.counts
        )
        cut.partition[(layers, pairs), self.threads.partition, stream](
            b.table,
            *hierarchy,
            b.scales,
            inputs.k_range,
            b.labels,
            b.counts,
            b.quality,
            b.rounds,
        )

    def sums(self, inputs: Inputs, stream: Any) -> None:
        """Collection sums."""
        b = self.buffers
        grid = self.geometry.tiles, self.geometry.k_max, inputs.pairs
        sums.collection_sums[grid, self.threads.sums, stream](
            b.table,
            inputs.features,
            inputs.gradients,
            inputs.owner,
            b.psi,
            b.labels,
            b.counts,
            b.unscaled,
            b.finished,
            b.sums,
        )

    def masks(self, inputs: Inputs, stream: Any) -> None:
        """Masks M', and where each pair's begin."""
        b, geometry = self.buffers, self.geometry
        masks.index_masks[1, self.threads.combine, stream](
            b.counts, inputs.pairs, b.starts, b.flat, b.owner_of_mask
        )
        grid = inputs.pairs * len(geometry.layers) * geometry.k_max
        masks.render_masks[grid, self.threads.masks, stream](
            b.table,
            b.low,
            b.share,
            b.sums,
            b.starts,
            inputs.owner,
            inputs.pairs,
            geometry.k_max,
            geometry.size[0],
            geometry.quantile,
            b.masks,
            b.flat,
            b.owner_of_mask,
        )

    def scores(self, inputs: Inputs, logits: Array, probability: bool, stream: Any) -> None:
        """Scores of the masks, from the logits [rows, classes] of their images."""
        scores.mask_scores[logits.shape[0], self.threads.scores, stream](
            logits,
            self.buffers.starts,
            self.buffers.targets,
            inputs.pairs,
            len(self.geometry.layers),
            int(probability),
            self.buffers.scores,
        )

    def combine(self, inputs: Inputs, stream: Any) -> None:
        """Saliency from the masks and their scores."""
        b, layers, pairs = self.buffers, len(self.geometry.layers), inputs.pairs
        combine.softmax_weights[pairs, WARP, stream](b.starts, b.scores, b.flat, layers, b.weights)
        pixels = self.geometry.size[0] * self.geometry.size[1]
        grid = -(-pixels // self.threads.combine), pairs
        combine.weighted_sum[grid, self.threads.combine, stream](
            b.starts, b.weights, b.masks, layers, b.raw
        )
        combine.min_max[pairs, self.threads.scaling, stream](b.raw, b.saliency)
