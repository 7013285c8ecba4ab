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

CoarseCluster = tuple[Number, Number, Number, Number, Number, Number]
"""A cluster of `Coarse` in registers, each float32: four coordinates, the size, and the error."""

Found = tuple[Number, Number, Number, Number]
"""Float32 bounds and an int32: the two least lower bounds of distances, the least upper bound, and
the cluster of the first."""


@cuda.jit(device=True)
def merge_or_keep(
    exact: Exact,
    coarse: Coarse,
    links: Links,
    history: History,
    scale: float,
    cluster: int,
    turn: int,
) -> tuple[bool, bool]:
    """Merge a cluster with its nearest where each is the other's, and the cluster comes first.

    In a round, some thread calls this for each cluster; `nearest` must not change meanwhile.

    Returns:
        Whether the cluster is left after the round; and whether its nearest is out of date then,
        because the round merged one of the two.
    """
    other = links.nearest[cluster]
    back = links.nearest[other]
    if back == cluster:
        first = links.slot[cluster] < links.slot[other]
        if first:
            join(exact, coarse, links, history, scale, cluster, other, turn)
        return first, first
    return True, links.nearest[back] == other


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
    size, other_size = exact.size[cluster], exact.size[other]
    spread, other_spread = exact.spread[cluster], exact.spread[other]
    before = max(exact.height[cluster], exact.height[other])
    cost = distance(exact, cluster, other)
    whole = size + other_size
    share = other_size / whole
    # Rounding may put a merge below another that it contains; their order must not change.
    height = max(cost, before)
    exact.size[cluster] = whole
    exact.spread[cluster] = spread + (other_spread + cost)
    exact.height[cluster] = height
    coarse.size[cluster] = whole
    history.old_size[other_slot] = size
    history.old_spread[other_slot] = spread
    history.size[other_slot] = other_size
    history.spread[other_slot] = other_spread
    history.merge_height[other_slot] = height
    history.parent[other_slot] = slot
    history.order[other_slot] = turn * SLOTS + other_slot
    pair = cluster, other, other_slot
    first = scale * join_axis(exact, history, 0, share, pair)
    second = scale * join_axis(exact, history, 1, share, pair)
    third = scale * join_axis(exact, history, 2, share, pair)
    fourth = scale * join_axis(exact, history, 3, share, pair)
    write_scaled(coarse, cluster, first, second, third, fourth)
    largest = max(max(abs(first), abs(second)), max(abs(third), abs(fourth)))
    coarse.error[cluster] = largest * CENTROID_ERROR


@cuda.jit(device=True)
def join_axis(
    exact: Exact, history: History, axis: int, share: float, places: tuple[int, int, int]
) -> Number:
    """Merge a coordinate of two clusters, and return that of the new one.

    Args:
        exact: The clusters.
        history: Where both coordinates are kept.
        axis: Which coordinate.
        share: How far the one moves towards the other.
        places: The two clusters, and the other's slot.
    """
    cluster, other, other_slot = places
    value, other_value = exact.centroid[axis, cluster], exact.centroid[axis, other]
    joined = value + share * (other_value - value)
    exact.centroid[axis, cluster] = joined
    history.old_centroid[axis, other_slot] = value
    history.centroid[axis, other_slot] = other_value
    return joined


@cuda.jit(device=True)
def write_scaled(
    coarse: Coarse, cluster: int, first: float, second: float, third: float, fourth: float
) -> None:
    """Write a cluster's scaled centroid in float32."""
    coarse.centroid[0][cluster] = first
    coarse.centroid[1][cluster] = second
    coarse.centroid[2][cluster] = third
    coarse.centroid[3][cluster] = fourth


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
def coarse_cluster(coarse: Coarse, cluster: int) -> CoarseCluster:
    """A cluster in float32: the coordinates of its scaled centroid, its size and error."""
    place = np.uint32(cluster)
    return (
        coarse.centroid[0][place],
        coarse.centroid[1][place],
        coarse.centroid[2][place],
        coarse.centroid[3][place],
        coarse.size[place],
        coarse.error[place],
    )


