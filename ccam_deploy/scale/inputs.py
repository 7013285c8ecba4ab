"""What a batch reads: folders of image files, Parquet files, and WebDataset shards."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ccam_deploy.errors import DatasetError, ImageError, OptionError, brief
from ccam_deploy.extras import install
from ccam_deploy.files import unused
from ccam_deploy.image_files import IMAGE_SUFFIXES, MAX_BYTES, find_images

Format = Literal["images", "parquet", "webdataset"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".tar": "webdataset"}
_LOOKED_FOR: dict[Format, str] = {
    "images": f"images ({', '.join(IMAGE_SUFFIXES)})",
    "parquet": "Parquet files (.parquet)",
    "webdataset": "WebDataset shards (.tar)",
}
_ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Item:
    """One image of the input, which is not read yet.

    Attributes:
        key: What tells it from all others of the input: its path from the input's folder, with the
            place inside the file where that holds several.
        file: The path of its file from the input's folder; empty for the input itself.
        start: Where it begins in the file: a byte of a shard, a row of a Parquet file.
        size: How many bytes it has in a shard.
        problem: Why it cannot be read; empty where it may be.
    """

    key: str
    file: str
    start: int = 0
    size: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Content:
    """The bytes of an image, or why there are none.

    Attributes:
        item: The image.
        path: What the input calls it.
        content: Its file's bytes.
        problem: Why it could not be read; empty where it was.
    """

    item: Item
    path: str
    content: bytes = b""
    problem: str = ""


@dataclass(frozen=True)
class Columns:
    """The columns of Parquet files that hold images.

    Attributes:
        image: Holds the bytes of image files: binary, or structs with a binary field "bytes".
        path: Holds their names; may be missing.
    """

    image: str = "image"
    path: str = "path"


@dataclass(frozen=True)
class Input:
    """Where images come from.

    Attributes:
        place: A folder, or a single file.
        format: What it holds.
        columns: Of Parquet files.
    """

    place: Path
    format: Format
    columns: Columns = Columns()

    def items(self) -> list[Item]:
        """List all images, without reading any of them.

        Raises:
            DatasetError: There is none, or a file is not of the format.
            OptionError: A Parquet file lacks the column of images.
        """
        items = list(_LISTINGS[self.format](self))
        if not items:
            raise DatasetError(f"{self.place} has no images in its {self.format} files")
        return items

    def read(self, items: Sequence[Item]) -> Iterator[Content]:
        """Read images, those of a file one after the other.

        Args:
            items: Some of the input's, in its order.

        Yields:
            The content of each, with the reason where one cannot be read.
        """
        for item in items:
            if item.problem:
                yield Content(item, item.key, problem=item.problem)
        whole = [item for item in items if not item.problem]
        for file in dict.fromkeys(item.file for item in whole):
            inside = [item for item in whole if item.file == file]
            yield from _READERS[self.format](self, file, inside)

    def path(self, file: str) -> Path:
        """The path of a file, by its path from the input's folder."""
        return self.place / file if file else self.place


def open_input(place: Path, name: str | None = None, columns: Columns | None = None) -> Input:
    """Find out what an input holds.

    Args:
        place: A folder, which is searched with its subfolders, or a file.
        name: The format to look for; None for the only one that the folder has files of.
        columns: Of Parquet files; None for the usual ones.

    Raises:
        DatasetError: The place does not exist, or has no such files.
        OptionError: The format is unknown, or the folder has files of several.
    """
    if not place.exists():
        raise DatasetError(f"{place} does not exist")
    known = [format_ for format_ in FORMATS if name in (None, format_)]
    if not known:
        raise OptionError(f'format "{name}" is unknown; there are {", ".join(FORMATS)}')
    found = [format_ for format_ in _formats_in(place) if format_ in known]
    if len(found) > 1:
        raise OptionError(
            f"{place} holds files of several formats, {', '.join(found)}; choose one by --format"
        )
    if not found:
        looked_for = " or ".join(_LOOKED_FOR[format_] for format_ in known)
        raise DatasetError(f"{place} holds no {looked_for}")
    return Input(place, found[0], columns or Columns())


def _formats_in(place: Path) -> list[Format]:
    paths = place.rglob("*") if place.is_dir() else [place]
    found = {_format_of(path) for path in paths}
    return [name for name in FORMATS if name in found]


def _format_of(path: Path) -> Format | None:
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "images"
    return SUFFIXES.get(suffix)


def _files(source: Input) -> Iterator[str]:
    """The files of the format, by their path from the input's folder, sorted."""
    if not source.place.is_dir():
        yield ""
        return
    for path in sorted(source.place.rglob("*")):
        if _format_of(path) == source.format and path.is_file():
            yield path.relative_to(source.place).as_posix()


def _image_items(source: Input) -> Iterator[Item]:
    try:
        paths = find_images([source.place])
    except ImageError as error:
        raise DatasetError(str(error)) from error
    for path in paths:
        file = "" if path == source.place else path.relative_to(source.place).as_posix()
        yield Item(file or path.name, file)


