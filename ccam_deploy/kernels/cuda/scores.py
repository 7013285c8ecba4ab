"""What goes into the graphs and comes out of them: images, the logits' gradient, masks' scores."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import (
    MOST_WARPS,
    Array,
    Number,
    block_max,
    block_min,
    block_sum,
)
from ccam_deploy.kernels.cuda.masks import holder

INFINITY = np.float32(np.inf)
NO_CLASS = np.int32(2**31 - 1)


@cuda.jit
def cast(values: Array, target: Array) -> None:
    """Copy into another type; any grid. values: [n] float32.   target: [n] float32 or float16."""
    first = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    for place in range(first, target.shape[0], cuda.gridDim.x * cuda.blockDim.x):
        target[place] = values[place]


@cuda.jit
def gather(source: Array, owner: Array, target: Array) -> None:
    """Copy each pair's image's row: grid (any, P).

    source: [B, n], target: [P, n], of one type.   owner: [P] int32, the image of each pair.
    """
    row, copied = source[owner[cuda.blockIdx.y]], target[cuda.blockIdx.y]
    first = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    for place in range(first, row.shape[0], cuda.gridDim.x * cuda.blockDim.x):
        copied[place] = row[place]


@cuda.jit
def output_gradient(
    logits: Array,
    owner: Array,
    codes: Array,
    scale: float,
    probability: int,
    targets: Array,
    gradient: Array,
) -> None:
    """Choose each pair's class, and write the gradient of its score. One block per pair.

    logits: [B, classes] float32 or float16.   owner: [P] int32, the image of each pair.
    codes: [P] int32, a class, or -1 - r for the class of rank r by its logit, from 0; the lower
    class comes first where logits are equal.   scale: float32, what to multiply by.
    probability: 0 where the score is the logit, 1 where it is the softmax probability.
    targets: [P] int64, the classes chosen; 0 where undefined logits leave none of that rank.
    gradient: [P, classes] float32 or float16, ∂score/∂logits times the scale.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float32)
    pair = cuda.blockIdx.x
    own, written = logits[owner[pair]], gradient[pair]
    target = codes[pair]
    if target < 0:
        target = class_of_rank(own, -1 - target)
    if cuda.threadIdx.x == 0:
        targets[pair] = target
    highest, total, share = np.float32(0), np.float32(1), np.float32(0)
    if probability != 0:
        highest, total = softmax_terms(own, scratch)
        share = math.exp(np.float32(own[target]) - highest) / total
    for place in range(cuda.threadIdx.x, own.shape[0], cuda.blockDim.x):
        value = np.float32(1) if place == target else np.float32(0)
        if probability != 0:
            value = share * (value - math.exp(np.float32(own[place]) - highest) / total)
        written[place] = scale * value


@cuda.jit
def mask_scores(
    logits: Array,
    starts: Array,
    targets: Array,
    pairs: int,
    layers: int,
    probability: int,
    scores: Array,
) -> None:
    """The score of each masked image for its pair's class. One block per row of the logits.

    logits: [rows, classes] float32 or float16; rows after the last mask are left out.
    starts: from `masks.index_masks`.   targets: [P] int64.
    pairs: how many of the P are in use.   probability: as for `output_gradient`.
    scores: [n] float32, written.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float32)
    mask = cuda.blockIdx.x
    if mask >= starts[pairs * layers]:
        return
    target = targets[holder(starts, pairs * layers, mask) // layers]
    score = np.float32(logits[mask, target])
    if probability != 0:
        highest, total = softmax_terms(logits[mask], scratch)
        score = math.exp(score - highest) / total
    if cuda.threadIdx.x == 0:
        scores[mask] = score


@cuda.jit(device=True)
def class_of_rank(logits: Array, rank: int) -> Number:
    """The class that comes after `rank` others by logit; 0 if there is none."""
    values = cuda.shared.array(MOST_WARPS, np.float32)
    classes = cuda.shared.array(MOST_WARPS, np.int32)
    value, found = INFINITY, np.int32(-1)
    for _ in range(rank + 1):
        before, after = value, found
        value, found = -INFINITY, NO_CLASS
        for place in range(cuda.threadIdx.x, logits.shape[0], cuda.blockDim.x):
            its = np.float32(logits[place])
            left = its < before or (its == before and place > after)
            if left and (found == NO_CLASS or its > value):
                value, found = its, np.int32(place)
        best = block_max(value, values)
        found = block_min(found if value == best else NO_CLASS, classes)
        value = best
    return found if found != NO_CLASS else np.int32(0)


@cuda.jit(device=True)
def softmax_terms(logits: Array, scratch: Array) -> tuple[Number, Number]:
    """The largest logit, and the sum of the exponentials of all logits less that one."""
    highest, total = -INFINITY, np.float32(0)
    for place in range(cuda.threadIdx.x, logits.shape[0], cuda.blockDim.x):
        highest = max(highest, np.float32(logits[place]))
    highest = block_max(highest, scratch)
    for place in range(cuda.threadIdx.x, logits.shape[0], cuda.blockDim.x):
        total += math.exp(np.float32(logits[place]) - highest)
    return highest, block_sum(total, scratch)
