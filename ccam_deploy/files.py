"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ccam_deploy.errors import OutputError


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all, making its folder if need be.

    Raises OutputError, naming the file, where that fails.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        temporary = ""
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Raise OutputError where `write` could not write a file; leaves nothing behind."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
