"""The base of methods that run masked forwards on a GPU: slots, batches and pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.engines import Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.engines.cuda.slots import Slot, Slots
from ccam_deploy.errors import BackendError
from ccam_deploy.methods.base import (
    Batch,
    BatchResult,
    Context,
    Method,
    MethodResult,
    require_finite_logits,
)
from ccam_deploy.methods.cuda.masked_forwards import MaskedForwards, Setup
from ccam_deploy.methods.stopwatch import Stopwatch
from ccam_deploy.targets import classes_of, first_occurrences

M = TypeVar("M", bound=Method)

_RUNS_TO_CAPTURE = 2


@dataclass(frozen=True)
class PairMaps:
    """What a pipeline gave for P pairs, on the host.

    Attributes:
        raw: [P, H, W] float32, the maps.
        saliency: [P, H, W] float32, the maps scaled to [0, 1].
        weights: [P, N] float32, or nothing.
        mic: [P, N] float32, or nothing.
    """

    raw: Floats
    saliency: Floats
    weights: tuple[Floats, ...] = ()
    mic: tuple[Floats, ...] = ()

    def result(self) -> MethodResult:
        """Make the method's result.

        Raises:
            BackendError: A map is not finite.
        """
        return MethodResult.of_maps(self.raw, self.weights, self.mic, self.saliency)


class Pipeline(ABC):
    """The memory and kernels of one method with its options, on one slot.

    Attributes:
        forwards: The images and the masked forwards.
    """

    def __init__(self, forwards: MaskedForwards) -> None:
        self.forwards = forwards

    @abstractmethod
    def begin(self, images: Floats, clock: Stopwatch) -> Floats:
        """Run the backbone.

        Args:
            images: [B, C, H, W] float32, at most a batch.
            clock: Takes the seconds of each stage.

        Returns:
            Logits [B, classes] float32.
        """

    @abstractmethod
    def explain(
        self, owner: Classes, targets: Classes, baseline: Floats, clock: Stopwatch
    ) -> PairMaps | BackendError:
        """Explain some pairs of the images that `begin` was given.

        Args:
            owner: [P] int64, the image of each pair, in ascending order; at most a batch.
            targets: [P] int64, the class of each pair.
            baseline: [classes] float32, logits of an input of zeros.
            clock: Takes the seconds of each stage.

        Returns:
            The maps; or, where features are not finite, an error to raise. Raised in here, it would
            close the slot.
        """

    def close(self) -> None:
        """Free the memory."""
        self.forwards.close()


class DeviceForwards:
    """Makes masked forwards on slots; safe to call from several threads.

    Attributes:
        slots: The slots to run on.
        manifest: The bundle's.
        batch_size: The most images, and the most pairs, that a slot takes at a time.
        cuda_graphs: Whether repeated work is replayed as CUDA graphs; the results are the same.
        notes: A line for each option that does not work here.
    """

    def __init__(
        self, slots: Slots, manifest: Manifest, batch_size: int, cuda_graphs: bool = True
    ) -> None:
        self.slots = slots
        self.manifest = manifest
        self.batch_size = batch_size
        self.cuda_graphs = cuda_graphs
        self.notes: tuple[str, ...] = ()

    def on(self, slot: Slot, masks: int) -> MaskedForwards:
        """Allocate masked forwards on a slot, for a method with at most so many masks an image.

        Raises:
            BackendError: There is too little memory.
        """
        setup = Setup(
            self.manifest.input,
            self.batch_size,
            masks,
            self.cuda_graphs,
            self._note,
            self.manifest.probabilities_by,
        )
        return MaskedForwards(slot.device, slot.graphs["throughput"], setup)

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes = (*self.notes, line)


@dataclass(frozen=True)
class DeviceMethod(Method, Generic[M]):
    """A method of masked forwards, with everything between upload and download on a GPU.

    Attributes:
        method: The method with its options.
        device: What it runs on.
    """

    method: M
    device: DeviceForwards

    def run(
        self, images: Floats, owner: Classes, codes: Classes, context: Context, clock: Stopwatch
    ) -> BatchResult:
        """Explain every pair; see Method."""
        logits: list[Floats] = []
        kept: list[tuple[Classes, Classes]] = []
        found: list[PairMaps | BackendError] = []

        def run_on(slot: Slot) -> None:
            pipeline = self._kept(slot)
            for rows in row_chunks(len(images), pipeline.forwards.batch):
                logits.append(pipeline.begin(images[rows], clock))
                if not np.isfinite(logits[-1]).all():
                    return
                pairs = (owner >= rows.start) & (owner < rows.stop)
                places = owner[pairs] - rows.start
                targets = classes_of(places, codes[pairs], logits[-1])
                first = first_occurrences(places, targets)
                places, targets = places[first], targets[first]
                kept.append((places + rows.start, targets))
                found.extend(
                    pipeline.explain(places[part], targets[part], context.baseline, clock)
                    for part in row_chunks(len(places), pipeline.forwards.batch)
                )

        with self.device.slots.take() as slot:
            slot.run(partial(run_on, slot))
        require_finite_logits(logits[-1])
        return BatchResult(
            np.concatenate(logits),
            np.concatenate([places for places, _ in kept]),
            np.concatenate([targets for _, targets in kept]),
            MethodResult.joined(list(map(_result, found))),
        )

    def warm_up(self, images: int, context: Context, progress: Callable[[str], None]) -> None:
        """Prepare every slot for calls of 1 to `images` images, once no caller holds one.

        Args:
            images: The most images of a call.
            context: The engines.
            progress: Called with a line for each step.

        Raises:
            OptionError: The bundle cannot meet the method's options.
            BackendError: The engine failed, or there is too little memory.
        """
        first = np.zeros(1, np.int64)

        def prepare(slot: Slot) -> None:
            pipeline = self._kept(slot)
            most = min(images, pipeline.forwards.batch)
            shape = most, *self.device.manifest.input
            noise = np.random.default_rng(0).standard_normal(shape, np.float32)
            for count in sorted({1, most}):
                progress(f"{count} images" if count > 1 else "one image")
                for _ in range(_RUNS_TO_CAPTURE):
                    pipeline.begin(noise[:count], Stopwatch())
                    pipeline.explain(first, first, context.baseline, Stopwatch())

        self.device.slots.run_on_each(prepare)

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain activations that are on the host: on the CPU; see Method."""
        return self.method.explain(classifier, batch, clock)

    def _kept(self, slot: Slot) -> Pipeline:
        key = self.method, self.device.batch_size, self.device.cuda_graphs
        return slot.keep(key, lambda: self._pipeline(slot))

    @abstractmethod
    def _pipeline(self, slot: Slot) -> Pipeline:
        """Make a pipeline on a slot."""


def _result(found: PairMaps | BackendError) -> MethodResult:
    if isinstance(found, BackendError):
        raise found
    return found.result()
