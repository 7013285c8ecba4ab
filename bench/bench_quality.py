"""The paper's Tables 3 and 4 and its ablations, on digits in scenes with the example classifier.

    python -m bench.bench_quality --output bench/results/quality-digits.json

Every method that the package has, with its defaults, on scenes of the test split that are drawn
with a seed: Average Drop, Average Increase, Deletion, Insertion, Overall (Table 3), Proportion
(Table 4) and the pointing game, mean and 95 % bootstrap interval; the time of one explanation
(Table 1); and which layers Collection-CAM's maps come from. Then Collection-CAM with other theta,
ranges of k, scores, standardised statistics, and fewer layers; the last also for other methods that
can combine layers (Figure 2).

A method that cannot run on the bundle is listed with the reason. RISE makes most of the forwards;
with --rise-masks it makes fewer. With --work the measurement goes on where it was broken off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from msgspec.structs import asdict

import ccam_deploy as ccam
from ccam_deploy.explainer import Explainer
from ccam_deploy.latency.conditions import gpu, load_average, machine
from ccam_deploy.latency.timing import measure_in_turn, summarise
from ccam_deploy.methods import DEFAULT_METHOD, METHODS, RISE, CollectionCAM, Method, make_method
from ccam_deploy.quality import report
from ccam_deploy.quality.datasets import open_dataset
from ccam_deploy.quality.evaluation import Evaluation, EvaluationSettings, Variant, drawn, refused
from ccam_deploy.quality.metrics import box_mask

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "export" / "digits.toml"
DATASET = "scenes"
TEST_IMAGES = 500
DEFAULT = Variant(DEFAULT_METHOD, CollectionCAM())

_ABLATED: dict[str, tuple[dict[str, Any], ...]] = {
    "theta": tuple({"theta": value} for value in (0.0, 0.2, 0.3, 0.5, 0.7)),
    "k range": tuple(
        {"k_min": low, "k_max": high} for low, high in ((2, 2), (2, 5), (2, 20), (5, 10), (10, 10))
    ),
    "score": ({"score": "probability"},),
    "standardise": ({"standardise": True},),
}
"""Options of Collection-CAM that differ from its defaults, by what they vary."""


def contenders(names: Sequence[str], rise_masks: int) -> list[Variant]:
    """Methods with their defaults, but for RISE's number of masks, which is in its name then."""
    found = []
    for name in names:
        if name == RISE.name and rise_masks != RISE.masks:
            found.append(Variant(f"{name}, masks={rise_masks}", RISE(masks=rise_masks)))
        else:
            found.append(Variant(name, make_method(name)))
    return found


def runnable(
    explainer: Explainer, variants: Sequence[Variant]
) -> tuple[list[Variant], dict[str, str]]:
    """The variants that run on a bundle, and the reason of each that does not."""
    reasons = refused(explainer, variants)
    return [one for one in variants if one.name not in reasons], reasons


def ablations(layers: Sequence[str], names: Sequence[str]) -> dict[str, list[Variant]]:
    """Variants by what they vary, each group with the default first.

    layers: the bundle's, the deepest last.   names: the methods that run.
    """
    groups = {
        title: [DEFAULT, *(_collection_cam(given) for given in cases)]
        for title, cases in _ABLATED.items()
    }
    groups["layers"] = [
        Variant(f"{name}, {count} of {len(layers)} layers", kind(layers=tuple(layers[-count:])))
        for name, kind in _with_layers(names).items()
        for count in range(1, len(layers) + 1)
    ]
    return groups


def _collection_cam(given: Mapping[str, Any]) -> Variant:
    words = ", ".join(f"{key}={value}" for key, value in given.items())
    return Variant(words, CollectionCAM(**given))


def _with_layers(names: Sequence[str]) -> dict[str, Callable[..., Method]]:
    """The methods that take several layers, by method."""
    return {
        name: METHODS[name]
        for name in names
        if "layers" in (field.name for field in dataclasses.fields(METHODS[name]))
    }


def measure(
    explainer: Explainer,
    groups: Mapping[str, Sequence[Variant]],
    settings: EvaluationSettings,
    work: Path,
) -> dict[str, report.Summary]:
    """Measure each group of variants; a variant that stands in several is measured once."""
    every = list({one.name: one for group in groups.values() for one in group}.values())
    data = open_dataset(DATASET, explainer.bundle.manifest)
    measured = Evaluation(explainer, data, every, settings)
    results = measured.open(work, DATASET)
    with click.progressbar(length=measured.total, label="measuring", file=sys.stderr) as bar:
        bar.update(len(results.rows))
        for count in measured.run(results):
            bar.update(count)
    rows = list(results.rows.values())
    facts = measured.facts(DATASET)
    return {
        title: report.summarise({**facts, "methods": {one.name: {} for one in group}}, rows)
        for title, group in groups.items()
    }


def origins(explainer: Explainer, images: int, seed: int) -> dict[str, dict[str, float]]:
    """Which layers Collection-CAM's maps come from, in percent, the mean over images.

    weight: the layer's share of the masks' weights.   energy: its share of the map's sum.
    proportion: how much of that lies in the boxes.   shown: the mean value of its masks.
    """
    data = open_dataset(DATASET, explainer.bundle.manifest)
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for place in drawn(len(data), images, seed):
        picture, geometries = explainer.preprocess([data[place].read()])
        result = explainer.explain(picture)
        inside = box_mask(geometries[0].to_input(data[place].boxes), picture.shape[2:])
        ends = np.cumsum([layer.count[0] for layer in result.layers])
        masks, weights = (np.split(one, ends[:-1]) for one in (result.masks[0], result.weights[0]))
        parts = [np.einsum("n,nij->ij", *both) for both in zip(weights, masks, strict=True)]
        whole = sum(float(part.sum()) for part in parts)
        for layer, mask, weight, part in zip(result.layers, masks, weights, parts, strict=True):
            total = float(part.sum())
            lies = float(part[inside].sum()) / total if total else np.nan
            values = float(weight.sum()), total / whole, lies, float(mask.mean())
            found.setdefault(layer.name, []).append(values)
    names = "weight", "energy", "proportion", "shown"
    return {
        layer: dict(zip(names, (100 * np.nanmean(rows, axis=0)).tolist(), strict=True))
        for layer, rows in found.items()
    }


