"""The writing of a new bundle, which takes its place whole or leaves the old one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ccam_deploy.bundle.folder import MANIFEST
from ccam_deploy.errors import BundleError
from ccam_deploy.files import staged_folder


def require_replaceable(target: str | Path) -> None:
    """Refuse a target that holds something other than a bundle.

    Args:
        target: Where a bundle is to be written.

    Raises:
        BundleError: The target is a file, a link, or a folder that is neither empty nor a bundle.
    """
    place = Path(target)
    if place.exists() and not _is_replaceable(place):
        raise BundleError(f"{target} exists and is not a bundle; choose another --output")


def holds_bundle(place: Path) -> bool:
    """Whether a folder holds a bundle, whole or damaged."""
    return (place / MANIFEST).is_file()


@contextmanager
def staged_bundle(target: str | Path) -> Iterator[Path]:
    """Fill a folder for a bundle, which takes the target's place whole; see staged_folder.

    Args:
        target: Where the bundle belongs; a bundle that is there is replaced.

    Yields:
        The temporary folder, empty.

    Raises:
        BundleError: The target holds something other than a bundle, or cannot be written.
    """
    require_replaceable(target)
    try:
        with staged_folder(Path(target)) as folder:
            yield folder
    except OSError as error:
        raise BundleError(f"cannot write {target}: {error.strerror or error}") from error


def _is_replaceable(place: Path) -> bool:
    if not place.is_dir() or place.is_symlink():
        return False
    return holds_bundle(place) or not any(place.iterdir())
