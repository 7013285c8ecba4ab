"""The parts of Ward's hierarchy: named arrays over the clusters of a layer.

Each group lies in one two-dimensional array of all layers and pairs, so that few arguments are
passed to the kernels; only this module knows in which row. A cluster lives in the slot of its
first channel: in every array, an element or a column is a slot.
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
        old_centroid: [4, C], for a slot that was merged into another: the other's before that.
        old_size: The other's size before the merge.
        old_spread: The other's spread before the merge.
        merge_height: For a slot that was merged into another: the height of that merge.
    """

    centroid: Array
    size: Array
    spread: Array
    height: Array
    old_centroid: Array
    old_size: Array
    old_spread: Array
    merge_height: Array


class Coarse(NamedTuple):
    """The clusters in float32, scaled so that the layer's largest statistic is about 1.

    Attributes:
        centroid: [4, C], scaled.
        size: [C], the number of channels.
        error: [C], a bound on the distance from the scaled centroid to the true one.
    """

    centroid: Array
    size: Array
    error: Array


class Links(NamedTuple):
    """How the clusters relate, each array [C] int32.

    Attributes:
        nearest: The nearest cluster.
        parent: The slot that a slot was merged into, or -1.
        order: When it was merged, as round · SLOTS + slot.
        changed: The last round in which the cluster changed.
        live: The slots that hold a cluster, in the first elements.
        other_live: The same for every second round.
        stale: The slots whose nearest is out of date; after the last round, labels.
    """

    nearest: Array
    parent: Array
    order: Array
    changed: Array
    live: Array
    other_live: Array
    stale: Array


@cuda.jit(device=True)
def exact_of(rows: Array, start: int, end: int) -> Exact:
    """The slots from `start` to `end` of [14, n] float64."""
    return Exact(
        rows[0:4, start:end],
        rows[4, start:end],
        rows[5, start:end],
        rows[6, start:end],
        rows[7:11, start:end],
        rows[11, start:end],
        rows[12, start:end],
        rows[13, start:end],
    )


@cuda.jit(device=True)
def coarse_of(rows: Array, start: int, end: int) -> Coarse:
    """The slots from `start` to `end` of [6, n] float32."""
    return Coarse(rows[0:4, start:end], rows[4, start:end], rows[5, start:end])


@cuda.jit(device=True)
def links_of(rows: Array, start: int, end: int) -> Links:
    """The slots from `start` to `end` of [7, n] int32."""
    return Links(
        rows[0, start:end],
        rows[1, start:end],
        rows[2, start:end],
        rows[3, start:end],
        rows[4, start:end],
        rows[5, start:end],
        rows[6, start:end],
    )
