"""A bundle's graphs against what its export recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.folder import Bundle
from ccam_deploy.bundle.manifest import OPTIONAL_GRAPHS, Fidelity
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import IntegrityError
from ccam_deploy.explanation import Explanation
from ccam_deploy.fidelity.comparison import compare_observations
from ccam_deploy.fidelity.observation import Observation, load_observation, observe
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
        IntegrityError: The record cannot be read, lacks an optional graph, or holds values of
            other sizes than the graphs give.
    """
    entry = bundle.precision(precision)
    layers = [layer.name for layer in bundle.manifest.layers]
    expected = load_observation(bundle.path(entry.reference))
    _require_inputs(bundle, entry.reference, expected)
    for name in OPTIONAL_GRAPHS:
        if name in entry.graphs and name not in expected.optional_graphs():
            raise IntegrityError(f"{entry.reference} holds no {name}; export the bundle again")
    actual = observe(classifier, expected.images, layers, expected.targets, entry.graphs).summary()
    if explain is not None:
        explanation = explain(expected.images, expected.targets)
        labels = tuple(layer.labels for layer in explanation.layers)
        actual = replace(actual, labels=labels, saliency=explanation.saliency)
    _require_same_sizes(entry.reference, actual, expected)
    fidelity = compare_observations(actual, expected)
    return fidelity, broken_bounds(fidelity, _tolerance(bundle, precision), layers)


def _require_inputs(bundle: Bundle, file: str, expected: Observation) -> None:
    """Raise IntegrityError where a record's images and classes are not the bundle's to explain."""
    images, targets, manifest = expected.images, expected.targets, bundle.manifest
    fits = images.dtype == np.float32 and images.shape[1:] == manifest.input and len(images)
    fits = fits and targets.dtype == np.int64 and targets.shape == images.shape[:1]
    if not fits or not (targets >= 0).all() or not (targets < manifest.classes).all():
        raise IntegrityError(f"{file} holds no images of this bundle; export the bundle again")


def _require_same_sizes(file: str, actual: Observation, expected: Observation) -> None:
    """Raise IntegrityError for the first value of a record that no graph of the bundle gives."""
    for name, value in vars(expected).items():
        ours, theirs = _listed(getattr(actual, name)), _listed(value)
        same = len(ours) == len(theirs) and all(
            one.shape == other.shape and one.dtype.kind == other.dtype.kind
            for one, other in zip(ours, theirs, strict=True)
        )
        if ours and not same:
            raise IntegrityError(
                f"{file} holds {name} of other sizes than the graphs give; export the bundle again"
            )


def _listed(value: Floats | tuple[NDArray[Any], ...] | None) -> tuple[NDArray[Any], ...]:
    """The arrays of a value of an observation."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _tolerance(bundle: Bundle, precision: str) -> Tolerance:
    accepted = bundle.precision(precision).tolerance
    if precision != "tf32":
        return Tolerance().with_bounds(accepted)
    usual = RANDOM_TOLERANCE if bundle.manifest.random_weights else TOLERANCE
    return usual["tf32"].widened(accepted)
