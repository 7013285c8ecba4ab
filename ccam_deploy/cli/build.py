"""`ccam-deploy build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ccam_deploy.cli.options import (
    PRECISIONS,
    bundle_argument,
    json_option,
    plan_options,
    print_json,
)


@click.command()
@bundle_argument
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="The bundle's graphs to build.",
)
@plan_options
@click.option("--force", is_flag=True, help="Build also where the plans are up to date.")
@json_option
def build(bundle: Path, precision: str, force: bool, as_json: bool, **options: Any) -> None:
    """Build a bundle's graphs into TensorRT plans and add them to it.

    Plans that the bundle has already, of the same graphs and for the same TensorRT, devices and
    batch, are kept.
    """
    import msgspec

    from ccam_deploy.bundle.folder import read_bundle
    from ccam_deploy.bundle.manifest import PrecisionName
    from ccam_deploy.cli.planner import Planner

    planner = Planner(**options, force=force)
    built = planner.build(read_bundle(bundle), msgspec.convert(precision, PrecisionName))
    if as_json:
        plans = msgspec.to_builtins(built.plans)
        print_json({"bundle": str(bundle), "up_to_date": not built.fresh, "plans": plans})
    else:
        planner.report(built)
