"""SmoothGrad (Smilkov et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Batch
from ccam_deploy.methods.image_gradient import (
    MOST_STEPS,
    Channels,
    PixelAttribution,
    mean_gradient,
    require_choice,
)


@dataclass(frozen=True)
class SmoothGrad(PixelAttribution):
    """Averages the gradient over noisy copies of the image (Smilkov et al. 2017).

    Attributes:
        samples: How many noisy copies of the image are made.
        noise: Standard deviation of the noise, as a share of the range of the image's values.
        seed: Seed of the noise, which is the same for every image.
        square: Average squared gradients instead (SmoothGrad-squared).
        channels: See IntegratedGradients; the paper shows the "maximum", its code "absolute".
    """

    name = "smoothgrad"
    samples: int = 50
    noise: float = 0.15
    seed: int = 0
    square: bool = False
    channels: Channels = "absolute"

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= MOST_STEPS:
            raise OptionError(f"samples is {self.samples}; it must be 1 to {MOST_STEPS}")
        if not 0 <= self.noise < np.inf:
            raise OptionError(f"noise is {self.noise}; it must be finite and at least 0")
        if self.seed < 0:
            raise OptionError(f"seed is {self.seed}; it must be at least 0")
        require_choice("channels", self.channels, get_args(Channels))

    def attribute(self, classifier: Classifier, batch: Batch) -> Floats:
        """Average the gradient of each pair's pixels; see PixelAttribution."""
        shape = batch.images.shape[1:]
        ranges = np.ptp(batch.images.reshape(len(batch.images), -1), axis=1)
        deviations = (np.float32(self.noise) * ranges)[:, None, None, None]

        def noisy(pairs: NDArray[np.intp], samples: NDArray[np.intp]) -> Floats:
            owner = batch.owner[pairs]
            draws = [np.random.default_rng((self.seed, n)) for n in samples]
            noise = np.stack([draw.standard_normal(shape, np.float32) for draw in draws])
            copies: Floats = batch.images[owner] + deviations[owner] * noise
            return copies

        weights = np.full(self.samples, 1 / self.samples)
        return mean_gradient(classifier, batch, weights, noisy, self.square)
