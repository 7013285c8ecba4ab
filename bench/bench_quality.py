"""The paper's Tables 3 and 4 and its ablations, on digits in scenes or on photographs.

    python -m bench.bench_quality --output bench/results/quality-digits.json
    python -m bench.bench_quality --network efficientnet_lite0 --ablations none

Every method that the package has, with its defaults: of the example classifier on scenes of the
test split that are drawn with a seed; of another network on crops of photographs that it is sure
of, with intervals over photographs, because crops of one are not independent. Average Drop,
Average Increase, Deletion, Insertion, Overall (Table 3), Proportion (Table 4) and the pointing
game, mean and 95 % bootstrap interval; the time of one explanation (Table 1); and which layers
Collection-CAM's maps come from. Then Collection-CAM with other theta, ranges of k, scores,
standardised statistics, gates, and fewer layers; the last also for other methods that can combine
layers (Figure 2). Photographs have no boxes, and so neither Proportion nor the pointing game.

A method that cannot run on the bundle is listed with the reason. RISE makes most of the forwards;
with --rise-masks it makes fewer. With --work the measurement goes on where it was broken off.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from bench import harness
from bench.photographs import BOUND, Photographs, photograph_of, sure_crops
from ccam_deploy.explainer import Explainer
from ccam_deploy.latency.conditions import load_average
from ccam_deploy.latency.timing import measure_in_turn, summarise
from ccam_deploy.methods import DEFAULT_METHOD, METHODS, RISE, CollectionCAM, Method, make_method
from ccam_deploy.quality import report
from ccam_deploy.quality.datasets import Dataset, open_dataset
from ccam_deploy.quality.evaluation import Evaluation, EvaluationSettings, draw_places
from ccam_deploy.quality.metrics import box_mask
from ccam_deploy.quality.variants import Variant, runnable
from ccam_deploy.text import markdown_table

DIGITS = "digits"
TEST_IMAGES = 500
CROPS = 30
"""Of each photograph, at most."""

DEFAULT = Variant(DEFAULT_METHOD, CollectionCAM())

_ABLATED: dict[str, tuple[dict[str, Any], ...]] = {
    "theta": tuple({"theta": value} for value in (0.0, 0.2, 0.3, 0.5, 0.7)),
    "k range": tuple(
        {"k_min": low, "k_max": high} for low, high in ((2, 2), (2, 5), (2, 20), (5, 10), (10, 10))
    ),
    "score": ({"score": "probability"},),
    "standardise": ({"standardise": True},),
    "gate": tuple({"gate": value} for value in (0.001, 0.01, 0.1)),
}
"""Options of Collection-CAM that differ from its defaults, by what they vary."""

ABLATIONS = (*_ABLATED, "layers")
"""What ablations vary."""

_SHARES = {
    "weight": "weight, %",
    "energy": "share of the map, %",
    "proportion": "of that in the boxes, %",
    "shown": "mean of a mask, %",
}
"""What is told of a layer's part of the maps, with the title of its column."""


@dataclasses.dataclass(frozen=True)
class Field:
    """What a network is measured on.

    Attributes:
        name: What results call the data set.
        data: The images.
        most: How many of them are measured at most.
        grouping: Which of them are not independent.
        title: The title of the tables.
        note: What a reader must know of the images.
    """

    name: str
    data: Dataset
    most: int
    grouping: report.Grouping
    title: str
    note: str


def scenes(explainer: Explainer) -> Field:
    """Digits in scenes, for the example classifier."""
    return Field(
        "scenes",
        open_dataset("scenes", explainer.bundle.manifest),
        TEST_IMAGES,
        report.EACH_IMAGE,
        "Quality of maps on digits in scenes",
        "The data is synthetic, the classifier small.",
    )


def photographs(explainer: Explainer, crops: int, seed: int) -> Field:
    """Crops of photographs, up to so many of each, that a network is sure of."""
    data = Photographs(sure_crops(explainer, crops, seed=seed))
    count = len(set(map(photograph_of, data.names)))
    return Field(
        f"photographs, {crops} crops, probability {BOUND}",
        data,
        len(data),
        report.Grouping("photographs", photograph_of),
        "Quality of maps on photographs",
        f"Crops of {count} photographs, up to {crops} of each, whose best class has a probability "
        f"of at least {BOUND}; intervals are over photographs.",
    )


def make_contenders(names: Sequence[str], rise_masks: int) -> list[Variant]:
    """Make methods with their defaults, but for RISE's number of masks, then part of its name."""
    variants = []
    for name in names:
        if name == RISE.name and rise_masks != RISE.masks:
            variants.append(Variant(f"{name}, masks={rise_masks}", RISE(masks=rise_masks)))
        else:
            variants.append(Variant(name, make_method(name)))
    return variants


