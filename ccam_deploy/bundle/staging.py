"""A bundle's folder on its way: it takes its place whole, or leaves what was there."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ccam_deploy.bundle.folder import MANIFEST
from ccam_deploy.errors import BundleError


def require_replaceable(target: str | Path) -> None:
    """Raise BundleError where the target is something other than a bundle or an empty folder."""
    place = Path(target)
    if place.exists() and not _replaceable(place):
        raise BundleError(f"{target} exists and is not a bundle; choose another --output")


@contextmanager
def staged_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the target's place when the block ends well.

    Whatever ends the block early, a full disk or an interrupt included, leaves the target as it
    was and nothing beside it.
    Raises BundleError where the target is something other than a bundle or an empty folder.
    """
    require_replaceable(target)
    place = Path(target).absolute()
    missing = [parent for parent in place.parents if not parent.exists()]
    work = place.with_name(f".{place.name}-{secrets.token_hex(4)}")
    try:
        work.mkdir(parents=True)
        yield work
        _swap(work, place)
    except OSError as error:
        raise BundleError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _remove_empty(missing)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made on the way, innermost first, if nothing came to lie in them."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _replaceable(place: Path) -> bool:
    if not place.is_dir() or place.is_symlink():
        return False
    return (place / MANIFEST).is_file() or not any(place.iterdir())


def _swap(work: Path, place: Path) -> None:
    if not place.exists():
        work.rename(place)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        place.rename(retired / "old")
        work.rename(place)
    finally:
        if not place.exists() and (retired / "old").exists():
            (retired / "old").rename(place)
        shutil.rmtree(retired, ignore_errors=True)
