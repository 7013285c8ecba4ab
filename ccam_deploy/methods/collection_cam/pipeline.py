"""Collection-CAM with everything between upload and download on a GPU.

First come backbone, gradient and the kernels up to the masks. While the number of masks comes to
the host, the classifier begins with as many as the last batch had; it goes on with those that are
left once the number is known. Then the masks are added up, and all results come to the host in one
copy, to memory that users hold as long as they need it. Engines see few numbers of rows, and always
the same addresses.

Where engines can be captured, all work between two waits is a CUDA graph. An engine that replays
graphs of its own is launched by itself, and the kernels between engines are captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.engines.cuda.device import Device, DeviceGraph, DeviceTensor
from ccam_deploy.engines.cuda.graph_replay import Part, StreamRunner
from ccam_deploy.engines.cuda.parts import ImageParts, SlotImages
from ccam_deploy.engines.cuda.slots import Graphs
from ccam_deploy.kernels.cuda.buffers import Buffers
from ccam_deploy.methods.collection_cam.memory import DeviceMemory, HostResults, Setup
from ccam_deploy.methods.collection_cam.sizes import image_sizes, mask_sizes, padded
from ccam_deploy.methods.stopwatch import Stopwatch

_ROWS = 16
"""The kernels after the classifier take a multiple of this, so that fewer graphs are captured."""
_RUNS_TO_CAPTURE = 2


@dataclass(frozen=True)
class PairResults:
    """What the kernels gave for P pairs with n masks in all, on the host.

    Attributes:
        logits: [P, classes] float32, of the first P images, or of all.
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

    logits: Floats
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
        self._runner = StreamRunner.of_graphs(device, setup.cuda_graphs, graphs.values(), note)
        self._memory = DeviceMemory(device, graphs, setup)
        self.batch, self.geometry = self._memory.batch, self._memory.geometry
        try:
            self._kernels, self._head = self._prepare_kernels()
            self._write_constants()
        except BaseException:
            self._memory.close()
            raise
        self._image_sizes = image_sizes(self.batch)
        self._mask_sizes = mask_sizes(self._memory.chunk, self.batch == 1)
        self._launchers: dict[tuple[str, int, bool], Callable[[], None]] = {}
        self._last_masks: dict[int, int] = {}
        self._interrupted = False

    def run(
        self,
        images: SlotImages,
        owner: NDArray[np.int64],
        codes: NDArray[np.int64],
        k_range: tuple[int, int],
        clock: Stopwatch,
    ) -> tuple[Floats, list[PairResults]]:
        """Explain P pairs of B images, B at most `batch`.

        Args:
            images: [B, C, H, W] float32; or the same in parts, with one class each.
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
        if self._interrupted:  # kernels leave zeros for the next ones, but only the last of them
            self._write_constants()
        self._interrupted = True
        parts = None
        if isinstance(images, ImageParts):
            parts = images
            parts.put(self._device, self._memory.graphs.images)
        else:
            self._memory.stage_images(images)
        results = []
        for part in row_chunks(len(owner), self.batch):
            pairs = part.stop - part.start
            host.pairs.owner[:pairs] = owner[part]
            host.pairs.codes[:pairs] = codes[part]
            results.append(self._run_pairs(len(images), pairs, part.start == 0, parts))
            clock.add(self._runner.stages())
        self._interrupted = False
        return results[0].logits[: len(images)], results

    def passes(self, images: int, masks: int) -> None:
        """Run backbone, gradient and classifier alone on what a run left in memory, and wait.

        Args:
            images: How many that run had, with one class for each.
            masks: How many it had.
        """
        self._runner.forget()
        self._runner.put(
            ("passes", images),
            "passes",
            lambda: [self._backbone(images), self._gradient(images)],
        )
        self._classify(masks)
        self._runner.mark("")
        self._device.wait()

    def warm_up(self, progress: Callable[[str], None]) -> None:
        """Run every graph with every number of rows, and every kernel, until all is captured.

        Args:
            progress: Called with a line for each step.
        """
        noise = np.random.default_rng(0).standard_normal(
            (self.batch, *self._setup.input), np.float32
        )
        k_range = min(2, self.geometry.k_max), self.geometry.k_max
        for count in self._image_sizes:
            progress(f"{count} images" if count > 1 else "one image")
            best = np.full(count, -1, np.int64)
            for _ in range(_RUNS_TO_CAPTURE):
                self.run(noise[:count], np.arange(count), best, k_range, Stopwatch())
            if count > 1:  # several classes of an image
                ranks = -1 - np.arange(count) % self._setup.classes
                first = np.zeros(count, np.int64)
                for _ in range(_RUNS_TO_CAPTURE):
                    self.run(noise[:1], first, ranks, k_range, Stopwatch())
        for rows in self._mask_sizes:
            progress(f"{rows} masks")
            for start in (0, self.geometry.masks - 1):
                for _ in range(_RUNS_TO_CAPTURE):
                    self._classify_chunk(start, rows)
        self._device.wait()

    def close(self) -> None:
        """Free the memory, and let go of the graphs, which hold their engines' sessions."""
        self._launchers.clear()
        self._runner.close()
        self._memory.close()

    def _backbone(self, images: int) -> Part:
        return Part("backbone", partial(self._launch, "backbone", images), is_engine=True)

    def _gradient(self, pairs: int, gathered: bool = False) -> Part:
        work = partial(self._launch, "gradient", pairs, gathered)
        return Part("gradient", work, is_engine=True)

    def _run_pairs(
        self, images: int, pairs: int, first: bool, parts: ImageParts | None
    ) -> PairResults:
        runner, host = self._runner, self._memory.host
        direct = host.pairs.owner[:pairs].tolist() == list(range(images))
        self._runner.put(
            ("explain", images, pairs, direct, first, parts is None),
            "explain",
            partial(self._explain, images, pairs, direct, first, parts is None),
        )
        runner.mark("")
        counted = self._device.mark()
        # While the count of masks is on its way, the classifier begins with as many as last time.
        classified = self._classify(self._last_masks.get(pairs, 0))
        self._device.wait(counted)
        masks = int(host.counts.starts[pairs * len(self._setup.selected)])
        self._last_masks[pairs] = masks
        self._classify(masks, start=classified)
        # There are none where no layer has finite statistics; kernels need at least one row.
        rows = min(-(-max(masks, 1) // _ROWS) * _ROWS, self.geometry.masks)
        self._runner.put(("combine", pairs, rows), "combine", lambda: [self._combine(pairs, rows)])
        if parts is not None:
            parts.give(self._device, self._memory.buffers.by_name()["saliency"])
        runner.mark("download")  # not part of a captured graph: it goes elsewhere each time
        results = self._memory.download_results(pairs, rows)
        runner.mark("")
        self._device.wait()
        return self._results(results, pairs, masks)

    def _results(self, host: HostResults, pairs: int, masks: int) -> PairResults:
        """What the stream brought to the host: as it is, or copies of what the next run needs."""

        def kept(values: NDArray[Any], count: int) -> NDArray[Any]:
            return values[:count] if host.lent else values[:count].copy()

        of_masks, of_pairs = host.mask_values, host.pair_values
        return PairResults(
            logits=host.logits[:pairs].astype(np.float32),
            targets=kept(of_pairs.targets, pairs),
            labels=kept(of_pairs.labels, pairs),
            counts=self._memory.host.counts.counts[:pairs].copy(),
            quality=kept(of_pairs.quality, pairs),
            sums=kept(of_pairs.sums, pairs),
            raw=kept(of_pairs.raw, pairs),
            saliency=kept(of_pairs.saliency, pairs),
            flat=kept(of_masks.flat, masks),
            scores=kept(of_masks.scores, masks),
            weights=kept(of_masks.weights, masks),
        )

    def _explain(
        self, images: int, pairs: int, direct: bool, first: bool, from_host: bool
    ) -> list[Part]:
        """The work up to the masks.

        Args:
            images: How many.
            pairs: How many.
            direct: Whether each image has one pair, in order.
            first: Whether the backbone has yet to run.
            from_host: Whether the images have yet to come from the host.
        """
        kernels, stream = self._kernels, self._device.kernel_stream
        scale, options = self._setup.gradient_scale, self._setup.options

        def upload() -> None:
            self._memory.upload_pairs()
            if first:
                if from_host:
                    self._memory.upload_images(images)
                tensors = self._memory.graphs
                for typed in tensors.typed_images.values():
                    source, target = map(self._memory.flat_view, (tensors.images, typed))
                    kernels.cast(source, target, stream)

        def output_gradient() -> None:
            inputs = self._inputs(pairs)
            kernels.output_gradient(inputs, self._head, scale, self._setup.scoring, stream)
            if not direct:
                self._gather(images, pairs, inputs)

        def partition() -> None:
            inputs = self._inputs(pairs)
            kernels.statistics(inputs, scale, stream)
            self._runner.mark("partition")
            kernels.partition(inputs, options.standardise, stream)
            self._runner.mark("masks")
            kernels.sums(inputs, stream)
            kernels.masks(inputs, stream)
            self._memory.download_counts()

        return [
            Part("upload", upload),
            *([self._backbone(images)] if first else []),
            Part("gradient", output_gradient),
            self._gradient(pairs, gathered=not direct),
            Part("statistics", partition),
        ]

    def _combine(self, pairs: int, rows: int) -> Part:
        """The weighted sum of masks, from the logits of `rows` masked images."""

        def work() -> None:
            stream, inputs = self._device.kernel_stream, self._inputs(pairs)
            logits = self._memory.view(self._memory.graphs.mask_logits.rows(rows))
            self._kernels.scores(inputs, logits, self._setup.scoring, stream)
            self._kernels.combine(inputs, stream)

        return Part("combine", work)

    def _launch(self, name: str, rows: int, gathered: bool = False) -> None:
        """Put the backbone or the gradient graph on the stream, on padded rows."""
        key = name, padded(rows, self._image_sizes), gathered
        if key not in self._launchers:
            graph = self._graphs[name]
            tensors = self._memory.graphs.bindings(graph)
            if gathered:
                tensors |= self._memory.gathered()
            self._launchers[key] = self._bind(
                graph, {name: tensor.rows(key[1]) for name, tensor in tensors.items()}
            )
        self._launchers[key]()

    def _bind(self, graph: DeviceGraph, tensors: dict[str, DeviceTensor]) -> Callable[[], None]:
        if self._setup.cuda_graphs:
            return graph.bind(tensors)
        return partial(graph.launch, tensors)

    def _gather(self, images: int, pairs: int, inputs: Any) -> None:
        """Put copies of the residuals on the stream, a row for each pair instead of each image."""
        tensors = self._memory.graphs.bindings(self._graphs["gradient"])
        for name, target in self._memory.gathered().items():
            source = self._memory.view(tensors[name].rows(images).words())
            copied = self._memory.view(target.rows(pairs).words())
            self._kernels.gather(inputs, source, copied, self._device.kernel_stream)

    def _classify(self, masks: int, start: int = 0) -> int:
        """Put the classifier on the stream, a chunk of the masks at a time.

        Args:
            masks: How many need logits.
            start: How many have them already.

        Returns:
            How many have them then, `masks` or a few more.
        """
        while start < masks:
            rows = padded(min(masks - start, self._memory.chunk), self._mask_sizes)
            self._runner.put(
                ("classify", start, rows), "classifier", partial(self._chunk, start, rows)
            )
            start = min(start + rows, self.geometry.masks)
        return start

    def _chunk(self, start: int, rows: int) -> list[Part]:
        return [Part("classifier", partial(self._classify_chunk, start, rows), is_engine=True)]

    def _classify_chunk(self, start: int, rows: int) -> None:
        """Run the classifier on some masks, padded to `rows`: in place, or on staged copies."""
        staged = start > 0
        key = "classifier", rows, staged
        if key not in self._launchers:
            self._launchers[key] = self._bind_classifier(rows, staged)
        if not staged:
            self._launchers[key]()
            return
        count = min(rows, self.geometry.masks - start)
        for chunked in self._memory.chunked:
            if not chunked.written:
                part = chunked.whole.rows(count, start)
                self._device.copy(chunked.staged.address, part.address, part.bytes)
        self._launchers[key]()
        for chunked in self._memory.chunked:
            if chunked.written:
                part = chunked.whole.rows(count, start)
                self._device.copy(part.address, chunked.staged.address, part.bytes)

    def _bind_classifier(self, rows: int, staged: bool) -> Callable[[], None]:
        """Prepare the classifier for `rows` masks of any of the batch's images."""
        graph = self._graphs["classifier"]
        height, width = self._setup.input[1:]
        tensors = {"images": self._memory.graphs.images_for(graph)}
        for chunked in self._memory.chunked:
            whole = chunked.staged if staged else chunked.whole
            tensors[chunked.name] = whole.rows(rows)
        tensors["masks"] = replace(tensors["masks"], shape=(rows, 1, height, width))
        return self._bind(graph, tensors)

    def _inputs(self, pairs: int) -> Any:
        from ccam_deploy.kernels.cuda.launch import Inputs

        memory = self._memory
        return Inputs(
            features=memory.layers_view(memory.graphs.features),
            gradients=memory.layers_view(memory.graphs.gradients),
            owner=memory.view(memory.pairs.owner.rows(pairs)),
            k_range=memory.view(memory.pairs.k_range),
        )

    def _prepare_kernels(self) -> tuple[Any, Any]:
        from ccam_deploy.kernels.cuda.launch import CollectionKernels, Head

        memory = self._memory
        tensors = memory.buffers.by_name()
        buffers = Buffers.of({name: memory.view(tensor) for name, tensor in tensors.items()})
        head = Head(
            logits=memory.view(memory.graphs.logits),
            codes=memory.view(memory.pairs.codes),
            gradient=memory.view(memory.graphs.output_gradient),
        )
        return CollectionKernels(self.geometry, buffers), head

    def _write_constants(self) -> None:
        from ccam_deploy.kernels.cuda.launch import write_constants

        write_constants(self.geometry, self._kernels.buffers, self._device.kernel_stream)
        self._device.wait()  # until then, the arrays that are copied must not go
