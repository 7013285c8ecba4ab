"""Launches the kernels of masked forwards, of Score-CAM and of RISE on a stream.

No launch allocates, copies or waits, or depends on how many rows, pairs or images a run has, so
that one CUDA graph of a chunk serves every run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ccam_deploy.kernels.cuda import channels, combine, grids, rows, scores
from ccam_deploy.kernels.cuda.collectives import WARP, Array
from ccam_deploy.kernels.cuda.launch import SCORINGS, Threads
from ccam_deploy.kernels.cuda.row_buffers import Channels, Chunk, Grids, Lines, Maps, RunInputs

WEIGHTINGS = {
    "increase": channels.INCREASE,
    "probability": channels.SCORE,
    "softmax": channels.SOFTMAX,
}
"""How a kernel knows what ScoreCAM.weights names."""


@dataclass(frozen=True)
class ForwardKernels:
    """The kernels that every method of masked forwards needs.

    Attributes:
        run: The inputs of a run, in device memory.
        chunk: The arrays of one launch of the classifier, in device memory.
        threads: Threads per block.
    """

    run: RunInputs[Array]
    chunk: Chunk[Array]
    threads: Threads = field(default_factory=Threads)

    @property
    def pairs(self) -> int:
        """The most pairs of a run."""
        return int(self.run.pair_owner.shape[0])

    def cast(self, images: Array, target: Array, stream: Any) -> None:
        """Images [n] float32 in the engine's type, both 1-D."""
        grid = -(-target.shape[0] // self.threads.combine)
        scores.cast[grid, self.threads.combine, stream](images, target)

    def scores(self, scoring: str, stream: Any) -> None:
        """Scores of the chunk's rows, for every pair of their images; see SCORINGS."""
        run, chunk = self.run, self.chunk
        grid = chunk.item.shape[0], self.pairs
        rows.row_scores[grid, self.threads.scores, stream](
            run.progress,
            chunk.logits,
            chunk.owner,
            chunk.item,
            run.pair_owner,
            run.targets,
            SCORINGS[scoring],
            chunk.scores,
        )

    def advance(self, stream: Any) -> None:
        """Go on to the next chunk."""
        rows.advance[1, 1, stream](self.run.progress, self.chunk.item.shape[0])

    def by_pixel(self, pixels: int) -> tuple[tuple[int, int], int]:
        """The grid and the block of a kernel with a thread for each pixel of each pair."""
        threads = self.threads.combine
        return (-(-pixels // threads), self.pairs), threads


@dataclass(frozen=True)
class ChannelKernels:
    """Score-CAM's kernels.

    Attributes:
        forwards: The kernels of all methods.
        arrays: Score-CAM's arrays, in device memory.
        maps: The results, in device memory.
        lines: How the layer's maps are enlarged, in device memory.
        features: [B, C, h · w] float32 or float16, the layer's feature maps.
        shape: H and w.
    """

    forwards: ForwardKernels
    arrays: Channels[Array]
    maps: Maps[Array]
    lines: Lines[Array]
    features: Array
    shape: tuple[int, int]

    def spread(self, stream: Any) -> None:
        """How much each channel varies over each image."""
        batch, channel_count = self.features.shape[:2]
        threads = self.forwards.threads.statistics
        channels.channel_spread[(channel_count, batch), threads, stream](
            self.features, self.arrays.varied, self.arrays.spread
        )

    def masks(self, stream: Any) -> None:
        """The masks of the next chunk."""
        run, chunk, lines = self.forwards.run, self.forwards.chunk, self.lines
        channels.render_channels[chunk.item.shape[0], self.forwards.threads.masks, stream](
            run.progress,
            self.arrays.rows,
            self.features,
            lines.low,
            lines.share,
            self.shape,
            chunk.masks,
            chunk.owner,
            chunk.item,
        )

    def keep_scores(self, stream: Any) -> None:
        """Sort the chunk's scores by channel."""
        run, chunk = self.forwards.run, self.forwards.chunk
        channels.keep_scores[self.forwards.pairs, WARP, stream](
            run.progress,
            chunk.owner,
            chunk.item,
            run.pair_owner,
            chunk.scores,
            self.arrays.scores,
        )

    def combine(self, weighting: str, stream: Any) -> None:
        """Saliency from the channels and their scores; the weighting is one of WEIGHTINGS."""
        forwards, run, arrays, lines = self.forwards, self.forwards.run, self.arrays, self.lines
        channels.channel_weights[forwards.pairs, forwards.threads.combine, stream](
            run.progress,
            run.pair_owner,
            arrays.chosen,
            arrays.base,
            arrays.scores,
            WEIGHTINGS[weighting],
            arrays.weights,
            arrays.gains,
        )
        grid = -(-arrays.sums.shape[1] // WARP), forwards.pairs
        channels.weighted_channels[grid, forwards.threads.sums, stream](
            run.progress, run.pair_owner, self.features, arrays.weights, arrays.sums
        )
        channels.enlarge[(*forwards.by_pixel(self.maps.raw.shape[1]), stream)](
            run.progress, arrays.sums, lines.low, lines.share, self.shape, self.maps.raw
        )
        combine.min_max[forwards.pairs, forwards.threads.scaling, stream](
            self.maps.raw, self.maps.saliency
        )


@dataclass(frozen=True)
class GridKernels:
    """RISE's kernels.

    Attributes:
        forwards: The kernels of all methods.
        arrays: RISE's arrays, in device memory.
        maps: The results, in device memory.
        lines: How the grids are enlarged, in device memory.
        shape: Cells along a side, rows of an enlarged grid, and W.
    """

    forwards: ForwardKernels
    arrays: Grids[Array]
    maps: Maps[Array]
    lines: Lines[Array]
    shape: tuple[int, int, int]

    def clear(self, stream: Any) -> None:
        """Begin with sums of zero."""
        total = self.arrays.total
        grids.clear[(*self.forwards.by_pixel(total.shape[1]), stream)](total)

    def masks(self, stream: Any) -> None:
        """The masks of the next chunk."""
        run, chunk, lines = self.forwards.run, self.forwards.chunk, self.lines
        grids.render_grids[chunk.item.shape[0], self.forwards.threads.masks, stream](
            run.progress,
            self.arrays.shown,
            self.arrays.cells,
            self.arrays.corners,
            lines.low,
            lines.share,
            self.shape,
            chunk.masks,
            chunk.owner,
            chunk.item,
        )

    def accumulate(self, stream: Any) -> None:
        """Add the chunk's masks times their scores to the sums."""
        run, chunk, total = self.forwards.run, self.forwards.chunk, self.arrays.total
        grids.accumulate[(*self.forwards.by_pixel(total.shape[1]), stream)](
            run.progress,
            chunk.scores,
            chunk.masks,
            chunk.owner,
            chunk.item,
            run.pair_owner,
            total,
        )

    def finish(self, count: float, stream: Any) -> None:
        """Saliency from the sums; `count` masks show a pixel on average."""
        forwards, maps, total = self.forwards, self.maps, self.arrays.total
        grids.mean[(*forwards.by_pixel(total.shape[1]), stream)](
            forwards.run.progress, total, count, maps.raw
        )
        combine.min_max[forwards.pairs, forwards.threads.scaling, stream](maps.raw, maps.saliency)
