"""Building plans from the command line: the options as settings, progress, and a report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ccam_deploy.cli.options import say
from ccam_deploy.cli.signals import held_signals
from ccam_deploy.engines.tensorrt import library
from ccam_deploy.engines.tensorrt.build import BuildSettings, Built
from ccam_deploy.engines.tensorrt.build import build as run

if TYPE_CHECKING:
    from ccam_deploy.bundle.folder import Bundle
    from ccam_deploy.bundle.manifest import PrecisionName

_BAR_WIDTH = 16


class Planner:
    """Builds plans as the options of `plan_options` say; made early, for it checks them."""

    def __init__(
        self,
        backend: str,
        max_batch: int,
        devices: tuple[str, ...],
        timing_cache: Path | None,
        force: bool = False,
    ) -> None:
        """Raises BackendError or OptionError for what cannot be built here."""
        self.library = library.load_library(msgspec.convert(backend, library.Flavour))
        self.settings = BuildSettings(max_batch, devices, timing_cache, force)
        self.settings.check(self.library)

    def check(self, precision: str) -> None:
        """Raise OptionError for a precision that a device to build for does not have."""
        self.settings.check(self.library, precision)

    def build(self, bundle: Bundle, precision: PrecisionName) -> Built:
        """Build one precision, with its progress on stderr."""
        with held_signals() as release, _progress() as bars:

            def progress(graph: str, share: float, phase: str) -> None:
                release()
                bars(graph, share, phase)

            return run(bundle, self.library, precision, self.settings, progress)

    def report(self, built: Built) -> None:
        """Print what was built, or that nothing had to be."""
        if not built.fresh:
            precision = built.plans[0].precision
            say(
                f"{built.bundle.folder}: the {precision} plans for {self.library.title} "
                f"{self.library.version} are up to date"
            )
            return
        for plan in built.plans:
            size = built.bundle.manifest.files[plan.file].bytes / 1e6
            place = built.bundle.path(plan.file)
            say(f"{place}: {size:.1f} MB for {', '.join(plan.devices)}")


class _Progress:
    """A bar for each graph where stderr is a terminal, a line for each elsewhere."""

    def __init__(self) -> None:
        self._what = self._phase = ""
        self._bar: Any = None

    def __call__(self, what: str, share: float, phase: str) -> None:
        if what != self._what:
            self.close()
            self._what = what
            self._bar = click.progressbar(
                length=100,
                label=f"building {what}",
                item_show_func=lambda phase: phase,
                show_eta=False,
                width=_BAR_WIDTH,
                file=sys.stderr,
            )
            self._bar.__enter__()
        done = int(100 * share)
        if done > self._bar.pos or phase != self._phase:
            self._phase = phase
            self._bar.update(done - self._bar.pos, phase)

    def close(self) -> None:
        """End the line of the bar."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)


@contextmanager
def _progress() -> Iterator[_Progress]:
    progress = _Progress()
    try:
        yield progress
    finally:
        progress.close()
