"""What a batch writes: Parquet files, each of some images, that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.errors import OptionError, OutputError, brief
from ccam_deploy.files import require_lock, require_writable_folder
from ccam_deploy.text import one_line

SETTINGS = "_settings.json"
"""Readers of Parquet folders pass over names that begin with an underscore or a full stop."""
_PREFIX = "part-"
_DRAFT = f".{_PREFIX}"
_DIGITS = 24


@dataclass(frozen=True)
class Row:
    """One (image, class) pair, or an image that could not be explained.

    Attributes:
        path: What the input calls the image.
        key: What tells the image from all others of the input; see inputs.Item.
        class_index: The class; None beside an error, like those below.
        class_name: Its name, or its number where the classes have no names.
        score: Its probability; the output itself if the network's activation is none.
        saliency: [H, W] float16 in [0, 1].
        settings: The method, its options and the engine, as JSON.
        error: Why there is no saliency; None where there is.
    """

    path: str
    key: str
    class_index: int | None = None
    class_name: str | None = None
    score: float | None = None
    saliency: NDArray[np.float16] | None = None
    settings: str | None = None
    error: str | None = None


def part_name(keys: Sequence[str]) -> str:
    """Name the file of some images, by what they are."""
    digest = hashlib.sha256("\n".join(map(one_line, keys)).encode()).hexdigest()
    return f"{_PREFIX}{digest[:_DIGITS]}.parquet"


def write_draft(
    folder: Path, name: str, token: str, rows: Sequence[Row], size: Sequence[int]
) -> str:
    """Write rows to a file that readers pass over until it is kept; see Output.keep.

    Args:
        folder: The output's folder.
        name: The name that the file is to have.
        token: Of the run; see Output.
        rows: The rows.
        size: Height and width of the maps.

    Returns:
        The file's name.

    Raises:
        OutputError: The file cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    draft = folder / f".{name}-{token}"
    try:
        with draft.open("wb") as file:
            parquet.write_table(_table(rows, size), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
    except (OSError, pyarrow.ArrowException) as error:
        draft.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else brief(error)
        raise OutputError(f"cannot write to {folder}: {reason}") from error
    return draft.name


def _table(rows: Sequence[Row], size: Sequence[int]) -> Any:
    import pyarrow

    texts = pyarrow.string()
    columns = {
        "path": pyarrow.array([one_line(row.path) for row in rows], texts),
        "key": pyarrow.array([one_line(row.key) for row in rows], texts),
        "class_index": pyarrow.array([row.class_index for row in rows], pyarrow.int32()),
        "class_name": pyarrow.array([_encodable(row.class_name) for row in rows], texts),
        "score": pyarrow.array([row.score for row in rows], pyarrow.float32()),
        "saliency": _maps([row.saliency for row in rows], size),
        "settings": pyarrow.array([row.settings for row in rows], texts),
        "error": pyarrow.array([_encodable(row.error) for row in rows], texts),
    }
    return pyarrow.table(columns)


def _encodable(text: str | None) -> str | None:
    return None if text is None else one_line(text)


def _maps(maps: Sequence[NDArray[np.float16] | None], size: Sequence[int]) -> Any:
    """A column of tensors [H, W] float16, null where there is no map."""
    import pyarrow

    values = np.zeros((len(maps), *size), np.float16)
    for place, saliency in zip(values, maps, strict=True):
        if saliency is not None:
            place[:] = saliency
    absent = pyarrow.array([saliency is None for saliency in maps])
    storage = pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(values.reshape(-1)), int(np.prod(size)), mask=absent
    )
    kind = pyarrow.fixed_shape_tensor(pyarrow.float16(), list(size))
    return pyarrow.ExtensionArray.from_storage(kind, storage)


class Output:
    """The folder of a batch. One run writes to it at a time; the next continues where it ended.

    Attributes:
        folder: Where the files lie.
        token: Tells this run's drafts from those of a run that was killed and whose workers may
            still write.
        finished: Keys of the images whose rows are kept.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open a folder, or begin one.

        Args:
            folder: Where the files lie or will lie.
            settings: All that the rows depend on, as JSON has it.

        Raises:
            OptionError: The folder holds rows with other settings, or another run writes to it.
            OutputError: The folder cannot be used, or a file in it cannot be read.
        """
        self.folder = folder
        self.token = secrets.token_hex(4)
        require_writable_folder(folder)
        path = folder / SETTINGS
        if not path.exists() and folder.is_dir() and set(folder.iterdir()) - {path}:
            raise OutputError(f"{folder} has files of something else; give another OUTPUT")
        self._lock = _locked(path)
        try:
            known = _known_settings(path)
            self.remove_drafts()
            self.finished = _kept_keys(folder)
            if self.finished:
                _require_same(folder, known, settings)
            else:  # a new folder, or of a run that ended before it had any rows
                self._write_settings(settings)
        except BaseException:
            self.close()
            raise

    def keep(self, draft: str) -> None:
        """Give a file that was written whole its name, under which readers find it.

        Raises:
            OutputError: The file was removed, or cannot be renamed.
        """
        name = draft.removeprefix(".").removesuffix(f"-{self.token}")
        try:
            (self.folder / draft).replace(self.folder / name)
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.folder}: {error.strerror}; all nodes must see the folder"
            ) from error

    def remove_drafts(self) -> None:
        """Remove what a run left that ended early."""
        for draft in self.folder.glob(f"{_DRAFT}*"):
            draft.unlink(missing_ok=True)

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, _as_file(settings), 0)
        except OSError as error:
            raise OutputError(f"cannot write to {self.folder}: {error.strerror}") from error

    def close(self) -> None:
        """Let another run write to the folder."""
        os.close(self._lock)


def _as_file(settings: Mapping[str, Any]) -> bytes:
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def _locked(path: Path) -> int:
    """Lock a file for this process, however it ends; one that is not there is made, empty.

    It keeps its place on the disk, so that of runs which begin together only one gets the lock.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"{path} cannot be opened: {error.strerror}") from error
    taken = f"another run writes to {path.parent}; wait for its end, or give another OUTPUT"
    try:
        require_lock(handle, taken)
    except OSError as error:
        os.close(handle)
        raise OutputError(f"{path} cannot be locked: {error.strerror}") from error
    except OptionError:
        os.close(handle)
        raise
    return handle


def _known_settings(path: Path) -> dict[str, Any]:
    """The settings of a folder's rows, none of a new one's; OutputError for something else."""
    try:
        known = json.loads(path.read_bytes() or b"{}")
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read: {brief(error)}") from error
    if not isinstance(known, dict):
        raise OutputError(f"{path} has no settings; give another OUTPUT")
    return known


def _require_same(folder: Path, known: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise OptionError for the first setting that differs from the folder's."""
    wanted = json.loads(json.dumps(settings))
    for name in {**known, **wanted}:
        if known.get(name) != wanted.get(name):
            raise OptionError(
                f"{folder} holds rows with {name} {json.dumps(known.get(name))}, and this command "
                f"has {json.dumps(wanted.get(name))}; to continue them, give what they were begun "
                "with; to begin others, give another OUTPUT"
            )


def _kept_keys(folder: Path) -> set[str]:
    import pyarrow
    from pyarrow import parquet

    keys: set[str] = set()
    for path in sorted(folder.glob(f"{_PREFIX}*.parquet")):
        try:
            keys.update(parquet.ParquetFile(path).read(columns=["key"])["key"].to_pylist())
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise OutputError(
                f"{path} cannot be read ({brief(error)}); remove it, and its rows are computed "
                "again"
            ) from error
    return keys
