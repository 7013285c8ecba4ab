"""How much the channels of a layer vary on a device, as the host needs to know."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.kernels.cuda.row_buffers import Spread, spread_specs
from ccam_deploy.methods.cuda.masked_forwards import MaskedForwards


class ChannelSpread:
    """The spread of a layer's channels, on one slot.

    Attributes:
        host: The results, for the images that `measure` saw last.
    """

    def __init__(self, forwards: MaskedForwards, features: DeviceTensor) -> None:
        """Allocate memory.

        Args:
            forwards: The masked forwards.
            features: The layer's feature maps [batch, C, h, w].

        Raises:
            BackendError: There is too little memory.
        """
        self._forwards = forwards
        self._region = forwards.region(spread_specs(*features.shape[:2]).by_name(), mirrored=True)
        self._features = forwards.flat_view(features)
        self._views: Spread[Any] = Spread.of(forwards.views(self._region.tensors))
        self.host: Spread[NDArray[Any]] = Spread.of(self._region.host)

    def measure(self) -> None:
        """Put the kernel and the download on the stream."""
        stream = self._forwards.device.kernel_stream
        self._forwards.kernels.spread(self._features, self._views, stream)
        self._region.download()

    def is_finite(self, images: NDArray[np.intp]) -> bool:
        """Tell whether all features of some images are finite."""
        return bool(np.isfinite(self.host.spread[images]).all())
