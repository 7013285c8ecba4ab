"""The time of each kernel between the graphs, on a GPU.

    python -m bench.bench_kernels --output bench/results

Random features and gradients of the shapes that the target layers of three networks have at
224×224, float32, for 1 and for 8 images. Each step of `launch.CollectionKernels` is captured in a
CUDA graph of its own and replayed between two events. The steps are timed in turn, in the order
in which each works on what the ones before it left. The classifier's logits are random too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import asdict

from bench import harness
from ccam_deploy.engines.cuda.device import Device, Region
from ccam_deploy.errors import BackendError
from ccam_deploy.kernels.cuda.buffers import Buffers
from ccam_deploy.kernels.cuda.geometry import Geometry, LayerPlace
from ccam_deploy.latency.timing import summarise
from ccam_deploy.text import markdown_table

if TYPE_CHECKING:
    from ccam_deploy.engines.cuda.pycuda import CudaDevice

SHAPES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "resnet18": ((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)),
    "resnet101": ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)),
    "vgg19": ((128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14)),
}
"""C, h, w of the target layers, the final one last, by network."""

BATCHES = (1, 8)
_SIZE, _CLASSES = (224, 224), 1000
_K_RANGE = (2, 10)
_WARM_ROUNDS = 3
_NO_GPU = 2

Work = Callable[[], None]


def geometry(network: str, batch: int) -> Geometry:
    """Lay out a network's layers one after the other, with Collection-CAM's defaults."""
    places, start = [], 0
    for shape in SHAPES[network]:
        places.append(LayerPlace(*shape, start, start))
        start += batch * math.prod(shape)
    return Geometry(tuple(places), _SIZE, batch, _K_RANGE[1])


def time_on_device(
    device: Device, steps: Mapping[str, Work], rounds: int
) -> dict[str, list[float]]:
    """Time steps on the device, captured and replayed in turn.

    Every step runs once before the first is captured, so that all kernels are compiled.

    Args:
        device: Where the steps run.
        steps: The steps by name, in the order in which they run.
        rounds: How many rounds are timed, after _WARM_ROUNDS.

    Returns:
        The seconds of each round, by step.
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
    """Make the steps of an explanation without the graphs, on random data.

    Args:
        device: Where the steps run.
        network: A name among SHAPES.
        batch: Images.

    Returns:
        The steps by name, and the region from which "starts", the counts of masks, is downloaded.
    """
    from ccam_deploy.kernels.cuda.launch import CollectionKernels, Head, Inputs, write_constants

    place = geometry(network, batch)
    total = sum(batch * math.prod(shape) for shape in SHAPES[network])
    specs = {name: (spec.shape, spec.dtype) for name, spec in place.specs().by_name().items()}
    arrays: dict[str, Any] = {
        "features": ((total,), np.float32),
        "gradients": ((total,), np.float32),
        "owner": ((batch,), np.int32),
        "codes": ((batch,), np.int32),
        "k_range": ((2,), np.int32),
        "logits": ((batch, _CLASSES), np.float32),
        "mask_logits": ((place.masks, _CLASSES), np.float32),
    }
    data = Region(device, arrays, mirrored=True)
    random = np.random.default_rng(0)
    for values in data.host.values():
        if values.dtype == np.float32:
            values[:] = random.standard_normal(values.shape, np.float32)
    np.maximum(data.host["features"], 0, out=data.host["features"])
    data.host["owner"][:] = np.arange(batch)
    data.host["codes"][:] = -1
    data.host["k_range"][:] = _K_RANGE
    data.upload()
    counts = Region(device, {"starts": specs.pop("starts")}, mirrored=True)
    gradient = {"output_gradient": ((batch, _CLASSES), np.float32)}
    room = Region(device, {**specs, **gradient})
    stream = device.kernel_stream
    buffers = Buffers.of(
        {"starts": counts.view("starts"), **{name: room.view(name) for name in specs}}
    )
    write_constants(place, buffers, stream)
    kernels = CollectionKernels(place, buffers)
    inputs = Inputs(*map(data.view, ("features", "gradients", "owner", "k_range")))
    head = Head(data.view("logits"), data.view("codes"), room.view("output_gradient"))
    mask_logits = data.view("mask_logits")
    return {
        "output_gradient": lambda: kernels.output_gradient(inputs, head, 1.0, "logit", stream),
        "statistics": lambda: kernels.statistics(inputs, 1.0, stream),
        "partition": lambda: kernels.partition(inputs, False, stream),
        "sums": lambda: kernels.sums(inputs, stream),
        "masks": lambda: kernels.masks(inputs, stream),
        "scores": lambda: kernels.scores(inputs, mask_logits, "logit", stream),
        "combine": lambda: kernels.combine(inputs, stream),
    }, counts


def measure(device: Device, network: str, batch: int, rounds: int) -> dict[str, Any]:
    """Time the steps for one network and batch, and count the masks that they made."""
    with device.current():
        steps, counts = kernel_steps(device, network, batch)
        seconds = time_on_device(device, steps, rounds)
        counts.download()
        device.wait()
        masks = int(counts.host["starts"][-1])
    return {"masks": masks, "kernels_ms": distribution(seconds)}


def distribution(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Summarise the milliseconds of each step, and of their sum round by round."""
    sums = [sum(durations) for durations in zip(*seconds.values(), strict=True)]
    every = {**seconds, "sum": sums}
    return {name: asdict(summarise(durations)) for name, durations in every.items()}


def table(results: Mapping[str, Any]) -> str:
    """Lay out median and p90 of every step as Markdown, a column for each network and batch."""
    columns = list(results.values())
    rows = [("masks", *(str(figures["masks"]) for figures in columns))]
    for name in dict.fromkeys(name for figures in columns for name in figures["kernels_ms"]):
        timings = [figures["kernels_ms"][name] for figures in columns]
        cells = (f"{1000 * t['median']:.0f} / {1000 * t['p90']:.0f}" for t in timings)
        rows.append((name, *cells))
    return markdown_table(("median / p90, µs", *results), rows)


def markdown(result: Mapping[str, Any]) -> str:
    """The table, the GPU, and the command that makes it."""
    card = result["conditions"]["gpu"]
    name = card["name"] if card else "unknown GPU"
    return (
        f"{table(result['results'])}\n\n{name}, random data, float32, 224×224. "
        f"Made by `{result['command']}`.\n"
    )


def open_device() -> CudaDevice:
    """The first GPU. Raises BackendError where there is none."""
    from ccam_deploy.engines.cuda.pycuda import CudaDevice

    return CudaDevice()


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.argument_parser(__doc__, rounds=200).parse_args(arguments)
    results: dict[str, Any] = {}
    for network in SHAPES:
        for batch in BATCHES:
            try:
                device = open_device()
            except BackendError as error:
                print(f"kernels are measured on a GPU alone: {error}", file=sys.stderr)
                sys.exit(_NO_GPU)
            try:
                results[f"{network}-{batch}"] = measure(device, network, batch, options.rounds)
            finally:
                device.close()
    print(table(results))
    if options.output:
        words = {"rounds": options.rounds, "output": options.output}
        result = {
            "command": harness.command_line("bench.bench_kernels", words),
            "conditions": harness.conditions(with_gpu=True),
            "results": results,
        }
        harness.write_results(options.output / "kernels.json", result, markdown(result))


if __name__ == "__main__":
    main()
