"""The arrays of methods on a device but for Collection-CAM's, in typed groups.

B counts images, P pairs of an image and a class, n the rows of a chunk, which are images under
masks, or feature maps; h×w is a feature map's size, H×W the input's. Numba is not needed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.kernels.cuda.buffers import ArrayGroup, Spec, T
from ccam_deploy.kernels.cuda.geometry import MAP_PARTS, neighbours

NEXT, ROWS, PAIRS, SHOWN = range(4)
"""Elements of `progress`: the first row of the next chunk, and the numbers of rows, of pairs and of
images shown in a run."""


@dataclass(frozen=True)
class RunInputs(ArrayGroup[T]):
    """What a run uploads, for each method.

    Attributes:
        progress: [4] int32, the run's state; the kernels advance its NEXT.
        pair_owner: [P] int32, the image of each pair.
        targets: [P] int64, the class of each pair.
    """

    progress: T
    pair_owner: T
    targets: T


@dataclass(frozen=True)
class Chunk(ArrayGroup[T]):
    """One launch of the classifier, or of its head, of n rows.

    Attributes:
        masks: [n, H · W] float32 or float16, in [0, 1]; for the head feature maps, [n, C · h · w].
        owner: [n] int64, the image of each row.
        logits: [n, classes] float32 or float16.
        item: [n] int32, the mask of each row among the method's; -1 for padding.
        scores: [P, n] float32, of the rows that show the pair's image.
    """

    masks: T
    owner: T
    logits: T
    item: T
    scores: T


@dataclass(frozen=True)
class Maps(ArrayGroup[T]):
    """Results for P pairs.

    Attributes:
        raw: [P, H · W] float32, the saliency before it is scaled.
        saliency: [P, H · W] float32, in [0, 1].
        extremes: [P, MAP_PARTS, 2] float32, the least and the greatest value of a part of each map.
    """

    raw: T
    saliency: T
    extremes: T


@dataclass(frozen=True)
class Lines(ArrayGroup[T]):
    """The source lines that each row and column of enlarged maps lies between.

    Attributes:
        low: [H + W] int32, rows before columns; see Geometry.interpolation.
        share: [H + W] float32.
    """

    low: T
    share: T


@dataclass(frozen=True)
class Spread(ArrayGroup[T]):
    """How much the channels of a layer vary over each image.

    Attributes:
        varied: [B, C] uint8, 1 where a channel is not flat.
        spread: [B, C] float64, its standard deviation; not finite where a value of it is not.
    """

    varied: T
    spread: T


@dataclass(frozen=True)
class LayerMaps(ArrayGroup[T]):
    """What gradients make of a layer of C channels.

    Attributes:
        weights: [P, C] float32, of the channels; not written where each place has its own.
        sums: [P, h · w] float32, the weighted sums of the channels.
    """

    weights: T
    sums: T


@dataclass(frozen=True)
class Channels(ArrayGroup[T]):
    """Score-CAM's arrays, for a layer of C channels.

    Attributes:
        rows: [B · C, 2] int32, the image and the channel of each row of a run.
        chosen: [B, C] uint8, 1 where a channel has a row.
        base: [P] float32, the score of an input of zeros.
        scores: [P, C] float32, of the channels that are chosen.
        weights: [P, C] float32, 0 for other channels.
        gains: [P, C] float32, how much the scores exceed the base; 0 for other channels.
        sums: [P, h · w] float32, the weighted sums of the channels, negative values cut off.
    """

    rows: T
    chosen: T
    base: T
    scores: T
    weights: T
    gains: T
    sums: T


@dataclass(frozen=True)
class Grids(ArrayGroup[T]):
    """RISE's arrays, for N masks of random cells.

    Attributes:
        cells: [N, cells · cells] uint8, 0 or 1.
        corners: [N, 2] int32, the row and the column where a mask is cut out.
        shown: [B] int32, the images of a run.
        total: [P, H · W] float64, the sum of the masks times their scores.
    """

    cells: T
    corners: T
    shown: T
    total: T


@dataclass(frozen=True)
class Places(ArrayGroup[T]):
    """Recipro-CAM's arrays.

    Attributes:
        shown: [B] int32, the images of a run.
        scores: [P, h · w] float32, of each place.
    """

    shown: T
    scores: T


def run_specs(pairs: int) -> RunInputs[Spec]:
    """The inputs of runs of at most `pairs` pairs."""
    return RunInputs(
        progress=Spec((4,), np.int32),
        pair_owner=Spec((pairs,), np.int32),
        targets=Spec((pairs,), np.int64),
    )


def chunk_specs(rows: int, pairs: int, masks: Spec, logits: Spec) -> Chunk[Spec]:
    """The arrays of one chunk.

    Args:
        rows: n.
        pairs: The most pairs.
        masks: What the graph takes in each row, [n, ...].
        logits: Its output.
    """
    return Chunk(
        masks=Spec((rows, math.prod(masks.shape[1:])), masks.dtype),
        owner=Spec((rows,), np.int64),
        logits=logits,
        item=Spec((rows,), np.int32),
        scores=Spec((pairs, rows), np.float32),
    )


def map_specs(pairs: int, height: int, width: int) -> Maps[Spec]:
    """The results of runs of at most `pairs` pairs."""
    pixels = height * width
    return Maps(
        raw=Spec((pairs, pixels), np.float32),
        saliency=Spec((pairs, pixels), np.float32),
        extremes=Spec((pairs, MAP_PARTS, 2), np.float32),
    )


def spread_specs(batch: int, channels: int) -> Spread[Spec]:
    """The arrays for at most `batch` images and a layer of so many channels."""
    each = batch, channels
    return Spread(varied=Spec(each, np.uint8), spread=Spec(each, np.float64))


def layer_specs(pairs: int, channels: int, pixels: int) -> LayerMaps[Spec]:
    """The arrays for at most `pairs` pairs and a layer of so many channels and pixels."""
    return LayerMaps(
        weights=Spec((pairs, channels), np.float32), sums=Spec((pairs, pixels), np.float32)
    )


def place_specs(batch: int, pixels: int) -> Places[Spec]:
    """Recipro-CAM's arrays for at most `batch` images and pairs, and `pixels` of a feature map."""
    return Places(shown=Spec((batch,), np.int32), scores=Spec((batch, pixels), np.float32))


