"""What a classifier computes for some images, run and recorded."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import OPTIONAL_GRAPHS
from ccam_deploy.engines import Activations, Classifier
from ccam_deploy.errors import IntegrityError, brief
from ccam_deploy.kernels import cpu
from ccam_deploy.methods import Batch, CollectionCAM, MethodResult, Stopwatch

CHECKED_IMAGES = 8
"""On how many images graphs are compared with PyTorch at least."""

_MASKS = 4
_ARRAYS = ("images", "targets", "logits", "masked_logits", "saliency")
_OPTIONAL_ARRAYS = ("head", "input_gradient", "guided_gradient")
_LAYERED = ("features", "gradients", "labels", "excitation")


@dataclass(frozen=True)
class Observation:
    """What a classifier computes for some images, explained for one class each.

    Attributes:
        images: [B, C, H, W] float32, preprocessed.
        targets: [B] int64, the classes.
        logits: [B, classes] float32.
        masked_logits: [4·B, classes] float32, of each image under four fixed masks.
        features: Per layer [B, C, h, w] float32; in a summary mean and deviation, [B, C, 2].
        gradients: The same of the logit's gradients.
        labels: Per layer [B, C] int32, the partitions.
        saliency: [B, H, W] float32 in [0, 1].
        head: [B, classes] float32, logits of the last layer's features; None, like the two
            below, where the classifier has no graph for it.
        input_gradient: [B, C, H, W] float32, the images' gradient.
        guided_gradient: [B, C, H, W] float32, the images' guided gradient.
        excitation: Per layer [B, h, w] float32, of the class and half of its dual together; empty
            where the classifier has no graph for it.
    """

    images: Floats
    targets: NDArray[np.int64]
    logits: Floats
    masked_logits: Floats
    features: tuple[Floats, ...]
    gradients: tuple[Floats, ...]
    labels: tuple[NDArray[np.int32], ...]
    saliency: Floats
    head: Floats | None = None
    input_gradient: Floats | None = None
    guided_gradient: Floats | None = None
    excitation: tuple[Floats, ...] = ()

    def optional_graphs(self) -> tuple[str, ...]:
        """Return the names of the optional graphs that were run."""
        values = {name: getattr(self, name) for name in OPTIONAL_GRAPHS}
        return tuple(name for name, value in values.items() if value is not None and len(value))

    def first(self, count: int) -> Observation:
        """Return the observation of the first few images alone."""

        def cut(values: Floats | None) -> Floats | None:
            return None if values is None else values[:count]

        return Observation(
            images=self.images[:count],
            targets=self.targets[:count],
            logits=self.logits[:count],
            masked_logits=self.masked_logits[: _MASKS * count],
            features=tuple(values[:count] for values in self.features),
            gradients=tuple(values[:count] for values in self.gradients),
            labels=tuple(values[:count] for values in self.labels),
            saliency=self.saliency[:count],
            head=cut(self.head),
            input_gradient=cut(self.input_gradient),
            guided_gradient=cut(self.guided_gradient),
            excitation=tuple(values[:count] for values in self.excitation),
        )

    def summary(self) -> Observation:
        """Return the same with mean and deviation of each channel in place of the maps."""
        psi = list(map(cpu.channel_statistics, self.features, self.gradients))
        return replace(
            self,
            features=tuple(values[..., :2] for values in psi),
            gradients=tuple(values[..., 2:] for values in psi),
        )


def checked_views(images: Floats, least: int = CHECKED_IMAGES) -> Floats:
    """Add views of images until there are enough to tell a flipped activation from a wrong graph.

    An activation at a bend rounds to the other side of it in one image of five or so. The median
    of eight does not see that; the median of two would be half of it.

    Args:
        images: [B, C, H, W] float32, at least one.
        least: How many are wanted.

    Returns:
        [max(B, least), C, H, W] float32, at most [8·B, ...]: the images, then mirrored and upside
        down, then the same shifted by a third of their size.
    """
    flips = [images, images[..., ::-1], images[..., ::-1, :], images[..., ::-1, ::-1]]
    shift = images.shape[2] // 3, images.shape[3] // 3
    views = [*flips, *(np.roll(view, shift, (2, 3)) for view in flips)]
    return np.ascontiguousarray(np.concatenate(views)[: max(len(images), least)])


def fixed_masks(height: int, width: int) -> Floats:
    """Four masks [4, H, W] float32: slopes from left, right, top and bottom."""
    across = np.broadcast_to(np.linspace(0, 1, width, dtype=np.float32), (height, width))
    down = np.broadcast_to(np.linspace(0, 1, height, dtype=np.float32)[:, None], (height, width))
    return np.stack([across, 1 - across, down, 1 - down])


def observe(
    classifier: Classifier,
    images: Floats,
    layers: Sequence[str],
    targets: NDArray[np.int64] | None = None,
    graphs: Collection[str] = (),
    chunk: int = 8,
) -> Observation:
    """Run everything that an explanation needs on some images and keep the values.

    Args:
        classifier: What computes.
        images: [B, C, H, W] float32, preprocessed.
        layers: Names of the classifier's target layers.
        targets: [B] int64, the classes to explain; the best of each image by default.
        graphs: Names of the classifier's graphs; the optional ones among them are run as well.
        chunk: The most masked images that the classifier runs at a time.

    Returns:
        All that was computed.
    """
    activations = classifier.backbone(images)
    classes = activations.logits.argmax(axis=1) if targets is None else targets
    rows = np.arange(len(images), dtype=np.int64)
    one_hot = np.zeros_like(activations.logits)
    one_hot[rows, classes] = 1
    half = np.float32(0.5) * one_hot
    gradients = classifier.gradients(activations, one_hot)

    def input_gradient(name: str) -> Floats | None:
        if name not in graphs:
            return None
        return classifier.input_gradient(images, one_hot, guided=name == "guided_gradient")

    masks = fixed_masks(*images.shape[2:])
    masked = [classifier.masked_logits(images, masks, np.repeat(row, _MASKS)) for row in rows]
    baseline = np.zeros(activations.logits.shape[1], np.float32)
    batch = Batch(images, activations, rows, classes, tuple(layers), baseline, chunk)
    result = explain_gradients(CollectionCAM(), classifier, gradients, batch)
    return Observation(
        images=images,
        targets=classes,
        logits=activations.logits,
        masked_logits=np.concatenate(masked),
        features=activations.features,
        gradients=gradients,
        labels=tuple(layer.labels for layer in result.layers),
        saliency=cpu.min_max(result.raw_saliency),
        head=_head_logits(classifier, activations) if "head" in graphs else None,
        input_gradient=input_gradient("input_gradient"),
        guided_gradient=input_gradient("guided_gradient"),
        excitation=classifier.excitation(images, one_hot, half) if "excitation" in graphs else (),
    )


def _head_logits(classifier: Classifier, activations: Activations) -> Floats:
    return classifier.head_logits(activations.features[-1], activations.rest)


@dataclass(frozen=True)
class _Given:
    """A classifier's masked forwards, with gradients that were computed before; see Classifier."""

    classifier: Classifier
    values: tuple[Floats, ...]

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        return self.values

    def masked_logits(self, images: Floats, masks: Floats, owner: Classes) -> Floats:
        return self.classifier.masked_logits(images, masks, owner)


