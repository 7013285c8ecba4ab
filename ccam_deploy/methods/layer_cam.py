"""Layer-CAM (Jiang et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.base import Batch, Method, layer_names, places_of
from ccam_deploy.methods.channel_weights import layer_gradients, upsampled_result
from ccam_deploy.methods.results import MethodResult
from ccam_deploy.methods.stopwatch import Stopwatch


@dataclass(frozen=True)
class LayerCAM(Method):
    """Weighs each place of each channel by its positive gradient (Jiang et al. 2021, eq. 6-9).

    Attributes:
        layers: The target layers, whose maps are fused by their maximum; empty for the final one.
        relu: Cut negative values off; required where there are several layers.
        scaling: Which maps pass through the tanh that lifts small values, where there are several
            layers: all but the deepest as published ("shallow"), "all" as in TorchCAM, or "none".
        gamma: How strongly the tanh lifts them.
    """

    name = "layer-cam"
    layers: tuple[str, ...] = ()
    relu: bool = True
    scaling: Literal["shallow", "all", "none"] = "shallow"
    gamma: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layer_names(self.layers))
        if self.scaling not in ("shallow", "all", "none"):
            raise OptionError(f'scaling is "{self.scaling}"; it must be shallow, all or none')
        if not 0 < self.gamma < np.inf:
            raise OptionError(f"gamma is {self.gamma}; it must be finite and above 0")
        if len(self.layers) > 1 and not self.relu:
            raise OptionError("relu is false; the maps of several layers are fused without signs")

    def gammas(self, layers: int) -> tuple[float, ...]:
        """How strongly the maps of so many layers are lifted, from the shallowest layer on.

        Returns:
            0 for a map that does not pass through the tanh; nothing for a single layer, whose map
            is not scaled either.
        """
        if layers < 2:
            return ()
        lifted = {"shallow": layers - 1, "all": layers, "none": 0}[self.scaling]
        return (self.gamma,) * lifted + (0.0,) * (layers - lifted)

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        places = places_of(self.layers or batch.layers[-1:], batch.layers)
        features, gradients = layer_gradients(classifier, batch, clock)
        results = []
        gammas = self.gammas(len(places))
        for number, place in enumerate(places):
            with clock.stage("combine"), np.errstate(over="ignore", invalid="ignore"):
                slopes = np.maximum(gradients[place], 0)
                maps = np.einsum("pcij,pcij->pij", slopes, features[place])
            if gammas:
                maps = _scale(maps, gammas[number])
            results.append(upsampled_result(maps, self.relu, batch, batch.layers[place], clock))
        if len(results) == 1:
            return results[0]
        with clock.stage("combine"):
            raw = np.maximum.reduce([result.raw_saliency for result in results])
            return MethodResult.of_maps(raw)


def _scale(maps: Floats, gamma: float) -> Floats:
    """Bring a layer's maps [P, h, w] to the range that all layers share (eq. 9)."""
    maps = np.maximum(maps, 0)
    highest = maps.max(axis=(1, 2), keepdims=True)
    maps = np.divide(maps, highest, where=highest > 0, out=np.zeros_like(maps))
    return np.tanh(np.float32(gamma) * maps) if gamma else maps
