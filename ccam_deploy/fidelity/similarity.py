"""How alike two saliency maps are."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter

from ccam_deploy.arrays import Doubles, Floats
from ccam_deploy.errors import OptionError
from ccam_deploy.extras import install

WINDOW = 7
"""Side of the window of SSIM, in pixels."""

_CELL, _BLOCK = 16, 3


def spearman(first: Floats, second: Floats) -> float:
    """Compute Spearman's rank correlation of two maps.

    Args:
        first: [H, W], or of any other shape.
        second: A map of the same shape.

    Returns:
        A float in [-1, 1]. Two flat maps count as equal, a flat and a varied one as unrelated.
        NaN where a map holds NaN.
    """
    return _correlation(_average_ranks(first), _average_ranks(second))


def _average_ranks(values: Floats) -> Doubles:
    """The rank of each value, from 1; equal values share the mean of theirs. NaN makes all NaN.

    scipy.stats.rankdata gives the same, but takes a second to import.
    """
    if np.isnan(values).any():
        return np.full(values.size, np.nan)
    _, places, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Doubles = (last - 0.5 * (counts - 1))[places]
    return ranks


def hog_similarity(first: Floats, second: Floats) -> float:
    """Correlate two maps' histograms of oriented gradients (Adebayo et al. 2018).

    There are 9 orientations, blocks of 3×3 cells, and cells of 16 pixels; the cells shrink where a
    side is shorter than three of them.

    Args:
        first: [H, W].
        second: A map of the same shape.

    Returns:
        A float in [-1, 1]. Two maps without gradients count as equal, one with and one without as
        unrelated.

    Raises:
        OptionError: scikit-image is not installed.
    """
    require_scikit_image()
    from skimage.feature import hog

    cell = max(1, min(_CELL, min(first.shape) // _BLOCK))
    settings = {"pixels_per_cell": (cell, cell), "cells_per_block": (_BLOCK, _BLOCK)}
    return _correlation(*(hog(np.asarray(v, np.float64), **settings) for v in (first, second)))


def require_scikit_image() -> None:
    """Make sure that scikit-image, which computes HOG features, can be imported.

    Raises:
        OptionError: It cannot.
    """
    try:
        from skimage.feature import hog  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"HOG similarity needs scikit-image, which cannot be imported ({error}): "
            f"{install('sanity')}"
        ) from error


def _correlation(first: Doubles, second: Doubles) -> float:
    """Pearson's correlation; 1 for two constant vectors, 0 where only one is constant."""
    centred = [values - values.mean() for values in (first, second)]
    norms = [float(np.linalg.norm(values)) for values in centred]
    if not all(norms):
        return 1.0 if norms[0] == norms[1] else 0.0
    return float(centred[0] @ centred[1] / (norms[0] * norms[1]))


def ssim(first: Floats, second: Floats) -> float:
    """Compute the mean structural similarity of two maps (Wang et al. 2004).

    The settings are scikit-image's defaults: a uniform window of 7×7 pixels, the sample
    covariance, and a data range of 1.

    Args:
        first: [H, W] in [0, 1].
        second: A map of the same shape.

    Returns:
        A float in [-1, 1]; 1 for equal maps.

    Raises:
        ValueError: The maps are smaller than the window.
    """
    x, y = (np.asarray(values, np.float64) for values in (first, second))
    if min(x.shape) < WINDOW:
        raise ValueError(f"maps of {x.shape} are smaller than the {WINDOW}x{WINDOW} window")
    count = WINDOW**2
    correction = count / (count - 1)
    mean_x, mean_y = uniform_filter(x, WINDOW), uniform_filter(y, WINDOW)
    var_x = correction * (uniform_filter(x * x, WINDOW) - mean_x**2)
    var_y = correction * (uniform_filter(y * y, WINDOW) - mean_y**2)
    covariance = correction * (uniform_filter(x * y, WINDOW) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    quality = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    margin = WINDOW // 2
    return float(quality[margin:-margin, margin:-margin].mean())


def top_overlap(first: Floats, second: Floats) -> float:
    """Compute the share of their most salient pixels that two maps have in common.

    With A and B the k highest pixels of each, k being a tenth of all rounded up: |A ∩ B| / k.
    Pixels that tie for the last places share them equally.

    Args:
        first: [H, W].
        second: A map of the same shape.

    Returns:
        A float in [0, 1]: 1 for two flat maps, 0.1 for a flat and a varied one. NaN where a map
        holds NaN.
    """
    if np.isnan(first).any() or np.isnan(second).any():
        return float("nan")
    count = -(-first.size // 10)
    shares = [_top_shares(np.asarray(values).ravel(), count) for values in (first, second)]
    return float(np.minimum(*shares).sum() / count)


def _top_shares(values: Floats, count: int) -> Doubles:
    """How much of each value is among the `count` highest, in [0, 1]; the sum is `count`."""
    last = np.partition(values, -count)[-count]
    above, equal = values > last, values == last
    shares: Doubles = above + equal * ((count - above.sum()) / equal.sum())
    return shares
