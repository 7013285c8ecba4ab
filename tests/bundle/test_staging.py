"""Bundles take their place whole, or leave what was there."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from ccam_deploy.bundle.staging import staged_bundle
from ccam_deploy.errors import BundleError
from tests.damage import contents


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change, alone in its folder."""
    return shutil.copytree(tiny_bundle, tmp_path / "place" / "tiny")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_staged_takes_the_place(folder: Path, exists: bool) -> None:
    if not exists:
        shutil.rmtree(folder)
    with staged_bundle(folder) as work:
        assert work.parent == folder.parent
        (work / "new").write_bytes(b"new")
        assert folder.exists() == exists
    assert contents(folder) == {"new": b"new"}
    assert names(folder.parent) == ["tiny"]
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    "problem",
    [RuntimeError("boom"), KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))],
    ids=lambda problem: type(problem).__name__,
)
def test_staged_leaves_nothing(folder: Path, exists: bool, problem: BaseException) -> None:
    before = contents(folder)
    if not exists:
        shutil.rmtree(folder)
    expected = BundleError if isinstance(problem, OSError) else type(problem)
    with pytest.raises(expected) as raised, staged_bundle(folder) as work:
        (work / "new").write_bytes(b"new")
        raise problem
    if expected is BundleError:
        assert str(raised.value) == f"cannot write {folder}: No space left on device"
    assert names(folder.parent) == (["tiny"] if exists else [])
    assert not exists or contents(folder) == before


def test_staged_survives_a_failed_swap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old bundle comes back where the new one cannot take its place."""
    before = contents(folder)
    plain = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise OSError(errno.EIO, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    expected = pytest.raises(BundleError, match=r"cannot write .*tiny: Input/output error")
    with expected, staged_bundle(folder) as work:
        (work / "new").touch()
    assert contents(folder) == before
    assert names(folder.parent) == ["tiny"]


def test_staged_installs_no_signal_handler(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with staged_bundle(tmp_path / "new"):
        assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("occupant", ["file", "folder", "link"])
def test_staged_refuses_what_is_no_bundle(folder: Path, occupant: str) -> None:
    target = folder.parent / "other"
    if occupant == "file":
        target.write_text("mine")
    elif occupant == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    else:
        target.symlink_to(folder)
    before = contents(folder.parent)
    with pytest.raises(BundleError) as raised, staged_bundle(target):
        pytest.fail("the block must not run")
    assert str(raised.value) == f"{target} exists and is not a bundle; choose another --output"
    assert contents(folder.parent) == before


def test_staged_takes_an_empty_folder_and_makes_parents(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        with staged_bundle(target) as work:
            (work / "new").touch()
        assert (target / "new").exists()
    (tmp_path / "file").touch()
    expected = pytest.raises(BundleError, match=r"cannot write .*: Not a directory")
    with expected, staged_bundle(tmp_path / "file" / "c"):
        pytest.fail("the block must not run")
