"""RISE (Petsiuk et al. 2018): masks of random cells, and their sum by their scores."""

from __future__ import annotations

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import Array
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.masks import bilinear, corners
from ccam_deploy.kernels.cuda.row_buffers import NEXT, PAIRS, ROWS, SHOWN
from ccam_deploy.kernels.cuda.rows import pad


@kernel
def render_grids(
    progress: Array,
    shown: Array,
    cells: Array,
    cut: Array,
    low: Array,
    share: Array,
    shape: tuple[int, int, int],
    masks: Array,
    owner: Array,
    item: Array,
) -> None:
    """Enlarge the grids of a chunk, and cut masks out of them. One block per row.

    All images of a run come under a mask before the next mask.

    Args:
        progress: [4] int32; see `row_buffers`.
        shown: [B] int32, the images of the run.
        cells: [N, cells · cells] uint8, 0 or 1.
        cut: [N, 2] int32, the row and the column of the enlarged grid where a mask begins.
        low: [rows + columns of an enlarged grid] int32; see `row_buffers.enlarged`.
        share: The same of float32.
        shape: Cells along a side, rows of an enlarged grid, and W.
        masks: [n, H · W] float32 or float16, written, in [0, 1].
        owner: [n] int64, written: the image of each row.
        item: [n] int32, written: the grid of each row; -1 for padding.
    """
    row = cuda.blockIdx.x
    place = progress[NEXT] + row
    if place >= progress[ROWS]:
        pad(row, masks, owner, item)
        return
    number, image = place // progress[SHOWN], shown[place % progress[SHOWN]]
    source, top, left = (cells[number], shape[0]), cut[number, 0], shape[1] + cut[number, 1]
    for pixel in range(cuda.threadIdx.x, masks.shape[1], cuda.blockDim.x):
        line, column = top + pixel // shape[2], left + pixel % shape[2]
        around = corners(source, low[line], low[column])
        masks[row, pixel] = bilinear(around, share[line], share[column])
    if cuda.threadIdx.x == 0:
        owner[row] = image
        item[row] = number


@kernel
def clear(total: Array) -> None:
    """Begin with sums of zero. Grid (any, P).

    Args:
        total: [P, H · W] float64, written.
    """
    first = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    for pixel in range(first, total.shape[1], cuda.gridDim.x * cuda.blockDim.x):
        total[cuda.blockIdx.y, pixel] = 0.0


@kernel
def accumulate(
    progress: Array,
    scores: Array,
    masks: Array,
    owner: Array,
    item: Array,
    pair_owner: Array,
    total: Array,
) -> None:
    """Add a chunk's masks times their scores to each pair's sum, row by row. Grid (any, P).

    Args:
        progress: [4] int32; see `row_buffers`.
        scores: [P, n] float32, of the rows that show the pair's image.
        masks: [n, H · W] float32 or float16.
        owner: [n] int64, the image of each row.
        item: [n] int32; -1 for padding.
        pair_owner: [P] int32, the image of each pair.
        total: [P, H · W] float64, added to.
    """
    pair = cuda.blockIdx.y
    if pair >= progress[PAIRS]:
        return
    image = pair_owner[pair]
    first = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    for pixel in range(first, total.shape[1], cuda.gridDim.x * cuda.blockDim.x):
        value = total[pair, pixel]
        for row in range(masks.shape[0]):
            if item[row] >= 0 and owner[row] == image:
                value += np.float64(scores[pair, row]) * np.float64(np.float32(masks[row, pixel]))
        total[pair, pixel] = value


@kernel
def mean(progress: Array, total: Array, count: float, raw: Array) -> None:
    """Divide each pair's sum. Grid (any, P).

    Args:
        progress: [4] int32; see `row_buffers`.
        total: [P, H · W] float64.
        count: A float64, how many masks show a pixel on average.
        raw: [P, H · W] float32, written.
    """
    pair = cuda.blockIdx.y
    if pair >= progress[PAIRS]:
        return
    first = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    for pixel in range(first, raw.shape[1], cuda.gridDim.x * cuda.blockDim.x):
        raw[pair, pixel] = total[pair, pixel] / count
