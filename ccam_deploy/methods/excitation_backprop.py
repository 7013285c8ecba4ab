"""Excitation backpropagation (Zhang et al. 2018): which units a class owes its score to.

It needs the excitation graph of a bundle exported with --gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccam_deploy.engines import Classifier
from ccam_deploy.kernels import cpu
from ccam_deploy.methods.base import Batch, Method, MethodResult, Stopwatch, not_finite


@dataclass(frozen=True)
class ExcitationBackprop(Method):
    """Passes the class's probability of winning down to a layer, as shares of what excites it.

    A map before it is enlarged is the winning probability of each place, summed over channels; it
    adds up to 1, less what is lost at units that a bias alone makes positive.

    Attributes:
        layer: The target layer; empty for the last but one, where TorchRay's benchmark takes it
            (a ResNet's layer3, VGG's before pool4).
        contrastive: Subtract what a class with the opposite weights would get, and cut negative
            values off (contrastive marginal winning probability, c-MWP).

    """

    name = "excitation-backprop"
    layer: str = ""
    contrastive: bool = False

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch; see Method."""
        usual = batch.layers[max(len(batch.layers) - 2, 0)]
        place = batch.place_of(self.layer or usual)
        winners = batch.one_hot
        duals = -winners if self.contrastive else np.zeros_like(winners)
        with clock.stage("gradient"):
            maps = classifier.excitation(batch.images[batch.owner], winners, duals)[place]
        if not np.isfinite(maps).all():
            raise not_finite(batch.layers[place])
        with clock.stage("combine"):
            if self.contrastive:
                maps = np.maximum(maps, 0)
            return MethodResult.of_maps(cpu.upsample(maps, batch.size))