def ablations(layers: Sequence[str], names: Sequence[str]) -> dict[str, list[Variant]]:
    """Make variants by the option that they vary, each group with the default first.

    Args:
        layers: The bundle's layers, the deepest last.
        names: The methods that run.

    Returns:
        The variants by what they vary.
    """
    groups = {
        title: [DEFAULT, *(_collection_cam(options) for options in cases)]
        for title, cases in _ABLATED.items()
    }
    groups["layers"] = [
        Variant(f"{name}, {count} of {len(layers)} layers", make(layers=tuple(layers[-count:])))
        for name, make in _with_layers(names).items()
        for count in range(1, len(layers) + 1)
    ]
    return groups


def _chosen(groups: Mapping[str, list[Variant]], words: str) -> dict[str, list[Variant]]:
    """The groups that are named, with commas between; those of "none" are none."""
    names = [] if words == "none" else words.split(",")
    for name in names:
        if name not in groups:
            sys.exit(f'ablation "{name}" is unknown; there are {", ".join(groups)} and none')
    return {name: groups[name] for name in names}


def _collection_cam(options: Mapping[str, Any]) -> Variant:
    words = ", ".join(f"{key}={value}" for key, value in options.items())
    return Variant(words, CollectionCAM(**options))


def _with_layers(names: Sequence[str]) -> dict[str, Callable[..., Method]]:
    """The methods that take several layers, by name."""
    return {
        name: METHODS[name]
        for name in names
        if "layers" in (field.name for field in dataclasses.fields(METHODS[name]))
    }


def measure(
    explainer: Explainer,
    field: Field,
    groups: Mapping[str, Sequence[Variant]],
    settings: EvaluationSettings,
    work: Path,
) -> dict[str, report.Summary]:
    """Measure each group of variants; a variant that stands in several is measured once."""
    every = {variant.name: variant for group in groups.values() for variant in group}
    evaluation = Evaluation(explainer, field.data, list(every.values()), settings)
    results = evaluation.open(work, field.name)
    with click.progressbar(length=evaluation.total, label="measuring", file=sys.stderr) as bar:
        bar.update(len(results.rows))
        for count in evaluation.run(results):
            bar.update(count)
    rows = list(results.rows.values())
    facts = evaluation.facts(field.name)
    summaries = {}
    for title, group in groups.items():
        methods: dict[str, Any] = {variant.name: {} for variant in group}
        summaries[title] = report.summarise({**facts, "methods": methods}, rows, field.grouping)
    return summaries


def origins(
    explainer: Explainer, data: Dataset, images: int, seed: int
) -> dict[str, dict[str, float]]:
    """Measure which layers Collection-CAM's maps come from.

    Args:
        explainer: Of the network.
        data: Where the images come from.
        images: How many images are explained.
        seed: Of their draw.

    Returns:
        By layer the means over images, in percent, of its share of the masks' weights ("weight"),
        its share of the map's sum ("energy"), where there are boxes the share of that in them
        ("proportion"), and the value of its masks ("shown").
    """
    rows_by_layer: dict[str, list[tuple[float, float, float, float]]] = {}
    for place in draw_places(len(data), images, seed):
        picture, geometries = explainer.preprocess([data[place].read()])
        result = explainer.explain(picture)
        inside = box_mask(geometries[0].to_input(data[place].boxes), picture.shape[2:])
        ends = np.cumsum([layer.count[0] for layer in result.layers])
        masks = np.split(result.masks[0], ends[:-1])
        weights = np.split(result.weights[0], ends[:-1])
        parts = [np.einsum("n,nij->ij", *both) for both in zip(weights, masks, strict=True)]
        whole = sum(float(part.sum()) for part in parts)
        for layer, mask, weight, part in zip(result.layers, masks, weights, parts, strict=True):
            total = float(part.sum())
            lies = float(part[inside].sum()) / total if total else np.nan
            values = float(weight.sum()), total / whole, lies, float(mask.mean())
            rows_by_layer.setdefault(layer.name, []).append(values)
    means = {layer: 100 * np.nanmean(rows, axis=0) for layer, rows in rows_by_layer.items()}
    return {
        layer: {
            name: float(value)
            for name, value in zip(_SHARES, values, strict=True)
            if data.has_boxes or name != "proportion"
        }
        for layer, values in means.items()
    }


def times(
    explainer: Explainer, data: Dataset, variants: Sequence[Variant], rounds: int
) -> dict[str, Any]:
    """Time the explanation of one image from its preprocessed array, all methods in turn."""
    images, _ = explainer.preprocess([data[0].read()])
    target = [int(explainer.explain(images).targets[0])]
    calls = {
        variant.name: partial(variant.explain, explainer, images, target) for variant in variants
    }
    seconds = measure_in_turn(calls, rounds)
    return {name: asdict(summarise(durations)) for name, durations in seconds.items()}


