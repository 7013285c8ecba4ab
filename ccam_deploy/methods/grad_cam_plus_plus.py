"""Grad-CAM++ (Chattopadhay et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.errors import OptionError
from ccam_deploy.methods.channel_weights import ChannelWeights


@dataclass(frozen=True)
class GradCAMPlusPlus(ChannelWeights):
    """Weighs each place's positive gradient by its alpha (Chattopadhay et al. 2018, eq. 6, 19).

    Alpha belongs to the exponential of the logit, whose second and third derivatives follow from
    the first where the network is piecewise linear.

    Attributes:
        layer: The target layer; empty for the final one.
        relu: Cut negative values off.
        epsilon: Added to the denominator of alpha, as some programs do to avoid a division by
            zero (pytorch-grad-cam adds 1e-6); by default places with a zero denominator are left
            out instead. It changes results: gradients of 1e-3 have squares of 1e-6.
    """

    name = "grad-cam++"
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < np.inf:
            raise OptionError(f"epsilon is {self.epsilon}; it must be finite and at least 0")

    def _weights(self, features: Floats, gradients: Floats) -> Floats:
        slopes = gradients.astype(np.float64)
        total = features.sum(axis=(2, 3), keepdims=True, dtype=np.float64)
        square = slopes**2
        denominator = 2 * square + total * square * slopes + self.epsilon
        alpha = np.divide(square, denominator, where=denominator != 0, out=np.zeros_like(square))
        weights: Floats = np.einsum("pcij,pcij->pc", alpha, np.maximum(slopes, 0))
        return weights.astype(np.float32)
