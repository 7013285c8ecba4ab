"""`ccam-deploy bench`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ccam_deploy.cli.network import load_network, need_torch
from ccam_deploy.cli.options import (
    BACKENDS,
    BATCH_SIZE,
    bundle_argument,
    engine_options,
    precision_option,
    print_json,
    say,
)
from ccam_deploy.errors import OptionError

if TYPE_CHECKING:
    from ccam_deploy.explainer import Explainer
    from ccam_deploy.latency.cases import Peer
    from ccam_deploy.latency.measurement import LatencySettings
    from ccam_deploy.latency.report import LatencyReport

TORCH = "torch"
_STDOUT = "-"
_LARGEST_ERROR = 0.05


@click.command()
@bundle_argument
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@engine_options
@precision_option
@click.option(
    "--batch",
    default="1",
    show_default=True,
    metavar="N,M",
    help="Images a call; one measurement for each of the numbers.",
)
@click.option(
    "--batch-size",
    default=BATCH_SIZE,
    show_default=True,
    type=click.IntRange(min=1),
    help="Images, and masked images, that go through an engine at a time.",
)
@click.option(
    "--concurrency",
    default=1,
    show_default=True,
    help="Threads that call one explainer; on a GPU each has a stream of its own.",
)
@click.option(
    "--duration",
    default=10.0,
    show_default=True,
    help="Seconds of steady load for each batch size, as many of taking turns with the floor, "
    "and as many with each that is compared.",
)
@click.option(
    "--warmup", default=2.0, show_default=True, help="Seconds before each batch size is measured."
)
@click.option(
    "--compare",
    default="",
    metavar="NAMES",
    help="Other backends, or torch, to measure in turn; separated by commas.  [default: none]",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="For --compare torch: the bundle's model, as export takes it.",
)
@click.option("--arch", help="The network of a --model that is a file of weights.")
@click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(path_type=Path),
    help="For --compare torch: the recipe that the bundle was exported with.",
)
@click.option("--random-weights", is_flag=True, help="The recipe's network has its random weights.")
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read pickled objects; this runs whatever code the file holds.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Write everything, samples included, to a file; - for stdout.",
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path),
    help="Write a chart of latency and stages: .png, .svg or .pdf; needs the extra plot.",
)
@click.pass_context
def bench(
    context: click.Context, /, bundle: Path, images: tuple[Path, ...], **options: Any
) -> None:
    """Measure what an explanation of IMAGES costs.

    Reports latency from images in memory to the result, its stages, what it costs over the
    classifier's passes alone (the floor), cold start and memory. Without IMAGES a photograph is
    explained.
    """
    from msgspec.structs import replace

    from ccam_deploy.image_files import find_images
    from ccam_deploy.latency import measurement

    settings = measurement.LatencySettings(
        _numbers(options["batch"]),
        options["concurrency"],
        options["duration"],
        options["warmup"],
    )
    compare = _compare(options)
    _check_outputs(options["json_path"], options["plot_path"])
    found = find_images(images) if images else [_photograph()]
    report = _measure(bundle, found, settings, compare, options)
    names = [str(file) for file in images] or ["a photograph of the package"]
    report = replace(
        report, command=_command(context), settings=replace(report.settings, images=names)
    )
    _write(report, options["json_path"], options["plot_path"])


def _measure(
    bundle: Path,
    files: Sequence[Path],
    settings: LatencySettings,
    compare: Sequence[str],
    options: Mapping[str, Any],
) -> LatencyReport:
    """Measure everything; the command and the images' names are filled in later."""
    from msgspec.structs import asdict

    from ccam_deploy.explainer import load
    from ccam_deploy.image_files import load_image
    from ccam_deploy.latency import report as latency_report
    from ccam_deploy.latency.cold_start import measure_cold_start
    from ccam_deploy.latency.conditions import load_average, machine
    from ccam_deploy.latency.measurement import measure_latency

    pictures = [load_image(file) for file in files]
    how = {key: options[key] for key in ("backend", "precision", "batch_size", "threads")}
    how["slots"] = settings.concurrency
    before = load_average()
    notes: list[str] = []
    with ExitStack() as stack:
        explainer = stack.enter_context(load(bundle, **how))
        for note in explainer.networks.notes:
            say(f"passed over {note}", err=True)
        how["backend"] = explainer.networks.backend
        facts = explainer.explain(pictures[:1]).settings
        peers: dict[str, Peer] = {}
        for name in compare:
            if name == TORCH:
                peers[name] = _torch(explainer, options, notes)
            else:
                other = stack.enter_context(load(explainer.bundle, **{**how, "backend": name}))
                peers[name] = _other(other)
        starts = []
        for batch in settings.batches:
            say(f"batch {batch}: cold start", err=True)
            starts.append(measure_cold_start(bundle, files, batch, how))
        batches = measure_latency(explainer, pictures, settings, peers, partial(say, err=True))
        notes += [note for note in explainer.notes if note not in explainer.networks.notes]
    notes += latency_report.doubts(batches, before)
    return latency_report.LatencyReport(
        command="",
        conditions=latency_report.Conditions(
            **asdict(machine()), load_average_before=before, load_average_after=load_average()
        ),
        settings=latency_report.MeasuredSettings(
            method=facts["method"],
            options=facts["options"],
            bundle=facts["bundle"],
            backend=facts["backend"],
            precision=facts["precision"],
            batch_size=facts["batch_size"],
            threads=options["threads"],
            concurrency=settings.concurrency,
            slots=how["slots"] if explainer.networks.slots else None,
            duration_s=settings.duration,
            warmup_s=settings.warmup,
            compare=list(compare),
            images=[],
        ),
        bundle=latency_report.MeasuredBundle.of(explainer.bundle.manifest),
        cold_start=starts,
        batches=batches,
        warnings=notes,
    )


