"""The `ccam-deploy` command."""

from __future__ import annotations

import sys
from typing import Any

import click

from ccam_deploy import __version__
from ccam_deploy.cli.build import build
from ccam_deploy.cli.explain import explain
from ccam_deploy.cli.export import export
from ccam_deploy.cli.info import info
from ccam_deploy.cli.verify import verify
from ccam_deploy.errors import CcamError


class _Group(click.Group):
    """Turns this package's errors into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; --debug shows the traceback of what went wrong."""
        try:
            return super().invoke(ctx)
        except (CcamError, click.UsageError, KeyboardInterrupt) as error:
            if ctx.params.get("debug"):
                raise
            message = "interrupted; nothing was left half-written"
            if isinstance(error, CcamError):
                message = str(error)
            elif isinstance(error, click.UsageError):
                command = error.ctx.command_path if error.ctx else "ccam-deploy"
                message = f"{error.format_message()} See {command} --help"
            click.echo(f"error: {' '.join(message.split())}", err=True)
            sys.exit(2)


@click.group("ccam-deploy", cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__)
def main(debug: bool) -> None:
    """Explain an image classifier's decisions, fast, without PyTorch at run time.

    Export a classifier to a bundle once, then explain images with it on any machine.
    """


for command in (export, build, explain, info, verify):
    main.add_command(command)
