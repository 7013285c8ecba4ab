"""Grad-CAM, Grad-CAM++ and Layer-CAM on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.engines.cuda.parts import SlotImages
from ccam_deploy.engines.cuda.slots import Slot
from ccam_deploy.kernels.cuda.row_buffers import LayerMaps, Maps, layer_specs, map_specs
from ccam_deploy.methods.base import Context, places_of
from ccam_deploy.methods.cuda.device_method import (
    RUNS_TO_CAPTURE,
    DeviceMethod,
    DevicePasses,
    Pipeline,
)
from ccam_deploy.methods.cuda.gradient_passes import GradientPasses
from ccam_deploy.methods.cuda.passes import PairMaps
from ccam_deploy.methods.grad_cam import GradCAM
from ccam_deploy.methods.grad_cam_plus_plus import GradCAMPlusPlus
from ccam_deploy.methods.layer_cam import LayerCAM
from ccam_deploy.methods.stopwatch import Stopwatch


@dataclass(frozen=True)
class Rule:
    """How maps follow from features and gradients.

    Attributes:
        weighting: What weighs a channel, of kernels.cuda.gradient_launch.WEIGHTINGS; empty where
            each place is weighed by its own positive gradient.
        relu: Whether negative values are cut off.
        epsilon: Of Grad-CAM++.
        gammas: For each layer how strongly its small values are lifted, 0 for not at all; nothing
            where the map of a single layer is left as it is.
    """

    weighting: str
    relu: bool
    epsilon: float = 0.0
    gammas: tuple[float, ...] = ()


class GradientPipeline(Pipeline):
    """The maps of some layers, fused by their maximum, on one slot."""

    def __init__(
        self, passes: GradientPasses, places: Sequence[int], name: str, rule: Rule
    ) -> None:
        """Allocate memory, and prepare the kernels.

        Args:
            passes: The gradient passes; closed with this.
            places: The layers' places among the bundle's, in ascending order.
            name: The layer's name, where it is the only one.
            rule: How maps are made.

        Raises:
            BackendError: There is too little memory.
        """
        super().__init__(passes)
        self._passes, self._name, self._rule = passes, name, rule
        self._tensors = passes.region(map_specs(passes.batch, *passes.size).by_name()).tensors
        self._maps: Maps[Any] = Maps.of(passes.views(self._tensors))
        self._layers = [self._layer(place) for place in places]

    def begin(self, images: SlotImages, clock: Stopwatch) -> Floats:
        """Run the backbone; see Pipeline."""
        return self._passes.run_backbone(images, None, clock)

    def explain(
        self, owner: Classes, targets: Classes, baseline: Floats, clock: Stopwatch
    ) -> PairMaps:
        """Explain some pairs; see Pipeline."""
        self._passes.run_gradient(owner, targets, self._combine)
        return self._passes.maps(self._tensors, len(owner), clock, self._name)

    def warm_up(self, images: int, context: Context, progress: Callable[[str], None]) -> None:
        """Run every number of images, and every number of classes; see Pipeline."""
        super().warm_up(images, context, progress)
        passes = self._passes
        self.begin(context.noise(min(images, passes.batch)), Stopwatch())
        for pairs in passes.sizes:
            progress(f"{pairs} classes" if pairs > 1 else "one class")
            each, last = np.arange(pairs), np.full(pairs, passes.batch - 1)
            for owner in (each, last):
                for _ in range(RUNS_TO_CAPTURE):
                    self.explain(owner, np.zeros(pairs, np.int64), context.baseline, Stopwatch())

    def _combine(self) -> None:
        kernels, stream = self._passes.kernels, self._passes.device.kernel_stream
        rule, maps = self._rule, self._maps
        for number, layer in enumerate(self._layers):
            if rule.weighting:
                kernels.weighted_sums(layer, rule.weighting, rule.epsilon, rule.relu, stream)
            else:
                kernels.positive_sums(layer, rule.relu, stream)
            if rule.gammas:
                kernels.lift(layer, rule.gammas[number], stream)
            kernels.enlarge(layer.maps.sums, layer.enlargement, maps.raw, stream, number > 0)
        kernels.scale(maps, stream)

    def _layer(self, place: int) -> Any:
        from ccam_deploy.kernels.cuda.gradient_launch import LayerArrays

        passes = self._passes
        features, gradients = passes.features[place], passes.gradients[place]
        _, channels, height, width = features.shape
        specs = layer_specs(passes.batch, channels, height * width).by_name()
        return LayerArrays(
            passes.flat_view(features),
            passes.flat_view(gradients),
            LayerMaps.of(passes.views(passes.region(specs).tensors)),
            passes.enlargement(features),
        )


def _places(device: DevicePasses, layers: Sequence[str]) -> tuple[list[int], str]:
    """The places of layers, of the last one where none is named; and the name of an only one."""
    names = [layer.name for layer in device.manifest.layers]
    places = places_of(layers or names[-1:], names)
    return places, names[places[0]] if len(places) == 1 else ""


def _named(layer: str) -> list[str]:
    return [layer] if layer else []


@dataclass(frozen=True)
class CudaGradCAM(DeviceMethod[GradCAM]):
    """Grad-CAM whose features and gradients stay on a GPU; see DeviceMethod."""

    name = GradCAM.name

    def _pipeline(self, slot: Slot) -> GradientPipeline:
        layer = _places(self.device, _named(self.method.layer))
        rule = Rule("mean", self.method.relu)
        return GradientPipeline(self.device.gradient_passes(slot), *layer, rule)


@dataclass(frozen=True)
class CudaGradCAMPlusPlus(DeviceMethod[GradCAMPlusPlus]):
    """Grad-CAM++ whose features and gradients stay on a GPU; see DeviceMethod."""

    name = GradCAMPlusPlus.name

    def _pipeline(self, slot: Slot) -> GradientPipeline:
        layer = _places(self.device, _named(self.method.layer))
        rule = Rule("alpha", self.method.relu, self.method.epsilon)
        return GradientPipeline(self.device.gradient_passes(slot), *layer, rule)


@dataclass(frozen=True)
class CudaLayerCAM(DeviceMethod[LayerCAM]):
    """Layer-CAM whose features and gradients stay on a GPU; see DeviceMethod."""

    name = LayerCAM.name

    def _pipeline(self, slot: Slot) -> GradientPipeline:
        places, name = _places(self.device, self.method.layers)
        rule = Rule("", self.method.relu, gammas=self.method.gammas(len(places)))
        return GradientPipeline(self.device.gradient_passes(slot), places, name, rule)
