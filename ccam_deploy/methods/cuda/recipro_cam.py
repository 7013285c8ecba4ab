"""Recipro-CAM on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.engines.cuda.graph_replay import Part
from ccam_deploy.engines.cuda.slots import Slot
from ccam_deploy.engines.networks import no_head
from ccam_deploy.errors import BackendError
from ccam_deploy.kernels.cuda.row_buffers import Maps, Places, map_specs, place_specs
from ccam_deploy.methods.base import not_finite
from ccam_deploy.methods.cuda.device_method import DeviceMethod, Pipeline
from ccam_deploy.methods.cuda.masked_forwards import ChunkWork, MaskedForwards
from ccam_deploy.methods.cuda.passes import PairMaps
from ccam_deploy.methods.cuda.spread import ChannelSpread
from ccam_deploy.methods.recipro_cam import ReciproCAM
from ccam_deploy.methods.scores import scoring
from ccam_deploy.methods.stopwatch import Stopwatch


class ReciproPipeline(Pipeline):
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
        super().__init__(forwards)
        self._forwards, self._layer = forwards, layer
        features = forwards.features[-1]
        self._places = features.shape[2] * features.shape[3]
        self._spread = ChannelSpread(forwards, features)
        specs = place_specs(forwards.batch, self._places).by_name()
        maps = map_specs(forwards.batch, *forwards.size).by_name()
        self._shown = forwards.region({"shown": specs.pop("shown")}, mirrored=True)
        self._tensors = {**self._shown.tensors, **forwards.region(specs | maps).tensors}
        self._kernels = self._prepare_kernels()
        self._work = ChunkWork(
            lambda: self._kernels.isolate(forwards.device.kernel_stream),
            lambda: self._kernels.keep_scores(forwards.device.kernel_stream),
            scoring(options.score, forwards.activation),
        )

    def begin(self, images: Floats, clock: Stopwatch) -> Floats:
        """Run the backbone, and see whether the features are finite; see Pipeline."""
        return self._forwards.run_backbone(images, self._spread.measure, clock)

    def explain(
        self, owner: Classes, targets: Classes, baseline: Floats, clock: Stopwatch
    ) -> PairMaps | BackendError:
        """Explain some pairs; see Pipeline."""
        forwards, pairs, shown = self._forwards, len(owner), np.unique(owner)
        if not self._spread.is_finite(shown):
            return not_finite(self._layer)
        rows = self._places * len(shown)
        self._shown.host["shown"][: len(shown)] = shown
        forwards.begin(owner, targets, rows, len(shown))
        self._shown.upload()
        forwards.run_chunks(rows, self._work)
        forwards.runner.put(("combine",), "combine", lambda: [Part("combine", self._combine)])
        return forwards.maps(self._tensors, pairs, clock)

    def _combine(self) -> None:
        self._kernels.combine(self._forwards.device.kernel_stream)

    def _prepare_kernels(self) -> Any:
        from ccam_deploy.kernels.cuda.row_launch import PlaceKernels

        forwards, views = self._forwards, self._forwards.views(self._tensors)
        features = forwards.features[-1]
        return PlaceKernels(
            forwards.kernels,
            Places.of(views),
            Maps.of(views),
            forwards.enlargement(features),
            forwards.flat_view(features),
        )


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
