"""Collection-CAM with everything between upload and download on a GPU.

A batch takes two turns on the stream. The first runs backbone, gradient and the kernels up to the
masks; the host then reads how many masks there are, and only for that it waits. The second sends
the masks through the classifier and adds them up; all results come to the host in one copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ccam_deploy.bundle import Layer
from ccam_deploy.engines.base import TensorSpec
from ccam_deploy.engines.device import ALIGNMENT, Device, DeviceGraph, DeviceTensor, Region
from ccam_deploy.engines.slots import Graphs
from ccam_deploy.engines.turns import Turns
from ccam_deploy.kernels.cuda.geometry import Geometry, LayerPlace
from ccam_deploy.methods.base import Floats, Stopwatch
from ccam_deploy.methods.collection_cam import CollectionCAMOptions

_LARGEST_CHUNK = 64
_PER_MASK = ("flat", "scores", "weights")
_PER_PAIR = ("targets", "labels", "quality", "sums", "raw", "saliency")
_COUNTED = ("counts", "starts")
_UNTIL_64, _FROM_64 = 2, 16
"""Numbers of masks are rounded up to multiples of these, so that fewer graphs are captured."""

Arrays = Mapping[str, tuple[tuple[int, ...], DTypeLike]]
HostArrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Setup:
    """What a pipeline is made for.

    layers: all target layers of the bundle.   chosen: the places of those that are used.
    input: channels, height, width.   classes: of the classifier.   batch: the most images, and
    the most (image, class) pairs, of one run.   gradient_scale: what the gradient graph's input
    is multiplied by.   cuda_graphs: whether turns are replayed.
    """

    layers: tuple[Layer, ...]
    chosen: tuple[int, ...]
    input: tuple[int, int, int]
    classes: int
    batch: int
    gradient_scale: float
    options: CollectionCAMOptions
    cuda_graphs: bool = True


class Pipeline:
    """Buffers, kernels and captured turns for one setup on one slot.

    batch: the most images and pairs of one run; the setup's, or fewer where the graphs take fewer.
    geometry: where each layer lies in the results.
    note: called with a line where CUDA graphs cannot be had.
    """

    def __init__(
        self, device: Device, graphs: Graphs, setup: Setup, note: Callable[[str], None]
    ) -> None:
        self._device, self._graphs, self._setup = device, graphs, setup
        self.batch = min(
            setup.batch, *(graph.limits.get("batch", setup.batch) for graph in graphs.values())
        )
        self._turns = Turns(
            device,
            setup.cuda_graphs,
            lambda: all(graph.capturable for graph in graphs.values()),
            note,
        )
        self._regions: list[Region] = []
        self._tensors: dict[str, DeviceTensor] = {}
        self._gathered: dict[str, DeviceTensor] = {}
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def run(
        self, images: Floats, owner: NDArray[np.int64], wanted: NDArray[np.int64], clock: Stopwatch
    ) -> tuple[Floats, list[HostArrays]]:
        """Explain P pairs of B images, B at most `batch`.

        images: [B, C, H, W] float32.   owner: [P], in ascending order.   wanted: [P], a class, or
        -1 - r for the class of rank r.
        Returns logits [B, classes] float32, and for every `batch` pairs the results of the
        kernels by name; see launch.Buffers. A layer whose statistics are not finite has a count
        of 0; the pairs' other results mean nothing then.
        """
        self._turns.forget()
        self._images.host["images"][: len(images)] = images
        results = []
        for start in range(0, len(owner), self.batch):
            part = slice(start, start + self.batch)
            pairs = len(owner[part])
            self._pairs.host["owner"][:pairs] = owner[part]
            self._pairs.host["wanted"][:pairs] = wanted[part]
            results.append(self._run_pairs(len(images), pairs, start == 0))
            clock.add(self._turns.stages())
        return self._results.host["logits"][: len(images)].astype(np.float32), results

    def passes(self, images: int, masks: int) -> None:
        """Run backbone, gradient and classifier alone on what a run left in memory, and wait.

        images, masks: as many as that run had, with one class for each image.
        """
        self._turns.forget()
        work = partial(self._passes, images, masks)
        self._turns.run(("passes", images, masks), "passes", work)
        self._turns.mark("")
        self._device.wait()

    def close(self) -> None:
        """Free the buffers."""
        self._device.wait()
        for region in self._regions:
            region.close()

    def _passes(self, images: int, masks: int) -> None:
        self._launch("backbone", images)
        self._launch("gradient", images)
        for start in range(0, masks, self._chunk):
            self._classify(images, start, min(self._chunk, masks - start))

    def _run_pairs(self, images: int, pairs: int, first: bool) -> HostArrays:
        turns = self._turns
        owner = self._pairs.host["owner"][:pairs]
        direct = np.array_equal(owner, np.arange(images))
        if not direct and not self._gathered:
            self._gathered = self._region(self._residuals()).tensors
        work = partial(self._explain, images, pairs, direct, first)
        turns.run(("explain", images, pairs, direct, first), "explain", work)
        turns.mark("")
        self._device.wait()
        masks = int(self._counted.host["starts"][pairs * len(self._setup.chosen)])
        # Where no layer has finite statistics there are none; an engine runs on one at least.
        rows = min(max(_rounded(masks), 1), self.geometry.masks)
        work = partial(self._weigh, images, pairs, rows)
        turns.run(("weigh", images, pairs, rows), "weigh", work)
        turns.mark("")
        self._device.wait()
        host = self._results.host
        return {
            **{name: host[name][:masks].copy() for name in _PER_MASK},
            **{name: host[name][:pairs].copy() for name in _PER_PAIR},
            "counts": self._counted.host["counts"][:pairs].copy(),
        }

    def _explain(self, images: int, pairs: int, direct: bool, first: bool) -> None:
        """Put the work up to the masks on the stream.

        direct: pairs and images are the same, in order.   first: the backbone has not run yet.
        """
        turns, kernels, stream = self._turns, self._kernels, self._device.kernel_stream
        scale, options = self._setup.gradient_scale, self._setup.options
        inputs = self._inputs(pairs)
        turns.mark("upload")
        self._pairs.upload()
        if first:
            self._device.upload(self._images.address, self._images.host["images"][:images])
            turns.mark("backbone")
            for name in self._cast:
                kernels.cast(self._flat("images"), self._flat(name), stream)
            self._launch("backbone", images)
        turns.mark("gradient")
        probability = options.score == "probability"
        kernels.output_gradient(inputs, self._head, scale, probability, stream)
        self._launch("gradient", pairs, {} if direct else self._gather(images, pairs))
        turns.mark("statistics")
        kernels.statistics(inputs, scale, stream)
        turns.mark("partition")
        kernels.partition(inputs, options.standardise, stream)
        turns.mark("masks")
        kernels.sums(inputs, stream)
        kernels.masks(inputs, stream)
        self._counted.download()

    def _weigh(self, images: int, pairs: int, rows: int) -> None:
        """Put the classifier on `rows` masks, the weighted sum and the download on the stream."""
        turns, stream, inputs = self._turns, self._device.kernel_stream, self._inputs(pairs)
        turns.mark("classifier")
        for start in range(0, rows, self._chunk):
            self._classify(images, start, min(self._chunk, rows - start))
        turns.mark("combine")
        probability = self._setup.options.score == "probability"
        logits = self._view(_rows(self._tensors["mask_logits"], 0, rows))
        self._kernels.scores(inputs, logits, probability, stream)
        self._kernels.combine(inputs, stream)
        turns.mark("download")
        self._download(pairs, rows)

    def _launch(
        self, name: str, rows: int, instead: Mapping[str, DeviceTensor] | None = None
    ) -> None:
        """Put a graph on the stream. instead: tensors to take in place of those of their name."""
        graph = self._graphs[name]
        tensors = {**self._tensors, "images": self._tensors[_images_for(graph)], **(instead or {})}
        names = [spec.name for spec in (*graph.inputs, *graph.outputs)]
        graph.launch({name: _rows(tensors[name], 0, rows) for name in names})

    def _gather(self, images: int, pairs: int) -> dict[str, DeviceTensor]:
        """Put copies of the residuals on the stream, a row for each pair instead of each image."""
        for name, target in self._gathered.items():
            source = self._view(_words(_rows(self._tensors[name], 0, images)))
            copied = self._view(_words(_rows(target, 0, pairs)))
            self._kernels.gather(self._inputs(pairs), source, copied, self._device.kernel_stream)
        return self._gathered

    def _download(self, pairs: int, rows: int) -> None:
        """Put the results' way to the host on the stream: in one copy where the batch is full."""
        if pairs == self.batch:
            self._results.download()
            return
        for name, tensor in self._results.tensors.items():
            used = self._results.host[name][: rows if name in _PER_MASK else pairs]
            self._device.download(used, tensor.address)

    def _classify(self, images: int, start: int, rows: int) -> None:
        """Run the classifier on some masks; on aligned copies where they lie askew."""
        graph = self._graphs["classifier"]
        tensors = {"images": _rows(self._tensors[_images_for(graph)], 0, images)}
        after = []
        for name, own in (
            ("masks", "masks"),
            ("owner", "owner_of_mask"),
            ("logits", "mask_logits"),
        ):
            part = _rows(self._tensors[own], start, rows)
            if part.address % ALIGNMENT:
                aligned = replace(part, address=self._aligned[own].address)
                if name == "logits":
                    after.append((part, aligned))
                else:
                    self._device.copy(aligned.address, part.address, part.bytes)
                part = aligned
            tensors[name] = part
        height, width = self._setup.input[1:]
        tensors["masks"] = replace(tensors["masks"], shape=(rows, 1, height, width))
        graph.launch(tensors)
        for part, aligned in after:
            self._device.copy(part.address, aligned.address, part.bytes)

    def _allocate(self) -> None:
        """Lay out all memory, and make the kernels."""
        from ccam_deploy.kernels.cuda.launch import Buffers, CollectionKernels, Head

        setup, batch = self._setup, self.batch
        backbone, gradient, classifier = (
            self._graphs[name] for name in ("backbone", "gradient", "classifier")
        )
        logits = next(spec for spec in backbone.outputs if spec.name == "logits")
        outputs = _arrays(backbone.outputs, batch)
        features = {name: outputs.pop(name) for name in list(outputs) if "feature_" in name}
        del outputs["logits"]
        gradients = _arrays(gradient.outputs, batch)
        types = {graph.inputs[0].dtype for graph in (backbone, classifier)} - {np.dtype(np.float32)}
        self._cast = [f"images.{dtype}" for dtype in types]
        image = (batch, *setup.input)
        self._images = self._named({"images": (image, np.float32)}, mirrored=True)
        self._pairs = self._named(
            {"owner": ((batch,), np.int32), "wanted": ((batch,), np.int32)}, mirrored=True
        )
        self._features, self._gradients = self._named(features), self._named(gradients)
        self._named(outputs)
        self._named({f"images.{dtype}": (image, dtype) for dtype in types})
        one_hot = next(spec for spec in gradient.inputs if spec.name == "output_gradient")
        self._named({"output_gradient": ((batch, setup.classes), one_hot.dtype)})
        self.geometry = self._lay_out(list(features), list(gradients), classifier)
        specs = self.geometry.specs()
        arrays = {name: (spec.shape, spec.dtype) for name, spec in specs.items()}
        self._counted = self._named({name: arrays.pop(name) for name in _COUNTED}, mirrored=True)
        results = {name: arrays.pop(name) for name in (*_PER_MASK, *_PER_PAIR)}
        own = {"logits": ((batch, setup.classes), logits.dtype)}
        self._results = self._named(own | results, mirrored=True)
        per_mask = {"mask_logits": ((self.geometry.masks, setup.classes), logits.dtype)}
        self._named(arrays | per_mask)
        self._chunk = min(classifier.limits.get("masks", _LARGEST_CHUNK), self.geometry.masks)
        chunked = ("masks", "owner_of_mask", "mask_logits")
        tensors = [self._tensors[name] for name in chunked]
        self._aligned = self._region(
            {
                name: ((self._chunk, *tensor.shape[1:]), tensor.dtype)
                for name, tensor in zip(chunked, tensors, strict=True)
                if _rows(tensor, 0, self._chunk).bytes % ALIGNMENT
            }
        ).tensors
        buffers = Buffers.allocate(
            self.geometry,
            lambda name, spec: self._view(self._tensors[name]),
            self._device.kernel_stream,
        )
        self._kernels = CollectionKernels(self.geometry, buffers)
        head = (self._tensors[name] for name in ("logits", "wanted", "output_gradient"))
        self._head = Head(*map(self._view, head))

    def _lay_out(
        self, features: list[str], gradients: list[str], classifier: DeviceGraph
    ) -> Geometry:
        places = []
        for index in self._setup.chosen:
            layer = self._setup.layers[index]
            feature, slope = self._tensors[features[index]], self._tensors[gradients[index]]
            places.append(
                LayerPlace(
                    layer.channels,
                    layer.height,
                    layer.width,
                    (feature.address - self._features.address) // feature.dtype.itemsize,
                    (slope.address - self._gradients.address) // slope.dtype.itemsize,
                )
            )
        options = self._setup.options
        masks = next(spec for spec in classifier.inputs if spec.name == "masks")
        size = self._setup.input[1], self._setup.input[2]
        return Geometry(
            tuple(places),
            size,
            self.batch,
            options.k_min,
            options.k_max,
            options.theta,
            masks.dtype,
        )

    def _residuals(self) -> Arrays:
        """What the gradient graph needs of the backbone."""
        specs = self._graphs["gradient"].inputs
        return _arrays([spec for spec in specs if spec.name != "output_gradient"], self.batch)

    def _region(self, arrays: Arrays, mirrored: bool = False) -> Region:
        region = Region(self._device, arrays, mirrored)
        self._regions.append(region)
        return region

    def _named(self, arrays: Arrays, mirrored: bool = False) -> Region:
        """A region whose tensors are known by their names."""
        region = self._region(arrays, mirrored)
        assert not self._tensors.keys() & arrays.keys()
        self._tensors |= region.tensors
        return region

    def _inputs(self, pairs: int) -> Any:
        from ccam_deploy.kernels.cuda.launch import Inputs

        owner = _rows(self._tensors["owner"], 0, pairs)
        return Inputs(self._row(self._features), self._row(self._gradients), self._view(owner))

    def _row(self, region: Region) -> Any:
        """A region, all of one type, as one row of elements."""
        dtype = next(iter(region.tensors.values())).dtype
        shape = (region.size // dtype.itemsize,)
        return self._view(DeviceTensor(region.address, shape, dtype))

    def _flat(self, name: str) -> Any:
        tensor = self._tensors[name]
        return self._view(replace(tensor, shape=(math.prod(tensor.shape),)))

    def _view(self, tensor: DeviceTensor) -> Any:
        return self._device.view(tensor.address, tensor.shape, tensor.dtype)


def _arrays(
    specs: Sequence[TensorSpec], rows: int
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shapes and types of a graph's tensors; the first axis is the one that varies."""
    return {
        spec.name: ((rows, *(int(size) for size in spec.shape[1:])), spec.dtype) for spec in specs
    }


def _rows(tensor: DeviceTensor, start: int, count: int) -> DeviceTensor:
    """Some rows of a tensor."""
    row = tensor.bytes // tensor.shape[0]
    return DeviceTensor(tensor.address + start * row, (count, *tensor.shape[1:]), tensor.dtype)


def _words(tensor: DeviceTensor) -> DeviceTensor:
    """The same memory, each row in the widest words that it is a whole number of."""
    row = tensor.bytes // tensor.shape[0]
    width = next(size for size in (8, 4, 2, 1) if row % size == 0)
    return DeviceTensor(tensor.address, (tensor.shape[0], row // width), np.dtype(f"u{width}"))


def _rounded(masks: int) -> int:
    step = _UNTIL_64 if masks <= 64 else _FROM_64
    return -(-masks // step) * step


def _images_for(graph: DeviceGraph) -> str:
    """The name of the images in the type that a graph takes."""
    dtype = next((spec.dtype for spec in graph.inputs if spec.name == "images"), np.float32)
    return "images" if dtype == np.float32 else f"images.{dtype}"
