"""What a classifier computes for some images, run and recorded."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import IMAGE_GRADIENTS, OPTIONAL_GRAPHS
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import IntegrityError, brief
from ccam_deploy.kernels import cpu
from ccam_deploy.methods import Batch, CollectionCAM, Stopwatch


@dataclass(frozen=True)
class Observation:
    """What a classifier gives for some images, explained for their best class.

    images: [B, C, H, W] float32.   targets: [B] int64.   logits: [B, classes] float32.
    masked_logits: [4·B, classes] float32, of each image under four fixed masks.
    features, gradients: per layer; feature maps [B, C, h, w], or their statistics [B, C, 2].
    labels: per layer [B, C] int32, the partitions.   saliency: [B, H, W] float32 in [0, 1].
    optional: what the optional graphs gave that were run, by name: the head's logits
        [B, classes] float32 of the last layer's features, gradients [B, C, H, W] of the images.
    excitation: [B, h, w] float32 per layer, of the class and half of its dual together; none where
        the classifier has no graph for it.
    """

    images: Floats
    targets: NDArray[np.int64]
    logits: Floats
    masked_logits: Floats
    features: tuple[Floats, ...]
    gradients: tuple[Floats, ...]
    labels: tuple[NDArray[np.int32], ...]
    saliency: Floats
    optional: dict[str, Floats] = field(default_factory=dict)
    excitation: tuple[Floats, ...] = ()

    @property
    def input_gradients(self) -> dict[str, Floats]:
        """The images' gradients among the optional values."""
        return {name: self.optional[name] for name in IMAGE_GRADIENTS if name in self.optional}

    def summary(self) -> Observation:
        """The same with mean and deviation of each channel in place of the maps."""
        psi = list(map(cpu.channel_statistics, self.features, self.gradients))
        return replace(
            self,
            features=tuple(values[..., :2] for values in psi),
            gradients=tuple(values[..., 2:] for values in psi),
        )


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

    graphs: those of the classifier; the optional ones among them are run as well.
    """
    activations = classifier.backbone(images)
    classes = activations.logits.argmax(axis=1) if targets is None else targets
    rows = np.arange(len(images), dtype=np.int64)
    one_hot = np.zeros_like(activations.logits)
    one_hot[rows, classes] = 1
    half = np.float32(0.5) * one_hot
    gradients = classifier.gradients(activations, one_hot)
    optional = {
        name: classifier.input_gradient(images, one_hot, guided=name == "guided_gradient")
        for name in IMAGE_GRADIENTS
        if name in graphs
    }
    if "head" in graphs:
        optional["head"] = classifier.head_logits(activations.features[-1])
    masks = fixed_masks(*images.shape[2:])
    masked = [classifier.masked_logits(images, masks, np.repeat(row, 4)) for row in rows]
    baseline = np.zeros(activations.logits.shape[1], np.float32)
    batch = Batch(images, activations, rows, classes, tuple(layers), baseline, chunk)
    result = CollectionCAM().explain(classifier, batch, Stopwatch())
    return Observation(
        images,
        classes,
        activations.logits,
        np.concatenate(masked),
        activations.features,
        gradients,
        tuple(layer.labels for layer in result.layers),
        cpu.min_max(result.raw_saliency),
        optional,
        classifier.excitation(images, one_hot, half) if "excitation" in graphs else (),
    )


def save_observation(path: Path, observation: Observation) -> None:
    """Write an observation's summary to an .npz file."""
    brief = observation.summary()
    values: dict[str, Any] = {
        "images": brief.images,
        "targets": brief.targets,
        "logits": brief.logits,
        "masked_logits": brief.masked_logits,
        "saliency": brief.saliency,
        **brief.optional,
    }
    for index in range(len(brief.labels)):
        values[f"features_{index}"] = brief.features[index]
        values[f"gradients_{index}"] = brief.gradients[index]
        values[f"labels_{index}"] = brief.labels[index]
    for index, maps in enumerate(brief.excitation):
        values[f"excitation_{index}"] = maps
    np.savez_compressed(path, **values)


def load_observation(path: Path) -> Observation:
    """Read what `save` wrote. Raises IntegrityError for another file."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as values:
            layers = range(sum(name.startswith("labels_") for name in values.files))
            excited = range(sum(name.startswith("excitation_") for name in values.files))
            return Observation(
                values["images"],
                values["targets"],
                values["logits"],
                values["masked_logits"],
                tuple(values[f"features_{index}"] for index in layers),
                tuple(values[f"gradients_{index}"] for index in layers),
                tuple(values[f"labels_{index}"] for index in layers),
                values["saliency"],
                {name: values[name] for name in OPTIONAL_GRAPHS if name in values.files},
                tuple(values[f"excitation_{index}"] for index in excited),
            )
    except Exception as error:
        raise IntegrityError(f"{path} is no record of an export: {brief(error)}") from error
