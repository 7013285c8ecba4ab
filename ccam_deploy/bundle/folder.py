"""The folder of a bundle: its manifest, and files that match what the manifest records."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import get_args

import msgspec
from msgspec import UNSET

from ccam_deploy.bundle.consistency import require_consistency
from ccam_deploy.bundle.manifest import (
    FORMAT,
    OLDEST_FORMAT,
    FileRecord,
    GraphPrecision,
    Manifest,
    Precision,
)
from ccam_deploy.bundle.signature import SIGNATURE, remove_signature, require_signed
from ccam_deploy.errors import BundleError, IntegrityError, ManifestError, OptionError
from ccam_deploy.files import replace_file

MANIFEST = "manifest.json"
RUNTIME_CACHE = ".runtime-cache"
"""How the name of a file ends that holds what TensorRT-RTX compiled for the plan beside it."""
_HASHED_AT_A_TIME = 4
_WORTH_THREADS = 2**24
"""Bytes that one thread hashes in about the time that several take to start."""


@dataclass(frozen=True)
class _FormatOnly:
    """The field that the manifest has in every format."""

    format: int


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and verified.

    Attributes:
        folder: Where the bundle is.
        manifest: The description of the network, its graphs, plans and files.
    """

    folder: Path
    manifest: Manifest = field(repr=False)

    def path(self, name: str) -> Path:
        """Return the path of a file that the manifest lists.

        Args:
            name: The file's path inside the bundle, such as "backbone.onnx".
        """
        return self.folder / name

    def precision(self, name: str) -> Precision:
        """Return the graphs that run in a precision.

        Args:
            name: "fp32", "fp16", "int8" or "fp8"; or "tf32", which runs the graphs of "fp32". The
                fidelity and the tolerance are theirs too, without the rounding of TF32.

        Raises:
            OptionError: The bundle was exported without these graphs.
        """
        graphs = "fp32" if name == "tf32" else name
        for available, precision in self.manifest.precisions.items():
            if available == graphs:
                return precision
        available_names = ", ".join(self.manifest.precisions)
        hint = f"; export with --precision {graphs}" if graphs in get_args(GraphPrecision) else ""
        raise OptionError(f"the bundle has no {graphs} graphs, only {available_names}{hint}")


def read_bundle(folder: str | Path, require_signature: str | Path | None = None) -> Bundle:
    """Read a bundle's manifest and compare every file with its recorded size and hash.

    Plans and compiled kernels whose files were removed are left out of the manifest: they can be
    built again, and no graph is lost with them.

    Args:
        folder: The bundle's folder.
        require_signature: A public key in a PEM file: before anything else is parsed, the whole
            folder must be as it was signed with that key. None to ask for no signature.

    Returns:
        The bundle, verified.

    Raises:
        OptionError: The key cannot be used, or the extra `sign` is not installed.
        SignatureError: The bundle is not signed with that key, or was changed since.
        ManifestError: The manifest breaks the schema, or leads outside the bundle.
        IntegrityError: A file is missing or was changed.
        BundleError: The folder is not a bundle, or cannot be read.
    """
    root = Path(folder)
    try:
        _require_folder(root)
        if require_signature is not None:
            require_signed(root, Path(require_signature))
        manifest = _read_manifest(root)
        lost = {name for name in manifest.built_files if not os.path.lexists(root / name)}
        manifest = _without(manifest, lost)
        _verify_files(root, manifest)
    except OSError as error:
        raise BundleError(f"{error.filename or root} cannot be read: {error.strerror}") from error
    return Bundle(root, manifest)


