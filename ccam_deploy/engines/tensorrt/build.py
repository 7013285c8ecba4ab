"""Adds TensorRT plans to a bundle."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ccam_deploy.bundle.folder import Bundle, record_files, write_manifest
from ccam_deploy.bundle.manifest import WEIGHTS, Plan, PrecisionName
from ccam_deploy.engines.tensorrt import plans, select
from ccam_deploy.engines.tensorrt.library import Library
from ccam_deploy.engines.tensorrt.plans import DEFAULT_MAX_BATCH
from ccam_deploy.engines.tensorrt.timing_cache import TimingCache
from ccam_deploy.errors import BundleError, OptionError
from ccam_deploy.files import staged_folder

Progress = Callable[[str, float, str], None]
"""Called with a graph and its precision, the share of its build that is done, 0 to 1, and
TensorRT's phase."""


@dataclass(frozen=True)
class BuildSettings:
    """Options of a build.

    Attributes:
        max_batch: The most images that a plan takes at a time.
        devices: Compute capabilities such as "8.9", for a library that builds without a GPU; empty
            for all that it supports, or else for the GPU of this machine.
        timing_cache: A file where TensorRT keeps how fast kernels were, for the next build.
        force: Whether to build plans that the bundle has already.
    """

    max_batch: int = DEFAULT_MAX_BATCH
    devices: tuple[str, ...] = ()
    timing_cache: Path | None = None
    force: bool = False

    def require_supported(self, library: Library, precision: str = "fp32") -> None:
        """Refuse options before time is spent on a build.

        Raises:
            OptionError: The library cannot build with them.
            BackendError: The library needs a GPU, and there is none.
        """
        plans.profiles(self.max_batch)
        library.targets(self.devices, precision)
        if self.timing_cache is not None and not library.times_kernels:
            raise OptionError(
                f"{library.flavour} has no timing cache, it measures nothing while it builds; "
                f"leave {self.timing_cache} out"
            )


@dataclass(frozen=True)
class Built:
    """A bundle with its plans for some settings.

    Attributes:
        bundle: The bundle, with the plans in its manifest.
        plans: A plan for each graph.
        fresh: Whether they were built just now.
    """

    bundle: Bundle
    plans: tuple[Plan, ...]
    fresh: bool


def build(
    bundle: Bundle,
    library: Library,
    precision: PrecisionName = "fp32",
    settings: BuildSettings | None = None,
    progress: Progress = lambda graph, share, phase: None,
) -> Built:
    """Build every graph of one precision, and record the plans in the manifest.

    Nothing is built where the bundle has these plans already, unless the settings say so. Plans
    of the same graph, precision, library, version and devices are replaced.

    Args:
        bundle: The bundle.
        library: The TensorRT that builds.
        precision: One of the bundle's, or "tf32", whose plans stand beside those of "fp32".
        settings: Options; None for the defaults.
        progress: Called often.

    Returns:
        The bundle with its plans.

    Raises:
        BackendError: TensorRT rejects a graph.
        OptionError: TensorRT does not know a device, or an option is out of range.
        BundleError: The plans cannot be written; the bundle is left as it was.
    """
    settings = settings or BuildSettings()
    settings.require_supported(library)
    targets = library.targets(settings.devices, precision)
    current = select.current_plans(bundle, library, targets, precision, settings.max_batch)
    if current and not settings.force:
        return Built(bundle, current, fresh=False)
    contents = _build_plans(bundle, library, precision, settings, targets, progress)
    entries = _entries(bundle, library, precision, settings.max_batch, targets, contents)
    return Built(_add(bundle, entries, contents), entries, fresh=True)


def _entries(
    bundle: Bundle,
    library: Library,
    precision: PrecisionName,
    max_batch: int,
    targets: tuple[str, ...],
    contents: Mapping[str, bytes],
) -> tuple[Plan, ...]:
    """What the manifest says of each graph's plan, whose folder is named after their contents."""
    digest = hashlib.sha256(b"".join(contents.values())).hexdigest()
    device = targets[0] if len(targets) == 1 else "several"
    folder = f"plans/{device}-{library.flavour}-{library.version}-{precision}-{digest[:8]}"
    return tuple(
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
        for graph, file in bundle.precision(precision).graphs.items()
    )


def _build_plans(
    bundle: Bundle,
    library: Library,
    precision: PrecisionName,
    settings: BuildSettings,
    targets: tuple[str, ...],
    progress: Progress,
) -> dict[str, bytes]:
    """The plan of each graph."""
    tuned_for = plans.profiles(settings.max_batch)
    timings = None if settings.timing_cache is None else TimingCache(settings.timing_cache)
    contents = {}
    for graph, file in bundle.precision(precision).graphs.items():
        title = f"{graph} ({precision})"
        progress(title, 0.0, "")
        contents[graph] = plans.build_plan(
            library,
            bundle.path(file),
            tuned_for,
            targets,
            timings,
            partial(progress, title),
            precision == "tf32",
        )
        progress(title, 1.0, "")
    return contents


def _add(bundle: Bundle, entries: tuple[Plan, ...], contents: Mapping[str, bytes]) -> Bundle:
    """Write the plans and record them; a bundle where that fails is left as it was."""
    place = (bundle.folder / entries[0].file).parent
    existed = place.exists()
    try:
        _write(place, contents)
        return _record(bundle, entries)
    except OSError as error:
        if not existed:
            shutil.rmtree(place, ignore_errors=True)
        raise BundleError(f"cannot write the plans: {error.strerror or error}") from error


def _write(place: Path, contents: Mapping[str, bytes]) -> None:
    """Write the plans to a new folder, which appears whole or not at all."""
    with staged_folder(place) as folder:
        for graph, plan in contents.items():
            (folder / f"{graph}.plan").write_bytes(plan)


def _record(bundle: Bundle, entries: tuple[Plan, ...]) -> Bundle:
    """List the plans in the manifest instead of older ones with their key, which are removed."""
    keys = {_key(plan) for plan in entries}
    old = [plan for plan in bundle.manifest.plans if _key(plan) in keys]
    kept = tuple(plan for plan in bundle.manifest.plans if _key(plan) not in keys)
    dropped = {plan.file for plan in old} - {plan.file for plan in entries}
    records = {n: r for n, r in bundle.manifest.files.items() if n not in dropped}
    records |= record_files(bundle.folder, [plan.file for plan in entries])
    manifest = write_manifest(
        bundle.folder, replace(bundle.manifest, files=records, plans=(*kept, *entries))
    )
    for folder in {(bundle.folder / name).parent for name in dropped}:
        shutil.rmtree(folder, ignore_errors=True)
    return Bundle(bundle.folder, manifest)


def _key(plan: Plan) -> tuple[object, ...]:
    return plan.graph, plan.precision, plan.library, plan.version, plan.devices
