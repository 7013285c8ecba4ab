"""`ccam-deploy verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ccam_deploy.cli.options import bundle_argument, engine_options, json_option, print_json, say
from ccam_deploy.errors import IntegrityError


@click.command()
@bundle_argument
@engine_options
@json_option
def verify(bundle: Path, backend: str, threads: int, as_json: bool) -> None:
    """Check a bundle: schema, hashes, and each graph against the values recorded at export.

    Maps are made as `explain` makes them here, on a GPU all of them on the GPU.
    """
    import msgspec

    from ccam_deploy.bundle.folder import read_bundle, unlisted_files
    from ccam_deploy.explainer import load
    from ccam_deploy.fidelity.verification import verify_bundle

    opened = read_bundle(bundle)
    strangers = unlisted_files(opened)
    if strangers:
        raise IntegrityError(f"{bundle} has files that its manifest does not list: {strangers[0]}")
    reports: dict[str, Any] = {}
    problems = []
    for kind in opened.manifest.precisions:
        with load(opened, backend=backend, precision=kind, threads=threads) as explainer:
            networks = explainer.networks
            for note in networks.notes:
                say(f"passed over {note}", err=True)
            report, broken = verify_bundle(opened, networks, kind, explainer.explain)
        reports[kind] = {"backend": networks.backend, **msgspec.to_builtins(report)}
        problems += [f"{kind}: {problem}" for problem in broken]
        if not as_json:
            others = [
                f", {name.replace('_', ' ')} {error:.1e}"
                for name, error in report.optional_graphs().items()
            ]
            say(
                f"{kind} on {networks.backend}: logits {report.logits:.1e}, "
                f"masked logits {report.masked_logits:.1e}, features {max(report.features):.1e}, "
                f"gradients {max(report.gradients):.1e}, "
                f"saliency rank correlation {report.saliency_rank:.4f}, "
                f"SSIM {report.saliency_similarity:.4f}, "
                f"top 10 % in common {report.saliency_overlap:.1%}{''.join(others)}"
            )
    if as_json:
        print_json({"files": len(opened.manifest.files), "graphs": reports})
    if problems:
        raise IntegrityError("the graphs do not give what was recorded: " + "; ".join(problems))
    if not as_json:
        say(f"{bundle}: {len(opened.manifest.files)} files and all graphs are as exported")
