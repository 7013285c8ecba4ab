"""`ccam-deploy triton serve`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import click

from ccam_deploy.cli.options import LOOPBACK, PATH, Host, RequireSignature
from ccam_deploy.cli.parameters import Argument, Number, Option, unset, with_options
from ccam_deploy.cli.printing import say
from ccam_deploy.termination import Terminated

if TYPE_CHECKING:
    from ccam_deploy.serve.server import Server

_INTERRUPTED = 130
_PORT = click.IntRange(0, 65535)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of `triton serve`."""

    repository: Annotated[Path, Argument(PATH)]
    host: Host = LOOPBACK
    http_port: Annotated[
        int, Option("--http-port", "Port for HTTP; 0 takes a free one.", _PORT)
    ] = 8000
    grpc_port: Annotated[
        int, Option("--grpc-port", "Port for gRPC; 0 takes a free one.", _PORT)
    ] = 8001
    metrics_port: Annotated[
        int, Option("--metrics-port", "Port for Prometheus; 0 takes a free one.", _PORT)
    ] = 8002
    exit_timeout: Annotated[
        int,
        Option(
            "--exit-timeout",
            "Seconds in which requests may end when the server is stopped.",
            click.IntRange(min=0),
        ),
    ] = 30
    check_seconds: Annotated[
        float,
        Option(
            "--check-seconds",
            "Seconds between two looks at the models.",
            Number(0, min_open=True),
        ),
    ] = 2.0
    require_signature: RequireSignature = unset("what the models were exported with")
    log: Annotated[
        bool, Option("--log", "Show all of the server's log, not only warnings and errors.")
    ] = False


@click.command()
@with_options(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Run Triton's server on a model repository, for development.

    It listens on this machine only, and needs the extra serve. The addresses are printed once
    every model has answered a request. A model whose process dies is loaded again. Ctrl-C and
    SIGTERM let the server answer what it has accepted, and end it. In production, run the
    official container; see deploy/.
    """
    from ccam_deploy.serve.server import ServerOptions
    from ccam_deploy.serve.server import serve as running

    chosen = ServerOptions(
        host=options.host,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        exit_timeout=options.exit_timeout,
        require_signature=options.require_signature,
        log="all" if options.log else "serious",
    )
    with running(options.repository, chosen, _tell) as server:
        _watch_until_signal(server, options.check_seconds)


def _tell(line: str) -> None:
    say(line, err=True)


def _announce(server: Server) -> None:
    say(
        f"ready: http://{server.http}, grpc://{server.grpc}, {server.metrics}; "
        f"models: {', '.join(server.models)}"
    )


def _watch_until_signal(server: Server, seconds: float) -> NoReturn:
    """Look after the models until a signal comes or the server ends, and exit with its code."""
    from ccam_deploy.serve.watch import Watch

    try:
        watch = Watch(
            server.endpoint, server.process, server.models, _tell, server.require_signatures
        )
        _announce(server)
        while not server.ended:
            time.sleep(seconds)
            watch.look()
    except (KeyboardInterrupt, Terminated) as signalled:
        ending = server.stop()
        outcome = "all requests answered" if ending.drained else "requests were cut off"
        _tell(f"stopped after {ending.seconds:.1f} s, {outcome}")
        sys.exit(_INTERRUPTED if isinstance(signalled, KeyboardInterrupt) else signalled.code)
    _tell(f"error: the server has ended: {server.failure()}")
    sys.exit(1)
