"""What ends a Ray cluster whose command was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ccam_deploy.scale import reaper

_HOLD = "import sys; file = open(sys.argv[1], 'w'); print('ready', flush=True); sys.stdin.read()"


def holder(file: Path) -> subprocess.Popen[str]:
    """A process that has a file open."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", _HOLD, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_who_uses_the_folder_is_ended_and_nobody_else(tmp_path: Path) -> None:
    """The process that waits for the end may still use it, too."""
    folder = tmp_path / "cluster"
    (folder / "logs").mkdir(parents=True)
    command = [sys.executable, "-I", "-S", reaper.__file__, str(folder)]
    with (
        (folder / "logs" / "own").open("w"),
        holder(folder / "logs" / "raylet") as member,
        holder(tmp_path / "cluster-2") as other,
    ):
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
            assert folder.exists()
            assert member.poll() is None
        assert process.returncode == 0
        assert member.wait(10) == -9
        assert not folder.exists()
        assert other.poll() is None
