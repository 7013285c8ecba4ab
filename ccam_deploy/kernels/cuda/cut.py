"""The cut of Ward's hierarchy (Ha & Youn 2022, eq. 12-16), after building it in one launch."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.clusters import SLOTS
from ccam_deploy.kernels.cuda.collectives import (
    ALL_LANES,
    MOST_WARPS,
    WARP,
    Array,
    Number,
    block_sum,
)
from ccam_deploy.kernels.cuda.geometry import LARGEST_K
from ccam_deploy.kernels.cuda.hierarchy import History, clusters_of
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.layer_table import layer_row
from ccam_deploy.kernels.cuda.ward_block import finish

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


@kernel
def partition(
    table: Array,
    all_exact: Array,
    all_coarse: Array,
    all_links: Array,
    scales: Array,
    alive: Array,
    k_range: Array,
    labels: Array,
    counts: Array,
    quality: Array,
    rounds: Array,
) -> None:
    """Build the hierarchy and cut it. One block per layer and pair: grid (L, P).

    Args:
        table: [L, 8] int64.
        all_exact: [EXACT_ROWS, P · channels] float64, from `ward.begin` and `ward.search`.
        all_coarse: [COARSE_ROWS, P · channels] float32, from the same.
        all_links: [LINK_ROWS, P · channels] int32, from the same.
        scales: [P, L] float64, from the same.
        alive: [P, L, rounds + 1] int32, from the rounds of `ward.merge` and `ward.relink`.
        k_range: [2] int32, k_min and k_max, the numbers of collections to try.
        labels: [P, channels] int32, written: collections, numbered by their first channel.
        counts: [P, L] int32, 0 where a statistic is not finite; elsewhere the number of
            collections is written.
        quality: [P, L, n] float32, n > k_max - k_min, written: the mean dispersion-separation
            ratio of each number of collections from k_min on, -1 where there is none.
        rounds: [P, L] int32, written: the rounds of merging.
    """
    top = cuda.shared.array(LARGEST_K, np.int32)
    layer, pair = cuda.blockIdx.x, cuda.blockIdx.y
    row = layer_row(table, layer)
    first, channels = row.first_channel, row.channels
    k_min, k_max = k_range[0], k_range[1]
    for place in range(cuda.threadIdx.x, quality.shape[2], cuda.blockDim.x):
        quality[pair, layer, place] = WORST_QUALITY
    finite = counts[pair, layer] != 0
    cuda.syncthreads()
    if not finite:
        for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
            labels[pair, first + channel] = 0
        return
    start = pair * labels.shape[1] + first
    exact, coarse, links, history = clusters_of(
        all_exact, all_coarse, all_links, start, start + channels
    )
    scale = scales[pair, layer]
    turns = finish(exact, coarse, links, history, scale, alive[pair, layer])
    largest = min(k_max, distinct(history))
    highest_merges(history, largest - 1, top)
    count = best_count(history, top, k_min, largest, quality[pair, layer])
    write_labels(history, links.stale, top, count, labels[pair, first : first + channels])
    if cuda.threadIdx.x == 0:
        counts[pair, layer] = count
        rounds[pair, layer] = turns


@cuda.jit(device=True)
def distinct(history: History) -> int:
    """The number of distinct channels: one more than the merges that are not at height 0."""
    scratch = cuda.shared.array(MOST_WARPS, np.int32)
    merges = np.int32(0)
    for slot in range(cuda.threadIdx.x, history.parent.shape[0], cuda.blockDim.x):
        if history.parent[slot] >= 0 and history.merge_height[slot] > 0:
            merges += np.int32(1)
    return int(1 + block_sum(merges, scratch))


@cuda.jit(device=True)
def highest_merges(history: History, count: int, top: Array) -> None:
    """Write the slots that the last `count` merges took away, the last merge first."""
    heights = cuda.shared.array(MOST_WARPS, np.float64)
    orders = cuda.shared.array(MOST_WARPS, np.int32)
    warp, warps = cuda.threadIdx.x // WARP, cuda.blockDim.x // WARP
    before_height, before_order = math.inf, np.int32(0)
    for place in range(count):
        height, order = -1.0, np.int32(0)
        for slot in range(cuda.threadIdx.x, history.parent.shape[0], cuda.blockDim.x):
            if history.parent[slot] >= 0:
                that_height, that_order = history.merge_height[slot], history.order[slot]
                if later(before_height, before_order, that_height, that_order) and later(
                    that_height, that_order, height, order
                ):
                    height, order = that_height, that_order
        step = WARP >> 1
        while step > 0:
            that_height = cuda.shfl_xor_sync(ALL_LANES, height, step)
            that_order = cuda.shfl_xor_sync(ALL_LANES, order, step)
            if later(that_height, that_order, height, order):
                height, order = that_height, that_order
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
def best_count(history: History, top: Array, k_min: int, largest: int, quality: Array) -> int:
    """Undo the last merges one by one, and find the number of collections with the best ratio.

    Args:
        history: The hierarchy.
        top: The slots that the last merges took away, the last merge first.
        k_min: The smallest number of collections to try.
        largest: The largest.
        quality: [n] float32, written: the mean ratio of each number from k_min on.

    Returns:
        The number of collections; the smallest of equally good ones.
    """
    centroid = cuda.shared.array((4, LARGEST_K), np.float64)
    size = cuda.shared.array(LARGEST_K, np.float64)
    spread = cuda.shared.array(LARGEST_K, np.float64)
    clusters = Cut(centroid, size, spread)
    slots = cuda.shared.array(LARGEST_K, np.int32)
    ratios = cuda.shared.array(LARGEST_K, np.float64)
    thread = cuda.threadIdx.x
    best, best_size = -math.inf, 1
    for count in range(1, largest + 1):
        if count == 1:
            if thread == 0:
                slots[0] = 0
                write_cluster(clusters, 0, history.centroid, history.size, history.spread, 0)
        else:
            added = top[count - 2]
            if thread < count - 1 and slots[thread] == history.parent[added]:
                write_cluster(
                    clusters,
                    thread,
                    history.old_centroid,
                    history.old_size,
                    history.old_spread,
                    added,
                )
            if thread == count - 1:
                slots[thread] = added
                write_cluster(
                    clusters, thread, history.centroid, history.size, history.spread, added
                )
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
                best, best_size = mean, count
            if thread == 0 and count >= k_min:
                quality[count - k_min] = mean
    return best_size


@cuda.jit(device=True)
def write_cluster(
    clusters: Cut, place: int, centroid: Array, size: Array, spread: Array, slot: int
) -> None:
    """Write a slot's cluster to a place of the cut."""
    for axis in range(4):
        clusters.centroid[axis, place] = centroid[axis, slot]
    clusters.size[place] = size[slot]
    clusters.spread[place] = spread[slot]


@cuda.jit(device=True)
def ratio(clusters: Cut, place: int, count: int) -> Number:
    """The dispersion-separation ratio of a cluster among `count` (eq. 12-14)."""
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
def write_labels(
    history: History, label_of_slot: Array, top: Array, count: int, labels: Array
) -> None:
    """Label each channel by the rank of its cluster's slot, which is its first channel.

    Args:
        history: The hierarchy.
        label_of_slot: [C] int32, scratch.
        top: The slots that the last merges took away.
        count: The number of collections.
        labels: [C] int32, written.
    """
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    for slot in range(thread, label_of_slot.shape[0], threads):
        label_of_slot[slot] = -1
    cuda.syncthreads()
    if thread == 0:
        label_of_slot[0] = 0
    if thread < count - 1:
        before = 1
        for other in range(count - 1):
            if top[other] < top[thread]:
                before += 1
        label_of_slot[top[thread]] = before
    cuda.syncthreads()
    for channel in range(thread, labels.shape[0], threads):
        slot = channel
        while label_of_slot[slot] < 0:
            slot = history.parent[slot]
        labels[channel] = label_of_slot[slot]
