"""`ccam-deploy build`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import click

from ccam_deploy.cli.options import AsJson, BundleFolder, PlanOptions, Precision, RequireSignature
from ccam_deploy.cli.parameters import Option, unset, with_options
from ccam_deploy.cli.printing import UNSIGNED, print_json, say

Force = Annotated[bool, Option("--force", "Build even where the plans are up to date.")]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options of `build`."""

    bundle: BundleFolder
    precision: Precision = "fp32"
    plans: PlanOptions
    force: Force = False
    require_signature: RequireSignature = unset("none is needed")
    as_json: AsJson = False


@click.command()
@with_options(BuildOptions)
def build(options: BuildOptions) -> None:
    """Build TensorRT plans and add them to BUNDLE, with the kernels that run between them.

    Plans that are up to date, for the same graphs, library, devices and batch, are kept, and so are
    compiled kernels. Prints the file and size of each that is new. With TensorRT-RTX, neither needs
    a GPU. A signature of the bundle is removed when it changes.
    """
    import msgspec

    from ccam_deploy.bundle.folder import read_bundle
    from ccam_deploy.bundle.manifest import PrecisionName
    from ccam_deploy.bundle.signature import is_signed
    from ccam_deploy.cli.planner import Planner

    planner = Planner(options.plans, options.force)
    precision = msgspec.convert(options.precision, PrecisionName)
    bundle = read_bundle(options.bundle, options.require_signature)
    signed = is_signed(options.bundle)
    built = planner.build(bundle, precision)
    if not options.as_json:
        planner.report(built)
    compiled = planner.compile_kernels(built.bundle)
    if signed and not is_signed(options.bundle):
        say(UNSIGNED, err=True)
    if options.as_json:
        fresh = built.fresh or (compiled is not None and compiled.fresh)
        print_json(
            {
                "bundle": str(options.bundle),
                "up_to_date": not fresh,
                "plans": msgspec.to_builtins(built.plans),
                "kernels": msgspec.to_builtins(compiled.kernels if compiled else ()),
            }
        )
    else:
        planner.report_kernels(compiled)
