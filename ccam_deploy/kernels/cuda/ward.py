"""Ward's hierarchy for all layers and pairs (Ha & Youn 2022, eq. 6-11).

Each round merges all pairs of clusters that are each other's nearest; Ward's distance is
reducible, so the tree is that of merging one pair at a time. Only clusters that were merged, and
those whose nearest was, look for a new one. A cluster lives in the slot of its first channel.

The first rounds of a layer of many channels use the whole grid, two launches each: `merge` and
`relink`. The last clusters are merged by one block, in shared memory. The number of launches does
not depend on the data, so that they can be captured: a layer that has few clusters already passes
the rounds that are left, and one that still has many is merged by its block in global memory until
they fit. How the rounds are shared out changes no bit of the result.

Distances are compared exactly, in float64, but most are computed in float32 only. A bound on the
rounding error shows whether the nearest cluster is certain; where it is not, the distances of the
few candidates are computed again. (Consumer GPUs do 64 times more float32 than float64.)

Ties are broken by i XOR j: identical channels pair up, and log2(C) rounds make a single cluster of
them. A tie with a new cluster may leave no two clusters that are each other's nearest; in the next
round all of them look again, and the pair that is least in (distance, i XOR j) merges. So there are
at most 2·(C − 1) rounds.
"""

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
    block_max,
    warp_min,
    warp_sum,
)
from ccam_deploy.kernels.cuda.geometry import BLOCK_CLUSTERS
from ccam_deploy.kernels.cuda.hierarchy import (
    Coarse,
    Exact,
    History,
    Links,
    coarse_of,
    exact_of,
    history_of,
    links_of,
)
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.layer_table import layer_row

SLOTS = 1 << 13
"""More than a layer has channels: `order` holds both a round and a slot."""

BELOW, ABOVE = np.float32(1 - 2**-9), np.float32(1 + 2**-9)
CROSS_TERM = np.float32(2**11)
UNDERFLOW = np.float32(2**-120)
CENTROID_ERROR = np.float32(2**-22)
INFINITY = np.float32(np.inf)


