"""`ccam-deploy bench`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from ccam_deploy.cli.network import load_network, require_torch
from ccam_deploy.cli.options import (
    BACKENDS,
    PATH,
    AsJson,
    BundleFolder,
    EngineOptions,
    ImageFiles,
    LimitOrNone,
    ModelSource,
    output_to,
)
from ccam_deploy.cli.parameters import Integers, Option, Words, unset, with_options
from ccam_deploy.cli.printing import print_json, say, write_json
from ccam_deploy.errors import OptionError

if TYPE_CHECKING:
    from ccam_deploy.arrays import Floats
    from ccam_deploy.explainer import Explainer
    from ccam_deploy.latency.cases import Peer
    from ccam_deploy.latency.cold_start import ColdStart
    from ccam_deploy.latency.report import LatencyReport, MeasuredSettings
    from ccam_deploy.latency.settings import LatencySettings

TORCH = "torch"
_LARGEST_ERROR = 0.05

Batches = Annotated[
    tuple[int, ...],
    Option("--batch", "Images in a call; each number is measured by itself.", Integers()),
]
Concurrency = Annotated[
    int,
    Option("--concurrency", "Threads that call one explainer at the same time.", click.INT),
]
Duration = Annotated[
    float,
    Option(
        "--duration",
        "Seconds that each measurement lasts: the load, the turns with the classifier alone, and "
        "those with each --compare.",
        click.FLOAT,
    ),
]
Warmup = Annotated[
    float, Option("--warmup", "Seconds of load before each batch is measured.", click.FLOAT)
]
ColdStarts = Annotated[
    bool,
    Option(
        "--cold-start/--no-cold-start",
        "Whether to measure how long a fresh process takes to its first explanation.",
    ),
]
Compared = Annotated[
    tuple[str, ...], Option("--compare", "Other backends, or torch, to measure in turn.", Words())
]
PyTorchModel = Annotated[
    Path | None,
    Option("--model", "Model file for --compare torch, as export takes it.", PATH),
]
OutputReport = Annotated[Path | None, output_to("a JSON file")]
Plot = Annotated[
    Path | None,
    Option("--plot", "Draw latency and stages to a .png, .svg or .pdf file.", PATH),
]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The options of `bench`."""

    bundle: BundleFolder
    images: ImageFiles = ()
    limit: LimitOrNone = unset("all")
    engine: EngineOptions
    batches: Batches = (1,)
    concurrency: Concurrency = 1
    duration: Duration = 10.0
    warmup: Warmup = 2.0
    cold_start: ColdStarts = True
    compare: Compared = ()
    model: PyTorchModel = None
    source: ModelSource
    output: OutputReport = None
    plot: Plot = None
    as_json: AsJson = False


@click.command()
@with_options(BenchOptions)
def bench(options: BenchOptions) -> None:
    """Measure how long an explanation of IMAGES by Collection-CAM takes.

    Measures the latency from images in memory to the result, its stages, the overhead over the
    classifier's passes alone (the floor), the cold start and the memory. Without IMAGES, a
    photograph that comes with the package is explained.

    Loading and preparing a GPU aside, each batch size takes at most --warmup, 2.5 times --duration
    and 15 seconds, with --duration once more for each --compare, and 20 seconds for the cold start.
    What would take longer is cut short, with a warning; calls that have begun are waited for.

    Prints what it finds as it goes to stderr, and a table at the end; --output writes everything,
    samples included, to a JSON file. --plot needs the extra "plot". --compare torch runs
    Collection-CAM in plain PyTorch and needs the bundle's model: --model, or --recipe, with the
    options that it was exported with. PyTorch computes in float32, with TF32 on a GPU unless
    --precision is fp32.
    """
    from msgspec.structs import replace

    from ccam_deploy.image_files import find_images
    from ccam_deploy.latency.settings import LatencySettings

    settings = LatencySettings(
        options.batches, options.concurrency, options.duration, options.warmup
    )
    _validate_comparison(options)
    _require_outputs(options)
    files = find_images(options.images) if options.images else [_photograph()]
    files = files[: options.limit]
    report = _measure(options, files, settings)
    names = [str(file) for file in options.images] or ["a photograph of the package"]
    command = _command(click.get_current_context())
    report = replace(report, command=command, settings=replace(report.settings, images=names))
    _write(report, options)


