"""The interface of every method: a batch of images and classes in, maps out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.engines import Activations, Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.kernels import cpu
from ccam_deploy.methods.stopwatch import Stopwatch
from ccam_deploy.targets import classes_of, first_occurrences


@dataclass(frozen=True)
class Batch:
    """Some images and the classes to explain them for.

    Attributes:
        images: [B, C, H, W] float32, preprocessed.
        activations: The backbone's outputs for them.
        owner: [P] int64, the image of each (image, class) pair, in ascending order.
        targets: [P] int64, the class of each pair.
        layers: Names of the target layers, from the shallowest to the deepest.
        baseline: [classes] float32, logits of an input of zeros.
        chunk: The most masks or other inputs that a method makes at a time.
        mean: Per channel, of pixels in [0, 1], that the images were normalised with.
        std: Per channel, of pixels in [0, 1], that the images were normalised with.
        activation: What makes probabilities of logits.
    """

    images: Floats
    activations: Activations
    owner: Classes
    targets: Classes
    layers: tuple[str, ...]
    baseline: Floats
    chunk: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    activation: Activation = "softmax"

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
        pixels: Floats = self.images * std + mean
        return pixels

    def colour(self, level: float) -> Floats:
        """Make grey pixels as the network gets them.

        Args:
            level: Their brightness, in [0, 1].

        Returns:
            [C, 1, 1] float32.
        """
        values = (level - np.array(self.mean)) / np.array(self.std)
        shape = (self.images.shape[1], 1, 1)
        return np.broadcast_to(values.astype(np.float32)[:, None, None], shape)

    def place_of(self, layer: str) -> int:
        """Find a target layer's place among the layers, the last place for an empty name.

        Raises:
            OptionError: The bundle has no such layer.
        """
        return places_of([layer], self.layers)[0] if layer else len(self.layers) - 1


@dataclass(frozen=True)
class LayerPartition:
    """The collections of a target layer's channels, for each of P (image, class) pairs.

    Attributes:
        name: The layer.
        labels: [P, C] int32, the collection of each channel.
        count: [P] int32, how many collections there are.
        quality: [P, k_max - k_min + 1] float32, the mean dispersion-separation ratio for each
            number of collections tried; -1 where there were too few distinct channels.
    """

    name: str
    labels: NDArray[np.int32]
    count: NDArray[np.int32]
    quality: Floats

    def take(self, rows: NDArray[np.intp]) -> LayerPartition:
        """Keep some of the pairs."""
        return LayerPartition(self.name, self.labels[rows], self.count[rows], self.quality[rows])


class MaskSequence(Sequence[Floats]):
    """The masks [N, H, W] float32 of each pair, drawn on access.

    Args:
        draws: A function for each pair, which draws its masks.
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

    def take(self, rows: NDArray[np.intp]) -> MaskSequence:
        """Keep some of the pairs."""
        return MaskSequence([self._draws[row] for row in rows])

    def __add__(self, other: MaskSequence) -> MaskSequence:
        return MaskSequence(self._draws + other._draws)


