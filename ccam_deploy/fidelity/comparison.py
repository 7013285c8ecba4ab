"""How far one observation is from another."""

from __future__ import annotations

import numpy as np
from msgspec import UNSET

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Fidelity
from ccam_deploy.fidelity.observation import Observation
from ccam_deploy.fidelity.similarity import spearman, ssim, top_overlap


def compare_observations(got: Observation, expected: Observation) -> Fidelity:
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
