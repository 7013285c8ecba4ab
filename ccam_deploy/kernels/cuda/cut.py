"""The cut of Ward's hierarchy (Ha & Youn 2022, eq. 12-16), after building it in one launch."""

from __future__ import annotations

import math
from functools import partial
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
from ccam_deploy.kernels.cuda.geometry import LARGEST_K, LARGEST_LAYER, PARTITION_THREADS
from ccam_deploy.kernels.cuda.hierarchy import History, clusters_of
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.layer_table import layer_row
from ccam_deploy.kernels.cuda.ward_block import finish

WORST_QUALITY = -1.0
FINALISTS = MOST_WARPS * LARGEST_K
CUTS = LARGEST_K + 1


class Top(NamedTuple):
    """The last merges of a layer, the last one first, in shared memory; each array [LARGEST_K].

    Attributes:
        slot: int32, the slot that each merge took away.
        parent: int32, the slot of the cluster that it was merged into.
    """

    slot: Array
    parent: Array


@partial(kernel, most_threads=PARTITION_THREADS)
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
    """Build the hierarchy and cut it. One block, of PARTITION_THREADS or fewer, per layer and pair.

    The grid is (L, P).

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
    slots = cuda.shared.array(LARGEST_K, np.int32)
    parents = cuda.shared.array(LARGEST_K, np.int32)
    top = Top(slots, parents)
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
    write_labels(history, top, count, labels[pair, first : first + channels])
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
def highest_merges(history: History, count: int, top: Top) -> None:
    """Find the last `count` merges, 0 to LARGEST_K - 1.

    Each warp finds as many among the slots that its threads take; then each of those is placed by
    the number of others that come after it.
    """
    heights = cuda.shared.array(FINALISTS, np.float64)
    orders = cuda.shared.array(FINALISTS, np.int32)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    first = thread // WARP * count
    height, order = highest_below(history, math.inf, np.int32(0))
    for place in range(count):
        warp_height, warp_order = height, order
        step = WARP >> 1
        while step > 0:
            that_height = cuda.shfl_xor_sync(ALL_LANES, warp_height, step)
            that_order = cuda.shfl_xor_sync(ALL_LANES, warp_order, step)
            if later(that_height, that_order, warp_height, warp_order):
                warp_height, warp_order = that_height, that_order
            step >>= 1
        if cuda.laneid == 0:
            heights[first + place] = warp_height
            orders[first + place] = warp_order
        if order == warp_order and height >= 0:
            height, order = highest_below(history, height, order)
    cuda.syncthreads()
    found = threads // WARP * count
    for place in range(thread, found, threads):
        height, order = heights[place], orders[place]
        rank = 0
        for other in range(found):
            if later(heights[other], orders[other], height, order):
                rank += 1
        if height >= 0 and rank < count:
            slot = order % SLOTS
            top.slot[rank] = slot
            top.parent[rank] = history.parent[slot]
    cuda.syncthreads()


@cuda.jit(device=True)
def highest_below(history: History, height: float, order: int) -> tuple[Number, Number]:
    """The height and order of the last merge before another, among the slots of a thread.

    Returns:
        A height of -1 where there is none.
    """
    best_height, best_order = -1.0, np.int32(0)
    for slot in range(cuda.threadIdx.x, history.parent.shape[0], cuda.blockDim.x):
        that_height, that_order = history.merge_height[slot], history.order[slot]
        if (
            history.parent[slot] >= 0
            and later(height, order, that_height, that_order)
            and later(that_height, that_order, best_height, best_order)
        ):
            best_height, best_order = that_height, that_order
    return best_height, best_order


@cuda.jit(device=True)
def later(height: float, order: int, other_height: float, other_order: int) -> bool:
    """Whether the first merge comes after the second."""
    return height > other_height or (height == other_height and order > other_order)


@cuda.jit(device=True)
def best_count(history: History, top: Top, k_min: int, largest: int, quality: Array) -> int:
    """Undo the last merges, and find the number of collections with the best ratio.

    A warp takes a number of collections, and each of its lanes one of them.

    Args:
        history: The hierarchy.
        top: The last merges.
        k_min: The smallest number of collections to try.
        largest: The largest.
        quality: [n] float32, written: the mean ratio of each number from k_min on.

    Returns:
        The number of collections; the smallest of equally good ones.
    """
    means = cuda.shared.array(CUTS, np.float64)
    smallest = min(k_min, largest)
    warp, warps = cuda.threadIdx.x // WARP, cuda.blockDim.x // WARP
    for count in range(smallest + warp, largest + 1, warps):
        mean = mean_ratio(history, top, count) if count > 1 else WORST_QUALITY
        if cuda.laneid == 0:
            means[count] = mean
            if count >= k_min:
                quality[count - k_min] = mean
    cuda.syncthreads()
    best, best_size = -math.inf, 1
    for count in range(smallest, largest + 1):
        if means[count] > best:
            best, best_size = means[count], count
    return best_size


@cuda.jit(device=True)
def mean_ratio(history: History, top: Top, count: int) -> Number:
    """The mean dispersion-separation ratio of the cut into `count` clusters (eq. 12-15).

    All lanes of a warp compute it together. The clusters are that of slot 0, then those that the
    last merges took away, the last one first. Each is as it was before the first of the merges into
    it that are undone.
    """
    lane = cuda.laneid
    slot, last = 0, -1
    if 0 < lane < count:
        slot = top.slot[lane - 1]
    for undone in range(count - 1):
        if top.parent[undone] == slot:
            last = top.slot[undone]
    centroid, sizes, spreads = history.centroid, history.size, history.spread
    if last >= 0:
        centroid, sizes, spreads = history.old_centroid, history.old_size, history.old_spread
        slot = last
    first, second = centroid[0, slot], centroid[1, slot]
    third, fourth = centroid[2, slot], centroid[3, slot]
    separation = math.inf
    for other in range(count):
        gap = 0.0
        gap += square(first - cuda.shfl_sync(ALL_LANES, first, other))
        gap += square(second - cuda.shfl_sync(ALL_LANES, second, other))
        gap += square(third - cuda.shfl_sync(ALL_LANES, third, other))
        gap += square(fourth - cuda.shfl_sync(ALL_LANES, fourth, other))
        separation = min(separation, gap if other != lane else math.inf)
    dispersion = spreads[slot] / sizes[slot]
    total = separation + dispersion
    ratio = 0.0
    if total > 0:
        ratio = (separation - dispersion) / total
    mean = 0.0
    for cluster in range(count):
        mean += cuda.shfl_sync(ALL_LANES, ratio, cluster)
    return mean / count


@cuda.jit(device=True)
def square(value: Number) -> Number:
    """A number times itself."""
    return value * value


@cuda.jit(device=True)
def write_labels(history: History, top: Top, count: int, labels: Array) -> None:
    """Label each channel by the rank of its cluster's slot, which is its first channel.

    Args:
        history: The hierarchy.
        top: The last merges.
        count: The number of collections.
        labels: [C] int32, written.
    """
    # The slot that each was merged into; -1 - label where a cluster of the cut lives.
    parent_or_label = cuda.shared.array(LARGEST_LAYER, np.int16)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    for slot in range(thread, labels.shape[0], threads):
        parent_or_label[slot] = history.parent[slot]
    cuda.syncthreads()
    if thread < count - 1:
        before = 1
        for other in range(count - 1):
            if top.slot[other] < top.slot[thread]:
                before += 1
        parent_or_label[top.slot[thread]] = -1 - before
    cuda.syncthreads()
    for channel in range(thread, labels.shape[0], threads):
        found = parent_or_label[channel]
        while found >= 0:
            found = parent_or_label[found]
        labels[channel] = -1 - found
