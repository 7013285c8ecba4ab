"""What is printed stays on its line, whatever names hold and the terminal can show."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from ccam_deploy.cli import printing
from ccam_deploy.cli.main import main
from tests.command import failure
from tests.helpers import example_files

STRANGE = "a\n\x1b[1mb" + os.fsdecode(b"\xff") + "\u732b.png"


@pytest.mark.parametrize(("charset", "cat"), [("latin-1", r"\u732b"), ("utf-8", "\u732b")])
def test_a_name_of_any_kind_is_one_line(
    digits_bundle: Path, tmp_path: Path, charset: str, cat: str
) -> None:
    shutil.copy(example_files()[0], tmp_path / STRANGE)
    words = ["compare", digits_bundle, tmp_path / STRANGE, "--methods", "grad-cam"]
    words += ["--output", tmp_path / "x" / STRANGE]
    runner = CliRunner(charset=charset)
    done = runner.invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert (done.exit_code, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.startswith("grad-cam: ")
    assert second == rf"  {tmp_path}/x/a\n\x1b[1mb\udcff{cat}.png"
    assert (tmp_path / "x" / STRANGE).is_file()


def test_explained_names_are_one_line(digits_bundle: Path, tmp_path: Path) -> None:
    """Those of the images, of the files that were written and of images that cannot be read."""
    shutil.copy(example_files()[0], tmp_path / STRANGE)
    (tmp_path / f"{STRANGE}.png").write_text("no image")
    words = ["explain", digits_bundle, tmp_path, "--method", "grad-cam", "--output", tmp_path / "x"]
    done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 2
    shown = rf"{tmp_path}/a\n\x1b[1mb\udcff\u732b.png".replace("\\u732b", "\u732b")
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{shown}: class 9, probability ")
    written = shown.replace(r"/a\n\x1b", "/x/a--").removesuffix(".png")
    assert second.startswith(f"  {written}-9-grad-cam.overlay")
    (error,) = done.stderr.splitlines()
    assert error.startswith(f"error: {shown}.png is not an image")


def test_an_error_is_one_line(digits_bundle: Path) -> None:
    line = failure("compare", digits_bundle, "no\x1b\u2028ne.png")
    assert line.startswith(r"no\x1b")
    assert len(line.splitlines()) == 1


def test_progress_is_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = iter([0.0, 20.0, 30.0, 45.0, 70.0])
    clock = SimpleNamespace(monotonic=lambda: next(moments))
    monkeypatch.setattr(printing, "time", clock)
    with printing.progress("measuring", 10) as bar:
        for steps in (1, 2, 3, 4):
            bar.update(steps)
    out, err = capsys.readouterr()
    assert not out
    assert err == "measuring: 3 of 10\n"  # after 30 seconds; none when all is done