def _parquet_items(source: Input) -> Iterator[Item]:
    for file in _files(source):
        path = source.path(file)
        name = file or path.name
        try:
            with _parquet_file(path) as parquet:
                _image_column(path, parquet, source.columns)
                rows = parquet.metadata.num_rows
        except DatasetError as error:
            yield Item(name, file, problem=str(error))
            continue
        yield from (Item(f"{name}#{row}", file, row) for row in range(rows))


def _shard_items(source: Input) -> Iterator[Item]:
    for file in _files(source):
        path = source.path(file)
        shard, taken = file or path.name, Counter[str]()
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if member.isfile() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                        key = unused(f"{shard}/{member.name}", taken)
                        yield Item(key, file, member.offset_data, member.size)
        except (tarfile.TarError, OSError) as error:
            yield Item(shard, file, problem=f"the shard {shard} cannot be read: {brief(error)}")


def _read_images(source: Input, file: str, items: Sequence[Item]) -> Iterator[Content]:
    for item in items:
        try:
            content = _limited(source.path(file), 0, MAX_BYTES + 1)
            yield Content(item, item.key, content)
        except OSError as error:
            yield Content(item, item.key, problem=_unreadable(item, error))


def _read_shard(source: Input, file: str, items: Sequence[Item]) -> Iterator[Content]:
    for item in items:
        try:
            content = _limited(source.path(file), item.start, min(item.size, MAX_BYTES + 1))
            yield Content(item, item.key, content)
        except OSError as error:
            yield Content(item, item.key, problem=_unreadable(item, error))


def _read_parquet(source: Input, file: str, items: Sequence[Item]) -> Iterator[Content]:
    path = source.path(file)
    try:
        with _parquet_file(path) as parquet:
            yield from _parquet_contents(path, parquet, source.columns, items)
    except (DatasetError, OptionError) as error:  # the file was exchanged since it was listed
        yield from (Content(item, item.key, problem=str(error)) for item in items)


def _parquet_contents(
    path: Path, parquet: Any, columns: Columns, items: Sequence[Item]
) -> Iterator[Content]:
    import pyarrow

    wanted = {item.start: item for item in items}
    image, fields = _image_column(path, parquet, columns)
    row = 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if not any(row <= start < row + rows for start in wanted):
            row += rows
            continue
        batches = parquet.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=fields)
        try:
            for batch in batches:
                for place in range(batch.num_rows):
                    if item := wanted.pop(row + place, None):
                        yield _parquet_content(item, batch, place, image, columns)
                if not wanted:
                    return
                row += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            problem = f"{path.name} cannot be read: {brief(error)}"
            yield from (Content(item, item.key, problem=problem) for item in wanted.values())
            return
    for item in wanted.values():
        yield Content(item, item.key, problem=f"{path.name} has no row {item.start} any more")


def _parquet_content(item: Item, batch: Any, row: int, image: str, columns: Columns) -> Content:
    value = batch.column(image)[row].as_py()
    named = batch.column(columns.path)[row].as_py() if columns.path in batch.schema.names else None
    if isinstance(value, dict):
        named = named or value.get("path")
        value = value.get("bytes")
    path = item.key if named is None else str(named)
    if value is None:
        return Content(item, path, problem=f"{path} has no bytes in the column {image}")
    return Content(item, path, value)


def _image_column(path: Path, parquet: Any, columns: Columns) -> tuple[str, list[str]]:
    """The column that holds images, and all columns to read.

    Raises:
        OptionError: The file has no such column, or it holds no bytes.
    """
    import pyarrow

    schema = parquet.schema_arrow
    if columns.image not in schema.names:
        raise OptionError(
            f'{path} has no column "{columns.image}", only {", ".join(schema.names)}; choose one '
            "by --image-column"
        )
    kind = schema.field(columns.image).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise OptionError(
            f'the column "{columns.image}" of {path} holds {kind}, not the bytes of image files; '
            "choose another by --image-column"
        )
    named = [columns.path] if columns.path in schema.names else []
    return columns.image, [columns.image, *named]


def _parquet_file(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        DatasetError: It cannot be read, or is not one.
    """
    require_pyarrow()
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read as Parquet: {brief(error)}") from error


def require_pyarrow() -> None:
    """Raise OptionError where pyarrow, which reads and writes Parquet files, is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"Parquet needs pyarrow, which cannot be imported ({brief(error)}): {install('scale')}"
        ) from error


def _limited(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _unreadable(item: Item, error: OSError) -> str:
    return f"{item.key} cannot be read: {error.strerror or error}"


_LISTINGS: dict[Format, Callable[[Input], Iterable[Item]]] = {
    "images": _image_items,
    "parquet": _parquet_items,
    "webdataset": _shard_items,
}
_READERS: dict[Format, Callable[[Input, str, Sequence[Item]], Iterator[Content]]] = {
    "images": _read_images,
    "parquet": _read_parquet,
    "webdataset": _read_shard,
}
