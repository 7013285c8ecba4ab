"""Collection-CAM's computations on a CPU, with NumPy, SciPy and fastcluster.

P counts pairs of an image and a class, C channels, k collections, n masks; h×w is a feature map's
size, H×W the input's. Sums run in float64, results are float32. Equations are those of Ha & Youn
(2022).

Nothing here calls a threaded BLAS: its threads would spin on after a product, and take the cores
from the engine that runs next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import fastcluster
import numpy as np
import scipy.special
from numpy.typing import NDArray

from ccam_deploy.arrays import Doubles, Floats

Labels = NDArray[np.int32]
"""The collection of each channel."""

WORST_QUALITY = -1.0
"""The least dispersion-separation ratio."""


@dataclass(frozen=True)
class Partition:
    """The channels of a layer, sorted into collections.

    Attributes:
        labels: [C] int32 in 0..count-1, collections numbered by their first channel.
        count: The number of collections.
        quality: [k_max - k_min + 1] float32, the mean dispersion-separation ratio of each number
            of collections that was tried; -1 where the channels are too few or too alike for it.
    """

    labels: Labels
    count: int
    quality: Floats


@np.errstate(invalid="ignore")
def channel_statistics(features: Floats, gradients: Floats) -> Floats:
    """Compute the representation vector ψ of each channel (Ha & Youn 2022, eq. 5).

    Args:
        features: [P, C, h, w] float32, the feature maps.
        gradients: [P, C, h, w] float32, the gradients of the class score by the feature maps.

    Returns:
        [P, C, 4] float32: mean and population standard deviation of the feature map, then of its
        gradient; not finite where a value of the channel is not.
    """
    statistics = []
    for values in (features, gradients):
        flat = values.reshape(*values.shape[:2], -1)
        mean = flat.mean(axis=-1, dtype=np.float64)
        centred = flat - mean[..., None]
        variance = np.einsum("pci,pci->pc", centred, centred) / flat.shape[-1]
        statistics += [mean, np.sqrt(variance)]
    psi: Floats = np.stack(statistics, axis=-1).astype(np.float32)
    return psi


def standardise(psi: Floats) -> Floats:
    """Scale each statistic to mean 0 and standard deviation 1 over a layer's channels.

    Args:
        psi: [P, C, 4] float32.

    Returns:
        [P, C, 4] float32; zeros for a statistic that is the same in every channel.
    """
    values = psi.astype(np.float64)
    centred = values - values.mean(axis=1, keepdims=True)
    deviation = centred.std(axis=1, keepdims=True)
    scaled = np.divide(centred, deviation, where=deviation > 0, out=np.zeros_like(centred))
    return np.asarray(scaled, dtype=np.float32)


def partition(psi: Floats, k_min: int, k_max: int) -> Partition:
    """Cut Ward's hierarchy where the dispersion-separation ratio is largest (eq. 6-16).

    Args:
        psi: [C, 4] float32, finite, one row per channel.
        k_min: The smallest number of collections to try, at least 1.
        k_max: The largest number to try, at least `k_min`. Both are lowered to the number of
            distinct rows.

    Returns:
        The best partition; of equally good ones the one with the fewest collections.
    """
    channels = len(psi)
    points = psi.astype(np.float64)
    quality = np.full(k_max - k_min + 1, WORST_QUALITY, np.float32)
    if channels == 1:
        return Partition(np.zeros(1, np.int32), 1, quality)
    tree = fastcluster.linkage_vector(points, method="ward")
    distinct = 1 + int(np.count_nonzero(tree[:, 2]))
    largest = min(k_max, distinct)
    clusters = _cut(tree, largest)
    best, best_ratio = _number(clusters), -np.inf
    for count in range(largest, min(k_min, largest) - 1, -1):
        labels = _number(clusters)
        ratio = dispersion_separation_ratio(points, labels) if count > 1 else WORST_QUALITY
        if ratio >= best_ratio:
            best, best_ratio = labels, ratio
        if count >= k_min:
            quality[count - k_min] = ratio
        clusters = _merge(tree, clusters, count)
    return Partition(best, int(best.max()) + 1, quality)


def _cut(tree: Doubles, count: int) -> NDArray[np.intp]:
    """The node of the tree that each leaf belongs to when `count` clusters are left."""
    leaves = len(tree) + 1
    merges = leaves - count
    parent = np.arange(leaves + merges)
    children = tree[:merges, :2].astype(np.intp)
    parent[children] = np.arange(leaves, leaves + merges)[:, None]
    while True:
        further = parent[parent]
        if np.array_equal(further, parent):
            return parent[:leaves]
        parent = further


def _merge(tree: Doubles, clusters: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """Merge the next two of `count` clusters; a single cluster stays."""
    leaves = len(clusters)
    merge = leaves - count
    if merge == len(tree):
        return clusters
    left, right = tree[merge, :2].astype(np.intp)
    return np.where((clusters == left) | (clusters == right), leaves + merge, clusters)


def _number(clusters: NDArray[np.intp]) -> Labels:
    """Number clusters 0, 1, ... in the order in which they first appear."""
    _, first, inverse = np.unique(clusters, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    labels: Labels = rank[inverse]
    return labels


def dispersion_separation_ratio(psi: Doubles | Floats, labels: Labels) -> float:
    """Compute the mean dispersion-separation ratio of a partition (Ha & Youn 2022, eq. 12-15).

    Args:
        psi: [C, 4] floats, one row per channel.
        labels: [C] int32 in 0..k-1, every value used.

    Returns:
        A float in [-1, 1]; 1 where every collection is a single channel.

    Raises:
        ValueError: The partition has fewer than two collections.
    """
    count = int(labels.max()) + 1
    if count < 2:
        raise ValueError("a partition needs two collections for its separation")
    points = psi.astype(np.float64)
    members = labels == np.arange(count, dtype=labels.dtype)[:, None]
    sizes = members.sum(axis=1)
    centroids = members @ points / sizes[:, None]
    spread = np.square(points - centroids[labels]).sum(axis=1)
    dispersion = members @ spread / sizes
    distance = np.square(centroids[:, None] - centroids[None]).sum(axis=-1)
    np.fill_diagonal(distance, np.inf)
    separation = distance.min(axis=1)
    total = separation + dispersion
    ratio = np.divide(separation - dispersion, total, where=total > 0, out=np.zeros(count))
    return float(ratio.mean())


def collection_sums(
    features: Floats,
    gradients: Floats,
    labels: Labels,
    count: int,
    final: bool,
    gate: float = 0.0,
) -> Floats:
    """Sum the channels of each collection, at the layer's size (Ha & Youn 2022, eq. 17-20).

    Args:
        features: [C, h, w] float32, the layer's feature maps.
        gradients: [C, h, w] float32, their gradients.
        labels: [C] int32 in 0..count-1, the collection of each channel.
        count: The number of collections.
        final: Whether to weigh each channel by its mean gradient, as in the last layer; in other
            layers only the pixels with a positive gradient count.
        gate: From which share of the channel's largest absolute gradient on a pixel counts in full;
            smaller positive gradients count in proportion. 0 counts all in full, as in the paper.

    Returns:
        [count, h, w] float32, negative values cut off and each map scaled to a maximum of 1; a
        flat map becomes zeros.
    """
    channels = len(labels)
    values = features.reshape(channels, -1)
    slopes = gradients.reshape(channels, -1)
    if final:
        values = values * slopes.mean(axis=1, dtype=np.float64)[:, None]
    elif gate:
        highest = np.abs(slopes).max(axis=1, keepdims=True) * np.float32(gate)
        share = np.divide(slopes, highest, out=np.zeros_like(slopes), where=highest > 0)
        values = values * np.clip(share, 0, 1)
    else:
        values = np.where(slopes > 0, values, np.float32(0))
    sums = np.stack(
        [values[labels == index].sum(axis=0, dtype=np.float64) for index in range(count)]
    )
    np.maximum(sums, 0.0, out=sums)
    highest = sums.max(axis=1, keepdims=True)
    varied = highest > sums.min(axis=1, keepdims=True)
    scaled = np.divide(sums, highest, where=varied, out=np.zeros_like(sums))
    return np.asarray(scaled, dtype=np.float32).reshape(count, *features.shape[1:])


def render_masks(
    sums: Floats, size: tuple[int, int], theta: float
) -> tuple[Floats, NDArray[np.bool_]]:
    """Upsample, denoise and normalise collection sums to masks M' (Ha & Youn 2022, eq. 18-22).

    Args:
        sums: [n, h, w] float32, not negative.
        size: H and W, in pixels.
        theta: A fraction in [0, 1); values not above this quantile of the upsampled mask become 0.

    Returns:
        The masks, [n, H, W] float32 in [0, 1], and [n] bool, true where a mask is all zeros.
    """
    masks = upsample(sums, size)
    flat = masks.reshape(len(masks), -1)
    threshold = quantile(flat, theta)
    np.multiply(flat, flat > threshold[:, None], out=flat)
    highest = flat.max(axis=1)
    np.divide(flat, highest[:, None], where=highest[:, None] > 0, out=flat)
    return masks, highest == 0


def upsample(maps: Floats, size: tuple[int, int]) -> Floats:
    """Interpolate maps bilinearly, with pixel centres at halves.

    Args:
        maps: [n, h, w] float32.
        size: H and W, in pixels.

    Returns:
        [n, H, W] float32.
    """
    wide = _interpolate(maps, size[1], axis=2)
    return _interpolate(wide, size[0], axis=1)


def _interpolate(values: Floats, target: int, axis: int) -> Floats:
    """Interpolate along an axis; between equal neighbours the result is exactly their value."""
    low, high, share = _neighbours(values.shape[axis], target)
    below = np.take(values, low, axis, mode="clip")
    result = np.take(values, high, axis, mode="clip")
    result -= below
    result *= share if axis == 2 else share[:, None]
    result += below
    return result


@lru_cache(maxsize=64)
def _neighbours(source: int, target: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """For each of `target` pixels its two neighbours among `source`, and the second's share."""
    centres = (np.arange(target) + 0.5) * (source / target) - 0.5
    centres = np.clip(centres, 0, source - 1)
    low = np.floor(centres).astype(np.intp)
    return low, np.minimum(low + 1, source - 1), (centres - low).astype(np.float32)


