"""A bundle's folder: read and checked, its manifest written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import get_args

import msgspec
from msgspec import UNSET

from ccam_deploy.bundle.manifest import (
    FORMAT,
    GRAPHS,
    OPTIONAL_GRAPHS,
    FileRecord,
    Manifest,
    Precision,
    PrecisionName,
)
from ccam_deploy.errors import BundleError, IntegrityError, ManifestError, OptionError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class _Version:
    """What every format of the manifest has."""

    format: int


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read: where it is and what its manifest says."""

    folder: Path
    manifest: Manifest = field(repr=False)

    def path(self, name: str) -> Path:
        """The path of one of the manifest's files."""
        return self.folder / name

    def precision(self, name: str) -> Precision:
        """The graphs of one precision. Raises OptionError where the bundle has none."""
        for known, precision in self.manifest.precisions.items():
            if known == name:
                return precision
        known_names = ", ".join(self.manifest.precisions)
        hint = f"; export with --precision {name}" if name in get_args(PrecisionName) else ""
        raise OptionError(f"the bundle has no {name} graphs, only {known_names}{hint}")


def read_bundle(folder: str | Path) -> Bundle:
    """Read a bundle and check all of it. Plans that were removed are forgotten: no graph is lost.

    Raises ManifestError or IntegrityError, naming the file and what is wrong with it.
    """
    root = Path(folder)
    try:
        manifest = _without_lost_plans(root, _read_manifest(root))
        plans = {plan.file for plan in manifest.plans}
        for name, record in manifest.files.items():
            remedy = "remove it and build it again" if name in plans else "export the bundle again"
            _check_file(root, name, record, remedy)
    except OSError as error:
        raise BundleError(f"{root} cannot be read: {error.strerror}") from error
    return Bundle(root, manifest)


def digest_without_plans(manifest: Manifest) -> str:
    """The digest of what was exported, whatever plans were built of it."""
    plans = {plan.file for plan in manifest.plans}
    files = {name: record for name, record in manifest.files.items() if name not in plans}
    return manifest_digest(replace(manifest, files=files, plans=()))


def unlisted_files(bundle: Bundle) -> list[str]:
    """Files in a bundle's folder that its manifest does not list."""
    found = (path.relative_to(bundle.folder) for path in bundle.folder.rglob("*"))
    names = (path.as_posix() for path in found if not (bundle.folder / path).is_dir())
    return sorted(n for n in names if n != MANIFEST and n not in bundle.manifest.files)


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    if root.exists() and not root.is_dir():
        raise BundleError(f"{root} is not a bundle: it is a file, not a folder")
    if not root.is_dir():
        raise BundleError(f"{root} is not a bundle: there is no such folder")
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}")
    content = path.read_bytes()
    manifest = _decode(path, content)
    if manifest.digest != manifest_digest(manifest) or content != _encode(manifest):
        raise IntegrityError(f"{path} was changed after the export; export it again")
    _check_consistency(path, manifest)
    return manifest


def _decode(path: Path, content: bytes) -> Manifest:
    try:
        version = msgspec.json.decode(content, type=_Version).format
        if version != FORMAT:
            raise ManifestError(
                f"{path} has format {version}, this version reads {FORMAT}; export it again"
            )
        return msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{path} is not a valid manifest: {error}") from error


def _check_consistency(path: Path, manifest: Manifest) -> None:
    for wrong in _inconsistencies(manifest):
        raise ManifestError(f"{path} is not a valid manifest: {wrong}")


def _inconsistencies(manifest: Manifest) -> Iterator[str]:
    """What the schema cannot say: sizes and names that must fit each other."""
    channels, *size = manifest.input
    how = manifest.preprocessing
    layers = len(manifest.layers)
    if manifest.labels and len(manifest.labels) != manifest.classes:
        yield f"{len(manifest.labels)} labels for {manifest.classes} classes"
    if len(how.mean) != channels or len(how.std) != channels:
        yield f"mean and std must have {channels} values"
    if how.resize == "crop" and any(c < s for c, s in zip(how.cover, size, strict=True)):
        yield f"cover {how.cover} is smaller than the input {tuple(size)}"
    if not layers or not manifest.precisions:
        yield "it lists no layers or no graphs"
    for name, precision in manifest.precisions.items():
        report = precision.fidelity
        if set(precision.graphs) - set(OPTIONAL_GRAPHS) != set(GRAPHS):
            yield f"{name} must have the graphs {', '.join(GRAPHS)}"
        for graph in OPTIONAL_GRAPHS:
            if (graph in precision.graphs) != (getattr(report, graph) is not UNSET):
                yield f"the fidelity of {name} and its graphs differ in {graph}"
        if len(precision.baseline_logits) != manifest.classes:
            yield f"{name} must have {manifest.classes} baseline logits"
        per_layer = [report.features, report.gradients, report.excitation]
        if any(len(values) != layers for values in per_layer if values is not UNSET):
            yield f"the fidelity of {name} must have {layers} layers"
        for bound in precision.tolerance:
            if getattr(report, bound, UNSET) is UNSET:
                yield f'{name} has a tolerance for the unknown "{bound}"'
    used = [f for p in manifest.precisions.values() for f in (*p.graphs.values(), p.reference)]
    for file in [*used, *(plan.file for plan in manifest.plans)]:
        if file not in manifest.files:
            yield f'it uses "{file}", which is not among the files'


def _without_lost_plans(root: Path, manifest: Manifest) -> Manifest:
    known = {plan.file for plan in manifest.plans}
    lost = {name for name in known if not os.path.lexists(root / name)}
    files = {name: record for name, record in manifest.files.items() if name not in lost}
    plans = tuple(plan for plan in manifest.plans if plan.file not in lost)
    return replace(manifest, files=files, plans=plans)


def _check_file(root: Path, name: str, record: FileRecord, remedy: str) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or str(pure) != name:
        raise ManifestError(f'the manifest of {root} leads outside its folder: "{name}"')
    path = root
    for part in pure.parts:
        path = path / part
        if path.is_symlink():
            raise ManifestError(f"{path} is a link; a bundle holds plain files only")
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; {remedy}")
    size = path.stat().st_size
    if size != record.bytes:
        raise IntegrityError(f"{path} has {size} bytes, not {record.bytes}; {remedy}")
    if hash_file(path) != record.sha256:
        raise IntegrityError(f"{path} was changed after the export; {remedy}")


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_digest(manifest: Manifest) -> str:
    """The SHA-256 of a manifest with its own digest left empty."""
    return hashlib.sha256(_encode(replace(manifest, digest=""))).hexdigest()


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def record_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, FileRecord]:
    """Size and hash of some files in a folder, or of all, by their path inside it."""
    if names is None:
        found = (path for path in sorted(folder.rglob("*")) if path.is_file())
        paths = (path.relative_to(folder).as_posix() for path in found)
        names = [name for name in paths if name != MANIFEST]
    return {
        name: FileRecord((folder / name).stat().st_size, hash_file(folder / name)) for name in names
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest with its digest, whole or not at all.

    Raises ManifestError for values that could not be read back, such as a NaN.
    """
    # Decoding makes floats of the integers that stand for them, as reading will.
    plain = _decode(folder / MANIFEST, _encode(manifest))
    sealed = replace(plain, digest=manifest_digest(plain))
    draft = folder / f".{MANIFEST}"
    try:
        draft.write_bytes(_encode(sealed))
        draft.replace(folder / MANIFEST)
    finally:
        draft.unlink(missing_ok=True)
