"""The last rounds of Ward's hierarchy, by one block for each layer and pair, in shared memory."""

from __future__ import annotations

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.clusters import find_nearest, keep, merge_or_keep
from ccam_deploy.kernels.cuda.collectives import WARP, Array, append
from ccam_deploy.kernels.cuda.geometry import BLOCK_CLUSTERS
from ccam_deploy.kernels.cuda.hierarchy import Coarse, Exact, History, Links, lists_of


@cuda.jit(device=True)
def finish(
    exact: Exact,
    coarse: Coarse,
    links: Links,
    history: History,
    scale: float,
    left: Array,
) -> int:
    """Merge a layer's clusters into a single one, with all threads of a block.

    Args:
        exact: The layer's clusters, as `search` or the last `relink` left them.
        coarse: The same.
        links: The same.
        history: The same.
        scale: The layer's element of `scales`.
        left: [rounds + 1] int32, the layer's clusters before the grid's first round and after each;
            0 after rounds that were not needed. At most BLOCK_CLUSTERS are merged in shared memory.

    Returns:
        The number of rounds, those of the grid included.
    """
    counters = cuda.shared.array(2, np.int32)
    centroid = cuda.shared.array((4, BLOCK_CLUSTERS), np.float64)
    size = cuda.shared.array(BLOCK_CLUSTERS, np.float64)
    spread = cuda.shared.array(BLOCK_CLUSTERS, np.float64)
    height = cuda.shared.array(BLOCK_CLUSTERS, np.float64)
    first = cuda.shared.array(BLOCK_CLUSTERS, np.float32)
    second = cuda.shared.array(BLOCK_CLUSTERS, np.float32)
    third = cuda.shared.array(BLOCK_CLUSTERS, np.float32)
    fourth = cuda.shared.array(BLOCK_CLUSTERS, np.float32)
    coarse_size = cuda.shared.array(BLOCK_CLUSTERS, np.float32)
    coarse_error = cuda.shared.array(BLOCK_CLUSTERS, np.float32)
    nearest_cluster = cuda.shared.array(BLOCK_CLUSTERS, np.int32)
    live = cuda.shared.array(BLOCK_CLUSTERS, np.int32)
    other_live = cuda.shared.array(BLOCK_CLUSTERS, np.int32)
    stale = cuda.shared.array(BLOCK_CLUSTERS, np.int32)
    slots = cuda.shared.array(BLOCK_CLUSTERS, np.int32)
    turn = 0
    while turn + 1 < left.shape[0] and left[turn + 1] > 0:
        turn += 1
    alive = left[turn]
    if alive > BLOCK_CLUSTERS:
        alive, turn = merge_until(
            exact, coarse, links, history, scale, counters, alive, BLOCK_CLUSTERS, turn
        )

    last = Exact(centroid, size, spread, height)
    last_coarse = Coarse((first, second, third, fourth), coarse_size, coarse_error)
    last_links = Links(nearest_cluster, live, other_live, stale, slots)
    live_slots = lists_of(links, turn + 1)[0]
    copy_live(exact, coarse, links, live_slots, alive, last, last_coarse, last_links)
    _, turn = merge_until(last, last_coarse, last_links, history, scale, counters, alive, 1, turn)
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
    live: Array,
    alive: int,
    last: Exact,
    last_coarse: Coarse,
    last_links: Links,
) -> None:
    """Copy the clusters in the first `alive` elements of `live` to other arrays, in order.

    `links.stale` is overwritten.
    """
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    for place in range(thread, alive, threads):
        slot = live[place]
        links.stale[slot] = place
        last_links.slot[place] = slot
        last_links.live[place] = place
        last_links.other_live[place] = place
        last.size[place] = exact.size[slot]
        last.spread[place] = exact.spread[slot]
        last.height[place] = exact.height[slot]
        last_coarse.centroid[0][place] = coarse.centroid[0][slot]
        last_coarse.centroid[1][place] = coarse.centroid[1][slot]
        last_coarse.centroid[2][place] = coarse.centroid[2][slot]
        last_coarse.centroid[3][place] = coarse.centroid[3][slot]
        last_coarse.size[place] = coarse.size[slot]
        last_coarse.error[place] = coarse.error[slot]
        for axis in range(4):
            last.centroid[axis, place] = exact.centroid[axis, slot]
    cuda.syncthreads()
    if alive > 1:
        for place in range(thread, alive, threads):
            nearest_slot = links.nearest[last_links.slot[place]]
            last_links.nearest[place] = links.stale[nearest_slot]
    cuda.syncthreads()


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
) -> tuple[int, int]:
    """Merge clusters, a round at a time, until few are left.

    Args:
        exact: The clusters.
        coarse: The same.
        links: The same; the next round's list holds those that are left.
        history: Of the layer.
        scale: The layer's element of `scales`.
        counters: [2] int32, scratch in shared memory.
        alive: How many clusters there are.
        few: How many may be left.
        turn: How many rounds there were before.

    Returns:
        How many clusters are left, and the number of rounds.
    """
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    while alive > few:
        turn += 1
        source, target = lists_of(links, turn)
        if thread < 2:
            counters[thread] = 0
        cuda.syncthreads()
        for first in range(thread // WARP * WARP, alive, threads):
            place = first + cuda.laneid
            cluster, left, out_of_date = 0, False, False
            if place < alive:
                cluster = source[place]
                left, out_of_date = merge_or_keep(
                    exact, coarse, links, history, scale, cluster, turn
                )
            append(left, cluster, target, counters, 0)
            append(out_of_date, cluster, links.stale, counters, 1)
        cuda.syncthreads()
        looking, count = links.stale, counters[1]
        if counters[0] == alive:
            looking, count = target, counters[0]
        alive = counters[0]
        find_nearest(exact, coarse, links, looking, count, target, alive, thread, threads)
        cuda.syncthreads()
    return alive, turn
