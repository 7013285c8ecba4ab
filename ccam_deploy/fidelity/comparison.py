"""How far one observation is from another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import UNSET, UnsetType

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Fidelity
from ccam_deploy.fidelity.observation import Observation
from ccam_deploy.fidelity.similarity import spearman, ssim, top_overlap


def compare_observations(actual: Observation, expected: Observation) -> Fidelity:
    """Measure how far one observation is from another of the same images.

    Args:
        actual: What the graphs compute.
        expected: What PyTorch computes, or computed at the export.

    Returns:
        The differences, with a value for each optional graph that `actual` has.
    """
    maps = list(zip(actual.saliency, expected.saliency, strict=True))
    ranks = [spearman(*pair) for pair in maps]
    alike = [ssim(*pair) for pair in maps]
    shared = [top_overlap(*pair) for pair in maps]
    gradients = list(map(_errors, actual.gradients, expected.gradients))
    equal_partitions = [
        np.array_equal(labels, expected_labels)
        for layer, expected_layer in zip(actual.labels, expected.labels, strict=True)
        for labels, expected_labels in zip(layer, expected_layer, strict=True)
    ]
    return Fidelity(
        logits=relative_error(actual.logits, expected.logits),
        masked_logits=relative_error(actual.masked_logits, expected.masked_logits),
        features=tuple(map(_median_error, actual.features, expected.features)),
        gradients=tuple(map(_median, gradients)),
        saliency_rank=float(np.median(ranks)),
        saliency_similarity=float(np.median(alike)),
        saliency_overlap=float(np.median(shared)),
        worst_saliency_rank=float(np.min(ranks)),
        partitions=float(np.mean(equal_partitions)),
        images=len(actual.images),
        head=_if_run(relative_error, actual.head, expected.head),
        input_gradient=_if_run(_median_error, actual.input_gradient, expected.input_gradient),
        guided_gradient=_if_run(_median_error, actual.guided_gradient, expected.guided_gradient),
        excitation=tuple(map(_median_error, actual.excitation, expected.excitation)) or UNSET,
        worst_gradients=tuple(map(max, gradients)),
        worst_saliency_similarity=float(np.min(alike)),
        worst_saliency_overlap=float(np.min(shared)),
    )


def _if_run(
    error: Callable[[Floats, Floats], float], actual: Floats | None, expected: Floats | None
) -> float | UnsetType:
    """The error of an optional graph, unset where it was not run."""
    if actual is None:
        return UNSET
    assert expected is not None
    return error(actual, expected)


def _median_error(actual: Floats, expected: Floats) -> float:
    return _median(_errors(actual, expected))


def _errors(actual: Floats, expected: Floats) -> list[float]:
    """The relative error of each image."""
    return [relative_error(*pair) for pair in zip(actual, expected, strict=True)]


def _median(errors: Sequence[float]) -> float:
    """The median over images.

    A ReLU whose input rounds to the one side of zero here and to the other there changes the
    gradient of that image by a thousandth; the error of a wrong graph is in every image.
    Infinite where any image's error is.
    """
    return float(np.median(errors)) if np.isfinite(errors).all() else float("inf")


def relative_error(actual: Floats, expected: Floats) -> float:
    """‖actual − expected‖ / ‖expected‖ in the Euclidean norm; infinite where that is not finite."""
    wide = expected.astype(np.float64)
    difference = float(np.linalg.norm((actual - wide).ravel()))
    if not np.isfinite(difference):
        return float("inf")
    norm = float(np.linalg.norm(wide.ravel()))
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))
