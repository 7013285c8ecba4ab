"""`ccam-deploy triton check`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import click

from ccam_deploy.cli.options import AsJson
from ccam_deploy.cli.parameters import Argument, Number, Option, with_options
from ccam_deploy.cli.printing import print_json, say


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """The options of `triton check`."""

    url: Annotated[str, Argument()]
    models: Annotated[
        tuple[str, ...],
        Option("--only", "Ask this model only. Can be repeated.", multiple=True, metavar="NAME"),
    ] = ()
    timeout: Annotated[
        float,
        Option("--timeout", "Seconds that each answer may take.", Number(0, min_open=True)),
    ] = 10.0
    as_json: AsJson = False


@click.command()
@with_options(CheckOptions)
def check(options: CheckOptions) -> None:
    """Ask the models of a running Triton server for an answer each.

    URL is http://HOST:PORT or grpc://HOST:PORT. The exit code is 1 where the server cannot be
    reached, says that it is not ready, or where a model does not answer. A server whose model died
    still says that it is ready, so this, and not its health endpoint, is what a probe should run.
    """
    from ccam_deploy.serve.probe import check as probe

    health = probe(options.url, options.models, options.timeout)
    if options.as_json:
        print_json({"alive": health.alive, **asdict(health)})
    else:
        say(str(health), err=not health.alive)
    if not health.alive:
        sys.exit(1)