def markdown(result: Mapping[str, Any], summaries: Mapping[str, report.Summary]) -> str:
    """Write all tables, the definitions, and how they were made."""
    title, *rest = summaries
    images = result["settings"]["images"]
    notes = [f"- {name} was not measured: {why}\n" for name, why in result["not_run"].items()]
    part = f"**A part of the {result['test_images']} test images: {images}.** "
    lines = [
        f"# {result['title']}",
        "",
        f"{'' if images == result['test_images'] else part}Made by `{result['command']}`. "
        f"{result['note']}",
        "",
        f"## {title}",
        "",
        report.markdown(summaries[title]),
        "## Time of one explanation",
        "",
        times_table(result["ms"]),
        "",
        f"One image from the preprocessed array, {harness.device_line(result['conditions'])}, "
        f"load average before {result['load_average']}.",
        "",
        *notes,
        "## Where Collection-CAM's maps come from",
        "",
        origins_table(result["origins"]),
        "",
    ]
    for title in rest:
        lines += [f"## Ablation: {title}", "", report.table(summaries[title]), ""]
        if differences := report.differences_table(summaries[title]):
            lines += [differences, "", report.differences_caption(summaries[title]), ""]
    return "\n".join(lines).rstrip() + "\n"


def times_table(timings: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out milliseconds by method as Markdown."""
    rows = [(name, f"{ms['median']:.1f}", f"{ms['p95']:.1f}") for name, ms in timings.items()]
    return markdown_table(("method", "median, ms", "p95, ms"), rows)


def origins_table(shares_by_layer: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out what `origins` returns as Markdown."""
    known = next(iter(shares_by_layer.values()))
    rows = [
        (layer, *(f"{shares[name]:.1f}" for name in known))
        for layer, shares in shares_by_layer.items()
    ]
    return markdown_table(("layer", *(_SHARES[name] for name in known)), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__, rounds=5, output="a JSON file")
    parser.add_argument("--network", default=DIGITS, help="a recipe of export/")
    parser.add_argument("--bundle", type=Path, help="of the network; else exported")
    parser.add_argument("--crops", type=int, default=CROPS, help="of each photograph, at most")
    parser.add_argument("--ablations", default=",".join(ABLATIONS), help="what varies; or none")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--limit", type=int, default=0, help="images; 0 for all")
    parser.add_argument("--rise-masks", type=int, default=RISE.masks, help="of RISE")
    parser.add_argument("--protocol", default="paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a folder that a later run resumes from")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or harness.export(
            options.network, Path(folder) / options.network, "--head", "--gradients"
        )
        work = options.work or Path(folder) / "work"
        result, summaries = run(bundle, options, work)
    harness.publish(options.output, result, markdown(result, summaries))


def run(
    bundle: Path, options: argparse.Namespace, work: Path
) -> tuple[dict[str, Any], dict[str, report.Summary]]:
    """Measure everything on a bundle."""
    with ccam.load(bundle) as explainer:
        if options.network == DIGITS:
            field = scenes(explainer)
        else:
            field = photographs(explainer, options.crops, options.seed)
        limit = min(options.limit or field.most, field.most)
        settings = EvaluationSettings(protocol=options.protocol, limit=limit, seed=options.seed)
        every = make_contenders(options.methods.split(","), options.rise_masks)
        variants, not_run = runnable(explainer, every)
        layers = [layer.name for layer in explainer.bundle.manifest.layers]
        names = [variant.method.name for variant in variants]
        groups = {"Methods": variants, **_chosen(ablations(layers, names), options.ablations)}
        before = load_average()
        timings = times(explainer, field.data, variants, options.rounds)
        summaries = measure(explainer, field, groups, settings, work)
        shares = origins(explainer, field.data, limit, options.seed)
    plain = {title: report.as_json(summary) for title, summary in summaries.items()}
    result = {
        "command": _command(options),
        "conditions": harness.conditions(with_gpu=True),
        "title": field.title,
        "note": field.note,
        "limit": limit,
        "test_images": field.most,
        "settings": plain["Methods"]["settings"],
        "definitions": plain["Methods"]["definitions"],
        "protocol": plain["Methods"]["protocol"],
        "load_average": before,
        "ms": timings,
        "not_run": not_run,
        "origins": shares,
        "results": {title: values["results"] for title, values in plain.items()},
        "differences": {title: values["differences"] for title, values in plain.items()},
        "curves": plain["Methods"]["curves"],
    }
    return result, summaries


def _command(options: argparse.Namespace) -> str:
    """The command with what the figures depend on."""
    every, masks = options.methods == ",".join(METHODS), options.rise_masks
    is_digits = options.network == DIGITS
    words = {
        "network": None if is_digits else options.network,
        "crops": None if is_digits or options.crops == CROPS else options.crops,
        "methods": None if every else options.methods,
        "rise-masks": None if masks == RISE.masks else masks,
        "limit": options.limit or None,
        "protocol": options.protocol,
        "seed": options.seed,
        "ablations": None if options.ablations == ",".join(ABLATIONS) else options.ablations,
        "output": options.output,
    }
    return harness.command_line("bench.bench_quality", words)


if __name__ == "__main__":
    main()
