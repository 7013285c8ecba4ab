"""`ccam-deploy demo`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import click

from ccam_deploy.cli.options import LOOPBACK, BundleFolder, EngineOptions, Host, LookOptions
from ccam_deploy.cli.parameters import Option, with_options
from ccam_deploy.cli.printing import say
from ccam_deploy.cli.signals import TERMINATED
from ccam_deploy.termination import Terminated

if TYPE_CHECKING:
    from ccam_deploy.page.worker import Worker

Port = Annotated[
    int, Option("--port", "Port to listen at; 0 for any that is free.", click.IntRange(0, 65535))
]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of `demo`."""

    bundle: BundleFolder
    host: Host = LOOPBACK
    port: Port = 7860
    engine: EngineOptions
    look: LookOptions


@click.command()
@with_options(DemoOptions)
def demo(options: DemoOptions) -> None:
    """Serve a page on which BUNDLE explains pictures.

    Drop a picture, choose a class and a method with its options, and see the map, and the masks
    and weights of each layer, beside those of another method. Prints the page's address and serves
    it until Ctrl-C. Nothing is sent to other machines. Needs the extra "demo".
    """
    from ccam_deploy.cli import choices
    from ccam_deploy.page import server
    from ccam_deploy.page.viewer import Viewer
    from ccam_deploy.page.worker import Worker

    look = options.look.look()
    server.require_gradio()
    with server.listen(options.host, options.port) as listener:
        if not server.is_loopback(options.host):
            say(f"warning: whoever reaches {options.host} can use the page", err=True)
        with choices.open_explainer(options.bundle, options.engine) as explainer:
            worker = Worker()
            with _ending(worker):
                server.serve(
                    Viewer(explainer),
                    worker,
                    look,
                    listener,
                    lambda url: say(f"the page is at {url}"),
                )


@contextmanager
def _ending(worker: Worker) -> Iterator[None]:
    """End the command at a signal, also while an explanation runs, which nobody can interrupt.

    Then the process is left at once: an engine cannot be closed while it runs, and Python would
    wait for it. There is nothing to clean up any more.
    """
    try:
        yield
    except KeyboardInterrupt:  # how a server is meant to end
        say("stopped", err=True)
        if worker.busy:
            os._exit(0)
    except Terminated as ended:
        if not worker.busy:
            raise
        say(TERMINATED, err=True)
        os._exit(int(ended.code or 0))
