"""Everything about an NVIDIA GPU in about four minutes, beside PyTorch on the same card.

    python -m bench.bench_gpu --output bench/results

Networks with random weights at 224×224, 1, 8 and 32 images: explanations by Collection-CAM from
preprocessed arrays, PyTorch's floor for the same passes, the paper's way of one forward for each
mask, every kernel between the graphs, and the GPU's memory. The networks are exported meanwhile.
Score-CAM on ResNet-18 stands beside its own forwards, PyTorch's, and TorchCAM where that is
installed.

Each part is a process of its own that is ended when its time is over. Results are written after
each piece: --resume goes on with what an earlier run on the same card and versions left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, get_args

from bench import bench_kernels, harness
from bench.gpu import tables
from bench.gpu.pieces import (
    PRECISIONS,
    Figures,
    Outcome,
    Piece,
    offered,
    part_command,
    pieces_of,
    run_part,
    score_pieces,
    with_masks,
)
from ccam_deploy.bundle.folder import MANIFEST
from ccam_deploy.engines import Backend
from ccam_deploy.errors import BackendError

LIMIT = 240.0
EXPORT_LIMIT = 100.0
"""Seconds from the start after which no export is waited for."""

PART_LIMITS = {"kernels": 45.0, "explain": 60.0, "floor": 60.0}
PART_LIMITS |= {"score-cam": 20.0, "score-floor": 20.0, "torchcam": 15.0}
"""Seconds of a part, by the kind of its first piece that is missing."""
_LEAST = 5.0
_NO_GPU = 2

Runner = Callable[[Sequence[str], Sequence[Piece], float, Callable[[Outcome], None]], None]
Clock = Callable[[], float]
Export = tuple[subprocess.Popen[str], IO[str]]
"""A process, and what it writes to stderr."""


@dataclass
class Results:
    """What is known so far, and where it is written.

    Attributes:
        command: The command line that makes it.
        conditions: Versions, machine and GPU.
        file: The JSON file; None to write none.
        figures: Figures by piece.
        left_out: Why there are none, by piece.
    """

    command: str
    conditions: Mapping[str, Any]
    file: Path | None
    figures: dict[str, Figures] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def keep(self, outcome: Outcome) -> None:
        """Add what became of a piece, say it, and write everything."""
        if outcome.figures is None:
            self.left_out[outcome.key] = outcome.reason
            print(f"{outcome.key}: left out: {outcome.reason}", file=sys.stderr, flush=True)
        else:
            self.figures[outcome.key] = outcome.figures
            self.left_out.pop(outcome.key, None)
            print(f"{outcome.key}: {_short(outcome.figures)}", file=sys.stderr, flush=True)
        if self.file:
            harness.write_results(self.file, self.as_values(), tables.markdown(self.as_values()))

    def missing(self, pieces: Sequence[Piece]) -> list[Piece]:
        """List the pieces without figures."""
        return [piece for piece in pieces if piece.key not in self.figures]

    def as_values(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "command": self.command,
            "conditions": self.conditions,
            "weights": "random",
            "results": self.figures,
            "left_out": self.left_out,
        }


def _short(figures: Figures) -> str:
    """The figure of a piece that says most."""
    if "ms" in figures:
        return f"{figures['ms']['median']:g} ms, slowest {figures['ms']['maximum']:g} ms"
    for name in ("graph_ms", "torchcam_ms"):
        if name in figures:
            return f"{figures[name]:g} ms"
    return f"{figures['kernels_ms']['sum']['median']:g} ms"


def resumed(file: Path, conditions: Mapping[str, Any]) -> dict[str, Figures]:
    """Read the figures of an earlier run.

    Args:
        file: Its JSON file; it need not exist.
        conditions: Those of now.

    Returns:
        Figures by piece.

    Raises:
        SystemExit: They were measured on another card, driver or with other versions.
    """
    if not file.is_file():
        return {}
    earlier = json.loads(file.read_text(encoding="utf-8"))
    if _identity(earlier["conditions"]) != _identity(conditions):
        sys.exit(
            f"{file} was measured on another card, driver or with other versions; "
            "leave --resume out to measure everything again"
        )
    figures: dict[str, Figures] = earlier["results"]
    return figures


def _identity(conditions: Mapping[str, Any]) -> tuple[object, ...]:
    card = conditions["gpu"] or {}
    return card.get("name"), card.get("driver"), conditions["versions"]


@dataclass
class Bench:
    """Runs the parts one after the other until the time is over.

    Attributes:
        results: What is known, and where it goes.
        backend: The engine of the explanations.
        limit: Seconds for everything.
        run: Runs a part; see run_part.
        now: A clock in seconds.
    """

    results: Results
    backend: str
    limit: float
    run: Runner = run_part
    now: Clock = time.monotonic

    def __post_init__(self) -> None:
        self._begun = self.now()

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._begun + self.limit - self.now()

    def measure(self, bundles: Path) -> None:
        """Measure what is missing, with bundles in a folder by network.

        Only what hardly depends on the host is measured while networks are exported.
        """
        missing = [n for n in PRECISIONS if self.results.missing(pieces_of("explain", n))]
        with exports(missing, bundles, self.backend) as processes:
            kernels = [piece for name in PRECISIONS for piece in pieces_of("kernels", name)]
            self._part(sorted(kernels, key=lambda piece: piece.batch), part_command("kernels"))
            failed = self._wait(processes)
        for network in PRECISIONS:
            explanations = pieces_of("explain", network) + score_pieces("score-cam", network)
            if network in failed:
                self._leave_out(explanations, failed[network])
            else:
                words = (str(bundles / network), self.backend)
                self._part(explanations, part_command("explain", *words))
        for network in PRECISIONS:
            self._part(self._floors(network), part_command("floor"))

    def _floors(self, network: str) -> list[Piece]:
        """The floors of what was explained; one of an earlier run with other masks is dropped."""
        found = self.results.figures
        unsized = pieces_of("floor", network) + score_pieces("score-floor", network)
        floors = [with_masks(piece, found) for piece in unsized]
        for piece in floors:
            if found.get(piece.key, {"masks": piece.masks})["masks"] != piece.masks:
                del found[piece.key]
        return floors + score_pieces("torchcam", network)

    def _part(self, pieces: Sequence[Piece], command: Sequence[str]) -> None:
        """Run one part, as far as there is something to measure and time for it."""
        pieces = self.results.missing(pieces)
        limit = min(PART_LIMITS[pieces[0].kind], self.left) if pieces else 0.0
        if limit >= _LEAST:
            self.run(command, pieces, limit, self.results.keep)
        else:
            self._leave_out(pieces, f"no time was left of {self.limit:g} s; give --resume")

    def _leave_out(self, pieces: Sequence[Piece], reason: str) -> None:
        for piece in self.results.missing(pieces):
            self.results.keep(Outcome(piece.key, reason=reason))

    def _wait(self, processes: Mapping[str, Export]) -> dict[str, str]:
        """Wait for exports; returns why there is no bundle, by network."""
        limit = min(EXPORT_LIMIT, self.limit)
        reasons = {}
        for network, (process, errors) in processes.items():
            try:
                code = process.wait(max(self.left - (self.limit - limit), 0))
            except subprocess.TimeoutExpired:
                reasons[network] = f"its export took over {limit:g} s"
                continue
            if code:
                errors.seek(0)
                last = errors.read().strip().splitlines()[-1:] or [f"it ended with {code}"]
                reasons[network] = f"its export failed: {last[0]}"
        return reasons


@contextmanager
def exports(networks: Sequence[str], folder: Path, backend: str) -> Iterator[Mapping[str, Export]]:
    """Export networks at the same time, in the background.

    Args:
        networks: Names among PRECISIONS; those that the folder has are left as they are.
        folder: Where the bundles go.
        backend: The engine that will run them.

    Yields:
        The processes by network; those that still run at the end are ended.
    """
    with ExitStack() as stack:
        processes: dict[str, Export] = {}
        for network in networks:
            if (folder / network / MANIFEST).is_file():
                continue
            half = ["--precision", "fp16"] if "fp16" in offered(network) else []
            words = ["--random-weights", *half]
            command = harness.export_command(network, folder / network, *words, backend=backend)
            errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, text=True, cwd=harness.ROOT
            )
            stack.callback(_end, process)
            processes[network] = process, errors
        yield processes


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
    process.wait()


def require_gpu() -> None:
    """Exit with one line where there is no GPU."""
    try:
        bench_kernels.open_device().close()
    except BackendError as error:
        print(f"this is measured on a GPU alone: {error}", file=sys.stderr)
        sys.exit(_NO_GPU)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="a folder")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument("--backend", default="auto", choices=get_args(Backend))
    parser.add_argument("--bundles", type=Path, help="a folder of bundles that are kept")
    parser.add_argument("--resume", action="store_true", help="keep what --output has already")
    options = parser.parse_args(arguments)
    require_gpu()
    words = {"limit": f"{options.limit:g}", "backend": options.backend, "output": options.output}
    conditions = harness.conditions(with_gpu=True)
    file = options.output / "gpu.json" if options.output else None
    results = Results(harness.command_line("bench.bench_gpu", words), conditions, file)
    if options.resume and file:
        results.figures = resumed(file, conditions)
    bench = Bench(results, options.backend, options.limit)
    with tempfile.TemporaryDirectory() as folder:
        bench.measure((options.bundles or Path(folder)).resolve())
    print(tables.markdown(results.as_values()))


if __name__ == "__main__":
    main()
