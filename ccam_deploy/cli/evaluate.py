"""`ccam-deploy evaluate`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ccam_deploy.cli.options import (
    BATCH_SIZE,
    METHODS,
    bundle_argument,
    engine_options,
    json_option,
    pairs_option,
    precision_option,
    print_json,
    say,
)
from ccam_deploy.errors import DatasetError

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
"""How many scenes are measured where no limit is given."""


@click.command()
@bundle_argument
@click.argument("dataset")
@click.option(
    "--methods",
    "method_words",
    default=METHODS[0],
    show_default=True,
    metavar="A,B,C",
    help=f"What to measure, separated by commas: {', '.join(METHODS)}.",
)
@pairs_option
@click.option(
    "--metrics",
    "metric_words",
    default="all",
    show_default=True,
    metavar="A,B,C",
    help=f"How to measure, separated by commas: {', '.join(METRICS)}; all for those that the "
    "data set allows.",
)
@click.option(
    "--protocol",
    default=PROTOCOLS[0],
    show_default=True,
    type=click.Choice(PROTOCOLS),
    help="How deletion and insertion change an image: as the paper has it, or as RISE.",
)
@click.option(
    "--target",
    default="predicted",
    show_default=True,
    type=click.Choice(("predicted", "label")),
    help="The class to explain: the classifier's best, or the data set's.",
)
@click.option(
    "--split",
    type=click.Choice(("train", "test")),
    help="The part of scenes or cub to take.  [default: test]",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help=f"How many images, drawn at random.  [default: all; {SCENES} scenes]",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Of the draw and of the intervals.",
)
@engine_options
@precision_option
@click.option(
    "--batch-size",
    default=BATCH_SIZE,
    show_default=True,
    type=click.IntRange(min=1),
    help="Images, and changed images, that go through an engine at a time.",
)
@click.option(
    "--output",
    default="evaluation",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where results are written; what is there already is gone on with.",
)
@click.option(
    "--plots/--no-plots",
    default=True,
    show_default=True,
    help="Draw curves and maps; needs the extra plot.",
)
@json_option
def evaluate(bundle: Path, dataset: str, as_json: bool, **options: Any) -> None:
    """Measure how good the maps of some methods are on DATASET.

    DATASET is a folder of images (in folders named like classes, or without classes), scenes,
    scenes:several, imagenet:FOLDER, cub:FOLDER or ucmerced:FOLDER.

    Prints a table, and writes to --output: results.csv, a row for each image and method;
    summary.md, summary.json and report.html; curves.png and maps.png. An interrupted run goes on
    when the same command is given again. Images that cannot be read are passed over; then the exit
    code is 2.
    """
    from ccam_deploy import plotting
    from ccam_deploy.cli import choices
    from ccam_deploy.quality import datasets, evaluation, metrics, report
    from ccam_deploy.quality.variants import make_variants

    names = _words(options["method_words"])
    plain = make_variants(names)
    methods = choices.make_methods(names, options["pairs"])
    contenders = [replace(one, method=methods[one.name]) for one in plain]
    wanted = () if options["metric_words"].strip() == "all" else _words(options["metric_words"])
    metrics.reject_unknown(wanted, options["protocol"])
    if options["plots"]:
        plotting.require_matplotlib()
    with choices.explainer_of(bundle, options, options["batch_size"]) as explainer:
        data = datasets.open_dataset(dataset, explainer.bundle.manifest, options["split"])
        limit = options["limit"] or (SCENES if isinstance(data, datasets.Scenes) else 0)
        settings = evaluation.EvaluationSettings(
            wanted, options["protocol"], limit, options["seed"], options["target"]
        )
        measured = evaluation.Evaluation(explainer, data, contenders, settings)
        results = measured.open(options["output"], dataset)
        _run(measured, results)
        rows = list(results.rows.values())
        summary = report.summarise(measured.facts(dataset), rows)
        if len(summary.unread) == len(measured.places):
            raise DatasetError(f"no image of {dataset} could be read")
        _write(measured, results, summary, options["plots"])
    if as_json:
        print_json(report.as_json(summary))
    else:
        click.echo(report.markdown(summary), nl=False)
        click.echo(err=True)
        say(f"written to {options['output']}", err=True)
    if summary.unread:
        sys.exit(2)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _run(measured: Evaluation, results: Results) -> None:
    """Measure what is missing, with a progress bar on stderr where that is a terminal."""
    done = len(results.rows)
    if done:
        say(f"going on from {done} of {measured.total} rows", err=True)
    bar = click.progressbar(
        length=measured.total, label="measuring", file=sys.stderr, hidden=not sys.stderr.isatty()
    )
    try:
        with bar:
            bar.update(done)
            for count in measured.run(results, lambda line: say(f"error: {line}", err=True)):
                bar.update(count)
    except KeyboardInterrupt:
        click.echo(err=True)
        say(
            f"{len(results.rows)} of {measured.total} rows are in {results.folder}; "
            "the same command goes on from there",
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
    text = json.dumps(report.as_json(summary), indent=2, ensure_ascii=False) + "\n"
    write_file(folder / "summary.json", text.encode("utf-8", "backslashreplace"))
    write_file(folder / "summary.md", report.markdown(summary).encode("utf-8", "backslashreplace"))
    write_file(folder / "report.html", report.page(summary, pictures).encode("utf-8", "replace"))
