"""Channel statistics ψ (Ha & Youn 2022, eq. 5), for all layers and pairs in one launch."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ccam_deploy.kernels.cuda.collectives import MOST_WARPS, Array, block_sum
from ccam_deploy.kernels.cuda.kept import kernel
from ccam_deploy.kernels.cuda.layer_table import layer_of_channel, layer_row


@kernel
def channel_statistics(
    table: Array,
    features: Array,
    gradients: Array,
    owner: Array,
    slopes: Array,
    inverse_scale: float,
    psi: Array,
) -> None:
    """Compute ψ. One block per channel and pair: grid (channels of all layers, P).

    There are two passes in float64, so that neither a large mean nor a large value costs
    precision; the second pass reads the map from the cache.

    Args:
        table: [L, 8] int64.
        features: 1-D, float32 or float16.
        gradients: 1-D, float32 or float16.
        owner: [P] int32, the image of each pair.
        slopes: [P] float32 that each pair's gradients are multiplied by.
        inverse_scale: A float64 that all gradients are multiplied by.
        psi: [P, channels, 4] float32, written.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float64)
    channel, pair = cuda.blockIdx.x, cuda.blockIdx.y
    row = layer_row(table, layer_of_channel(table, channel))
    in_layer = channel - row.first_channel
    count = row.height * row.width
    feature = row.features + (owner[pair] * row.channels + in_layer) * count
    gradient = row.gradients + (pair * row.channels + in_layer) * count

    feature_sum, gradient_sum = 0.0, 0.0
    for place in range(cuda.threadIdx.x, count, cuda.blockDim.x):
        feature_sum += np.float64(features[feature + place])
        gradient_sum += np.float64(gradients[gradient + place])
    feature_mean = block_sum(feature_sum, scratch) / count
    gradient_mean = block_sum(gradient_sum, scratch) / count

    feature_sum, gradient_sum = 0.0, 0.0
    for place in range(cuda.threadIdx.x, count, cuda.blockDim.x):
        centred = np.float64(features[feature + place]) - feature_mean
        feature_sum += centred * centred
        centred = np.float64(gradients[gradient + place]) - gradient_mean
        gradient_sum += centred * centred
    feature_deviation = math.sqrt(block_sum(feature_sum, scratch) / count)
    gradient_deviation = math.sqrt(block_sum(gradient_sum, scratch) / count)

    if cuda.threadIdx.x == 0:
        psi[pair, channel, 0] = feature_mean
        psi[pair, channel, 1] = feature_deviation
        factor = np.float64(slopes[pair]) * inverse_scale
        psi[pair, channel, 2] = gradient_mean * factor
        psi[pair, channel, 3] = gradient_deviation * factor


@kernel
def standardise(table: Array, psi: Array, scaled: Array) -> None:
    """Scale each statistic to mean 0 and deviation 1 over a layer's channels.

    One block per statistic, layer and pair: grid (4, L, P).

    Args:
        table: [L, 8] int64.
        psi: [P, channels, 4] float32.
        scaled: [P, channels, 4] float32, written. It must be another array, because the collection
            sums need the mean gradient of `psi`.
    """
    scratch = cuda.shared.array(MOST_WARPS, np.float64)
    statistic, layer, pair = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
    row = layer_row(table, layer)
    first, channels = row.first_channel, row.channels

    total = 0.0
    for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
        total += np.float64(psi[pair, first + channel, statistic])
    mean = block_sum(total, scratch) / channels
    total = 0.0
    for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
        centred = np.float64(psi[pair, first + channel, statistic]) - mean
        total += centred * centred
    deviation = math.sqrt(block_sum(total, scratch) / channels)

    factor = 0.0
    if deviation > 0:
        factor = 1 / deviation
    for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
        centred = np.float64(psi[pair, first + channel, statistic]) - mean
        scaled[pair, first + channel, statistic] = centred * factor
