"""Ends what is left of a Ray cluster of this machine, and removes its folder.

    python reaper.py FOLDER

It waits until its standard input ends, as it does however the process ends that holds the other
end. Ray ends most of its processes by itself then, but its agents would go on to look for a head
that is gone. Run as a file, it imports the standard library alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_PATIENCE_S = 30.0


def users_of(folder: Path) -> Iterator[int]:
    """Find the processes that have files of a folder open, as all of a cluster have their logs.

    Args:
        folder: An absolute path without links.

    Yields:
        Their numbers, but not that of this process's parent, which started the cluster.
    """
    for place in _PROC.glob("[0-9]*"):
        if int(place.name) == os.getppid():
            continue
        with suppress(OSError):  # it has ended, or is another user's
            if any(_lies_in(folder, link) for link in (place / "fd").iterdir()):
                yield int(place.name)


def _lies_in(folder: Path, link: Path) -> bool:
    with suppress(OSError):  # it was closed
        return folder in link.readlink().parents
    return False


def reap(folder: Path, patience_s: float = _PATIENCE_S) -> None:
    """Kill the processes that use a folder until there are none, and remove it.

    Args:
        folder: An absolute path without links.
        patience_s: Seconds after which it is removed all the same.
    """
    deadline = time.monotonic() + patience_s
    while (users := list(users_of(folder))) and time.monotonic() < deadline:
        for number in users:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    reap(Path(sys.argv[1]))
