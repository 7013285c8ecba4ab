"""What a batch reads: every image is listed once, and what cannot be read says why."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ccam_deploy.errors import DatasetError, OptionError
from ccam_deploy.scale.inputs import FORMATS, Columns, Input, Item, open_input
from tests.damage import flip


def write_shard(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def read_all(source: Input) -> dict[str, bytes | str]:
    """The bytes of each image, or why there are none, by its key."""
    contents = source.read(source.items())
    return {content.item.key: content.problem or content.content for content in contents}


def test_image_files(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.JPG", "a/b.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "notes.txt").touch()
    source = open_input(tmp_path)
    assert source.format == "images"
    assert source.items() == [Item(k, k) for k in ("a/b.jpeg", "a/c.JPG", "b.png")]
    assert read_all(source) == {k: k.encode() for k in ("a/b.jpeg", "a/c.JPG", "b.png")}
    items = source.items()
    (tmp_path / "b.png").unlink()
    *_, last = source.read(items)
    assert last.problem == "b.png cannot be read: No such file or directory"


def test_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"x")
    assert read_all(open_input(tmp_path / "b.png")) == {"b.png": b"x"}
    write_shard(tmp_path / "s.tar", {"a.png": b"a"})
    assert read_all(open_input(tmp_path / "s.tar")) == {"s.tar/a.png": b"a"}


def test_shards(tmp_path: Path) -> None:
    """Members that are no images are passed over; names that come twice are told apart."""
    members = {"x/1.jpg": b"one", "x/1.json": b"{}", "x/2.png": b"two" * 1000}
    write_shard(tmp_path / "b.tar", members)
    write_shard(tmp_path / "a.tar", {"1.jpg": b"other"})
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        member = tarfile.TarInfo("1.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"new"))
    assert read_all(open_input(tmp_path)) == {
        "a.tar/1.jpg": b"other",
        "a.tar/1.jpg-2": b"new",
        "b.tar/x/1.jpg": b"one",
        "b.tar/x/2.png": b"two" * 1000,
    }


def test_damaged_shards_are_told_of(tmp_path: Path) -> None:
    """What comes before the damage is read."""
    write_shard(tmp_path / "cut.tar", {"1.png": b"one", "2.png": b"x" * 5000, "3.png": b"three"})
    content = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:3000])
    (tmp_path / "text.tar").write_text("hello")
    read = read_all(open_input(tmp_path))
    assert read["cut.tar/1.png"] == b"one"
    assert len(read["cut.tar/2.png"]) < 5000
    assert str(read["cut.tar"]).startswith("the shard cut.tar cannot be read: ")
    assert str(read["text.tar"]).startswith("the shard text.tar cannot be read: ")
    assert set(read) == {"cut.tar/1.png", "cut.tar/2.png", "cut.tar", "text.tar"}


def test_the_format_is_found_or_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        open_input(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"holds no images .*png.* or Parquet files .* or WebD"):
        open_input(tmp_path)
    (tmp_path / "a.png").touch()
    assert open_input(tmp_path).format == "images"
    (tmp_path / "a.tar").touch()
    with pytest.raises(OptionError, match="several formats, images, webdataset; choose one by"):
        open_input(tmp_path)
    assert open_input(tmp_path, "webdataset").format == "webdataset"
    with pytest.raises(DatasetError, match=r"holds no Parquet files \(\.parquet\)$"):
        open_input(tmp_path, "parquet")
    with pytest.raises(OptionError, match=f'format "zip" is unknown; there are {FORMATS[0]}, '):
        open_input(tmp_path, "zip")


def test_shards_without_images(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {"1.json": b"{}"})
    with pytest.raises(DatasetError, match="has no images in its webdataset files"):
        open_input(tmp_path).items()


@pytest.mark.scale
@pytest.mark.parametrize("structs", [False, True])
def test_parquet(tmp_path: Path, structs: bool) -> None:
    import pyarrow
    from pyarrow import parquet

    contents = [b"%d" % number for number in range(700)]
    contents[5] = None  # type: ignore[call-overload]
    names = [f"{number % 100}.png" for number in range(700)]  # which are not unique
    columns: dict[str, Any]
    if structs:
        pairs = zip(contents, names, strict=True)
        columns = {"image": [{"bytes": content, "path": name} for content, name in pairs]}
    else:
        columns = {"label": [0] * 700, "image": contents, "path": names}
    (tmp_path / "x").mkdir()
    parquet.write_table(pyarrow.table(columns), tmp_path / "x" / "a.parquet", row_group_size=300)
    parquet.write_table(pyarrow.table(columns)[:2], tmp_path / "b.parquet")
    source = open_input(tmp_path)
    items = source.items()
    assert [item.key for item in items[:3]] == ["b.parquet#0", "b.parquet#1", "x/a.parquet#0"]
    assert len(items) == 702
    some = [items[0], items[2 + 5], *items[2 + 298 : 2 + 302], items[-1]]
    read = list(source.read(some))
    assert [content.item for content in read] == some
    numbers = [0, 5, 298, 299, 300, 301, 699]
    assert [content.path for content in read] == [f"{number % 100}.png" for number in numbers]
    assert [content.content for content in read] == [contents[n] or b"" for n in numbers]
    problems = [content.problem for content in read]
    assert problems == ["", "5.png has no bytes in the column image", *[""] * 5]
    parquet.write_table(pyarrow.table(columns)[:200], tmp_path / "x" / "a.parquet")
    last = list(source.read([items[-1]]))
    assert [content.problem for content in last] == ["a.parquet has no row 699 any more"]


@pytest.mark.scale
def test_columns_of_parquet_files(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"jpg": [b"x", b"y"], "label": [1, 2], "name": [None, "b"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(OptionError, match='no column "image", only jpg, label, name; choose one'):
        open_input(tmp_path).items()
    with pytest.raises(OptionError, match=r'the column "label" of .* holds int64, not the bytes'):
        open_input(tmp_path, columns=Columns("label")).items()
    source = open_input(tmp_path, columns=Columns("jpg", "name"))
    read = list(source.read(source.items()))
    assert [(content.path, content.content) for content in read] == [
        ("a.parquet#0", b"x"),
        ("b", b"y"),
    ]


@pytest.mark.scale
def test_damaged_parquet_files_are_told_of(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"image": [b"x" * 100]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_text("hello")
    parquet.write_table(table, tmp_path / "c.parquet", write_page_checksum=True)
    source = open_input(tmp_path)
    read = read_all(source)
    assert read.pop("a.parquet#0") == b"x" * 100
    assert "b.parquet cannot be read as Parquet: " in str(read.pop("b.parquet"))
    assert set(read) == {"c.parquet#0"}
    items = source.items()
    flip(tmp_path / "a.parquet", (tmp_path / "a.parquet").stat().st_size - 1)
    problem = next(iter(source.read(items))).problem
    assert "a.parquet cannot be read as Parquet: " in problem or problem == items[-2].problem
