"""Compiled kernels as files: in the user's cache folder, and in bundles.

A file holds machine code for one compute capability, and no Python objects: reading it runs
nothing. Code counts only where the kernels' sources and the versions of the compiler are those
that it was made from. Numba is not needed here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from importlib import metadata, resources
from pathlib import Path

import msgspec

from ccam_deploy.errors import OutputError
from ccam_deploy.files import replace_file

_COMPILERS = ("numba-cuda", "numba")
_FORMAT = b"ccam-deploy kernels 1\n"
_DIGEST_BYTES = 32

Codes = Mapping[str, "Code"]
"""Compiled kernels by their names, which have the types of their arguments in them."""


class Code(msgspec.Struct, frozen=True):
    """A compiled kernel.

    Attributes:
        entry: The name of the kernel's entry in the cubin.
        cooperative: Whether it must be launched with all blocks resident.
        cubin: Machine code.
    """

    entry: str
    cooperative: bool
    cubin: bytes


def compiler_versions() -> str:
    """Name the packages that compile kernels, with their versions; empty where one is missing."""
    try:
        return ", ".join(f"{name} {metadata.version(name)}" for name in _COMPILERS)
    except metadata.PackageNotFoundError:
        return ""


@cache
def source_digest() -> str:
    """Return the SHA-256, in hexadecimal, of all that compiled kernels depend on.

    Numba judges by the file of the kernel alone, but kernels call functions of other files. So
    these are all sources of this package, and the compiler's versions. Empty where they are not
    known.
    """
    versions = compiler_versions()
    return digest_of(_sources(), versions) if versions else ""


def digest_of(sources: Mapping[str, bytes], versions: str) -> str:
    """Return the SHA-256, in hexadecimal, of sources by name and of versions; empty for none."""
    if not sources:
        return ""
    digest = hashlib.sha256(versions.encode())
    for name in sorted(sources):
        digest.update(b"\0" + name.encode() + b"\0" + hashlib.sha256(sources[name]).digest())
    return digest.hexdigest()


def _sources() -> dict[str, bytes]:
    files = resources.files(__package__).iterdir()
    return {file.name: file.read_bytes() for file in files if file.name.endswith(".py")}


def pack(codes: Codes) -> bytes:
    """Return the contents of a file with some kernels."""
    body = msgspec.msgpack.encode(dict(codes))
    return _FORMAT + hashlib.sha256(body).digest() + body


def unpack(content: bytes) -> dict[str, Code]:
    """Read the kernels in a file's contents; none where they are damaged or something else."""
    start = len(_FORMAT) + _DIGEST_BYTES
    head, body = content[:start], content[start:]
    if head != _FORMAT + hashlib.sha256(body).digest():
        return {}
    try:
        return msgspec.msgpack.decode(body, type=dict[str, Code])
    except msgspec.MsgspecError:
        return {}


class CodeFolder:
    """A folder of the user that keeps compiled kernels, a file each.

    Where it cannot be read or written, it keeps nothing: a kernel is compiled again.
    """

    def __init__(self, place: Path | None) -> None:
        """Name the folder, which is made when something is kept.

        Args:
            place: The folder; None to keep nothing.
        """
        self.place = place

    def read(self, name: str, capability: str) -> Code | None:
        """Find a kernel that was compiled for a compute capability such as "9.0"."""
        if self.place is None:
            return None
        try:
            content = self._file(self.place, name, capability).read_bytes()
        except OSError:
            return None
        return unpack(content).get(name)

    def write(self, name: str, capability: str, code: Code) -> None:
        """Keep a kernel, if that can be done."""
        if self.place is None:
            return
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            replace_file(self._file(self.place, name, capability), pack({name: code}))
        except (OSError, OutputError):
            return

    def _file(self, place: Path, name: str, capability: str) -> Path:
        digest = hashlib.sha256(f"{capability} {name}".encode()).hexdigest()
        function = name.partition("(")[0]
        return place / f"{function}-{capability}-{digest[:16]}.kernel"


def user_folder(chosen: str, source: str) -> Path | None:
    """Choose the folder for kernels that were compiled from some sources.

    Args:
        chosen: Numba's setting, NUMBA_CACHE_DIR; where it is empty, the user's cache folder counts.
        source: Their digest; see `source_digest`.

    Returns:
        The folder, which need not exist; None where there can be none.
    """
    if not source:
        return None
    base = Path(chosen) if chosen else _user_cache()
    return None if base is None else base / "ccam-deploy" / f"kernels-{source[:16]}"


def _user_cache() -> Path | None:
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if chosen.is_absolute():
        return chosen
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
