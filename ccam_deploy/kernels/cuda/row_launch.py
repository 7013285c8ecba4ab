"""Launches the kernels of masked forwards, of Score-CAM, RISE and Recipro-CAM; see `run_launch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ccam_deploy.kernels.cuda import channels, grids, places, rows
from ccam_deploy.kernels.cuda.collectives import WARP, Array
from ccam_deploy.kernels.cuda.launch import SCORINGS
from ccam_deploy.kernels.cuda.row_buffers import (
    Channels,
    Chunk,
    Grids,
    Lines,
    Maps,
    Places,
    Spread,
)
from ccam_deploy.kernels.cuda.run_launch import Enlargement, RunKernels

WEIGHTINGS = {
    "increase": channels.INCREASE,
    "probability": channels.SCORE,
    "softmax": channels.SOFTMAX,
}
"""How a kernel knows what ScoreCAM.weights names."""


@dataclass(frozen=True)
class ForwardKernels(RunKernels):
    """The kernels that every method of masked forwards needs.

    Attributes:
        chunk: The arrays of one launch of the classifier, in device memory.
    """

    chunk: Chunk[Array]

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

    def keep_scores(self, kept: Array, stream: Any) -> None:
        """The chunk's scores, sorted into `kept` [P, items] float32 by item."""
        run, chunk = self.run, self.chunk
        rows.keep_scores[self.pairs, WARP, stream](
            run.progress, chunk.owner, chunk.item, run.pair_owner, chunk.scores, kept
        )

    def advance(self, stream: Any) -> None:
        """Go on to the next chunk."""
        rows.advance[1, 1, stream](self.run.progress, self.chunk.item.shape[0])

    def spread(self, features: Array, found: Spread[Array], stream: Any) -> None:
        """How much each channel of [B, C, h · w] varies over each image."""
        batch, channel_count = features.shape[:2]
        channels.channel_spread[(channel_count, batch), self.threads.statistics, stream](
            features, found.varied, found.spread
        )


@dataclass(frozen=True)
class ChannelKernels:
    """Score-CAM's kernels.

    Attributes:
        forwards: The kernels of all methods.
        arrays: Score-CAM's arrays, in device memory.
        maps: The results, in device memory.
        enlargement: How the layer's maps are enlarged.
        features: [B, C, h · w] float32 or float16, the layer's feature maps.
    """

    forwards: ForwardKernels
    arrays: Channels[Array]
    maps: Maps[Array]
    enlargement: Enlargement
    features: Array

    def masks(self, stream: Any) -> None:
        """The masks of the next chunk."""
        run, chunk, lines = self.forwards.run, self.forwards.chunk, self.enlargement.lines
        channels.render_channels[chunk.item.shape[0], self.forwards.threads.masks, stream](
            run.progress,
            self.arrays.rows,
            self.features,
            lines.low,
            lines.share,
            self.enlargement.shape,
            chunk.masks,
            chunk.owner,
            chunk.item,
        )

    def keep_scores(self, stream: Any) -> None:
        """Sort the chunk's scores by channel."""
        self.forwards.keep_scores(self.arrays.scores, stream)

    def combine(self, weighting: str, stream: Any) -> None:
        """Saliency from the channels and their scores; the weighting is one of WEIGHTINGS."""
        forwards, run, arrays = self.forwards, self.forwards.run, self.arrays
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
        forwards.weighted_channels(self.features, arrays.weights, True, arrays.sums, stream)
        forwards.enlarge(arrays.sums, self.enlargement, self.maps.raw, stream)
        forwards.scale(self.maps, stream)


@dataclass(frozen=True)
class PlaceKernels:
    """Recipro-CAM's kernels.

    Attributes:
        forwards: The kernels of all methods.
        arrays: Recipro-CAM's arrays, in device memory.
        maps: The results, in device memory.
        enlargement: How the scores are enlarged.
        features: [B, C, h · w] float32 or float16, the last layer's feature maps.
    """

    forwards: ForwardKernels
    arrays: Places[Array]
    maps: Maps[Array]
    enlargement: Enlargement
    features: Array

    def isolate(self, stream: Any) -> None:
        """The feature maps of the next chunk."""
        run, chunk = self.forwards.run, self.forwards.chunk
        places.isolate[chunk.item.shape[0], self.forwards.threads.masks, stream](
            run.progress, self.arrays.shown, self.features, chunk.masks, chunk.owner, chunk.item
        )

    def keep_scores(self, stream: Any) -> None:
        """Sort the chunk's scores by place."""
        self.forwards.keep_scores(self.arrays.scores, stream)

    def combine(self, stream: Any) -> None:
        """Saliency from the scores."""
        self.forwards.enlarge(self.arrays.scores, self.enlargement, self.maps.raw, stream)
        self.forwards.scale(self.maps, stream)


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
        forwards.scale(maps, stream)
