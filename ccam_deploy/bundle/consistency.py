"""The parts of a manifest that must fit each other, which its schema cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from msgspec import UNSET

from ccam_deploy.bundle.manifest import (
    GRAPHS,
    OLDEST_FORMAT,
    OPTIONAL_GRAPHS,
    Manifest,
    Precision,
)
from ccam_deploy.errors import ManifestError


def require_consistency(path: Path, manifest: Manifest) -> None:
    """Compare the sizes and names in a manifest with each other.

    Args:
        path: Where the manifest was read, for the message.
        manifest: A manifest that fits the schema.

    Raises:
        ManifestError: Two of them contradict each other; the message names the first such pair.
    """
    for contradiction in _contradictions(manifest):
        raise ManifestError(f"{path} is not a valid manifest: {contradiction}")


def _contradictions(manifest: Manifest) -> Iterator[str]:
    yield from _in_the_input(manifest)
    if (manifest.activation is UNSET) != (manifest.format == OLDEST_FORMAT):
        yield f"format {manifest.format} goes with activation {manifest.activation}"
    if not manifest.layers or not manifest.precisions:
        yield "it lists no layers or no graphs"
    for name, precision in manifest.precisions.items():
        yield from _in_a_precision(name, precision, manifest)
    yield from _in_the_files(manifest)


def _in_the_input(manifest: Manifest) -> Iterator[str]:
    channels, *size = manifest.input
    preprocessing = manifest.preprocessing
    if manifest.labels and len(manifest.labels) != manifest.classes:
        yield f"{len(manifest.labels)} labels for {manifest.classes} classes"
    if len(preprocessing.mean) != channels or len(preprocessing.std) != channels:
        yield f"mean and std must have {channels} values"
    if preprocessing.resize == "crop" and any(
        covered < side for covered, side in zip(preprocessing.cover, size, strict=True)
    ):
        yield f"cover {preprocessing.cover} is smaller than the input {tuple(size)}"


def _in_a_precision(name: str, precision: Precision, manifest: Manifest) -> Iterator[str]:
    fidelity = precision.fidelity
    if set(precision.graphs) - set(OPTIONAL_GRAPHS) != set(GRAPHS):
        yield f"{name} must have the graphs {', '.join(GRAPHS)}"
    for graph in OPTIONAL_GRAPHS:
        if (graph in precision.graphs) != (getattr(fidelity, graph) is not UNSET):
            yield f"the fidelity of {name} and its graphs differ in {graph}"
    if len(precision.baseline_logits) != manifest.classes:
        yield f"{name} must have {manifest.classes} baseline logits"
    layers = len(manifest.layers)
    per_layer = [
        fidelity.features,
        fidelity.gradients,
        fidelity.worst_gradients,
        fidelity.excitation,
    ]
    if any(len(errors) != layers for errors in per_layer if errors is not UNSET):
        yield f"the fidelity of {name} must have {layers} layers"
    for quantity in precision.tolerance:
        if getattr(fidelity, quantity, UNSET) is UNSET:
            yield f'{name} has a tolerance for the unknown "{quantity}"'


def _in_the_files(manifest: Manifest) -> Iterator[str]:
    for precision in manifest.precisions.values():
        for file in (*precision.graphs.values(), precision.reference):
            yield from _unless_recorded(file, manifest)
    for file in sorted(manifest.built_files):
        yield from _unless_recorded(file, manifest)


def _unless_recorded(file: str, manifest: Manifest) -> Iterator[str]:
    if file not in manifest.files:
        yield f'it uses "{file}", which is not among the files'
