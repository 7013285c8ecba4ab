"""Do a bundle's graphs compute what the model computed? At export against PyTorch, later against
what the export recorded.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from ccam_deploy.bundle import IMAGE_GRADIENTS, OPTIONAL_GRAPHS, Bundle, Fidelity
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import IntegrityError, brief
from ccam_deploy.evaluate.similarity import spearman, ssim, top_overlap
from ccam_deploy.explanation import Explanation
from ccam_deploy.kernels import cpu
from ccam_deploy.methods import Batch, CollectionCAM, Stopwatch

Floats = NDArray[np.float32]

_HALF = {
    "logits": 2e-2,
    "masked_logits": 2e-2,
    "features": 2e-2,
    "gradients": 0.3,
    "saliency_rank": 0.9,
    "saliency_similarity": 0.8,
    "saliency_overlap": 0.8,
    "head": 2e-2,
    "input_gradient": 0.3,
    "guided_gradient": 0.3,
    "excitation": 1e-2,
}
_EIGHT_BITS = {**_HALF, "masked_logits": 0.2}
TOLERANCE = {
    "fp32": {
        "logits": 1e-4,
        "masked_logits": 1e-4,
        "features": 1e-4,
        "gradients": 1e-2,
        "saliency_rank": 0.99,
        "saliency_similarity": 0.98,
        "saliency_overlap": 0.95,
        "head": 1e-4,
        "input_gradient": 1e-2,
        "guided_gradient": 1e-2,
        "excitation": 1e-2,
    },
    "fp16": _HALF,
    "int8": _EIGHT_BITS,
    "fp8": _EIGHT_BITS,
}
_RANDOM_HALF = {
    "logits": 0.1,
    "masked_logits": 0.1,
    "features": 0.4,
    "gradients": 10.0,
    "saliency_rank": -1.0,
    "saliency_similarity": -1.0,
    "saliency_overlap": 0.0,
    "head": 0.1,
    "input_gradient": 10.0,
    "guided_gradient": 10.0,
    "excitation": 0.2,
}
_RANDOM_EIGHT_BITS = {**_RANDOM_HALF, "masked_logits": 0.4}
RANDOM_TOLERANCE = {
    "fp32": {
        "logits": 1e-3,
        "masked_logits": 1e-3,
        "features": 1e-2,
        "gradients": 0.2,
        "saliency_rank": 0.9,
        "saliency_similarity": 0.8,
        "saliency_overlap": 0.8,
        "head": 1e-3,
        "input_gradient": 0.2,
        "guided_gradient": 0.2,
        "excitation": 0.2,
    },
    "fp16": _RANDOM_HALF,
    "int8": _RANDOM_EIGHT_BITS,
    "fp8": _RANDOM_EIGHT_BITS,
}
"""For networks that were not trained: they amplify rounding, and their ReLUs flip. In half
precision their gradients may vanish, so only what runs forward is compared."""
_AT_LEAST = ("saliency_rank", "saliency_similarity", "saliency_overlap")


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


def compare(got: Observation, expected: Observation) -> Fidelity:
    """Measure how far one observation is from another of the same images."""
    excitation = tuple(map(_median_error, got.excitation, expected.excitation))
    pairs = list(zip(got.saliency, expected.saliency, strict=True))
    ranks = [spearman(one, other) for one, other in pairs]
    same = [
        np.array_equal(one, other)
        for mine, theirs in zip(got.labels, expected.labels, strict=True)
        for one, other in zip(mine, theirs, strict=True)
    ]
    return Fidelity(
        logits=relative_error(got.logits, expected.logits),
        masked_logits=relative_error(got.masked_logits, expected.masked_logits),
        features=tuple(map(_median_error, got.features, expected.features)),
        gradients=tuple(map(_median_error, got.gradients, expected.gradients)),
        saliency_rank=float(np.median(ranks)),
        saliency_similarity=float(np.median([ssim(one, other) for one, other in pairs])),
        saliency_overlap=float(np.median([top_overlap(one, other) for one, other in pairs])),
        worst_saliency_rank=float(np.min(ranks)),
        partitions=float(np.mean(same)),
        images=len(got.images),
        excitation=excitation or UNSET,
        **{
            name: (relative_error if name == "head" else _median_error)(
                values, expected.optional[name]
            )
            for name, values in got.optional.items()
        },
    )


def _median_error(got: Floats, expected: Floats) -> float:
    """The median over images of the relative error.

    A ReLU whose input rounds to the one side of zero here and to the other there changes the
    gradient of that image by a thousandth; the error of a wrong graph is in every image.
    Infinite where any image's error is.
    """
    errors = [relative_error(g, e) for g, e in zip(got, expected, strict=True)]
    return float(np.median(errors)) if np.isfinite(errors).all() else float("inf")


def relative_error(got: Floats, expected: Floats) -> float:
    """‖got − expected‖ / ‖expected‖ in the Euclidean norm; infinite where got is not finite."""
    wide = expected.astype(np.float64)
    difference = float(np.linalg.norm((got - wide).ravel()))
    if not np.isfinite(difference):
        return float("inf")
    norm = float(np.linalg.norm(wide.ravel()))
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def failures(
    fidelity: Fidelity, tolerance: Mapping[str, float], layers: Sequence[str]
) -> list[str]:
    """What breaks its tolerance, as phrases for a message; empty where nothing does.

    Bounds for optional graphs that were not run do not count.
    """
    found = []
    for name, bound in tolerance.items():
        value = getattr(fidelity, name)
        if value is UNSET:
            continue
        values = dict(zip(layers, value, strict=True)) if isinstance(value, tuple) else {"": value}
        for layer, measured in values.items():
            good = measured >= bound if name in _AT_LEAST else measured <= bound
            if not good:
                of = f" of {layer}" if layer else ""
                side = "below" if name in _AT_LEAST else "above"
                found.append(f"{name}{of} {measured:.3g} is {side} {bound:g}")
    return found


def save(path: Path, observation: Observation) -> None:
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


def load(path: Path) -> Observation:
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


def verify(
    bundle: Bundle,
    classifier: Classifier,
    precision: str,
    explain: Callable[[Floats, NDArray[np.int64]], Explanation] | None = None,
) -> tuple[Fidelity, list[str]]:
    """Run a bundle's graphs on the images recorded at export and compare all values.

    explain: how maps and partitions are made here, which a GPU does with kernels of its own; by
        default by the CPU's kernels between the classifier's graphs.
    Returns the comparison, and phrases for what breaks its tolerance.
    """
    chosen = bundle.precision(precision)
    layers = [layer.name for layer in bundle.manifest.layers]
    expected = load(bundle.path(chosen.reference))
    recorded = {*expected.optional, *(("excitation",) if expected.excitation else ())}
    for name in OPTIONAL_GRAPHS:
        if name in chosen.graphs and name not in recorded:
            raise IntegrityError(f"{chosen.reference} holds no {name}; export the bundle again")
    got = observe(classifier, expected.images, layers, expected.targets, chosen.graphs).summary()
    if explain is not None:
        made = explain(expected.images, expected.targets)
        labels = tuple(layer.labels for layer in made.layers)
        got = replace(got, labels=labels, saliency=made.saliency)
    fidelity = compare(got, expected)
    return fidelity, failures(fidelity, chosen.tolerance, layers)
