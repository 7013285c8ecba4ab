"""How alike two saliency maps are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from scipy.stats import rankdata

Floats = NDArray[np.float32]
_WINDOW = 7


def spearman(one: Floats, other: Floats) -> float:
    """Spearman's rank correlation of two maps of one shape, in [-1, 1].

    Two flat maps count as equal, a flat and a varied one as unrelated.
    """
    ranks = [rankdata(np.asarray(values, np.float64).ravel()) for values in (one, other)]
    centred = [values - values.mean() for values in ranks]
    norms = [float(np.linalg.norm(values)) for values in centred]
    if not all(norms):
        return 1.0 if norms[0] == norms[1] else 0.0
    return float(centred[0] @ centred[1] / (norms[0] * norms[1]))


def ssim(one: Floats, other: Floats) -> float:
    """Mean structural similarity of two maps [H, W] in [0, 1] (Wang et al. 2004).

    7×7 uniform window, sample covariance, data range 1: scikit-image's defaults.
    """
    x, y = (np.asarray(values, np.float64) for values in (one, other))
    if min(x.shape) < _WINDOW:
        raise ValueError(f"maps of {x.shape} are smaller than the {_WINDOW}x{_WINDOW} window")
    count = _WINDOW**2
    correction = count / (count - 1)
    mean_x, mean_y = uniform_filter(x, _WINDOW), uniform_filter(y, _WINDOW)
    var_x = correction * (uniform_filter(x * x, _WINDOW) - mean_x**2)
    var_y = correction * (uniform_filter(y * y, _WINDOW) - mean_y**2)
    covariance = correction * (uniform_filter(x * y, _WINDOW) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    quality = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    margin = _WINDOW // 2
    return float(quality[margin:-margin, margin:-margin].mean())
