"""Launches the kernels of methods on a stream, but for Collection-CAM's.

No launch allocates, copies or waits, or depends on how many rows, pairs or images a run has, so
that one CUDA graph serves every run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ccam_deploy.kernels.cuda import combine, layer_maps, scores
from ccam_deploy.kernels.cuda.collectives import WARP, Array
from ccam_deploy.kernels.cuda.geometry import map_parts
from ccam_deploy.kernels.cuda.launch import Threads
from ccam_deploy.kernels.cuda.row_buffers import Lines, Maps, RunInputs


@dataclass(frozen=True)
class Enlargement:
    """How a layer's maps come to the size of the input.

    Attributes:
        lines: See `row_buffers.enlarged`; in device memory.
        shape: H and w.
    """

    lines: Lines[Array]
    shape: tuple[int, int]


@dataclass(frozen=True)
class RunKernels:
    """The kernels that every method needs.

    Attributes:
        run: The inputs of a run, in device memory.
        threads: Threads per block.
    """

    run: RunInputs[Array]
    threads: Threads = field(default_factory=Threads, kw_only=True)

    @property
    def pairs(self) -> int:
        """The most pairs of a run."""
        return int(self.run.pair_owner.shape[0])

    def cast(self, images: Array, target: Array, stream: Any) -> None:
        """Images [n] float32 in the engine's type, both 1-D."""
        grid = -(-target.shape[0] // self.threads.combine)
        scores.cast[grid, self.threads.combine, stream](images, target)

    def by_pixel(self, pixels: int) -> tuple[tuple[int, int], int]:
        """The grid and the block of a kernel with a thread for each pixel of each pair."""
        threads = self.threads.combine
        return (-(-pixels // threads), self.pairs), threads

    def by_tile(self, pixels: int) -> tuple[tuple[int, int], int]:
        """The grid and the block of a kernel with a block for each WARP pixels of each pair."""
        return (-(-pixels // WARP), self.pairs), self.threads.sums

    def weighted_channels(
        self, features: Array, weights: Array, relu: bool, sums: Array, stream: Any
    ) -> None:
        """Sums of a layer's channels by their weights; see `layer_maps`."""
        layer_maps.weighted_channels[(*self.by_tile(sums.shape[1]), stream)](
            self.run.progress, self.run.pair_owner, features, weights, int(relu), sums
        )

    def enlarge(
        self, small: Array, how: Enlargement, raw: Array, stream: Any, fused: bool = False
    ) -> None:
        """Small maps [P, h · w] at the size of the input; fused, where they exceed `raw`."""
        lines = how.lines
        layer_maps.enlarge[(*self.by_pixel(raw.shape[1]), stream)](
            self.run.progress, small, lines.low, lines.share, how.shape, int(fused), raw
        )

    def scale(self, maps: Maps[Array], stream: Any) -> None:
        """The maps scaled to [0, 1]."""
        threads = self.threads.combine
        grid = map_parts(maps.raw.shape[1], threads), self.pairs
        combine.find_extremes[grid, threads, stream](maps.raw, maps.extremes)
        combine.min_max[grid, threads, stream](maps.raw, maps.extremes, maps.saliency)
