"""`ccam-deploy batch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from ccam_deploy.cli.options import (
    COUNT,
    PATH,
    AsJson,
    BundleFolder,
    EngineOptions,
    LimitOrNone,
    MethodOptions,
    TargetClasses,
)
from ccam_deploy.cli.parameters import Argument, Option, unset, with_options
from ccam_deploy.cli.printing import print_json, progress, say
from ccam_deploy.cli.signals import kept_handlers
from ccam_deploy.errors import DatasetError, OptionError
from ccam_deploy.termination import Terminated

if TYPE_CHECKING:
    from ccam_deploy.methods import Method
    from ccam_deploy.scale.cluster import Layout
    from ccam_deploy.scale.inputs import Input, Item
    from ccam_deploy.scale.parts import Output
    from ccam_deploy.scale.run import Tally
    from ccam_deploy.scale.work import Job

# Repeated from a module whose imports would slow --help down; a test holds them equal.
FORMATS = ("images", "parquet", "webdataset")

InputPlace = Annotated[Path, Argument(PATH)]
OutputPlace = Annotated[Path, Argument(PATH)]
InputFormat = Annotated[
    str | None,
    Option("--format", "Files to read of INPUT, where it holds several.", click.Choice(FORMATS)),
]
ImageColumn = Annotated[
    str, Option("--image-column", "Column of Parquet files with the bytes of image files.")
]
PathColumn = Annotated[
    str, Option("--path-column", "Column of Parquet files with names of the images, if any.")
]
Processes = Annotated[
    int | None, Option("--processes", "Processes that explain on CPUs.", COUNT, metavar="N")
]
Gpus = Annotated[
    int | None,
    Option(
        "--num-gpus",
        "GPUs that explain, with a process for each; 0 for CPUs.",
        click.IntRange(min=0),
        metavar="N",
    ),
]
Address = Annotated[
    str | None,
    Option(
        "--address",
        "Ray cluster to run on; auto for the one that this machine belongs to.",
        metavar="HOST:PORT",
    ),
]
PartSize = Annotated[
    int | None,
    Option("--part-size", "Most images whose rows come into a file of their own.", COUNT),
]


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The options of `batch`."""

    bundle: BundleFolder
    input: InputPlace
    output: OutputPlace
    format: InputFormat = unset("what INPUT holds")
    image_column: ImageColumn = "image"
    path_column: PathColumn = "path"
    targets: TargetClasses = ("top1",)
    method: MethodOptions
    limit: LimitOrNone = unset("all")
    engine: EngineOptions
    processes: Processes = unset("one for each core, without GPUs")
    num_gpus: Gpus = unset("all that Ray finds")
    address: Address = unset("none; this machine alone")
    part_size: PartSize = unset("64; fewer where inputs are large")
    as_json: AsJson = False


@click.command()
@with_options(BatchOptions)
def batch(options: BatchOptions) -> None:
    """Explain the images in INPUT with Ray, and write Parquet files to the folder OUTPUT.

    INPUT is a folder of image files, Parquet files or WebDataset shards (tar), or one such file.
    OUTPUT gets a row for each image and class: path, class, score, saliency and settings. An image
    that cannot be explained has a row with its error.

    After an interruption, the same command continues where it stopped: rows that are in OUTPUT
    are neither computed again nor lost. Needs the extra "scale".
    """
    from ccam_deploy.cli import choices
    from ccam_deploy.scale.cluster import require_ray
    from ccam_deploy.scale.inputs import Columns, open_input
    from ccam_deploy.scale.run import cut, remaining

    (method,) = choices.make_methods([options.method.method], options.method.pairs).values()
    require_ray(options.address)
    columns = Columns(options.image_column, options.path_column)
    source = open_input(options.input, options.format, columns)
    _require_apart(options.input, options.output)
    with _opened(options, source, method) as (job, output):
        items = source.items()[: options.limit]
        rest = remaining(items, output)
        if len(rest) < len(items):
            done = len(items) - len(rest)
            say(f"continuing after {done} of {len(items)} images", err=True)
        parts = cut(rest, job.manifest.input, options.part_size)
        tally = _run(options, job, parts, output)
    _report(options, items, tally)


def _require_apart(source: Path, output: Path) -> None:
    place, folder = output.resolve(), source.resolve()
    if place == folder or folder in place.parents:
        raise OptionError(
            f"OUTPUT {output} lies in INPUT {source}, and the next run would read it; give another"
        )


