"""The server of nvidia-pytriton's wheel, for development: started, asked, stopped, cleaned up."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ccam_deploy.bundle.signature import require_signed
from ccam_deploy.errors import OptionError, ServerError, brief
from ccam_deploy.serve.endpoint import HttpEndpoint
from ccam_deploy.serve.installation import find_installation
from ccam_deploy.serve.log import ServerLog
from ccam_deploy.serve.probe import ask
from ccam_deploy.serve.repository import BUNDLE
from ccam_deploy.serve.run_files import RunFiles, run_files
from ccam_deploy.serve.stubs import stubs_of

LOOPBACK = "127.0.0.1"
_PORTS = ("http", "grpc", "metrics")
_SHARED_MEMORY_BYTES = 16 * 2**20
_KEY = "ccam-deploy-key"
_KEPT_FROM_CLIENTS = "model-repository,trace,logging"
_POLL_SECONDS = 0.05
_LEAVING_SECONDS = 5.0
_FIRST_ANSWER_SECONDS = 600.0
_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server runs.

    Attributes:
        host: The address that it listens on; 0.0.0.0 for all of the machine's.
        http_port: Its port for HTTP; 0 for any that is free, as for the other ports.
        grpc_port: Its port for gRPC.
        metrics_port: Its port for Prometheus.
        exit_timeout: Seconds that requests get to end in when it is stopped.
        require_signature: A PEM file with the public key that bundles have to be signed with.
        log: What of the server's log to say: its warnings and errors, or all of it.
    """

    host: str = LOOPBACK
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    exit_timeout: int = 30
    require_signature: Path | None = None
    log: Literal["all", "serious"] = "serious"


@dataclass(frozen=True)
class Ending:
    """How the server ended.

    Attributes:
        drained: Whether all requests that it had accepted are known to have been answered before.
        seconds: How long that took.
    """

    drained: bool
    seconds: float


