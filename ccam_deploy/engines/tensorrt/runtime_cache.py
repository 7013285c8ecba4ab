"""TensorRT-RTX's runtime cache: the kernels that it compiles for a plan where the plan runs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ccam_deploy.bundle.folder import RUNTIME_CACHE
from ccam_deploy.errors import OutputError
from ccam_deploy.files import replace_file

_DIGEST_BYTES = 32


class RuntimeCache:
    """The compiled kernels of one plan, in a file beside it where that can be written.

    The file is made on the machine that runs the plan, so the bundle's manifest does not list it.
    TensorRT-RTX refuses one of another GPU, driver or version, which is then replaced.
    """

    def __init__(self, plan: Path, capability: str) -> None:
        """Name the file.

        Args:
            plan: The plan's file.
            capability: The GPU's compute capability: several may run the plan.
        """
        self.file = plan.with_name(f"{plan.name}.{capability}{RUNTIME_CACHE}")
        self._kept = b""
        self._cache: Any = None

    def attach(self, config: Any) -> bool:
        """Let a plan's contexts take kernels from the file, and share those that they compile.

        Args:
            config: The plan's runtime configuration.

        Returns:
            Whether TensorRT-RTX takes a cache at all.
        """
        self._cache = config.create_runtime_cache()
        kernels = self._read()
        if kernels and self._cache.deserialize(kernels):
            self._kept = kernels
        return bool(config.set_runtime_cache(self._cache))

    def keep(self) -> None:
        """Write the kernels to the file if they are others than it has, and if that can be done."""
        memory = self._cache.serialize()
        kernels = b"" if memory is None else bytes(memory)
        if kernels in (b"", self._kept):
            return
        try:
            replace_file(self.file, hashlib.sha256(kernels).digest() + kernels)
        except (OSError, OutputError):
            return
        self._kept = kernels

    def _read(self) -> bytes:
        """What the file holds; nothing where it is missing or damaged."""
        try:
            content = self.file.read_bytes()
        except OSError:
            return b""
        digest, kernels = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return kernels if hashlib.sha256(kernels).digest() == digest else b""
