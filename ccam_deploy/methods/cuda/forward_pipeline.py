"""The base of methods that run masked forwards on a GPU: their arrays, and what a run does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.graph_replay import Part
from ccam_deploy.engines.cuda.parts import SlotImages
from ccam_deploy.kernels.cuda.buffers import Spec
from ccam_deploy.kernels.cuda.row_buffers import Maps, map_specs
from ccam_deploy.methods.cuda.device_method import Pipeline
from ccam_deploy.methods.cuda.masked_forwards import ChunkWork, MaskedForwards
from ccam_deploy.methods.cuda.passes import PairMaps
from ccam_deploy.methods.scores import Score, scoring
from ccam_deploy.methods.stopwatch import Stopwatch

Views = Mapping[str, Any]
"""A method's arrays for Numba's kernels, by name."""


class ForwardPipeline(Pipeline):
    """A method of masked forwards on one slot."""

    def __init__(
        self,
        forwards: MaskedForwards,
        arrays: Mapping[str, Spec],
        filled: Sequence[Collection[str]],
        prepare: Callable[[Views], Any],
        score: Score,
    ) -> None:
        """Allocate memory, and prepare the kernels.

        Args:
            forwards: The forwards; closed with this.
            arrays: The method's arrays beside its maps, by name.
            filled: Names of the arrays that the host fills in, in groups that are uploaded at
                once; the first group is that of every run.
            prepare: Makes the launcher of the method's kernels, of kernels.cuda.row_launch.
            score: What a row is scored by.

        Raises:
            BackendError: There is too little memory.
        """
        super().__init__(forwards)
        self._forwards = forwards
        rest = dict(arrays)
        regions = [
            forwards.region({name: rest.pop(name) for name in names}, mirrored=True)
            for names in filled
        ]
        self._inputs, *self._others = regions
        maps = map_specs(forwards.batch, *forwards.size).by_name()
        regions.append(forwards.region(rest | maps))
        self._tensors = {n: tensor for region in regions for n, tensor in region.tensors.items()}
        self._kernels = prepare(forwards.views(self._tensors))
        self._work = ChunkWork(self._render, self._collect, scoring(score, forwards.activation))
        self._after: Callable[[], None] | None = None  # the backbone; see Passes.run_backbone

    def begin(self, images: SlotImages, clock: Stopwatch) -> Floats:
        """Run the backbone, and what the method needs to know of the features; see Pipeline."""
        return self._forwards.run_backbone(images, self._after, clock)

    def _run(self, owner: Classes, targets: Classes, rows: int, shown: int) -> None:
        """Upload what the host has filled in for a run, and put all its forwards on the stream.

        owner, targets: [P], the image and the class of each pair.   shown: how many images.
        """
        self._forwards.begin(owner, targets, rows, shown)
        self._inputs.upload()
        self._forwards.run_chunks(rows, self._work)

    def _maps(
        self, pairs: int, clock: Stopwatch, by_mask: tuple[str, str] | None = None
    ) -> PairMaps:
        """Make maps of what was taken up, and wait for them; see Passes.maps."""
        runner = self._forwards.runner
        runner.put(("combine",), "combine", lambda: [Part("combine", self._combine)])
        return self._forwards.maps(self._tensors, pairs, clock, by_mask=by_mask)

    @property
    def _stream(self) -> Any:
        return self._forwards.device.kernel_stream

    @abstractmethod
    def _render(self) -> None:
        """Write the masks of the next chunk; see ChunkWork."""

    def _collect(self) -> None:
        """Take up the scores of a chunk, here sorted by the item of each row; see ChunkWork."""
        self._kernels.keep_scores(self._stream)

    @abstractmethod
    def _combine(self) -> None:
        """Put the kernels that make maps of the scores on the stream."""


def layer_kernels(
    make: Callable[..., Any],
    arrays: Any,
    forwards: MaskedForwards,
    features: DeviceTensor,
    views: Views,
) -> Any:
    """Make the launcher of kernels that read a layer's feature maps, and enlarge maps of its size.

    Args:
        make: ChannelKernels or PlaceKernels, of kernels.cuda.row_launch.
        arrays: The method's arrays.
        forwards: The forwards.
        features: The layer's feature maps [batch, C, h, w].
        views: The arrays of the maps, among others.
    """
    enlargement, flat = forwards.enlargement(features), forwards.flat_view(features)
    return make(forwards.kernels, arrays, Maps.of(views), enlargement, flat)
