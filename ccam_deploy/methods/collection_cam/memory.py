"""Where a pipeline's tensors lie in a GPU's memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ccam_deploy.bundle.manifest import Layer
from ccam_deploy.engines.base import TensorSpec
from ccam_deploy.engines.cuda.device import ALIGNMENT, Device, DeviceGraph, DeviceTensor, Region
from ccam_deploy.engines.cuda.slots import Graphs
from ccam_deploy.kernels.cuda.geometry import Geometry, LayerPlace
from ccam_deploy.methods.collection_cam.cpu import CollectionCAM

PER_MASK = ("flat", "scores", "weights")
PER_PAIR = ("targets", "labels", "quality", "sums", "raw", "saliency")
"""The kernels' results that come to the host, by how many rows of them are in use."""
_COUNTED = ("counts", "starts")
_LARGEST_CHUNK = 64

Arrays = Mapping[str, tuple[tuple[int, ...], DTypeLike]]


@dataclass(frozen=True)
class Setup:
    """What a pipeline is made for.

    Attributes:
        layers: All target layers of the bundle.
        selected: The places of the layers that are used, the final one last.
        input: Channels, height and width of an image.
        classes: The number of the classifier's classes.
        batch: The most images, and the most (image, class) pairs, of one run.
        gradient_scale: The factor of the gradient graph's input.
        options: The method, with the largest k_max of any run.
        cuda_graphs: Whether work that comes again is replayed.
    """

    layers: tuple[Layer, ...]
    selected: tuple[int, ...]
    input: tuple[int, int, int]
    classes: int
    batch: int
    gradient_scale: float
    options: CollectionCAM
    cuda_graphs: bool = True


