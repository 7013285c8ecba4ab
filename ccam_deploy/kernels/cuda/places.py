"""Recipro-CAM (Byun & Lee 2022): feature maps of which a single place is left."""

from __future__ import annotations

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import Array
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.row_buffers import NEXT, ROWS, SHOWN
from ccam_deploy.kernels.cuda.rows import pad


@kernel
def isolate(
    progress: Array, shown: Array, features: Array, alone: Array, owner: Array, item: Array
) -> None:
    """Copy one place of all channels into each row of a chunk, and zeros. One block per row.

    All images of a run come at a place before the next place.

    Args:
        progress: [4] int32; see `row_buffers`.
        shown: [B] int32, the images of the run.
        features: [B, C, h · w] float32 or float16.
        alone: [n, C · h · w] float32 or float16, written.
        owner: [n] int64, written: the image of each row.
        item: [n] int32, written: the place of each row; -1 for padding.
    """
    row = cuda.blockIdx.x
    number = progress[NEXT] + row
    if number >= progress[ROWS]:
        pad(row, alone, owner, item)
        return
    place, image = number // progress[SHOWN], shown[number % progress[SHOWN]]
    places = features.shape[2]
    for element in range(cuda.threadIdx.x, alone.shape[1], cuda.blockDim.x):
        value = np.float32(0)
        if element % places == place:
            value = np.float32(features[image, element // places, place])
        alone[row, element] = value
    if cuda.threadIdx.x == 0:
        owner[row] = image
        item[row] = place
