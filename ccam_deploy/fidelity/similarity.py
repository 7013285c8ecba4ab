"""How alike two saliency maps are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from scipy.stats import rankdata

from ccam_deploy.arrays import Floats
from ccam_deploy.errors import OptionError

WINDOW = 7
"""Side of the window of SSIM, in pixels."""

_CELL, _BLOCK = 16, 3


def spearman(one: Floats, other: Floats) -> float:
    """Spearman's rank correlation of two maps of one shape, in [-1, 1].

    Two flat maps count as equal, a flat and a varied one as unrelated.
    """
    return _correlation(*(rankdata(np.asarray(v, np.float64).ravel()) for v in (one, other)))


def hog_similarity(one: Floats, other: Floats) -> float:
    """Correlation of two maps' histograms of oriented gradients, in [-1, 1] (Adebayo et al. 2018).

    9 orientations, cells of 16 pixels, smaller where a side holds no three of them, blocks of 3×3
    cells. Two maps without gradients count as equal, one with and one without as unrelated.
    Raises OptionError without scikit-image.
    """
    require_scikit_image()
    from skimage.feature import hog

    cell = max(1, min(_CELL, min(one.shape) // _BLOCK))
    settings = {"pixels_per_cell": (cell, cell), "cells_per_block": (_BLOCK, _BLOCK)}
    return _correlation(*(hog(np.asarray(v, np.float64), **settings) for v in (one, other)))


def require_scikit_image() -> None:
    """Raise OptionError where scikit-image, which computes HOG features, is missing."""
    try:
        from skimage.feature import hog  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"HOG similarity needs scikit-image, which cannot be imported ({error}): "
            "pip install 'ccam-deploy[sanity]'"
        ) from error


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    centred = [values - values.mean() for values in (one, other)]
    norms = [float(np.linalg.norm(values)) for values in centred]
    if not all(norms):
        return 1.0 if norms[0] == norms[1] else 0.0
    return float(centred[0] @ centred[1] / (norms[0] * norms[1]))


def ssim(one: Floats, other: Floats) -> float:
    """Mean structural similarity of two maps [H, W] in [0, 1] (Wang et al. 2004).

    7×7 uniform window, sample covariance, data range 1: scikit-image's defaults.
    Raises ValueError for maps smaller than the window.
    """
    x, y = (np.asarray(values, np.float64) for values in (one, other))
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


def top_overlap(one: Floats, other: Floats) -> float:
    """Share that the most salient pixels of two maps of one shape have in common, in [0, 1].

    With A and B the k highest pixels of each, k being a tenth of all rounded up: |A ∩ B| / k.
    Pixels that tie for the last places have equal parts in them, so that two flat maps count as
    equal, and a flat map has a tenth in common with any other. NaN where a map holds NaN.
    """
    if np.isnan(one).any() or np.isnan(other).any():
        return float("nan")
    count = -(-one.size // 10)
    parts = [_parts(np.asarray(values).ravel(), count) for values in (one, other)]
    return float(np.minimum(*parts).sum() / count)


def _parts(values: Floats, count: int) -> NDArray[np.float64]:
    """The part that each value has in the `count` highest ones; the parts add up to `count`."""
    last = np.partition(values, -count)[-count]
    above, equal = values > last, values == last
    parts: NDArray[np.float64] = above + equal * ((count - above.sum()) / equal.sum())
    return parts
