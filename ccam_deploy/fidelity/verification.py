"""A bundle's graphs against what its export recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.folder import Bundle
from ccam_deploy.bundle.manifest import OPTIONAL_GRAPHS, Fidelity
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import IntegrityError
from ccam_deploy.explanation import Explanation
from ccam_deploy.fidelity.comparison import compare_observations
from ccam_deploy.fidelity.observation import load_observation, observe
from ccam_deploy.fidelity.tolerance import broken_bounds


def verify_bundle(
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
    expected = load_observation(bundle.path(chosen.reference))
    recorded = {*expected.optional, *(("excitation",) if expected.excitation else ())}
    for name in OPTIONAL_GRAPHS:
        if name in chosen.graphs and name not in recorded:
            raise IntegrityError(f"{chosen.reference} holds no {name}; export the bundle again")
    got = observe(classifier, expected.images, layers, expected.targets, chosen.graphs).summary()
    if explain is not None:
        made = explain(expected.images, expected.targets)
        labels = tuple(layer.labels for layer in made.layers)
        got = replace(got, labels=labels, saliency=made.saliency)
    fidelity = compare_observations(got, expected)
    return fidelity, broken_bounds(fidelity, chosen.tolerance, layers)
