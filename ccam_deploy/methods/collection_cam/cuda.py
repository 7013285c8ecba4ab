"""Collection-CAM on a GPU: batches go to whichever slot is free, results come as the CPU's do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.engines.cuda.parts import SlotImages
from ccam_deploy.engines.cuda.slots import Slot, Use
from ccam_deploy.kernels.cuda.geometry import Geometry
from ccam_deploy.methods.base import (
    Batch,
    Context,
    Method,
    not_finite,
    require_finite_logits,
    require_finite_masked,
)
from ccam_deploy.methods.collection_cam.cpu import CollectionCAM, draw_masks
from ccam_deploy.methods.collection_cam.memory import Setup
from ccam_deploy.methods.collection_cam.pipeline import PairResults, Pipeline
from ccam_deploy.methods.on_slots import OnSlots
from ccam_deploy.methods.results import BatchResult, LayerPartition, MaskSequence, MethodResult
from ccam_deploy.methods.scores import score_of, scoring
from ccam_deploy.methods.stopwatch import Stopwatch
from ccam_deploy.targets import first_occurrences


class DeviceCollectionCAM:
    """Explains batches on slots; safe to call from several threads.

    Args:
        place: The slots, and the bundle's facts.
        baseline: [classes] float32, the logits of an input of zeros.
    """

    def __init__(self, place: OnSlots, baseline: Floats) -> None:
        self._place = place
        self._baseline = baseline
        self._largest_k_max: dict[CollectionCAM, int] = {}
        self._k_max_lock = threading.Lock()

    def explain(
        self,
        images: SlotImages,
        owner: NDArray[np.int64],
        codes: NDArray[np.int64],
        options: CollectionCAM,
        clock: Stopwatch,
    ) -> tuple[Floats, NDArray[np.int64], list[MethodResult]]:
        """Explain P (image, class) pairs of B images.

        Args:
            images: [B, C, H, W] float32; or the same in parts, with one class each.
            owner: [P] int64, the image of each pair, in ascending order.
            codes: [P] int64, a class, or -1 - r for the image's class of rank r.
            options: The method.
            clock: Takes the seconds of each stage.

        Returns:
            Logits [B, classes] float32, targets [P] int64, and the results, a part of the pairs
            at a time.

        Raises:
            BackendError: The engine failed, or a statistic is not finite.
            OptionError: The kernels do not take such sizes.
        """
        use: Use = "latency" if len(images) == len(owner) == 1 else "throughput"
        logits, parts = [], []

        def run(slot: Slot) -> Geometry:
            pipeline = self._pipeline(slot, use, options)
            for rows in row_chunks(len(images), pipeline.batch):
                pairs = (owner >= rows.start) & (owner < rows.stop)
                batch_logits, results = pipeline.run(
                    images[rows],
                    owner[pairs] - rows.start,
                    codes[pairs],
                    (options.k_min, options.k_max),
                    clock,
                )
                logits.append(batch_logits)
                parts.extend(results)
            return pipeline.geometry

        with self._place.slots.take() as slot:
            geometry = slot.run(partial(run, slot))
        targets = np.concatenate([part.targets for part in parts])
        method_results = [self._result(geometry, part, options) for part in parts]
        return np.concatenate(logits), targets, method_results

    def passes(self, images: Floats, options: CollectionCAM) -> Callable[[], None]:
        """Prepare to run backbone, gradient and classifier alone.

        Args:
            images: [B, C, H, W] float32. Each is explained once on a slot, for its best class.
            options: The method.

        Returns:
            A function that runs the graphs on what that left in the slot's memory, copies nothing,
            and waits for them.
        """
        sizes: WeakKeyDictionary[Pipeline, list[tuple[int, int]]] = WeakKeyDictionary()

        def run_on(slot: Slot) -> None:
            use: Use = "latency" if len(images) == 1 else "throughput"
            pipeline = self._pipeline(slot, use, options)
            if pipeline not in sizes:
                sizes[pipeline] = _sizes(pipeline, images, options)
            for count, masks in sizes[pipeline]:
                pipeline.passes(count, masks)

        def run() -> None:
            with self._place.slots.take() as slot:
                slot.run(partial(run_on, slot))

        return run

    def warm_up(self, images: int, options: CollectionCAM, progress: Callable[[str], None]) -> None:
        """Prepare every slot, once no caller holds one; see Method."""

        def prepare(slot: Slot) -> None:
            self._pipeline(slot, "latency", options).warm_up(progress)
            if images > 1:
                self._pipeline(slot, "throughput", options).warm_up(progress)

        self._place.slots.run_on_each(prepare)

    def _pipeline(self, slot: Slot, use: Use, options: CollectionCAM) -> Pipeline:
        """The slot's pipeline for some options, built on their first use.

        It has room for the largest k_max so far: a budget lowers k_max within its call, where
        allocating memory and capturing graphs for each value would take too long.
        """
        others = _with_k_max(options, 1)
        with self._k_max_lock:
            largest = max(self._largest_k_max.get(others, 0), options.k_max)
        sized = _with_k_max(options, largest)
        key = self._place.batch_size, use, sized, self._place.cuda_graphs
        pipeline = slot.keep(key, lambda: self._make(slot, use, sized))
        with self._k_max_lock:  # only now: one that is too large would be asked for again
            self._largest_k_max[others] = max(self._largest_k_max.get(others, 0), largest)
        return pipeline

    def _make(self, slot: Slot, use: Use, options: CollectionCAM) -> Pipeline:
        setup = Setup(
            self._place.manifest.layers,
            tuple(options.selected_layers([layer.name for layer in self._place.manifest.layers])),
            self._place.manifest.input,
            self._place.manifest.classes,
            1 if use == "latency" else self._place.batch_size,
            self._place.gradient_scale,
            options,
            scoring(options.score, self._place.manifest.probabilities_by),
            self._place.cuda_graphs,
        )
        return Pipeline(slot.device, slot.graphs[use], setup, self._place.note)

    def _result(
        self, geometry: Geometry, results: PairResults, options: CollectionCAM
    ) -> MethodResult:
        names = [layer.name for layer in self._place.manifest.layers]
        selected = [names[index] for index in options.selected_layers(names)]
        counts = results.counts
        if not counts.all():
            raise not_finite(selected[int(counts.all(axis=0).argmin())])
        require_finite_masked(results.weights)
        channels = _consecutive([layer.channels for layer in geometry.layers])
        tried = options.k_max - options.k_min + 1
        masks = counts.sum(axis=1)
        of_pair = _consecutive(masks.tolist())
        inputs = np.broadcast_to(self._baseline, (len(counts), len(self._baseline)))
        activation = self._place.manifest.probabilities_by
        base = score_of(options.score, inputs, results.targets, activation)
        increases = results.scores - np.repeat(base, masks)
        mic = np.where(results.flat == 0, increases, np.float32(0))
        return MethodResult(
            results.raw.reshape(-1, *geometry.size),
            results.saliency.reshape(-1, *geometry.size),
            tuple(
                LayerPartition(
                    name,
                    results.labels[:, of_layer],
                    counts[:, index],
                    results.quality[:, index, :tried],
                )
                for index, (name, of_layer) in enumerate(zip(selected, channels, strict=True))
            ),
            MaskSequence(
                [
                    partial(_draw_masks, geometry, sums, of_layers, options.theta)
                    for sums, of_layers in zip(results.sums, counts, strict=True)
                ]
            ),
            tuple(results.weights[rows] for rows in of_pair),
            tuple(mic[rows] for rows in of_pair),
        )


@lru_cache
def _with_k_max(options: CollectionCAM, k_max: int) -> CollectionCAM:
    return replace(options, k_min=1, k_max=k_max)


def _consecutive(counts: Sequence[int]) -> list[slice]:
    """The slices of so many rows each that follow one another."""
    return [slice(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]


def _draw_masks(
    geometry: Geometry, sums: Floats, counts: NDArray[np.int32], theta: float
) -> Floats:
    """Draw all masks of a pair from its collection sums; see Geometry.split_sums."""
    return draw_masks(geometry.split_sums(sums, counts), geometry.size, theta)


def _sizes(pipeline: Pipeline, images: Floats, options: CollectionCAM) -> list[tuple[int, int]]:
    """Explain some images; return how many each run took, and how many masks they had."""
    k_range = options.k_min, options.k_max
    sizes = []
    for rows in row_chunks(len(images), pipeline.batch):
        part = images[rows]
        best_class = np.full(len(part), -1, np.int64)
        _, results = pipeline.run(part, np.arange(len(part)), best_class, k_range, Stopwatch())
        sizes.append((len(part), sum(len(result.scores) for result in results)))
    return sizes


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
        self, images: SlotImages, owner: Classes, codes: Classes, context: Context, clock: Stopwatch
    ) -> BatchResult:
        """Explain every pair; see Method. Ranks are looked up on the GPU."""
        logits, targets, parts = self.device.explain(images, owner, codes, self.method, clock)
        require_finite_logits(logits)
        result = MethodResult.joined(parts)
        kept = first_occurrences(owner, targets)
        if len(kept) == len(owner):
            return BatchResult(logits, owner, targets, result)
        return BatchResult(logits, owner[kept], targets[kept], result.take(kept))

    def warm_up(self, images: int, context: Context, progress: Callable[[str], None]) -> None:
        """Prepare every slot; see Method."""
        self.device.warm_up(images, self.method, progress)

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain activations that are on the host: on the CPU; see Method."""
        return self.method.explain(classifier, batch, clock)