@dataclass(frozen=True)
class MethodResult:
    """A method's result for P pairs.

    Attributes:
        raw_saliency: [P, H, W] float32, as the method defines it.
        saliency: [P, H, W] float32, each map scaled to [0, 1].
        layers: See Explanation.
        masks: See Explanation.
        weights: See Explanation.
        mic: See Explanation.
    """

    raw_saliency: Floats
    saliency: Floats
    layers: tuple[LayerPartition, ...]
    masks: MaskSequence
    weights: tuple[Floats, ...]
    mic: tuple[Floats, ...]

    @classmethod
    def of_maps(
        cls,
        raw: Floats,
        weights: Sequence[Floats] = (),
        mic: Sequence[Floats] = (),
        saliency: Floats | None = None,
    ) -> MethodResult:
        """Make the result of a method that keeps no masks.

        Args:
            raw: [P, H, W] float32, the maps.
            weights: [N] float32 for each pair, or nothing.
            mic: [N] float32 for each pair, or nothing.
            saliency: [P, H, W] float32, the maps scaled to [0, 1], where that is done.

        Raises:
            BackendError: A map is not finite.
        """
        if not np.isfinite(raw).all():
            raise BackendError(
                "the maps have NaN or infinite values for these images; "
                "a bundle in fp32 has the wider range"
            )
        none = [np.zeros(0, np.float32)] * len(raw)
        # Unlike a lambda, this lets results be pickled.
        masks = MaskSequence([partial(_no_masks, raw.shape[1:])] * len(raw))
        scaled = cpu.min_max(raw) if saliency is None else saliency
        return cls(raw, scaled, (), masks, tuple(weights or none), tuple(mic or none))

    @classmethod
    def joined(cls, parts: Sequence[MethodResult]) -> MethodResult:
        """Put the results of one method for different pairs together, in order."""
        if len(parts) == 1:
            return parts[0]
        masks = parts[0].masks
        for part in parts[1:]:
            masks = masks + part.masks
        return cls(
            np.concatenate([part.raw_saliency for part in parts]),
            np.concatenate([part.saliency for part in parts]),
            tuple(map(_join_layers, zip(*(part.layers for part in parts), strict=True))),
            masks,
            tuple(weights for part in parts for weights in part.weights),
            tuple(mic for part in parts for mic in part.mic),
        )

    def take(self, rows: NDArray[np.intp]) -> MethodResult:
        """Keep some of the pairs, in the order of `rows`."""
        return MethodResult(
            self.raw_saliency[rows],
            self.saliency[rows],
            tuple(layer.take(rows) for layer in self.layers),
            self.masks.take(rows),
            tuple(self.weights[row] for row in rows),
            tuple(self.mic[row] for row in rows),
        )


@dataclass(frozen=True)
class BatchResult:
    """The result of a method's run on a batch of B images and P pairs.

    Attributes:
        logits: [B, classes] float32, of the images.
        owner: [P] int64, the image of each pair, in ascending order.
        targets: [P] int64, the class of each pair; no pair comes twice.
        result: The method's result for the pairs.
    """

    logits: Floats
    owner: Classes
    targets: Classes
    result: MethodResult


@dataclass(frozen=True)
class Context:
    """The engines that methods run on, and the bundle's facts that they need.

    Attributes:
        classifier: The engines.
        layers: Names of the target layers, from the shallowest to the deepest.
        baseline: [classes] float32, logits of an input of zeros.
        batch_size: The most pairs, and the most inputs that a method makes, at a time.
        mean: Per channel, of pixels in [0, 1], that images are normalised with.
        std: Per channel, of pixels in [0, 1], that images are normalised with.
        activation: What makes probabilities of logits.
        input: Channels, height and width of an image.
    """

    classifier: Classifier
    layers: tuple[str, ...]
    baseline: Floats
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    activation: Activation
    input: tuple[int, int, int]

    def noise(self, images: int) -> Floats:
        """Make images [B, C, H, W] float32 that take as long as any others."""
        shape = images, *self.input
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def batch(
        self, images: Floats, activations: Activations, owner: Classes, targets: Classes
    ) -> Batch:
        """Make a batch of images and pairs; see Batch."""
        return Batch(
            images,
            activations,
            owner,
            targets,
            self.layers,
            self.baseline,
            self.batch_size,
            self.mean,
            self.std,
            self.activation,
        )


