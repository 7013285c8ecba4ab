"""The command itself: its help, version and completion, and errors with --debug."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import pytest
from click.testing import CliRunner

from ccam_deploy import __version__, explainer, explanation, render
from ccam_deploy.bundle.manifest import PrecisionName
from ccam_deploy.cli import options
from ccam_deploy.cli.explain import FILES
from ccam_deploy.cli.main import main
from ccam_deploy.engines import Backend
from ccam_deploy.engines.tensorrt import library, plans
from tests.command import SCRIPT, run, success


def test_the_installed_command_lists_all_commands() -> None:
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    names = re.findall(r"^  (\w+)  ", done.stdout.split("Commands:")[1], re.MULTILINE)
    assert names == sorted(main.commands)


def test_a_full_disk_behind_the_output(tiny_bundle: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [str(SCRIPT), "info", str(tiny_bundle), "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


def test_help_is_quick() -> None:
    """It imports few modules: a count, for a time would be the machine's too."""
    code = (
        "import sys; before = set(sys.modules); from ccam_deploy.cli.main import main\n"
        "try: main(['--help'])\n"
        "finally: print(len(set(sys.modules) - before))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 100


@pytest.mark.parametrize("words", [["--help"], ["explain", "--help"], ["export", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from ccam_deploy.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([m for m in ('torch', 'onnx', 'onnxruntime', 'numba', 'numpy') "
        "if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_defaults_and_choices_are_the_packages() -> None:
    """They are repeated in cli.options, so that --help imports nothing heavy."""
    assert get_args(Backend) == options.BACKENDS
    assert get_args(PrecisionName) == options.PRECISIONS
    assert options.BATCH_SIZE == explainer.DEFAULT_BATCH
    assert render.Look() == render.Look(options.COLORMAP, options.OPACITY)
    assert tuple(library.FLAVOURS) == options.TENSORRT
    assert explanation.FORMATS == FILES
    assert plans.DEFAULT_MAX_BATCH == options.MAX_BATCH


def test_the_command_alone_shows_its_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ccam-deploy [OPTIONS] COMMAND [ARGS]...")


def test_the_module_is_the_command(here: Path) -> None:
    """It calls itself by the command's name, and answers with its exit codes."""
    for words, code, expected in (
        (["--version"], 0, f"ccam-deploy, version {__version__}\n"),
        (["--nope"], 2, "error: No such option '--nope'. See ccam-deploy --help\n"),
    ):
        command = [sys.executable, "-m", "ccam_deploy", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout + done.stderr) == (code, expected)


def test_version_and_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    assert success("--version").stdout == f"ccam-deploy, version {__version__}\n"
    monkeypatch.setenv("_CCAM_DEPLOY_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "ccam-deploy ver")
    monkeypatch.setenv("COMP_CWORD", "1")
    result = CliRunner().invoke(main, [], prog_name="ccam-deploy")
    assert (result.exit_code, result.stdout) == (0, "plain,verify\n")


@pytest.mark.parametrize("words", [["--nope"], ["export", "x" * 300]])
def test_debug_keeps_every_error(words: list[str]) -> None:
    assert isinstance(run("--debug", *words).exception, click.UsageError | OSError)


def test_debug_shows_the_error_itself(here: Path) -> None:
    result = run("--debug", "info", "none")
    assert result.exit_code == 1
    assert "there is no such folder" in str(result.exception)
