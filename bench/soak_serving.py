"""Whether the server stays as it is for a long time: its memory, its files, its answers.

    python -m bench.soak_serving --output bench/results/soak-cpu.json

Four clients ask the example classifier for ten minutes: arrays of one to four images with classes
and without, image files, and requests that are refused. Every fifth answer is compared with the
explainer's own. After a warm-up the memory of the server and its models must stay within 2 %, and
at the end nothing may be left in shared memory or the temporary folder. The exit code is 1 where
that is not so. It needs the environment of `make test-serve`; --bundle spares it PyTorch.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

import ccam_deploy as ccam
from bench import harness
from bench.serving import memory_of, served
from ccam_deploy.errors import OptionError
from ccam_deploy.explainer import Explainer
from ccam_deploy.latency.conditions import load_average
from ccam_deploy.serve.client import Client
from ccam_deploy.serve.repository import Serving
from ccam_deploy.serve.run_files import SHARED_MEMORY
from ccam_deploy.serve.server import Server
from ccam_deploy.serve.settings import ModelSettings

CLIENTS = 4
MOST_GROWTH = 0.02
_COMPARED = 5
_ROUNDING = 1e-5
"""How far a map may be from the explainer's: what is explained beside it moves the last bits."""
_SHARE = 0.2
"""What part of the samples is the beginning, and what part the end, of the measured time."""


class Asker:
    """A client that asks one thing after the other, and checks what it gets.

    Args:
        client: Its connection.
        explainer: What its answers are compared with.
        seed: Of the numbers that choose what it asks.
    """

    def __init__(self, client: Client, explainer: Explainer, seed: int) -> None:
        self._client = client
        self._explainer = explainer
        self._random = np.random.default_rng(seed)
        self._size = explainer.bundle.manifest.input
        self._picture = harness.PHOTOGRAPH.read_bytes()
        self.counts = {"arrays": 0, "files": 0, "refused": 0, "compared": 0}

    def ask(self, turn: int) -> None:
        """Send one request.

        Raises:
            AssertionError: The answer is wrong.
        """
        if turn % 7 == 3:
            self._client.explain_file(self._picture)
            self.counts["files"] += 1
        elif turn % 11 == 5:
            self._ask_badly()
        else:
            self._ask_arrays(turn)

    def _ask_arrays(self, turn: int) -> None:
        rows = int(self._random.integers(1, 5))
        images = self._random.standard_normal((rows, *self._size)).astype(np.float32)
        classes = self._explainer.bundle.manifest.classes
        targets = [int(target) for target in self._random.integers(-1, classes, rows)]
        answer = self._client.explain(images, targets)
        self.counts["arrays"] += 1
        if turn % _COMPARED == 0:
            wanted = [ccam.Top() if target < 0 else target for target in targets]
            own = self._explainer.explain(images, wanted)
            difference = float(np.abs(answer.saliency - own.saliency).max())
            assert difference <= _ROUNDING, f"the saliency differs by {difference}"
            self.counts["compared"] += 1

    def _ask_badly(self) -> None:
        images = np.full((1, *self._size), np.nan, np.float32)
        try:
            self._client.explain(images)
        except OptionError:
            self.counts["refused"] += 1
            return
        raise AssertionError("NaN was explained")


def soak(server: Server, explainer: Explainer, seconds: float, period: float) -> dict[str, Any]:
    """Ask for some time, and take samples of the memory.

    Args:
        server: The server.
        explainer: What answers are compared with.
        seconds: How long.
        period: Seconds between two samples.

    Returns:
        What was asked, and [seconds, MiB] of each sample.
    """
    ended = threading.Event()

    def repeat(seed: int) -> dict[str, int]:
        url = f"grpc://{server.grpc}" if seed % 2 else f"http://{server.http}"
        with Client(url, memory="system" if seed == 3 else "wire") as client:
            asker = Asker(client, explainer, seed)
            for turn in count():
                if ended.is_set():
                    break
                asker.ask(turn)
            return asker.counts

    samples: list[tuple[float, float]] = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(repeat, seed) for seed in range(CLIENTS)]
        try:
            begun = time.monotonic()
            while (passed := time.monotonic() - begun) < seconds and not any(
                run.done() for run in running
            ):
                samples.append((round(passed, 1), round(memory_of(server.process), 2)))
                time.sleep(period)
        finally:
            ended.set()
    counts = [run.result() for run in running]
    return {
        "asked": {name: sum(each[name] for each in counts) for name in counts[0]},
        "samples": samples,
    }


def first_and_last(samples: Sequence[tuple[float, float]], warm_up: float) -> tuple[float, float]:
    """Compute the memory at the beginning and at the end, after a warm-up.

    Args:
        samples: [seconds, MiB] of each sample.
        warm_up: Seconds of the samples to leave out.

    Returns:
        The medians of the first and of the last fifth, in MiB.
    """
    values = [memory for seconds, memory in samples if seconds >= warm_up]
    part = max(int(len(values) * _SHARE), 1)
    return float(np.median(values[:part])), float(np.median(values[-part:]))


def left_over() -> set[str]:
    """List what is in shared memory and the temporary folder."""
    places = (SHARED_MEMORY, Path(tempfile.gettempdir()))
    return {str(path) for place in places for path in place.glob("ccam-*")}


def markdown(result: Mapping[str, Any]) -> str:
    """Tell a result in a few lines, with the command that makes it."""
    facts = result["results"]
    asked = ", ".join(f"{number} {name}" for name, number in facts["asked"].items())
    first, last = facts["memory_mib"]
    return (
        f"{result['minutes']:g} minutes with {CLIENTS} clients: {asked}. Memory of the server and "
        f"its models {first:.0f} MiB, at the end {last:.0f} MiB ({facts['growth']:+.1%}); left "
        f"behind: {', '.join(facts['left']) or 'nothing'}.\n\n"
        f"{harness.device_line(result['conditions'])}. Made by `{result['command']}`.\n"
    )


def main(
    arguments: Sequence[str] | None = None, leftovers: Callable[[], set[str]] = left_over
) -> None:
    parser = harness.argument_parser(__doc__, rounds=1, output="a JSON file")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds left out at first")
    parser.add_argument("--period", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--bundle", type=Path, help="the example classifier's bundle")
    options = parser.parse_args(arguments)
    before, load = leftovers(), load_average()
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or harness.export("digits", Path(folder) / "bundle")
        with (
            ccam.load(bundle, threads=1) as explainer,
            served(bundle, Serving(), ModelSettings(threads=1)) as server,
        ):
            facts = soak(server, explainer, 60 * options.minutes, options.period)
    first, last = first_and_last(facts["samples"], options.warm_up)
    growth = last / first - 1
    left = sorted(leftovers() - before)
    words = {"minutes": options.minutes, "warm-up": options.warm_up, "output": options.output}
    result = {
        "command": harness.command_line("bench.soak_serving", words),
        "conditions": harness.conditions(),
        "minutes": options.minutes,
        "results": {
            **facts,
            "memory_mib": [round(first, 2), round(last, 2)],
            "growth": round(growth, 4),
            "left": left,
            "load_average": [load, load_average()],
        },
    }
    harness.publish(options.output, result, markdown(result))
    if left or abs(growth) > MOST_GROWTH:
        sys.exit("the server did not stay as it was")


if __name__ == "__main__":
    main()
