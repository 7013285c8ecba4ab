"""No warning of Python reaches who runs `explain` or `bench`: each would be an error here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, example_files


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("explain", "--save", "none", "--json"),
        ("explain", "--save", "none", "--method", "rise", "--option", "masks=8"),
        ("bench", "--duration", "0.1", "--warmup", "0", "--json", "--no-cold-start"),
    ],
    ids=" ".join,
)
def test_commands_run_where_warnings_are_errors(tiny_bundle: Path, words: tuple[str, ...]) -> None:
    name, *options = words
    files = [str(file) for file in example_files()[:2]]
    command = [sys.executable, "-W", "error", "-m", "ccam_deploy", name, str(tiny_bundle), *files]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