def _measure(
    options: BenchOptions, files: Sequence[Path], settings: LatencySettings
) -> LatencyReport:
    """Measure everything; the command and the images' names are filled in later."""
    from msgspec.structs import asdict

    from ccam_deploy.explainer import load
    from ccam_deploy.image_files import load_image
    from ccam_deploy.latency import report as latency_report
    from ccam_deploy.latency.cold_start import LIMIT_S
    from ccam_deploy.latency.conditions import load_average, machine
    from ccam_deploy.latency.measurement import measure_latency

    pictures = [load_image(file) for file in files]
    setup = {**dataclasses.asdict(options.engine), "slots": settings.concurrency}
    before = load_average()
    notes: list[str] = []
    with ExitStack() as stack:
        say("loading", err=True)
        explainer = stack.enter_context(load(options.bundle, **setup))
        for note in explainer.networks.notes:
            say(f"skipped {note}", err=True)
        setup["backend"] = explainer.networks.backend
        say("first explanation", err=True)
        facts = explainer.explain(pictures[:1]).settings
        peers: dict[str, Peer] = {}
        for name in options.compare:
            if name == TORCH:
                peers[name] = _torch_peer(explainer, options, notes)
            else:
                other = stack.enter_context(load(explainer.bundle, **{**setup, "backend": name}))
                peers[name] = _bundle_peer(other)
        batch_sizes = settings.batches if options.cold_start else ()
        starts = [_cold_start(options.bundle, files, batch, setup) for batch in batch_sizes]
        batches = measure_latency(explainer, pictures, settings, peers, partial(say, err=True))
        notes += [note for note in explainer.notes if note not in explainer.networks.notes]
    late = [batch for batch, start in zip(batch_sizes, starts, strict=True) if start is None]
    notes += [
        f"batch {batch}: the cold start took over {LIMIT_S:g} s and was ended" for batch in late
    ]
    return latency_report.LatencyReport(
        command="",
        conditions=latency_report.Conditions(
            **asdict(machine()), load_average_before=before, load_average_after=load_average()
        ),
        settings=_measured_settings(explainer, facts, options, settings),
        bundle=latency_report.MeasuredBundle.of(explainer.bundle.manifest),
        cold_start=[start for start in starts if start],
        batches=batches,
        warnings=notes + latency_report.doubts(batches, before, len(pictures)),
    )


def _cold_start(
    bundle: Path, files: Sequence[Path], batch: int, load_options: Mapping[str, Any]
) -> ColdStart | None:
    """Measure one cold start and say how long it took; None where it took too long."""
    from ccam_deploy.latency.cold_start import measure_cold_start
    from ccam_deploy.latency.tables import digits

    say(f"batch {batch}: cold start", err=True)
    start = measure_cold_start(bundle, files, batch, load_options)
    if start:
        parts = f"loading {digits(start.load_ms)}, first explanation {digits(start.first_ms)}"
        say(f"batch {batch}: cold start {digits(start.total_ms)} ms: {parts}", err=True)
    return start


def _measured_settings(
    explainer: Explainer,
    facts: Mapping[str, Any],
    options: BenchOptions,
    settings: LatencySettings,
) -> MeasuredSettings:
    """What the report says of the settings; `facts` are those of an explanation."""
    from ccam_deploy.latency import report as latency_report

    return latency_report.MeasuredSettings(
        method=facts["method"],
        options=facts["options"],
        bundle=facts["bundle"],
        backend=facts["backend"],
        precision=facts["precision"],
        batch_size=facts["batch_size"],
        threads=options.engine.threads,
        concurrency=settings.concurrency,
        slots=settings.concurrency if explainer.networks.slots else None,
        duration_s=settings.duration,
        warmup_s=settings.warmup,
        compare=list(options.compare),
        images=[],
    )


def _write(report: LatencyReport, options: BenchOptions) -> None:
    """Print first, then write the files: what was measured is not lost."""
    import msgspec

    from ccam_deploy import plotting
    from ccam_deploy.files import write_file
    from ccam_deploy.latency import charts
    from ccam_deploy.latency.tables import report_text

    for note in report.warnings:
        say(f"warning: {note}", err=True)
    content = msgspec.to_builtins(report)
    if options.as_json:
        print_json(content)
    else:
        click.echo(report_text(report))
    if options.output:
        write_json(options.output, content)
    if options.plot:
        settings = report.settings
        title = f"{settings.bundle}, {settings.precision} on {settings.backend}"
        plot_format = plotting.plot_format(options.plot)
        write_file(options.plot, charts.draw_latency(report.batches, title, plot_format))


