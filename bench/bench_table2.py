"""The paper's Table 2: the time of one explanation, by method, network and size of the input.

    python -m bench.bench_table2 --output bench/results
    python -m bench.bench_table2 --backend tensorrt --precision fp16 --output bench/results

Networks with random weights, one image, from the preprocessed array to the map, on the best
backend that works here without plans, or on the one that is named; for TensorRT plans are built.
The results go to table2-BACKEND, with -PRECISION where that is not fp32. The methods are those
that this package has. All methods of a network and size are timed in turn, and their ratio to
Collection-CAM is the median of the ratios round by round. The paper's figures, of an RTX 3080,
stand beside: their ratios compare, their times do not.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from msgspec.structs import asdict

import ccam_deploy as ccam
from ccam_deploy import methods
from ccam_deploy.bundle.manifest import PrecisionName
from ccam_deploy.engines import Backend
from ccam_deploy.engines.tensorrt.library import FLAVOURS
from ccam_deploy.errors import OptionError
from ccam_deploy.image_files import load_image
from ccam_deploy.latency.cases import make_cases
from ccam_deploy.latency.conditions import gpu, load_average, machine
from ccam_deploy.latency.timing import measure_in_turn, median_ratio, summarise

ROOT = Path(__file__).parents[1]
NETWORKS = ("resnet18", "resnet101", "vgg19")
SIZES = (224, 256)
DEFAULT = methods.DEFAULT_METHOD
_WARM_ROUNDS = 3
COMMAND_LINE = "from ccam_deploy.cli.main import main; main()"
_PHOTOGRAPH = ROOT / "ccam_deploy" / "examples" / "photographs" / "flower.jpg"

_COLUMNS = ("grad-cam", "grad-cam++", "layer-cam", "score-cam", "rise", "collection-cam")
_TIMES = {
    ("resnet18", 224): (13.10, 13.72, 15.73, 1176.12, 16328.82, 54.15),
    ("resnet18", 256): (12.96, 13.69, 15.46, 1466.22, 22171.15, 59.83),
    ("resnet101", 224): (62.23, 62.21, 66.55, 20584.98, 26865.53, 322.59),
    ("resnet101", 256): (58.86, 59.09, 63.43, 20320.01, 34880.05, 350.55),
    ("vgg19", 224): (18.83, 18.16, 18.05, 1649.61, 28003.38, 92.63),
    ("vgg19", 256): (20.22, 21.04, 22.44, 2020.42, 40003.17, 111.38),
}
PAPER = {place: dict(zip(_COLUMNS, times, strict=True)) for place, times in _TIMES.items()}
"""Milliseconds of Table 2 (Ha & Youn 2022), on an NVIDIA RTX 3080."""


def method_names() -> list[str]:
    """The names of the methods that this package has, Collection-CAM first."""
    return sorted(methods.METHODS, key=lambda name: (name != DEFAULT, name))


def possible(
    names: Sequence[str], check: Callable[[str], None]
) -> tuple[list[str], dict[str, str]]:
    """The methods that pass a check, and why the others do not."""
    working, refused = [], {}
    for name in names:
        try:
            check(name)
            working.append(name)
        except OptionError as error:
            refused[name] = str(error)
    return working, refused


def measure(
    folder: Path,
    rounds: int,
    duration: float,
    backend: str = "auto",
    precision: str = "fp32",
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Time methods, by default every one, on one bundle; called in a process of its own."""
    with ccam.load(folder, backend=backend, precision=precision, batch_size=32) as explainer:
        (case,) = make_cases(explainer, [load_image(_PHOTOGRAPH)], batch=1)
        working, refused = possible(names or method_names(), explainer.require_method)
        calls = {name: partial(explainer.explain, case.images, method=name) for name in working}
        before = load_average()
        seconds = measure_in_turn(calls, rounds, _WARM_ROUNDS, duration)
        return {
            "backend": explainer.networks.backend,
            "precision": precision,
            "load_average": [before, load_average()],
            "masks": len(case.masks),
            "methods": {
                name: {
                    "ms": asdict(summarise(seconds[name])),
                    "ratio": median_ratio(seconds[name], seconds[DEFAULT]),
                }
                for name in calls
            },
            "refused": refused,
        }


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown, a row for each network, size and method."""
    lines = [
        "| network | input | method | median, ms | p95, ms | spread | over collection-cam "
        "| paper, ms (RTX 3080) | paper, over collection-cam |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for place, found in results.items():
        network, size = place.split("-")
        paper = PAPER.get((network, int(size)), {})
        for name, timing in found["methods"].items():
            spent = timing["ms"]
            own, base = paper.get(name), paper.get(DEFAULT)
            beside = f"{own:.2f} | {own / base:.2f}" if own and base else "- | -"
            lines.append(
                f"| {network} | {size}×{size} | {name} | {spent['median']:.1f} "
                f"| {spent['p95']:.1f} | {spent['spread']:.0%} | {timing['ratio']:.2f} | {beside} |"
            )
    return "\n".join(lines)


def report(results: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Results with the command that made them, and what they were made on."""
    card = gpu()
    return {
        "command": command,
        "conditions": {**asdict(machine()), "gpu": card and asdict(card)},
        "weights": "random",
        "results": results,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The table, and under it the conditions in a few words."""
    machine, results = found["conditions"], found["results"]
    device = machine["gpu"]["name"] if machine["gpu"] else machine["processor"]
    backends = ", ".join(sorted({one["backend"] for one in results.values()}))
    loads = [one["load_average"][0] for one in results.values()]
    known = [load for load in loads if load is not None]
    busy = f"{min(known):g} to {max(known):g}" if known else "unknown"
    precisions = ", ".join(sorted({one["precision"] for one in results.values()}))
    return (
        f"{table(results)}\n\n"
        f"{device}, {machine['cores']} cores, {backends}, {precisions}, random weights, one image, "
        f"from the preprocessed array. Load average before each measurement: {busy}.\n"
        f"Made by `{found['command']}`.\n"
    )


def file_name(results: Mapping[str, Any]) -> str:
    """What a file of results is called: after the backend, which all of them have in common."""
    (kind,) = {(one["backend"], one["precision"]) for one in results.values()}
    backend, precision = kind
    return f"table2-{backend}.json" if precision == "fp32" else f"table2-{backend}-{precision}.json"


def export_command(
    network: str, size: str, folder: Path, backend: str, precision: str
) -> list[str]:
    """The command that makes a network's bundle, with plans where the backend runs those."""
    recipe = ROOT / "export" / f"{network}.toml"
    words = ["--recipe", str(recipe), "--random-weights", "--input-size", size]
    words += ["--precision", precision, "--head", "--gradients", "--output", str(folder)]
    if backend in FLAVOURS:
        words += ["--build", "--backend", backend]
    return [sys.executable, "-c", COMMAND_LINE, "export", *words]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--methods", default=",".join(method_names()))
    parser.add_argument("--rounds", type=int, default=5, help="at least so many")
    parser.add_argument("--duration", type=float, default=10.0, help="seconds, at least")
    parser.add_argument("--backend", default="auto", choices=get_args(Backend))
    parser.add_argument("--precision", default="fp32", choices=get_args(PrecisionName))
    parser.add_argument("--output", type=Path, help="a folder")
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.bundle:
        kind = given.backend, given.precision, given.methods.split(",")
        print(json.dumps(measure(given.bundle, given.rounds, given.duration, *kind)))
        return
    results = {}
    for network in given.networks.split(","):
        for size in given.sizes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                place = f"{network}-{size}"
                results[place] = _in_own_process(network, size, Path(folder) / network, given)
                print(table({place: results[place]}), flush=True)
    if given.output:
        words = ["--networks", given.networks, "--sizes", given.sizes]
        words += ["--rounds", str(given.rounds), "--duration", f"{given.duration:g}"]
        words += ["--backend", given.backend, "--precision", given.precision]
        words += ["--methods", given.methods]
        words += ["--output", str(given.output)]
        found = report(results, shlex.join(["python", "-m", "bench.bench_table2", *words]))
        given.output.mkdir(parents=True, exist_ok=True)
        file = given.output / file_name(results)
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(markdown(found), encoding="utf-8")


def _in_own_process(
    network: str, size: str, folder: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """Export a network in one process, and measure it in another."""
    run(export_command(network, size, folder, given.backend, given.precision))
    words = ["--bundle", folder, "--rounds", given.rounds, "--duration", given.duration]
    words += ["--backend", given.backend, "--precision", given.precision]
    words += ["--methods", given.methods]
    said = run([sys.executable, "-m", "bench.bench_table2", *map(str, words)])
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def run(command: Sequence[str]) -> str:
    """What a command prints. Where it fails this process ends too, after what it said."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{done.stderr.strip()}\nfailed: {shlex.join(command)}")
    return done.stdout


if __name__ == "__main__":
    main()
