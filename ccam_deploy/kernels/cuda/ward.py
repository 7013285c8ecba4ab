"""Ward's hierarchy for all layers and pairs (Ha & Youn 2022, eq. 6-11).

Each round merges all pairs of clusters that are each other's nearest; Ward's distance is
reducible, so the tree is that of merging one pair at a time. Only clusters that were merged, and
those whose nearest was, look for a new one. A cluster lives in the slot of its first channel.

The first rounds of a layer of many channels use the whole grid, two launches each: `merge` and
`relink`. The last clusters are merged by one block, see `ward_block`. The number of launches does
not depend on the data, so that they can be captured: a layer that has few clusters already passes
the rounds that are left, and one that still has many is merged by its block in global memory until
they fit. How the rounds are shared out changes no bit of the result.

Ties are broken by i XOR j: identical channels pair up, and log2(C) rounds make a single cluster of
them. A tie with a new cluster may leave no two clusters that are each other's nearest; in the next
round all of them look again, and the pair that is least in (distance, i XOR j) merges. So there are
at most 2·(C − 1) rounds.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.clusters import join, nearest, out_of_date
from ccam_deploy.kernels.cuda.collectives import MOST_WARPS, WARP, Array, block_max, warp_sum
from ccam_deploy.kernels.cuda.hierarchy import clusters_of
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.layer_table import layer_row


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
    exact, coarse, links, history = clusters_of(
        all_exact, all_coarse, all_links, start, start + channels
    )

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
    exact, coarse, links, _ = clusters_of(all_exact, all_coarse, all_links, start, start + channels)
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
    exact, coarse, links, history = clusters_of(
        all_exact, all_coarse, all_links, start, start + channels
    )
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
    exact, coarse, links, history = clusters_of(
        all_exact, all_coarse, all_links, start, start + channels
    )
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
