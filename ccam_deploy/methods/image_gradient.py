"""What methods on the gradient of the image share.

They need a bundle exported with --gradients. The gradient is that of the logit. Steps and samples
of all pairs go through the engine together, a chunk at a time. P counts (image, class) pairs,
C channels of the image.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Batch, Method, MethodResult, Stopwatch

Channels = Literal["absolute", "maximum", "positive", "sum"]
MOST_STEPS = 100_000


class PixelAttribution(Method):
    """A value for each channel of each pixel, and of these one for the pixel.

    guided: whether it is the gradient through ReLUs that pass back its positive part.
    """

    guided: ClassVar[bool] = False
    channels: Channels

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        with clock.stage("gradient"), np.errstate(over="ignore", invalid="ignore"):
            attributions = self.attribute(classifier, batch)
        with clock.stage("combine"):
            return MethodResult.of_maps(reduce_channels(attributions, self.channels))

    def require_support(self, classifier: Classifier, batch: Batch) -> None:
        """See that there is a gradient of the image; see Method."""
        classifier.input_gradient(batch.images, batch.one_hot, self.guided)

    @abstractmethod
    def attribute(self, classifier: Classifier, batch: Batch) -> Floats:
        """The value of each pair's pixels [P, C, H, W] float32."""


def require_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise OptionError for a value that is not among those of an option."""
    if value not in known:
        raise OptionError(f'{option} is "{value}"; it must be {", ".join(known)}')


def reduce_channels(values: Floats, how: Channels) -> Floats:
    """One value for each pixel: [P, C, H, W] to [P, H, W] float32."""
    if how == "sum":
        found: Floats = values.sum(axis=1)
    elif how == "positive":
        found = np.maximum(values, 0).sum(axis=1)
    elif how == "maximum":
        found = np.abs(values).max(axis=1)
    else:
        found = np.abs(values).sum(axis=1)
    return found


def mean_gradient(
    classifier: Classifier,
    batch: Batch,
    weights: NDArray[np.float64],
    inputs: Callable[[NDArray[np.intp], NDArray[np.intp]], Floats],
    square: bool = False,
) -> Floats:
    """The weighted sum [P, C, H, W] float32 of the gradients at some inputs of each pair.

    weights: [S] of each input.   inputs: the inputs [N, C, H, W] for N pairs and which of the S.
    """
    total = np.zeros((len(batch.owner), *batch.images.shape[1:]), np.float64)
    one_hot = batch.one_hot
    count = len(weights)
    for rows in row_chunks(len(total) * count, batch.chunk):
        pairs, places = np.divmod(np.arange(rows.start, rows.stop), count)
        gradients = classifier.input_gradient(inputs(pairs, places), one_hot[pairs])
        if square:
            gradients = gradients**2
        for pair, place, gradient in zip(pairs, places, gradients, strict=True):
            total[pair] += weights[place] * gradient
    return total.astype(np.float32)
