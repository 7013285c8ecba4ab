"""Launches the kernels on a stream: device arrays in, device arrays out.

No launch allocates, copies or waits, so that a stream's launches can be captured in a CUDA graph.
Call the methods of CollectionKernels in the order in which they are written: each works on what
those before it left in the buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ccam_deploy.kernels.cuda import combine, cut, masks, scores, statistics, sums, ward
from ccam_deploy.kernels.cuda.buffers import Buffers
from ccam_deploy.kernels.cuda.collectives import WARP, Array
from ccam_deploy.kernels.cuda.geometry import DIGITS, PARTITION_THREADS, Geometry, map_parts


def write_constants(geometry: Geometry, buffers: Buffers[Array], stream: Any) -> None:
    """Fill, on the stream, what every batch reads and none changes.

    Args:
        geometry: The sizes.
        buffers: Arrays in device memory, of the shapes of `geometry.specs`.
        stream: A Numba stream.
    """
    low, share = geometry.interpolation()
    buffers.table.copy_to_device(geometry.table(), stream)
    buffers.low.copy_to_device(low, stream)
    buffers.share.copy_to_device(share, stream)
    arrays = buffers.by_name()
    for name, spec in geometry.specs().by_name().items():
        if spec.zeroed:
            arrays[name].copy_to_device(np.zeros(spec.shape, spec.dtype), stream)


@dataclass(frozen=True)
class Inputs:
    """One batch, in device memory.

    Attributes:
        features: 1-D, float32 or float16; the layers' [images, C, h, w], each where the geometry
            says.
        gradients: The same of [pairs, C, h, w].
        owner: [P] int32, the image of each pair.
        k_range: [2] int32, the fewest and the most collections of a layer; at most the geometry's.
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
    """The classifier's head for one batch, in device memory.

    Attributes:
        logits: [B, classes] float32 or float16.
        codes: [P] int32, a class, or -1 - r for the class of rank r by its logit, from 0.
        gradient: [P, classes] float32 or float16, written: the gradient graph's input.
    """

    logits: Array
    codes: Array
    gradient: Array


SCORINGS = {"logit": scores.LOGIT, "softmax": scores.SOFTMAX, "sigmoid": scores.SIGMOID}
"""How a kernel knows what methods.scores.Scoring names."""


@dataclass(frozen=True)
class Threads:
    """Threads per block, multiples of 32. Results do not depend on them."""

    statistics: int = 128
    search: int = 256
    partition: int = PARTITION_THREADS
    sums: int = 256
    masks: int = 512
    mask_parts: int = 256
    scores: int = 128
    combine: int = 256
    scaling: int = 512


class CollectionKernels:
    """The kernels of Collection-CAM for one geometry, on one slot's buffers."""

    def __init__(
        self, geometry: Geometry, buffers: Buffers[Array], threads: Threads | None = None
    ) -> None:
        """Keep what every launch needs.

        Args:
            geometry: The sizes.
            buffers: Arrays in device memory; see `write_constants`.
            threads: Threads per block.
        """
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
        self, inputs: Inputs, head: Head, gradient_scale: float, scoring: str, stream: Any
    ) -> None:
        """Each pair's class, and the gradient of its score times the scale, as slope and rest."""
        scores.output_gradient[inputs.pairs, self.threads.scores, stream](
            head.logits,
            inputs.owner,
            head.codes,
            np.float32(gradient_scale),
            SCORINGS[scoring],
            self.buffers.targets,
            self.buffers.slopes,
            head.gradient,
        )

    def statistics(self, inputs: Inputs, gradient_scale: float, stream: Any) -> None:
        """Channel statistics ψ; gradients are brought back to their slope and scale."""
        grid = self.geometry.channels, inputs.pairs
        statistics.channel_statistics[grid, self.threads.statistics, stream](
            self.buffers.table,
            inputs.features,
            inputs.gradients,
            inputs.owner,
            self.buffers.slopes,
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
        threads, most = self.threads.search, self.geometry.block_clusters
        ward.begin[(layers, pairs), self.threads.partition, stream](
            b.table, psi, *hierarchy, b.scales, b.counts, b.alive, b.stale
        )
        largest = max(layer.channels for layer in self.geometry.layers)
        by_thread = -(-largest // threads), layers, pairs
        by_warp = -(-largest // (threads // WARP)), layers, pairs
        ward.search[by_warp, threads, stream](b.table, *hierarchy, b.alive)
        for turn in range(1, self.geometry.grid_rounds + 1):
            ward.merge[by_thread, threads, stream](
                b.table, *hierarchy, b.scales, b.alive, b.stale, turn, most
            )
            ward.relink[by_warp, threads, stream](b.table, *hierarchy, b.alive, b.stale, turn)
        cut.partition[(layers, pairs), self.threads.partition, stream](
            b.table,
            *hierarchy,
            b.scales,
            b.alive,
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
        grid = inputs.pairs * len(geometry.layers) * geometry.k_max, geometry.mask_parts
        maps = b.table, b.low, b.share, b.sums, b.starts
        sizes = inputs.pairs, geometry.k_max, geometry.size[0], geometry.quantile
        for digit in range(DIGITS):
            masks.count_values[grid, self.threads.mask_parts, stream](
                *maps, *sizes, digit, b.histograms, b.selected
            )
        masks.write_masks[grid, self.threads.mask_parts, stream](
            *(*maps, inputs.owner, *sizes),
            *(b.histograms, b.selected, b.masks, b.flat, b.owner_of_mask),
        )

    def scores(self, inputs: Inputs, logits: Array, scoring: str, stream: Any) -> None:
        """Scores of the masks, from the logits [rows, classes] of their images."""
        scores.mask_scores[logits.shape[0], self.threads.scores, stream](
            logits,
            self.buffers.starts,
            self.buffers.targets,
            inputs.pairs,
            len(self.geometry.layers),
            SCORINGS[scoring],
            self.buffers.scores,
        )

    def combine(self, inputs: Inputs, stream: Any) -> None:
        """Saliency from the masks and their scores."""
        b, layers, pairs = self.buffers, len(self.geometry.layers), inputs.pairs
        combine.softmax_weights[pairs, WARP, stream](b.starts, b.scores, b.flat, layers, b.weights)
        pixels = self.geometry.size[0] * self.geometry.size[1]
        grid = map_parts(pixels, self.threads.combine), pairs
        combine.weighted_sum[grid, self.threads.combine, stream](
            b.starts, b.weights, b.masks, layers, b.raw, b.extremes
        )
        combine.min_max[grid, self.threads.combine, stream](b.raw, b.extremes, b.saliency)
