"""Guided backpropagation (Springenberg et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.methods.base import Batch
from ccam_deploy.methods.image_gradient import Channels, PixelAttribution, require_choice


@dataclass(frozen=True)
class GuidedBackprop(PixelAttribution):
    """The gradient through ReLUs that pass back its positive part (Springenberg et al. 2015).

    Other activations keep their derivative. The network must have a ReLU.

    Attributes:
        channels: See IntegratedGradients; Captum leaves all C values, with their signs.
    """

    name = "guided-backprop"
    channels: Channels = "absolute"

    def __post_init__(self) -> None:
        require_choice("channels", self.channels, get_args(Channels))

    guided = True

    def attribute(self, classifier: Classifier, batch: Batch) -> Floats:
        """Compute the guided gradient of each pair's pixels; see PixelAttribution."""
        return classifier.input_gradient(batch.images[batch.owner], batch.one_hot, self.guided)
