"""The cut of Ward's hierarchy (Ha & Youn 2022, eq. 12-16), after building it in one launch."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import (
    ALL_LANES,
    MOST_WARPS,
    WARP,
    Array,
    Number,
    block_sum,
)
from ccam_deploy.kernels.cuda.geometry import CHANNELS, FIRST_CHANNEL, LARGEST_K
from ccam_deploy.kernels.cuda.ward import (
    BEFORE,
    MERGED,
    ORDER,
    PARENT,
    SIZE,
    SLOTS,
    SPREAD,
    STALE,
    build,
)

WORST_QUALITY = -1.0
STATE = SPREAD + 1
"""Rows of `exact` that the ratio needs."""
NAMES = STALE
"""The row of `links` that holds the label of a slot; it is free once the hierarchy stands."""


@cuda.jit
def partition(
    table: Array,
    exact_of_all: Array,
    coarse_of_all: Array,
    links_of_all: Array,
    scales: Array,
    k_range: Array,
    labels: Array,
    counts: Array,
    quality: Array,
    rounds: Array,
) -> None:
    """Build the hierarchy and cut it. One block per layer and pair: grid (L, P).

    exact_of_all, coarse_of_all, links_of_all, scales: from `ward.begin` and `ward.search`.
    k_range: [2] int32, k_min and k_max, the numbers of collections to try.
    labels: [P, channels] int32, collections numbered by their first channel.   counts: [P, L]
    int32, the number of collections, left 0 where a statistic is not finite.   quality:
    [P, L, n] float32, n > k_max - k_min, the mean dispersion-separation ratio of each number of
    collections from k_min on, -1 where there is none.   rounds: [P, L] int32, the rounds of
    merging.
    """
    top = cuda.shared.array(LARGEST_K, np.int32)
    layer, pair = cuda.blockIdx.x, cuda.blockIdx.y
    first, channels = table[layer, FIRST_CHANNEL], table[layer, CHANNELS]
    k_min, k_max = k_range[0], k_range[1]
    for place in range(cuda.threadIdx.x, quality.shape[2], cuda.blockDim.x):
        quality[pair, layer, place] = WORST_QUALITY
    sound = counts[pair, layer] != 0
    cuda.syncthreads()
    if not sound:
        for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
            labels[pair, first + channel] = 0
        return
    start = pair * labels.shape[1] + first
    exact = exact_of_all[:, start : start + channels]
    coarse = coarse_of_all[:, start : start + channels]
    links = links_of_all[:, start : start + channels]
    turns = build(exact, coarse, links, scales[pair, layer])
    largest = min(k_max, distinct(exact, links))
    highest_merges(exact, links, largest - 1, top)
    count = choose(exact, links, top, k_min, largest, quality[pair, layer])
    number(links, top, count, labels[pair, first : first + channels])
    if cuda.threadIdx.x == 0:
        counts[pair, layer] = count
        rounds[pair, layer] = turns


@cuda.jit(device=True)
def distinct(exact: Array, links: Array) -> int:
    """The number of distinct channels: one more than the merges that are not at height 0."""
    scratch = cuda.shared.array(MOST_WARPS, np.int32)
    own = np.int32(0)
    for slot in range(cuda.threadIdx.x, links.shape[1], cuda.blockDim.x):
        if links[PARENT, slot] >= 0 and exact[MERGED, slot] > 0:
            own += np.int32(1)
    return int(1 + block_sum(own, scratch))


@cuda.jit(device=True)
def highest_merges(exact: Array, links: Array, count: int, top: Array) -> None:
    """Write the slots that the last `count` merges took away, the last merge first."""
    heights = cuda.shared.array(MOST_WARPS, np.float64)
    orders = cuda.shared.array(MOST_WARPS, np.int32)
    warp, warps = cuda.threadIdx.x // WARP, cuda.blockDim.x // WARP
    before_height, before_order = math.inf, np.int32(0)
    for place in range(count):
        height, order = -1.0, np.int32(0)
        for slot in range(cuda.threadIdx.x, links.shape[1], cuda.blockDim.x):
            if links[PARENT, slot] >= 0:
                its_height, its_order = exact[MERGED, slot], links[ORDER, slot]
                if later(before_height, before_order, its_height, its_order) and later(
                    its_height, its_order, height, order
                ):
                    height, order = its_height, its_order
        step = WARP >> 1
        while step > 0:
            its_height = cuda.shfl_xor_sync(ALL_LANES, height, step)
            its_order = cuda.shfl_xor_sync(ALL_LANES, order, step)
            if later(its_height, its_order, height, order):
                height, order = its_height, its_order
            step >>= 1
        cuda.syncthreads()
        if cuda.laneid == 0:
            heights[warp] = height
            orders[warp] = order
        cuda.syncthreads()
        for other in range(warps):
            if later(heights[other], orders[other], height, order):
                height, order = heights[other], orders[other]
        before_height, before_order = height, order
        if cuda.threadIdx.x == 0:
            top[place] = order % SLOTS
    cuda.syncthreads()


@cuda.jit(device=True)
def later(height: float, order: int, other_height: float, other_order: int) -> bool:
    """Whether the first merge comes after the second."""
    return height > other_height or (height == other_height and order > other_order)


@cuda.jit(device=True)
def choose(exact: Array, links: Array, top: Array, k_min: int, largest: int, quality: Array) -> int:
    """Undo the last merges one by one; return the number of collections of the best ratio.

    largest: the number of collections to stop at.   quality: from k_min on, written.
    The smallest of equally good numbers is taken.
    """
    state = cuda.shared.array((STATE, LARGEST_K), np.float64)
    slots = cuda.shared.array(LARGEST_K, np.int32)
    ratios = cuda.shared.array(LARGEST_K, np.float64)
    thread = cuda.threadIdx.x
    best, chosen = -math.inf, 1
    for count in range(1, largest + 1):
        if count == 1:
            if thread == 0:
                slots[0] = 0
            if thread < STATE:
                state[thread, 0] = exact[thread, 0]
        else:
            added = top[count - 2]
            if thread < count - 1 and slots[thread] == links[PARENT, added]:
                for row in range(STATE):
                    state[row, thread] = exact[BEFORE + row, added]
            if thread == count - 1:
                slots[thread] = added
                for row in range(STATE):
                    state[row, thread] = exact[row, added]
        cuda.syncthreads()
        if count > 1 and thread < count:
            ratios[thread] = ratio(state, thread, count)
        cuda.syncthreads()
        if count >= min(k_min, largest):
            mean = WORST_QUALITY
            if count > 1:
                mean = 0.0
                for cluster in range(count):
                    mean += ratios[cluster]
                mean /= count
            if mean > best:
                best, chosen = mean, count
            if thread == 0 and count >= k_min:
                quality[count - k_min] = mean
    return chosen


@cuda.jit(device=True)
def ratio(state: Array, own: int, count: int) -> Number:
    """One cluster's dispersion-separation ratio (eq. 12-14)."""
    separation = math.inf
    for other in range(count):
        if other != own:
            gap = 0.0
            for axis in range(4):
                difference = state[axis, own] - state[axis, other]
                gap += difference * difference
            separation = min(separation, gap)
    dispersion = state[SPREAD, own] / state[SIZE, own]
    total = separation + dispersion
    if total > 0:
        return (separation - dispersion) / total
    return 0.0


@cuda.jit(device=True)
def number(links: Array, top: Array, count: int, labels: Array) -> None:
    """Label each channel by the rank of its cluster's slot, which is its first channel."""
    names = links[NAMES]
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    for slot in range(thread, names.shape[0], threads):
        names[slot] = -1
    cuda.syncthreads()
    if thread == 0:
        names[0] = 0
    if thread < count - 1:
        before = 1
        for other in range(count - 1):
            if top[other] < top[thread]:
                before += 1
        names[top[thread]] = before
    cuda.syncthreads()
    for channel in range(thread, labels.shape[0], threads):
        slot = channel
        while names[slot] < 0:
            slot = links[PARENT, slot]
        labels[channel] = names[slot]
