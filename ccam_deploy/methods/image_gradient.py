"""The base of methods that explain a class by the gradient of its logit at the image.

They need a bundle exported with --gradients. Steps and samples of all pairs go through the engine
together, a chunk at a time. P counts (image, class) pairs, C channels of the image.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Doubles, Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Batch, Method
from ccam_deploy.methods.results import MethodResult
from ccam_deploy.methods.stopwatch import Stopwatch

Channels = Literal["absolute", "maximum", "positive", "sum"]
MOST_STEPS = 100_000


class PixelAttribution(Method):
    """Gives every channel of every pixel a value, and reduces the channels to a value per pixel.

    Attributes:
        guided: Whether ReLUs pass back only the positive part of the gradient.
        channels: How a pixel's C values become one; see reduce_channels.
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
        """Take the gradient once, which fails where the bundle has no graph for it; see Method."""
        classifier.input_gradient(batch.images, batch.one_hot, self.guided)

    @abstractmethod
    def attribute(self, classifier: Classifier, batch: Batch) -> Floats:
        """Compute the attribution of each pair's pixels.

        Args:
            classifier: The engines.
            batch: The images and pairs.

        Returns:
            [P, C, H, W] float32.
        """


def require_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that an option does not take.

    Args:
        option: The option's name.
        value: Its value.
        known: The values that it takes.

    Raises:
        OptionError: The value is not among them.
    """
    if value not in known:
        raise OptionError(f'{option} is "{value}"; it must be {", ".join(known)}')


def reduce_channels(values: Floats, how: Channels) -> Floats:
    """Reduce the channels of each pixel to one value.

    Args:
        values: [P, C, H, W] float32.
        how: "absolute" for the sum of absolute values, "maximum" for the largest absolute value,
            "positive" for the sum of the positive values, "sum" for the sum of all.

    Returns:
        [P, H, W] float32.
    """
    if how == "sum":
        pixels: Floats = values.sum(axis=1)
    elif how == "positive":
        pixels = np.maximum(values, 0).sum(axis=1)
    elif how == "maximum":
        pixels = np.abs(values).max(axis=1)
    else:
        pixels = np.abs(values).sum(axis=1)
    return pixels


def even_chunk(count: int, most: int) -> int:
    """Find how many rows go at a time so that all chunks have one size.

    On a GPU, ONNX Runtime plans a graph anew whenever its number of rows changes.

    Args:
        count: How many rows there are.
        most: The most rows of a chunk.

    Returns:
        The size of a chunk, above half of `most`; `most` where no such size divides the rows.
    """
    even = (size for size in range(most, most // 2, -1) if count % size == 0)
    return next(even, most)


def mean_gradient(
    classifier: Classifier,
    batch: Batch,
    weights: Doubles,
    inputs: Callable[[NDArray[np.intp], NDArray[np.intp]], Floats],
    square: bool = False,
) -> Floats:
    """Sum the gradients at several inputs of each pair, weighted.

    Args:
        classifier: The engines.
        batch: The images and pairs.
        weights: [S] float64, the weight of each of a pair's S inputs.
        inputs: Makes inputs [N, C, H, W] float32, given N pairs and a number below S for each.
        square: Sum the squared gradients.

    Returns:
        [P, C, H, W] float32.
    """
    total = np.zeros((len(batch.owner), *batch.images.shape[1:]), np.float64)
    one_hot = batch.one_hot
    count = len(weights)
    every = len(total) * count
    for rows in row_chunks(every, even_chunk(every, batch.chunk)):
        pairs, places = np.divmod(np.arange(rows.start, rows.stop), count)
        gradients = classifier.input_gradient(inputs(pairs, places), one_hot[pairs])
        if square:
            gradients = gradients**2
        for pair, place, gradient in zip(pairs, places, gradients, strict=True):
            total[pair] += weights[place] * gradient
    return total.astype(np.float32)
