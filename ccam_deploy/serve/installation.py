"""Triton's server as the wheel of nvidia-pytriton brings it, and what it needs to start."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

from ccam_deploy.errors import BackendError
from ccam_deploy.extras import install

_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Installation:
    """The files of a server.

    Attributes:
        program: The server.
        backend: The folder of its Python backend.
        stub: The program that runs a Python model, for this version of Python.
        libraries: Folders with libraries that the server and the stub load.
    """

    program: Path
    backend: Path
    stub: Path
    libraries: tuple[Path, ...]

    def fill_backends(self, folder: Path) -> None:
        """Make a folder of backends, in which the stub lies where the server looks for it.

        The wheel keeps a stub for each version of Python elsewhere, and another process that uses
        the wheel may need another one, so nothing is put into the wheel's own folder.

        Args:
            folder: An empty folder.
        """
        place = folder / self.backend.name
        place.mkdir()
        for name in _BACKEND_FILES:
            (place / name).symlink_to(self.backend / name)
        copyfile(self.stub, place / _STUB)
        (place / _STUB).chmod(0o755)

    def environment(self) -> dict[str, str]:
        """Return the environment for the server: its libraries, and this Python before others."""
        libraries = [*map(str, self.libraries), os.environ.get("LD_LIBRARY_PATH", "")]
        programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        return {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "PATH": os.pathsep.join(programs),
        }


def find_installation() -> Installation:
    """Find the server in this environment.

    Raises:
        BackendError: It is not installed, or does not run models with this Python.
    """
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        raise BackendError(f"Triton's server is not installed here; {install('serve')}")
    package = Path(found.origin).parent
    server = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / _STUB
    program = server / "bin" / "tritonserver"
    if not program.is_file():
        raise BackendError(f"{program} is missing; {install('serve')} --force-reinstall mends it")
    if not stub.is_file():
        versions = sorted(path.parent.name for path in stub.parents[1].glob(f"*/{_STUB}"))
        raise BackendError(
            f"the installed server runs no models with Python {version}; it does with "
            f"{', '.join(versions)}"
        )
    libraries = (package.parent / "nvidia_pytriton.libs", _python_library(version).parent)
    return Installation(program, server / "backends" / "python", stub, libraries)


def _python_library(version: str) -> Path:
    """The shared library of this very Python: another one of its version would lack its modules."""
    name = f"libpython{version}.so.1.0"
    folder = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    places = [folder / name, folder / (sysconfig.get_config_var("MULTIARCH") or "") / name]
    for place in places:
        if place.is_file():
            return place
    raise BackendError(
        f"{name} is not in {places[0].parent} or {places[1].parent}; install it (on Debian: "
        f"apt-get install libpython{version}), or use a Python that was built with it"
    )
