"""What a run of the server puts on the machine beside its own memory, and how that goes away.

The server keeps tensors in shared memory, which outlives a process that is killed. Each run has a
prefix of its own for it, and a file of that name whose lock is held by every process of the run:
a file that can be locked is what a run left that nobody cleaned up after.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux shows shared memory as files."""

_NAME = "ccam-deploy-triton-"
_PREFIX = re.compile(_NAME + "[0-9a-f]{8}-")
_LOCK = ".run"


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    Attributes:
        prefix: What the names of its shared memory begin with.
        folder: A temporary folder for its programs.
        lock: A descriptor for the server to inherit, so that the lock is held as long as it lives.
    """

    prefix: str
    folder: Path
    lock: int


@contextmanager
def run_files(shared_memory: Path = SHARED_MEMORY) -> Iterator[RunFiles]:
    """Give a run its files, and remove them at the end, those of runs that were killed too.

    Args:
        shared_memory: The folder that shared memory shows up in.

    Yields:
        The files of this run.

    Raises:
        OSError: There is no room for them.
    """
    remove_leftovers(shared_memory)
    folder = Path(tempfile.mkdtemp(prefix=_NAME))
    prefix = f"{_NAME}{secrets.token_hex(4)}-"
    try:
        lock = _locked(shared_memory, prefix, folder)
        try:
            yield RunFiles(prefix, folder, lock)
        finally:
            os.close(lock)
    finally:
        _remove(shared_memory, prefix, folder)


def remove_leftovers(shared_memory: Path = SHARED_MEMORY) -> list[str]:
    """Remove what this user's runs left that ended without cleaning up.

    Anybody may put a file into the folder, so that others' files are left alone.

    Args:
        shared_memory: The folder that shared memory shows up in.

    Returns:
        The prefixes of these runs.
    """
    removed = []
    for path in sorted(shared_memory.glob(f"{_NAME}*{_LOCK}")):
        prefix = path.name.removesuffix(_LOCK)
        if not _PREFIX.fullmatch(prefix):
            continue
        with suppress(OSError), os.fdopen(_open_own(path), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(shared_memory, prefix, _recorded_folder(file.read()))
            removed.append(prefix)
    return removed


def _open_own(path: Path) -> int:
    """Open a file of this user's; raise OSError for a link or another's file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "it is another user's", str(path))
    return descriptor


def _locked(shared_memory: Path, prefix: str, folder: Path) -> int:
    """Make the run's file, which gets its name only once it is locked; return its descriptor."""
    draft = shared_memory / f".{prefix}{_LOCK}"
    lock = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(lock, json.dumps({"folder": str(folder)}).encode())
        fcntl.flock(lock, fcntl.LOCK_EX)
        draft.rename(shared_memory / f"{prefix}{_LOCK}")
    except BaseException:
        os.close(lock)
        draft.unlink(missing_ok=True)
        raise
    return lock


def _recorded_folder(content: bytes) -> Path | None:
    """The temporary folder of a run; None where its file does not name one of such a folder."""
    try:
        folder = Path(json.loads(content)["folder"])
    except (ValueError, KeyError, TypeError):
        return None
    return folder if folder.name.startswith(_NAME) and folder.is_absolute() else None


def _remove(shared_memory: Path, prefix: str, folder: Path | None) -> None:
    for path in shared_memory.glob(f"{prefix}*"):
        with suppress(OSError):
            path.unlink()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