def read_manifest(folder: str | Path) -> Manifest:
    """Read a bundle's manifest alone, which may stand for itself without the bundle's files.

    Args:
        folder: The folder that it is in.

    Raises:
        ManifestError: The manifest breaks the schema.
        BundleError: There is none, or it was changed or cannot be read.
    """
    try:
        return _read_manifest(Path(folder))
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error.strerror}") from error


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Seal a manifest with its digest and write it, whole or not at all.

    A signature of the bundle as it was before is removed: it would not hold.

    Args:
        folder: The bundle's folder.
        manifest: The manifest; its own digest is not read.

    Returns:
        The manifest as reading will give it.

    Raises:
        ManifestError: A value could not be read back, such as a NaN.
        OSError: The file cannot be written; an older one is still whole.
    """
    # Decoding makes floats of the integers that stand for them, as reading will.
    plain = _decode(folder / MANIFEST, _encode(manifest))
    sealed = replace(plain, digest=manifest_digest(plain))
    remove_signature(folder)
    replace_file(folder / MANIFEST, _encode(sealed))
    return sealed


def record_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, FileRecord]:
    """Measure and hash files for the manifest.

    Args:
        folder: The bundle's folder.
        names: Paths inside the folder; None for every file but the manifest.

    Returns:
        Size and hash of each file, by its path inside the folder.
    """
    if names is None:
        names = [name for name in _files_inside(folder) if name != MANIFEST]
    paths = {name: folder / name for name in names}
    hashes = hash_files(list(paths.values()))
    return {
        name: FileRecord(path.stat().st_size, digest)
        for (name, path), digest in zip(paths.items(), hashes, strict=True)
    }


def unlisted_files(bundle: Bundle) -> list[str]:
    """List the files in a bundle's folder that neither its manifest names nor a plan's run left.

    A signature is not among them.

    Returns:
        Their paths inside the folder, sorted.
    """
    listed = {MANIFEST, SIGNATURE, *bundle.manifest.files}
    runnable = tuple(f"{plan.file}." for plan in bundle.manifest.plans)
    return [
        name
        for name in _files_inside(bundle.folder)
        if name not in listed and not (name.startswith(runnable) and name.endswith(RUNTIME_CACHE))
    ]


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, in hexadecimal; a few files are read at a time.

    Raises:
        OSError: One cannot be read.
    """
    sizes = {path: path.stat().st_size for path in paths}
    if sum(sizes.values()) < _WORTH_THREADS:
        return [hash_file(path) for path in paths]
    largest_first = sorted(sizes, key=lambda path: -sizes[path])
    pool = ThreadPoolExecutor(_HASHED_AT_A_TIME)
    try:
        hashes = dict(zip(largest_first, pool.map(hash_file, largest_first), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    return [hashes[path] for path in paths]


def manifest_digest(manifest: Manifest) -> str:
    """Return the SHA-256 of a manifest with its own digest left empty, in hexadecimal."""
    return hashlib.sha256(_encode(replace(manifest, digest=""))).hexdigest()


def digest_without_plans(manifest: Manifest) -> str:
    """Return the digest of an export, which building plans and kernels does not change."""
    return manifest_digest(_without(manifest, manifest.built_files))


def _files_inside(folder: Path) -> list[str]:
    """The paths of all files in a folder, from there, sorted."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    )


def _require_folder(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise BundleError(f"{root} is not a bundle: it is a file, not a folder")
    if not root.is_dir():
        raise BundleError(f"{root} is not a bundle: there is no such folder")


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}")
    content = path.read_bytes()
    manifest = _decode(path, content)
    if manifest.digest != manifest_digest(manifest) or content != _encode(manifest):
        raise IntegrityError(f"{path} was changed after the export; export it again")
    require_consistency(path, manifest)
    return manifest


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def _decode(path: Path, content: bytes) -> Manifest:
    try:
        version = msgspec.json.decode(content, type=_FormatOnly).format
        if not OLDEST_FORMAT <= version <= FORMAT:
            raise ManifestError(
                f"{path} has format {version}, this version reads {OLDEST_FORMAT} to {FORMAT}; "
                "export it again"
            )
        return msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(
            f"{path} is not a valid manifest: {error}; export the bundle again"
        ) from error


def _without(manifest: Manifest, built: set[str]) -> Manifest:
    """The manifest without some of the plans and compiled kernels, by their files."""
    kernels = tuple(code for code in manifest.compiled if code.file not in built)
    return replace(
        manifest,
        files={name: record for name, record in manifest.files.items() if name not in built},
        plans=tuple(plan for plan in manifest.plans if plan.file not in built),
        kernels=kernels or UNSET,
    )


def _verify_files(root: Path, manifest: Manifest) -> None:
    """Raise IntegrityError for the first file that is missing, or else for one that was changed."""
    paths = {name: _path_inside(root, name) for name in manifest.files}
    for name, record in manifest.files.items():
        if not paths[name].is_file():
            raise _damaged(paths[name], "is missing", name in manifest.built_files)
        size = paths[name].stat().st_size
        if size != record.bytes:
            problem = f"has {size} bytes, not {record.bytes}"
            raise _damaged(paths[name], problem, name in manifest.built_files)
    for (name, path), digest in zip(paths.items(), hash_files(list(paths.values())), strict=True):
        if digest != manifest.files[name].sha256:
            raise _damaged(path, "was changed after the export", name in manifest.built_files)


def _damaged(path: Path, problem: str, built: bool) -> IntegrityError:
    remedy = "remove it and build it again" if built else "export the bundle again"
    return IntegrityError(f"{path} {problem}; {remedy}")


def _path_inside(root: Path, name: str) -> Path:
    """Follow a name from the manifest, but neither out of the bundle nor through a link."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or str(pure) != name:
        raise ManifestError(f'the manifest of {root} leads outside its folder: "{name}"')
    path = root
    for part in pure.parts:
        path = path / part
        if path.is_symlink():
            raise ManifestError(f"{path} is a link; a bundle holds plain files only")
    return path
