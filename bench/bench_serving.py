"""What Triton's server adds to an explanation, and what it answers under load, on the CPU.

    python -m bench.bench_serving --output bench/results/serving-cpu.json

A network with random weights at 224×224, one image a request:

- overhead: the explainer alone, and requests of one client by HTTP, gRPC and shared memory, in turn
- load: 1 to 16 clients at the same time, each with its connection and without a pause, by HTTP;
  beside them the explainer alone, called again and again, before and after

Server and explainer run the same engines with as many threads. Measure on a quiet machine. It takes
under four minutes, and needs the environment of `make test-serve`; --bundle spares it PyTorch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

import ccam_deploy as ccam
from bench import harness
from bench.serving import served
from ccam_deploy.arrays import Floats
from ccam_deploy.explainer import Explainer
from ccam_deploy.image_files import load_image
from ccam_deploy.latency.conditions import CPU, load_average
from ccam_deploy.latency.timing import (
    Load,
    measure_in_turn,
    measure_load,
    median_ratio,
    summarise,
)
from ccam_deploy.serve.client import Client
from ccam_deploy.serve.repository import Serving
from ccam_deploy.serve.server import Server
from ccam_deploy.serve.settings import ModelSettings
from ccam_deploy.text import markdown_table

CLIENTS = (1, 2, 4, 8, 16)
WAYS = ("http", "grpc", "system")
"""How a request travels: by a protocol, or by gRPC with images and maps in shared memory."""

_OVERHEAD = ("one request", "median, ms", "p99, ms", "spread", "to the explainer alone")
_LOAD = ("clients", "images/s", "p50, ms", "p99, ms", "to the explainer alone")


def client_of(server: Server, way: str) -> Client:
    """Connect to a server."""
    if way == "http":
        return Client(f"http://{server.http}")
    return Client(f"grpc://{server.grpc}", memory="system" if way == "system" else "wire")


def measure_overhead(
    explainer: Explainer, clients: Mapping[str, Client], images: Floats, rounds: int
) -> dict[str, Any]:
    """Time single requests against the explainer's own calls, in turn."""
    calls: dict[str, Callable[[], object]] = {"alone": lambda: explainer.explain(images)}
    calls |= {way: _asking(client, images) for way, client in clients.items()}
    seconds = measure_in_turn(calls, rounds, warmup=2)
    return {
        name: {
            "ms": asdict(summarise(durations)),
            "ratio": median_ratio(durations, seconds["alone"]),
        }
        for name, durations in seconds.items()
    }


def measure_clients(
    connect: Callable[[], Client], images: Floats, count: int, duration: float
) -> dict[str, Any]:
    """Time so many clients that ask again and again at the same time."""
    with connected(connect, count) as clients:
        load = measure_load([_asking(client, images) for client in clients], duration)
    return {"clients": count, **_figures(load)}


@contextmanager
def connected(connect: Callable[[], Client], count: int) -> Iterator[list[Client]]:
    """Connect several clients while a block runs."""
    with ExitStack() as stack:
        yield [stack.enter_context(connect()) for _ in range(count)]


def _asking(client: Client, images: Floats) -> Callable[[], object]:
    return lambda: client.explain(images)


def _figures(load: Load) -> dict[str, Any]:
    return {"rate": round(load.rate, 3), "ms": asdict(summarise(load.seconds))}


def measure(bundle: Path, options: Any) -> dict[str, Any]:
    """Measure one bundle, served and alone."""
    settings = ModelSettings(threads=options.threads)
    engine = {"backend": CPU, "threads": options.threads}
    before = load_average()
    with (
        ccam.load(bundle, **engine) as explainer,
        served(bundle, Serving(max_batch=options.max_batch), settings) as server,
    ):
        images, _ = explainer.preprocess([load_image(harness.PHOTOGRAPH)])
        with ExitStack() as stack:
            clients = {way: stack.enter_context(client_of(server, way)) for way in WAYS}
            overhead = measure_overhead(explainer, clients, images, options.rounds)
        alone = [_alone(explainer, images, options.duration)]
        loads = [
            measure_clients(lambda: client_of(server, "http"), images, count, options.duration)
            for count in CLIENTS
        ]
        alone.append(_alone(explainer, images, options.duration))
    return {
        "overhead": overhead,
        "alone": alone,
        "load": loads,
        "load_average": [before, load_average()],
    }


def _alone(explainer: Explainer, images: Floats, duration: float) -> dict[str, Any]:
    return _figures(measure_load([lambda: explainer.explain(images)], duration))


def markdown(result: Mapping[str, Any]) -> str:
    """Lay out a result, and the command that makes it, as Markdown."""
    figures = result["results"]
    rows = [
        (name, *_cells(each["ms"]), f"{each['ms']['spread']:.0%}", f"{each['ratio']:.3f}")
        for name, each in figures["overhead"].items()
    ]
    rate = sum(each["rate"] for each in figures["alone"]) / len(figures["alone"])
    lines = [("the explainer alone", f"{rate:.2f}", *_cells(figures["alone"][0]["ms"]), "1.000")]
    lines += [
        (
            str(each["clients"]),
            f"{each['rate']:.2f}",
            *_cells(each["ms"]),
            f"{each['rate'] / rate:.3f}",
        )
        for each in figures["load"]
    ]
    return (
        f"{markdown_table(_OVERHEAD, rows)}\n\n{markdown_table(_LOAD, lines)}\n\n"
        f"{result['network']}, {harness.device_line(result['conditions'])}. "
        f"Made by `{result['command']}`.\n"
    )


def _cells(milliseconds: Mapping[str, float]) -> tuple[str, str]:
    return f"{milliseconds['median']:.1f}", f"{milliseconds['p99']:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__, rounds=20, output="a JSON file")
    parser.add_argument("--network", default="resnet18", help="a recipe of export/")
    parser.add_argument("--bundle", type=Path, help="the network's bundle, where there is one")
    parser.add_argument("--duration", type=float, default=15.0, help="seconds of each load")
    parser.add_argument("--max-batch", type=int, default=8, help="images explained together")
    parser.add_argument("--threads", type=int, default=0, help="0 lets ONNX Runtime choose")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or harness.export(
            options.network, Path(folder) / "bundle", "--random-weights"
        )
        results = measure(bundle, options)
    words = {
        "network": options.network,
        "rounds": options.rounds,
        "duration": options.duration,
        "max-batch": options.max_batch,
        "threads": options.threads,
        "output": options.output,
    }
    result = {
        "command": harness.command_line("bench.bench_serving", words),
        "conditions": harness.conditions(),
        "network": f"{options.network}, random weights",
        "results": results,
    }
    harness.publish(options.output, result, markdown(result))


if __name__ == "__main__":
    main()
