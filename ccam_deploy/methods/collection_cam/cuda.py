"""Collection-CAM on a GPU: batches go to whichever slot is free, results come as the CPU's do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.engines import Classifier
from ccam_deploy.engines.cuda.slots import Slot, Slots, Use
from ccam_deploy.kernels.cuda.geometry import Geometry
from ccam_deploy.methods.base import (
    Batch,
    BatchResult,
    Context,
    LayerPartition,
    MaskSequence,
    Method,
    MethodResult,
    Stopwatch,
    not_finite,
    require_finite_logits,
)
from ccam_deploy.methods.collection_cam.cpu import CollectionCAM, draw_masks
from ccam_deploy.methods.collection_cam.memory import Setup
from ccam_deploy.methods.collection_cam.pipeline import PairResults, Pipeline
from ccam_deploy.methods.scores import score_of
from ccam_deploy.targets import first_occurrences


class DeviceCollectionCAM:
    """Explains batches on slots; safe to call from several threads.

    gradient_scale: of the bundle's graphs.   baseline: [classes] float32, logits of an input of
    zeros.   batch_size: the most images, and the most pairs, that a slot takes at a time.
    cuda_graphs: replay what comes again at the same sizes; it gives the same result as launching
    it piece by piece.   notes: what cannot be done here as asked, a line each.
    """

    def __init__(
        self,
        slots: Slots,
        manifest: Manifest,
        gradient_scale: float,
        baseline: Floats,
        batch_size: int,
        cuda_graphs: bool = True,
    ) -> None:
        self._slots = slots
        self._manifest = manifest
        self._gradient_scale = gradient_scale
        self._baseline = baseline
        self._batch_size = batch_size
        self._cuda_graphs = cuda_graphs
        self._largest_k_max: dict[CollectionCAM, int] = {}
        self.notes: tuple[str, ...] = ()

    def explain(
        self,
        images: Floats,
        owner: NDArray[np.int64],
        wanted: NDArray[np.int64],
        options: CollectionCAM,
        clock: Stopwatch,
    ) -> tuple[Floats, NDArray[np.int64], list[MethodResult]]:
        """Explain P (image, class) pairs of B images.

        images: [B, C, H, W] float32.   owner: [P], the image of each pair, in ascending order.
        wanted: [P], a class, or -1 - r for the image's class of rank r.
        Returns logits [B, classes] float32, targets [P] int64, and results for parts of the pairs.
        Raises BackendError for what the engine reports and for values that are not finite,
        OptionError for sizes that the kernels do not take.
        """
        logits, parts = [], []
        with self._slots.take() as slot:
            single = len(images) == len(owner) == 1
            pipeline = self._pipeline(slot, "latency" if single else "throughput", options)
            for start in range(0, len(images), pipeline.batch):
                own = (owner >= start) & (owner < start + pipeline.batch)
                rows, found = pipeline.run(
                    images[start : start + pipeline.batch],
                    owner[own] - start,
                    wanted[own],
                    (options.k_min, options.k_max),
                    clock,
                )
                logits.append(rows)
                parts += found
        targets = np.concatenate([part.targets for part in parts])
        results = [self._result(pipeline.geometry, part, options) for part in parts]
        return np.concatenate(logits), targets, results

    def passes(self, images: Floats, options: CollectionCAM) -> Callable[[], None]:
        """A call that runs backbone, gradient and classifier alone, and waits for them.

        images: [B, C, H, W] float32. Each is explained once on a slot, for its best class; the
        call then runs on what that left in the slot's memory, and copies nothing.
        """
        sizes: WeakKeyDictionary[Pipeline, list[tuple[int, int]]] = WeakKeyDictionary()

        def run() -> None:
            with self._slots.take() as slot:
                use: Use = "latency" if len(images) == 1 else "throughput"
                pipeline = self._pipeline(slot, use, options)
                if pipeline not in sizes:
                    sizes[pipeline] = _sizes(pipeline, images, options)
                for count, masks in sizes[pipeline]:
                    pipeline.passes(count, masks)

        return run

    def _pipeline(self, slot: Slot, use: Use, options: CollectionCAM) -> Pipeline:
        """The slot's pipeline for some options, made when they are first asked for.

        It has room for the largest k_max so far: a budget lowers k_max within the call that it is
        for, which must not allocate memory and capture graphs for each.
        """
        others = replace(options, k_min=1, k_max=1)
        largest = self._largest_k_max.get(others, 0)
        largest = self._largest_k_max[others] = max(largest, options.k_max)
        sized = replace(options, k_min=1, k_max=largest)
        key = self._batch_size, use, sized, self._cuda_graphs
        return slot.keep(key, lambda: self._make(slot, use, sized))

    def _make(self, slot: Slot, use: Use, options: CollectionCAM) -> Pipeline:
        setup = Setup(
            self._manifest.layers,
            tuple(options.selected_layers([layer.name for layer in self._manifest.layers])),
            self._manifest.input,
            self._manifest.classes,
            1 if use == "latency" else self._batch_size,
            self._gradient_scale,
            options,
            self._cuda_graphs,
        )
        return Pipeline(slot.device, slot.graphs[use], setup, self._note)

    def _result(
        self, geometry: Geometry, results: PairResults, options: CollectionCAM
    ) -> MethodResult:
        names = [layer.name for layer in self._manifest.layers]
        chosen = [names[index] for index in options.selected_layers(names)]
        counts = results.counts
        for index, name in enumerate(chosen):
            if not counts[:, index].all():
                raise not_finite(name)
        ends = np.cumsum([layer.channels for layer in geometry.layers])
        labels = np.split(results.labels, ends[:-1], axis=1)
        per_pair = np.cumsum(counts.sum(axis=1))[:-1]
        scores = np.split(results.scores, per_pair)
        weights = np.split(results.weights, per_pair)
        flat = np.split(results.flat, per_pair)
        rows = np.broadcast_to(self._baseline, (len(counts), len(self._baseline)))
        base = score_of(options.score, rows, results.targets)
        tried = options.k_max - options.k_min + 1
        return MethodResult(
            results.raw.reshape(-1, *geometry.size),
            results.saliency.reshape(-1, *geometry.size),
            tuple(
                LayerPartition(name, own, counts[:, index], results.quality[:, index, :tried])
                for index, (name, own) in enumerate(zip(chosen, labels, strict=True))
            ),
            MaskSequence(
                [
                    partial(draw_masks, maps, geometry.size, options.theta)
                    for maps in map(geometry.split_sums, results.sums, counts)
                ]
            ),
            tuple(weights),
            tuple(
                np.where(unused == 0, score - zero, np.float32(0))
                for score, unused, zero in zip(scores, flat, base, strict=True)
            ),
        )

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes = (*self.notes, line)


def _sizes(pipeline: Pipeline, images: Floats, options: CollectionCAM) -> list[tuple[int, int]]:
    """Explain some images; return how many each run took, and how many masks they had."""
    k_range = options.k_min, options.k_max
    found = []
    for start in range(0, len(images), pipeline.batch):
        part = images[start : start + pipeline.batch]
        best = np.full(len(part), -1, np.int64)
        _, results = pipeline.run(part, np.arange(len(part)), best, k_range, Stopwatch())
        found.append((len(part), sum(len(result.scores) for result in results)))
    return found


@dataclass(frozen=True)
class CudaCollectionCAM(Method):
    """Collection-CAM with everything between upload and download on a GPU.

    Attributes:
        method: Collection-CAM with its options.
        device: The slots that it runs on.
    """

    name = CollectionCAM.name
    method: CollectionCAM
    device: DeviceCollectionCAM

    def run(
        self, images: Floats, owner: Classes, codes: Classes, context: Context, clock: Stopwatch
    ) -> BatchResult:
        """Explain every pair; see Method. Ranks are looked up on the GPU."""
        logits, targets, parts = self.device.explain(images, owner, codes, self.method, clock)
        require_finite_logits(logits)
        result = MethodResult.joined(parts)
        kept = first_occurrences(owner, targets)
        if len(kept) == len(owner):
            return BatchResult(logits, owner, targets, result)
        return BatchResult(logits, owner[kept], targets[kept], result.take(kept))

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain activations that are on the host: on the CPU; see Method."""
        return self.method.explain(classifier, batch, clock)