class DeviceMemory:
    """The tensors of the graphs and the kernels, for one setup on one device.

    tensors: by the names that the graphs and the kernels know them by; the images also in the
        types that graphs take, see `images_for`.   typed_images: those names.
    images, pairs: what is uploaded.   counted, results: what is downloaded.
    batch: the most images and pairs; the setup's, or fewer where the graphs take fewer.
    chunk: the most masks that the classifier takes at a time.
    aligned: room for chunks that start where an engine cannot read or write, by tensor.
    geometry: where each layer lies.
    """

    def __init__(self, device: Device, graphs: Graphs, setup: Setup) -> None:
        self._device, self._graphs, self._setup = device, graphs, setup
        self.batch = min(
            setup.batch, *(graph.limits.get("batch", setup.batch) for graph in graphs.values())
        )
        self.tensors: dict[str, DeviceTensor] = {}
        self._regions: list[Region] = []
        self._gathered: dict[str, DeviceTensor] = {}
        try:
            self._place_graphs()
            self._place_kernels()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the memory, once the stream's work is done."""
        self._device.wait()
        for region in self._regions:
            region.close()

    def gathered(self) -> dict[str, DeviceTensor]:
        """Room for what the gradient graph needs of the backbone, a row for each pair."""
        if not self._gathered:
            specs = self._graphs["gradient"].inputs
            residuals = [spec for spec in specs if spec.name != "output_gradient"]
            self._gathered = self._region(_arrays(residuals, self.batch)).tensors
        return self._gathered

    def view(self, tensor: DeviceTensor) -> Any:
        """A tensor for Numba's kernels."""
        return self._device.view(tensor.address, tensor.shape, tensor.dtype)

    def named(self, name: str) -> Any:
        """A tensor by its name, for Numba's kernels."""
        return self.view(self.tensors[name])

    def flat(self, name: str) -> Any:
        """The same with its elements in one row."""
        tensor = self.tensors[name]
        return self.view(replace(tensor, shape=(math.prod(tensor.shape),)))

    def layers(self, region: Region) -> Any:
        """All layers' features or gradients as one row of elements, for Numba's kernels."""
        dtype = next(iter(region.tensors.values())).dtype
        return self.view(DeviceTensor(region.address, (region.size // dtype.itemsize,), dtype))

    def _place_graphs(self) -> None:
        setup, batch = self._setup, self.batch
        backbone, gradient, classifier = (
            self._graphs[name] for name in ("backbone", "gradient", "classifier")
        )
        outputs = _arrays(backbone.outputs, batch)
        features = {name: outputs.pop(name) for name in list(outputs) if "feature_" in name}
        self._logits = outputs.pop("logits")
        image = (batch, *setup.input)
        types = {graph.inputs[0].dtype for graph in (backbone, classifier)} - {np.dtype(np.float32)}
        self.typed_images = [f"images.{dtype}" for dtype in types]
        self.images = self._named({"images": (image, np.float32)}, mirrored=True)
        self.pairs = self._named(
            {
                "owner": ((batch,), np.int32),
                "wanted": ((batch,), np.int32),
                "k_range": ((2,), np.int32),
            },
            mirrored=True,
        )
        self.features = self._named(features)
        self.gradients = self._named(_arrays(gradient.outputs, batch))
        self._named(outputs)
        self._named({f"images.{dtype}": (image, dtype) for dtype in types})
        one_hot = [spec for spec in gradient.inputs if spec.name == "output_gradient"]
        self._named(_arrays(one_hot, batch))
        self.geometry = self._geometry(classifier)

    def _place_kernels(self) -> None:
        classifier, masks = self._graphs["classifier"], self.geometry.masks
        specs = self.geometry.specs()
        arrays = {name: (spec.shape, spec.dtype) for name, spec in specs.items()}
        self.counted = self._named({name: arrays.pop(name) for name in _COUNTED}, mirrored=True)
        results = {name: arrays.pop(name) for name in (*PER_MASK, *PER_PAIR)}
        self.results = self._named({"logits": self._logits, **results}, mirrored=True)
        self._named(arrays)
        logits = _arrays(classifier.outputs, masks)["logits"]
        self._named({"mask_logits": logits})
        self.chunk = min(classifier.limits.get("masks", _LARGEST_CHUNK), masks)
        chunked = {name: self.tensors[name] for name in ("masks", "owner_of_mask", "mask_logits")}
        self.aligned = self._region(
            {
                name: ((self.chunk, *tensor.shape[1:]), tensor.dtype)
                for name, tensor in chunked.items()
                if rows_of(tensor, 0, self.chunk).bytes % ALIGNMENT
            }
        ).tensors

    def _geometry(self, classifier: DeviceGraph) -> Geometry:
        setup, options = self._setup, self._setup.options
        features, gradients = list(self.features.tensors), list(self.gradients.tensors)
        places = []
        for index in setup.selected:
            layer = setup.layers[index]
            feature, slope = self.tensors[features[index]], self.tensors[gradients[index]]
            places.append(
                LayerPlace(
                    layer.channels,
                    layer.height,
                    layer.width,
                    (feature.address - self.features.address) // feature.dtype.itemsize,
                    (slope.address - self.gradients.address) // slope.dtype.itemsize,
                )
            )
        masks = next(spec for spec in classifier.inputs if spec.name == "masks")
        return Geometry(
            tuple(places),
            setup.input[1:],
            self.batch,
            options.k_max,
            options.theta,
            masks.dtype,
        )

    def _region(self, arrays: Arrays, mirrored: bool = False) -> Region:
        region = Region(self._device, arrays, mirrored)
        self._regions.append(region)
        return region

    def _named(self, arrays: Arrays, mirrored: bool = False) -> Region:
        """A region whose tensors are known by their names."""
        region = self._region(arrays, mirrored)
        assert not self.tensors.keys() & arrays.keys()
        self.tensors |= region.tensors
        return region


def _arrays(
    specs: Sequence[TensorSpec], rows: int
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shapes and types of a graph's tensors; the first axis is the one that varies."""
    return {
        spec.name: ((rows, *(int(size) for size in spec.shape[1:])), spec.dtype) for spec in specs
    }


def rows_of(tensor: DeviceTensor, start: int, count: int) -> DeviceTensor:
    """Some rows of a tensor."""
    row = tensor.bytes // tensor.shape[0]
    return DeviceTensor(tensor.address + start * row, (count, *tensor.shape[1:]), tensor.dtype)


def words_of(tensor: DeviceTensor) -> DeviceTensor:
    """The same memory, each row in the widest words that it is a whole number of."""
    row = tensor.bytes // tensor.shape[0]
    width = next(size for size in (8, 4, 2, 1) if row % size == 0)
    return DeviceTensor(tensor.address, (tensor.shape[0], row // width), np.dtype(f"u{width}"))


def images_for(graph: DeviceGraph) -> str:
    """The name of the images in the type that a graph takes."""
    dtype = next((spec.dtype for spec in graph.inputs if spec.name == "images"), np.float32)
    return "images" if dtype == np.float32 else f"images.{dtype}"
