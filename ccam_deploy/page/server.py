"""Serves the page on this machine, and ends with the command."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.extras import install
from ccam_deploy.page.guard import Guard
from ccam_deploy.page.viewer import Viewer
from ccam_deploy.page.worker import Worker
from ccam_deploy.render import Look

MOST_BYTES = 32 * 2**20
"""The largest picture that the page takes, in bytes."""
_FORM_BYTES = 2**20
_PACKAGES = ("gradio", "fastapi", "uvicorn")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_GRACE_SECONDS = 2


def require_gradio() -> None:
    """Raise BackendError where the packages of the page are missing; they are not imported yet."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(f"the page needs {missing[0]}: {install('demo')}")


def prepare_environment(folder: Path) -> None:
    """Tell Gradio, before it is imported, to send nothing home and where uploads go."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Take a port.

    Args:
        host: The address to listen at.
        port: The port; 0 for any that is free.

    Raises:
        OptionError: The address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        number = error.errno or 0  # below 0 where a name is no host's
        reason = os.strerror(number) if number > 0 else error.strerror
        raise OptionError(
            f"cannot listen at {host}, port {port}: {reason}; give another --host or --port"
        ) from error


def serve(
    viewer: Viewer,
    worker: Worker,
    look: Look,
    listener: socket.socket,
    announce: Callable[[str], None],
) -> None:
    """Serve the page until a signal ends it; what visitors sent is removed then.

    Args:
        viewer: Explains.
        worker: Runs what takes its time; what it runs at the end is not waited for.
        look: How maps are drawn unless a visitor chooses otherwise.
        listener: The socket to serve at, which is closed at the end.
        announce: Called with the page's address once it can be opened.
    """
    with tempfile.TemporaryDirectory(prefix="ccam-deploy-page-") as name:
        uploads = Path(name).resolve()
        prepare_environment(uploads)
        import gradio as gr
        import uvicorn
        from fastapi import FastAPI

        from ccam_deploy.page.layout import make_page
        from ccam_deploy.page.markup import STYLE

        host, port = listener.getsockname()[:2]
        app = gr.mount_gradio_app(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            make_page(viewer, worker, look, uploads).queue(max_size=32),
            path="/",
            server_name=host,
            server_port=port,
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=MOST_BYTES,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
            theme=gr.themes.Default(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=STYLE,
        )
        hosts = _LOOPBACK | {host} if is_loopback(host) else frozenset()
        guarded = Guard(app, MOST_BYTES + _FORM_BYTES, hosts, str(uploads), worker.end)
        config = uvicorn.Config(
            guarded,
            log_level="critical",  # connections that the end cuts off are no errors
            access_log=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        announce(f"http://{f'[{host}]' if ':' in host else host}:{port}/")
        uvicorn.Server(config).run(sockets=[listener])