def _write(report: LatencyReport, json_path: Path | None, plot_path: Path | None) -> None:
    """Print warnings and the table or JSON, then write the files: what was measured is not lost."""
    import msgspec

    from ccam_deploy import plotting
    from ccam_deploy.files import write_file
    from ccam_deploy.latency import charts
    from ccam_deploy.latency.tables import report_text

    for note in report.warnings:
        say(f"warning: {note}", err=True)
    if str(json_path) == _STDOUT:
        print_json(msgspec.to_builtins(report))
    else:
        click.echo(report_text(report))
        if json_path:
            content = json.dumps(msgspec.to_builtins(report), indent=2, ensure_ascii=False) + "\n"
            write_file(json_path, content.encode())
    if plot_path:
        settings = report.settings
        title = f"{settings.bundle}, {settings.precision} on {settings.backend}"
        plot_format = plotting.plot_format(plot_path)
        write_file(plot_path, charts.draw_latency(report.batches, title, plot_format))


def _numbers(words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise OptionError(f'--batch "{words}" is not numbers such as 1,8') from None


def _compare(options: Mapping[str, Any]) -> list[str]:
    """The names to compare with; each is known, and torch has a model."""
    names = [word.strip() for word in options["compare"].split(",") if word.strip()]
    known = [*BACKENDS[1:], TORCH]
    for name in names:
        if name not in known:
            raise OptionError(f'--compare "{name}" is unknown; there are {", ".join(known)}')
    if TORCH in names:
        if options["model"] is None and options["recipe_path"] is None:
            raise OptionError(
                "--compare torch needs the bundle's model in PyTorch: "
                "give --model FILE, or --recipe FILE"
            )
        need_torch("--compare torch", "export")
        return names
    for option in ("model", "arch", "recipe", "random_weights", "allow_pickle"):
        if options["recipe_path" if option == "recipe" else option]:
            flag = option.replace("_", "-")
            raise OptionError(f"--{flag} goes with --compare torch")
    return names


def _check_outputs(json_path: Path | None, plot_path: Path | None) -> None:
    """See, before anything is measured, that both files can be written."""
    from ccam_deploy import plotting
    from ccam_deploy.files import require_writable

    if json_path and str(json_path) != _STDOUT:
        require_writable(json_path)
    if plot_path:
        plotting.plot_format(plot_path)
        plotting.require_matplotlib()
        require_writable(plot_path)


def _photograph() -> Path:
    """The package's photograph that is explained where no image is given."""
    import ccam_deploy

    return Path(ccam_deploy.__file__).parent / "examples" / "photographs" / "flower.jpg"


def _other(explainer: Explainer) -> Peer:
    return lambda case: explainer.explain(case.images)


def _torch(explainer: Explainer, options: Mapping[str, Any], notes: list[str]) -> Peer:
    """Collection-CAM in plain PyTorch, one forward for each mask, on the same kind of device."""
    import numpy as np

    from ccam_deploy.export.recipe import read_recipe
    from ccam_deploy.latency import plain_pytorch
    from ccam_deploy.latency.conditions import CPU

    path = options["recipe_path"]
    model = load_network(
        options["model"],
        read_recipe(path) if path else None,
        path.parent if path else Path(),
        options["arch"],
        options["random_weights"],
        options["allow_pickle"],
    )
    manifest = explainer.bundle.manifest
    on_cpu = explainer.networks.backend == CPU
    device = "cpu" if on_cpu else plain_pytorch.best_device()
    if device == "cpu" and not on_cpu:
        notes.append("torch cannot use a GPU here, so it ran on the CPU")
    plain_pytorch.use_threads(options["threads"])
    layers = [layer.name for layer in manifest.layers]
    peer = plain_pytorch.of_model(model, layers, manifest.input, device)
    probe = np.random.default_rng(0).standard_normal((1, *manifest.input), np.float32)
    ours, theirs = explainer.networks.backbone(probe).logits, peer.logits(probe)
    if ours.shape != theirs.shape:
        raise OptionError(
            f"the model has {theirs.shape[1]} classes, the bundle {ours.shape[1]}; "
            "give the model that was exported"
        )
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    if not error <= _LARGEST_ERROR:
        raise OptionError(
            f"the model's logits differ from the bundle's by {error:.0%}; "
            "give the model that was exported"
        )
    return lambda case: peer.explain_each(case.images, case.targets)


def _command(context: click.Context) -> str:
    """The command with every argument and option that is not at its default."""
    words: list[str] = ["ccam-deploy", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params[parameter.name] if parameter.name else None
        if isinstance(parameter, click.Argument):
            words += map(str, value if isinstance(value, Sequence | tuple) else [value])
        elif value != parameter.get_default(context) and value is not None:
            words.append(parameter.opts[0])
            if value is not True:
                words.append(str(value))
    return shlex.join(words)