def _validate_comparison(options: BenchOptions) -> None:
    """Each name to compare with is known, and torch has a model."""
    known = [*BACKENDS[1:], TORCH]
    for name in options.compare:
        if name not in known:
            raise OptionError(f'--compare "{name}" is unknown; there are {", ".join(known)}')
    source = options.source
    if TORCH in options.compare:
        if options.model is None and source.recipe is None:
            raise OptionError(
                "--compare torch needs the bundle's model in PyTorch: "
                "give --model FILE, or --recipe FILE"
            )
        require_torch("--compare torch", "export")
        return
    for flag, value in (
        ("--model", options.model),
        ("--arch", source.arch),
        ("--recipe", source.recipe),
        ("--random-weights", source.random_weights),
        ("--allow-pickle", source.allow_pickle),
    ):
        if value:
            raise OptionError(f"{flag} goes with --compare torch")


def _require_outputs(options: BenchOptions) -> None:
    """See, before anything is measured, that both files can be written."""
    from ccam_deploy import plotting
    from ccam_deploy.files import require_writable

    if options.output:
        require_writable(options.output)
    if options.plot:
        plotting.plot_format(options.plot)
        plotting.require_matplotlib()
        require_writable(options.plot)


def _photograph() -> Path:
    """The package's photograph that is explained where no image is given."""
    import ccam_deploy

    return Path(ccam_deploy.__file__).parent / "examples" / "photographs" / "flower.jpg"


def _bundle_peer(explainer: Explainer) -> Peer:
    return lambda case: explainer.explain(case.images)


def _torch_peer(explainer: Explainer, options: BenchOptions, notes: list[str]) -> Peer:
    """Collection-CAM in plain PyTorch, one forward for each mask, on the same type of device."""
    import numpy as np

    from ccam_deploy.export.recipe import read_recipe
    from ccam_deploy.latency import plain_pytorch
    from ccam_deploy.latency.conditions import CPU

    recipe = read_recipe(options.source.recipe) if options.source.recipe else None
    model = load_network(options.model, recipe, options.source)
    manifest = explainer.bundle.manifest
    on_cpu = explainer.networks.backend == CPU
    device = "cpu" if on_cpu else plain_pytorch.best_device()
    if device == "cpu" and not on_cpu:
        notes.append("torch cannot use a GPU here, so it ran on the CPU")
    plain_pytorch.use_threads(options.engine.threads)
    plain_pytorch.use_tf32(options.engine.precision != "fp32")
    layers = [layer.name for layer in manifest.layers]
    peer = plain_pytorch.of_model(model, layers, manifest.input, device)
    probe = np.random.default_rng(0).standard_normal((1, *manifest.input), np.float32)
    ours, theirs = explainer.networks.backbone(probe).logits, peer.logits(probe)
    if not _same(ours, theirs):  # the export may have found the logits before the outputs
        peer = plain_pytorch.of_model(
            model, layers, manifest.input, device, manifest.probabilities_by
        )
        theirs = peer.logits(probe)
    if ours.shape != theirs.shape:
        raise OptionError(
            f"the model has {theirs.shape[1]} classes, the bundle {ours.shape[1]}; "
            "give the model that was exported"
        )
    if not _same(ours, theirs):
        error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        raise OptionError(
            f"the model's logits differ from the bundle's by {error:.0%}; "
            "give the model that was exported"
        )
    return lambda case: peer.explain_each(case.images, case.targets)


def _same(ours: Floats, theirs: Floats) -> bool:
    """Whether logits are those of the same network; TF32 and half precision round."""
    import numpy as np

    if ours.shape != theirs.shape:
        return False
    return bool(np.linalg.norm(ours - theirs) <= _LARGEST_ERROR * np.linalg.norm(theirs))


def _command(context: click.Context) -> str:
    """The command with every argument and option that is not at its default."""
    words = ["ccam-deploy", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params[parameter.name] if parameter.name else None
        if isinstance(parameter, click.Argument):
            words += map(str, value if isinstance(value, tuple) else [value])
        elif value is not None and value != parameter.get_default(context):
            flags = parameter.secondary_opts if value is False else parameter.opts
            words += _option_words(flags[0], value)
    return shlex.join(words)


def _option_words(flag: str, value: Any) -> Iterator[str]:
    yield flag
    if isinstance(value, tuple):
        yield ",".join(map(str, value))
    elif not isinstance(value, bool):
        yield str(value)
