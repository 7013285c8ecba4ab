"""Compiled kernels in bundles, for machines where no cache can be written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from msgspec import UNSET

from ccam_deploy.bundle.folder import Bundle, record_files, write_manifest
from ccam_deploy.bundle.manifest import KernelCode
from ccam_deploy.errors import BackendError, BundleError
from ccam_deploy.extras import install
from ccam_deploy.files import replace_file
from ccam_deploy.kernels.cuda.ahead import compile_kernels
from ccam_deploy.kernels.cuda.kernel_files import compiler_versions, pack, source_digest

Progress = Callable[[str, float, str], None]
"""Called with what is compiled, the share of it that is done, 0 to 1, and the next kernel."""


@dataclass(frozen=True)
class Compiled:
    """A bundle with its kernels for some GPUs.

    Attributes:
        bundle: The bundle, with the kernels in its manifest.
        kernels: An entry for each compute capability.
        fresh: Whether any were compiled just now.
    """

    bundle: Bundle
    kernels: tuple[KernelCode, ...]
    fresh: bool


def add_kernels(
    bundle: Bundle,
    devices: Sequence[str],
    force: bool = False,
    progress: Progress = lambda title, share, name: None,
) -> Compiled:
    """Compile the kernels for some GPUs, which need not be here, and record them in the manifest.

    Kernels for the same compute capability are replaced, where they are of other sources.

    Args:
        bundle: The bundle.
        devices: Compute capabilities, such as "8.9".
        force: Whether to compile kernels that the bundle has already.
        progress: Called before each kernel is compiled. An exception that it raises ends the work,
            and is raised here.

    Returns:
        The bundle with its kernels.

    Raises:
        BackendError: The compiler is missing or does not know a compute capability.
        BundleError: The kernels cannot be written; the bundle is left as it was.
    """
    if not source_digest():
        raise BackendError(f"numba-cuda is not installed: {install('cuda')}")
    current = {} if force else _current(bundle)
    contents = {
        device: pack(compile_kernels(device, _dtypes(bundle), _titled(progress, device)))
        for device in devices
        if device not in current
    }
    if contents:
        bundle = _add(bundle, contents)
    by_device = _current(bundle)
    return Compiled(bundle, tuple(by_device[device] for device in devices), bool(contents))


def offer_kernels(bundle: Bundle) -> None:
    """Let this process take its kernels from a bundle, where they are of the sources that run."""
    for device, code in _current(bundle).items():
        from ccam_deploy.kernels.cuda.kept import store

        store().offer(bundle.path(code.file), device)


def _current(bundle: Bundle) -> dict[str, KernelCode]:
    """The kernels of the sources that run, by compute capability."""
    source = source_digest()
    return {code.device: code for code in bundle.manifest.compiled if code.source == source}


def _dtypes(bundle: Bundle) -> list[str]:
    """The types of features and masks: half precision in all graphs but those of "fp32"."""
    types = {"float32" if name == "fp32" else "float16" for name in bundle.manifest.precisions}
    return sorted(types)


def _titled(progress: Progress, device: str) -> Callable[[float, str], None]:
    def report(share: float, name: str) -> None:
        progress(f"kernels ({device})", share, name)

    return report


def _add(bundle: Bundle, contents: Mapping[str, bytes]) -> Bundle:
    """Write the kernels and record them; a bundle where that fails is left as it was."""
    entries = tuple(
        KernelCode(
            f"kernels/{device}-{hashlib.sha256(content).hexdigest()[:8]}.kernels",
            device,
            source_digest(),
            compiler_versions(),
        )
        for device, content in contents.items()
    )
    place = bundle.folder / "kernels"
    new = [bundle.path(entry.file) for entry in entries]
    new = [path for path in new if not path.exists()]
    existed = place.exists()
    try:
        place.mkdir(exist_ok=True)
        for entry, content in zip(entries, contents.values(), strict=True):
            replace_file(bundle.path(entry.file), content)
        return _record(bundle, entries)
    except OSError as error:
        for path in new:
            path.unlink(missing_ok=True)
        if not existed and place.exists():
            place.rmdir()
        raise BundleError(f"cannot write the kernels: {error.strerror or error}") from error


def _record(bundle: Bundle, entries: tuple[KernelCode, ...]) -> Bundle:
    """List the kernels in the manifest instead of those for the same GPUs, which are removed."""
    devices = {entry.device for entry in entries}
    before = bundle.manifest
    kept = tuple(code for code in before.compiled if code.device not in devices)
    listed = {entry.file for entry in (*kept, *entries)}
    dropped = {code.file for code in before.compiled} - listed
    records = {name: record for name, record in before.files.items() if name not in dropped}
    records |= record_files(bundle.folder, [entry.file for entry in entries])
    manifest = write_manifest(
        bundle.folder, replace(before, files=records, kernels=(*kept, *entries) or UNSET)
    )
    for name in dropped:
        bundle.path(name).unlink(missing_ok=True)
    return Bundle(bundle.folder, manifest)
