"""Forwards of images under masks on a device, whatever makes the masks.

The images are uploaded once. The masks come a chunk at a time: a method's kernels write them, the
classifier reads them where they are, and the method's kernels take up their scores. Every launch
of the classifier has the same shapes at the same addresses: the last chunk is padded with rows that
are ignored, and no row shows the images that a call does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.engines.base import TensorSpec
from ccam_deploy.engines.cuda.device import Device, DeviceGraph, DeviceTensor, Region
from ccam_deploy.engines.cuda.graph_replay import Part, StreamRunner
from ccam_deploy.engines.cuda.slots import Graphs
from ccam_deploy.kernels.cuda.buffers import Spec
from ccam_deploy.kernels.cuda.row_buffers import Chunk, RunInputs, chunk_specs, run_specs
from ccam_deploy.methods.scores import Scoring
from ccam_deploy.methods.stopwatch import Stopwatch

_LARGEST_CHUNK = 64


@dataclass(frozen=True)
class Setup:
    """What masked forwards are made for.

    Attributes:
        input: Channels, height and width of an image.
        batch: The most images, and the most (image, class) pairs, of one run.
        masks: The most masks of an image.
        cuda_graphs: Whether repeated work is replayed as CUDA graphs.
        note: Called with a line where it cannot be.
        activation: What makes probabilities of logits.
    """

    input: tuple[int, int, int]
    batch: int
    masks: int
    cuda_graphs: bool
    note: Callable[[str], None]
    activation: Activation


@dataclass(frozen=True)
class ChunkWork:
    """What a method puts on the stream for each chunk.

    Attributes:
        render: Writes the masks, the owner and the item of every row.
        collect: Takes up the rows' scores.
        scoring: How the score is computed of logits.
    """

    render: Callable[[], None]
    collect: Callable[[], None]
    scoring: Scoring


class MaskedForwards:
    """Images, their activations, and chunks of masked forwards, on one slot.

    Attributes:
        device: The slot's device.
        size: Height and width of an image.
        batch: The most images and pairs of one run; the setup's, or fewer where the graphs take
            fewer.
        chunk_rows: The rows of each launch of the classifier.
        runner: Puts work on the stream.
        activation: What makes probabilities of logits.
        kernels: Of kernels.cuda.row_launch.ForwardKernels.
        features: The backbone's feature maps [batch, C, h, w], from the shallowest layer on.
    """

    def __init__(self, device: Device, graphs: Graphs, setup: Setup) -> None:
        """Allocate memory, and prepare the kernels.

        Args:
            device: The slot's device.
            graphs: The backbone and the classifier, by name.
            setup: The sizes.

        Raises:
            BackendError: There is too little memory.
        """
        self.device = device
        self.size = setup.input[1:]
        self.activation = setup.activation
        self._backbone, self._classifier = graphs["backbone"], graphs["classifier"]
        both = self._backbone, self._classifier
        self.batch = min(setup.batch, *(g.limits.get("batch", setup.batch) for g in both))
        most = min(self._classifier.limits.get("masks", _LARGEST_CHUNK), _LARGEST_CHUNK)
        self.chunk_rows = _even(setup.masks, most)
        self.runner = StreamRunner.of_graphs(device, setup.cuda_graphs, both, setup.note)
        self._replays = setup.cuda_graphs
        self._backbones: dict[int, Callable[[], None]] = {}
        self._regions: list[Region] = []
        try:
            self._allocate(setup)
        except BaseException:
            self.close()
            raise

    def run_backbone(
        self, images: Floats, after: Callable[[], None] | None, clock: Stopwatch
    ) -> Floats:
        """Run the backbone on images, which masked forwards show from then on.

        Args:
            images: [B, C, H, W] float32, at most `batch`.
            after: Puts more work that reads the activations on the stream; None for nothing.
            clock: Takes the seconds of each stage.

        Returns:
            Logits [B, classes] float32.
        """
        count = len(images)
        self.runner.forget()
        self._images.host["images"][:count] = images
        self.runner.mark("upload")
        self.device.upload(self._images.address, self._images.host["images"][:count])
        rows = 1 if count == 1 else self.batch
        parts = [Part("backbone", partial(self._launch_backbone, rows), is_engine=True)]
        if self._typed_images:
            parts.insert(0, Part("upload", self._cast_images))
        if after is not None:
            parts.append(Part("statistics", after))
        self.runner.put(("backbone", rows), "backbone", parts)
        self.runner.mark("download")
        self._logits.download()
        self.finish(clock)
        return self._logits.host["logits"][:count].astype(np.float32)

    def begin(self, owner: Classes, targets: Classes, rows: int, shown: int) -> None:
        """Put the inputs of a run on the stream.

        Args:
            owner: [P], the image of each pair; P at most `batch`.
            targets: [P], the class of each pair.
            rows: How many rows the run has, over all of its chunks.
            shown: How many images it shows.
        """
        host = RunInputs.of(self._inputs.host)
        host.progress[:] = 0, rows, len(owner), shown
        host.pair_owner[: len(owner)] = owner
        host.targets[: len(owner)] = targets
        self.runner.mark("upload")
        self._inputs.upload()

    def run_chunks(self, rows: int, work: ChunkWork) -> None:
        """Put the masked forwards of a run on the stream, all of its chunks.

        Args:
            rows: How many rows the run has.
            work: The method's part; the same in every call.
        """
        parts = (
            Part("masks", work.render),
            Part("classifier", self._classify, is_engine=True),
            Part("combine", partial(self._collect, work)),
        )
        for _ in range(-(-rows // self.chunk_rows)):
            self.runner.put(("chunk",), "forwards", parts)

    def finish(self, clock: Stopwatch) -> None:
        """Wait for the stream, and count the seconds of the stages."""
        self.runner.mark("")
        self.device.wait()
        clock.add(self.runner.stages())

    def region(self, specs: Mapping[str, Spec], mirrored: bool = False) -> Region:
        """Allocate arrays that are freed with these; see Region."""
        arrays = {name: (spec.shape, spec.dtype) for name, spec in specs.items()}
        region = Region(self.device, arrays, mirrored)
        self._regions.append(region)
        return region

    def constants(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Upload arrays that do not change, for Numba's kernels; freed with these."""
        specs = {name: Spec(values.shape, values.dtype) for name, values in arrays.items()}
        region = self.region(specs, mirrored=True)
        for name, values in arrays.items():
            region.host[name][:] = values
        region.upload()
        return self.views(region.tensors)

    def download(
        self, tensors: Mapping[str, DeviceTensor], names: Sequence[str], rows: int
    ) -> dict[str, NDArray[Any]]:
        """Put copies of the first rows of some tensors to the host on the stream.

        Returns:
            The arrays, by name, whose contents are there after `finish`.
        """
        self.runner.mark("download")
        results = {}
        for name in names:
            tensor = tensors[name]
            results[name] = np.empty((rows, *tensor.shape[1:]), tensor.dtype)
            self.device.download(results[name], tensor.address)
        return results

    def views(self, tensors: Mapping[str, DeviceTensor]) -> dict[str, Any]:
        """Tensors for Numba's kernels, by name."""
        return {
            name: self.device.view(tensor.address, tensor.shape, tensor.dtype)
            for name, tensor in tensors.items()
        }

    def close(self) -> None:
        """Free the memory, once the stream's work is done."""
        self.device.wait()
        for region in self._regions:
            region.close()
        self._regions.clear()

    def _launch_backbone(self, rows: int) -> None:
        if rows not in self._backbones:
            tensors = self._outputs | {"images": self._images_for(self._backbone)}
            of_rows = {
                name: replace(tensor, shape=(rows, *tensor.shape[1:]))
                for name, tensor in tensors.items()
            }
            self._backbones[rows] = self._bind(self._backbone, of_rows)
        self._backbones[rows]()

    def _bind(self, graph: DeviceGraph, tensors: dict[str, DeviceTensor]) -> Callable[[], None]:
        return graph.bind(tensors) if self._replays else partial(graph.launch, tensors)

    def _collect(self, work: ChunkWork) -> None:
        stream = self.device.kernel_stream
        self.kernels.scores(work.scoring, stream)
        work.collect()
        self.kernels.advance(stream)

    def _allocate(self, setup: Setup) -> None:
        from ccam_deploy.kernels.cuda.row_launch import ForwardKernels

        outputs = {spec.name: _spec(spec, self.batch) for spec in self._backbone.outputs}
        image = Spec((self.batch, *setup.input), np.float32)
        self._images = self.region({"images": image}, mirrored=True)
        self._images.host["images"][:] = 0  # for rows that no image is in
        self._images.upload()
        types = {_images_of(g).dtype for g in (self._backbone, self._classifier)}
        self._typed_images = {
            dtype: self.region({"images": replace(image, dtype=dtype)}).tensors["images"]
            for dtype in types - {np.dtype(np.float32)}
        }
        self._logits = self.region({"logits": outputs.pop("logits")}, mirrored=True)
        self._outputs = self.region(outputs).tensors | self._logits.tensors
        self.features = tuple(
            tensor for name, tensor in self._outputs.items() if name.startswith("feature_")
        )
        self._inputs = self.region(run_specs(self.batch).by_name(), mirrored=True)
        masks = next(spec for spec in self._classifier.inputs if spec.name == "masks")
        logits = _spec(self._classifier.outputs[0], self.chunk_rows)
        specs = chunk_specs(self.chunk_rows, self.batch, self.size, masks.dtype, logits)
        chunk = self.region(specs.by_name()).tensors
        shape = self.chunk_rows, 1, *self.size
        tensors = {
            "images": self._images_for(self._classifier),
            "masks": replace(chunk["masks"], shape=shape),
            "owner": chunk["owner"],
            "logits": chunk["logits"],
        }
        self._classify = self._bind(self._classifier, tensors)
        self.kernels = ForwardKernels(
            RunInputs.of(self.views(self._inputs.tensors)), Chunk.of(self.views(chunk))
        )

    def _images_for(self, graph: DeviceGraph) -> DeviceTensor:
        """The images in the type that a graph takes."""
        return self._typed_images.get(_images_of(graph).dtype, self._images.tensors["images"])

    def _cast_images(self) -> None:
        source = self._images.tensors["images"]
        for target in self._typed_images.values():
            flat = [replace(t, shape=(math.prod(t.shape),)) for t in (source, target)]
            views = self.views(dict(zip(("source", "target"), flat, strict=True)))
            self.kernels.cast(views["source"], views["target"], self.device.kernel_stream)


def _even(rows: int, most: int) -> int:
    """The rows of each chunk, where rows are cut into as few chunks as can be, of equal sizes."""
    chunks = -(-rows // most)
    return -(-rows // chunks)


def _images_of(graph: DeviceGraph) -> TensorSpec:
    return next(spec for spec in graph.inputs if spec.name == "images")


def _spec(tensor: TensorSpec, rows: int) -> Spec:
    """A tensor of so many rows along its first axis, which varies."""
    return Spec((rows, *(int(size) for size in tensor.shape[1:])), tensor.dtype)
