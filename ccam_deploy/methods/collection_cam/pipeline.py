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
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.engines.cuda.device import ALIGNMENT, Device, DeviceTensor
from ccam_deploy.engines.cuda.graph_replay import StreamRunner
from ccam_deploy.engines.cuda.slots import Graphs
from ccam_deploy.kernels.cuda.buffers import Buffers
from ccam_deploy.methods.collection_cam.memory import DeviceMemory, Setup, rows_of, words_of
from ccam_deploy.methods.stopwatch import Stopwatch

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

    Attributes:
        batch: The most images and pairs of one run; the setup's, or fewer where the graphs take
            fewer.
        geometry: Where each layer lies in the results.
    """

    def __init__(
        self, device: Device, graphs: Graphs, setup: Setup, note: Callable[[str], None]
    ) -> None:
        """Allocate memory, and prepare the kernels.

        Args:
            device: The slot's device.
            graphs: The backbone, the gradient graph and the classifier, by name.
            setup: The sizes and options.
            note: Called with a line where CUDA graphs cannot be used.

        Raises:
            BackendError: There is too little memory.
            OptionError: The kernels do not take such sizes.
        """
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
        codes: NDArray[np.int64],
        k_range: tuple[int, int],
        clock: Stopwatch,
    ) -> tuple[Floats, list[PairResults]]:
        """Explain P pairs of B images, B at most `batch`.

        Args:
            images: [B, C, H, W] float32.
            owner: [P], the image of each pair, in ascending order.
            codes: [P], a class, or -1 - r for the class of rank r.
            k_range: k_min and k_max, with k_max at most the setup's. The results do not depend on
                the setup's.
            clock: Takes the seconds of each stage.

        Returns:
            Logits [B, classes] float32, and the results of every `batch` pairs. A layer whose
            statistics are not finite has a count of 0; the other results of its pair mean nothing
            then.
        """
        assert 1 <= k_range[0] <= k_range[1] <= self.geometry.k_max
        host = self._memory.host
        host.pairs.k_range[:] = k_range
        self._runner.forget()
        host.images[: len(images)] = images
        results = []
        for part in row_chunks(len(owner), self.batch):
            pairs = part.stop - part.start
            host.pairs.owner[:pairs] = owner[part]
            host.pairs.codes[:pairs] = codes[part]
            results.append(self._run_pairs(len(images), pairs, part.start == 0))
            clock.add(self._runner.stages())
        return host.logits[: len(images)].astype(np.float32), results

    def passes(self, images: int, masks: int) -> None:
        """Run backbone, gradient and classifier alone on what a run left in memory, and wait.

        Args:
            images: How many that run had, with one class for each.
            masks: How many it had.
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
        self._classify(images, masks)

    def _run_pairs(self, images: int, pairs: int, first: bool) -> PairResults:
        runner = self._runner
        host = self._memory.host
        direct = np.array_equal(host.pairs.owner[:pairs], np.arange(images))
        if not direct:
            self._memory.gathered()
        work = partial(self._explain, images, pairs, direct, first)
        runner.run(("explain", images, pairs, direct, first), "explain", work)
        runner.mark("")
        self._device.wait()
        masks = int(host.counts.starts[pairs * len(self._setup.selected)])
        # There are none where no layer has finite statistics; an engine needs at least one row.
        rows = min(max(_rounded(masks), 1), self.geometry.masks)
        work = partial(self._weigh, images, pairs, rows)
        runner.run(("weigh", images, pairs, rows), "weigh", work)
        runner.mark("")
        self._device.wait()
        of_masks, of_pairs = host.mask_values, host.pair_values
        return PairResults(
            targets=of_pairs.targets[:pairs].copy(),
            labels=of_pairs.labels[:pairs].copy(),
            counts=host.counts.counts[:pairs].copy(),
            quality=of_pairs.quality[:pairs].copy(),
            sums=of_pairs.sums[:pairs].copy(),
            raw=of_pairs.raw[:pairs].copy(),
            saliency=of_pairs.saliency[:pairs].copy(),
            flat=of_masks.flat[:masks].copy(),
            scores=of_masks.scores[:masks].copy(),
            weights=of_masks.weights[:masks].copy(),
        )

    def _explain(self, images: int, pairs: int, direct: bool, first: bool) -> None:
        """Put the work up to the masks on the stream.

        Args:
            images: How many.
            pairs: How many.
            direct: Whether each image has one pair, in order.
            first: Whether the backbone has yet to run.
        """
        runner, kernels, stream = self._runner, self._kernels, self._device.kernel_stream
        scale, options = self._setup.gradient_scale, self._setup.options
        inputs = self._inputs(pairs)
        runner.mark("upload")
        self._memory.upload_pairs()
        if first:
            self._memory.upload_images(images)
            runner.mark("backbone")
            tensors = self._memory.graphs
            for typed in tensors.typed_images.values():
                source, target = map(self._memory.flat_view, (tensors.images, typed))
                kernels.cast(source, target, stream)
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
        self._memory.download_counts()

    def _weigh(self, images: int, pairs: int, rows: int) -> None:
        """Put the classifier on `rows` masks, the weighted sum and the download on the stream."""
        runner, stream, inputs = self._runner, self._device.kernel_stream, self._inputs(pairs)
        runner.mark("classifier")
        self._classify(images, rows)
        runner.mark("combine")
        probability = self._setup.options.score == "probability"
        logits = self._memory.view(rows_of(self._memory.graphs.mask_logits, 0, rows))
        self._kernels.scores(inputs, logits, probability, stream)
        self._kernels.combine(inputs, stream)
        runner.mark("download")
        self._memory.download_results(pairs, rows)

    def _launch(
        self, name: str, rows: int, replaced: Mapping[str, DeviceTensor] | None = None
    ) -> None:
        """Put a graph on the stream; `replaced` tensors stand in for those of the same name."""
        graph = self._graphs[name]
        tensors = self._memory.graphs.bindings(graph) | dict(replaced or {})
        graph.launch({name: rows_of(tensor, 0, rows) for name, tensor in tensors.items()})

    def _gather(self, images: int, pairs: int, inputs: Any) -> dict[str, DeviceTensor]:
        """Put copies of the residuals on the stream, a row for each pair instead of each image."""
        gathered = self._memory.gathered()
        tensors = self._memory.graphs.bindings(self._graphs["gradient"])
        for name, target in gathered.items():
            source = self._memory.view(words_of(rows_of(tensors[name], 0, images)))
            copied = self._memory.view(words_of(rows_of(target, 0, pairs)))
            self._kernels.gather(inputs, source, copied, self._device.kernel_stream)
        return gathered

    def _classify(self, images: int, masks: int) -> None:
        """Put the classifier on the stream, a chunk of the masks at a time."""
        for rows in row_chunks(masks, self._memory.chunk):
            self._classify_chunk(images, rows.start, rows.stop - rows.start)

    def _classify_chunk(self, images: int, start: int, rows: int) -> None:
        """Run the classifier on some masks; on aligned copies where they are not aligned."""
        graph = self._graphs["classifier"]
        tensors = {"images": rows_of(self._memory.graphs.images_for(graph), 0, images)}
        copies_back = []
        for chunked in self._memory.chunked:
            part = rows_of(chunked.whole, start, rows)
            if part.address % ALIGNMENT:
                assert chunked.aligned is not None
                aligned = replace(part, address=chunked.aligned.address)
                if chunked.written:
                    copies_back.append((part, aligned))
                else:
                    self._device.copy(aligned.address, part.address, part.bytes)
                part = aligned
            tensors[chunked.name] = part
        height, width = self._setup.input[1:]
        tensors["masks"] = replace(tensors["masks"], shape=(rows, 1, height, width))
        graph.launch(tensors)
        for part, aligned in copies_back:
            self._device.copy(part.address, aligned.address, part.bytes)

    def _inputs(self, pairs: int) -> Any:
        from ccam_deploy.kernels.cuda.launch import Inputs

        memory = self._memory
        return Inputs(
            features=memory.layers_view(memory.graphs.features),
            gradients=memory.layers_view(memory.graphs.gradients),
            owner=memory.view(rows_of(memory.pairs.owner, 0, pairs)),
            k_range=memory.view(memory.pairs.k_range),
        )

    def _prepare_kernels(self) -> tuple[Any, Any]:
        from ccam_deploy.kernels.cuda.launch import CollectionKernels, Head, write_constants

        memory = self._memory
        tensors = memory.buffers.by_name()
        buffers = Buffers.of({name: memory.view(tensor) for name, tensor in tensors.items()})
        write_constants(self.geometry, buffers, self._device.kernel_stream)
        head = Head(
            logits=memory.view(memory.graphs.logits),
            codes=memory.view(memory.pairs.codes),
            gradient=memory.view(memory.graphs.output_gradient),
        )
        return CollectionKernels(self.geometry, buffers), head


def _rounded(masks: int) -> int:
    step = _UNTIL_64 if masks <= 64 else _FROM_64
    return -(-masks // step) * step
