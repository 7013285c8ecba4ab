"""The time of each kernel between the graphs, on a GPU.

    python -m bench.bench_kernels --output bench/results

Random features and gradients of the shapes that the target layers of three networks have at
224×224, float32, for 1 and for 8 images. Each step of `launch.CollectionKernels` is captured in a
CUDA graph of its own and replayed between two events. The steps are timed in turn, in the order
in which each works on what the ones before it left. The classifier's logits are random too.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import asdict

from ccam_deploy.engines.cuda.device import Device, Region
from ccam_deploy.errors import BackendError
from ccam_deploy.kernels.cuda.geometry import Geometry, LayerPlace
from ccam_deploy.latency.conditions import gpu, machine
from ccam_deploy.latency.timing import summarise

if TYPE_CHECKING:
    from ccam_deploy.engines.cuda.pycuda import CudaDevice

SHAPES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "resnet18": ((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)),
    "resnet101": ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)),
    "vgg19": ((128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14)),
}
"""C, h, w of the target layers, the final one last."""

BATCHES = (1, 8)
_SIZE, _CLASSES = (224, 224), 1000
_WARM_ROUNDS = 3
_NO_GPU = 2

Work = Callable[[], None]


def geometry(network: str, batch: int) -> Geometry:
    """A network's layers one after the other, with the options' defaults."""
    places, start = [], 0
    for shape in SHAPES[network]:
        places.append(LayerPlace(*shape, start, start))
        start += batch * math.prod(shape)
    return Geometry(tuple(places), _SIZE, batch)


def time_on_device(
    device: Device, steps: Mapping[str, Work], rounds: int
) -> dict[str, list[float]]:
    """The seconds that each step takes of the device, replayed in turn; by name.

    Every step runs once before the first is captured, so that all kernels are compiled.
    """
    for work in steps.values():
        work()
    device.wait()
    replays = {name: device.capture(work) for name, work in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(_WARM_ROUNDS + rounds):
        marks = []
        for replay in replays.values():
            start = device.mark()
            replay()
            marks.append((start, device.mark()))
        device.wait()
        if done >= _WARM_ROUNDS:
            for name, (start, end) in zip(steps, marks, strict=True):
                seconds[name].append(device.seconds(start, end))
    return seconds


def kernel_steps(device: Device, network: str, batch: int) -> tuple[dict[str, Work], Region]:
    """The steps of an explanation but the graphs, on random data; and what reads their counts."""
    from ccam_deploy.kernels.cuda.launch import Buffers, CollectionKernels, Head, Inputs

    place = geometry(network, batch)
    total = sum(batch * math.prod(shape) for shape in SHAPES[network])
    specs = {name: (spec.shape, spec.dtype) for name, spec in place.specs().items()}
    arrays: dict[str, Any] = {
        "features": ((total,), np.float32),
        "gradients": ((total,), np.float32),
        "owner": ((batch,), np.int32),
        "wanted": ((batch,), np.int32),
        "logits": ((batch, _CLASSES), np.float32),
        "mask_logits": ((place.masks, _CLASSES), np.float32),
    }
    given = Region(device, arrays, mirrored=True)
    random = np.random.default_rng(0)
    for values in given.host.values():
        if values.dtype == np.float32:
            values[:] = random.standard_normal(values.shape, np.float32)
    np.maximum(given.host["features"], 0, out=given.host["features"])
    given.host["owner"][:] = np.arange(batch)
    given.host["wanted"][:] = -1
    given.upload()
    counted = Region(device, {"starts": specs.pop("starts")}, mirrored=True)
    gradient = {"output_gradient": ((batch, _CLASSES), np.float32)}
    room = Region(device, {**specs, **gradient})
    stream = device.kernel_stream
    buffers = Buffers.allocate(
        place, lambda name, spec: (counted if name == "starts" else room).view(name), stream
    )
    kernels = CollectionKernels(place, buffers)
    inputs = Inputs(given.view("features"), given.view("gradients"), given.view("owner"))
    head = Head(given.view("logits"), given.view("wanted"), room.view("output_gradient"))
    mask_logits = given.view("mask_logits")
    return {
        "output_gradient": lambda: kernels.output_gradient(inputs, head, 1.0, False, stream),
        "statistics": lambda: kernels.statistics(inputs, 1.0, stream),
        "partition": lambda: kernels.partition(inputs, False, stream),
        "sums": lambda: kernels.sums(inputs, stream),
        "masks": lambda: kernels.masks(inputs, stream),
        "scores": lambda: kernels.scores(inputs, mask_logits, False, stream),
        "combine": lambda: kernels.combine(inputs, stream),
    }, counted


def measure(device: Device, network: str, batch: int, rounds: int) -> dict[str, Any]:
    """Time the steps for one network and batch, and count the masks that they made."""
    with device.current():
        steps, counted = kernel_steps(device, network, batch)
        seconds = time_on_device(device, steps, rounds)
        counted.download()
        device.wait()
        masks = int(counted.host["starts"][-1])
    return {"masks": masks, "kernels_ms": distribution(seconds)}


def distribution(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """The milliseconds of each step, and of their sum round by round."""
    sums = [sum(spent) for spent in zip(*seconds.values(), strict=True)]
    return {name: asdict(summarise(spent)) for name, spent in {**seconds, "sum": sums}.items()}


def table(results: Mapping[str, Any]) -> str:
    """Median and p90 of every step as Markdown, a column for each network and batch."""
    lines = [
        f"| median / p90, µs | {' | '.join(results)} |",
        f"|---|{'---|' * len(results)}",
        f"| masks | {' | '.join(str(found['masks']) for found in results.values())} |",
    ]
    names = dict.fromkeys(name for found in results.values() for name in found["kernels_ms"])
    for name in names:
        spent = [found["kernels_ms"][name] for found in results.values()]
        cells = [f"{1000 * one['median']:.0f} / {1000 * one['p90']:.0f}" for one in spent]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def open_device() -> CudaDevice:
    """The first GPU. Raises BackendError where there is none."""
    from ccam_deploy.engines.cuda.pycuda import CudaDevice

    return CudaDevice()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path, help="a folder")
    given = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for network in SHAPES:
        for batch in BATCHES:
            try:
                device = open_device()
            except BackendError as error:
                print(f"kernels are measured on a GPU alone: {error}", file=sys.stderr)
                sys.exit(_NO_GPU)
            try:
                results[f"{network}-{batch}"] = measure(device, network, batch, given.rounds)
            finally:
                device.close()
    print(table(results))
    if given.output:
        words = ["--rounds", str(given.rounds), "--output", str(given.output)]
        command = shlex.join(["python", "-m", "bench.bench_kernels", *words])
        card = gpu()
        facts = {**asdict(machine()), "gpu": card and asdict(card)}
        found = {"command": command, "conditions": facts, "results": results}
        given.output.mkdir(parents=True, exist_ok=True)
        file = given.output / "kernels.json"
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        name = card.name if card else "unknown GPU"
        text = f"{table(results)}\n\n{name}, random data, float32, 224×224. Made by `{command}`.\n"
        file.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
