"""Adds TensorRT plans to a bundle."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ccam_deploy import bundle as bundles
from ccam_deploy.bundle import WEIGHTS, Bundle, Plan, PrecisionName
from ccam_deploy.engines import plans
from ccam_deploy.engines.plans import Library
from ccam_deploy.errors import BundleError


def build(
    bundle: Bundle,
    library: Library,
    precision: PrecisionName = "fp32",
    max_batch: int = 8,
    devices: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Build every graph of one precision, and record the plans in the manifest.

    devices: compute capabilities such as "8.9", for a library that builds without a GPU; empty for
        all that it supports, or else for the GPU that is here.
    Plans of the same graph, precision, library, version and devices are replaced.
    Raises BackendError where TensorRT rejects a graph, OptionError for devices that it does not
    know, BundleError where the plans cannot be written; the bundle is left as it was then.
    """
    chosen = bundle.precision(precision)
    tuned_for = plans.profiles(max_batch)
    targets = library.targets(devices)
    built = {}
    for graph, file in chosen.graphs.items():
        progress(f"building {graph} ({precision})")
        built[graph] = plans.build_plan(library, bundle.path(file), tuned_for, targets)
    digest = hashlib.sha256(b"".join(built.values())).hexdigest()
    device = targets[0] if len(targets) == 1 else "several"
    folder = f"plans/{device}-{library.flavour}-{library.version}-{precision}-{digest[:8]}"
    entries = tuple(
        Plan(
            file=f"{folder}/{graph}.plan",
            graph=graph,
            precision=precision,
            library=library.flavour,
            version=library.version,
            devices=targets,
            source=bundle.manifest.files[file].sha256,
            weights=bundle.manifest.files[WEIGHTS].sha256,
            max_batch=max_batch,
        )
        for graph, file in chosen.graphs.items()
    )
    try:
        _write(bundle.folder / folder, built)
        _record(bundle, entries)
    except OSError as error:
        raise BundleError(f"cannot write the plans: {error.strerror or error}") from error
    return bundles.read(bundle.folder)


def _write(place: Path, built: Mapping[str, bytes]) -> None:
    """Write the plans to a folder of their own, which appears whole or not at all."""
    place.parent.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".plans-", dir=place.parent))
    try:
        for graph, plan in built.items():
            (work / f"{graph}.plan").write_bytes(plan)
        work.chmod(0o755)
        if not place.exists():
            work.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _record(bundle: Bundle, entries: tuple[Plan, ...]) -> None:
    """List the plans in the manifest instead of older ones with their key, which are removed."""
    keys = {_key(plan) for plan in entries}
    old = [plan for plan in bundle.manifest.plans if _key(plan) in keys]
    kept = tuple(plan for plan in bundle.manifest.plans if _key(plan) not in keys)
    dropped = {plan.file for plan in old} - {plan.file for plan in entries}
    records = {n: r for n, r in bundle.manifest.files.items() if n not in dropped}
    records |= bundles.record_files(bundle.folder, [plan.file for plan in entries])
    manifest = replace(bundle.manifest, files=records, plans=(*kept, *entries))
    bundles.write_manifest(bundle.folder, manifest)
    for folder in {(bundle.folder / name).parent for name in dropped}:
        shutil.rmtree(folder, ignore_errors=True)


def _key(plan: Plan) -> tuple[object, ...]:
    return plan.graph, plan.precision, plan.library, plan.version, plan.devices
