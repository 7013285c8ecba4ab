"""`ccam-deploy info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ccam_deploy.cli.options import bundle_argument, json_option, print_json
from ccam_deploy.text import text_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ccam_deploy.bundle.folder import Bundle
    from ccam_deploy.bundle.manifest import Fidelity


@click.command()
@bundle_argument
@json_option
def info(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds."""
    from ccam_deploy.bundle.folder import read_bundle

    opened = read_bundle(bundle)
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(opened.manifest))
        return
    click.echo(_text(opened))


def _optional_graphs(reports: Sequence[Fidelity]) -> Iterator[tuple[str, list[str]]]:
    """A row for each optional graph that the bundle has."""
    for title, name in (
        ("logits of the head", "head"),
        ("gradient of the image", "input_gradient"),
        ("  guided", "guided_gradient"),
        ("excitation, worst layer", "excitation"),
    ):
        values = [report.optional_graphs().get(name) for report in reports]
        if None not in values:
            yield title, [f"{value:.1e}" for value in values]


def _text(bundle: Bundle) -> str:
    manifest = bundle.manifest
    how = manifest.preprocessing
    channels, height, width = manifest.input
    total = sum(record.bytes for record in manifest.files.values())
    weights = ", random weights" if manifest.random_weights else ""
    fitting = "stretched" if how.resize == "stretch" else f"cut from {how.cover[0]}x{how.cover[1]}"
    facts: list[tuple[str, ...]] = [
        ("name", f"{manifest.name} (from {manifest.source}{weights})"),
        ("input", f"{channels} channels, {height}x{width}, {fitting}, {how.interpolation}"),
        ("mean", ", ".join(f"{value:g}" for value in how.mean)),
        ("std", ", ".join(f"{value:g}" for value in how.std)),
        ("classes", f"{manifest.classes}, {'named' if manifest.labels else 'without names'}"),
        ("size", f"{total / 1e6:.1f} MB in {len(manifest.files)} files"),
        ("made with", ", ".join(f"{name} {v}" for name, v in manifest.tools.items())),
    ]
    layers: list[tuple[str, ...]] = [("layer", "channels", "height", "width")]
    layers += [(x.name, str(x.channels), str(x.height), str(x.width)) for x in manifest.layers]
    names = list(manifest.precisions)
    reports = [manifest.precisions[name].fidelity for name in names]
    comparison: list[tuple[str, ...]] = [("against PyTorch in float32", *names)]
    for title, values in (
        ("logits, relative error", [f"{r.logits:.1e}" for r in reports]),
        ("masked logits", [f"{r.masked_logits:.1e}" for r in reports]),
        ("features, worst layer", [f"{max(r.features):.1e}" for r in reports]),
        ("gradients, worst layer", [f"{max(r.gradients):.1e}" for r in reports]),
        ("equal partitions", [f"{r.partitions:.1%}" for r in reports]),
        ("saliency, rank correlation", [f"{r.saliency_rank:.4f}" for r in reports]),
        ("  of the worst image", [f"{r.worst_saliency_rank:.4f}" for r in reports]),
        ("saliency, SSIM", [f"{r.saliency_similarity:.4f}" for r in reports]),
        ("saliency, top 10 % in common", [f"{r.saliency_overlap:.1%}" for r in reports]),
        *_optional_graphs(reports),
        ("images", [str(r.images) for r in reports]),
    ):
        comparison.append((title, *values))
    parts: list[list[tuple[str, ...]]] = [facts, layers, comparison]
    if manifest.plans:
        plans: list[tuple[str, ...]] = [
            ("plan", "precision", "library", "compute capabilities", "batch")
        ]
        for plan in manifest.plans:
            library = f"{plan.library} {plan.version}"
            devices = ", ".join(plan.devices)
            plans.append((plan.graph, plan.precision, library, devices, str(plan.max_batch)))
        parts.append(plans)
    return "\n\n".join(text_table(rows) for rows in parts)
