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
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.masks import holder

INFINITY = np.float32(np.inf)
NO_CLASS = np.int32(2**31 - 1)

LOGIT, SOFTMAX, SIGMOID = range(3)
"""How the score of a class is computed of logits."""


@kernel
def cast(values: Array, target: Array) -> None:
    """Copy values into another type. Any grid.

    Args:
        values: [n] float32.
        target: [n] float32 or float16, written.
    """
    first = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    for place in range(first, target.shape[0], cuda.gridDim.x * cuda.blockDim.x):
        target[place] = values[place]


@kernel
def gather(source: Array, owner: Array, target: Array) -> None:
    """Copy the row of each pair's image. Grid (any, P).

    Args:
        source: [B, n] of any type.
        owner: [P] int32, the image of each pair.
        target: [P, n] of the same type, written.
    """
    row, copied = source[owner[cuda.blockIdx.y]], target[cuda.blockIdx.y]
    first = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    for place in range(first, row.shape[0], cuda.gridDim.x * cuda.blockDim.x):
        copied[place] = row[place]


@kernel
def output_gradient(
    logits: Array,
    owner: Array,
    codes: Array,
    scale: float,
    scoring: int,
    targets: Array,
    slopes: Array,
    gradient: Array,
) -> None:
    """Find each pair's class, and write the gradient of its score. One block per pair.

    The gradient's largest element, the class's own, is kept apart: that of the probability of a
    class that the network is sure of is below what half precision can tell from zero.

    Args:
        logits: [B, classes] float32 or float16.
        owner: [P] int32, the image of each pair.
        codes: [P] int32, a class, or -1 - r for the class of rank r by its logit, from 0; of equal
            logits, the lower class comes first.
        scale: A float32 that the gradient is multiplied by.
        scoring: LOGIT, SOFTMAX or SIGMOID: the score is the logit, or what that makes of it.
        targets: [P] int64, written: classes; 0 where undefined logits leave none of that rank.
        slopes: [P] float32, written: ∂score/∂logit of the class.
        gradient: [P, classes] float32 or float16, written: ∂score/∂logits by the slope, times the
            scale.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float32)
    pair = cuda.blockIdx.x
    image_logits, written = logits[owner[pair]], gradient[pair]
    target = codes[pair]
    if target < 0:
        target = class_of_rank(image_logits, -1 - target)
    highest, others, slope = np.float32(0), np.float32(0), np.float32(1)
    if scoring == SOFTMAX:
        highest, total = softmax_terms(image_logits, scratch)
        for place in range(cuda.threadIdx.x, image_logits.shape[0], cuda.blockDim.x):
            if place != target:  # 1 less the class's share would lose its digits near 1
                others += math.exp(np.float32(image_logits[place]) - highest)
        others = block_sum(others, scratch)
        slope = math.exp(np.float32(image_logits[target]) - highest) / total * (others / total)
    elif scoring == SIGMOID:
        logit = np.float32(image_logits[target])
        slope = sigmoid(logit) * sigmoid(-logit)
    if cuda.threadIdx.x == 0:
        targets[pair], slopes[pair] = target, slope
    for place in range(cuda.threadIdx.x, image_logits.shape[0], cuda.blockDim.x):
        value = np.float32(1) if place == target else np.float32(0)
        if scoring == SOFTMAX and place != target and others > 0:
            value = -math.exp(np.float32(image_logits[place]) - highest) / others
        written[place] = scale * value


@kernel
def mask_scores(
    logits: Array,
    starts: Array,
    targets: Array,
    pairs: int,
    layers: int,
    scoring: int,
    scores: Array,
) -> None:
    """Score each masked image for its pair's class. One block per row of the logits.

    Args:
        logits: [rows, classes] float32 or float16; rows after the last mask are left out.
        starts: [P · L + 1] int32, from `masks.index_masks`.
        targets: [P] int64, classes.
        pairs: How many of the P are in use.
        layers: L.
        scoring: As for `output_gradient`.
        scores: [n] float32, written; NaN where a logit is not finite.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float32)
    mask = cuda.blockIdx.x
    if mask >= starts[pairs * layers]:
        return
    target = targets[holder(starts, pairs * layers, mask) // layers]
    score = score_of(logits[mask], target, scoring, scratch)
    if cuda.threadIdx.x == 0:
        scores[mask] = score


@cuda.jit(device=True)
def class_of_rank(logits: Array, rank: int) -> Number:
    """The class that comes after `rank` others by logit; 0 if there is none."""
    values = cuda.shared.array(MOST_WARPS, np.float32)
    classes = cuda.shared.array(MOST_WARPS, np.int32)
    value, ranked = INFINITY, np.int32(-1)
    for _ in range(rank + 1):
        last_value, last_class = value, ranked
        value, ranked = -INFINITY, NO_CLASS
        for place in range(cuda.threadIdx.x, logits.shape[0], cuda.blockDim.x):
            logit = np.float32(logits[place])
            left = logit < last_value or (logit == last_value and place > last_class)
            if left and (ranked == NO_CLASS or logit > value):
                value, ranked = logit, np.int32(place)
        best = block_max(value, values)
        ranked = block_min(ranked if value == best else NO_CLASS, classes)
        value = best
    return ranked if ranked != NO_CLASS else np.int32(0)


@cuda.jit(device=True)
def score_of(logits: Array, target: int, scoring: int, scratch: Array) -> Number:
    """The score of a class, from the logits of one image; NaN where one of them is not finite."""
    undefined = np.float32(0)
    for place in range(cuda.threadIdx.x, logits.shape[0], cuda.blockDim.x):
        undefined += np.float32(logits[place]) - np.float32(logits[place])
    score = np.float32(logits[target]) + block_sum(undefined, scratch)
    if scoring == SOFTMAX:
        highest, total = softmax_terms(logits, scratch)
        score = math.exp(score - highest) / total
    elif scoring == SIGMOID:
        score = sigmoid(score)
    return score


@cuda.jit(device=True)
def sigmoid(logit: Number) -> Number:
    """1 / (1 + e^-x), whose exponential may overflow to infinity and so give 0."""
    return np.float32(1) / (np.float32(1) + math.exp(-logit))


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
