"""Masks M' (Ha & Youn 2022, eq. 18-22), for all layers and pairs, each by several blocks.

A mask's upsampled values are never stored before they are final. Each pass computes them again from
the collection sum, which is small and stays in the cache. The compiler cannot fuse the operations
differently from pass to pass, so every pass sees the same value to the bit.

Radix select finds the quantile. Floats that are not negative order as their bits do, and
those in [0, 1] have 30 of them: three digits, a launch each. A block counts its part of a mask in
shared memory, and adds that to the mask's histogram; the blocks of the next launch find the digit
there. A thread goes down a column, where values change slowly, and counts a run of equal digits
before it adds to the histogram; so a large area of zeros, or of any value, costs few atomic
operations.

A histogram is set to zeros by the launch after the last that reads it, for the next batch.
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
from ccam_deploy.kernels.cuda.geometry import BINS, DIGITS
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.layer_table import layer_row

DIGIT_BITS = BINS.bit_length() - 1
NOTHING_ABOVE = np.int32(2**31 - 1)
LAST = DIGITS - 1

Source = tuple[Array, int]
"""A small map: its pixels row by row, [h · w], and w."""

Around = tuple[Number, Number, Number, Number]
"""What lies around a place, float32: the pixel above left and the step to the one below it, then
the same to the right."""


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
def count_values(
    table: Array,
    low: Array,
    share: Array,
    sums: Array,
    starts: Array,
    pairs: int,
    k_max: int,
    height: int,
    ranks: tuple[int, int, float],
    digit: int,
    histograms: Array,
    selected: Array,
) -> None:
    """Count a digit of the upsampled collection sums. Grid (masks that there may be, parts).

    Only values that share their first digits with the one of the lower rank are counted. To be
    launched for each of the DIGITS in turn, with the same parts.

    Args:
        table: [L, 8] int64.
        low: [L, H + W] int32, from Geometry.interpolation.
        share: [L, H + W] float32, from Geometry.interpolation.
        sums: [P, k_max · pixels] float32, the collection sums in [0, 1].
        starts: [P · L + 1] int32, from `index_masks`.
        pairs: How many of the P are in use.
        k_max: The most collections that a layer may have.
        height: H.
        ranks: Two integers and a float32, from Geometry.quantile.
        digit: Which, from 0.
        histograms: [n, DIGITS, BINS] int32; that of the digit, zeros before, is written.
        selected: [n, DIGITS, 2] int32, written: after each digit but the last, the first digits of
            the lower rank's value, and its rank among those that share them; then the least value
            with greater first digits, and the greatest of all, as bits.
    """
    counts = cuda.shared.array(BINS, np.int32)
    scratch = cuda.shared.array(MOST_WARPS, np.int32)
    found = cuda.shared.array(2, np.int32)
    mask, layers = cuda.blockIdx.x, table.shape[0]
    if mask >= starts[pairs * layers]:
        return
    thread, first = cuda.threadIdx.x, cuda.blockIdx.y == 0
    place = holder(starts, pairs * layers, mask)
    layer = place % layers
    source = collection_sum(table, sums, starts, layers, k_max, place, mask)
    for value in range(thread, BINS, cuda.blockDim.x):
        counts[value] = 0
    prefix = np.int32(0)
    if digit > 0:
        prefix, rank = selected_before(selected[mask], ranks[0], digit - 1)
        locate_rank(histograms[mask, digit - 1], rank, scratch, found)
        prefix = np.int32((prefix << DIGIT_BITS) + found[0])
        if first and thread == 0:
            selected[mask, digit - 1, 0] = prefix
            selected[mask, digit - 1, 1] = found[1]
    elif first and thread == 0:
        selected[mask, LAST, 0] = NOTHING_ABOVE
        selected[mask, LAST, 1] = 0
    clear_part(histograms[mask, 0 if digit == LAST else LAST], digit != 1)
    cuda.syncthreads()

    shift = np.int32((LAST - digit) * DIGIT_BITS)
    start = np.int32(0), np.int32(0), NOTHING_ABOVE, np.int32(0)
    run_digit, run, higher, highest = walk_and_count(
        source, low[layer], share[layer], height, start, (counts, shift, prefix)
    )
    if run > 0:
        cuda.atomic.add(counts, run_digit, run)
    cuda.syncthreads()
    for value in range(thread, BINS, cuda.blockDim.x):
        if counts[value] > 0:
            cuda.atomic.add(histograms, (mask, digit, value), counts[value])
    if digit == LAST:
        higher, highest = block_min(higher, scratch), block_max(highest, scratch)
        if thread == 0:
            cuda.atomic.min(selected, (mask, LAST, 0), higher)
            cuda.atomic.max(selected, (mask, LAST, 1), highest)


@kernel
def write_masks(
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
    histograms: Array,
    selected: Array,
    masks: Array,
    flat: Array,
    owner_of_mask: Array,
) -> None:
    """Upsample, denoise and normalise collection sums. Grid (masks that there may be, parts).

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
        histograms: [n, DIGITS, BINS] int32, from `count_values` for every digit.
        selected: [n, DIGITS, 2] int32, from the same.
        masks: [n, H · W] float32 or float16, written, in [0, 1].
        flat: [n] uint8, written: 1 where a mask is all zeros.
        owner_of_mask: [n] int64, written: the image that a mask is for.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.int32)
    lower_bin = cuda.shared.array(2, np.int32)
    higher_bin = cuda.shared.array(2, np.int32)
    mask, layers = cuda.blockIdx.x, table.shape[0]
    if mask >= starts[pairs * layers]:
        return
    place = holder(starts, pairs * layers, mask)
    pair, layer = place // layers, place % layers
    source = collection_sum(table, sums, starts, layers, k_max, place, mask)
    prefix, rank = selected_before(selected[mask], ranks[0], LAST)
    locate_rank(histograms[mask, LAST], rank, scratch, lower_bin)
    locate_rank(histograms[mask, LAST], rank + ranks[1] - ranks[0], scratch, higher_bin)
    lower = np.int32((prefix << DIGIT_BITS) + lower_bin[0])
    higher, highest = selected[mask, LAST, 0], selected[mask, LAST, 1].view(np.float32)
    if higher_bin[0] >= 0:
        higher = np.int32((prefix << DIGIT_BITS) + higher_bin[0])
    lower_value, higher_value = lower.view(np.float32), higher.view(np.float32)
    threshold = cuda.fma(higher_value - lower_value, ranks[2], lower_value)
    walk_and_write(source, low[layer], share[layer], height, 0, (masks[mask], threshold, highest))
    clear_part(histograms[mask, 1], True)
    if cuda.threadIdx.x == 0 and cuda.blockIdx.y == 0:
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
def collection_sum(
    table: Array, sums: Array, starts: Array, layers: int, k_max: int, place: int, mask: int
) -> Source:
    """The small map of a mask; place: the pair and layer, as p · L + l."""
    row = layer_row(table, place % layers)
    pixels = row.height * row.width
    start = k_max * row.first_pixel + (mask - starts[place]) * pixels
    return sums[place // layers, start : start + pixels], row.width


@cuda.jit(device=True)
def selected_before(selected: Array, rank: int, digits: int) -> tuple[int, int]:
    """The first digits of the lower rank's value, and its rank among those that share them."""
    if digits == 0:
        return 0, rank
    return selected[digits - 1, 0], selected[digits - 1, 1]


@cuda.jit(device=True)
def clear_part(histogram: Array, wanted: bool) -> None:
    """Set a block's part of a mask's histogram to zeros."""
    if wanted:
        first = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        for value in range(first, BINS, cuda.gridDim.y * cuda.blockDim.x):
            histogram[value] = 0


@cuda.jit(device=True)
def corners(source: Source, row: int, column: int) -> Around:
    """The four pixels around a place."""
    values, columns = source
    above = row * columns
    below = min(above + columns, values.shape[0] - columns)
    right = min(column + 1, columns - 1)
    left_above = np.float32(values[np.uint32(above + column)])
    right_above = np.float32(values[np.uint32(above + right)])
    left_below = np.float32(values[np.uint32(below + column)])
    right_below = np.float32(values[np.uint32(below + right)])
    return left_above, left_below - left_above, right_above, right_below - right_above


@cuda.jit(device=True)
def bilinear(around: Around, down: Number, along: Number) -> Number:
    """The value between four pixels; not negative and not above 1 where they are not."""
    left = cuda.fma(down, around[1], around[0])
    right = cuda.fma(down, around[3], around[2])
    return cuda.fma(along, right - left, left)


def walker(visit: Callable[..., Any]) -> Any:
    """A device function that shows each pixel of a block's part of an upsampled map to `visit`.

    `visit` takes its last result, `constants`, the pixel's place and its value. Each thread begins
    with `state`, and gets its last result. The blocks of the grid's second axis share a map out.
    """

    @cuda.jit(device=True)
    def walk(
        source: Source, low: Array, share: Array, height: int, state: Any, constants: Any
    ) -> Any:
        rows, width = np.int32(height), np.int32(low.shape[0] - height)
        groups = np.int32((width + WARP - 1) // WARP)
        block_warps = np.int32(cuda.blockDim.x) // WARP
        warps = np.int32(cuda.gridDim.y * block_warps)
        stripes = max(np.int32(1), np.int32(warps // groups))
        part = np.int32(cuda.blockIdx.y * block_warps + cuda.threadIdx.x // WARP)
        while part < groups * stripes:
            stripe = np.int32(part // groups)
            x = np.int32((part - stripe * groups) * WARP + cuda.laneid)
            if x < width:
                column, along = low[np.uint32(rows + x)], share[np.uint32(rows + x)]
                y, end = np.int32(rows * stripe // stripes), rows * (stripe + 1) // stripes
                row = np.int32(-1)
                around = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                place = np.int32(y * width + x)
                while y < end:
                    if low[np.uint32(y)] != row:
                        row = low[np.uint32(y)]
                        around = corners(source, row, column)
                    value = bilinear(around, share[np.uint32(y)], along)
                    state = visit(state, constants, place, value)
                    y, place = np.int32(y + 1), np.int32(place + width)
            part = np.int32(part + warps)
        return state

    return walk


@cuda.jit(device=True)
def _count(
    state: tuple[Number, Number, Number, Number],
    constants: tuple[Array, Number, Number],
    place: int,
    value: Number,
) -> tuple[Number, Number, Number, Number]:
    run_digit, run, higher, highest = state
    counts, shift, prefix = constants
    order = value.view(np.int32)
    highest = max(highest, order)
    digits = np.int32(order >> shift)
    above = np.int32(digits >> DIGIT_BITS)
    if above == prefix:
        digit = np.int32(digits & (BINS - 1))
        if digit != run_digit:
            if run > 0:
                cuda.atomic.add(counts, np.uint32(run_digit), run)
            run_digit, run = digit, np.int32(0)
        run = np.int32(run + 1)
    elif above > prefix:
        higher = min(higher, order)
    return run_digit, run, higher, highest


@cuda.jit(device=True)
def _write(state: int, constants: tuple[Array, float, float], place: int, value: Number) -> int:
    mask, threshold, highest = constants
    mask[np.uint32(place)] = value / highest if value > threshold else np.float32(0)
    return state


walk_and_count = walker(_count)
walk_and_write = walker(_write)


@cuda.jit(device=True)
def locate_rank(histogram: Array, rank: int, scratch: Array, bin_and_rank: Array) -> None:
    """Write the bin that holds a rank, and the rank within it; -1 where there are fewer values."""
    thread = cuda.threadIdx.x
    part = (BINS + cuda.blockDim.x - 1) // cuda.blockDim.x
    begin, end = min(thread * part, BINS), min(thread * part + part, BINS)
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
