"""`ccam-deploy build`."""

from __future__ import annotations

from pathlib import Path

import click

from ccam_deploy.cli.options import PRECISIONS, bundle_argument, json_option, print_json


@click.command()
@bundle_argument
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    default="tensorrt",
    show_default=True,
    help="The TensorRT to build with; tensorrt-rtx needs no GPU for it.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="The bundle's graphs to build.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="The most images that a plan takes at a time.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="X.Y",
    help="A compute capability to build for, such as 8.9; may be repeated.  [default: all from "
    "8.0 on that tensorrt-rtx supports; for tensorrt the GPU that is here]",
)
@json_option
def build(
    bundle: Path,
    backend: str,
    precision: str,
    max_batch: int,
    devices: tuple[str, ...],
    as_json: bool,
) -> None:
    """Build a bundle's graphs into TensorRT plans and add them to it."""
    import msgspec

    from ccam_deploy import bundle as bundles
    from ccam_deploy.bundle import PrecisionName
    from ccam_deploy.engines import plans
    from ccam_deploy.engines.build import build as run

    library = plans.load_library(msgspec.convert(backend, plans.Flavour))
    kind = msgspec.convert(precision, PrecisionName)
    made = run(
        bundles.read(bundle),
        library,
        kind,
        max_batch,
        devices,
        lambda line: click.echo(line, err=True),
    )
    listed = [
        plan
        for plan in made.manifest.plans
        if (plan.library, plan.precision, plan.version) == (backend, kind, library.version)
    ]
    if as_json:
        print_json(msgspec.to_builtins(listed))
        return
    for plan in listed:
        size = made.manifest.files[plan.file].bytes / 1e6
        click.echo(f"{made.path(plan.file)}: {size:.1f} MB for {', '.join(plan.devices)}")
