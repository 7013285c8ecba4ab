"""The cut of Ward's hierarchy (Ha & Youn 2022, eq. 12-16), after building it in one launch."""

from __future__ import annotations

import math
from typing import NamedTuple

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
from ccam_deploy.kernels.cuda.hierarchy import Exact, Links, coarse_of, exact_of, links_of
from ccam_deploy.kernels.cuda.ward import SLOTS, build

WORST_QUALITY = -1.0


class Cut(NamedTuple):
    """The clusters that are left after the last merges were undone, in shared memory.

    Attributes:
        centroid: [4, LARGEST_K] float64.
        size: [LARGEST_K] float64, the number of channels.
        spread: [LARGEST_K] float64, the sum of squared distances to the centroid.
    """

    centroid: Array
    size: Array
    spread: Array


@cuda.jit
def partition(
    table: Array,
    all_exact: Array,
    all_coarse: Array,
    all_links: Array,
    scales: Array,
    k_range: Array,
    labels: Array,
    counts: Array,
    quality: Array,
    rounds: Array,
) -> None:
    """Build the hierarchy and cut it. One block per layer and pair: grid (L, P).

    all_exact, all_coarse, all_links, scales: from `ward.begin` and `ward.search`.
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
    exact = exact_of(all_exact, start, start + channels)
    coarse = coarse_of(all_coarse, start, start + channels)
    links = links_of(all_links, start, start + channels)
    turns = build(exact, coarse, links, scales[pair, layer])
    largest = min(k_max, distinct(exact, links))
    highest_merges(exact, links, largest - 1, top)
    count = choose(exact, links, top, k_min, largest, quality[pair, layer])
    number(links, top, count, labels[pair, first : first + channels])
    if cuda.threadIdx.x == 0:
        counts[pair, layer] = count
        rounds[pair, layer] = turns


@cuda.jit(device=True)
def distinct(exact: Exact, links: Links) -> int:
    """The number of distinct channels: one more than the merges that are not at height 0."""
    scratch = cuda.shared.array(MOST_WARPS, np.int32)
    merges = np.int32(0)
    for slot in range(cuda.threadIdx.x, links.parent.shape[0], cuda.blockDim.x):
        if links.parent[slot] >= 0 and exact.merge_height[slot] > 0:
            merges += np.int32(1)
    return int(1 + block_sum(merges, scratch))


@cuda.jit(device=True)
def highest_merges(exact: Exact, links: Links, count: int, top: Array) -> None:
    """Write the slots that the last `count` merges took away, the last merge first."""
    heights = cuda.shared.array(MOST_WARPS, np.float64)
    orders = cuda.shared.array(MOST_WARPS, np.int32)
    warp, warps = cuda.threadIdx.x // WARP, cuda.blockDim.x // WARP
    before_height, before_order = math.inf, np.int32(0)
    for place in range(count):
        height, order = -1.0, np.int32(0)
        for slot in range(cuda.threadIdx.x, links.parent.shape[0], cuda.blockDim.x):
            if links.parent[slot] >= 0:
                its_height, its_order = exact.merge_height[slot], links.order[slot]
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
def choose(exact: Exact, links: Links, top: Array, k_min: int, largest: int, quality: Array) -> int:
    """Undo the last merges one by one; return the number of collections of the best ratio.

    largest: the number of collections to stop at.   quality: from k_min on, written.
    The smallest of equally good numbers is taken.
    """
    centroid = cuda.shared.array((4, LARGEST_K), np.float64)
    size = cuda.shared.array(LARGEST_K, np.float64)
    spread = cuda.shared.array(LARGEST_K, np.float64)
    clusters = Cut(centroid, size, spread)
    slots = cuda.shared.array(LARGEST_K, np.int32)
    ratios = cuda.shared.array(LARGEST_K, np.float64)
    thread = cuda.threadIdx.x
    best, best_count = -math.inf, 1
    for count in range(1, largest + 1):
        if count == 1:
            if thread == 0:
                slots[0] = 0
                put(clusters, 0, exact.centroid, exact.size, exact.spread, 0)
        else:
            added = top[count - 2]
            if thread < count - 1 and slots[thread] == links.parent[added]:
                put(clusters, thread, exact.old_centroid, exact.old_size, exact.old_spread, added)
            if thread == count - 1:
                slots[thread] = added
                put(clusters, thread, exact.centroid, exact.size, exact.spread, added)
        cuda.syncthreads()
        if count > 1 and thread < count:
            ratios[thread] = ratio(clusters, thread, count)
        cuda.syncthreads()
        if count >= min(k_min, largest):
            mean = WORST_QUALITY
            if count > 1:
                mean = 0.0
                for cluster in range(count):
                    mean += ratios[cluster]
                mean /= count
            if mean > best:
                best, best_count = mean, count
            if thread == 0 and count >= k_min:
                quality[count - k_min] = mean
    return best_count


@cuda.jit(device=True)
def put(clusters: Cut, place: int, centroid: Array, size: Array, spread: Array, slot: int) -> None:
    """Write a slot's cluster to a place of the cut."""
    for axis in range(4):
        clusters.centroid[axis, place] = centroid[axis, slot]
    clusters.size[place] = size[slot]
    clusters.spread[place] = spread[slot]


@cuda.jit(device=True)
def ratio(clusters: Cut, place: int, count: int) -> Number:
    """The dispersion-separation ratio of one of `count` clusters (eq. 12-14)."""
    separation = math.inf
    for other in range(count):
        if other != place:
            gap = 0.0
            for axis in range(4):
                difference = clusters.centroid[axis, place] - clusters.centroid[axis, other]
                gap += difference * difference
            separation = min(separation, gap)
    dispersion = clusters.spread[place] / clusters.size[place]
    total = separation + dispersion
    if total > 0:
        return (separation - dispersion) / total
    return 0.0


@cuda.jit(device=True)
def number(links: Links, top: Array, count: int, labels: Array) -> None:
    """Label each channel by the rank of its cluster's slot, which is its first channel."""
    names = links.stale  # free once the hierarchy stands
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
            slot = links.parent[slot]
        labels[channel] = names[slot]
