"""Launches the kernels between a gradient and a map, of methods without forwards; see `run_launch`.

What the gradient graph reads and writes has a row for each pair. There may be fewer rows than pairs
in the arrays; those beyond the run's own belong to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ccam_deploy.kernels.cuda import gradients, layer_maps, scores
from ccam_deploy.kernels.cuda.collectives import Array
from ccam_deploy.kernels.cuda.row_buffers import LayerMaps
from ccam_deploy.kernels.cuda.run_launch import Enlargement, RunKernels

WEIGHTINGS = {"mean": gradients.MEAN, "alpha": gradients.ALPHA}
"""How a kernel knows what `GradientKernels.weighted_sums` is asked for."""


@dataclass(frozen=True)
class LayerArrays:
    """A layer, in device memory.

    Attributes:
        features: [B, C, h · w] float32 or float16.
        gradients: [P, C, h · w] float32 or float16.
        maps: What is made of them.
        enlargement: How its maps are enlarged.
    """

    features: Array
    gradients: Array
    maps: LayerMaps[Array]
    enlargement: Enlargement


@dataclass(frozen=True)
class GradientKernels(RunKernels):
    """The kernels of methods that need a gradient.

    Attributes:
        codes: [P] int32, the class of each pair.
        logits: [B, classes] float32 or float16.
        slopes: [P] float32, written: 1, the slope of a logit.
        output_gradient: [P, classes] float32 or float16, the gradient graph's input.
        gradient_scale: The factor of that input.
    """

    codes: Array
    logits: Array
    slopes: Array
    output_gradient: Array
    gradient_scale: float

    def begin(self, stream: Any) -> None:
        """The gradient of each pair's logit."""
        scores.output_gradient[self.pairs, self.threads.scores, stream](
            self.logits,
            self.run.pair_owner,
            self.codes,
            np.float32(self.gradient_scale),
            scores.LOGIT,
            self.run.targets,
            self.slopes,
            self.output_gradient,
        )

    def gather(self, source: Array, target: Array, stream: Any) -> None:
        """Rows [rows, n] of the first pairs' images, out of [B, n]."""
        grid = -(-target.shape[1] // self.threads.combine), target.shape[0]
        scores.gather[grid, self.threads.combine, stream](source, self.run.pair_owner, target)

    def weighted_sums(
        self, layer: LayerArrays, weighting: str, epsilon: float, relu: bool, stream: Any
    ) -> None:
        """A layer's channels by weights of one of WEIGHTINGS; epsilon is of "alpha"."""
        grid = layer.features.shape[1], self.pairs
        gradients.gradient_weights[grid, self.threads.statistics, stream](
            self.run.progress,
            self.run.pair_owner,
            layer.features,
            layer.gradients,
            1.0 / self.gradient_scale,
            WEIGHTINGS[weighting],
            epsilon,
            layer.maps.weights,
        )
        maps = layer.maps
        self.weighted_channels(layer.features, maps.weights, relu, maps.sums, stream)

    def positive_sums(self, layer: LayerArrays, relu: bool, stream: Any) -> None:
        """A layer's channels, each place by its positive gradient."""
        sums = layer.maps.sums
        layer_maps.positive_gradients[(*self.by_tile(sums.shape[1]), stream)](
            self.run.progress,
            self.run.pair_owner,
            layer.features,
            layer.gradients,
            1.0 / self.gradient_scale,
            int(relu),
            sums,
        )

    def lift(self, layer: LayerArrays, gamma: float, stream: Any) -> None:
        """A layer's maps at a maximum of 1, their small values lifted."""
        layer_maps.lift[self.pairs, self.threads.scaling, stream](
            self.run.progress, np.float32(gamma), layer.maps.sums
        )