@cuda.jit(device=True, fastmath=True)
def quotient(dividend: Number, divisor: Number) -> Number:
    """A quotient of float32, from 1 to 2^26, to within 2 units in the last place."""
    return dividend / divisor


@cuda.jit(device=True)
def bounds(one: CoarseCluster, other: CoarseCluster) -> tuple[Number, Number]:
    """The least and the greatest that the scaled distance can be, from float32 alone.

    With b computed for ‖Δ‖ and e the error of the centroids,
    b²·(1 − 1/t) − e²·(t − 1) <= ‖Δ‖² <= b²·(1 + 1/t) + e²·(t + 1); t = 2^10, both terms doubled.
    """
    first, second = one[0] - other[0], one[1] - other[1]
    third, fourth = one[2] - other[2], one[3] - other[3]
    gap = first * first + second * second + third * third + fourth * fourth
    error = one[5] + other[5]
    slack = error * error * CROSS_TERM + UNDERFLOW
    weight = quotient(one[4] * other[4], one[4] + other[4])
    return weight * (gap * BELOW - slack), weight * (gap * ABOVE + slack)


@cuda.jit(device=True)
def look_at(coarse: Coarse, one: CoarseCluster, cluster: int, other: int, found: Found) -> Found:
    """What a thread has found out after one more candidate, without a branch.

    A loop of these has the loads of several candidates under way.
    """
    least, second, ceiling, closest = found
    low, high = bounds(one, coarse_cluster(coarse, other))
    low = INFINITY if other == cluster else low
    high = INFINITY if other == cluster else high
    closest = other if low < least else closest
    second = min(second, max(least, low))
    return min(least, low), second, min(ceiling, high), closest


@cuda.jit(device=True)
def nearest(
    exact: Exact, coarse: Coarse, links: Links, among: Array, count: int, cluster: int
) -> int:
    """The cluster nearest to another among the first `count` of some, found by a warp's threads."""
    one = coarse_cluster(coarse, cluster)
    lane, end = np.int32(cuda.laneid), np.int32(count)
    found = INFINITY, INFINITY, INFINITY, np.int32(-1)
    place = lane
    while place + WARP < end:
        other, another = among[np.uint32(place)], among[np.uint32(place + WARP)]
        found = look_at(coarse, one, cluster, other, found)
        found = look_at(coarse, one, cluster, another, found)
        place = np.int32(place + 2 * WARP)
    if place < end:
        found = look_at(coarse, one, cluster, among[np.uint32(place)], found)
    least, second, ceiling, closest = found
    ceiling = warp_min(ceiling)
    candidates = cuda.ballot_sync(ALL_LANES, least <= ceiling)
    doubtful = cuda.ballot_sync(ALL_LANES, second <= ceiling)
    if doubtful == 0 and cuda.popc(candidates) == 1:
        return int(cuda.shfl_sync(ALL_LANES, closest, cuda.ffs(candidates) - 1))

    best, least_tie = math.inf, SLOTS
    slot = links.slot[cluster]
    for again in range(lane, end, WARP):
        other = among[again]
        if other != cluster and bounds(one, coarse_cluster(coarse, other))[0] <= ceiling:
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


@cuda.jit(device=True)
def find_nearest(
    exact: Exact,
    coarse: Coarse,
    links: Links,
    looking: Array,
    looking_count: int,
    among: Array,
    count: int,
    thread: int,
    threads: int,
) -> None:
    """Find the nearest of the first clusters of a list, among the first of another.

    Warps take clusters in turn.

    Args:
        exact: The clusters.
        coarse: The same.
        links: The same; `nearest` is written.
        looking: Clusters, int32.
        looking_count: How many of them look for another.
        among: Clusters, int32.
        count: How many of them may be found.
        thread: The thread's number among those that share the work.
        threads: How many these are, in whole warps.
    """
    for place in range(thread // WARP, looking_count, threads // WARP):
        cluster = looking[place]
        other = nearest(exact, coarse, links, among, count, cluster)
        if cuda.laneid == 0:
            links.nearest[cluster] = other
