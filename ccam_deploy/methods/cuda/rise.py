"""RISE on a GPU, with random masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.engines.cuda.graph_replay import Part
from ccam_deploy.engines.cuda.slots import Slot
from ccam_deploy.kernels.cuda.row_buffers import (
    Grids,
    Lines,
    Maps,
    enlarged,
    grid_specs,
    map_specs,
)
from ccam_deploy.methods.cuda.device_method import DeviceMethod, Pipeline
from ccam_deploy.methods.cuda.masked_forwards import ChunkWork, MaskedForwards
from ccam_deploy.methods.cuda.passes import PairMaps
from ccam_deploy.methods.rise import RISE, enlarged_size, random_grids
from ccam_deploy.methods.scores import scoring
from ccam_deploy.methods.stopwatch import Stopwatch

MOST_CELLS = 1 << 24
"""How many cells of grids lie in device memory at a time; those of 4,000 masks are far fewer."""


class RisePipeline(Pipeline):
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
        super().__init__(forwards)
        self._forwards = forwards
        self._options = options
        self._piece = max(1, min(options.masks, MOST_CELLS // options.cells**2))
        self._uploaded = False
        pixels = forwards.size[0] * forwards.size[1]
        specs = grid_specs(forwards.batch, self._piece, options.cells, pixels).by_name()
        maps = map_specs(forwards.batch, *forwards.size).by_name()
        self._shown = forwards.region({"shown": specs.pop("shown")}, mirrored=True)
        self._grids = forwards.region(
            {n: specs.pop(n) for n in ("cells", "corners")}, mirrored=True
        )
        self._tensors = {
            **self._shown.tensors,
            **self._grids.tensors,
            **forwards.region(specs | maps).tensors,
        }
        self._kernels = self._prepare_kernels()
        self._work = ChunkWork(
            lambda: self._kernels.masks(forwards.device.kernel_stream),
            lambda: self._kernels.accumulate(forwards.device.kernel_stream),
            scoring(options.score, forwards.activation),
        )

    def begin(self, images: Floats, clock: Stopwatch) -> Floats:
        """Run the backbone; see Pipeline."""
        return self._forwards.run_backbone(images, None, clock)

    def explain(
        self, owner: Classes, targets: Classes, baseline: Floats, clock: Stopwatch
    ) -> PairMaps:
        """Explain some pairs; see Pipeline."""
        forwards, pairs, shown = self._forwards, len(owner), np.unique(owner)
        masks = self._options.masks
        forwards.runner.mark("upload")
        self._shown.host["shown"][: len(shown)] = shown
        self._shown.upload()
        self._kernels.clear(forwards.device.kernel_stream)
        source = np.random.default_rng(self._options.seed)
        for piece in row_chunks(masks, self._piece):
            count = piece.stop - piece.start
            if not self._uploaded:
                self._upload(source, count, clock)
            rows = count * len(shown)
            forwards.begin(owner, targets, rows, len(shown))
            forwards.run_chunks(rows, self._work)
            if piece.stop < masks:
                forwards.finish(clock)  # before the host writes over what is being uploaded
        self._uploaded = self._piece == masks
        forwards.runner.put(("finish",), "combine", lambda: [Part("combine", self._finish)])
        return forwards.maps(self._tensors, pairs, clock)

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

    def _finish(self) -> None:
        count = self._options.masks * self._options.p
        self._kernels.finish(count, self._forwards.device.kernel_stream)

    def _prepare_kernels(self) -> Any:
        from ccam_deploy.kernels.cuda.row_launch import GridKernels

        forwards, cells = self._forwards, self._options.cells
        views = forwards.views(self._tensors)
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
