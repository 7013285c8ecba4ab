"""Where a pipeline's tensors lie in a GPU's memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Layer
from ccam_deploy.engines.base import TensorSpec
from ccam_deploy.engines.cuda.device import Device, DeviceGraph, DeviceTensor, Region
from ccam_deploy.engines.cuda.graph_replay import CudaGraphs
from ccam_deploy.engines.cuda.loans import PinnedLoans
from ccam_deploy.engines.cuda.slots import Graphs
from ccam_deploy.kernels.cuda.buffers import (
    ArrayGroup,
    Buffers,
    MaskCounts,
    MaskValues,
    PairValues,
    T,
    Workspace,
)
from ccam_deploy.kernels.cuda.geometry import Geometry, LayerPlace
from ccam_deploy.methods.collection_cam.cpu import CollectionCAM
from ccam_deploy.methods.scores import Scoring
from ccam_deploy.row_threads import MOST_PARTS, over_rows

_LARGEST_CHUNK = 64
_LOANS = 2
"""How many runs' results users may hold without a copy: one in use, and one on its way."""

Array = tuple[tuple[int, ...], DTypeLike]
"""An array's shape and type."""


@dataclass(frozen=True)
class Setup:
    """The sizes and options that a pipeline is built for.

    Attributes:
        layers: All target layers of the bundle.
        selected: The places of the layers that are used, the final one last.
        input: Channels, height and width of an image.
        classes: The number of the classifier's classes.
        batch: The most images, and the most (image, class) pairs, of one run.
        gradient_scale: The factor of the gradient graph's input.
        options: The method, with the largest k_max of any run.
        scoring: How its score is computed of logits.
        cuda_graphs: Whether repeated work is replayed as CUDA graphs.
    """

    layers: tuple[Layer, ...]
    selected: tuple[int, ...]
    input: tuple[int, int, int]
    classes: int
    batch: int
    gradient_scale: float
    options: CollectionCAM
    scoring: Scoring = "logit"
    cuda_graphs: CudaGraphs = True


@dataclass(frozen=True)
class PairInputs(ArrayGroup[T]):
    """What a run uploads for P pairs, besides the images.

    Attributes:
        owner: [P] int32, the image of each pair.
        codes: [P] int32, a class, or -1 - r for the class of rank r.
        k_range: [2] int32, k_min and k_max.
    """

    owner: T
    codes: T
    k_range: T


@dataclass(frozen=True)
class HostArrays:
    """Pinned host memory that mirrors what is uploaded, and what is downloaded halfway.

    Attributes:
        images: [batch, C, H, W] float32.
        pairs: The other inputs.
        counts: How many masks there are.
    """

    images: Floats
    pairs: PairInputs[NDArray[Any]]
    counts: MaskCounts[NDArray[Any]]


@dataclass(frozen=True)
class HostResults:
    """Pinned host memory for the results of a run.

    Attributes:
        memory: All of it, in bytes.
        lent: Whether users may keep it: no other run writes there while they do.
        logits: [batch, classes] float32 or float16.
        mask_values: Of each mask.
        pair_values: Of each pair.
    """

    memory: NDArray[np.uint8]
    lent: bool
    logits: NDArray[Any]
    mask_values: MaskValues[NDArray[Any]]
    pair_values: PairValues[NDArray[Any]]


