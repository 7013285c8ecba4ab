"""The interface of every method: a batch of images and classes in, maps out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.engines import Activations, Classifier
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.errors import NotFiniteError, OptionError
from ccam_deploy.methods.results import BatchResult, MethodResult
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
            NotFiniteError: Logits, features, gradients or maps are not finite.
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
            NotFiniteError: Features, gradients or maps are not finite.
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


def layer_names(layers: str | Sequence[str]) -> tuple[str, ...]:
    """Names of layers as methods hold them: one that stands alone, or any sequence."""
    return (layers,) if isinstance(layers, str) else tuple(layers)


def not_finite(layer: str) -> NotFiniteError:
    """Make the error for a layer whose features or gradients are NaN or infinite."""
    return NotFiniteError(
        f'layer "{layer}" has NaN or infinite features or gradients for these images; '
        "a bundle in fp32 has the wider range"
    )


def require_finite_masked(values: Floats) -> None:
    """Raise NotFiniteError where logits under masks, or what is made of them, are not finite."""
    if not np.isfinite(values).all():
        raise NotFiniteError(
            "the classifier gives NaN or infinite logits for these images under masks; "
            "a bundle in fp32 has the wider range"
        )


def require_finite_logits(logits: Floats) -> None:
    """Raise NotFiniteError where logits are NaN or infinite."""
    if not np.isfinite(logits).all():
        raise NotFiniteError("the classifier gives NaN or infinite logits for these images")
