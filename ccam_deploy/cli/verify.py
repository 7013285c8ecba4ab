"""`ccam-deploy verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ccam_deploy.cli.options import (
    AsJson,
    BackendName,
    BundleFolder,
    KeyFileOrNone,
    PrecisionOrNone,
    Threads,
)
from ccam_deploy.cli.parameters import unset, with_options
from ccam_deploy.cli.printing import print_json, say, tf32_note
from ccam_deploy.errors import IntegrityError

if TYPE_CHECKING:
    from ccam_deploy.bundle.manifest import Fidelity


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The options of `verify`."""

    bundle: BundleFolder
    backend: BackendName = "auto"
    precision: PrecisionOrNone = unset("every one that was exported")
    threads: Threads = 0
    key: KeyFileOrNone = unset("no signature is needed")
    as_json: AsJson = False


@click.command()
@with_options(VerifyOptions)
def verify(options: VerifyOptions) -> None:
    """Check that BUNDLE is intact and works as exported.

    Checks the manifest, the hash of every file, and every graph against the values that were
    recorded at export, on the backend that `explain` would use here. No export can run tf32:
    --precision tf32 measures it, on a GPU. With --key, all files must first be as they were signed
    with it; that needs the extra "sign".
    """
    import msgspec

    from ccam_deploy.bundle.folder import read_bundle, unlisted_files
    from ccam_deploy.explainer import load
    from ccam_deploy.fidelity.verification import verify_bundle

    bundle = read_bundle(options.bundle, options.key)
    unlisted = unlisted_files(bundle)
    if unlisted:
        raise IntegrityError(
            f"{options.bundle} has files that its manifest does not list: {unlisted[0]}"
        )
    reports: dict[str, Any] = {}
    problems = []
    precisions = [options.precision] if options.precision else bundle.manifest.precisions
    for precision in precisions:
        with load(
            bundle, backend=options.backend, precision=precision, threads=options.threads
        ) as explainer:
            networks = explainer.networks
            for note in networks.notes:
                say(f"skipped {note}", err=True)
            report, broken = verify_bundle(bundle, networks, precision, explainer.explain)
        reports[precision] = {"backend": networks.backend, **msgspec.to_builtins(report)}
        problems += [f"{precision}: {problem}" for problem in broken]
        if not options.as_json:
            _report(f"{precision} on {networks.backend}", report)
    count = len(bundle.manifest.files)
    if options.as_json:
        print_json({"files": count, "signed": options.key is not None, "graphs": reports})
    if problems:
        raise IntegrityError("the graphs do not give what was recorded: " + "; ".join(problems))
    if options.as_json:
        return
    if not options.precision:
        say(tf32_note(options.bundle))
    signed = f", and signed with the key of {options.key}" if options.key else ""
    say(f"{options.bundle}: {count} files {_verdict(options.precision)}{signed}")


def _verdict(precision: str | None) -> str:
    if precision == "tf32":
        return "are as exported, and the fp32 graphs keep to the bounds of tf32"
    graphs = f"the {precision} graphs" if precision else "all graphs"
    return f"and {graphs} are as exported"


def _report(title: str, report: Fidelity) -> None:
    graphs = [
        f", {name.replace('_', ' ')} {error:.1e}"
        for name, error in report.optional_graphs().items()
    ]
    say(
        f"{title}: logits {report.logits:.1e}, masked logits {report.masked_logits:.1e}, "
        f"features {max(report.features):.1e}, gradients {max(report.gradients):.1e}, "
        f"saliency rank correlation {report.saliency_rank:.4f} "
        f"({report.worst_saliency_rank:.4f} for the worst of {report.images} images), "
        f"SSIM {report.saliency_similarity:.4f}, "
        f"top 10 % in common {report.saliency_overlap:.1%}{''.join(graphs)}"
    )