@dataclass(frozen=True)
class Method(ABC):
    """An explanation method; its fields are its options, which all have defaults.

    Attributes:
        name: The method's name on the command line and in results.
        keeps_masks: Whether its results have masks, layer by layer.
    """

    name: ClassVar[str]
    keeps_masks: ClassVar[bool] = False

    def run(
        self, images: Floats, owner: Classes, codes: Classes, context: Context, clock: Stopwatch
    ) -> BatchResult:
        """Run the backbone, look up the classes, and explain every pair.

        Args:
            images: [B, C, H, W] float32, preprocessed, at most a batch.
            owner: [P] int64, the image of each pair, in ascending order.
            codes: [P] int64, a class, or -1 - r for the image's class of rank r.
            context: The engines.
            clock: Counts the seconds of each stage.

        Raises:
            OptionError: The bundle cannot meet the method's options.
            BackendError: Logits, features, gradients or maps are not finite.
        """
        with clock.stage("backbone"):
            activations = context.classifier.backbone(images)
        require_finite_logits(activations.logits)
        targets = classes_of(owner, codes, activations.logits)
        kept = first_occurrences(owner, targets)
        owner, targets = owner[kept], targets[kept]
        parts = []
        for rows in row_chunks(len(owner), context.batch_size):
            batch = context.batch(images, activations, owner[rows], targets[rows])
            parts.append(self.explain(context.classifier, batch, clock))
        return BatchResult(activations.logits, owner, targets, MethodResult.joined(parts))

    @abstractmethod
    def explain(self, classifier: Classifier, batch: Batch, clock: Stopwatch) -> MethodResult:
        """Explain every pair of a batch.

        Args:
            classifier: The engines.
            batch: The images and pairs.
            clock: Counts the seconds of each stage.

        Raises:
            OptionError: The bundle cannot meet the method's options.
            BackendError: Features, gradients or maps are not finite.
        """

    def warm_up(self, images: int, context: Context, progress: Callable[[str], None]) -> None:
        """Prepare for calls of 1 to `images` images, so that none takes longer than others.

        Here two calls are made on noise; methods on a GPU override this.

        Args:
            images: The most images of a call; at most a batch.
            context: The engines.
            progress: Called with a line for each step.

        Raises:
            OptionError: The bundle cannot meet the method's options.
            BackendError: The engine failed, or there is too little memory.
        """
        for count in sorted({1, images}):
            progress(f"{count} images" if count > 1 else "one image")
            best = np.full(count, -1, np.int64)
            self.run(context.noise(count), np.arange(count), best, context, Stopwatch())

    def require_support(self, classifier: Classifier, batch: Batch) -> None:
        """Make sure that a bundle has all that `explain` needs, in a pass or two of its graphs.

        Here the pair is explained; methods that would take more passes override this.

        Args:
            classifier: The engines.
            batch: One pair.

        Raises:
            OptionError: As `explain`, except for what depends on the images.
            BackendError: As `explain`, except for what depends on the images.
        """
        self.explain(classifier, batch, Stopwatch())


def no_masks(method: str) -> OptionError:
    """Make the error for drawing the masks of a method that keeps none."""
    return OptionError(f"method {method} keeps no masks to draw; collection-cam does")


def places_of(layers: Sequence[str], names: Sequence[str]) -> list[int]:
    """Find the places of some layers among the bundle's, from the shallowest to the deepest.

    Args:
        layers: Names of layers, in any order.
        names: Names of the bundle's target layers.

    Raises:
        OptionError: The bundle does not have one of the layers.
    """
    for layer in layers:
        if layer not in names:
            raise OptionError(f'layer "{layer}" is not in the bundle; it has {", ".join(names)}')
    return [place for place, name in enumerate(names) if name in layers]


def not_finite(layer: str) -> BackendError:
    """Make the error for a layer whose features or gradients are NaN or infinite."""
    return BackendError(
        f'layer "{layer}" has NaN or infinite features or gradients for these images; '
        "a bundle in fp32 has the wider range"
    )


def require_finite_logits(logits: Floats) -> None:
    """Raise BackendError where logits are NaN or infinite."""
    if not np.isfinite(logits).all():
        raise BackendError("the classifier gives NaN or infinite logits for these images")


def _no_masks(size: tuple[int, ...]) -> Floats:
    return np.zeros((0, *size), np.float32)


def _join_layers(parts: tuple[LayerPartition, ...]) -> LayerPartition:
    return LayerPartition(
        parts[0].name,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.count for part in parts]),
        np.concatenate([part.quality for part in parts]),
    )
