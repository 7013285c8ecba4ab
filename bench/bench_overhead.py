"""What an explanation costs beyond its forward passes, on ONNX Runtime and the CPU.

    python -m bench.bench_overhead --output bench/results/overhead-cpu.json

For each network with random weights at 224×224, one image, timed in turn:

- explain: the whole explanation, from the preprocessed image to the saliency map
- floor: backbone + gradient + one classifier batch of the same masks, on the same sessions
- pytorch: the same explanation in plain PyTorch with hooks and one forward per mask

Each network is exported and run in a process of its own; the peak memory is that of a process
that explains only, read before PyTorch is loaded into it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

import ccam_deploy as ccam
from ccam_deploy.explainer import Explainer
from ccam_deploy.image_files import load_image
from ccam_deploy.latency.cases import floor_call, make_cases
from ccam_deploy.latency.conditions import machine, peak_memory
from ccam_deploy.latency.timing import measure_in_turn, median_ratio, summarise

Floats = NDArray[np.float32]

ROOT = Path(__file__).parents[1]
NETWORKS = ("resnet18", "resnet101", "vgg19")
_PHOTOGRAPH = ROOT / "ccam_deploy" / "examples" / "photographs" / "flower.jpg"


def measure(folder: Path, recipe: Path, rounds: int) -> dict[str, Any]:
    """Time one network's bundle; called in a process of its own."""
    explainer = ccam.load(folder, backend="onnxruntime-cpu", batch_size=32)
    (case,) = make_cases(explainer, [load_image(_PHOTOGRAPH)], batch=1)
    peak = peak_memory()
    explain_in_pytorch = _in_pytorch(explainer, case.images, int(case.targets[0]), recipe)
    stages: list[dict[str, float]] = []
    calls = {
        "explain": lambda: stages.append(explainer.explain(case.images).timings),
        "floor": floor_call(explainer, case),
        "pytorch": explain_in_pytorch,
    }
    seconds = measure_in_turn(calls, rounds)
    return {
        "masks": sum(sum(counts) for counts in case.collections.values()),
        "masks_run": len(case.masks),
        **{f"{name}_ms": asdict(summarise(spent)) for name, spent in seconds.items()},
        "overhead": median_ratio(seconds["explain"], seconds["floor"]),
        "speedup_over_pytorch": median_ratio(seconds["pytorch"], seconds["explain"]),
        "peak_memory_mib": peak,
        "stages_ms": {
            name: round(1000 * float(np.median([times[name] for times in stages])), 2)
            for name in stages[0]
        },
    }


def _in_pytorch(
    explainer: Explainer, images: Floats, target: int, recipe: Path
) -> Callable[[], object]:
    import torch

    from ccam_deploy.export.recipe import random_model, read_recipe
    from ccam_deploy.latency import plain_pytorch

    manifest = explainer.bundle.manifest
    layers = [layer.name for layer in manifest.layers]
    model = random_model(read_recipe(recipe))
    peer = plain_pytorch.of_model(model, layers, manifest.input)
    image = torch.from_numpy(images[0].copy())
    return lambda: peer.explain(image, target)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| network | masks | explain, ms | floor, ms | overhead | peak, MiB "
        "| PyTorch, ms | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        lines.append(
            f"| {name} | {found['masks']} | {found['explain_ms']['median']:.0f} "
            f"| {found['floor_ms']['median']:.0f} | {found['overhead']:.3f} "
            f"| {found['peak_memory_mib']:.0f} | {found['pytorch_ms']['median']:.0f} "
            f"| {found['speedup_over_pytorch']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.bundle:
        recipe = ROOT / "export" / f"{given.networks}.toml"
        print(json.dumps(measure(given.bundle, recipe, given.rounds)))
        return
    results = {}
    for name in given.networks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = _in_own_process(name, Path(folder) / name, given.rounds)
        print(table({name: results[name]}), flush=True)
    if given.output:
        command = (
            f"python -m bench.bench_overhead --networks {given.networks} "
            f"--rounds {given.rounds} --output {given.output}"
        )
        report = {"command": command, "conditions": asdict(machine()), "results": results}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        given.output.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")


def _in_own_process(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    recipe = str(ROOT / "export" / f"{name}.toml")
    ccam_deploy = [sys.executable, "-c", "from ccam_deploy.cli.main import main; main()"]
    export = ["export", "--recipe", recipe, "--random-weights", "--output", str(folder)]
    subprocess.run([*ccam_deploy, *export], check=True, capture_output=True, cwd=ROOT)
    own = [
        sys.executable,
        "-m",
        "bench.bench_overhead",
        "--networks",
        name,
        "--bundle",
        str(folder),
    ]
    done = subprocess.run(
        [*own, "--bundle", str(folder), "--rounds", str(rounds)],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