@dataclass(frozen=True)
class GraphTensors:
    """What the graphs read and write in device memory.

    Attributes:
        images: [batch, C, H, W] float32.
        typed_images: The same in the other types that graphs take.
        features: The backbone's feature maps, by the graph's names.
        gradients: The gradient graph's outputs, by the graph's names.
        residuals: The backbone's other outputs, which the gradient graph reads, by name.
        output_gradient: [batch, classes], the gradient graph's input.
        logits: [batch, classes], the backbone's.
        mask_logits: [masks, classes], the classifier's.
    """

    images: DeviceTensor
    typed_images: Mapping[np.dtype[Any], DeviceTensor]
    features: Region
    gradients: Region
    residuals: Mapping[str, DeviceTensor]
    output_gradient: DeviceTensor
    logits: DeviceTensor
    mask_logits: DeviceTensor

    def images_for(self, graph: DeviceGraph) -> DeviceTensor:
        """The images in the type that a graph takes."""
        dtype = next((spec.dtype for spec in graph.inputs if spec.name == "images"), np.float32)
        return self.images if dtype == np.float32 else self.typed_images[np.dtype(dtype)]

    def bindings(self, graph: DeviceGraph) -> dict[str, DeviceTensor]:
        """The tensors of the backbone or the gradient graph, by the graph's own names."""
        tensors = {
            **self.features.tensors,
            **self.gradients.tensors,
            **self.residuals,
            "images": self.images_for(graph),
            "output_gradient": self.output_gradient,
            "logits": self.logits,
        }
        return {spec.name: tensors[spec.name] for spec in (*graph.inputs, *graph.outputs)}


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor of which the classifier takes some rows at a time.

    Attributes:
        name: The classifier's name for it.
        whole: A row for every mask.
        staged: The rows of one chunk. All chunks but the first are copied there, so that an engine
            meets few addresses.
        written: Whether the classifier writes it.
    """

    name: str
    whole: DeviceTensor
    staged: DeviceTensor
    written: bool


class DeviceMemory:
    """The tensors of the graphs and the kernels, for one setup on one device.

    Attributes:
        batch: The most images and pairs; the setup's, or fewer where the graphs take fewer.
        chunk: The most masks that the classifier takes at a time.
        geometry: Where each layer lies.
        host: Mirrors of the inputs and the counts.
        pairs: The inputs for each pair.
        graphs: What the graphs read and write.
        buffers: What the kernels read and write.
        chunked: What the classifier takes a chunk of masks at a time.
    """

    def __init__(self, device: Device, graphs: Graphs, setup: Setup) -> None:
        """Allocate the memory.

        Args:
            device: Whose memory to take.
            graphs: The backbone, the gradient graph and the classifier, by name.
            setup: The sizes and options.

        Raises:
            BackendError: There is too little memory.
            OptionError: The kernels do not take such sizes.
        """
        self._device, self._graphs, self._setup = device, graphs, setup
        self.batch = min(
            setup.batch, *(graph.limits.get("batch", setup.batch) for graph in graphs.values())
        )
        self._threads = ThreadPoolExecutor(MOST_PARTS - 1, "ccam-deploy-copies")
        self._regions: list[Region] = []
        self._gathered: dict[str, DeviceTensor] = {}
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the memory, once the stream's work is done."""
        self._threads.shutdown()
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

    def stage_images(self, images: Floats) -> None:
        """Copy images to where `upload_images` takes them from."""
        staged = self.host.images[: len(images)]
        over_rows(self._threads, lambda rows: np.copyto(staged[rows], images[rows]), images)

    def upload_images(self, count: int) -> None:
        """Put a copy of the first images to the device on the stream."""
        self._device.upload(self._images.address, self.host.images[:count])

    def upload_pairs(self) -> None:
        """Put a copy of the other inputs to the device on the stream."""
        self._pair_inputs.upload()

    def download_counts(self) -> None:
        """Put a copy of the counts of masks to the host on the stream."""
        self._counts.download()

    def download_results(self, pairs: int, masks: int) -> HostResults:
        """Put copies of the results to the host on the stream; a single copy of a full batch.

        Args:
            pairs: How many are in use.
            masks: How many are in use.

        Returns:
            Where they will be. Memory that is not lent is written to again by the next run.
        """
        memory = self._loans.take()
        host = self._own_results if memory is None else self._results_in(memory, lent=True)
        if pairs == self.batch:
            self._results.download(host.memory)
            return host
        tensors = self.buffers.by_name()
        self._device.download(host.logits[:pairs], self.graphs.logits.address)
        for name, values in host.mask_values.by_name().items():
            self._device.download(values[:masks], tensors[name].address)
        for name, values in host.pair_values.by_name().items():
            self._device.download(values[:pairs], tensors[name].address)
        return host

    def view(self, tensor: DeviceTensor) -> Any:
        """A tensor for Numba's kernels."""
        return self._device.view(tensor.address, tensor.shape, tensor.dtype)

    def flat_view(self, tensor: DeviceTensor) -> Any:
        """The same with its elements in one row."""
        return self.view(replace(tensor, shape=(math.prod(tensor.shape),)))

    def layers_view(self, region: Region) -> Any:
        """All layers' features or gradients as one row of elements, for Numba's kernels."""
        dtype = next(iter(region.tensors.values())).dtype
        return self.view(DeviceTensor(region.address, (region.size // dtype.itemsize,), dtype))

    def _allocate(self) -> None:
        setup, batch = self._setup, self.batch
        backbone, gradient, classifier = (
            self._graphs[name] for name in ("backbone", "gradient", "classifier")
        )
        outputs = _arrays(backbone.outputs, batch)
        feature_arrays = {name: outputs.pop(name) for name in list(outputs) if "feature_" in name}
        logits = outputs.pop("logits")
        image = (batch, *setup.input)
        types = {graph.inputs[0].dtype for graph in (backbone, classifier)} - {np.dtype(np.float32)}
        self._images = self._region({"images": (image, np.float32)}, mirrored=True)
        inputs = PairInputs[Array](
            owner=((batch,), np.int32), codes=((batch,), np.int32), k_range=((2,), np.int32)
        )
        self._pair_inputs = self._region(inputs.by_name(), mirrored=True)
        features = self._region(feature_arrays)
        gradients = self._region(_arrays(gradient.outputs, batch))
        residuals = self._region(outputs).tensors
        typed_images = self._region({str(dtype): (image, dtype) for dtype in types}).tensors
        one_hot = [spec for spec in gradient.inputs if spec.name == "output_gradient"]
        output_gradient = self._region(_arrays(one_hot, batch)).tensors["output_gradient"]

        self.geometry = self._geometry(classifier, features, gradients)
        arrays = {
            name: (spec.shape, spec.dtype) for name, spec in self.geometry.specs().by_name().items()
        }
        self._counts = self._region(MaskCounts.of(arrays).by_name(), mirrored=True)
        values = MaskValues.of(arrays).by_name() | PairValues.of(arrays).by_name()
        self._results = self._region({"logits": logits, **values})
        own = self._device.pinned((self._results.size,), np.uint8)
        self._own_results = self._results_in(own, lent=False)
        self._loans = PinnedLoans(self._device, self._results.size, _LOANS)
        workspace = self._region(Workspace.of(arrays).by_name())
        mask_logits = self._region(_arrays(classifier.outputs, self.geometry.masks))

        self.host = HostArrays(
            images=self._images.host["images"],
            pairs=PairInputs.of(self._pair_inputs.host),
            counts=MaskCounts.of(self._counts.host),
        )
        self.pairs = PairInputs.of(self._pair_inputs.tensors)
        self.buffers = Buffers.of(self._counts.tensors | self._results.tensors | workspace.tensors)
        self.graphs = GraphTensors(
            images=self._images.tensors["images"],
            typed_images={tensor.dtype: tensor for tensor in typed_images.values()},
            features=features,
            gradients=gradients,
            residuals=residuals,
            output_gradient=output_gradient,
            logits=self._results.tensors["logits"],
            mask_logits=mask_logits.tensors["logits"],
        )
        self.chunk = min(classifier.limits.get("masks", _LARGEST_CHUNK), self.geometry.masks)
        self.chunked = self._chunked()

    def _chunked(self) -> tuple[ChunkedTensor, ...]:
        """The classifier's tensors but the images, with room for a chunk of each."""
        tensors = {
            "masks": self.buffers.masks,
            "owner": self.buffers.owner_of_mask,
            "logits": self.graphs.mask_logits,
        }
        staged = self._region(
            {
                name: ((self.chunk, *tensor.shape[1:]), tensor.dtype)
                for name, tensor in tensors.items()
            }
        ).tensors
        # The rows that a chunk is padded with must name an image.
        first = np.zeros(self.chunk, tensors["owner"].dtype)
        self._device.upload(staged["owner"].address, first)
        self._device.wait()
        return tuple(
            ChunkedTensor(name, tensor, staged[name], written=name == "logits")
            for name, tensor in tensors.items()
        )

    def _geometry(self, classifier: DeviceGraph, features: Region, gradients: Region) -> Geometry:
        setup, options = self._setup, self._setup.options
        feature_maps = list(features.tensors.values())
        feature_gradients = list(gradients.tensors.values())
        places = []
        for index in setup.selected:
            layer = setup.layers[index]
            feature, gradient = feature_maps[index], feature_gradients[index]
            places.append(
                LayerPlace(
                    layer.channels,
                    layer.height,
                    layer.width,
                    (feature.address - features.address) // feature.dtype.itemsize,
                    (gradient.address - gradients.address) // gradient.dtype.itemsize,
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

    def _results_in(self, memory: NDArray[np.uint8], lent: bool) -> HostResults:
        arrays = self._results.arrays(memory)
        return HostResults(
            memory, lent, arrays["logits"], MaskValues.of(arrays), PairValues.of(arrays)
        )

    def _region(self, arrays: Mapping[str, Array], mirrored: bool = False) -> Region:
        region = Region(self._device, arrays, mirrored)
        self._regions.append(region)
        return region


def _arrays(
    specs: Sequence[TensorSpec], rows: int
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shapes and types of a graph's tensors, whose first axis varies."""
    return {
        spec.name: ((rows, *(int(size) for size in spec.shape[1:])), spec.dtype) for spec in specs
    }
