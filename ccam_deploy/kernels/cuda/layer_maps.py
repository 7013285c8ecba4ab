"""Maps of a layer's size: sums of its channels, and how they come to the size of the input."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import MOST_WARPS, WARP, Array, block_max
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.masks import bilinear, corners
from ccam_deploy.kernels.cuda.row_buffers import PAIRS

INFINITY = np.float32(np.inf)
UNDEFINED = np.float32(np.nan)


@kernel
def weighted_channels(
    progress: Array, pair_owner: Array, features: Array, weights: Array, relu: int, sums: Array
) -> None:
    """Add up each pair's channels by their weights.

    One block per WARP pixels and pair, of at most 1,024 threads: grid (tiles, P). A lane takes a
    pixel, a warp a share of the channels.

    Args:
        progress: [4] int32; see `row_buffers`.
        pair_owner: [P] int32, the image of each pair.
        features: [B, C, h · w] float32 or float16.
        weights: [P, C] float32.
        relu: 1 to cut negative sums off, else 0.
        sums: [P, h · w] float32, written; NaN where a sum is not finite.
    """
    pair = cuda.blockIdx.y
    if pair >= progress[PAIRS]:
        return
    image = pair_owner[pair]
    pixel, first, step = share_of_block()
    total = 0.0
    if pixel < sums.shape[1]:
        for channel in range(first, features.shape[1], step):
            value = np.float64(np.float32(features[image, channel, pixel]))
            total += np.float64(weights[pair, channel]) * value
    put_sum(total, relu, pixel, sums[pair])


@kernel
def positive_gradients(
    progress: Array,
    pair_owner: Array,
    features: Array,
    gradients: Array,
    inverse_scale: float,
    relu: int,
    sums: Array,
) -> None:
    """Add up each pair's channels, each place times its positive gradient (Jiang et al. 2021).

    The grid is that of `weighted_channels`.

    Args:
        progress: [4] int32; see `row_buffers`.
        pair_owner: [P] int32, the image of each pair.
        features: [B, C, h · w] float32 or float16.
        gradients: [P, C, h · w] float32 or float16.
        inverse_scale: A float64 that gradients are multiplied by.
        relu: 1 to cut negative sums off, else 0.
        sums: [P, h · w] float32, written; NaN where a sum is not finite.
    """
    pair = cuda.blockIdx.y
    if pair >= progress[PAIRS]:
        return
    image = pair_owner[pair]
    pixel, first, step = share_of_block()
    total = 0.0
    if pixel < sums.shape[1]:
        for channel in range(first, features.shape[1], step):
            slope = np.float64(np.float32(gradients[pair, channel, pixel]))
            if slope < 0:  # unlike max(), this lets NaN through
                slope = np.float64(0)
            total += slope * np.float64(np.float32(features[image, channel, pixel]))
    put_sum(total * inverse_scale, relu, pixel, sums[pair])


@kernel
def lift(progress: Array, gamma: float, sums: Array) -> None:
    """Scale each map, none of it negative, to a maximum of 1, and lift small values by a tanh.

    One block per pair.

    Args:
        progress: [4] int32; see `row_buffers`.
        gamma: A float32, how strongly small values are lifted; 0 for not at all.
        sums: [P, h · w] float32, changed; NaN stays.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float32)
    pair = cuda.blockIdx.x
    if pair >= progress[PAIRS]:
        return
    values, thread, threads = sums[pair], cuda.threadIdx.x, cuda.blockDim.x
    highest = np.float32(0)
    for place in range(thread, values.shape[0], threads):
        highest = max(highest, values[place])
    highest = block_max(highest, scratch)
    if highest > 0:
        for place in range(thread, values.shape[0], threads):
            value = values[place] / highest
            if gamma > 0:
                value = math.tanh(gamma * value)
            values[place] = value


@kernel
def enlarge(
    progress: Array,
    sums: Array,
    low: Array,
    share: Array,
    shape: tuple[int, int],
    fused: int,
    raw: Array,
) -> None:
    """Interpolate each pair's map to the size of the input. Grid (any, P).

    Args:
        progress: [4] int32; see `row_buffers`.
        sums: [P, h · w] float32.
        low: [H + W] int32; see `row_buffers.enlarged`.
        share: [H + W] float32.
        shape: H and w.
        fused: 1 to keep what `raw` holds where that is larger or NaN, else 0.
        raw: [P, H · W] float32, written.
    """
    pair = cuda.blockIdx.y
    if pair >= progress[PAIRS]:
        return
    height = shape[0]
    width, source = low.shape[0] - height, (sums[pair], shape[1])
    first = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    for pixel in range(first, raw.shape[1], cuda.gridDim.x * cuda.blockDim.x):
        row, column = pixel // width, height + pixel % width
        around = corners(source, low[row], low[column])
        value = bilinear(around, share[row], share[column])
        if fused != 0:
            before = raw[pair, pixel]
            if before > value or math.isnan(before):
                value = before
        raw[pair, pixel] = value


@cuda.jit(device=True)
def share_of_block() -> tuple[int, int, int]:
    """A thread's part of a block's sums: its pixel, its first channel, and how far to the next."""
    pixel = cuda.blockIdx.x * WARP + cuda.laneid
    return pixel, cuda.threadIdx.x // WARP, cuda.blockDim.x // WARP


@cuda.jit(device=True)
def put_sum(total: float, relu: int, pixel: int, sums: Array) -> None:
    """Write the sum of what the warps of a block have added up for a pixel.

    Every thread of the block calls this, the lanes of a warp for a pixel each.
    """
    parts = cuda.shared.array((MOST_WARPS, WARP), np.float64)
    warp, lane = cuda.threadIdx.x // WARP, cuda.laneid
    parts[warp, lane] = total
    cuda.syncthreads()
    if warp == 0 and pixel < sums.shape[0]:
        for other in range(1, cuda.blockDim.x // WARP):
            total += parts[other, lane]
        value = np.float32(total)
        if not abs(value) < INFINITY:
            value = UNDEFINED  # an infinite one could be cut off
        elif relu != 0 and value < 0:
            value = np.float32(0)
        sums[pixel] = value
