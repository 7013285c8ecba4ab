"""The parts of Ward's hierarchy: named arrays over the clusters of a layer.

Each group lies in one two-dimensional array of all layers and pairs, so that few arguments are
passed to the kernels; only this module knows in which row. A cluster lives in the slot of its
first channel. In these arrays an element or a column is a slot; while one block merges the last
clusters, `Exact`, `Coarse` and `Links` lie in its shared memory, where clusters are numbered as
they come.
"""

from __future__ import annotations

from typing import NamedTuple

from numba import cuda

from ccam_deploy.kernels.cuda.collectives import Array


class Exact(NamedTuple):
    """The clusters in float64, each array [C] except for the centroids.

    Attributes:
        centroid: [4, C].
        size: The number of channels.
        spread: The sum of squared distances to the centroid.
        height: The height at which the cluster arose.
    """

    centroid: Array
    size: Array
    spread: Array
    height: Array


class Coarse(NamedTuple):
    """The clusters in float32, scaled so that the layer's largest statistic is about 1.

    Each array is [C] and contiguous, so that a candidate's address is cheap to compute.

    Attributes:
        centroid: Four arrays, the scaled centroid's coordinates.
        size: The number of channels.
        error: A bound on the distance from the scaled centroid to the true one.
    """

    centroid: tuple[Array, Array, Array, Array]
    size: Array
    error: Array


class Links(NamedTuple):
    """How the clusters relate, each array [C] int32.

    Attributes:
        nearest: The nearest cluster.
        live: Clusters that were not merged into another, in the first elements and in any order:
            those that an odd round begins with.
        other_live: The same of even rounds.
        stale: The clusters whose nearest is out of date after a round, in the first elements.
        slot: Each cluster's slot.
    """

    nearest: Array
    live: Array
    other_live: Array
    stale: Array
    slot: Array


class History(NamedTuple):
    """What was merged with what, by slot; each array [C] except for the centroids.

    Attributes:
        centroid: [4, C] float64, of the slot's cluster when it was merged into another; for slot 0,
            in the end, of all channels.
        size: float64, the number of channels of the same.
        spread: float64, the sum of squared distances to the centroid of the same.
        old_centroid: [4, C] float64, for a slot that was merged into another: the other's before.
        old_size: float64, the other's size before.
        old_spread: float64, the other's spread before.
        merge_height: float64, for a slot that was merged into another: the height of that merge.
        parent: int32, the slot that a slot was merged into, or -1.
        order: int32, for a slot that was merged into another: when, as round · SLOTS + slot.
    """

    centroid: Array
    size: Array
    spread: Array
    old_centroid: Array
    old_size: Array
    old_spread: Array
    merge_height: Array
    parent: Array
    order: Array


@cuda.jit(device=True)
def exact_of(rows: Array, start: int, end: int) -> Exact:
    """The slots from `start` to `end` of [14, n] float64."""
    return Exact(
        rows[0:4, start:end],
        rows[4, start:end],
        rows[5, start:end],
        rows[6, start:end],
    )


@cuda.jit(device=True)
def coarse_of(rows: Array, start: int, end: int) -> Coarse:
    """The slots from `start` to `end` of [6, n] float32."""
    centroid = rows[0, start:end], rows[1, start:end], rows[2, start:end], rows[3, start:end]
    return Coarse(centroid, rows[4, start:end], rows[5, start:end])


@cuda.jit(device=True)
def links_of(rows: Array, start: int, end: int) -> Links:
    """The slots from `start` to `end` of [7, n] int32."""
    return Links(
        rows[0, start:end],
        rows[1, start:end],
        rows[2, start:end],
        rows[3, start:end],
        rows[4, start:end],
    )


@cuda.jit(device=True)
def lists_of(links: Links, turn: int) -> tuple[Array, Array]:
    """The clusters that a round begins with, and the list for those that it leaves."""
    if turn % 2 == 1:
        return links.live, links.other_live
    return links.other_live, links.live


@cuda.jit(device=True)
def history_of(exact_rows: Array, link_rows: Array, start: int, end: int) -> History:
    """The slots from `start` to `end` of [14, n] float64 and [7, n] int32."""
    return History(
        exact_rows[0:4, start:end],
        exact_rows[4, start:end],
        exact_rows[5, start:end],
        exact_rows[7:11, start:end],
        exact_rows[11, start:end],
        exact_rows[12, start:end],
        exact_rows[13, start:end],
        link_rows[5, start:end],
        link_rows[6, start:end],
    )


@cuda.jit(device=True)
def clusters_of(
    exact_rows: Array, coarse_rows: Array, link_rows: Array, start: int, end: int
) -> tuple[Exact, Coarse, Links, History]:
    """The slots from `start` to `end`, those of a layer and pair."""
    return (
        exact_of(exact_rows, start, end),
        coarse_of(coarse_rows, start, end),
        links_of(link_rows, start, end),
        history_of(exact_rows, link_rows, start, end),
    )
