"""`ccam-deploy info`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
from msgspec import UNSET

from ccam_deploy.cli.options import AsJson, BundleFolder, RequireSignature
from ccam_deploy.cli.parameters import unset, with_options
from ccam_deploy.cli.printing import print_json, tf32_note
from ccam_deploy.text import one_line, text_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ccam_deploy.bundle.folder import Bundle
    from ccam_deploy.bundle.manifest import Fidelity, Manifest

_SCORES = {
    "softmax": "softmax of the logits",
    "sigmoid": "sigmoid of each logit",
    "none": "the outputs as they are",
}
Table = list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """The options of `info`."""

    bundle: BundleFolder
    require_signature: RequireSignature = unset("none is needed")
    as_json: AsJson = False


@click.command()
@with_options(InfoOptions)
def info(options: InfoOptions) -> None:
    """Show what BUNDLE contains.

    Prints its input, classes, target layers and TensorRT plans, and how far its graphs are from
    PyTorch in float32, as the export measured it.
    """
    from ccam_deploy.bundle.folder import read_bundle

    bundle = read_bundle(options.bundle, options.require_signature)
    if options.as_json:
        import msgspec

        print_json(msgspec.to_builtins(bundle.manifest))
        return
    click.echo(_text(bundle))


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


def _worst(
    reports: Sequence[Fidelity], title: str, name: str, form: str
) -> Iterator[tuple[str, list[str]]]:
    """A row for a quantity of the worst image; none for bundles of version 0.1.0."""
    values = [getattr(report, name) for report in reports]
    if UNSET not in values:
        worst = [max(value) if isinstance(value, tuple) else value for value in values]
        yield title, [format(value, form) for value in worst]


def _text(bundle: Bundle) -> str:
    manifest = bundle.manifest
    layers: Table = [("layer", "channels", "height", "width")]
    layers += [(x.name, str(x.channels), str(x.height), str(x.width)) for x in manifest.layers]
    fidelity = f"{text_table(_fidelity(manifest))}\n{one_line(tf32_note(bundle.folder))}"
    parts = [text_table(_facts(manifest)), text_table(layers), fidelity]
    parts += [one_line(f"warning: {note}") for note in manifest.doubts]
    if manifest.plans:
        parts.append(text_table(_plans(manifest)))
    if manifest.compiled:
        rows = [(code.compiler, code.device) for code in manifest.compiled]
        parts.append(text_table([("compiled kernels", "compute capability"), *rows]))
    return "\n\n".join(parts)


def _facts(manifest: Manifest) -> Table:
    fit = manifest.preprocessing
    channels, height, width = manifest.input
    size = sum(record.bytes for record in manifest.files.values())
    weights = ", random weights" if manifest.random_weights else ""
    resize = "stretched" if fit.resize == "stretch" else f"cut from {fit.cover[0]}x{fit.cover[1]}"
    return [
        ("name", f"{manifest.name} (from {manifest.source}{weights})"),
        ("input", f"{channels} channels, {height}x{width}, {resize}, {fit.interpolation}"),
        ("mean", ", ".join(f"{value:g}" for value in fit.mean)),
        ("std", ", ".join(f"{value:g}" for value in fit.std)),
        ("classes", f"{manifest.classes}, {'named' if manifest.labels else 'without names'}"),
        ("scores", _SCORES[manifest.probabilities_by]),
        ("size", f"{size / 1e6:.1f} MB in {len(manifest.files)} files"),
        ("made with", ", ".join(f"{name} {v}" for name, v in manifest.tools.items())),
    ]


def _fidelity(manifest: Manifest) -> Table:
    """A column for each precision."""
    reports = [precision.fidelity for precision in manifest.precisions.values()]
    rows: Table = [("against PyTorch in float32", *manifest.precisions)]
    for title, values in (
        ("logits, relative error", [f"{r.logits:.1e}" for r in reports]),
        ("masked logits", [f"{r.masked_logits:.1e}" for r in reports]),
        ("features, worst layer", [f"{max(r.features):.1e}" for r in reports]),
        ("gradients, worst layer", [f"{max(r.gradients):.1e}" for r in reports]),
        *_worst(reports, "  and worst image", "worst_gradients", ".1e"),
        ("equal partitions", [f"{r.partitions:.1%}" for r in reports]),
        ("saliency, rank correlation", [f"{r.saliency_rank:.4f}" for r in reports]),
        ("  of the worst image", [f"{r.worst_saliency_rank:.4f}" for r in reports]),
        ("saliency, SSIM", [f"{r.saliency_similarity:.4f}" for r in reports]),
        *_worst(reports, "  SSIM, worst image", "worst_saliency_similarity", ".4f"),
        ("saliency, top 10 % in common", [f"{r.saliency_overlap:.1%}" for r in reports]),
        *_worst(reports, "  in common, worst image", "worst_saliency_overlap", ".1%"),
        *_optional_graphs(reports),
        ("images", [str(r.images) for r in reports]),
    ):
        rows.append((title, *values))
    return rows


def _plans(manifest: Manifest) -> Table:
    rows: Table = [("plan", "precision", "library", "compute capabilities", "batch")]
    for plan in manifest.plans:
        library = f"{plan.library} {plan.version}"
        devices = ", ".join(plan.devices)
        rows.append((plan.graph, plan.precision, library, devices, str(plan.max_batch)))
    return rows
