"""Which classifiers of timm and torchvision can be exported, and why others cannot.

    python -m bench.bench_zoo --output bench/results/zoo-cpu.json --page docs/zoo.md

For each network of bench/zoo_models.txt, which bench.zoo_list made, in a process of its own:

- build it with seeded random weights, parameters that start at zero or close to it redrawn, and
  normalisation layers with the statistics of photographs
- export it with default options, which compares logits, logits under masks, feature maps,
  gradients, partitions and maps with PyTorch and autograd
- explain a photograph with the bundle

It works where all that succeeds, no layer's gradient is zero, and the map is finite and not flat.
Results that the output file has already are kept, so that a broken run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import ccam_deploy as ccam
from bench import harness
from bench.zoo_list import ATTENTION, CONVOLUTION, ZooModel
from ccam_deploy.bundle.folder import Bundle
from ccam_deploy.errors import brief
from ccam_deploy.examples.photographs import photographs
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.architecture import build_model
from ccam_deploy.export.recipe import InputTable, Recipe, random_model
from ccam_deploy.fidelity.observation import load_observation
from ccam_deploy.files import write_file
from ccam_deploy.text import markdown_table

LIST = Path(__file__).with_name("zoo_models.txt")
Results = dict[str, dict[str, Any]]

_HEADER = ("network", "kind", "input", "target layers", "equal partitions", "s", "works")
_PAGE = """# Networks that were tried

Networks of timm and torchvision, each the smallest of its family, were built with random weights,
most of them for images of 64×64, exported, and compared with PyTorch: logits, feature maps,
gradients, partitions and maps. A network's kind is decided by a run of it: transformers and hybrids
multiply two tensors that both depend on the image, as attention does, or have no convolution behind
the patches; others are convolutional. The last columns are seconds of processor time, and `yes` or
the reason why not. Several runs made the table; the machine below it is that of the last one.

