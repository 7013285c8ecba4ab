"""The clusters of Ward's hierarchy: how far apart they are, which is nearest, and how two merge.

Distances are compared exactly, in float64, but most are computed in float32 only. A bound on the
rounding error shows whether the nearest cluster is certain; where it is not, the distances of the
few candidates are computed again. (Consumer GPUs do 64 times more float32 than float64.)
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import ALL_LANES, WARP, Array, Number, warp_min
from ccam_deploy.kernels.cuda.hierarchy import Coarse, Exact, History, Links

SLOTS = 1 << 13
"""More than a layer has channels: `order` holds both a round and a slot."""

BELOW, ABOVE = np.float32(1 - 2**-9), np.float32(1 + 2**-9)
CROSS_TERM = np.float32(2**11)
UNDERFLOW = np.float32(2**-120)
CENTROID_ERROR = np.float32(2**-22)
INFINITY = np.float32(np.inf)


@cuda.jit(device=True)
def out_of_date(links: Links, cluster: int, turn: int) -> bool:
    """Whether a round merged the cluster or its nearest."""
    return bool(links.changed[cluster] == turn or links.changed[links.nearest[cluster]] == turn)


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
