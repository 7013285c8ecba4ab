"""`ccam-deploy evaluate`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from ccam_deploy.cli.options import (
    METHODS,
    AsJson,
    BundleFolder,
    EngineOptions,
    LimitOrNone,
    MethodNames,
    MethodPairs,
    OutputFolder,
    Seed,
)
from ccam_deploy.cli.parameters import Argument, Option, Words, unset, with_options
from ccam_deploy.cli.printing import print_json, progress, say, write_json
from ccam_deploy.errors import DatasetError
from ccam_deploy.termination import Terminated

if TYPE_CHECKING:
    from ccam_deploy.quality.evaluation import Evaluation
    from ccam_deploy.quality.report import Summary
    from ccam_deploy.quality.results import Results

# Repeated from modules whose imports would slow --help down; a test holds them equal.
METRICS = (
    "average-drop",
    "average-increase",
    "deletion",
    "insertion",
    "overall",
    "proportion",
    "pointing",
    "pointing-15",
)
PROTOCOLS = ("paper", "rise")
SCENES = 500
"""How many scenes are measured without --limit."""

DatasetName = Annotated[str, Argument()]
MetricNames = Annotated[
    tuple[str, ...] | None, Option("--metrics", f"Metrics: {', '.join(METRICS)}.", Words())
]
Protocol = Annotated[
    str,
    Option(
        "--protocol",
        "How deletion and insertion change an image: as in the paper, or as in RISE.",
        click.Choice(PROTOCOLS),
    ),
]
ExplainedClass = Annotated[
    Literal["predicted", "label"],
    Option(
        "--explain-class",
        "Class to explain: the classifier's best, or the data set's label.",
        click.Choice(["predicted", "label"]),
    ),
]
Split = Annotated[
    str | None,
    Option("--split", "Part of scenes or cub to measure.", click.Choice(["train", "test"])),
]
Plots = Annotated[
    bool, Option("--plots/--no-plots", 'Draw curves and maps; needs the extra "plot".')
]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The options of `evaluate`."""

    bundle: BundleFolder
    dataset: DatasetName
    methods: MethodNames = (METHODS[0],)
    pairs: MethodPairs = ()
    metrics: MetricNames = unset("all that the data set allows")
    protocol: Protocol = PROTOCOLS[0]
    explain_class: ExplainedClass = "predicted"
    split: Split = unset("test")
    limit: LimitOrNone = unset(f"all; {SCENES} scenes")
    seed: Seed = 0
    engine: EngineOptions
    output: OutputFolder = Path("evaluation")
    plots: Plots = True
    as_json: AsJson = False


@click.command()
@with_options(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Measure the quality of some methods' maps on DATASET.

    DATASET is a folder of images, in folders named like classes or without classes, or one of
    scenes, scenes:several, imagenet:FOLDER, cub:FOLDER and ucmerced:FOLDER. With --limit, images
    are drawn at random.

    Prints a table, and writes to the folder --output: results.csv, a row for each image and
    method; summary.md, summary.json and report.html; curves.png and maps.png. After an
    interruption, the same command continues where it stopped. Images that cannot be read are
    skipped; the exit code is 2 then.
    """
    from ccam_deploy import plotting
    from ccam_deploy.cli import choices
    from ccam_deploy.files import kept_from_others, require_writable_folder
    from ccam_deploy.quality import datasets, evaluation, metrics, report
    from ccam_deploy.quality.variants import make_variants

    methods = choices.make_methods(options.methods, options.pairs)
    variants = make_variants(options.methods)
    contenders = [replace(variant, method=methods[variant.name]) for variant in variants]
    metric_names = options.metrics or ()
    metrics.reject_unknown(metric_names, options.protocol)
    if options.plots:
        plotting.require_matplotlib()
    require_writable_folder(options.output)
    taken = f"another evaluation writes to {options.output}; wait for it, or give another --output"
    with (
        kept_from_others(options.output, taken),
        choices.open_explainer(options.bundle, options.engine) as explainer,
    ):
        data = datasets.open_dataset(options.dataset, explainer.bundle.manifest, options.split)
        settings = evaluation.EvaluationSettings(
            metrics=metric_names,
            protocol=options.protocol,
            limit=options.limit or (SCENES if isinstance(data, datasets.Scenes) else 0),
            seed=options.seed,
            target=options.explain_class,
        )
        measured = evaluation.Evaluation(explainer, data, contenders, settings)
        results = measured.open(options.output, options.dataset, _say_unread)
        _run(measured, results)
        summary = report.summarise(measured.facts(options.dataset), list(results.rows.values()))
        if len(summary.unread) == len(measured.places):
            raise DatasetError(f"no image of {options.dataset} could be read")
        _write(measured, results, summary, options.plots)
    if options.as_json:
        print_json(report.as_json(summary))
    else:
        click.echo(report.markdown(summary), nl=False)
        click.echo(err=True)
        say(f"written to {options.output}", err=True)
    if summary.unread:
        sys.exit(2)


def _say_unread(line: str) -> None:
    say(f"error: {line}", err=True)


def _run(measured: Evaluation, results: Results) -> None:
    """Measure the rows that are missing."""
    done = len(results.rows)
    if done:
        say(f"continuing after {done} of {measured.total} rows", err=True)
    try:
        with progress("measuring", measured.total) as bar:
            bar.update(done)
            for count in measured.run(results, _say_unread):
                bar.update(count)
    except (KeyboardInterrupt, Terminated):
        click.echo(err=True)
        say(
            f"{len(results.rows)} of {measured.total} rows are in {results.folder}; "
            "the same command continues there",
            err=True,
        )
        raise


def _write(measured: Evaluation, results: Results, summary: Summary, plots: bool) -> None:
    from ccam_deploy.files import write_file
    from ccam_deploy.quality import charts, report

    pictures: dict[str, bytes] = {}
    folder = results.folder
    if plots:
        if any(summary.curves.values()):
            pictures["Mean deletion and insertion curves"] = charts.draw_curves(summary.curves)
            write_file(folder / "curves.png", pictures["Mean deletion and insertion curves"])
        maps = charts.draw_maps(
            measured.explainer, measured.dataset, measured.variants, list(results.rows.values())
        )
        pictures["Maps"] = maps
        write_file(folder / "maps.png", maps)
    write_json(folder / "summary.json", report.as_json(summary))
    write_file(folder / "summary.md", report.markdown(summary).encode("utf-8", "backslashreplace"))
    write_file(folder / "report.html", report.page(summary, pictures).encode("utf-8", "replace"))
