"""Collection-CAM with everything between upload and download on a GPU.

A batch takes two turns on the stream. The first runs backbone, gradient and the kernels up to the
masks; the host then reads how many masks there are, and only for that it waits. The second sends
the masks through the classifier and adds them up; all results come to the host in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.engines.cuda.device import ALIGNMENT, Device, DeviceTensor
from ccam_deploy.engines.cuda.graph_replay import StreamRunner
from ccam_deploy.engines.cuda.slots import Graphs
from ccam_deploy.methods.base import Stopwatch
from ccam_deploy.methods.collection_cam.memory import (
    PER_MASK,
    PER_PAIR,
    DeviceMemory,
    Setup,
    images_for,
    rows_of,
    words_of,
)

_UNTIL_64, _FROM_64 = 2, 16
"""Numbers of masks are rounded up to multiples of these, so that fewer graphs are captured."""


@dataclass(frozen=True)
class PairResults:
    """What the kernels gave for P pairs with n masks in all, on the host.

    Attributes:
        targets: [P] int64, classes.
        labels: [P, C] int32, the collection of each channel of all layers, from 0 in each layer.
        counts: [P, L] int32, the collections of each layer; 0 where a statistic is not finite.
        quality: [P, L, k] float32, the mean dispersion-separation ratio of each number of
            collections from k_min on.
        sums: [P, s] float32, the collection sums; see Geometry.split_sums.
        raw: [P, H · W] float32, the saliency before it is scaled.
        saliency: [P, H · W] float32, in [0, 1].
        flat: [n] uint8, 1 where a mask is all zeros.
        scores: [n] float32, of the masked images.
        weights: [n] float32, the softmax of the scores of each pair.
    """

    targets: NDArray[np.int64]
    labels: NDArray[np.int32]
    counts: NDArray[np.int32]
    quality: Floats
    sums: Floats
    raw: Floats
    saliency: Floats
    flat: NDArray[np.uint8]
    scores: Floats
    weights: Floats


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
        self._runner = StreamRunner(
            device,
            setup.cuda_graphs,
            lambda: all(graph.capturable for graph in graphs.values()),
            note,
        )
        self._memory = DeviceMemory(device, graphs, setup)
        self.batch, self.geometry = self._memory.batch, self._memory.geometry
        self._kernels, self._head = self._prepare_kernels()

    def run(
        self,
        images: Floats,
        owner: NDArray[np.int64],
        wanted: NDArray[np.int64],
        k_range: tuple[int, int],
        clock: Stopwatch,
    ) -> tuple[Floats, list[PairResults]]:
        """Explain P pairs of B images, B at most `batch`.

        Args:
            images: [B, C, H, W] float32.
            owner: [P], the image of each pair, in ascending order.
            wanted: [P], a class, or -1 - r for the class of rank r.
            k_range: k_min and k_max, with k_max at most the setup's; results are those of a
                pipeline that was made for it.
            clock: Takes the seconds of each stage.

        Returns:
            Logits [B, classes] float32, and the results of every `batch` pairs. A layer whose
            statistics are not finite has a count of 0; the other results of its pair mean nothing
            then.
        """
        assert 1 <= k_range[0] <= k_range[1] <= self.geometry.k_max
        self._memory.pairs.host["k_range"][:] = k_range
        self._runner.forget()
        self._memory.images.host["images"][: len(images)] = images
        results = []
        for start in range(0, len(owner), self.batch):
            part = slice(start, start + self.batch)
            pairs = len(owner[part])
            self._memory.pairs.host["owner"][:pairs] = owner[part]
            self._memory.pairs.host["wanted"][:pairs] = wanted[part]
            results.append(self._run_pairs(len(images), pairs, start == 0))
            clock.add(self._runner.stages())
        return self._memory.results.host["logits"][: len(images)].astype(np.float32), results

    def passes(self, images: int, masks: int) -> None:
        """Run backbone, gradient and classifier alone on what a run left in memory, and wait.

        images, masks: as many as that run had, with one class for each image.
        """
        self._runner.forget()
        work = partial(self._passes, images, masks)
        self._runner.run(("passes", images, masks), "passes", work)
        self._runner.mark("")
        self._device.wait()

    def close(self) -> None:
        """Free the memory."""
        self._memory.close()

    def _passes(self, images: int, masks: int) -> None:
        self._launch("backbone", images)
        self._launch("gradient", images)
        for start in range(0, masks, self._memory.chunk):
            self._classify(images, start, min(self._memory.chunk, masks - start))

    def _run_pairs(self, images: int, pairs: int, first: bool) -> PairResults:
        runner = self._runner
        owner = self._memory.pairs.host["owner"][:pairs]
        direct = np.array_equal(owner, np.arange(images))
        if not direct:
            self._memory.gathered()
        work = partial(self._explain, images, pairs, direct, first)
        runner.run(("explain", images, pairs, direct, first), "explain", work)
        runner.mark("")
        self._device.wait()
        masks = int(self._memory.counted.host["starts"][pairs * len(self._setup.selected)])
        # Where no layer has finite statistics there are none; an engine runs on one at least.
        rows = min(max(_rounded(masks), 1), self.geometry.masks)
        work = partial(self._weigh, images, pairs, rows)
        runner.run(("weigh", images, pairs, rows), "weigh", work)
        runner.mark("")
        self._device.wait()
        host = self._memory.results.host
        return PairResults(
            counts=self._memory.counted.host["counts"][:pairs].copy(),
            **{name: host[name][:masks].copy() for name in PER_MASK},
            **{name: host[name][:pairs].copy() for name in PER_PAIR},
        )

    def _explain(self, images: int, pairs: int, direct: bool, first: bool) -> None:
        """Put the work up to the masks on the stream.

        direct: pairs and images are the same, in order.   first: the backbone has not run yet.
        """
        runner, kernels, stream = self._runner, self._kernels, self._device.kernel_stream
        scale, options = self._setup.gradient_scale, self._setup.options
        inputs = self._inputs(pairs)
        runner.mark("upload")
        self._memory.pairs.upload()
        if first:
            self._device.upload(
                self._memory.images.address, self._memory.images.host["images"][:images]
            )
            runner.mark("backbone")
            for name in self._memory.typed_images:
                kernels.cast(self._memory.flat("images"), self._memory.flat(name), stream)
            self._launch("backbone", images)
        runner.mark("gradient")
        probability = options.score == "probability"
        kernels.output_gradient(inputs, self._head, scale, probability, stream)
        self._launch("gradient", pairs, {} if direct else self._gather(images, pairs, inputs))
        runner.mark("statistics")
        kernels.statistics(inputs, scale, stream)
        runner.mark("partition")
        kernels.partition(inputs, options.standardise, stream)
        runner.mark("masks")
        kernels.sums(inputs, stream)
        kernels.masks(inputs, stream)
        self._memory.counted.download()

    def _weigh(self, images: int, pairs: int, rows: int) -> None:
        """Put the classifier on `rows` masks, the weighted sum and the download on the stream."""
        runner, stream, inputs = self._runner, self._device.kernel_stream, self._inputs(pairs)
        runner.mark("classifier")
        for start in range(0, rows, self._memory.chunk):
            self._classify(images, start, min(self._memory.chunk, rows - start))
        runner.mark("combine")
        probability = self._setup.options.score == "probability"
        logits = self._memory.view(rows_of(self._memory.tensors["mask_logits"], 0, rows))
        self._kernels.scores(inputs, logits, probability, stream)
        self._kernels.combine(inputs, stream)
        runner.mark("download")
        self._download(pairs, rows)

    def _launch(
        self, name: str, rows: int, instead: Mapping[str, DeviceTensor] | None = None
    ) -> None:
        """Put a graph on the stream. instead: tensors to take in place of those of their name."""
        graph = self._graphs[name]
        tensors = {
            **self._memory.tensors,
            "images": self._memory.tensors[images_for(graph)],
            **(instead or {}),
        }
        names = [spec.name for spec in (*graph.inputs, *graph.outputs)]
        graph.launch({name: rows_of(tensors[name], 0, rows) for name in names})

    def _gather(self, images: int, pairs: int, inputs: Any) -> dict[str, DeviceTensor]:
        """Put copies of the residuals on the stream, a row for each pair instead of each image."""
        gathered = self._memory.gathered()
        for name, target in gathered.items():
            source = self._memory.view(words_of(rows_of(self._memory.tensors[name], 0, images)))
            copied = self._memory.view(words_of(rows_of(target, 0, pairs)))
            self._kernels.gather(inputs, source, copied, self._device.kernel_stream)
        return gathered

    def _download(self, pairs: int, rows: int) -> None:
        """Put the results' way to the host on the stream: in one copy where the batch is full."""
        if pairs == self.batch:
            self._memory.results.download()
            return
        for name, tensor in self._memory.results.tensors.items():
            used = self._memory.results.host[name][: rows if name in PER_MASK else pairs]
            self._device.download(used, tensor.address)

    def _classify(self, images: int, start: int, rows: int) -> None:
        """Run the classifier on some masks; on aligned copies where they lie askew."""
        graph = self._graphs["classifier"]
        tensors = {"images": rows_of(self._memory.tensors[images_for(graph)], 0, images)}
        after = []
        for name, own in (
            ("masks", "masks"),
            ("owner", "owner_of_mask"),
            ("logits", "mask_logits"),
        ):
            part = rows_of(self._memory.tensors[own], start, rows)
            if part.address % ALIGNMENT:
                aligned = replace(part, address=self._memory.aligned[own].address)
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

    def _inputs(self, pairs: int) -> Any:
        from ccam_deploy.kernels.cuda.launch import Inputs

        memory = self._memory
        owner = memory.view(rows_of(memory.tensors["owner"], 0, pairs))
        return Inputs(
            memory.layers(memory.features),
            memory.layers(memory.gradients),
            owner,
            memory.named("k_range"),
        )

    def _prepare_kernels(self) -> tuple[Any, Any]:
        from ccam_deploy.kernels.cuda.launch import Buffers, CollectionKernels, Head

        memory = self._memory
        buffers = Buffers.allocate(
            self.geometry, lambda name, spec: memory.named(name), self._device.kernel_stream
        )
        head = Head(*map(memory.named, ("logits", "wanted", "output_gradient")))
        return CollectionKernels(self.geometry, buffers), head


def _rounded(masks: int) -> int:
    step = _UNTIL_64 if masks <= 64 else _FROM_64
    return -(-masks // step) * step
