"""Score-CAM (Wang et al. 2020): masks of single channels, and the channels' weights."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import (
    MOST_WARPS,
    Array,
    Number,
    block_max,
    block_min,
    block_sum,
)
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.masks import walker
from ccam_deploy.kernels.cuda.row_buffers import NEXT, PAIRS, ROWS
from ccam_deploy.kernels.cuda.rows import pad

INFINITY = np.float32(np.inf)
INCREASE, SCORE, SOFTMAX = range(3)
"""What weighs a channel: its gain, its score, or the softmax of the scores."""


@kernel
def channel_spread(features: Array, varied: Array, spread: Array) -> None:
    """Find flat channels, and how much each varies. One block per channel and image: grid (C, B).

    Args:
        features: [B, C, h · w] float32 or float16.
        varied: [B, C] uint8, written: 1 where a channel is not flat.
        spread: [B, C] float64, written: the standard deviation; not finite where a value is not.
    """
    sums = cuda.shared.array(MOST_WARPS, np.float64)
    bounds = cuda.shared.array(MOST_WARPS, np.float32)
    channel, image = cuda.blockIdx.x, cuda.blockIdx.y
    values = features[image, channel]
    total, low, high = 0.0, INFINITY, -INFINITY
    for place in range(cuda.threadIdx.x, values.shape[0], cuda.blockDim.x):
        value = np.float32(values[place])
        total += np.float64(value)
        low, high = min(low, value), max(high, value)
    mean = block_sum(total, sums) / values.shape[0]
    low, high = block_min(low, bounds), block_max(high, bounds)
    total = 0.0
    for place in range(cuda.threadIdx.x, values.shape[0], cuda.blockDim.x):
        centred = np.float64(np.float32(values[place])) - mean
        total += centred * centred
    total = block_sum(total, sums)
    if cuda.threadIdx.x == 0:
        varied[image, channel] = 1 if high > low else 0
        spread[image, channel] = math.sqrt(total / values.shape[0])


@kernel
def render_channels(
    progress: Array,
    rows: Array,
    features: Array,
    low: Array,
    share: Array,
    shape: tuple[int, int],
    masks: Array,
    owner: Array,
    item: Array,
) -> None:
    """Enlarge a chunk's channels and scale each to [0, 1]. One block per row.

    Args:
        progress: [4] int32; see `row_buffers`.
        rows: [B · C, 2] int32, the image and the channel of each row of a run.
        features: [B, C, h · w] float32 or float16.
        low: [H + W] int32; see `row_buffers.enlarged`.
        share: [H + W] float32.
        shape: H and w.
        masks: [n, H · W] float32 or float16, written, in [0, 1]; zeros for a flat channel.
        owner: [n] int64, written: the image of each row.
        item: [n] int32, written: the channel of each row; -1 for padding.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float32)
    row = cuda.blockIdx.x
    place = progress[NEXT] + row
    if place >= progress[ROWS]:
        pad(row, masks, owner, item)
        return
    image, channel = rows[place, 0], rows[place, 1]
    source = features[image, channel], shape[1]
    bounds = walk_and_bound(source, low, share, shape[0], (INFINITY, -INFINITY), 0)
    lowest, highest = block_min(bounds[0], scratch), block_max(bounds[1], scratch)
    constants = masks[row], lowest, highest - lowest
    walk_and_scale(source, low, share, shape[0], 0, constants)
    if cuda.threadIdx.x == 0:
        owner[row] = image
        item[row] = channel


@kernel
def channel_weights(
    progress: Array,
    pair_owner: Array,
    chosen: Array,
    base: Array,
    scores: Array,
    weighting: int,
    weights: Array,
    gains: Array,
) -> None:
    """Weigh the channels of each pair by their scores. One block per pair.

    Args:
        progress: [4] int32; see `row_buffers`.
        pair_owner: [P] int32, the image of each pair.
        chosen: [B, C] uint8, 1 where a channel was scored.
        base: [P] float32, the score of an input of zeros.
        scores: [P, C] float32.
        weighting: INCREASE, SCORE or SOFTMAX.
        weights: [P, C] float32, written; 0 for channels that were not scored.
        gains: [P, C] float32, written: score less base; 0 for channels that were not scored.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float64)
    pair = cuda.blockIdx.x
    if pair >= progress[PAIRS]:
        return
    counted, thread, threads = chosen[pair_owner[pair]], cuda.threadIdx.x, cuda.blockDim.x
    highest, total = -math.inf, 0.0
    if weighting == SOFTMAX:
        for channel in range(thread, counted.shape[0], threads):
            if counted[channel] != 0:
                highest = max(highest, np.float64(scores[pair, channel]))
        highest = block_max(highest, scratch)
        for channel in range(thread, counted.shape[0], threads):
            if counted[channel] != 0:
                total += math.exp(np.float64(scores[pair, channel]) - highest)
        total = block_sum(total, scratch)
    for channel in range(thread, counted.shape[0], threads):
        weight, gain = np.float32(0), np.float32(0)
        if counted[channel] != 0:
            weight = scores[pair, channel]
            gain = weight - base[pair]
            if weighting == INCREASE:
                weight = gain
            elif weighting == SOFTMAX:
                weight = np.float32(math.exp(np.float64(weight) - highest) / total)
        weights[pair, channel] = weight
        gains[pair, channel] = gain


@cuda.jit(device=True)
def _bound(
    state: tuple[Number, Number], constants: int, place: int, value: Number
) -> tuple[Number, Number]:
    return min(state[0], value), max(state[1], value)


@cuda.jit(device=True)
def _scale(state: int, constants: tuple[Array, Number, Number], place: int, value: Number) -> int:
    mask, lowest, span = constants
    mask[place] = (value - lowest) / span if span > 0 else np.float32(0)
    return state


walk_and_bound = walker(_bound)
walk_and_scale = walker(_scale)
