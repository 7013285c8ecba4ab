"""What commands print, and the JSON that they write."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ccam_deploy.text import one_line

_SECONDS = 30.0
"""Between two lines of progress."""

UNSIGNED = "the bundle has changed, so its signature was removed; sign it again"
"""What is said of a bundle that was signed."""


def say(text: str, err: bool = False) -> None:
    """Print one line, whatever the names in it hold."""
    click.echo(one_line(text), err=err)


def print_json(value: Any) -> None:
    """Print a value as indented JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON to a file, which appears whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    from ccam_deploy.files import write_file

    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_file(path, text.encode("utf-8", "backslashreplace"))


def tf32_note(bundle: Path) -> str:
    """Say how to measure TF32, whose fidelity no export records.

    Args:
        bundle: The bundle's folder.
    """
    command = shlex.join(["ccam-deploy", "verify", str(bundle), "--precision", "tf32"])
    return f"tf32, the fp32 graphs on a GPU, is measured there by {command}"


@contextmanager
def progress(label: str, length: int) -> Iterator[Any]:
    """Show a progress bar on stderr; a line twice a minute where that is no terminal.

    Args:
        label: What is going on, in a word.
        length: How many steps there are.

    Yields:
        An object; call its `update` with the number of steps that were done.
    """
    if not sys.stderr.isatty():
        yield _ProgressLines(label, length)
        return
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield bar


class _ProgressLines:
    """Says how far something is, in a line now and then."""

    def __init__(self, label: str, length: int) -> None:
        self._label, self._length = label, length
        self._done, self._said = 0, time.monotonic()

    def update(self, steps: int) -> None:
        """Count steps that were done."""
        self._done += steps
        now = time.monotonic()
        if now - self._said >= _SECONDS and self._done < self._length:
            self._said = now
            say(f"{self._label}: {self._done} of {self._length}", err=True)
