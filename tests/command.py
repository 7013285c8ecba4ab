"""Runs the command line, mostly inside the tests' process."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click.testing import CliRunner, Result

from ccam_deploy.cli.main import main

SCRIPT = Path(sys.executable).with_name("ccam-deploy")
WEIGHTS = ["--arch", "tests.networks:tiny", "--input-size", "32x48"]


def all_commands(group: click.Group = main, prefix: str = "") -> dict[str, click.Command]:
    """Every command by its name, those of groups with the group's before theirs."""
    commands: dict[str, click.Command] = {}
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            commands |= all_commands(command, f"{prefix}{name} ")
        else:
            commands[prefix + name] = command
    return commands


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def success(*words: object) -> Result:
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    return result


def failure(*words: object) -> str:
    """The one line that a command prints on stderr when it fails."""
    return refusal(run(*words))


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.output
    return lines[0].removeprefix("error: ")
