"""What the benchmarks of serving share: a server with a bundle, and its processes' memory."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.serve.repository import Serving, write_repository
from ccam_deploy.serve.server import Server, ServerOptions, serve
from ccam_deploy.serve.settings import ModelSettings
from ccam_deploy.serve.stubs import stubs_of


@contextmanager
def served(bundle: Path, serving: Serving, settings: ModelSettings) -> Iterator[Server]:
    """Run a server with a bundle while a block runs.

    Args:
        bundle: The bundle's folder.
        serving: How Triton runs the models.
        settings: How they explain.

    Yields:
        The server, on free ports of this machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        write_repository(read_bundle(bundle), repository, serving, settings)
        options = ServerOptions(http_port=0, grpc_port=0, metrics_port=0)
        with serve(repository, options, lambda line: print(line, file=sys.stderr)) as server:
            yield server


def memory_of(server: int) -> float:
    """Return the memory of a server and its models in MiB.

    What several processes share counts once: each has its part of it.

    Args:
        server: The server's process number.
    """
    shares = []
    for process in (server, *stubs_of(server)):
        found = re.search(r"^Pss:\s+(\d+) kB", _rollup(process), re.MULTILINE)
        shares.append(int(found[1]) / 1024 if found else 0.0)
    return sum(shares)


def _rollup(process: int) -> str:
    return Path(f"/proc/{process}/smaps_rollup").read_text()
