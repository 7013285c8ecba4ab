"""The commands that messages give to add extras are ones that pip can follow."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from typing import get_args

import pytest

from ccam_deploy.extras import REPLACE_ONNXRUNTIME, Extra, install
from tests.helpers import ROOT


def test_extras_are_the_package_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(get_args(Extra)) <= set(project["optional-dependencies"])


def test_several_extras_are_one_requirement() -> None:
    assert install("export", "cpu") == "pip install 'ccam-deploy[export,cpu]'"
    assert REPLACE_ONNXRUNTIME.endswith(install("gpu-onnxruntime"))


@pytest.mark.slow
def test_pip_finds_the_package_without_an_index() -> None:
    """It is the one that is installed here."""
    words = [*shlex.split(install("cpu")), "--dry-run", "--no-index", "--no-deps"]
    command = [sys.executable, "-m", *words, "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Requirement already satisfied: ccam-deploy[cpu]" in done.stdout
