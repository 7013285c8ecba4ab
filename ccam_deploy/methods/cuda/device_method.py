"""The base of methods that run on a GPU but for Collection-CAM: slots, batches and pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.engines import Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.engines.cuda.parts import ImageParts, SlotImages
from ccam_deploy.engines.cuda.slots import Slot
from ccam_deploy.errors import BackendError
from ccam_deploy.methods.base import Batch, Context, Method, require_finite_logits
from ccam_deploy.methods.cuda.gradient_passes import GradientPasses
from ccam_deploy.methods.cuda.masked_forwards import MaskedForwards, Repeated
from ccam_deploy.methods.cuda.passes import PairMaps, Passes, Setup
from ccam_deploy.methods.on_slots import OnSlots
from ccam_deploy.methods.results import BatchResult, MethodResult
from ccam_deploy.methods.stopwatch import Stopwatch
from ccam_deploy.targets import classes_of, first_occurrences

M = TypeVar("M", bound=Method)

RUNS_TO_CAPTURE = 2


class Pipeline(ABC):
    """The memory and kernels of one method with its options, on one slot.

    Attributes:
        passes: The images, and the passes of the graphs.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    @abstractmethod
    def begin(self, images: SlotImages, clock: Stopwatch) -> Floats:
        """Run the backbone.

        Args:
            images: [B, C, H, W] float32, or the same in parts; at most a batch.
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

    def warm_up(self, images: int, context: Context, progress: Callable[[str], None]) -> None:
        """Run every graph with every number of rows, and every kernel, until all is captured.

        Args:
            images: The most images of a call.
            context: The engines.
            progress: Called with a line for each step.
        """
        first = np.zeros(1, np.int64)
        most = min(images, self.passes.batch)
        noise = context.noise(most)
        for count in sorted({min(size, most) for size in self.passes.sizes}):
            progress(f"{count} images" if count > 1 else "one image")
            for _ in range(RUNS_TO_CAPTURE):
                self.begin(noise[:count], Stopwatch())
                self.explain(first, first, context.baseline, Stopwatch())

    def close(self) -> None:
        """Free the memory."""
        self.passes.close()


class DevicePasses(OnSlots):
    """Makes passes on slots; see OnSlots."""

    def masked_forwards(
        self, slot: Slot, masks: int, repeated: Repeated = "classifier"
    ) -> MaskedForwards:
        """Allocate masked forwards on a slot, for a method with at most so many masks an image.

        Raises:
            BackendError: There is too little memory.
        """
        return MaskedForwards(slot, masks, self._setup(), repeated)

    def gradient_passes(self, slot: Slot) -> GradientPasses:
        """Allocate gradient passes on a slot.

        Raises:
            BackendError: There is too little memory.
        """
        return GradientPasses(slot, self.gradient_scale, self._setup())

    def _setup(self) -> Setup:
        return Setup(
            self.manifest.input,
            self.batch_size,
            self.cuda_graphs,
            self.note,
            self.manifest.probabilities_by,
        )


@dataclass(frozen=True)
class DeviceMethod(Method, Generic[M]):
    """A method with everything between upload and download on a GPU.

    Attributes:
        method: The method with its options.
        device: What it runs on.
    """

    method: M
    device: DevicePasses

    def run(
        self, images: SlotImages, owner: Classes, codes: Classes, context: Context, clock: Stopwatch
    ) -> BatchResult:
        """Explain every pair, a class of each image where they are in parts; see Method."""
        logits: list[Floats] = []
        kept: list[tuple[Classes, Classes]] = []
        found: list[PairMaps | BackendError] = []

        def run_on(slot: Slot) -> None:
            pipeline = self._kept(slot)
            for rows in row_chunks(len(images), pipeline.passes.batch):
                logits.append(pipeline.begin(images[rows], clock))
                if not np.isfinite(logits[-1]).all():
                    return
                pairs = (owner >= rows.start) & (owner < rows.stop)
                places = owner[pairs] - rows.start
                targets = classes_of(places, codes[pairs], logits[-1])
                first = first_occurrences(places, targets)
                places, targets = places[first], targets[first]
                kept.append((places + rows.start, targets))
                for part in row_chunks(len(places), pipeline.passes.batch):
                    found.append(
                        pipeline.explain(places[part], targets[part], context.baseline, clock)
                    )
                    if isinstance(images, ImageParts):
                        pipeline.passes.give_maps(images[rows][part])

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
        """Prepare every slot, once no caller holds one; see Method."""

        def prepare(slot: Slot) -> None:
            self._kept(slot).warm_up(images, context, progress)

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
