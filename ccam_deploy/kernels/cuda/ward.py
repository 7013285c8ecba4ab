"""Ward's hierarchy for all layers and pairs (Ha & Youn 2022, eq. 6-11).

Each round merges all pairs of clusters that are each other's nearest; Ward's distance is
reducible, so the tree is that of merging one pair at a time. Only clusters that were merged, and
those whose nearest was, look for a new one. A cluster lives in the slot of its first channel.

The first rounds of a layer of many channels use the whole grid, two launches each: `merge` and
`relink`. Each round goes through a list of the clusters that are left and writes the next; the
order of a list, which is never the same, changes nothing. The last clusters are merged by one
block, see `ward_block`. The number of launches does not depend on the data, so that they can be
captured: a layer that has few clusters already passes the rounds that are left, and one that still
has many is merged by its block in global memory until they fit. How the rounds are shared out
changes no bit of the result.

Ties are broken by i XOR j: identical channels pair up, and log2(C) rounds make a single cluster of
them. A tie with a new cluster may leave no two clusters that are each other's nearest; in the next
round all of them look again, and the pair that is least in (distance, i XOR j) merges. So there are
at most 2·(C − 1) rounds.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.clusters import find_nearest, merge_or_keep, write_scaled
from ccam_deploy.kernels.cuda.collectives import MOST_WARPS, WARP, Array, append, block_max
from ccam_deploy.kernels.cuda.hierarchy import clusters_of, lists_of
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
    alive: Array,
    stale: Array,
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
        alive: [P, L, rounds + 1] int32, written: the clusters that each round of the grid begins
            with: at first the channels, or 0 where a statistic is not finite; then 0.
        stale: [P, L, rounds + 1] int32, set to zeros: of how many the nearest is out of date.
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
    for turn in range(cuda.threadIdx.x, alive.shape[2], cuda.blockDim.x):
        alive[pair, layer, turn] = channels if turn == 0 and finite != 0 else 0
        stale[pair, layer, turn] = 0

    for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
        for axis in range(4):
            exact.centroid[axis, channel] = np.float64(psi[pair, first + channel, axis])
        write_scaled(
            coarse,
            channel,
            exact.centroid[0, channel] * scale,
            exact.centroid[1, channel] * scale,
            exact.centroid[2, channel] * scale,
            exact.centroid[3, channel] * scale,
        )
        exact.size[channel] = 1
        exact.spread[channel] = 0
        exact.height[channel] = 0
        coarse.size[channel] = 1
        coarse.error[channel] = 0
        links.live[channel] = channel
        links.slot[channel] = channel
        history.parent[channel] = -1


@kernel
def search(
    table: Array,
    all_exact: Array,
    all_coarse: Array,
    all_links: Array,
    alive: Array,
) -> None:
    """Find each channel's nearest. A warp takes channels in turn: grid (any, L, P).

    Args:
        table: [L, 8] int64.
        all_exact: [EXACT_ROWS, P · channels] float64, from `begin`.
        all_coarse: [COARSE_ROWS, P · channels] float32, from `begin`.
        all_links: [LINK_ROWS, P · channels] int32, from `begin`; `nearest` is written.
        alive: [P, L, rounds + 1] int32, from `begin`.
    """
    layer, pair = cuda.blockIdx.y, cuda.blockIdx.z
    channels = alive[pair, layer, 0]
    if channels == 0:
        return
    start = pair * (all_links.shape[1] // alive.shape[0]) + layer_row(table, layer).first_channel
    exact, coarse, links, _ = clusters_of(all_exact, all_coarse, all_links, start, start + channels)
    find_nearest(
        exact,
        coarse,
        links,
        links.live,
        channels,
        links.live,
        channels,
        cuda.grid(1),
        cuda.gridsize(1),
    )


@kernel
def merge(
    table: Array,
    all_exact: Array,
    all_coarse: Array,
    all_links: Array,
    scales: Array,
    alive: Array,
    stale: Array,
    turn: int,
    most: int,
) -> None:
    """Merge, in one round, the pairs that are each other's nearest: grid (any, L, P).

    Args:
        table: [L, 8] int64.
        all_exact: [EXACT_ROWS, P · channels] float64, from `begin` and earlier rounds.
        all_coarse: [COARSE_ROWS, P · channels] float32, from the same.
        all_links: [LINK_ROWS, P · channels] int32, from the same and `search`; the lists of
            clusters that are left and of those whose nearest is out of date are written.
        scales: [P, L] float64, from `begin`.
        alive: [P, L, rounds + 1] int32, the clusters that are left: before the first round, then
            after each; this round's are counted.
        stale: [P, L, rounds + 1] int32, how many of those have a nearest that is out of date; this
            round's are counted.
        turn: The round, from 1.
        most: A layer of no more clusters than that, 1 or more, is left as it is.
    """
    layer, pair = cuda.blockIdx.y, cuda.blockIdx.z
    before = alive[pair, layer, turn - 1]
    if before <= most:
        return
    row = layer_row(table, layer)
    start = pair * (all_links.shape[1] // alive.shape[0]) + row.first_channel
    exact, coarse, links, history = clusters_of(
        all_exact, all_coarse, all_links, start, start + row.channels
    )
    source, target = lists_of(links, turn)
    # A warp's lanes go on together, because `append` is for all of them.
    for first in range(cuda.grid(1) // WARP * WARP, before, cuda.gridDim.x * cuda.blockDim.x):
        place = first + cuda.laneid
        cluster, left, out_of_date = 0, False, False
        if place < before:
            cluster = source[place]
            left, out_of_date = merge_or_keep(
                exact, coarse, links, history, scales[pair, layer], cluster, turn
            )
        append(left, cluster, target, alive[pair, layer], turn)
        append(out_of_date, cluster, links.stale, stale[pair, layer], turn)


@kernel
def relink(
    table: Array,
    all_exact: Array,
    all_coarse: Array,
    all_links: Array,
    alive: Array,
    stale: Array,
    turn: int,
) -> None:
    """Find the nearest of clusters whose nearest is out of date: grid (any, L, P).

    A warp takes clusters in turn. After a round without a merge, all look again.

    Args:
        table: [L, 8] int64.
        all_exact: [EXACT_ROWS, P · channels] float64, from the round's `merge`.
        all_coarse: [COARSE_ROWS, P · channels] float32, from the same.
        all_links: [LINK_ROWS, P · channels] int32, from the same; `nearest` is written.
        alive: [P, L, rounds + 1] int32, from the same; 0 where a layer had no round.
        stale: [P, L, rounds + 1] int32, from the same.
        turn: The round, from 1.
    """
    layer, pair = cuda.blockIdx.y, cuda.blockIdx.z
    left = alive[pair, layer, turn]
    if left <= 1:
        return
    row = layer_row(table, layer)
    start = pair * (all_links.shape[1] // alive.shape[0]) + row.first_channel
    exact, coarse, links, _ = clusters_of(
        all_exact, all_coarse, all_links, start, start + row.channels
    )
    among = lists_of(links, turn + 1)[0]
    looking, count = links.stale, stale[pair, layer, turn]
    if left == alive[pair, layer, turn - 1]:
        looking, count = among, left
    find_nearest(exact, coarse, links, looking, count, among, left, cuda.grid(1), cuda.gridsize(1))
