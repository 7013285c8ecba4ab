"""What every method takes and gives."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Activations, Classifier
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.kernels import cpu


@dataclass(frozen=True)
class Batch:
    """Some images and the classes to explain them for.

    images: [B, C, H, W] float32, preprocessed.   activations: what the backbone gave for them.
    owner: [P] int64, the image of each (image, class) pair.   targets: [P] int64, its class.
    layers: names of the target layers.
    baseline: [classes] float32, logits of an input of zeros.
    chunk: how many masked images the classifier takes at a time.
    mean, std: per channel, of pixels in [0, 1], that the images were normalised with.
    """

    images: Floats
    activations: Activations
    owner: NDArray[np.int64]
    targets: NDArray[np.int64]
    layers: tuple[str, ...]
    baseline: Floats
    chunk: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def one_hot(self) -> Floats:
        """[P, classes] float32, 1 at each pair's class: the gradient of its logit."""
        rows = np.zeros((len(self.targets), self.activations.logits.shape[1]), np.float32)
        rows[np.arange(len(rows)), self.targets] = 1
        return rows

    @property
    def pixels(self) -> Floats:
        """The images before they were normalised, [B, C, H, W] float32 in [0, 1]."""
        mean, std = np.array([self.mean, self.std], np.float32)[:, :, None, None]
        found: Floats = self.images * std + mean
        return found

    def colour(self, level: float) -> Floats:
        """Grey pixels of a level in [0, 1] as the network gets them, [C, 1, 1] float32."""
        found = (level - np.array(self.mean)) / np.array(self.std)
        shape = (self.images.shape[1], 1, 1)
        return np.broadcast_to(found.astype(np.float32)[:, None, None], shape)

    def place_of(self, layer: str) -> int:
        """Where a target layer stands among the layers, the final one for an empty name.

        Raises OptionError for one that is not there.
        """
        return places_of([layer], self.layers)[0] if layer else len(self.layers) - 1


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

    @classmethod
    def of_maps(
        cls, raw: Floats, weights: Sequence[Floats] = (), mic: Sequence[Floats] = ()
    ) -> MethodResult:
        """A result of maps [P, H, W] float32 alone, whose masks, if it had any, were not kept.

        Raises BackendError for maps that are not finite.
        """
        if not np.isfinite(raw).all():
            raise BackendError(
                "the maps have NaN or infinite values for these images; "
                "a bundle in fp32 has the wider range"
            )
        none = [np.zeros(0, np.float32)] * len(raw)
        empty = np.zeros((0, *raw.shape[1:]), np.float32)
        masks = MaskSequence([lambda: empty] * len(raw))
        return cls(raw, cpu.min_max(raw), (), masks, tuple(weights or none), tuple(mic or none))


@dataclass(frozen=True)
class Method(ABC):
    """An explanation method; its fields are its options, all of which have defaults.

    Attributes:
        name: What the command line and results call it.

    """

    name: ClassVar[str]

    @abstractmethod
    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch.

        Raises OptionError for options that the bundle cannot meet, BackendError for features or
        gradients that are not finite.
        """

    def require_support(self, classifier: Classifier, batch: Batch) -> None:
        """See that a bundle has all that `explain` needs; a pass or two of its graphs.

        Methods that explain in more than that see it in another way.   batch: of a single pair.
        Raises what `explain` would, but for what depends on the images.
        """
        self.explain(classifier, batch, Stopwatch())


def places_of(layers: Sequence[str], names: Sequence[str]) -> list[int]:
    """Where some layers stand among the bundle's, from the shallowest to the deepest.

    Raises OptionError for one that is not there.
    """
    for layer in layers:
        if layer not in names:
            raise OptionError(f'layer "{layer}" is not in the bundle; it has {", ".join(names)}')
    return [place for place, name in enumerate(names) if name in layers]


def not_finite(layer: str) -> BackendError:
    """The error for a layer whose features or gradients are NaN or infinite."""
    return BackendError(
        f'layer "{layer}" has NaN or infinite features or gradients for these images; '
        "a bundle in fp32 has the wider range"
    )


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
