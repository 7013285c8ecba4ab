"""Recipro-CAM on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.slots import Slot
from ccam_deploy.engines.networks import no_head
from ccam_deploy.errors import BackendError
from ccam_deploy.kernels.cuda.row_buffers import Places, place_specs
from ccam_deploy.methods.base import not_finite
from ccam_deploy.methods.cuda.device_method import DeviceMethod
from ccam_deploy.methods.cuda.forward_pipeline import ForwardPipeline, Views, layer_kernels
from ccam_deploy.methods.cuda.masked_forwards import MaskedForwards
from ccam_deploy.methods.cuda.passes import PairMaps
from ccam_deploy.methods.cuda.spread import ChannelSpread
from ccam_deploy.methods.recipro_cam import ReciproCAM
from ccam_deploy.methods.stopwatch import Stopwatch


class ReciproPipeline(ForwardPipeline):
    """Recipro-CAM on one slot: a forward of the head for each place of the last layer."""

    def __init__(self, forwards: MaskedForwards, layer: str, options: ReciproCAM) -> None:
        """Allocate memory, and prepare the kernels.

        Args:
            forwards: The forwards of the head; closed with this.
            layer: The name of the last layer.
            options: The method.

        Raises:
            BackendError: There is too little memory.
        """
        features = forwards.features[-1]
        places = features.shape[2] * features.shape[3]
        specs = place_specs(forwards.batch, places).by_name()
        prepare = partial(_kernels, forwards, features)
        super().__init__(forwards, specs, [("shown",)], prepare, options.score)
        self._layer, self._places = layer, places
        self._spread = ChannelSpread(forwards, features)
        self._after = self._spread.measure

    def explain(
        self, owner: Classes, targets: Classes, baseline: Floats, clock: Stopwatch
    ) -> PairMaps | BackendError:
        """Explain some pairs; see Pipeline."""
        shown = np.unique(owner)
        if not self._spread.is_finite(shown):
            return not_finite(self._layer)
        self._inputs.host["shown"][: len(shown)] = shown
        self._run(owner, targets, self._places * len(shown), len(shown))
        return self._maps(len(owner), clock)

    def _render(self) -> None:
        self._kernels.isolate(self._stream)

    def _combine(self) -> None:
        self._kernels.combine(self._stream)


def _kernels(forwards: MaskedForwards, features: DeviceTensor, views: Views) -> Any:
    from ccam_deploy.kernels.cuda.row_launch import PlaceKernels

    return layer_kernels(PlaceKernels, Places.of(views), forwards, features, views)


@dataclass(frozen=True)
class CudaReciproCAM(DeviceMethod[ReciproCAM]):
    """Recipro-CAM whose feature maps stay on a GPU; see DeviceMethod."""

    name = ReciproCAM.name

    def _pipeline(self, slot: Slot) -> ReciproPipeline:
        if "head" not in slot.graphs["throughput"]:
            raise no_head()
        layer = self.device.manifest.layers[-1]
        forwards = self.device.masked_forwards(slot, layer.height * layer.width, "head")
        return ReciproPipeline(forwards, layer.name, self.method)
