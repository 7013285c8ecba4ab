"""What a batch writes: rows that others can read, in files that are whole; one writer at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccam_deploy.errors import OptionError, OutputError
from ccam_deploy.scale.inputs import Item
from ccam_deploy.scale.parts import SETTINGS, Output, Row, part_name, write_draft
from ccam_deploy.scale.run import PART_SIZE, cut, remaining
from tests.damage import full_disk
from tests.helpers import noise

pytestmark = pytest.mark.scale

SETTING = {"method": "collection-cam", "targets": ["top1"]}


def rows(*names: str) -> list[Row]:
    saliency = np.abs(noise(2, 3)).astype(np.float16)
    return [Row(name, name, 7, "cat", 0.25, saliency, "{}") for name in names]


def keep(output: Output, *names: str, made: list[Row] | None = None) -> Path:
    name = part_name(names)
    output.keep(write_draft(output.folder, name, output.token, made or rows(*names), (2, 3)))
    return output.folder / name


def test_rows_are_read_back(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    output = Output(tmp_path / "out", SETTING)
    made = [*rows("a.png"), Row("b\n.png", "x/b\udc80.png", error="no\nimage"), *rows("c.png")]
    keep(output, "a.png", "x/b\udc80.png", "c.png", made=made)
    table = parquet.read_table(tmp_path / "out")
    assert table["path"].to_pylist() == ["a.png", r"b\n.png", "c.png"]
    assert table["key"].to_pylist() == ["a.png", r"x/b\udc80.png", "c.png"]
    assert table["class_index"].to_pylist() == [7, None, 7]
    assert table["class_name"].to_pylist() == ["cat", None, "cat"]
    assert table["score"].to_pylist() == [0.25, None, 0.25]
    assert table["error"].to_pylist() == [None, r"no\nimage", None]
    (saliency,) = table["saliency"].chunks
    assert saliency.type == pyarrow.fixed_shape_tensor(pyarrow.float16(), [2, 3])
    assert saliency.is_null().to_pylist() == [False, True, False]
    maps = saliency.take(pyarrow.array([0, 2])).to_numpy_ndarray()
    expected = made[0].saliency
    assert expected is not None
    assert maps.dtype == np.float16
    assert np.array_equal(maps, np.stack([expected, expected]))


def test_a_draft_is_not_seen_until_it_is_kept(tmp_path: Path) -> None:
    from pyarrow import parquet

    output = Output(tmp_path, SETTING)
    keep(output, "a")
    draft = write_draft(tmp_path, part_name(["b"]), output.token, rows("b"), (2, 3))
    assert parquet.read_table(tmp_path)["key"].to_pylist() == ["a"]
    output.close()
    again = Output(tmp_path, SETTING)
    assert again.finished == {"a"}
    assert not (tmp_path / draft).exists()
    with pytest.raises(OutputError, match="all nodes must see the folder"):
        again.keep(draft)


def test_what_is_left_for_the_next_run(tmp_path: Path) -> None:
    output = Output(tmp_path, SETTING)
    names = ["a", "b\n", "c", "d\udc80"]
    keep(output, names[1], names[3])
    output.close()
    items = [Item(name, name) for name in names]
    assert [item.key for item in remaining(items, Output(tmp_path, SETTING))] == ["a", "c"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    output = Output(tmp_path, SETTING)
    with pytest.raises(OptionError, match=f"another run writes to {tmp_path}; wait for its end"):
        Output(tmp_path, SETTING)
    output.close()
    Output(tmp_path, SETTING).close()


def test_of_runs_that_begin_together_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw that there was nothing yet."""
    folder = tmp_path / "out"
    first = Output(folder, SETTING)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name != SETTINGS and exists(path))
    with pytest.raises(OptionError, match="another run writes to"):
        Output(folder, {**SETTING, "method": "rise"})
    assert json.loads((folder / SETTINGS).read_text()) == SETTING
    first.close()


def test_a_run_that_was_killed_before_its_settings_stood(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).touch()
    Output(tmp_path, SETTING).close()
    assert json.loads((tmp_path / SETTINGS).read_text()) == SETTING


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"method": "rise"}, 'method "collection-cam", and this command has "rise"'),
        ({"targets": ["top1", "3"]}, r'targets \["top1"\], and this command has \["top1", "3"\]'),
        ({"more": 1}, "more null, and this command has 1"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, other: dict[str, Any], difference: str) -> None:
    output = Output(tmp_path, SETTING)
    keep(output, "a")
    output.close()
    with pytest.raises(OptionError, match=difference):
        Output(tmp_path, {**SETTING, **other})
    Output(tmp_path, {**SETTING}).close()


def test_settings_of_a_run_without_rows_do_not_bind(tmp_path: Path) -> None:
    """It ended before it had any, because its options did not fit, for one."""
    Output(tmp_path, {**SETTING, "more": "x" * 100}).close()
    Output(tmp_path, SETTING).close()
    assert json.loads((tmp_path / SETTINGS).read_text()) == SETTING
    Output(tmp_path, SETTING).close()


def test_folders_of_something_else(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, not a folder"):
        Output(tmp_path / "file", SETTING)
    with pytest.raises(OutputError, match="has files of something else; give another OUTPUT"):
        Output(tmp_path, SETTING)
    place = tmp_path / "out"
    Output(place, SETTING).close()
    (place / SETTINGS).write_text("{")
    with pytest.raises(OutputError, match=r"_settings\.json cannot be read: "):
        Output(place, SETTING)
    (place / SETTINGS).write_text("[]")
    with pytest.raises(OutputError, match="has no settings"):
        Output(place, SETTING)
    (place / SETTINGS).write_text(json.dumps(SETTING))
    (place / "part-1.parquet").write_text("hello")
    with pytest.raises(OutputError, match=r"part-1\.parquet cannot be read .*; remove it, and its"):
        Output(place, SETTING)
    parquet.write_table(pyarrow.table({"x": [1]}), place / "part-1.parquet")
    with pytest.raises(OutputError, match=r"part-1\.parquet cannot be read "):
        Output(place, SETTING)
    (place / "part-1.parquet").unlink()
    Output(place, SETTING).close()


def test_a_full_disk_leaves_no_draft(tmp_path: Path) -> None:
    output = Output(tmp_path, SETTING)
    with full_disk(100), pytest.raises(OutputError, match=r"cannot write to .*: File too large"):
        write_draft(tmp_path, part_name(["a"]), output.token, rows("a"), (2, 3))
    assert [path.name for path in tmp_path.iterdir()] == [SETTINGS]


def test_parts() -> None:
    items = [Item(str(number), "") for number in range(150)]
    sizes = [len(part) for part in cut(items, (3, 224, 224))]
    assert sizes == [PART_SIZE, PART_SIZE, 150 - 2 * PART_SIZE]
    assert [item for part in cut(items, (3, 224, 224), 7) for item in part] == items
    assert {len(part) for part in cut(items, (3, 1024, 1024))} == {5}
    assert len(cut(items[:3], (3, 10_000, 10_000))) == 3
    names = {part_name(keys) for keys in (["a", "b"], ["b", "a"], ["ab"], ["a"], ["a\nb"])}
    assert len(names) == 5
