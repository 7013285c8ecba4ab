"""The processes that run a server's Python models: which there are, and whether they live."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_STUB = "triton_python_backend_stub"
_PROC = Path("/proc")


def stubs_of(server: int, proc: Path = _PROC) -> dict[int, str]:
    """List the processes of a server's Python models.

    Args:
        server: The process number of the server.
        proc: The folder that shows processes as folders.

    Returns:
        The name of the model by process number.
    """
    found = {}
    for children in (proc / str(server) / "task").glob("*/children"):
        with suppress(OSError):
            for word in children.read_text().split():
                words = _command(int(word), proc)
                if len(words) > 1 and Path(words[0]).name == _STUB:
                    # <repository>/<model>/<version>/model.py
                    found[int(word)] = Path(words[1]).parents[1].name
    return found


def alive(process: int, proc: Path = _PROC) -> bool:
    """Tell whether a model's process runs: neither gone, nor dead and not yet waited for."""
    return bool(_command(process, proc))


def _command(process: int, proc: Path) -> list[str]:
    """The words of a process's command; none for one that is gone, or dead."""
    try:
        words = (proc / str(process) / "cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in words.split(b"\0")[:-1]]