@kernel
def begin(
    table: Array,
    psi: Array,
    all_exact: Array,
    all_coarse: Array,
    all_links: Array,
    scales: Array,
    counts: Array,
    merges: Array,
) -> None:
    """Make each channel a cluster. One block per layer and pair: grid (L, P).

    Args:
        table: [L, 8] int64.
        psi: [P, channels, 4] float32, the channel statistics.
        all_exact: [EXACT_ROWS, P · channels] float64, written; see `hierarchy`.
        all_coarse: [COARSE_ROWS, P · channels] float32, written; see `hierarchy`.
        all_links: [LINK_ROWS, P · channels] int32, written; see `hierarchy`.
        scales: [P, L] float64, written: the power of two that brings a layer's largest statistic
            to between 1/2 and 1.
        counts: [P, L] int32, written: 0 where a statistic is not finite, else 1.
        merges: [P, L, rounds] int32, set to zeros: the merges of each round of the grid.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float64)
    layer, pair = cuda.blockIdx.x, cuda.blockIdx.y
    row = layer_row(table, layer)
    first, channels = row.first_channel, row.channels
    start = pair * psi.shape[1] + first
    exact = exact_of(all_exact, start, start + channels)
    coarse = coarse_of(all_coarse, start, start + channels)
    links = links_of(all_links, start, start + channels)
    history = history_of(all_exact, all_links, start, start + channels)

    largest, finite = 0.0, 1
    for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
        for axis in range(4):
            value = abs(np.float64(psi[pair, first + channel, axis]))
            if value < math.inf:
                largest = max(largest, value)
            else:
                finite = 0
    largest = block_max(largest, scratch)
    finite = cuda.syncthreads_and(finite)
    scale = 1.0
    if largest > 0:
        scale = math.ldexp(1.0, -math.frexp(largest)[1])
    if cuda.threadIdx.x == 0:
        scales[pair, layer] = scale
        counts[pair, layer] = 1 if finite != 0 else 0
    for turn in range(cuda.threadIdx.x, merges.shape[2], cuda.blockDim.x):
        merges[pair, layer, turn] = 0

    for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
        for axis in range(4):
            value = np.float64(psi[pair, first + channel, axis])
            exact.centroid[axis, channel] = value
            coarse.centroid[axis, channel] = value * scale
        exact.size[channel] = 1
        exact.spread[channel] = 0
        exact.height[channel] = 0
        coarse.size[channel] = 1
        coarse.error[channel] = 0
        links.changed[channel] = 0
        links.slot[channel] = channel
        history.parent[channel] = -1


@kernel
def search(
    table: Array,
    all_exact: Array,
    all_coarse: Array,
    all_links: Array,
    counts: Array,
) -> None:
    """Find each channel's nearest. A warp takes channels in turn: grid (any, L, P).

    Args:
        table: [L, 8] int64.
        all_exact: [EXACT_ROWS, P · channels] float64, from `begin`.
        all_coarse: [COARSE_ROWS, P · channels] float32, from `begin`.
        all_links: [LINK_ROWS, P · channels] int32, from `begin`; `nearest` is written.
        counts: [P, L] int32, from `begin`.
    """
    layer, pair = cuda.blockIdx.y, cuda.blockIdx.z
    if counts[pair, layer] == 0:
        return
    row = layer_row(table, layer)
    channels = row.channels
    start = pair * (all_links.shape[1] // counts.shape[0]) + row.first_channel
    exact = exact_of(all_exact, start, start + channels)
    coarse = coarse_of(all_coarse, start, start + channels)
    links = links_of(all_links, start, start + channels)
    warps = cuda.blockDim.x // WARP
    warp = cuda.blockIdx.x * warps + cuda.threadIdx.x // WARP
    for slot in range(warp, channels, cuda.gridDim.x * warps):
        other = nearest(exact, coarse, links, links.slot, channels, slot)
        if cuda.laneid == 0:
            links.nearest[slot] = other


@kernel
def merge(
    table: Array,
    all_exact: Array,
    all_coarse: Array,
    all_links: Array,
    scales: Array,
    counts: Array,
    merges: Array,
    turn: int,
    most: int,
) -> None:
    """Merge, in one round, the pairs that are each other's nearest: grid (any, L, P).

    Args:
        table: [L, 8] int64.
        all_exact: [EXACT_ROWS, P · channels] float64, from `begin` and earlier rounds.
        all_coarse: [COARSE_ROWS, P · channels] float32, from the same.
        all_links: [LINK_ROWS, P · channels] int32, from the same and `search`.
        scales: [P, L] float64, from `begin`.
        counts: [P, L] int32, from `begin`.
        merges: [P, L, rounds] int32, the merges of each round; this round's are added.
        turn: The round, from 1.
        most: A layer of no more clusters than that is left as it is.
    """
    layer, pair = cuda.blockIdx.y, cuda.blockIdx.z
    row = layer_row(table, layer)
    channels = row.channels
    alive = clusters_before(merges[pair, layer], channels, turn)
    if counts[pair, layer] == 0 or alive <= most:
        return
    start = pair * (all_links.shape[1] // counts.shape[0]) + row.first_channel
    exact = exact_of(all_exact, start, start + channels)
    coarse = coarse_of(all_coarse, start, start + channels)
    links = links_of(all_links, start, start + channels)
    history = history_of(all_exact, all_links, start, start + channels)
    merged = np.int32(0)
    for slot in range(cuda.grid(1), channels, cuda.gridDim.x * cuda.blockDim.x):
        other = links.nearest[slot]
        if history.parent[slot] < 0 and slot < other and links.nearest[other] == slot:
            join(exact, coarse, links, history, scales[pair, layer], slot, other, turn)
            merged += np.int32(1)
    merged = warp_sum(merged)
    if cuda.laneid == 0 and merged > 0:
        cuda.atomic.add(merges, (pair, layer, turn - 1), merged)


@kernel
def relink(
    table: Array,
    all_exact: Array,
    all_coarse: Array,
    all_links: Array,
    counts: Array,
    merges: Array,
    turn: int,
    most: int,
) -> None:
    """Find the nearest of clusters whose nearest is out of date: grid (any, L, P).

    A warp takes slots in turn.

    Args:
        table: [L, 8] int64.
        all_exact: [EXACT_ROWS, P · channels] float64, from the round's `merge`.
        all_coarse: [COARSE_ROWS, P · channels] float32, from the same.
        all_links: [LINK_ROWS, P · channels] int32, from the same; `nearest` is written.
        counts: [P, L] int32, from `begin`.
        merges: [P, L, rounds] int32, from the same.
        turn: The round, from 1.
        most: See `merge`.
    """
    layer, pair = cuda.blockIdx.y, cuda.blockIdx.z
    row = layer_row(table, layer)
    channels = row.channels
    alive = clusters_before(merges[pair, layer], channels, turn)
    merged = merges[pair, layer, turn - 1]
    if counts[pair, layer] == 0 or alive <= most or alive - merged <= 1:
        return
    start = pair * (all_links.shape[1] // counts.shape[0]) + row.first_channel
    exact = exact_of(all_exact, start, start + channels)
    coarse = coarse_of(all_coarse, start, start + channels)
    links = links_of(all_links, start, start + channels)
    history = history_of(all_exact, all_links, start, start + channels)
    warps = cuda.blockDim.x // WARP
    warp = cuda.blockIdx.x * warps + cuda.threadIdx.x // WARP
    for slot in range(warp, channels, cuda.gridDim.x * warps):
        if history.parent[slot] < 0 and (merged == 0 or out_of_date(links, slot, turn)):
            other = nearest(exact, coarse, links, links.slot, channels, slot)
            if cuda.laneid == 0:
                links.nearest[slot] = other


@cuda.jit(device=True)
def clusters_before(merges: Array, channels: int, turn: int) -> int:
    """How many clusters a layer has before a round, from its merges [rounds] so far."""
    alive = channels
    for earlier in range(turn - 1):
        alive -= merges[earlier]
    return alive


@cuda.jit(device=True)
def out_of_date(links: Links, cluster: int, turn: int) -> bool:
    """Whether a round merged the cluster or its nearest."""
    return bool(links.changed[cluster] == turn or links.changed[links.nearest[cluster]] == turn)


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
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x

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

    for place in range(thread, alive, threads):
        slot = links.live[place]
        links.stale[slot] = place
        slots[place] = slot
        live[place] = place
        changed[place] = 0
        size[place] = exact.size[slot]
        spread[place] = exact.spread[slot]
        height[place] = exact.height[slot]
        coarse_size[place] = coarse.size[slot]
        coarse_error[place] = coarse.error[slot]
        for axis in range(4):
            centroid[axis, place] = exact.centroid[axis, slot]
            coarse_centroid[axis, place] = coarse.centroid[axis, slot]
    cuda.syncthreads()
    if alive > 1:
        for place in range(thread, alive, threads):
            nearest_cluster[place] = links.stale[links.nearest[slots[place]]]
    cuda.syncthreads()
    last = Exact(centroid, size, spread, height)
    turn = merge_until(
        last,
        Coarse(coarse_centroid, coarse_size, coarse_error),
        Links(nearest_cluster, changed, live, other_live, stale, slots),
        history,
        scale,
        counters,
        alive,
        1,
        turn,
    )
    for place in range(thread, alive, threads):
        if slots[place] == 0:
            keep(last, history, place, 0)
    cuda.syncthreads()
    return int(turn)


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


@cuda.jit(device=True)
def join(
    exact: Exact,
    coarse: Coarse,
    links: Links,
    history: History,
    scale: float,
    cluster: int,
    other: int,
    turn: int,
) -> None:
    """Merge the other cluster into one whose slot comes before it."""
    slot, other_slot = links.slot[cluster], links.slot[other]
    cost = distance(exact, cluster, other)
    for axis in range(4):
        history.old_centroid[axis, other_slot] = exact.centroid[axis, cluster]
    history.old_size[other_slot] = exact.size[cluster]
    history.old_spread[other_slot] = exact.spread[cluster]
    keep(exact, history, other, other_slot)
    size = exact.size[cluster] + exact.size[other]
    share = exact.size[other] / size
    largest = 0.0
    for axis in range(4):
        value = exact.centroid[axis, cluster]
        value += share * (exact.centroid[axis, other] - value)
        exact.centroid[axis, cluster] = value
        value *= scale
        coarse.centroid[axis, cluster] = value
        coarse.centroid[axis, other] = INFINITY
        largest = max(largest, abs(value))
    exact.size[cluster] = size
    exact.spread[cluster] += exact.spread[other] + cost
    # Rounding may put a merge below another that it contains; their order must not change.
    height = max(cost, max(exact.height[cluster], exact.height[other]))
    exact.height[cluster] = height
    history.merge_height[other_slot] = height
    coarse.size[cluster] = size
    coarse.error[cluster] = largest * CENTROID_ERROR
    history.parent[other_slot] = slot
    history.order[other_slot] = turn * SLOTS + other_slot
    links.changed[cluster] = turn
    links.changed[other] = turn


@cuda.jit(device=True)
def keep(exact: Exact, history: History, cluster: int, slot: int) -> None:
    """Write a cluster to the history of its slot."""
    for axis in range(4):
        history.centroid[axis, slot] = exact.centroid[axis, cluster]
    history.size[slot] = exact.size[cluster]
    history.spread[slot] = exact.spread[cluster]


@cuda.jit(device=True)
def distance(exact: Exact, slot: int, other: int) -> Number:
    """Ward's distance: the squared error that merging two clusters adds (eq. 10, 11)."""
    gap = 0.0
    for axis in range(4):
        difference = exact.centroid[axis, slot] - exact.centroid[axis, other]
        gap += difference * difference
    size, other_size = exact.size[slot], exact.size[other]
    return gap * (size * other_size / (size + other_size))


