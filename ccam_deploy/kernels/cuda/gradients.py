"""The weights of channels that follow from their gradients, of Grad-CAM and Grad-CAM++."""

from __future__ import annotations

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import MOST_WARPS, Array, block_sum
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.row_buffers import PAIRS

MEAN, ALPHA = range(2)
"""What weighs a channel: the mean of its gradient (Selvaraju et al. 2017, eq. 1), or the sum of its
positive gradients, each times its alpha (Chattopadhay et al. 2018, eq. 6, 19)."""


@kernel
def gradient_weights(
    progress: Array,
    pair_owner: Array,
    features: Array,
    gradients: Array,
    inverse_scale: float,
    weighting: int,
    epsilon: float,
    weights: Array,
) -> None:
    """Weigh each channel by its gradient. One block per channel and pair: grid (C, P).

    Args:
        progress: [4] int32; see `row_buffers`.
        pair_owner: [P] int32, the image of each pair.
        features: [B, C, h · w] float32 or float16.
        gradients: [P, C, h · w] float32 or float16.
        inverse_scale: A float64 that gradients are multiplied by.
        weighting: MEAN or ALPHA.
        epsilon: A float64, added to the denominator of alpha; places where that is zero are left
            out.
        weights: [P, C] float32, written.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float64)
    channel, pair = cuda.blockIdx.x, cuda.blockIdx.y
    if pair >= progress[PAIRS]:
        return
    values, slopes = features[pair_owner[pair], channel], gradients[pair, channel]
    summed = slopes if weighting == MEAN else values
    total = 0.0
    for place in range(cuda.threadIdx.x, summed.shape[0], cuda.blockDim.x):
        total += np.float64(np.float32(summed[place]))
    total = block_sum(total, scratch)
    weight = total * inverse_scale / slopes.shape[0]
    if weighting == ALPHA:
        part = 0.0
        for place in range(cuda.threadIdx.x, slopes.shape[0], cuda.blockDim.x):
            slope = np.float64(np.float32(slopes[place])) * inverse_scale
            square = slope * slope
            denominator = 2 * square + total * square * slope + epsilon
            if slope < 0:  # unlike max(), this lets NaN through
                slope = np.float64(0)
            if denominator != 0:
                part += square / denominator * slope
        weight = block_sum(part, scratch)
    if cuda.threadIdx.x == 0:
        weights[pair, channel] = weight
