"""Masks weighted by the softmax of their scores (Ha & Youn 2022, eq. 24, 25)."""

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
def weighted_sum(
    starts: Array, weights: Array, masks: Array, layers: int, raw: Array, extremes: Array
) -> None:
    """Add up each pair's masks by their weights, with a ReLU. Grid (parts, P).

    Args:
        starts: [P · L + 1] int32, from `masks.index_masks`.
        weights: [n] float32.
        masks: [n, H · W] float32 or float16, in [0, 1].
        layers: L.
        raw: [P, H · W] float32, written; zeros for a pair without a mask.
        extremes: [P, MAP_PARTS, 2] float32, written: the least and the greatest value of each part.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float32)
    pair = cuda.blockIdx.y
    start, end = starts[pair * layers], starts[(pair + 1) * layers]
    low, high = INFINITY, -INFINITY
    for pixel in range(cuda.grid(1), masks.shape[1], cuda.gridDim.x * cuda.blockDim.x):
        total, mask = np.float32(0), start
        while mask + 3 < end:  # so that four are loaded at a time
            one = factors(weights, masks, mask, pixel)
            two = factors(weights, masks, mask + 1, pixel)
            three = factors(weights, masks, mask + 2, pixel)
            four = factors(weights, masks, mask + 3, pixel)
            total += one[0] * one[1]
            total += two[0] * two[1]
            total += three[0] * three[1]
            total += four[0] * four[1]
            mask += 4
        while mask < end:
            one = factors(weights, masks, mask, pixel)
            total += one[0] * one[1]
            mask += 1
        total = max(total, np.float32(0))
        raw[pair, pixel] = total
        low, high = min(low, total), max(high, total)
    keep_extremes(low, high, scratch, extremes[pair, cuda.blockIdx.x])


@cuda.jit(device=True)
def factors(weights: Array, masks: Array, mask: int, pixel: int) -> tuple[Number, Number]:
    """A mask's weight, 0 where it takes none or is undefined, and its value, which is finite."""
    weight = weights[np.uint32(mask)]
    value = np.float32(masks[np.uint32(mask), pixel])
    return weight if weight > 0 else np.float32(0), value


@kernel
def find_extremes(maps: Array, extremes: Array) -> None:
    """Find the least and the greatest value of each part of each map. Grid (parts, P).

    Args:
        maps: [P, H · W] float32.
        extremes: [P, MAP_PARTS, 2] float32, written.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float32)
    source = maps[cuda.blockIdx.y]
    low, high = INFINITY, -INFINITY
    for pixel in range(cuda.grid(1), source.shape[0], cuda.gridDim.x * cuda.blockDim.x):
        low, high = min(low, source[pixel]), max(high, source[pixel])
    keep_extremes(low, high, scratch, extremes[cuda.blockIdx.y, cuda.blockIdx.x])


@cuda.jit(device=True)
def keep_extremes(low: float, high: float, scratch: Array, extremes: Array) -> None:
    """Write the least and the greatest value of a block's threads to [2] float32."""
    low, high = block_min(low, scratch), block_max(high, scratch)
    if cuda.threadIdx.x == 0:
        extremes[0], extremes[1] = low, high


@kernel
def min_max(maps: Array, extremes: Array, scaled: Array) -> None:
    """Scale each map to [0, 1]; a flat map becomes zeros. Grid (parts, P).

    Args:
        maps: [P, H · W] float32.
        extremes: [P, MAP_PARTS, 2] float32, from a grid of as many parts.
        scaled: [P, H · W] float32, written.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float32)
    pair, parts = cuda.blockIdx.y, cuda.gridDim.x
    low, high = INFINITY, -INFINITY
    for part in range(cuda.threadIdx.x, parts, cuda.blockDim.x):
        low, high = min(low, extremes[pair, part, 0]), max(high, extremes[pair, part, 1])
    low, high = block_min(low, scratch), block_max(high, scratch)
    source, target, span = maps[pair], scaled[pair], high - low
    for pixel in range(cuda.grid(1), source.shape[0], parts * cuda.blockDim.x):
        target[pixel] = (source[pixel] - low) / span if span > 0 else np.float32(0)
