"""Forwards of images under masks on a device, whatever makes the masks.

The masks come a chunk at a time: a method's kernels write them, the classifier reads them where
they are, and the method's kernels take up their scores. Every launch of the classifier has the same
shapes at the same addresses: the last chunk is padded with rows that are ignored.

The classifier's head runs on feature maps in the same way: what a method writes instead of masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.graph_replay import Part
from ccam_deploy.engines.cuda.slots import Slot
from ccam_deploy.kernels.cuda.row_buffers import Chunk, chunk_specs
from ccam_deploy.methods.cuda.passes import Passes, Setup, spec_of
from ccam_deploy.methods.scores import Scoring

Repeated = Literal["classifier", "head"]
"""The graph that runs on every chunk."""

_LARGEST_CHUNK = 64


@dataclass(frozen=True)
class ChunkWork:
    """What a method puts on the stream for each chunk.

    Attributes:
        render: Writes the masks, the owner and the item of every row.
        collect: Takes up the rows' scores.
        scoring: How scores are computed of logits.
    """

    render: Callable[[], None]
    collect: Callable[[], None]
    scoring: Scoring


class MaskedForwards(Passes):
    """Images, their activations, and chunks of masked forwards, on one slot; see Passes.

    Attributes:
        chunk_rows: The rows of each launch of the classifier.
        kernels: Of kernels.cuda.row_launch.ForwardKernels.
    """

    def __init__(
        self, slot: Slot, masks: int, setup: Setup, repeated: Repeated = "classifier"
    ) -> None:
        """Allocate memory, and prepare the kernels.

        Args:
            slot: The slot.
            masks: The most masks of an image.
            setup: The sizes.
            repeated: The graph that runs on every chunk.

        Raises:
            BackendError: There is too little memory.
        """
        most = slot.graphs["throughput"][repeated].limits.get("masks", _LARGEST_CHUNK)
        self.chunk_rows = _even(masks, min(most, _LARGEST_CHUNK))
        super().__init__(slot, (repeated,), setup)
        try:
            self._prepare_chunk(repeated)
        except BaseException:
            self.close()
            raise

    def run_chunks(self, rows: int, work: ChunkWork) -> None:
        """Put the masked forwards of a run on the stream, all of its chunks.

        Args:
            rows: How many rows the run has.
            work: The method's part; the same in every call.
        """

        def parts() -> list[Part]:
            return [
                Part("masks", work.render),
                Part("classifier", self._classify, is_engine=True),
                Part("combine", partial(self._collect, work)),
            ]

        for _ in range(-(-rows // self.chunk_rows)):
            self.runner.put(("chunk",), "forwards", parts)

    def close(self) -> None:
        """Free the memory, once the stream's work is done, and let go of the graphs."""
        self._classify = _closed
        super().close()

    def _collect(self, work: ChunkWork) -> None:
        stream = self.device.kernel_stream
        self.kernels.scores(work.scoring, stream)
        work.collect()
        self.kernels.advance(stream)

    def _prepare_chunk(self, repeated: Repeated) -> None:
        from ccam_deploy.kernels.cuda.row_launch import ForwardKernels

        graph, rows = self.graph(repeated), self.chunk_rows
        given = next(spec for spec in graph.inputs if spec.name in ("masks", "features"))
        masks, logits = spec_of(given, rows), spec_of(graph.outputs[0], rows)
        chunk = self.region(chunk_specs(rows, self.batch, masks, logits).by_name()).tensors
        tensors: dict[str, DeviceTensor] = {
            given.name: replace(chunk["masks"], shape=masks.shape),
            "logits": chunk["logits"],
        }
        if repeated == "classifier":
            tensors |= {"images": self.images_for(graph), "owner": chunk["owner"]}
        self._classify = self.bind(graph, tensors)
        views: Chunk[Any] = Chunk.of(self.views(chunk))
        self.kernels = ForwardKernels(self.kernels.run, views)


def _closed() -> None:
    """What there is to launch after `close`."""


def _even(rows: int, most: int) -> int:
    """The rows of each chunk, where rows are cut into as few chunks as can be, of equal sizes."""
    chunks = -(-rows // most)
    return -(-rows // chunks)
