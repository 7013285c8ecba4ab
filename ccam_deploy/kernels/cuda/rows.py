"""Masked forwards, a chunk of rows at a time: the scores of their logits, and how far they are.

A run has a row for each image under each mask. A chunk has always the same number of rows, so the
last ones of a run may be padding. The state of a run lies in device memory: the launches of all
chunks are the same, and one CUDA graph serves them all.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import MOST_WARPS, Array
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.row_buffers import NEXT, PAIRS
from ccam_deploy.kernels.cuda.scores import score_of

NOTHING = np.int32(-1)


@kernel
def row_scores(
    progress: Array,
    logits: Array,
    owner: Array,
    item: Array,
    pair_owner: Array,
    targets: Array,
    scoring: int,
    scores: Array,
) -> None:
    """Score each row for the pairs of its image. One block per row and pair: grid (n, P).

    Args:
        progress: [4] int32; see `row_buffers`.
        logits: [n, classes] float32 or float16, of a chunk's masked images.
        owner: [n] int64, the image of each row.
        item: [n] int32, the mask of each row; -1 for padding.
        pair_owner: [P] int32, the image of each pair.
        targets: [P] int64, classes.
        scoring: LOGIT, SOFTMAX or SIGMOID of `scores`.
        scores: [P, n] float32, written where the row shows the pair's image; NaN where a logit is
            not finite.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float32)
    row, pair = cuda.blockIdx.x, cuda.blockIdx.y
    if pair >= progress[PAIRS] or item[row] < 0 or owner[row] != pair_owner[pair]:
        return
    score = score_of(logits[row], targets[pair], scoring, scratch)
    if cuda.threadIdx.x == 0:
        scores[pair, row] = score


@kernel
def keep_scores(
    progress: Array, owner: Array, item: Array, pair_owner: Array, chunk: Array, scores: Array
) -> None:
    """Sort a chunk's scores by item, such as a channel. One block per pair.

    Args:
        progress: [4] int32; see `row_buffers`.
        owner: [n] int64, the image of each row.
        item: [n] int32, the item of each row; -1 for padding.
        pair_owner: [P] int32, the image of each pair.
        chunk: [P, n] float32, the scores of the rows that show the pair's image.
        scores: [P, items] float32, written at the chunk's items.
    """
    pair = cuda.blockIdx.x
    if pair >= progress[PAIRS]:
        return
    for row in range(cuda.threadIdx.x, item.shape[0], cuda.blockDim.x):
        if item[row] >= 0 and owner[row] == pair_owner[pair]:
            scores[pair, item[row]] = chunk[pair, row]


@kernel
def advance(progress: Array, rows: int) -> None:
    """Go on to the next chunk. One thread.

    Args:
        progress: [4] int32, changed; see `row_buffers`.
        rows: How many rows a chunk has.
    """
    progress[NEXT] += rows


@cuda.jit(device=True)
def pad(row: int, masks: Array, owner: Array, item: Array) -> None:
    """Make a row padding: an empty mask of the first image."""
    for pixel in range(cuda.threadIdx.x, masks.shape[1], cuda.blockDim.x):
        masks[row, pixel] = np.float32(0)
    if cuda.threadIdx.x == 0:
        owner[row] = 0
        item[row] = NOTHING
