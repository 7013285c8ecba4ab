"""The last rounds of Ward's hierarchy, by one block for each layer and pair, in shared memory."""

from __future__ import annotations

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.clusters import join, keep, nearest, out_of_date
from ccam_deploy.kernels.cuda.collectives import WARP, Array
from ccam_deploy.kernels.cuda.geometry import BLOCK_CLUSTERS
from ccam_deploy.kernels.cuda.hierarchy import Coarse, Exact, History, Links


@cuda.jit(device=True)
def finish(
    exact: Exact,
    coarse: Coarse,
    links: Links,
    history: History,
    scale: float,
    merges: Array,
    most: int,
) -> int:
    """Merge a layer's clusters into a single one, with all threads of a block.

    Args:
        exact: The layer's clusters, as `search` or the last `relink` left them.
        coarse: The same.
        links: The same.
        history: The same.
        scale: The layer's element of `scales`.
        merges: [rounds] int32, the layer's merges in each round of the grid.
        most: The clusters that the grid left, or more; at most BLOCK_CLUSTERS are merged in shared
            memory.

    Returns:
        The number of rounds, those of the grid included.
    """
    counters = cuda.shared.array(2, np.int32)
    centroid = cuda.shared.array((4, BLOCK_CLUSTERS), np.float64)
    size = cuda.shared.array(BLOCK_CLUSTERS, np.float64)
    spread = cuda.shared.array(BLOCK_CLUSTERS, np.float64)
    height = cuda.shared.array(BLOCK_CLUSTERS, np.float64)
    coarse_centroid = cuda.shared.array((4, BLOCK_CLUSTERS), np.float32)
    coarse_size = cuda.shared.array(BLOCK_CLUSTERS, np.float32)
    coarse_error = cuda.shared.array(BLOCK_CLUSTERS, np.float32)
    nearest_cluster = cuda.shared.array(BLOCK_CLUSTERS, np.int32)
    changed = cuda.shared.array(BLOCK_CLUSTERS, np.int32)
    live = cuda.shared.array(BLOCK_CLUSTERS, np.int32)
    other_live = cuda.shared.array(BLOCK_CLUSTERS, np.int32)
    stale = cuda.shared.array(BLOCK_CLUSTERS, np.int32)
    slots = cuda.shared.array(BLOCK_CLUSTERS, np.int32)
    turn, alive = 0, links.slot.shape[0]
    while turn < merges.shape[0] and alive > most:
        alive -= merges[turn]
        turn += 1
    if alive > BLOCK_CLUSTERS:
        gather_live(history.parent, links.live, counters)
        turn = merge_until(
            exact, coarse, links, history, scale, counters, alive, BLOCK_CLUSTERS, turn
        )
    alive = gather_live(history.parent, links.live, counters)

    last = Exact(centroid, size, spread, height)
    last_coarse = Coarse(coarse_centroid, coarse_size, coarse_error)
    last_links = Links(nearest_cluster, changed, live, other_live, stale, slots)
    copy_live(exact, coarse, links, alive, last, last_coarse, last_links)
    turn = merge_until(last, last_coarse, last_links, history, scale, counters, alive, 1, turn)
    for place in range(cuda.threadIdx.x, alive, cuda.blockDim.x):
        if slots[place] == 0:
            keep(last, history, place, 0)
    cuda.syncthreads()
    return int(turn)


@cuda.jit(device=True)
def copy_live(
    exact: Exact,
    coarse: Coarse,
    links: Links,
    alive: int,
    last: Exact,
    last_coarse: Coarse,
    last_links: Links,
) -> None:
    """Copy the clusters in the first `alive` elements of `links.live` to other arrays, in order.

    `links.stale` is overwritten.
    """
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    for place in range(thread, alive, threads):
        slot = links.live[place]
        links.stale[slot] = place
        last_links.slot[place] = slot
        last_links.live[place] = place
        last_links.changed[place] = 0
        last.size[place] = exact.size[slot]
        last.spread[place] = exact.spread[slot]
        last.height[place] = exact.height[slot]
        last_coarse.size[place] = coarse.size[slot]
        last_coarse.error[place] = coarse.error[slot]
        for axis in range(4):
            last.centroid[axis, place] = exact.centroid[axis, slot]
            last_coarse.centroid[axis, place] = coarse.centroid[axis, slot]
    cuda.syncthreads()
    if alive > 1:
        for place in range(thread, alive, threads):
            nearest_slot = links.nearest[last_links.slot[place]]
            last_links.nearest[place] = links.stale[nearest_slot]
    cuda.syncthreads()


@cuda.jit(device=True)
def gather_live(parent: Array, live: Array, counters: Array) -> int:
    """Write the slots that hold a cluster, in any order, and return how many there are."""
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        counters[0] = 0
    cuda.syncthreads()
    for slot in range(cuda.threadIdx.x, parent.shape[0], cuda.blockDim.x):
        if parent[slot] < 0:
            live[cuda.atomic.add(counters, 0, 1)] = slot
    cuda.syncthreads()
    return int(counters[0])


@cuda.jit(device=True)
def merge_until(
    exact: Exact,
    coarse: Coarse,
    links: Links,
    history: History,
    scale: float,
    counters: Array,
    alive: int,
    few: int,
    turn: int,
) -> int:
    """Merge clusters, a round at a time, until few are left.

    Args:
        exact: The clusters.
        coarse: The same.
        links: The same; the first `alive` elements of `live` are those that are left.
        history: Of the layer.
        scale: The layer's element of `scales`.
        counters: [2] int32, scratch in shared memory.
        alive: How many clusters there are.
        few: How many may be left.
        turn: How many rounds there were before.

    Returns:
        The number of rounds.
    """
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    source, target = links.live, links.other_live
    while alive > few:
        turn += 1
        if thread == 0:
            counters[0] = 0
            counters[1] = 0
        merged = 0
        for place in range(thread, alive, threads):
            cluster = source[place]
            other = links.nearest[cluster]
            if links.slot[cluster] < links.slot[other] and links.nearest[other] == cluster:
                join(exact, coarse, links, history, scale, cluster, other, turn)
                merged = 1
        all_look = cuda.syncthreads_or(merged) == 0
        for place in range(thread, alive, threads):
            cluster = source[place]
            if history.parent[links.slot[cluster]] < 0:
                target[cuda.atomic.add(counters, 0, 1)] = cluster
                if all_look or out_of_date(links, cluster, turn):
                    links.stale[cuda.atomic.add(counters, 1, 1)] = cluster
        cuda.syncthreads()
        alive, stale = counters[0], counters[1]
        for place in range(thread // WARP, stale, threads // WARP):
            cluster = links.stale[place]
            other = nearest(exact, coarse, links, target, alive, cluster)
            if cuda.laneid == 0:
                links.nearest[cluster] = other
        source, target = target, source
        cuda.syncthreads()
    return int(turn)
