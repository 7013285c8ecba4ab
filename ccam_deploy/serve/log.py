"""The server's log: what of it the user sees, and what it says of failures."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Literal

from ccam_deploy.text import one_line

_LINE = re.compile(r'([IWEF])\d{4} [\d:.]+ \d+ [\w.]+:\d+\] ?"?(.*?)"?$')
_FAILED = re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)")
_KEPT = 200


class ServerLog:
    """Reads the server's log to its end in a thread.

    Until `started`, lines are kept back: on a machine without a GPU the server reports errors
    that are none.

    Args:
        lines: The server's output, which is closed at its end.
        say: Called with each line that the user should see.
        show: "all" lines, or the "serious" ones, warnings and errors.
    """

    def __init__(
        self,
        lines: IO[str],
        say: Callable[[str], None],
        show: Literal["all", "serious"] = "serious",
    ) -> None:
        self._say = say
        self._show = show
        self._started = False
        self._recent: deque[str] = deque(maxlen=_KEPT)
        self._reader = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._reader.start()

    def started(self) -> None:
        """Say that all models answer: what comes now is news."""
        self._started = True

    def wait(self, seconds: float) -> None:
        """Wait until the log has ended, as it does with the server."""
        self._reader.join(seconds)

    def failure(self) -> str:
        """Tell in one line why the server has ended, as far as its log says."""
        lines = list(self._recent)
        for line in lines:
            if failed := _FAILED.search(line):
                return f'model "{failed["model"]}" cannot be loaded: {_reason(failed["reason"])}'
        for line in reversed(lines):
            parts = _LINE.match(line)
            if parts and parts[1] in "EF":
                return one_line(parts[2])
            if not parts and line.startswith("error: "):
                return one_line(line.removeprefix("error: "))
        return "it wrote no reason to its log"

    def _read(self, lines: IO[str]) -> None:
        with lines:
            for raw in lines:
                line = raw.rstrip()
                self._recent.append(line)
                if self._show == "all" or (self._started and _serious(line)):
                    with suppress(OSError, ValueError):  # nobody hears it; the server goes on
                        self._say(line)


def _serious(line: str) -> bool:
    """Whether a line is a warning or an error, or comes from a model's own print."""
    if parts := _LINE.match(line):
        return parts[1] != "I"
    return bool(line) and not line.startswith(("+-", "| ", "Signal ("))


def _reason(text: str) -> str:
    r"""The message of an exception in a model, without where in the code it was raised."""
    message = text.split("\\n\\nAt:")[0].removeprefix("Internal: ").replace("\\n", " ")
    return one_line(re.sub(r"^(\w+\.)*\w+(Error|Exception): ", "", message).strip())
