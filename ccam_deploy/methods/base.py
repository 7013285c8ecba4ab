"""What every method takes and gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.engines import Activations, Classifier

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """Some images and the classes to explain them for.

    images: [B, C, H, W] float32, preprocessed.   activations: what the backbone gave for them.
    owner: [P] int64, the image of each (image, class) pair.   targets: [P] int64, its class.
    layers: names of the target layers.
    baseline: [classes] float32, logits of an input of zeros.
    chunk: how many masked images the classifier takes at a time.
    """

    images: Floats
    activations: Activations
    owner: NDArray[np.int64]
    targets: NDArray[np.int64]
    layers: tuple[str, ...]
    baseline: Floats
    chunk: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.images.shape[2], self.images.shape[3]


@dataclass(frozen=True)
class LayerPartition:
    """A target layer's channels in collections, for each of P (image, class) pairs.

    labels: [P, C] int32, the collection of each channel.   count: [P] int32.
    quality: [P, k_max - k_min + 1] float32, the mean dispersion-separation ratio for each number
        of collections tried; -1 where there were too few distinct channels.
    """

    name: str
    labels: NDArray[np.int32]
    count: NDArray[np.int32]
    quality: Floats


class MaskSequence(Sequence[Floats]):
    """Each pair's masks [N, H, W] float32, drawn when they are asked for.

    draws: one function for each pair.
    """

    def __init__(self, draws: Sequence[Callable[[], Floats]]) -> None:
        self._draws = tuple(draws)

    def __len__(self) -> int:
        return len(self._draws)

    @overload
    def __getitem__(self, index: int) -> Floats: ...

    @overload
    def __getitem__(self, index: slice) -> MaskSequence: ...

    def __getitem__(self, index: int | slice) -> Floats | MaskSequence:
        if isinstance(index, slice):
            return MaskSequence(self._draws[index])
        return self._draws[index]()

    def __add__(self, other: MaskSequence) -> MaskSequence:
        return MaskSequence(self._draws + other._draws)


@dataclass(frozen=True)
class MethodResult:
    """A method's result for P pairs.

    raw_saliency: [P, H, W] float32.   saliency: the same, each map scaled to [0, 1].
    layers, masks, weights, mic: see Explanation.
    """

    raw_saliency: Floats
    saliency: Floats
    layers: tuple[LayerPartition, ...]
    masks: MaskSequence
    weights: tuple[Floats, ...]
    mic: tuple[Floats, ...]


class Method(Protocol):
    """An explanation method with its options."""

    @property
    def name(self) -> str:
        """The name that the command line and results use."""
        ...

    @property
    def options(self) -> Any:
        """A frozen dataclass."""
        ...

    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch."""
        ...


class Stopwatch:
    """Adds up the seconds spent in named stages."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now

    def add(self, stages: Iterable[tuple[str, float]]) -> None:
        """Count seconds that were measured elsewhere to stages."""
        for name, seconds in stages:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's time to a stage."""
        started = self._now()
        try:
            yield
        finally:
            self.add([(name, self._now() - started)])
