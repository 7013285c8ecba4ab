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
)
from ccam_deploy.kernels.cuda.geometry import TILE
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.layer_table import layer_of_tile, layer_row


@kernel
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
    """Add up the channels of each collection, and scale the sums to a maximum of 1.

    One block per tile, collection and pair: grid (tiles, k_max, P), at most 1,024 threads. A lane
    takes a pixel, a warp a share of the channels. The block that finishes a map scales it.

    Args:
        table: [L, 8] int64.
        features: 1-D, float32 or float16.
        gradients: 1-D, float32 or float16.
        owner: [P] int32, the image of each pair.
        psi: [P, channels, 4] float32, whose mean gradients weigh the final layer's channels.
        labels: [P, channels] int32, the collections.
        counts: [P, L] int32, their numbers.
        unscaled: [P, k_max · pixels] float64, written: the sums before they are scaled.
        finished: [P, L, k_max] int32, zeros before and after: counts the tiles that are done.
        sums: [P, k_max · pixels] float32, written; of a pair, layer by layer, [count, h, w], in
            [0, 1].
    """
    parts = cuda.shared.array((MOST_WARPS, TILE), np.float64)
    scratch = cuda.shared.array(MOST_WARPS, np.float64)
    tile, collection, pair = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
    layer = layer_of_tile(table, tile)
    if collection >= counts[pair, layer]:
        return
    lane, warp, warps = cuda.laneid, cuda.threadIdx.x // WARP, cuda.blockDim.x // WARP
    row = layer_row(table, layer)
    count, channels, first = row.height * row.width, row.channels, row.first_channel
    pixel = (tile - row.first_tile) * TILE + lane
    feature = row.features + owner[pair] * channels * count + pixel
    gradient = row.gradients + pair * channels * count + pixel
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
    start = (cuda.gridDim.y * row.first_pixel) + collection * count
    if warp == 0 and pixel < count:
        for other in range(1, warps):
            total += parts[other, lane]
        unscaled[pair, start + pixel] = max(total, 0.0)

    if is_last(finished[pair, layer], collection, (count + TILE - 1) // TILE):
        pixels = slice(start, start + count)
        scale(unscaled[pair, pixels], sums[pair, pixels], scratch)


@cuda.jit(device=True)
def is_last(finished: Array, collection: int, tiles: int) -> bool:
    """Count a tile of a map as done; tell the block that is the last, which sees all of the map."""
    ticket = cuda.shared.array(1, np.int32)
    cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        ticket[0] = cuda.atomic.add(finished, collection, 1)
    cuda.syncthreads()
    if ticket[0] != tiles - 1:
        return False
    cuda.threadfence()
    finished[collection] = 0
    return True


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