def channel_specs(batch: int, channels: int, pixels: int) -> Channels[Spec]:
    """Score-CAM's arrays for at most `batch` images and pairs, and `pixels` of a feature map."""
    each = batch, channels
    return Channels(
        rows=Spec((batch * channels, 2), np.int32),
        chosen=Spec(each, np.uint8),
        base=Spec((batch,), np.float32),
        scores=Spec(each, np.float32),
        weights=Spec(each, np.float32),
        gains=Spec(each, np.float32),
        sums=Spec((batch, pixels), np.float32),
    )


def grid_specs(batch: int, masks: int, cells: int, pixels: int) -> Grids[Spec]:
    """RISE's arrays for at most `batch` images and pairs, and `pixels` of the input."""
    return Grids(
        cells=Spec((masks, cells * cells), np.uint8),
        corners=Spec((masks, 2), np.int32),
        shown=Spec((batch,), np.int32),
        total=Spec((batch, pixels), np.float64),
    )


def enlarged(source: tuple[int, int], target: tuple[int, int]) -> Lines[NDArray[np.generic]]:
    """Find the lines between which those of enlarged maps lie.

    Args:
        source: Height and width of a small map.
        target: Height and width of the large one.

    Returns:
        The arrays on the host.
    """
    rows, columns = map(neighbours, source, target)
    low, share = (np.concatenate(parts) for parts in zip(rows, columns, strict=True))
    return Lines(low=low.astype(np.int32), share=share.astype(np.float32))
