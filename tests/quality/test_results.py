"""The file of an evaluation: read back to the bit, safe to break off anywhere."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ccam_deploy.errors import OptionError, OutputError
from ccam_deploy.quality.results import RESULTS, SETTINGS, Results, Row
from tests.damage import full_disk

METRICS = ("deletion", "proportion")
FACTS = {"seed": 0, "methods": {"a": {}, "b": {}}}
GROUPS = [[(0, "a"), (4, "a")], [(0, "b"), (4, "b")], [(7, "a")], [(7, "b")]]


def row(index: int, method: str) -> Row:
    stream = np.random.default_rng(index)
    proportion = float("nan") if index == 4 else float(stream.random())
    return Row(
        index,
        f'{index}, "{method}".png',
        method,
        3,
        float(stream.random()),
        {"deletion": float(stream.random() * 100), "proportion": proportion},
        {"deletion": stream.random(3)} if method == "a" else {},
    )


def fill(folder: Path) -> Results:
    results = Results(folder, FACTS, METRICS)
    results.keep(GROUPS)
    for group in GROUPS:
        results.add([row(*key) for key in group])
    return results


def assert_same(first: Row, second: Row) -> None:
    assert (first.key, first.name, first.target) == (second.key, second.name, second.target)
    assert first.probability == second.probability
    for name in METRICS:
        mine, theirs = first.values[name], second.values[name]
        assert mine == theirs or (math.isnan(mine) and math.isnan(theirs))
    assert set(first.curves) == set(second.curves)
    for curve in first.curves:
        np.testing.assert_array_equal(first.curves[curve], second.curves[curve])


def test_rows_come_back_to_the_bit(tmp_path: Path) -> None:
    written = fill(tmp_path / "new" / "folder")
    content = (written.folder / RESULTS).read_bytes()
    again = Results(written.folder, FACTS, METRICS)
    assert list(again.rows) == [key for group in GROUPS for key in group]
    for key, loaded in again.rows.items():
        assert_same(loaded, row(*key))
    again.keep(GROUPS)
    assert (written.folder / RESULTS).read_bytes() == content
    assert content.startswith(
        b"index,name,method,target,probability,deletion,proportion,deletion_curve,insertion_curve\n"
    )


def test_names_and_settings_of_any_kind(tmp_path: Path) -> None:
    """A row is a line, whatever its name holds, and what is there can be gone on with."""
    facts = {**FACTS, "dataset": os.fsdecode(b"/data/a\nb\xff\xc3\xa9")}
    results = Results(tmp_path, facts, METRICS)
    results.keep(GROUPS)
    name = os.fsdecode(b'a\r\n\xff, "\xc3\xa9".png')
    results.add([replace(row(*key), name=name) for key in GROUPS[0]])
    lines = (tmp_path / RESULTS).read_text().splitlines()
    assert len(lines) == 1 + len(GROUPS[0])
    assert r'"a\r\n\udcff, ""é"".png"' in lines[1]
    again = Results(tmp_path, facts, METRICS)
    assert list(again.rows) == GROUPS[0]


@pytest.mark.slow
def test_any_broken_tail_is_dropped_to_whole_groups(tmp_path: Path) -> None:
    """Wherever the file ends, what stays is whole groups, and what is there is right."""
    whole = (fill(tmp_path).folder / RESULTS).read_bytes()
    for end in range(0, len(whole), 7):
        (tmp_path / RESULTS).write_bytes(whole[:end])
        results = Results(tmp_path, FACTS, METRICS)
        results.keep(GROUPS)
        kept = [group for group in GROUPS if group[0] in results.rows]
        assert list(results.rows) == [key for group in kept for key in group]
        assert kept == GROUPS[: len(kept)]
        for group in GROUPS[len(kept) :]:
            results.add([row(*key) for key in group])
        assert (tmp_path / RESULTS).read_bytes() == whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {**FACTS, "seed": 1},
            "holds an evaluation with seed 0, and this command has 1; to continue",
        ),
        (
            {"seed": 0, "methods": {"a": {}}},
            "with methods a, b, and this command has a; to continue",
        ),
        ({**FACTS, "protocol": "rise"}, 'with protocol null, and this command has "rise"'),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    fill(tmp_path)
    before = (tmp_path / RESULTS).read_bytes()
    with pytest.raises(OptionError, match=message):
        Results(tmp_path, changed, METRICS)
    assert (tmp_path / RESULTS).read_bytes() == before


def test_strange_files_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / RESULTS
    content = path.read_text()
    path.write_text(content.replace("0.", "zero.", 1))
    with pytest.raises(OutputError, match=r"results\.csv was changed \(could not convert"):
        Results(tmp_path, FACTS, METRICS)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(OutputError, match=r"results\.csv has other columns"):
        Results(tmp_path, FACTS, METRICS)
    path.write_bytes(content.encode() + b"1,a\rb,c\n")
    with pytest.raises(OutputError, match=r"results\.csv was changed \(new-line character"):
        Results(tmp_path, FACTS, METRICS)
    (tmp_path / SETTINGS).write_text("[1]")
    with pytest.raises(OutputError, match=r"settings\.json has no settings; give another"):
        Results(tmp_path, FACTS, METRICS)
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(OutputError, match=r"settings\.json is not readable"):
        Results(tmp_path, FACTS, METRICS)
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(OutputError, match=r"results\.csv exists without settings\.json"):
        Results(tmp_path, FACTS, METRICS)


def test_files_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(OutputError, match=r"has files of something else; give another --output$"):
        Results(tmp_path, FACTS, METRICS)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_bundle_that_was_exported_again_is_told(tmp_path: Path) -> None:
    Results(tmp_path, {**FACTS, "digest": "1"}, METRICS)
    with pytest.raises(OptionError, match="as it was before it was exported again"):
        Results(tmp_path, {**FACTS, "digest": "2"}, METRICS)


def test_full_disk_is_one_line_and_keeps_what_was_there(tmp_path: Path) -> None:
    results = Results(tmp_path, FACTS, METRICS)
    results.keep(GROUPS)
    results.add([row(*key) for key in GROUPS[0]])
    size = (tmp_path / RESULTS).stat().st_size
    with full_disk(size + 20), pytest.raises(OutputError, match=r"cannot write .*results\.csv"):
        results.add([row(*key) for key in GROUPS[1]])
    again = Results(tmp_path, FACTS, METRICS)
    again.keep(GROUPS)
    assert list(again.rows) == GROUPS[0]
    assert (tmp_path / RESULTS).stat().st_size == size
