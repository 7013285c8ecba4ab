"""Ward's hierarchy for all layers and pairs (Ha & Youn 2022, eq. 6-11).

Each round merges all pairs of clusters that are each other's nearest; Ward's distance is
reducible, so the tree is that of merging one pair at a time. Only clusters that were merged, and
those whose nearest was, look for a new one. A cluster lives in the slot of its first channel.

Distances are compared exactly, in float64, but most are computed in float32 only: a bound on the
error of that tells whether the nearest is certain, and where it is not, the few that may be it
are computed again. (Consumer GPUs do 64 times more float32 than float64.)

Equal distances are decided by i XOR j: identical channels pair up and are one cluster after
log2(C) rounds. A round after which no two clusters are each other's nearest, which takes a tie
with a cluster that is new, is followed by one in which all look again; the pair that is least in
(distance, i XOR j) then merges. So there are at most 2·(C − 1) rounds.
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
from ccam_deploy.kernels.cuda.geometry import CHANNELS, FIRST_CHANNEL

# Rows of `exact`, np.float64, one column per slot: a cluster's centroid in rows 0-3, and
SIZE, SPREAD, HEIGHT = 4, 5, 6
"""its channels, its sum of squared distances to the centroid, the height at which it arose."""
BEFORE = 7
"""For a slot that was merged into another: rows 0-6 of that other one before the merge."""
MERGED = 14
"""For a slot that was merged into another: the height of that merge."""

# Rows of `coarse`, float32: the scaled centroid in rows 0-3, and
COARSE_SIZE, ERROR = 4, 5
"""its channels, and a bound on the distance from the scaled centroid to the true one."""

# Rows of `links`, int32:
NEAREST, PARENT, ORDER, CHANGED, LIVE, OTHER_LIVE, STALE = range(7)
"""the nearest cluster; the slot merged into, or -1; when, as round · SLOTS + slot; the last round
in which the cluster changed; two lists of live slots; the slots whose nearest is out of date."""
SLOTS = 1 << 13

BELOW, ABOVE = np.float32(1 - 2**-9), np.float32(1 + 2**-9)
CROSS_TERM = np.float32(2**11)
UNDERFLOW = np.float32(2**-120)
CENTROID_ERROR = np.float32(2**-22)
INFINITY = np.float32(np.inf)


@cuda.jit
def begin(
    table: Array,
    psi: Array,
    exact_of_all: Array,
    coarse_of_all: Array,
    links_of_all: Array,
    scales: Array,
    counts: Array,
) -> None:
    """Make each channel a cluster. One block per layer and pair: grid (L, P).

    psi: [P, channels, 4] float32.   exact_of_all: [15, P · channels] float64, coarse_of_all:
    [6, ...] float32 and links_of_all: [7, ...] int32: the hierarchy.   scales: [P, L] float64,
    the power of two that brings a layer's largest statistic to 1.   counts: [P, L] int32, 0
    where a statistic is not finite, else 1.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float64)
    layer, pair = cuda.blockIdx.x, cuda.blockIdx.y
    first, channels = table[layer, FIRST_CHANNEL], table[layer, CHANNELS]
    column = pair * psi.shape[1] + first

    largest, sound = 0.0, 1
    for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
        for axis in range(4):
            value = abs(np.float64(psi[pair, first + channel, axis]))
            if value < math.inf:
                largest = max(largest, value)
            else:
                sound = 0
    largest = block_max(largest, scratch)
    sound = cuda.syncthreads_and(sound)
    scale = 1.0
    if largest > 0:
        scale = math.ldexp(1.0, -math.frexp(largest)[1])
    if cuda.threadIdx.x == 0:
        scales[pair, layer] = scale
        counts[pair, layer] = 1 if sound != 0 else 0

    for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
        slot = column + channel
        for axis in range(4):
            value = np.float64(psi[pair, first + channel, axis])
            exact_of_all[axis, slot] = value
            coarse_of_all[axis, slot] = value * scale
        exact_of_all[SIZE, slot] = 1
        exact_of_all[SPREAD, slot] = 0
        exact_of_all[HEIGHT, slot] = 0
        coarse_of_all[COARSE_SIZE, slot] = 1
        coarse_of_all[ERROR, slot] = 0
        links_of_all[PARENT, slot] = -1
        links_of_all[CHANGED, slot] = 0
        links_of_all[LIVE, slot] = channel