class Server:
    """A running server; `serve` makes one.

    Attributes:
        options: How it runs, with the ports that it has.
        models: The models of its repository.
        endpoint: Its HTTP endpoint, with the right to load and unload models.
    """

    def __init__(self, repository: Path, options: ServerOptions, say: Callable[[str], None]):
        self.options = options
        self.models = models_in(repository)
        self._repository = repository.absolute()
        self._key = secrets.token_hex(16)
        self._say = say
        self._process: subprocess.Popen[str] | None = None
        self._log: ServerLog | None = None
        self.endpoint = HttpEndpoint(self._url("http"), headers={_KEY: self._key})

    @property
    def http(self) -> str:
        """Where clients reach it by HTTP, such as "127.0.0.1:8000"."""
        return self._url("http").removeprefix("http://")

    @property
    def grpc(self) -> str:
        """Where clients reach it by gRPC, such as "127.0.0.1:8001"."""
        return self._url("grpc").removeprefix("http://")

    @property
    def metrics(self) -> str:
        """The URL that Prometheus scrapes."""
        return f"{self._url('metrics')}/metrics"

    @property
    def process(self) -> int:
        """The process number of the server."""
        return self._running.pid

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._running.poll() is not None

    @property
    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise ServerError("the server was not started")
        return self._process

    def require_signatures(self) -> None:
        """Refuse bundles that are not as somebody signed them who has the private key.

        Raises:
            OptionError: The repository has no bundle, or the key cannot be used.
            SignatureError: A bundle is not signed with it, or was changed since.
        """
        key = self.options.require_signature
        if key is None:
            return
        bundles = sorted(self._repository.glob(f"*/*/{BUNDLE}"))
        if not bundles:
            raise OptionError(f"{self._repository} holds no bundle that could be signed")
        for bundle in bundles:
            require_signed(bundle, key)

    def start(self, files: RunFiles) -> None:
        """Start the process, which dies with this one, and wait until every model answers.

        Args:
            files: The run's prefix of shared memory, its folder and its lock.

        Raises:
            BackendError: The server is not installed.
            SignatureError: A bundle is not signed as the options want it.
            ServerError: It ended, or a model does not answer; the message says why.
        """
        self.require_signatures()
        installation = find_installation()
        backends = files.folder / "backends"
        backends.mkdir()
        installation.fill_backends(backends)
        self._process = subprocess.Popen(
            [str(installation.program), *self._arguments(backends, files.prefix)],
            env=installation.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[files.lock],
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        assert self._process.stdout is not None
        self._log = ServerLog(self._process.stdout, self._say, self.options.log)
        self._wait_until_ready()
        patient = HttpEndpoint(self._url("http"), timeout=_FIRST_ANSWER_SECONDS)
        for model in self.models:
            health = ask(patient, model)
            if not health.alive:
                raise ServerError(f'model "{model}" is loaded, but fails: {health.detail}')
        self._log.started()

    def failure(self) -> str:
        """Tell in one line why the process has ended."""
        code = self._running.wait()
        if code < 0:
            return f"signal {-code} ended it"
        assert self._log is not None
        self._log.wait(_LEAVING_SECONDS)
        return self._log.failure()

    def stop(self) -> Ending:
        """Let the server answer what it has accepted, and end it.

        A server that is told to end waits for its clients to close their connections, and goes on
        to answer on them until it cuts them off. So its models are unloaded first: each answers
        what it has accepted, and no more. At a Ctrl-C meanwhile the server is killed.
        """
        begun = time.monotonic()
        process, log = self._process, self._log
        if process is None or log is None:
            return Ending(True, 0.0)
        drained = process.poll() is not None
        try:
            drained = drained or self._unload_all(begun + self.options.exit_timeout)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LEAVING_SECONDS)
        finally:
            _kill_group(process)
            log.wait(_LEAVING_SECONDS)
        return Ending(drained, time.monotonic() - begun)

    def _unload_all(self, until: float) -> bool:
        """Unload the models, those first that ask others; tell whether they answered everything."""
        try:
            return all(self._unload(model, until) for model in reversed(self.models))
        except (ServerError, TimeoutError):  # it cannot be asked any more
            return False

    def _unload(self, model: str, until: float) -> bool:
        def lifeless() -> bool:
            return model not in stubs_of(self.process).values()

        return self.endpoint.unload(model, max(until - time.monotonic(), 0.0), lifeless)

    def _wait_until_ready(self) -> None:
        while not self.ended:
            try:
                if self.endpoint.ready():
                    return
            except (ServerError, TimeoutError):
                pass  # it does not listen yet
            time.sleep(_POLL_SECONDS)
        raise ServerError(f"the server did not start: {self.failure()}")

    def _arguments(self, backends: Path, prefix: str) -> list[str]:
        """The words after the program's name.

        Loading a model can bring code with it, so the server keeps that to whoever has the key.
        """
        options = self.options
        python = {
            "shm-default-byte-size": _SHARED_MEMORY_BYTES,
            "shm-growth-byte-size": _SHARED_MEMORY_BYTES,
            "shm-region-prefix-name": prefix,
        }
        return [
            f"--model-repository={self._repository}",
            "--model-control-mode=explicit",
            "--load-model=*",
            "--disable-auto-complete-config",
            f"--backend-directory={backends}",
            *(f"--backend-config=python,{name}={value}" for name, value in python.items()),
            *(f"--{name}-address={options.host}" for name in _PORTS),
            f"--http-port={options.http_port}",
            f"--grpc-port={options.grpc_port}",
            f"--metrics-port={options.metrics_port}",
            f"--http-restricted-api={_KEPT_FROM_CLIENTS}:{_KEY}={self._key}",
            f"--grpc-restricted-protocol={_KEPT_FROM_CLIENTS}:{_KEY}={self._key}",
            "--http-header-forward-pattern=(?i)x-ccam-.*",
            f"--exit-timeout-secs={options.exit_timeout}",
            "--allow-gpu-metrics=false",
        ]

    def _url(self, name: str) -> str:
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.options.host, self.options.host)
        port = getattr(self.options, f"{name}_port")
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def serve(
    repository: Path,
    options: ServerOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Server]:
    """Run the server while a block runs.

    Args:
        repository: A model repository.
        options: How the server runs.
        say: Called with lines of the server's log.

    Yields:
        The server, all of whose models have answered a request.

    Raises:
        OptionError: The folder is no model repository, or a port is taken.
        SignatureError: A bundle is not signed as the options want it.
        BackendError: The server is not installed here.
        ServerError: It does not start.
    """
    server = Server(repository, with_free_ports(options or ServerOptions()), say)
    with run_files() as files:
        try:
            server.start(files)
            yield server
        finally:
            server.stop()


def models_in(repository: Path) -> tuple[str, ...]:
    """List the models of a repository.

    Raises:
        OptionError: It holds none.
    """
    models = tuple(sorted(path.parent.name for path in repository.glob("[!.]*/config.pbtxt")))
    if not models:
        raise OptionError(
            f"{repository} holds no model for Triton; "
            "`ccam-deploy triton export BUNDLE REPOSITORY` writes one"
        )
    return models


def with_free_ports(options: ServerOptions) -> ServerOptions:
    """Choose a free port wherever one is 0, and make sure that the others are free.

    Raises:
        OptionError: A port is taken, or the host is none of this machine's addresses.
    """
    chosen: dict[str, Any] = {}
    with ExitStack() as held:
        for name in _PORTS:
            port = getattr(options, f"{name}_port")
            chosen[f"{name}_port"] = held.enter_context(
                _bound(options.host, port, f"--{name}-port")
            ).getsockname()[1]
    return replace(options, **chosen)


def _bound(host: str, port: int, flag: str) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=found[0])
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or brief(error)
        raise OptionError(
            f"cannot listen on port {port} of {host}: {reason}; "
            f"{flag} takes another one, and 0 for any that is free"
        ) from error


def _die_with_parent() -> None:
    """Have the kernel end the server where this process is killed: nobody would watch it."""
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)


def _kill_group(process: subprocess.Popen[str]) -> None:
    """End the server and the processes of its models, those included that outlived it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
