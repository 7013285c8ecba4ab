"""Reductions over the threads of a warp or block, whose result every thread gets.

Blocks are one-dimensional and made of whole warps. `scratch` is shared memory for one value per
warp. Sums are added in a fixed order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

WARP = 32
MOST_WARPS = 32
ALL_LANES = 0xFFFFFFFF

Array = Any
"""An array in device memory, inside and outside of kernels."""

Number = Any
"""A number in a kernel, whose width follows from its operands."""


def _warp_reduction(combine: Callable[[Any, Any], Any]) -> Any:
    @cuda.jit(device=True)
    def reduce(value: Any) -> Any:
        step = WARP >> 1
        while step > 0:
            value = combine(value, cuda.shfl_xor_sync(ALL_LANES, value, step))
            step >>= 1
        return value

    return reduce


def _block_reduction(combine: Callable[[Any, Any], Any]) -> Any:
    reduce_warp = _warp_reduction(combine)

    @cuda.jit(device=True)
    def reduce(value: Any, scratch: Array) -> Any:
        value = reduce_warp(value)
        cuda.syncthreads()
        if cuda.laneid == 0:
            scratch[cuda.threadIdx.x // WARP] = value
        cuda.syncthreads()
        total = scratch[0]
        for warp in range(1, cuda.blockDim.x // WARP):
            total = combine(total, scratch[warp])
        return total

    return reduce


warp_min = _warp_reduction(min)
warp_sum = _warp_reduction(operator.add)
block_sum = _block_reduction(operator.add)
block_max = _block_reduction(max)
block_min = _block_reduction(min)


@cuda.jit(device=True)
def block_sum_before(value: int, scratch: Array) -> int:
    """The sum of `value` over the threads before this one; scratch: int32."""
    lane = cuda.laneid
    up_to = value
    step = 1
    while step < WARP:
        below = cuda.shfl_up_sync(ALL_LANES, up_to, step)
        if lane >= step:
            up_to += below
        step <<= 1
    warp = cuda.threadIdx.x // WARP
    cuda.syncthreads()
    if lane == WARP - 1:
        scratch[warp] = up_to
    cuda.syncthreads()
    before = up_to - value
    for other in range(warp):
        before += scratch[other]
    return before


@cuda.jit(device=True)
def append(chosen: bool, value: int, target: Array, sizes: Array, which: int) -> None:
    """Put the values of a warp's chosen lanes behind those that a list has, in any order of warps.

    Args:
        chosen: Whether this lane's value is put there.
        value: The lane's value.
        target: The list, int32.
        sizes: int32; the element `which`, the length of the list, grows.
        which: See `sizes`.
    """
    lane = cuda.laneid
    votes = cuda.ballot_sync(ALL_LANES, chosen)
    end = np.int32(0)
    if lane == 0 and votes != 0:
        end = cuda.atomic.add(sizes, which, np.int32(cuda.popc(votes)))
    end = cuda.shfl_sync(ALL_LANES, end, 0)
    if chosen:
        target[end + cuda.popc(votes & ((1 << lane) - 1))] = value
