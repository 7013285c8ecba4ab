"""XRAI (Kapishnikov et al. 2019): regions of the image, ranked by their integrated gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.extras import install
from ccam_deploy.methods.base import Batch, Method
from ccam_deploy.methods.image_gradient import Channels, reduce_channels, require_choice
from ccam_deploy.methods.integrated_gradients import (
    Baseline,
    Rule,
    baseline_of,
    integrate,
    require_steps,
)
from ccam_deploy.methods.results import MethodResult
from ccam_deploy.methods.stopwatch import Stopwatch

_BASELINES: tuple[Baseline, ...] = ("black", "white")
_SCALES = (50, 100, 150, 250, 500, 1200)
_SIGMA = 0.8
_LEAST_SEGMENT = 150


@dataclass(frozen=True)
class XRAI(Method):
    """Adds regions in the order of their mean attribution (Kapishnikov et al. 2019).

    A region's mean is taken over the pixels that it adds to those before it, and these pixels get
    the mean as their value. As in the authors' program, the regions are Felzenszwalb's at six
    scales; they are found at the input's size (the program scales other sizes to 224×224).

    Attributes:
        steps: Steps of the integrated gradients from black and from white, which are averaged.
        rule: Where the steps are taken; see IntegratedGradients.
        dilation: By how many pixels a region is widened.
        least: Regions that add fewer pixels than this are skipped.
        channels: See IntegratedGradients. The default, a sum with its sign, ranks evidence against
            the class last. (The authors' program takes each pixel's highest channel, with its
            sign.)
    """

    name = "xrai"
    steps: int = 50
    rule: Rule = "midpoint"
    dilation: int = 5
    least: int = 50
    channels: Channels = "sum"

    def __post_init__(self) -> None:
        require_steps(self.steps, self.rule)
        require_choice("channels", self.channels, get_args(Channels))
        if not 0 <= self.dilation <= 100:
            raise OptionError(f"dilation is {self.dilation}; it must be 0 to 100")
        if self.least < 1:
            raise OptionError(f"least is {self.least}; it must be at least 1")

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        segmentation = _import()
        with clock.stage("gradient"), np.errstate(over="ignore", invalid="ignore"):
            both = [
                integrate(classifier, batch, baseline_of(batch, name), self.steps, self.rule)
                for name in _BASELINES
            ]
            values = reduce_channels(np.mean(both, axis=0, dtype=np.float32), self.channels)
        maps, pixels = np.empty_like(values), batch.pixels
        for image in np.unique(batch.owner):
            with clock.stage("masks"):
                regions = _regions(segmentation, pixels[image], self.dilation)
            with clock.stage("combine"):
                for pair in np.flatnonzero(batch.owner == image):
                    maps[pair] = rank(values[pair], regions, self.least)
        with clock.stage("combine"):
            return MethodResult.of_maps(maps)

    def require_support(self, classifier: Classifier, batch: Batch) -> None:
        """Take the gradient once, and import scikit-image; see Method."""
        classifier.input_gradient(batch.images, batch.one_hot)
        _import()


def rank(values: Floats, regions: NDArray[np.bool_], least: int) -> Floats:
    """Rank regions and give each pixel the mean attribution of the region that adds it.

    Args:
        values: [H, W] float32, attributions.
        regions: [R, H, W] bool; they may overlap.
        least: Regions that add fewer pixels than this are skipped.

    Returns:
        [H, W] float32; pixels of no region have their mean attribution.
    """
    areas = regions.reshape(len(regions), -1)
    flat = values.ravel().astype(np.float64)
    free = np.ones(flat.shape, np.bool_)
    ranked = np.empty(flat.shape, np.float32)
    added = np.count_nonzero(areas, axis=1)
    sums = np.array([flat[area].sum() for area in areas])
    while (left := added >= least).any():
        gains = np.divide(sums, added, out=np.full(len(sums), -np.inf), where=left)
        best = int(gains.argmax())
        new = np.flatnonzero(areas[best] & free)
        ranked[new] = gains[best]
        free[new] = False
        taken = areas[:, new]
        added -= np.count_nonzero(taken, axis=1)
        sums -= taken @ flat[new]
    if free.any():
        ranked[free] = flat[free].mean()
    return ranked.reshape(values.shape)


def _regions(segmentation: Any, pixels: Floats, dilation: int) -> NDArray[np.bool_]:
    """Segment an image's pixels [C, H, W] at all scales, into regions [R, H, W]."""
    low, high = pixels.min(), pixels.max()
    spread = (pixels - low) / (high - low) if high > low else np.zeros_like(pixels)
    image = np.moveaxis(2 * spread - 1, 0, -1)
    regions = []
    for scale in _SCALES:
        labels = segmentation.felzenszwalb(
            image, scale=scale, sigma=_SIGMA, min_size=_LEAST_SEGMENT, channel_axis=-1
        )
        regions += [_widened(labels == label, dilation) for label in np.unique(labels)]
    return np.stack(regions)


def _widened(region: NDArray[np.bool_], dilation: int) -> NDArray[np.bool_]:
    """Add the pixels at most `dilation` away to a region [H, W]."""
    from scipy.ndimage import distance_transform_edt

    if dilation == 0:
        return region
    around = tuple(
        slice(max(int(lines[0]) - dilation, 0), int(lines[-1]) + dilation + 1)
        for lines in (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    )
    near = np.zeros_like(region)
    near[around] = distance_transform_edt(~region[around]) <= dilation
    return near


def _import() -> Any:
    try:
        from skimage import segmentation
    except ImportError as error:
        raise BackendError(f"xrai needs scikit-image ({error}): {install('xrai')}") from error
    return segmentation
