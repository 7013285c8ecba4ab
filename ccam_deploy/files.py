"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from ccam_deploy.errors import OptionError, OutputError

_STEM_BYTES = 80
"""Of 255 that file systems allow: a class, a method, a format and a number come after it."""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all, and make its folder if need be.

    Args:
        path: The file; one that exists is replaced, and a link is followed.
        content: All of its bytes.

    Raises:
        OutputError: The file cannot be written, or is a device; an older one is still whole.
    """
    try:
        _followed(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file into a folder that exists, so that it appears whole or not at all.

    `write_file` is this for a file that the user named; here the caller says what could not be
    written.

    Args:
        path: The file; one that exists is replaced, and a link is followed.
        content: All of its bytes.

    Raises:
        OSError: The file cannot be written; an older one is still whole.
        OutputError: It is a pipe or a device.
    """
    _refuse_devices(path)
    place = _followed(path)
    handle, name = tempfile.mkstemp(prefix=f".{place.name}-", dir=place.parent)
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        draft.chmod(0o644)
        draft.replace(place)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def staged_folder(place: Path, beside: Path | None = None) -> Iterator[Path]:
    """Fill a temporary folder that takes its place when the block ends well.

    Whatever ends the block early, a full disk or a Ctrl-C included, leaves the place as it was
    and nothing beside it.

    Args:
        place: Where the folder belongs; a folder that is there is replaced, and missing parents
            are made.
        beside: A folder above the place that programs search for folders like it. The temporary
            one lies beside that where it can be renamed from there, else beside the place.

    Yields:
        The temporary folder, empty.

    Raises:
        OSError: The folder cannot be made, or cannot take its place.
    """
    place = place.absolute()
    missing = [parent for parent in place.parents if not parent.exists()]
    try:
        if missing:
            place.parent.mkdir(parents=True, exist_ok=True)
        hidden = partial(_hidden_in, _staging(place, beside), place.name)
        draft = hidden()
        try:
            draft.mkdir()
            yield draft
            _swap(draft, place, hidden)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    finally:
        _remove_empty(missing)


def _staging(place: Path, beside: Path | None) -> Path:
    """The folder for what is to be renamed to a place, or was."""
    if beside is None or not _can_rename(beside.absolute().parent, place.parent):
        return place.parent
    return beside.absolute().parent


def _can_rename(source: Path, target: Path) -> bool:
    """Whether what lies in one folder can be renamed into another; not from disk to disk."""
    probe = _hidden_in(source, "probe")
    landed = target / probe.name
    try:
        probe.touch()
        probe.rename(landed)
    except OSError:
        return False
    finally:
        for path in (probe, landed):
            with suppress(OSError):
                path.unlink()
    return True


def _hidden_in(folder: Path, name: str) -> Path:
    return folder / f".{name}-{secrets.token_hex(4)}"


def _swap(draft: Path, place: Path, hidden: Callable[[], Path]) -> None:
    """Put a folder in the place of another, which comes back where that fails."""
    if not place.exists():
        draft.rename(place)
        return
    retired = hidden()
    try:
        place.rename(retired)
        draft.rename(place)
    finally:
        if not place.exists() and retired.exists():
            retired.rename(place)
        shutil.rmtree(retired, ignore_errors=True)


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders, innermost first, that nothing came to lie in."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def require_writable(path: Path) -> None:
    """Find out, before the work starts, whether a file could be written; leave nothing behind.

    Args:
        path: The file that `write_file` will write.

    Raises:
        OutputError: It is a folder or a device, or lies where nothing can be written.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    _refuse_devices(path)
    _try_writing(_followed(path).parents, f"cannot write {path}")


def _followed(path: Path) -> Path:
    """The file that a path leads to, which need not exist: to replace a link would break it."""
    return Path(os.path.realpath(path))


def _refuse_devices(path: Path) -> None:
    """Raise OutputError for a pipe or a device: root could replace /dev/null by a file."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OutputError(f"cannot write {path}: it is a device or a pipe, not an ordinary file")


def is_utf8(path: Path) -> bool:
    """Tell whether a path can be given to libraries that take paths as UTF-8 alone."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def short_stem(path: str | Path) -> str:
    """Take a file's name without its suffix for a name that is made of it.

    Characters that would break a terminal's line become hyphens, and it is cut where names made of
    it could be too long.
    """
    stem = _CONTROLS.sub("-", Path(path).stem)
    while len(os.fsencode(stem)) > _STEM_BYTES:
        stem = stem[:-1]
    return stem


def unused(name: str, taken: Counter[str]) -> str:
    """Give a name, with a number where it was taken before, and count it as taken."""
    free = name
    while taken[free]:
        taken[name] += 1
        free = f"{name}-{taken[name]}"
    taken[free] += 1
    return free


def require_writable_folder(path: Path) -> None:
    """Make sure that files can be written to a folder, and leave nothing behind.

    Args:
        path: The folder, which need not exist yet.

    Raises:
        OutputError: It is a file, or lies where nothing can be written.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"cannot write to {path}: it is a file, not a folder")
    _try_writing((path, *path.absolute().parents), f"cannot write to {path}")


@contextmanager
def kept_from_others(folder: Path, message: str) -> Iterator[None]:
    """Keep a folder, which is made, from other processes that ask for it so.

    A new one that is empty in the end goes again; its parents stay. Where file systems have no
    locks, nothing is kept from others.

    Args:
        folder: The folder.
        message: What is said where another process has it.

    Raises:
        OptionError: Another process has it.
        OutputError: It cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        is_new = True
        try:
            folder.mkdir()
        except FileExistsError:
            is_new = False
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
    with ExitStack() as ended:
        ended.callback(os.close, handle)
        with suppress(OSError):
            require_lock(handle, message)
        if not (folder.exists() and os.path.samestat(folder.stat(), os.fstat(handle))):
            raise OptionError(message)  # whoever made it has taken it away again
        try:
            yield
        finally:
            if is_new:
                with suppress(OSError):
                    _remove_empty([folder])


def require_lock(handle: int, message: str) -> None:
    """Lock an open file for this process, until it is closed.

    Args:
        handle: Of the file.
        message: What is said where another process has the lock.

    Raises:
        OptionError: Another process has it.
        OSError: The file cannot be locked.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OptionError(message) from error


def _try_writing(folders: Sequence[Path], failure: str) -> None:
    """Raise OutputError where the first of the folders that exists takes no file."""
    place = next(folder for folder in folders if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OutputError(f"{failure}: {error.strerror or error}") from error
