"""Collection sums (Ha & Youn 2022, eq. 17-20), for all layers and pairs in one launch."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import (
    MOST_WARPS,
    WARP,
    Array,
    block_max,
    block_min,
    part_of,
)
from ccam_deploy.kernels.cuda.geometry import (
    CHANNELS,
    FEATURES,
    FIRST_CHANNEL,
    FIRST_PIXEL,
    FIRST_TILE,
    GRADIENTS,
    HEIGHT,
    TILE,
    WIDTH,
)


@cuda.jit
def collection_sums(
    table: Array,
    features: Array,
    gradients: Array,
    owner: Array,
    psi: Array,
    labels: Array,
    counts: Array,
    unscaled: Array,
    finished: Array,
    sums: Array,
) -> None:
    """One block per tile, collection and pair: grid (tiles, k_max, P), at most 1,024 threads.

    features, gradients: 1-D, float32 or float16.   owner: [P] int32, the image of each pair.
    psi: [P, channels, 4] float32, whose mean gradients weigh the final layer's channels.
    labels: [P, channels] int32.   counts: [P, L] int32.
    unscaled: [P, k_max · pixels] float64, for the sums before they are scaled.   finished:
    [P, L, k_max] int32, zeros, and zeros again afterwards: the tiles that are done.
    sums: [P, k_max · pixels] float32; of a pair, layer by layer, [count, h, w], in [0, 1].

    A lane takes a pixel, a warp a share of the channels. The block that finishes a map scales it.
    """
    parts = cuda.shared.array((MOST_WARPS, TILE), np.float64)
    scratch = cuda.shared.array(MOST_WARPS, np.float64)
    ticket = cuda.shared.array(1, np.int32)
    tile, collection, pair = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
    layer = part_of(table, FIRST_TILE, tile)
    if collection >= counts[pair, layer]:
        return
    lane, warp, warps = cuda.laneid, cuda.threadIdx.x // WARP, cuda.blockDim.x // WARP
    count, channels = table[layer, HEIGHT] * table[layer, WIDTH], table[layer, CHANNELS]
    first = table[layer, FIRST_CHANNEL]
    pixel = (tile - table[layer, FIRST_TILE]) * TILE + lane
    feature = table[layer, FEATURES] + owner[pair] * channels * count + pixel
    gradient = table[layer, GRADIENTS] + pair * channels * count + pixel
    final = layer + 1 == table.shape[0]

    total = 0.0
    if pixel < count:
        for channel in range(warp, channels, warps):
            if labels[pair, first + channel] == collection:
                if final:
                    weight = np.float64(psi[pair, first + channel, 2])
                    total += weight * np.float64(features[feature + channel * count])
                elif gradients[gradient + channel * count] > 0:
                    total += np.float64(features[feature + channel * count])
    parts[warp, lane] = total
    cuda.syncthreads()
    start = (cuda.gridDim.y * table[layer, FIRST_PIXEL]) + collection * count
    if warp == 0 and pixel < count:
        for other in range(1, warps):
            total += parts[other, lane]
        unscaled[pair, start + pixel] = max(total, 0.0)

    cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        ticket[0] = cuda.atomic.add(finished, (pair, layer, collection), 1)
    cuda.syncthreads()
    if ticket[0] == (count + TILE - 1) // TILE - 1:
        cuda.threadfence()
        finished[pair, layer, collection] = 0
        own = slice(start, start + count)
        scale(unscaled[pair, own], sums[pair, own], scratch)


@cuda.jit(device=True)
def scale(values: Array, scaled: Array, scratch: Array) -> None:
    """Scale a map, none of it negative, to a maximum of 1; a flat map becomes zeros."""
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    low, high = math.inf, 0.0
    for pixel in range(thread, values.shape[0], threads):
        low = min(low, values[pixel])
        high = max(high, values[pixel])
    low, high = block_min(low, scratch), block_max(high, scratch)
    for pixel in range(thread, values.shape[0], threads):
        scaled[pixel] = values[pixel] / high if high > low else 0.0