def times(explainer: Explainer, variants: Sequence[Variant], rounds: int) -> dict[str, Any]:
    """Milliseconds of explaining one image from its preprocessed array, all methods in turn."""
    item = open_dataset(DATASET, explainer.bundle.manifest)[0]
    images, _ = explainer.preprocess([item.read()])
    target = [int(explainer.explain(images).targets[0])]
    calls = {one.name: partial(one.explain, explainer, images, target) for one in variants}
    seconds = measure_in_turn(calls, rounds)
    return {name: asdict(summarise(spent)) for name, spent in seconds.items()}


def markdown(found: Mapping[str, Any], summaries: Mapping[str, report.Summary]) -> str:
    """All tables, the definitions, and how they were made."""
    title, *rest = summaries
    machine = found["conditions"]
    device = machine["gpu"]["name"] if machine["gpu"] else machine["processor"]
    images, wanted = found["settings"]["images"], TEST_IMAGES
    partly = "" if images == wanted else f"**A part of the {wanted} test images: {images}.** "
    lines = [
        "# Quality of maps on digits in scenes",
        "",
        f"{partly}Made by `{found['command']}`. The data is synthetic, the classifier small.",
        "",
        f"## {title}",
        "",
        report.markdown(summaries[title]),
        "## Time of one explanation",
        "",
        "| method | median, ms | p95, ms |",
        "|---|---|---|",
        *(f"| {name} | {t['median']:.1f} | {t['p95']:.1f} |" for name, t in found["ms"].items()),
        "",
        f"One image from the preprocessed array, {device}, {machine['cores']} cores, load average "
        f"before {found['load_average']}.",
        "",
        *(f"- {name} was not measured: {why}" for name, why in found["not_run"].items()),
    ]
    lines += [
        "## Where Collection-CAM's maps come from",
        "",
        "| layer | weight, % | share of the map, % | of that in the boxes, % | mean of a mask, % |",
        "|---|---|---|---|---|",
        *(
            f"| {layer} | {o['weight']:.1f} | {o['energy']:.1f} | {o['proportion']:.1f} "
            f"| {o['shown']:.1f} |"
            for layer, o in found["origins"].items()
        ),
        "",
    ]
    for title in rest:
        lines += [f"## Ablation: {title}", "", report.table(summaries[title]), ""]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="of the example classifier; else exported")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--limit", type=int, default=TEST_IMAGES, help="images")
    parser.add_argument("--rise-masks", type=int, default=RISE.masks, help="of RISE")
    parser.add_argument("--protocol", default="paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5, help="of the times")
    parser.add_argument("--work", type=Path, help="a folder that a later run goes on from")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bundle = given.bundle or _export(Path(folder) / "digits")
        work = given.work or Path(folder) / "work"
        found, summaries = run(bundle, given, work)
    text = markdown(found, summaries)
    print(text)
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        given.output.with_suffix(".md").write_text(text, encoding="utf-8")


def run(
    bundle: Path, given: argparse.Namespace, work: Path
) -> tuple[dict[str, Any], dict[str, report.Summary]]:
    """Measure everything on a bundle."""
    settings = EvaluationSettings(protocol=given.protocol, limit=given.limit, seed=given.seed)
    with ccam.load(bundle) as explainer:
        wanted = contenders(given.methods.split(","), given.rise_masks)
        variants, not_run = runnable(explainer, wanted)
        layers = [layer.name for layer in explainer.bundle.manifest.layers]
        groups = {"Methods": variants, **ablations(layers, [one.method.name for one in variants])}
        before = load_average()
        spent = times(explainer, variants, given.rounds)
        summaries = measure(explainer, groups, settings, work)
        parts = origins(explainer, given.limit, given.seed)
    card = gpu()
    words = [] if given.methods == ",".join(METHODS) else ["--methods", given.methods]
    if given.rise_masks != RISE.masks:
        words += ["--rise-masks", str(given.rise_masks)]
    words += ["--limit", str(given.limit), "--protocol", given.protocol, "--seed", str(given.seed)]
    words += ["--output", str(given.output)] if given.output else []
    plain = {title: report.as_json(summary) for title, summary in summaries.items()}
    found = {
        "command": shlex.join(["python", "-m", "bench.bench_quality", *words]),
        "conditions": {**asdict(machine()), "gpu": card and asdict(card)},
        "limit": given.limit,
        "test_images": TEST_IMAGES,
        "settings": plain["Methods"]["settings"],
        "definitions": plain["Methods"]["definitions"],
        "protocol": plain["Methods"]["protocol"],
        "load_average": before,
        "ms": spent,
        "not_run": not_run,
        "origins": parts,
        "results": {title: values["results"] for title, values in plain.items()},
        "curves": plain["Methods"]["curves"],
    }
    return found, summaries


def _export(folder: Path) -> Path:
    command = [sys.executable, "-c", "from ccam_deploy.cli.main import main; main()", "export"]
    words = ["--recipe", str(RECIPE), "--head", "--gradients", "--output", str(folder)]
    subprocess.run([*command, *words], check=True, capture_output=True, cwd=ROOT)
    return folder


if __name__ == "__main__":
    main()
