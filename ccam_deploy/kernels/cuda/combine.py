"""Masks weighted by the softmax of their scores (Ha & Youn 2022, eq. 24, 25)."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import MOST_WARPS, Array, block_max, block_min, block_sum
from ccam_deploy.kernels.cuda.kept import kernel

INFINITY = np.float32(np.inf)


@kernel
def softmax_weights(starts: Array, scores: Array, flat: Array, layers: int, weights: Array) -> None:
    """Weigh the masks of each pair that are not flat by softmax. One block per pair.

    Args:
        starts: [P · L + 1] int32, from `masks.index_masks`.
        scores: [n] float32, of the masked images.
        flat: [n] uint8, 1 where a mask is all zeros.
        layers: L.
        weights: [n] float32, written; 0 for flat masks.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float64)
    pair = cuda.blockIdx.x
    start, end = starts[pair * layers], starts[(pair + 1) * layers]
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    highest = -math.inf
    for mask in range(start + thread, end, threads):
        if flat[mask] == 0:
            highest = max(highest, np.float64(scores[mask]))
    highest = block_max(highest, scratch)
    total = 0.0
    for mask in range(start + thread, end, threads):
        if flat[mask] == 0:
            total += math.exp(np.float64(scores[mask]) - highest)
    total = block_sum(total, scratch)
    for mask in range(start + thread, end, threads):
        weight = 0.0
        if flat[mask] == 0:
            weight = math.exp(np.float64(scores[mask]) - highest) / total
        weights[mask] = weight


@kernel
def weighted_sum(starts: Array, weights: Array, masks: Array, layers: int, raw: Array) -> None:
    """Add up each pair's masks by their weights, with a ReLU. Grid (any, P).

    Args:
        starts: [P · L + 1] int32, from `masks.index_masks`.
        weights: [n] float32.
        masks: [n, H · W] float32 or float16, in [0, 1].
        layers: L.
        raw: [P, H · W] float32, written; zeros for a pair without a mask.
    """
    pair = cuda.blockIdx.y
    start, end = starts[pair * layers], starts[(pair + 1) * layers]
    first = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    for pixel in range(first, masks.shape[1], cuda.gridDim.x * cuda.blockDim.x):
        total = np.float32(0)
        for mask in range(start, end):
            if weights[mask] > 0:
                total += weights[mask] * np.float32(masks[mask, pixel])
        raw[pair, pixel] = max(total, np.float32(0))


@kernel
def min_max(maps: Array, scaled: Array) -> None:
    """Scale each map to [0, 1]; a flat map becomes zeros. One block per map.

    Args:
        maps: [P, H · W] float32.
        scaled: [P, H · W] float32, written.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float32)
    source, target = maps[cuda.blockIdx.x], scaled[cuda.blockIdx.x]
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    low, high = INFINITY, -INFINITY
    for pixel in range(thread, source.shape[0], threads):
        low = min(low, source[pixel])
        high = max(high, source[pixel])
    low, high = block_min(low, scratch), block_max(high, scratch)
    span = high - low
    for pixel in range(thread, source.shape[0], threads):
        target[pixel] = (source[pixel] - low) / span if span > 0 else np.float32(0)