def explain_gradients(
    method: CollectionCAM, classifier: Classifier, gradients: tuple[Floats, ...], batch: Batch
) -> MethodResult:
    """Explain with gradients that were computed before.

    Args:
        method: Collection-CAM with its options.
        classifier: What runs the masked forwards.
        gradients: [P, C, h, w] float32 of each target layer.
        batch: What is explained.

    Returns:
        The same as the method gives where the classifier computes these gradients.
    """
    return method.explain(_Given(classifier, gradients), batch, Stopwatch())  # type: ignore[arg-type]


def save_observation(path: Path, observation: Observation, given: int | None = None) -> None:
    """Write an observation's summary to an .npz file.

    Args:
        path: The file.
        observation: What is written.
        given: How many of its images `checked_views` was given: the others are not written, but
            made of these again where the file is read. None to write all.
    """
    summary = observation.summary()
    names = [*_ARRAYS, *(name for name in _OPTIONAL_ARRAYS if name in summary.optional_graphs())]
    values: dict[str, Any] = {name: getattr(summary, name) for name in names}
    for name in _LAYERED:
        for index, maps in enumerate(getattr(summary, name)):
            values[f"{name}_{index}"] = maps
    values["images"] = observation.images[:given]
    np.savez_compressed(path, **values)


def load_observation(path: Path) -> Observation:
    """Read an observation's summary from the file that save_observation wrote.

    Raises:
        IntegrityError: The file is missing or another one.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as values:
            arrays = {name: values[name] for name in _ARRAYS}
            arrays |= {name: values[name] for name in _OPTIONAL_ARRAYS if name in values.files}
            layers: dict[str, Any] = {name: tuple(_layers(values, name)) for name in _LAYERED}
        count = len(arrays["targets"])
        arrays["images"] = checked_views(arrays["images"], count)
        if len(arrays["images"]) != count:
            raise ValueError(f"it has {len(arrays['images'])} images for {count} targets")
        return Observation(**arrays, **layers)
    except Exception as error:
        raise IntegrityError(f"{path} is no record of an export: {brief(error)}") from error


def _layers(values: Mapping[str, Floats], name: str) -> Iterator[Floats]:
    """The arrays of one quantity, layer by layer."""
    for index in range(sum(key.rpartition("_")[0] == name for key in values)):
        yield values[f"{name}_{index}"]
