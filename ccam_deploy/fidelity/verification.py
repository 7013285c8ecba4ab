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
from ccam_deploy.fidelity.tolerance import RANDOM_TOLERANCE, TOLERANCE, Tolerance, broken_bounds


def verify_bundle(
    bundle: Bundle,
    classifier: Classifier,
    precision: str,
    explain: Callable[[Floats, NDArray[np.int64]], Explanation] | None = None,
) -> tuple[Fidelity, list[str]]:
    """Run a bundle's graphs on the images recorded at export and compare all values.

    Args:
        bundle: The bundle, with the record of its export.
        classifier: Its graphs, opened on some engine.
        precision: The precision to compare. No export runs "tf32", so its bounds are the usual
            ones, or those that the export accepted of "fp32" where they are wider.
        explain: Makes maps and partitions in the way to be verified, such as a GPU's kernels; by
            default the CPU's kernels make them between the classifier's graphs.

    Returns:
        The comparison, and phrases for what breaks its tolerance.

    Raises:
        OptionError: The bundle lacks the precision.
        IntegrityError: The record cannot be read, or lacks an optional graph.
    """
    entry = bundle.precision(precision)
    layers = [layer.name for layer in bundle.manifest.layers]
    expected = load_observation(bundle.path(entry.reference))
    for name in OPTIONAL_GRAPHS:
        if name in entry.graphs and name not in expected.optional_graphs():
            raise IntegrityError(f"{entry.reference} holds no {name}; export the bundle again")
    actual = observe(classifier, expected.images, layers, expected.targets, entry.graphs).summary()
    if explain is not None:
        explanation = explain(expected.images, expected.targets)
        labels = tuple(layer.labels for layer in explanation.layers)
        actual = replace(actual, labels=labels, saliency=explanation.saliency)
    fidelity = compare_observations(actual, expected)
    return fidelity, broken_bounds(fidelity, _tolerance(bundle, precision), layers)


def _tolerance(bundle: Bundle, precision: str) -> Tolerance:
    accepted = bundle.precision(precision).tolerance
    if precision != "tf32":
        return Tolerance().with_bounds(accepted)
    usual = RANDOM_TOLERANCE if bundle.manifest.random_weights else TOLERANCE
    return usual["tf32"].widened(accepted)