@cuda.jit
def search(
    table: Array,
    exact_of_all: Array,
    coarse_of_all: Array,
    links_of_all: Array,
    counts: Array,
) -> None:
    """Find each channel's nearest. A warp takes channels in turn: grid (any, L, P)."""
    layer, pair = cuda.blockIdx.y, cuda.blockIdx.z
    if counts[pair, layer] == 0:
        return
    channels = table[layer, CHANNELS]
    start = pair * (links_of_all.shape[1] // counts.shape[0]) + table[layer, FIRST_CHANNEL]
    exact = exact_of_all[:, start : start + channels]
    coarse = coarse_of_all[:, start : start + channels]
    links = links_of_all[:, start : start + channels]
    warps = cuda.blockDim.x // WARP
    warp = cuda.blockIdx.x * warps + cuda.threadIdx.x // WARP
    for slot in range(warp, channels, cuda.gridDim.x * warps):
        found = nearest(exact, coarse, links[LIVE], channels, slot)
        if cuda.laneid == 0:
            links[NEAREST, slot] = found


@cuda.jit(device=True)
def build(exact: Array, coarse: Array, links: Array, scale: float) -> int:
    """Merge a layer's clusters until one is left, with all threads of a block.

    exact, coarse, links: the columns of the layer, as `begin` and `search` left them.
    Returns the number of rounds.
    """
    counters = cuda.shared.array(2, np.int32)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    alive = links.shape[1]
    source, target = LIVE, OTHER_LIVE
    turn = 0
    while alive > 1:
        turn += 1
        if thread == 0:
            counters[0] = 0
            counters[1] = 0
        merged = 0
        for place in range(thread, alive, threads):
            slot = links[source, place]
            other = links[NEAREST, slot]
            if slot < other and links[NEAREST, other] == slot:
                join(exact, coarse, links, scale, slot, other, turn)
                merged = 1
        all_look = cuda.syncthreads_or(merged) == 0
        for place in range(thread, alive, threads):
            slot = links[source, place]
            if links[PARENT, slot] < 0:
                links[target, cuda.atomic.add(counters, 0, 1)] = slot
                near = links[NEAREST, slot]
                if all_look or links[CHANGED, slot] == turn or links[CHANGED, near] == turn:
                    links[STALE, cuda.atomic.add(counters, 1, 1)] = slot
        cuda.syncthreads()
        alive, stale = counters[0], counters[1]
        for place in range(thread // WARP, stale, threads // WARP):
            slot = links[STALE, place]
            found = nearest(exact, coarse, links[target], alive, slot)
            if cuda.laneid == 0:
                links[NEAREST, slot] = found
        source, target = target, source
        cuda.syncthreads()
    return turn


@cuda.jit(device=True)
def join(
    exact: Array, coarse: Array, links: Array, scale: float, slot: int, other: int, turn: int
) -> None:
    """Merge the cluster in `other` into that in `slot`, which comes before it."""
    cost = distance(exact, slot, other)
    for row in range(BEFORE):
        exact[BEFORE + row, other] = exact[row, slot]
    size = exact[SIZE, slot] + exact[SIZE, other]
    share = exact[SIZE, other] / size
    largest = 0.0
    for axis in range(4):
        value = exact[axis, slot]
        value += share * (exact[axis, other] - value)
        exact[axis, slot] = value
        value *= scale
        coarse[axis, slot] = value
        largest = max(largest, abs(value))
    exact[SIZE, slot] = size
    exact[SPREAD, slot] += exact[SPREAD, other] + cost
    # Rounding may put a merge below one that it contains; the order of the two must stand.
    height = max(cost, max(exact[HEIGHT, slot], exact[HEIGHT, other]))
    exact[HEIGHT, slot] = height
    exact[MERGED, other] = height
    coarse[COARSE_SIZE, slot] = size
    coarse[ERROR, slot] = largest * CENTROID_ERROR
    links[PARENT, other] = slot
    links[ORDER, other] = turn * SLOTS + other
    links[CHANGED, slot] = turn
    links[CHANGED, other] = turn


@cuda.jit(device=True)
def distance(exact: Array, one: int, other: int) -> Number:
    """Ward's distance: the squared error that merging two clusters adds (eq. 10, 11)."""
    gap = 0.0
    for axis in range(4):
        difference = exact[axis, one] - exact[axis, other]
        gap += difference * difference
    return gap * (exact[SIZE, one] * exact[SIZE, other] / (exact[SIZE, one] + exact[SIZE, other]))


@cuda.jit(device=True)
def bounds(coarse: Array, one: int, other: int) -> tuple[Number, Number]:
    """What the scaled distance is at least and at most, from float32 alone.

    With b computed for ‖Δ‖ and e the error of the centroids,
    b²·(1 − 1/t) − e²·(t − 1) <= ‖Δ‖² <= b²·(1 + 1/t) + e²·(t + 1); t = 2^10, both terms doubled.
    """
    gap = np.float32(0)
    for axis in range(4):
        difference = coarse[axis, one] - coarse[axis, other]
        gap += difference * difference
    error = coarse[ERROR, one] + coarse[ERROR, other]
    slack = error * error * CROSS_TERM + UNDERFLOW
    size, other_size = coarse[COARSE_SIZE, one], coarse[COARSE_SIZE, other]
    weight = size * other_size / (size + other_size)
    return weight * (gap * BELOW - slack), weight * (gap * ABOVE + slack)


@cuda.jit(device=True)
def nearest(exact: Array, coarse: Array, live: Array, alive: int, slot: int) -> int:
    """The live cluster nearest to that in `slot`, found by the 32 threads of a warp."""
    lane = cuda.laneid
    least, second, ceiling = INFINITY, INFINITY, INFINITY
    found = -1
    for place in range(lane, alive, WARP):
        other = live[place]
        if other != slot:
            low, high = bounds(coarse, slot, other)
            ceiling = min(ceiling, high)
            if low < least:
                least, second, found = low, least, other
            else:
                second = min(second, low)
    ceiling = warp_min(ceiling)
    candidates = cuda.ballot_sync(ALL_LANES, least <= ceiling)
    doubtful = cuda.ballot_sync(ALL_LANES, second <= ceiling)
    if doubtful == 0 and cuda.popc(candidates) == 1:
        return int(cuda.shfl_sync(ALL_LANES, found, cuda.ffs(candidates) - 1))

    best = math.inf
    found = SLOTS
    for place in range(lane, alive, WARP):
        other = live[place]
        if other != slot and bounds(coarse, slot, other)[0] <= ceiling:
            cost = distance(exact, slot, other)
            if cost < best or (cost == best and slot ^ other < slot ^ found):
                best, found = cost, other
    step = WARP >> 1
    while step > 0:
        cost = cuda.shfl_xor_sync(ALL_LANES, best, step)
        other = cuda.shfl_xor_sync(ALL_LANES, found, step)
        if cost < best or (cost == best and slot ^ other < slot ^ found):
            best, found = cost, other
        step >>= 1
    return int(found)