@contextmanager
def _opened(options: BatchOptions, source: Input, method: Method) -> Iterator[tuple[Job, Output]]:
    """Open the bundle and the output's folder, which no other run may write to meanwhile."""
    from ccam_deploy.bundle.folder import digest_without_plans, read_bundle
    from ccam_deploy.cli import choices
    from ccam_deploy.scale.parts import Output
    from ccam_deploy.scale.work import Engine, Job

    bundle = read_bundle(options.bundle, options.engine.require_signature)
    bundle.precision(options.engine.precision)
    choices.warn_of_random_weights(bundle.manifest)
    targets = choices.parse_targets(options.targets, bundle.manifest)
    settings = {
        "bundle": bundle.manifest.name,
        "digest": digest_without_plans(bundle.manifest),
        "input": str(options.input.resolve()),
        "format": source.format,
        "columns": dataclasses.asdict(source.columns) if source.format == "parquet" else None,
        "method": method.name,
        "options": dataclasses.asdict(method),
        "targets": [str(target) for target in targets],
        "backend": options.engine.backend,
        "precision": options.engine.precision,
    }
    output = Output(options.output, settings)
    try:
        key = options.engine.require_signature
        engine = dataclasses.replace(
            Engine(**dataclasses.asdict(options.engine)), require_signature=key and key.resolve()
        )
        job = Job(
            bundle=options.bundle.resolve(),
            manifest=bundle.manifest,
            source=dataclasses.replace(source, place=source.place.resolve()),
            method=method,
            targets=tuple(targets),
            engine=engine,
            output=options.output.resolve(),
            token=output.token,
        )
        yield job, output
    finally:
        output.close()


def _run(options: BatchOptions, job: Job, parts: Sequence[Sequence[Item]], output: Output) -> Tally:
    """Explain the parts on a cluster."""
    from ccam_deploy.scale.run import Tally, run

    total = sum(map(len, parts))
    tally = Tally()
    if not parts:
        return tally
    try:
        with _joined(options) as layout, progress("explaining", total) as bar:
            backend = layout.backend(job.engine.backend)
            engine = dataclasses.replace(job.engine, threads=layout.threads, backend=backend)
            placed = dataclasses.replace(job, engine=engine)
            for done in run(placed, parts, layout, output):
                tally.add(done)
                bar.update(done.images)
    except (KeyboardInterrupt, Terminated):
        click.echo(err=True)
        say(
            f"{tally.images} of {total} images are in {output.folder} now; the same command "
            "continues there",
            err=True,
        )
        raise
    finally:
        output.remove_drafts()
    for note in tally.notes:
        say(note, err=True)
    return tally


@contextmanager
def _joined(options: BatchOptions) -> Iterator[Layout]:
    """Join a cluster, or make one, and divide it."""
    from ccam_deploy.scale import cluster

    backend = options.engine.backend
    num_gpus = options.num_gpus
    if backend == cluster.CPU:
        if num_gpus:
            raise OptionError(f"--num-gpus is {num_gpus}, but --backend {backend} uses none")
        num_gpus = 0
    wishes = cluster.Wishes(num_gpus, options.processes, options.engine.threads)
    with ExitStack() as stack:
        stack.enter_context(cluster.quiet_streams())
        with kept_handlers():
            if options.address:
                resources = stack.enter_context(cluster.joined_cluster(options.address))
                layout = cluster.divide(resources, wishes)
            else:
                cores = cluster.cores()
                resources = stack.enter_context(cluster.local_cluster(wishes, cores))
                layout = cluster.divide(resources, wishes, cores)
        layout.backend(backend)
        yield layout


def _report(options: BatchOptions, items: Sequence[Item], tally: Tally) -> None:
    facts: dict[str, Any] = {
        "output": str(options.output),
        "images": len(items),
        "explained_now": tally.images - tally.failed,
        "failed_now": tally.failed,
        "rows_now": tally.rows,
        "backends": tally.backends,
        "images_per_second": round(tally.images_per_second, 3),
    }
    if options.as_json:
        print_json(facts)
    else:
        speed = ""
        if tally.images:
            backends = ", ".join(tally.backends)
            speed = f", {tally.images_per_second:.1f} a second on {backends}"
        say(f"{options.output}: all {len(items)} images have their rows; {tally.images} now{speed}")
        if tally.failed:
            say(f"{tally.failed} of them have an error instead of a map; see the column error")
    if tally.images and tally.failed == tally.images == len(items):
        raise DatasetError(f"none of the images in {options.input} could be explained")
