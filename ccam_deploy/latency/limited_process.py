"""A process that is ended when its time is over."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class LimitedProcess:
    """A process with a time limit; see limited_process.

    Attributes:
        process: The process, with pipes to stdin and from stdout.
        expired: Whether its time was over before it ended.
        last_words: What it wrote to stderr last, in the end; empty for nothing.
    """

    def __init__(self, process: subprocess.Popen[str], limit: float) -> None:
        self.process = process
        self.expired = False
        self.last_words = ""
        self._timer = threading.Timer(max(limit, 0), self._end)
        self._timer.start()

    def is_done(self) -> None:
        """Let it take the time that it likes from now on."""
        self._timer.cancel()

    def _end(self) -> None:
        self.expired = True
        self.process.kill()


@contextmanager
def limited_process(
    command: Sequence[str], limit: float, folder: Path | None = None
) -> Iterator[LimitedProcess]:
    """Start a process, and wait for its end.

    Args:
        command: The program and its arguments.
        limit: Seconds after which it is ended.
        folder: Where it runs; None for here.

    Yields:
        The process. It is ended where an exception leaves the block.
    """
    # Its errors go to a file: a pipe that is only read at the end would block it when full.
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
        ) as process,
    ):
        limited = LimitedProcess(process, limit)
        try:
            yield limited
            process.communicate()
        except BaseException:
            process.kill()
            raise
        finally:
            limited.is_done()
        errors.seek(0)
        limited.last_words = (errors.read().strip().splitlines() or [""])[-1]
