"""Grad-CAM (Selvaraju et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.methods.channel_weights import ChannelWeights


@dataclass(frozen=True)
class GradCAM(ChannelWeights):
    """Weighs each channel by the mean of its gradient (Selvaraju et al. 2017, eq. 1, 2).

    Attributes:
        layer: The target layer; empty for the final one.
        relu: Cut negative values off.
    """

    name = "grad-cam"

    def _weights(self, features: Floats, gradients: Floats) -> Floats:
        means: Floats = gradients.mean(axis=(2, 3), dtype=np.float64).astype(np.float32)
        return means
