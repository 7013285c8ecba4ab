"""The end that SIGTERM asks for."""

from __future__ import annotations


class Terminated(SystemExit):
    """Raised where SIGTERM arrives; the exit code is the shell's, 143."""

    def __init__(self) -> None:
        super().__init__(143)
