"""TensorRT's timing cache, which spares the next build measuring the same kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from ccam_deploy.errors import BackendError
from ccam_deploy.files import write_file


class TimingCache:
    """Timings in a file, for builds of one GPU and one version of TensorRT.

    Each build gets a copy, and returns it with the timings that it measured.
    """

    def __init__(self, file: Path) -> None:
        """Read the file if it exists.

        Args:
            file: The cache; `keep` makes it where it is missing.

        Raises:
            BackendError: The file cannot be read.
        """
        self.file = file
        try:
            self._content = file.read_bytes() if file.exists() else b""
        except OSError as error:
            raise BackendError(f"cannot read {file}: {error.strerror or error}") from error

    def attach(self, config: Any, log: Any) -> None:
        """Let a build use the timings.

        Args:
            config: The builder's configuration.
            log: The builder's; TensorRT warns there of a cache that it would replace.

        Raises:
            BackendError: TensorRT cannot use the timings.
        """
        log.last_warning = ""
        measured = config.create_timing_cache(self._content)
        if measured is None or (self._content and log.last_warning):
            self._refuse(log.last_warning)
        if not config.set_timing_cache(measured, False):
            self._refuse("it is of another GPU")

    def keep(self, config: Any) -> None:
        """Take the timings back after a build, and write them to the file."""
        measured = config.get_timing_cache()
        self._content = bytes(measured.serialize())
        write_file(self.file, self._content)

    def _refuse(self, reason: str) -> NoReturn:
        raise BackendError(
            f"{self.file} is no timing cache for this TensorRT and GPU ({reason}); "
            "name another file, or remove it"
        )