"""


class CheckError(Exception):
    """An export succeeded, but explains nothing."""


def awake(arch: str) -> nn.Module:
    """Make a network whose parameters that start at zero, or close to it, are drawn anew.

    Residual branches and heads often start so, and hide what lies behind them.

    Args:
        arch: See build_model.

    Returns:
        The network.
    """
    network = build_model(arch)
    with torch.no_grad():
        for name, value in network.named_parameters():
            constant = value.numel() > 0 and bool((value == value.flatten()[0]).all())
            if not constant or name.endswith("bias") or abs(value.flatten()[0]) > 0.5:
                continue
            if value.numel() == max(value.shape, default=1):
                value.uniform_(0.2, 0.8)
            else:
                value.normal_(0, value[0].numel() ** -0.5)
    return network


def check(model: ZooModel) -> dict[str, Any]:
    """Export a network and explain a photograph with it.

    Args:
        model: The network.

    Returns:
        What was measured: layers, errors against PyTorch, shares of equal partitions.

    Raises:
        CheckError: The bundle explains nothing.
        CcamError: The export failed.
    """
    size = (model.size, model.size)
    recipe = Recipe(model.name, f"bench.bench_zoo:awake(arch={model.arch!r})", InputTable(size))
    network = random_model(recipe)
    with tempfile.TemporaryDirectory() as folder:
        settings = ExportSettings(random_weights=True)
        bundle = export(network, Path(folder) / "bundle", size, settings=settings)
        _require_gradients(bundle)
        with ccam.load(bundle, backend="onnxruntime-cpu", threads=1) as explainer:
            saliency = explainer.explain(photographs()[0]).saliency
        if not np.isfinite(saliency).all() or not saliency.any():
            raise CheckError("the map is all zero or not finite")
        fidelity = bundle.manifest.precisions["fp32"].fidelity
        return {
            "layers": [
                f"{layer.name} {layer.channels}x{layer.height}x{layer.width}"
                for layer in bundle.manifest.layers
            ],
            "logits_error": fidelity.logits,
            "gradients_error": max(fidelity.gradients),
            "saliency_rank": fidelity.saliency_rank,
            "partitions": fidelity.partitions,
        }


def _require_gradients(bundle: Bundle) -> None:
    observation = load_observation(bundle.path(bundle.precision("fp32").reference))
    for layer, values in zip(bundle.manifest.layers, observation.gradients, strict=True):
        if not values.any():
            raise CheckError(f"the gradient of {layer.name} is zero")


def measure(model: ZooModel) -> dict[str, Any]:
    """Check a network, and keep why that failed.

    Args:
        model: The network.

    Returns:
        "works", "reason", "seconds" of processor time, and what check returns.
    """
    start = time.process_time()
    try:
        figures = {"works": True, "reason": "", **check(model)}
    except Exception as error:
        figures = {"works": False, "reason": brief(error)}
    return {**figures, "seconds": time.process_time() - start}


Measure = Callable[[ZooModel], dict[str, Any]]


@dataclass
class _Child:
    """A process that measures one network."""

    model: ZooModel
    process: multiprocessing.process.BaseProcess
    answer: Connection
    deadline: float

    @classmethod
    def start(cls, model: ZooModel, measure: Measure, timeout: float) -> _Child:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bench.zoo_libraries", "ccam_deploy.export"])
        answer, send = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(send, measure, model), daemon=True)
        process.start()
        send.close()
        return cls(model, process, answer, time.monotonic() + timeout)

    def result(self, timeout: float) -> dict[str, Any]:
        """What it measured, or that it did not answer in time or at all."""
        if not self.answer.poll():
            self.process.kill()
            reason = f"not done within {timeout:g} s"
            figures = {"works": False, "reason": reason, "seconds": timeout}
        else:
            try:
                figures = self.answer.recv()
            except EOFError:
                self.process.join()
                reason = f"the process ended with {self.process.exitcode}"
                figures = {"works": False, "reason": reason, "seconds": 0.0}
        self.process.join()
        return figures


def _answer(send: Connection, measure: Measure, model: ZooModel) -> None:
    send.send(measure(model))


def measure_all(
    models: Sequence[ZooModel], jobs: int, timeout: float, measure: Measure = measure
) -> Iterator[tuple[ZooModel, dict[str, Any]]]:
    """Measure networks in processes of their own.

    Args:
        models: The networks, in order.
        jobs: How many run at a time.
        timeout: Seconds after which one is given up.
        measure: What a process does.

    Yields:
        Each network with its result, as they come.
    """
    waiting, running = list(models), list[_Child]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Child.start(waiting.pop(0), measure, timeout))
        first = min(child.deadline for child in running)
        wait([child.answer for child in running], max(0.0, first - time.monotonic()))
        for child in list(running):
            if child.answer.poll() or child.deadline <= time.monotonic():
                running.remove(child)
                yield child.model, child.result(timeout)


@dataclass(frozen=True)
class Choice:
    """Which networks of the list are measured.

    Attributes:
        patterns: Names with wildcards; a library may be left out.
        only_failed: Those whose result is that they do not work, and no others.
        limit: How many at most.
        known: Results so far, by name.
    """

    patterns: tuple[str, ...] = ("*",)
    only_failed: bool = False
    limit: int | None = None
    known: Results = field(default_factory=dict)

    def of(self, models: Sequence[ZooModel]) -> list[ZooModel]:
        """Choose among networks those that have no result, or a bad one."""
        chosen = [model for model in models if self._matches(model.name) and self._due(model.name)]
        return chosen[: self.limit]

    def _matches(self, name: str) -> bool:
        short = name.rpartition("/")[2]
        return any(fnmatch(name, word) or fnmatch(short, word) for word in self.patterns)

    def _due(self, name: str) -> bool:
        if self.only_failed:
            return name in self.known and not self.known[name]["works"]
        return name not in self.known


def shares(results: Results) -> str:
    """How many networks of each kind work, as Markdown."""
    rows = []
    for kind in (CONVOLUTION, ATTENTION):
        works = [figures["works"] for figures in results.values() if figures["kind"] == kind]
        if works:
            rows.append((kind, str(len(works)), str(sum(works)), f"{np.mean(works):.1%}"))
    return markdown_table(("kind", "tried", "work", "share"), rows)


def table(results: Results) -> str:
    """Lay out results as Markdown, a row for each network."""
    rows = [
        (
            name,
            figures["kind"],
            str(figures["size"]),
            ", ".join(figures.get("layers", ())) or "–",
            f"{figures['partitions']:.0%}" if "partitions" in figures else "–",
            f"{figures['seconds']:.0f}",
            figures["reason"] or "yes",
        )
        for name, figures in sorted(results.items())
    ]
    return markdown_table(_HEADER, rows)


def markdown(result: Mapping[str, Any]) -> str:
    """The tables, the machine, and the command that makes them."""
    results, device = result["results"], harness.device_line(result["conditions"])
    versions = ", ".join(f"{name} {number}" for name, number in result["libraries"].items())
    return (
        f"{shares(results)}\n\n{table(results)}\n\n{device}; {versions}.\n"
        f"Made by `{result['command']}`.\n"
    )


def read_list(path: Path) -> list[ZooModel]:
    """Read a list of networks, and order it by what their exports will take."""
    models = map(ZooModel.from_line, path.read_text().splitlines())
    return sorted(models, key=lambda model: (model.operators, model.parameters))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="*", help="names or patterns, by default all")
    parser.add_argument("--list", type=Path, default=LIST, help="the file of the networks")
    parser.add_argument("--limit", type=int, help="measure no more than so many")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each")
    parser.add_argument("--only-failed", action="store_true", help="measure failed ones again")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--page", type=Path, help="a page of the documentation")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    models = read_list(options.list)
    known: Results = {}
    if options.output and options.output.exists():
        known = json.loads(options.output.read_text())["results"]
    patterns = tuple(options.models.split(","))
    chosen = Choice(patterns, options.only_failed, options.limit, known).of(models)
    for model, figures in measure_all(chosen, options.jobs, options.timeout):
        known[model.name] = {**asdict(model), **figures}
        line = f"{model.name}: {figures['reason'] or 'works'} ({figures['seconds']:.0f} s)"
        print(line, flush=True)
        result = {
            "command": harness.command_line(
                "bench.bench_zoo", {"output": options.output, "page": options.page}
            ),
            "conditions": harness.conditions(),
            "libraries": {name: metadata.version(name) for name in ("timm", "torchvision")},
            "results": known,
        }
        if options.output:
            harness.write_results(options.output, result, markdown(result))
        if options.page:
            write_file(options.page, (_PAGE + markdown(result)).encode())
    print(shares(known))


if __name__ == "__main__":
    main()
