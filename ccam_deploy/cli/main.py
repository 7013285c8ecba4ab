"""The `ccam-deploy` command."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import click

from ccam_deploy import __version__
from ccam_deploy.cli.batch import batch
from ccam_deploy.cli.bench import bench
from ccam_deploy.cli.build import build
from ccam_deploy.cli.compare import compare
from ccam_deploy.cli.demo import demo
from ccam_deploy.cli.doctor import doctor
from ccam_deploy.cli.evaluate import evaluate
from ccam_deploy.cli.explain import explain
from ccam_deploy.cli.export import export
from ccam_deploy.cli.info import info
from ccam_deploy.cli.printing import say
from ccam_deploy.cli.propose import propose
from ccam_deploy.cli.sanity import sanity
from ccam_deploy.cli.sign import sign
from ccam_deploy.cli.signals import TERMINATED, signals_as_exceptions
from ccam_deploy.cli.triton import triton
from ccam_deploy.cli.verify import verify
from ccam_deploy.errors import CcamError
from ccam_deploy.termination import Terminated

_OUTPUT_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Group(click.Group):
    """Turns this package's errors into one line and exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command; --debug shows the traceback of what went wrong."""
        words = sys.argv[1:] if args is None else list(args)
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            # A label or name that the terminal's encoding lacks is no reason to fail.
            sys.stdout.reconfigure(errors="backslashreplace")
        debug = "--debug" in takewhile(lambda word: word.startswith("-"), words)
        try:
            with signals_as_exceptions():
                code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except Terminated:
            say(TERMINATED, err=True)
            raise
        except (CcamError, OSError, click.ClickException, click.Abort) as error:
            if debug or not standalone_mode:
                raise
            say(f"error: {' '.join(_message(error).split())}", err=True)
            sys.exit(2)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _message(error: Exception) -> str:
    if isinstance(error, click.Abort):
        return "interrupted; nothing was left half-written"
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "ccam-deploy"
        if isinstance(error, click.NoSuchOption) and error.option_name == "--debug":
            return f"--debug goes before the command: {command.replace(' ', ' --debug ', 1)} ..."
        text = error.format_message()
        return f"{text}{'' if text.endswith(('.', '?', '?)')) else '.'} See {command} --help"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.errno in _OUTPUT_FAILURES and not error.filename:
        return f"the output cannot be written: {error.strerror}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@click.group("ccam-deploy", cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__)
def main(debug: bool) -> None:
    """Explain an image classifier's decisions, fast, without PyTorch at run time.

    Export a classifier to a bundle once, then explain images with it on any machine.
    """


for command in (
    export,
    build,
    explain,
    batch,
    compare,
    evaluate,
    propose,
    sanity,
    info,
    sign,
    verify,
    bench,
    demo,
    doctor,
    triton,
):
    main.add_command(command)
