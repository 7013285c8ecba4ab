"""Images and their activations on a slot, and the arrays of a method beside them.

Images are uploaded once. The backbone sees few numbers of rows, at the same addresses; rows that no
image is in are zeros, or what an earlier call left there, and change nothing in the others.
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
from ccam_deploy.engines.cuda.device import DeviceGraph, DeviceTensor, Region
from ccam_deploy.engines.cuda.graph_replay import CudaGraphs, Part, StreamRunner
from ccam_deploy.engines.cuda.parts import ImageParts, SlotImages
from ccam_deploy.engines.cuda.slots import Slot
from ccam_deploy.errors import NotFiniteError
from ccam_deploy.kernels.cuda.buffers import Spec
from ccam_deploy.kernels.cuda.row_buffers import RunInputs, enlarged, run_specs
from ccam_deploy.methods.base import not_finite
from ccam_deploy.methods.collection_cam.sizes import padded
from ccam_deploy.methods.results import MethodResult
from ccam_deploy.methods.stopwatch import Stopwatch


@dataclass(frozen=True)
class Setup:
    """What passes are made for.

    Attributes:
        input: Channels, height and width of an image.
        batch: The most images, and the most (image, class) pairs, of one run.
        cuda_graphs: Whether repeated work is replayed as CUDA graphs.
        note: Called with a line where it cannot be.
        activation: What makes probabilities of logits.
    """

    input: tuple[int, int, int]
    batch: int
    cuda_graphs: CudaGraphs
    note: Callable[[str], None]
    activation: Activation


@dataclass(frozen=True)
class PairMaps:
    """What a pipeline gave for P pairs, on the host.

    Attributes:
        raw: [P, H, W] float32, the maps.
        saliency: [P, H, W] float32, the maps scaled to [0, 1].
        weights: [P, N] float32, or nothing.
        mic: [P, N] float32, or nothing.
        layer: The only layer that the maps follow from; empty where there is no such layer.
    """

    raw: Floats
    saliency: Floats
    weights: tuple[Floats, ...] = ()
    mic: tuple[Floats, ...] = ()
    layer: str = ""

    def result(self) -> MethodResult:
        """Make the method's result.

        Raises:
            NotFiniteError: A map is not finite.
        """
        try:
            return MethodResult.of_maps(self.raw, self.weights, self.mic, self.saliency)
        except NotFiniteError as error:
            if self.layer:
                raise not_finite(self.layer) from error
            raise


class Passes:
    """The backbone on one slot, and what methods need of its memory and its stream.

    Attributes:
        device: The slot's device.
        size: Height and width of an image.
        batch: The most images and pairs of one run; the setup's, or fewer where the graphs take
            fewer.
        sizes: The numbers of images that the backbone is run with, in ascending order.
        activation: What makes probabilities of logits.
        runner: Puts work on the stream.
        kernels: Of kernels.cuda.run_launch.RunKernels.
        features: The backbone's feature maps [batch, C, h, w], from the shallowest layer on.
    """

    def __init__(self, slot: Slot, graphs: Sequence[str], setup: Setup) -> None:
        """Allocate memory for images and activations.

        Args:
            slot: The slot.
            graphs: Names of the graphs that are run besides the backbone.
            setup: The sizes.

        Raises:
            BackendError: There is too little memory.
        """
        self.device = slot.device
        self.size = setup.input[1:]
        self.activation = setup.activation
        self._slot = slot
        self._replays = bool(setup.cuda_graphs)
        names = "backbone", *graphs
        used = [self.graph(name) for name in names]
        self.batch = min(setup.batch, *(g.limits.get("batch", setup.batch) for g in used))
        self.sizes: tuple[int, ...] = tuple(sorted({1, self.batch}))
        single = [self.graph(name, 1) for name in names]
        self.runner = StreamRunner.of_graphs(
            self.device, setup.cuda_graphs, used + single, setup.note
        )
        self._launchers: dict[tuple[str, int, bool], Callable[[], None]] = {}
        self._regions: list[Region] = []
        self._saliency: DeviceTensor | None = None
        try:
            self._allocate(used, setup)
        except BaseException:
            self.close()
            raise

    def graph(self, name: str, rows: int = 0) -> DeviceGraph:
        """One of the slot's graphs, tuned for a single row where there is one."""
        return self._slot.graphs["latency" if rows == 1 else "throughput"][name]

    def run_backbone(
        self, images: SlotImages, after: Callable[[], None] | None, clock: Stopwatch
    ) -> Floats:
        """Run the backbone on images, which stay in memory with their activations.

        Args:
            images: [B, C, H, W] float32, or the same in parts; at most `batch`.
            after: Puts more work that reads the activations on the stream, the same in every call;
                None for nothing.
            clock: Takes the seconds of each stage.

        Returns:
            Logits [B, classes] float32.
        """
        count = len(images)
        self.runner.forget()
        if isinstance(images, ImageParts):
            self.runner.mark("upload")
            images.put(self.device, self._images.tensors["images"])
        else:
            self._images.host["images"][:count] = images
            self.runner.mark("upload")
            self.device.upload(self._images.address, self._images.host["images"][:count])
        rows = padded(count, self.sizes)
        self.runner.put(("backbone", rows), "backbone", partial(self._parts, rows, after))
        self.runner.mark("download")
        self._logits.download()
        self.finish(clock)
        return self._logits.host["logits"][:count].astype(np.float32)

    def begin(self, owner: Classes, targets: Classes, rows: int = 0, shown: int = 0) -> None:
        """Put the inputs of a run on the stream.

        Args:
            owner: [P], the image of each pair; P at most `batch`.
            targets: [P], the class of each pair.
            rows: How many rows of masked forwards the run has, over all of its chunks.
            shown: How many images they show.
        """
        host = RunInputs.of(self._inputs.host)
        host.progress[:] = 0, rows, len(owner), shown
        host.pair_owner[: len(owner)] = owner
        host.targets[: len(owner)] = targets
        self.runner.mark("upload")
        self._inputs.upload()

    def launch(
        self,
        graph: str,
        rows: int,
        tensors: Callable[[], Mapping[str, DeviceTensor]],
        other: bool = False,
    ) -> None:
        """Put a run of a graph on the stream.

        Args:
            graph: Its name.
            rows: Of all its tensors.
            tensors: Makes what it reads and writes, by name, when it is first run with such rows.
            other: Whether these are other tensors than those of other runs with as many rows.
        """
        key = graph, rows, other
        if key not in self._launchers:
            of_rows = {name: tensor.rows(rows) for name, tensor in tensors().items()}
            self._launchers[key] = self.bind(self.graph(graph, rows), of_rows)
        self._launchers[key]()

    def bind(self, graph: DeviceGraph, tensors: dict[str, DeviceTensor]) -> Callable[[], None]:
        """Prepare to run a graph on some tensors, as often as work is repeated."""
        return graph.bind(tensors) if self._replays else partial(graph.launch, tensors)

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
        self._saliency = tensors.get("saliency", self._saliency)
        return results

    def give_maps(self, images: ImageParts) -> None:
        """Put copies of the last run's maps where they are to go, and wait.

        Args:
            images: Those of the run, with a class each.
        """
        if self._saliency is not None:  # a run that failed has none
            images.give(self.device, self._saliency)
            self.device.wait()

    def maps(
        self,
        tensors: Mapping[str, DeviceTensor],
        pairs: int,
        clock: Stopwatch,
        layer: str = "",
        by_mask: tuple[str, str] | None = None,
    ) -> PairMaps:
        """Bring the maps of a run to the host, and wait.

        Args:
            tensors: "raw" and "saliency", [P, H · W], and those of `by_mask`, [P, N].
            pairs: How many pairs the run had.
            clock: Takes the seconds of each stage.
            layer: See PairMaps.
            by_mask: Names of the weights and of the increases of confidence; None where the
                method has none.
        """
        results = self.download(tensors, ("raw", "saliency", *(by_mask or ())), pairs)
        self.finish(clock)
        raw, saliency = (results[name].reshape(pairs, *self.size) for name in ("raw", "saliency"))
        if by_mask is None:
            return PairMaps(raw, saliency, layer=layer)
        weights, mic = (tuple(results[name]) for name in by_mask)
        return PairMaps(raw, saliency, weights, mic, layer)

    def views(self, tensors: Mapping[str, DeviceTensor]) -> dict[str, Any]:
        """Tensors for Numba's kernels, by name."""
        return {
            name: self.device.view(tensor.address, tensor.shape, tensor.dtype)
            for name, tensor in tensors.items()
        }

    def flat_view(self, maps: DeviceTensor) -> Any:
        """Maps [n, C, h, w] for Numba's kernels, as [n, C, h · w]."""
        *leading, height, width = maps.shape
        return self.device.view(maps.address, (*leading, height * width), maps.dtype)

    def enlargement(self, layer: DeviceTensor) -> Any:
        """How a layer's maps come to the size of an image: kernels.cuda.run_launch.Enlargement."""
        from ccam_deploy.kernels.cuda.row_buffers import Lines
        from ccam_deploy.kernels.cuda.run_launch import Enlargement

        height, width = layer.shape[2:]
        lines = self.constants(enlarged((height, width), self.size).by_name())
        return Enlargement(Lines.of(lines), (self.size[0], width))

    def close(self) -> None:
        """Free the memory, once the stream's work is done, and let go of the graphs."""
        self.device.wait()
        self._launchers.clear()
        self.runner.close()
        for region in self._regions:
            region.close()
        self._regions.clear()

    def images_for(self, graph: DeviceGraph) -> DeviceTensor:
        """The images in the type that a graph takes."""
        return self._typed_images.get(_images_of(graph).dtype, self._images.tensors["images"])

    def _allocate(self, graphs: Sequence[DeviceGraph], setup: Setup) -> None:
        from ccam_deploy.kernels.cuda.run_launch import RunKernels

        outputs = {s.name: spec_of(s, self.batch) for s in self.graph("backbone").outputs}
        image = Spec((self.batch, *setup.input), np.float32)
        self._images = self.region({"images": image}, mirrored=True)
        self._images.host["images"][:] = 0  # for rows that no image is in
        self._images.upload()
        types = {
            _images_of(graph).dtype
            for graph in graphs
            if any(spec.name == "images" for spec in graph.inputs)
        }
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
        host = RunInputs.of(self._inputs.host)
        host.pair_owner[:], host.targets[:] = 0, 0  # for rows that no pair is in
        self.kernels: Any = RunKernels(RunInputs.of(self.views(self._inputs.tensors)))

    def _parts(self, rows: int, after: Callable[[], None] | None) -> list[Part]:
        """The backbone's run, and what comes before and after it."""
        launch = partial(self.launch, "backbone", rows, self._backbone_tensors)
        parts = [Part("backbone", launch, is_engine=True)]
        if self._typed_images:
            parts.insert(0, Part("upload", self._cast_images))
        if after is not None:
            parts.append(Part("statistics", after))
        return parts

    def _backbone_tensors(self) -> dict[str, DeviceTensor]:
        return self._outputs | {"images": self.images_for(self.graph("backbone"))}

    def _cast_images(self) -> None:
        source = self._images.tensors["images"]
        for target in self._typed_images.values():
            flat = [replace(t, shape=(math.prod(t.shape),)) for t in (source, target)]
            views = self.views(dict(zip(("source", "target"), flat, strict=True)))
            self.kernels.cast(views["source"], views["target"], self.device.kernel_stream)


def _images_of(graph: DeviceGraph) -> TensorSpec:
    return next(spec for spec in graph.inputs if spec.name == "images")


def spec_of(tensor: TensorSpec, rows: int) -> Spec:
    """A tensor of so many rows along its first axis, which varies."""
    return Spec((rows, *(int(size) for size in tensor.shape[1:])), tensor.dtype)
