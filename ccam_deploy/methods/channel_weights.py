"""The base of CAM, Grad-CAM and Grad-CAM++: a weighted sum of the channels of one layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.kernels import cpu
from ccam_deploy.methods.base import Batch, Method, not_finite
from ccam_deploy.methods.results import MethodResult
from ccam_deploy.methods.stopwatch import Stopwatch


@dataclass(frozen=True)
class ChannelWeights(Method):
    """Sums the channels of one layer, each times its weight.

    Attributes:
        layer: The target layer; empty for the final one.
        relu: Cut negative values off.
    """

    layer: str = ""
    relu: bool = True

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        place = batch.place_of(self.layer)
        features, gradients = layer_gradients(classifier, batch, clock)
        self._require_suitable(classifier, batch, place, gradients[place], clock)
        with clock.stage("combine"), np.errstate(over="ignore", invalid="ignore"):
            weights = self._weights(features[place], gradients[place])
            maps = np.einsum("pc,pcij->pij", weights, features[place])
        return upsampled_result(maps, self.relu, batch, batch.layers[place], clock)

    @abstractmethod
    def _weights(self, features: Floats, gradients: Floats) -> Floats:
        """Weigh each channel: [P, C] float32, from arrays [P, C, h, w] float32."""

    def _require_suitable(
        self, classifier: Classifier, batch: Batch, place: int, gradients: Floats, clock: Stopwatch
    ) -> None:
        """Raise OptionError for a network that does not suit the method."""


def layer_gradients(
    classifier: Classifier, batch: Batch, clock: Stopwatch
) -> tuple[Sequence[Floats], Sequence[Floats]]:
    """Compute the features and gradients of all layers for each pair.

    Args:
        classifier: The engines.
        batch: The images and pairs.
        clock: Counts the seconds of each stage.

    Returns:
        Features and gradients, each [P, C, h, w] float32 for every layer.
    """
    with clock.stage("gradient"):
        activations = batch.activations.take(batch.owner)
        return activations.features, classifier.gradients(activations, batch.one_hot)


def upsampled_result(
    maps: Floats, relu: bool, batch: Batch, layer: str, clock: Stopwatch
) -> MethodResult:
    """Bring a layer's maps to the input's size and make them a result.

    Args:
        maps: [P, h, w] float32.
        relu: Cut negative values off.
        batch: The images and pairs.
        layer: The layer's name.
        clock: Counts the seconds of each stage.

    Raises:
        BackendError: The maps are not finite.
    """
    if not np.isfinite(maps).all():
        raise not_finite(layer)
    with clock.stage("combine"):
        raw = cpu.upsample(np.maximum(maps, 0) if relu else maps, batch.size)
        return MethodResult.of_maps(raw)