def quantile(values: Floats, fraction: float) -> Floats:
    """Compute the quantile of each row with linear interpolation, as `numpy.quantile` does.

    Rows with so many zeros that the quantile is zero are not sorted, unlike in NumPy.

    Args:
        values: [n, m] float32, not negative.
        fraction: The quantile, in [0, 1).

    Returns:
        [n] float32.
    """
    place = fraction * (values.shape[1] - 1)
    low = int(place)
    high = min(low + 1, values.shape[1] - 1)
    result = np.zeros(len(values), np.float32)
    zeros = values.shape[1] - np.count_nonzero(values, axis=1)
    for row in np.flatnonzero(zeros <= high):
        ordered = np.partition(values[row], high)
        above = ordered[high]
        below = ordered[:high].max() if high > low else above
        result[row] = below + (above - below) * np.float32(place - low)
    return result


class SoftmaxSum:
    """Sums of masks, weighted by the softmax of their scores (Ha & Youn 2022, eq. 24, 25).

    Masks are added as they come: the weights of earlier ones shrink when a higher score follows,
    so that neither masks nor scores have to be kept.
    """

    def __init__(self, pairs: int, size: tuple[int, int]) -> None:
        """Start with empty sums.

        Args:
            pairs: P, the number of sums.
            size: H and W of the masks, in pixels.
        """
        self._highest = np.full(pairs, -np.inf, np.float64)
        self._total = np.zeros(pairs, np.float64)
        self._sum = np.zeros((pairs, *size), np.float32)

    def add(self, pair: int, scores: Floats, masks: Floats) -> None:
        """Add masks to the sum of one pair.

        Args:
            pair: The number of the pair, in 0..P-1.
            scores: [n] float32, finite.
            masks: [n, H, W] float32.
        """
        if not len(scores):
            return
        highest = max(float(scores.max()), self._highest[pair])
        shrinkage = np.exp(self._highest[pair] - highest)
        weights = np.exp(scores.astype(np.float64) - highest)
        flat = masks.reshape(len(masks), -1)
        added = np.einsum("n,np->p", weights.astype(np.float32), flat)
        weighted = self._sum[pair]
        if shrinkage != 1.0:
            weighted *= np.float32(shrinkage)
        weighted += added.reshape(weighted.shape)
        self._total[pair] = self._total[pair] * shrinkage + weights.sum()
        self._highest[pair] = highest

    def result(self) -> Floats:
        """Return the ReLU of the sums, [P, H, W] float32; zeros for a pair without masks."""
        total = np.where(self._total > 0, self._total, 1.0).astype(np.float32)
        weighted: Floats = self._sum / total[:, None, None]
        return np.maximum(weighted, 0.0)


def softmax(scores: Floats, counted: NDArray[np.bool_]) -> Floats:
    """Compute the softmax of the scores that count.

    Args:
        scores: [n] float32.
        counted: [n] bool, whether a score counts.

    Returns:
        [n] float32, the weights; 0 for scores that do not count.
    """
    if not counted.any():
        return np.zeros(len(scores), np.float32)
    exponents = np.where(counted, scores.astype(np.float64), -np.inf)
    return np.asarray(scipy.special.softmax(exponents), dtype=np.float32)


def min_max(maps: Floats) -> Floats:
    """Scale each map to [0, 1].

    Args:
        maps: [P, H, W] float32.

    Returns:
        [P, H, W] float32; a flat map becomes zeros.
    """
    low = maps.min(axis=(1, 2), keepdims=True)
    span = maps.max(axis=(1, 2), keepdims=True) - low
    scaled: Floats = np.divide(maps - low, span, where=span > 0, out=np.zeros_like(maps))
    return scaled
