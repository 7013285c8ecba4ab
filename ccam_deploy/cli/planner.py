"""Builds plans for commands: their options as settings, progress bars, and a report."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ccam_deploy.cli.options import PlanOptions
from ccam_deploy.cli.printing import say
from ccam_deploy.cli.signals import held_signals
from ccam_deploy.engines.tensorrt import library
from ccam_deploy.engines.tensorrt.build import BuildSettings, Built
from ccam_deploy.engines.tensorrt.build import build as run
from ccam_deploy.errors import BackendError

if TYPE_CHECKING:
    from ccam_deploy.bundle.folder import Bundle
    from ccam_deploy.bundle.manifest import PrecisionName
    from ccam_deploy.kernels.cuda.bundled import Compiled

_BAR_WIDTH = 16


class Planner:
    """Builds plans as a command's options say.

    Attributes:
        library: The TensorRT to build with.
        settings: What plans are built for.

    Raises:
        BackendError: The library cannot be loaded, or there is no GPU that it needs.
        OptionError: The library cannot build for these options.
    """

    def __init__(self, options: PlanOptions, force: bool = False) -> None:
        self.library = library.load_library(msgspec.convert(options.library, library.Flavour))
        self.settings = BuildSettings(
            options.max_batch, options.devices, options.timing_cache, force
        )
        self.settings.require_supported(self.library)
        self._compiles = options.kernels

    def require_precision(self, precision: str) -> None:
        """Make sure that the devices to build for have a precision.

        Raises:
            OptionError: One of them does not.
        """
        self.settings.require_supported(self.library, precision)

    def build(self, bundle: Bundle, precision: PrecisionName) -> Built:
        """Build the plans of one precision, with its progress on stderr."""
        with held_signals() as release, _progress() as bars:

            def progress(graph: str, share: float, phase: str) -> None:
                release()
                bars(graph, share, phase)

            return run(bundle, self.library, precision, self.settings, progress)

    def compile_kernels(self, bundle: Bundle) -> Compiled | None:
        """Compile kernels for the GPUs that the bundle has plans for, with progress on stderr.

        Returns:
            The bundle with its kernels; None, after a note, where they cannot be compiled here, or
            where they are not wanted.
        """
        if not self._compiles:
            return None
        from ccam_deploy.kernels.cuda.bundled import add_kernels

        plans = [plan for plan in bundle.manifest.plans if plan.library == self.library.flavour]
        devices = sorted({device for plan in plans for device in plan.devices}, key=_number)
        try:
            with held_signals() as release, _progress() as bars:

                def progress(title: str, share: float, name: str) -> None:
                    release()
                    bars(title, share, name)

                return add_kernels(bundle, devices, self.settings.force, progress)
        except BackendError as error:
            say(f"the bundle has plans but no compiled kernels: {error}", err=True)
            return None

    def report(self, built: Built) -> None:
        """Print which plans were built, or that nothing had to be."""
        if not built.fresh:
            precision = built.plans[0].precision
            say(
                f"{built.bundle.folder}: the {precision} plans for {self.library.title} "
                f"{self.library.version} are up to date"
            )
            return
        for plan in built.plans:
            _report_file(built.bundle, plan.file, plan.devices)

    def report_kernels(self, compiled: Compiled | None) -> None:
        """Print which kernels were compiled just now."""
        if compiled is not None and compiled.fresh:
            for code in compiled.kernels:
                _report_file(compiled.bundle, code.file, (code.device,))


def _report_file(bundle: Bundle, file: str, devices: Sequence[str]) -> None:
    size = bundle.manifest.files[file].bytes / 1e6
    say(f"{bundle.path(file)}: {size:.1f} MB for {', '.join(devices)}")


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


class _Progress:
    """A bar for each graph where stderr is a terminal, a line for each elsewhere."""

    def __init__(self) -> None:
        self._graph = self._phase = ""
        self._bar: Any = None

    def __call__(self, graph: str, share: float, phase: str) -> None:
        if graph != self._graph:
            self.close()
            self._graph = graph
            self._bar = click.progressbar(
                length=100,
                label=f"building {graph}",
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
        """End the bar's line."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)


@contextmanager
def _progress() -> Iterator[_Progress]:
    progress = _Progress()
    try:
        yield progress
    finally:
        progress.close()
