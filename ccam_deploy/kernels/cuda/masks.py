"""Masks M' (Ha & Youn 2022, eq. 18-22), for all layers and pairs in one launch.

A mask's upsampled values are never stored before they are final. Each pass computes them again from
the collection sum, which is small and stays in the cache. The compiler cannot fuse the operations
differently from pass to pass, so every pass sees the same value to the bit.

Radix select finds the quantile. Floats that are not negative order as their bits do, and
those in [0, 1] have 30 of them: digits of 11, 11 and 8 bits. A thread goes down a column, where
values change slowly, and counts a run of equal digits before it adds to the histogram; so a large
area of zeros, or of any value, costs few atomic operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import (
    MOST_WARPS,
    WARP,
    Array,
    Number,
    block_max,
    block_min,
    block_sum_before,
)
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.layer_table import layer_row

FIRST_DIGIT, FIRST_SHIFT = 11, 19
BINS = 1 << FIRST_DIGIT
NOTHING_ABOVE = np.int32(2**31 - 1)

Source = tuple[Array, int]
"""A small map: its pixels row by row, [h · w], and w."""


@kernel
def index_masks(
    counts: Array, pairs: int, starts: Array, flat: Array, owner_of_mask: Array
) -> None:
    """Number the masks of a batch by pair, layer and collection. One block.

    Args:
        counts: [P, L] int32, collections.
        pairs: How many of the P are in use.
        starts: [P · L + 1] int32, written: the first mask of each pair and layer in use, then the
            number of masks.
        flat: [n] uint8; 1 is written after the last mask.
        owner_of_mask: [n] int64; 0 is written after the last mask, because a classifier's batch
            may be larger than the number of masks.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.int32)
    slots, thread = pairs * counts.shape[1], cuda.threadIdx.x
    share = (slots + cuda.blockDim.x - 1) // cuda.blockDim.x
    begin, end = min(thread * share, slots), min(thread * share + share, slots)
    thread_masks = np.int32(0)
    for slot in range(begin, end):
        thread_masks += counts[slot // counts.shape[1], slot % counts.shape[1]]
    end_of_slot = block_sum_before(thread_masks, scratch)
    if thread == 0:
        starts[0] = 0
    for slot in range(begin, end):
        end_of_slot += counts[slot // counts.shape[1], slot % counts.shape[1]]
        starts[slot + 1] = end_of_slot
    cuda.syncthreads()
    for mask in range(starts[slots] + thread, flat.shape[0], cuda.blockDim.x):
        flat[mask] = 1
        owner_of_mask[mask] = 0


@kernel
def render_masks(
    table: Array,
    low: Array,
    share: Array,
    sums: Array,
    starts: Array,
    owner: Array,
    pairs: int,
    k_max: int,
    height: int,
    ranks: tuple[int, int, float],
    masks: Array,
    flat: Array,
    owner_of_mask: Array,
) -> None:
    """Upsample, denoise and normalise collection sums. One block per mask that there may be.

    Where there are fewer than n masks, the rest of each array is not written.

    Args:
        table: [L, 8] int64.
        low: [L, H + W] int32, from Geometry.interpolation.
        share: [L, H + W] float32, from Geometry.interpolation.
        sums: [P, k_max · pixels] float32, the collection sums in [0, 1].
        starts: [P · L + 1] int32, from `index_masks`.
        owner: [P] int32, the image of each pair.
        pairs: How many of the P are in use.
        k_max: The most collections that a layer may have.
        height: H.
        ranks: Two integers and a float32, from Geometry.quantile.
        masks: [n, H · W] float32 or float16, written, in [0, 1].
        flat: [n] uint8, written: 1 where a mask is all zeros.
        owner_of_mask: [n] int64, written: the image that a mask is for.
    """
    mask, layers = cuda.blockIdx.x, table.shape[0]
    if mask >= starts[pairs * layers]:
        return
    place = holder(starts, pairs * layers, mask)
    pair, layer = place // layers, place % layers
    row = layer_row(table, layer)
    pixels = row.height * row.width
    start = k_max * row.first_pixel + (mask - starts[place]) * pixels
    source = sums[pair, start : start + pixels], row.width
    threshold, highest = threshold_and_maximum(source, low[layer], share[layer], height, ranks)
    walk_and_write(source, low[layer], share[layer], height, 0, (masks[mask], threshold, highest))
    if cuda.threadIdx.x == 0:
        flat[mask] = 0 if highest > threshold else 1
        owner_of_mask[mask] = owner[pair]


@cuda.jit(device=True)
def holder(starts: Array, slots: int, mask: int) -> int:
    """The pair and layer of a mask, as p · L + l."""
    first, last = 0, slots - 1
    while first < last:
        middle = (first + last + 1) >> 1
        if starts[middle] <= mask:
            first = middle
        else:
            last = middle - 1
    return first


@cuda.jit(device=True)
def corners(source: Source, row: int, column: int) -> tuple[Number, Number, Number, Number]:
    """The four pixels around a place: above left, below left, above right, below right; float32."""
    values, columns = source
    above = row * columns
    below = min(above + columns, values.shape[0] - columns)
    right = min(column + 1, columns - 1)
    return (
        np.float32(values[above + column]),
        np.float32(values[below + column]),
        np.float32(values[above + right]),
        np.float32(values[below + right]),
    )


@cuda.jit(device=True)
def bilinear(around: tuple[float, float, float, float], down: Number, along: Number) -> Number:
    """The value between four pixels; not negative and not above 1 where they are not."""
    left = cuda.fma(down, around[1] - around[0], around[0])
    right = cuda.fma(down, around[3] - around[2], around[2])
    return cuda.fma(along, right - left, left)


@cuda.jit(device=True)
def threshold_and_maximum(
    source: Source, low: Array, share: Array, height: int, ranks: tuple[int, int, float]
) -> tuple[float, float]:
    """The quantile, interpolated between two ranks, and the maximum of an upsampled map."""
    histogram = cuda.shared.array(BINS, np.int32)
    scratch = cuda.shared.array(MOST_WARPS, np.int32)
    lower_bin = cuda.shared.array(2, np.int32)
    higher_bin = cuda.shared.array(2, np.int32)
    rank, prefix, shift, bits = ranks[0], 0, FIRST_SHIFT, FIRST_DIGIT
    higher, highest = NOTHING_ABOVE, np.int32(0)
    while True:
        for place in range(cuda.threadIdx.x, 1 << bits, cuda.blockDim.x):
            histogram[place] = 0
        cuda.syncthreads()
        higher, highest = count_digits(source, low, share, height, shift, bits, prefix, histogram)
        cuda.syncthreads()
        locate_rank(histogram, 1 << bits, rank, scratch, lower_bin)
        if shift == 0:
            break
        prefix, rank = (prefix << bits) + lower_bin[0], lower_bin[1]
        bits = min(shift, FIRST_DIGIT)
        shift -= bits
    locate_rank(histogram, 1 << bits, rank + ranks[1] - ranks[0], scratch, higher_bin)
    higher, highest = block_min(higher, scratch), block_max(highest, scratch)
    lower = np.int32((prefix << bits) + lower_bin[0])
    if higher_bin[0] >= 0:
        higher = np.int32((prefix << bits) + higher_bin[0])
    lower_value, higher_value = lower.view(np.float32), higher.view(np.float32)
    threshold = cuda.fma(higher_value - lower_value, ranks[2], lower_value)
    return threshold, highest.view(np.float32)


def walker(visit: Callable[..., Any]) -> Any:
    """A device function that shows each pixel of an upsampled map to `visit`.

    `visit` takes its last result, `constants`, the pixel's place and its value. Each thread begins
    with `state`, and gets its last result.
    """

    @cuda.jit(device=True)
    def walk(
        source: Source, low: Array, share: Array, height: int, state: Any, constants: Any
    ) -> Any:
        width = low.shape[0] - height
        groups = (width + WARP - 1) // WARP
        warp, warps = cuda.threadIdx.x // WARP, cuda.blockDim.x // WARP
        stripes = max(1, warps // groups)
        for part in range(warp, groups * stripes, warps):
            x = part % groups * WARP + cuda.laneid
            stripe = part // groups
            if x < width:
                column, along = low[height + x], share[height + x]
                row, around = low[0], corners(source, low[0], column)
                for y in range(height * stripe // stripes, height * (stripe + 1) // stripes):
                    if low[y] != row:
                        row = low[y]
                        around = corners(source, row, column)
                    state = visit(
                        state, constants, y * width + x, bilinear(around, share[y], along)
                    )
        return state

    return walk


@cuda.jit(device=True)
def _count(
    state: tuple[Number, Number, Number, Number],
    constants: tuple[Array, int, int, int],
    place: int,
    value: Number,
) -> tuple[Number, Number, Number, Number]:
    run_digit, run, higher, highest = state
    histogram, shift, bits, prefix = constants
    order = value.view(np.int32)
    highest = max(highest, order)
    above = order >> (shift + bits)
    if above == prefix:
        digit = (order >> shift) - (prefix << bits)
        if digit != run_digit:
            if run > 0:
                cuda.atomic.add(histogram, run_digit, run)
            run_digit, run = digit, 0
        run += 1
    elif above > prefix:
        higher = min(higher, order)
    return run_digit, run, higher, highest


@cuda.jit(device=True)
def _write(state: int, constants: tuple[Array, float, float], place: int, value: Number) -> int:
    mask, threshold, highest = constants
    mask[place] = value / highest if value > threshold else np.float32(0)
    return state


walk_and_count = walker(_count)
walk_and_write = walker(_write)


@cuda.jit(device=True)
def count_digits(
    source: Source,
    low: Array,
    share: Array,
    height: int,
    shift: int,
    bits: int,
    prefix: int,
    histogram: Array,
) -> tuple[Number, Number]:
    """Count each digit that follows a prefix in the bits of an upsampled map's values.

    Returns:
        The thread's least value with a prefix above that one, and its largest value, as bits.
    """
    start = 0, 0, NOTHING_ABOVE, np.int32(0)
    run_digit, run, higher, highest = walk_and_count(
        source, low, share, height, start, (histogram, shift, bits, prefix)
    )
    if run > 0:
        cuda.atomic.add(histogram, run_digit, run)
    return higher, highest


@cuda.jit(device=True)
def locate_rank(
    histogram: Array, bins: int, rank: int, scratch: Array, bin_and_rank: Array
) -> None:
    """Write the bin that holds a rank, and the rank within it; -1 where there are fewer values."""
    thread = cuda.threadIdx.x
    part = (bins + cuda.blockDim.x - 1) // cuda.blockDim.x
    begin, end = min(thread * part, bins), min(thread * part + part, bins)
    thread_values = np.int32(0)
    for place in range(begin, end):
        thread_values += histogram[place]
    if thread == 0:
        bin_and_rank[0] = -1
    before = block_sum_before(thread_values, scratch)
    if before <= rank < before + thread_values:
        place = begin
        while before + histogram[place] <= rank:
            before += histogram[place]
            place += 1
        bin_and_rank[0] = place
        bin_and_rank[1] = rank - before
    cuda.syncthreads()