@cuda.jit(device=True)
def bounds(coarse: Coarse, slot: int, other: int) -> tuple[Number, Number]:
    """The least and the greatest that the scaled distance can be, from float32 alone.

    With b computed for ‖Δ‖ and e the error of the centroids,
    b²·(1 − 1/t) − e²·(t − 1) <= ‖Δ‖² <= b²·(1 + 1/t) + e²·(t + 1); t = 2^10, both terms doubled.
    """
    gap = np.float32(0)
    for axis in range(4):
        difference = coarse.centroid[axis, slot] - coarse.centroid[axis, other]
        gap += difference * difference
    error = coarse.error[slot] + coarse.error[other]
    slack = error * error * CROSS_TERM + UNDERFLOW
    size, other_size = coarse.size[slot], coarse.size[other]
    weight = size * other_size / (size + other_size)
    return weight * (gap * BELOW - slack), weight * (gap * ABOVE + slack)


@cuda.jit(device=True)
def nearest(
    exact: Exact, coarse: Coarse, links: Links, among: Array, count: int, cluster: int
) -> int:
    """The cluster nearest to another among the first `count` of some, found by a warp's threads."""
    lane = cuda.laneid
    least, second, ceiling = INFINITY, INFINITY, INFINITY
    closest = -1
    for place in range(lane, count, WARP):
        other = among[place]
        if other != cluster:
            low, high = bounds(coarse, cluster, other)
            ceiling = min(ceiling, high)
            if low < least:
                least, second, closest = low, least, other
            else:
                second = min(second, low)
    ceiling = warp_min(ceiling)
    candidates = cuda.ballot_sync(ALL_LANES, least <= ceiling)
    doubtful = cuda.ballot_sync(ALL_LANES, second <= ceiling)
    if doubtful == 0 and cuda.popc(candidates) == 1:
        return int(cuda.shfl_sync(ALL_LANES, closest, cuda.ffs(candidates) - 1))

    best = math.inf
    closest, least_tie = -1, SLOTS
    slot = links.slot[cluster]
    for place in range(lane, count, WARP):
        other = among[place]
        if other != cluster and bounds(coarse, cluster, other)[0] <= ceiling:
            cost = distance(exact, cluster, other)
            tie = slot ^ links.slot[other]
            if cost < best or (cost == best and tie < least_tie):
                best, closest, least_tie = cost, other, tie
    step = WARP >> 1
    while step > 0:
        cost = cuda.shfl_xor_sync(ALL_LANES, best, step)
        other = cuda.shfl_xor_sync(ALL_LANES, closest, step)
        tie = cuda.shfl_xor_sync(ALL_LANES, least_tie, step)
        if cost < best or (cost == best and tie < least_tie):
            best, closest, least_tie = cost, other, tie
        step >>= 1
    return int(closest)
