"""RISE on a GPU, with random masks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.engines.cuda.slots import Slot
from ccam_deploy.kernels.cuda.row_buffers import Grids, Lines, Maps, enlarged, grid_specs
from ccam_deploy.methods.cuda.device_method import DeviceMethod
from ccam_deploy.methods.cuda.forward_pipeline import ForwardPipeline, Views
from ccam_deploy.methods.cuda.masked_forwards import MaskedForwards
from ccam_deploy.methods.cuda.passes import PairMaps
from ccam_deploy.methods.rise import RISE, enlarged_size, random_grids
from ccam_deploy.methods.stopwatch import Stopwatch

_GRIDS = "cells", "corners"

MOST_CELLS = 1 << 24
"""How many cells of grids lie in device memory at a time; those of 4,000 masks are far fewer."""


class RisePipeline(ForwardPipeline):
    """RISE's random masks on one slot.

    The grids are drawn on the host, so that they are those of the CPU, and uploaded once: all
    calls share them, unless they are too many.
    """

    def __init__(self, forwards: MaskedForwards, options: RISE) -> None:
        """Allocate memory, and prepare the kernels.

        Args:
            forwards: The masked forwards; closed with this.
            options: The method.

        Raises:
            BackendError: There is too little memory.
        """
        piece = max(1, min(options.masks, MOST_CELLS // options.cells**2))
        pixels = forwards.size[0] * forwards.size[1]
        specs = grid_specs(forwards.batch, piece, options.cells, pixels).by_name()
        prepare = partial(_kernels, forwards, options.cells)
        super().__init__(forwards, specs, [("shown",), _GRIDS], prepare, options.score)
        (self._grids,) = self._others
        self._options, self._piece, self._uploaded = options, piece, False

    def explain(
        self, owner: Classes, targets: Classes, baseline: Floats, clock: Stopwatch
    ) -> PairMaps:
        """Explain some pairs; see Pipeline."""
        shown, masks = np.unique(owner), self._options.masks
        self._inputs.host["shown"][: len(shown)] = shown
        self._forwards.runner.mark("upload")
        self._kernels.clear(self._stream)
        source = np.random.default_rng(self._options.seed)
        for piece in row_chunks(masks, self._piece):
            count = piece.stop - piece.start
            if not self._uploaded:
                self._upload(source, count, clock)
            self._run(owner, targets, count * len(shown), len(shown))
            if piece.stop < masks:
                self._forwards.finish(clock)  # before the host writes over what is being uploaded
        self._uploaded = self._piece == masks
        return self._maps(len(owner), clock)

    def _upload(self, source: np.random.Generator, masks: int, clock: Stopwatch) -> None:
        """Draw grids, and put them on the stream."""
        options, host = self._options, self._grids.host
        with clock.stage("draw"):
            grids, corners = random_grids(
                source, masks, options.cells, options.p, self._forwards.size
            )
        host["cells"][:masks] = grids.reshape(masks, -1)
        host["corners"][:masks] = corners
        self._grids.upload()

    def _render(self) -> None:
        self._kernels.masks(self._stream)

    def _collect(self) -> None:
        self._kernels.accumulate(self._stream)

    def _combine(self) -> None:
        self._kernels.finish(self._options.masks * self._options.p, self._stream)


def _kernels(forwards: MaskedForwards, cells: int, views: Views) -> Any:
    from ccam_deploy.kernels.cuda.row_launch import GridKernels

    wide = enlarged_size(cells, forwards.size)
    return GridKernels(
        forwards.kernels,
        Grids.of(views),
        Maps.of(views),
        Lines.of(forwards.constants(enlarged((cells, cells), wide).by_name())),
        (cells, wide[0], forwards.size[1]),
    )


@dataclass(frozen=True)
class CudaRISE(DeviceMethod[RISE]):
    """RISE whose masks stay on a GPU; see DeviceMethod."""

    name = RISE.name

    def _pipeline(self, slot: Slot) -> RisePipeline:
        return RisePipeline(self.device.masked_forwards(slot, self.method.masks), self.method)
