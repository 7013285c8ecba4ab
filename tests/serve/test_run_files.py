"""What runs of the server leave behind goes away, and what belongs to others stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ccam_deploy.serve.run_files import remove_leftovers, run_files
from tests.helpers import ROOT

HOLDING = """
import subprocess, sys, time
from contextlib import suppress
from pathlib import Path
from ccam_deploy.serve.run_files import run_files

with run_files(Path(sys.argv[1])) as files:
    (Path(sys.argv[1]) / f"{files.prefix}region").touch()
    server = subprocess.Popen(["sleep", "60"], pass_fds=[files.lock])
    print(files.folder, server.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shm").mkdir()
    (tmp_path / "shm" / "sem.of-another-program").touch()
    return tmp_path / "shm"


def names(shared: Path) -> list[str]:
    return sorted(path.name for path in shared.iterdir())


def test_a_run_removes_its_own(shared: Path) -> None:
    with run_files(shared) as files:
        assert files.folder.is_dir()
        for name in ("one", "two"):
            (shared / f"{files.prefix}{name}").touch()
        (files.folder / "backends").mkdir()
        assert len(names(shared)) == 4
    assert names(shared) == ["sem.of-another-program"]
    assert not files.folder.exists()


def test_runs_at_the_same_time_leave_each_other_alone(shared: Path) -> None:
    with run_files(shared) as first, run_files(shared) as second:
        assert first.prefix != second.prefix
        assert remove_leftovers(shared) == []
        assert first.folder.is_dir()
    assert names(shared) == ["sem.of-another-program"]


def test_what_a_killed_run_left_is_removed_by_the_next(shared: Path) -> None:
    """Once its server has ended too, which inherits the lock and may outlive it."""
    command = [sys.executable, "-c", HOLDING, str(shared)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        name, server = process.stdout.readline().split()
        folder = Path(name)
        process.kill()
        process.wait()
        assert remove_leftovers(shared) == []
        assert len(names(shared)) == 3
        assert folder.is_dir()
        os.kill(int(server), signal.SIGKILL)
        with suppress(psutil.NoSuchProcess):  # it loses its command before it loses the lock
            while psutil.Process(int(server)).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
    with run_files(shared):
        assert len(names(shared)) == 2
        assert not folder.exists()
    assert names(shared) == ["sem.of-another-program"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"folder": "/"}', b'{"folder": "x"}', b"\xff"])
def test_a_file_that_names_no_folder_of_ours_harms_none(shared: Path, content: bytes) -> None:
    (shared / "ccam-deploy-triton-00000000-.run").write_bytes(content)
    assert remove_leftovers(shared) == ["ccam-deploy-triton-00000000-"]
    assert names(shared) == ["sem.of-another-program"]


def test_a_file_that_no_run_of_ours_made_harms_none(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shorter prefix would be all runs', and others may write to the folder too."""
    with run_files(shared) as files:
        (shared / "ccam-deploy-triton-.run").touch()
        (shared / "ccam-deploy-triton-00000001-.run").symlink_to(shared / "sem.of-another-program")
        before = names(shared)
        assert remove_leftovers(shared) == []
        (shared / "ccam-deploy-triton-00000002-.run").touch()
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert remove_leftovers(shared) == []
        monkeypatch.undo()
        assert remove_leftovers(shared) == ["ccam-deploy-triton-00000002-"]
        assert names(shared) == before
        assert files.folder.is_dir()
