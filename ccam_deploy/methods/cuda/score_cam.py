"""Score-CAM on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.slots import Slot
from ccam_deploy.errors import BackendError
from ccam_deploy.kernels.cuda.row_buffers import Channels, channel_specs
from ccam_deploy.methods.base import not_finite, places_of
from ccam_deploy.methods.cuda.device_method import DeviceMethod
from ccam_deploy.methods.cuda.forward_pipeline import ForwardPipeline, Views, layer_kernels
from ccam_deploy.methods.cuda.masked_forwards import MaskedForwards
from ccam_deploy.methods.cuda.passes import PairMaps
from ccam_deploy.methods.cuda.spread import ChannelSpread
from ccam_deploy.methods.score_cam import ScoreCAM
from ccam_deploy.methods.stopwatch import Stopwatch

_INPUTS = "rows", "chosen", "base"


class ScorePipeline(ForwardPipeline):
    """Score-CAM of one layer on one slot.

    The host learns how much each channel varies, and uploads which of them are shown.
    """

    def __init__(self, forwards: MaskedForwards, place: int, layer: str, options: ScoreCAM) -> None:
        """Allocate memory, and prepare the kernels.

        Args:
            forwards: The masked forwards; closed with this.
            place: The layer's place among the bundle's.
            layer: Its name.
            options: The method.

        Raises:
            BackendError: There is too little memory.
        """
        features = forwards.features[place]
        _, channels, height, width = features.shape
        specs = channel_specs(forwards.batch, channels, height * width).by_name()
        prepare = partial(_kernels, forwards, features)
        super().__init__(forwards, specs, [_INPUTS], prepare, options.score)
        self._layer, self._options = layer, options
        self._spread = ChannelSpread(forwards, features)
        self._after = self._spread.measure

    def explain(
        self, owner: Classes, targets: Classes, baseline: Floats, clock: Stopwatch
    ) -> PairMaps | BackendError:
        """Explain some pairs; see Pipeline."""
        shown = np.unique(owner)
        if not self._spread.is_finite(shown):
            return not_finite(self._layer)
        pairs, rows = len(owner), self._choose(shown)
        base = self._options.base_scores(baseline, targets, self._forwards.activation)
        self._inputs.host["base"][:pairs] = base
        self._run(owner, targets, rows, len(shown))
        return self._maps(pairs, clock, ("weights", "gains"))

    def _choose(self, shown: NDArray[np.intp]) -> int:
        """Fill in which channels of the images are shown; return how many that are in all."""
        host, found, count = self._inputs.host, self._spread.host, 0
        host["chosen"][:] = 0
        for image in shown:
            varied = np.flatnonzero(found.varied[image])
            channels = varied[self._options.most_varied(found.spread[image, varied])]
            rows = host["rows"][count : count + len(channels)]
            rows[:, 0], rows[:, 1] = image, channels
            host["chosen"][image, channels] = 1
            count += len(channels)
        return count

    def _render(self) -> None:
        self._kernels.masks(self._stream)

    def _combine(self) -> None:
        self._kernels.combine(self._options.weights, self._stream)


def _kernels(forwards: MaskedForwards, features: DeviceTensor, views: Views) -> Any:
    from ccam_deploy.kernels.cuda.row_launch import ChannelKernels

    return layer_kernels(ChannelKernels, Channels.of(views), forwards, features, views)


@dataclass(frozen=True)
class CudaScoreCAM(DeviceMethod[ScoreCAM]):
    """Score-CAM whose masks and channels stay on a GPU; see DeviceMethod."""

    name = ScoreCAM.name

    def _pipeline(self, slot: Slot) -> ScorePipeline:
        layers = self.device.manifest.layers
        names = [layer.name for layer in layers]
        layer = self.method.layer or names[-1]
        (place,) = places_of([layer], names)
        masks = min(self.method.channels or layers[place].channels, layers[place].channels)
        return ScorePipeline(self.device.masked_forwards(slot, masks), place, layer, self.method)
