"""Ward's hierarchy for all layers and pairs (Ha & Youn 2022, eq. 6-11).

Each round merges all pairs of clusters that are each other's nearest; Ward's distance is
reducible, so the tree is that of merging one pair at a time. Only clusters that were merged, and
those whose nearest was, look for a new one. A cluster lives in the slot of its first channel.

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
)
from ccam_deploy.kernels.cuda.hierarchy import Coarse, Exact, Links, coarse_of, exact_of, links_of
from ccam_deploy.kernels.cuda.layer_table import layer_row

SLOTS = 1 << 13
"""More than a layer has channels: `order` holds both a round and a slot."""

BELOW, ABOVE = np.float32(1 - 2**-9), np.float32(1 + 2**-9)
CROSS_TERM = np.float32(2**11)
UNDERFLOW = np.float32(2**-120)
CENTROID_ERROR = np.float32(2**-22)
INFINITY = np.float32(np.inf)


@cuda.jit
def begin(
    table: Array,
    psi: Array,
    all_exact: Array,
    all_coarse: Array,
    all_links: Array,
    scales: Array,
    counts: Array,
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
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float64)
    layer, pair = cuda.blockIdx.x, cuda.blockIdx.y
    row = layer_row(table, layer)
    first, channels = row.first_channel, row.channels
    start = pair * psi.shape[1] + first
    exact = exact_of(all_exact, start, start + channels)
    coarse = coarse_of(all_coarse, start, start + channels)
    links = links_of(all_links, start, start + channels)

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
        links.parent[channel] = -1
        links.changed[channel] = 0
        links.live[channel] = channel


@cuda.jit
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
        other = nearest(exact, coarse, links.live, channels, slot)
        if cuda.laneid == 0:
            links.nearest[slot] = other


@cuda.jit(device=True)
def build(exact: Exact, coarse: Coarse, links: Links, scale: float) -> int:
    """Merge a layer's clusters into a single one, with all threads of a block.

    Args:
        exact: The layer's clusters, as `begin` and `search` left them.
        coarse: The same.
        links: The same.
        scale: The layer's element of `scales`.

    Returns:
        The number of rounds.
    """
    counters = cuda.shared.array(2, np.int32)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    alive = links.live.shape[0]
    source, target = links.live, links.other_live
    turn = 0
    while alive > 1:
        turn += 1
        if thread == 0:
            counters[0] = 0
            counters[1] = 0
        merged = 0
        for place in range(thread, alive, threads):
            slot = source[place]
            other = links.nearest[slot]
            if slot < other and links.nearest[other] == slot:
                join(exact, coarse, links, scale, slot, other, turn)
                merged = 1
        all_look = cuda.syncthreads_or(merged) == 0
        for place in range(thread, alive, threads):
            slot = source[place]
            if links.parent[slot] < 0:
                target[cuda.atomic.add(counters, 0, 1)] = slot
                near = links.nearest[slot]
                if all_look or links.changed[slot] == turn or links.changed[near] == turn:
                    links.stale[cuda.atomic.add(counters, 1, 1)] = slot
        cuda.syncthreads()
        alive, stale = counters[0], counters[1]
        for place in range(thread // WARP, stale, threads // WARP):
            slot = links.stale[place]
            other = nearest(exact, coarse, target, alive, slot)
            if cuda.laneid == 0:
                links.nearest[slot] = other
        source, target = target, source
        cuda.syncthreads()
    return turn


@cuda.jit(device=True)
def join(
    exact: Exact, coarse: Coarse, links: Links, scale: float, slot: int, other: int, turn: int
) -> None:
    """Merge the cluster in `other` into that in `slot`, which comes before it."""
    cost = distance(exact, slot, other)
    for axis in range(4):
        exact.old_centroid[axis, other] = exact.centroid[axis, slot]
    exact.old_size[other] = exact.size[slot]
    exact.old_spread[other] = exact.spread[slot]
    size = exact.size[slot] + exact.size[other]
    share = exact.size[other] / size
    largest = 0.0
    for axis in range(4):
        value = exact.centroid[axis, slot]
        value += share * (exact.centroid[axis, other] - value)
        exact.centroid[axis, slot] = value
        value *= scale
        coarse.centroid[axis, slot] = value
        largest = max(largest, abs(value))
    exact.size[slot] = size
    exact.spread[slot] += exact.spread[other] + cost
    # Rounding may put a merge below another that it contains; their order must not change.
    height = max(cost, max(exact.height[slot], exact.height[other]))
    exact.height[slot] = height
    exact.merge_height[other] = height
    coarse.size[slot] = size
    coarse.error[slot] = largest * CENTROID_ERROR
    links.parent[other] = slot
    links.order[other] = turn * SLOTS + other
    links.changed[slot] = turn
    links.changed[other] = turn


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
def nearest(exact: Exact, coarse: Coarse, live: Array, alive: int, slot: int) -> int:
    """The live cluster nearest to that in `slot`, found by the 32 threads of a warp."""
    lane = cuda.laneid
    least, second, ceiling = INFINITY, INFINITY, INFINITY
    closest = -1
    for place in range(lane, alive, WARP):
        other = live[place]
        if other != slot:
            low, high = bounds(coarse, slot, other)
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
    closest = SLOTS
    for place in range(lane, alive, WARP):
        other = live[place]
        if other != slot and bounds(coarse, slot, other)[0] <= ceiling:
            cost = distance(exact, slot, other)
            if cost < best or (cost == best and slot ^ other < slot ^ closest):
                best, closest = cost, other
    step = WARP >> 1
    while step > 0:
        cost = cuda.shfl_xor_sync(ALL_LANES, best, step)
        other = cuda.shfl_xor_sync(ALL_LANES, closest, step)
        if cost < best or (cost == best and slot ^ other < slot ^ closest):
            best, closest = cost, other
        step >>= 1
    return int(closest)
