"""The results of bench_gpu as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench import bench_kernels
from bench.gpu.pieces import (
    BATCHES,
    PRECISIONS,
    SCORE_CAM,
    Figures,
    offered,
    pieces_of,
    score_pieces,
)
from ccam_deploy.latency.tables import digits
from ccam_deploy.text import markdown_table

_HEADER = (
    "network",
    "precision",
    "images",
    "masks",
    "explain, ms",
    "slowest, ms",
    "on the GPU, ms",
    "host, ms",
    "floor, ms",
    "over floor",
    "one forward a mask, ms",
    "GPU MiB",
    "floor's MiB",
)


_SCORE_HEADER = (
    "network",
    "precision",
    "masks",
    "Score-CAM, ms",
    "slowest, ms",
    "its forwards, ms",
    "overhead",
    "PyTorch's forwards, ms",
    "TorchCAM, ms",
    "one forward a mask, ms",
)


def explanations(pieces: Mapping[str, Figures]) -> str:
    """Lay out a row for each network, precision and batch of which anything is known."""
    rows = []
    for network in PRECISIONS:
        for piece in pieces_of("explain", network):
            ours = pieces.get(piece.key, {})
            floor = pieces.get(piece.of_kind("floor").key, {})
            if ours or floor:
                name = (network, piece.precision, str(piece.batch))
                rows.append((*name, *_cells(ours, floor)))
    return markdown_table(_HEADER, rows)


def _cells(ours: Figures, floor: Figures) -> list[str]:
    timing = ours.get("ms", {})
    both = timing and floor and ours["masks"] == floor["masks"]
    ratio = f"{timing['median'] / floor['graph_ms']:.2f}" if both else "–"
    masks = ours.get("masks", floor.get("masks"))
    return [
        str(masks),
        digits(timing.get("median")),
        digits(timing.get("maximum")),
        digits(ours.get("device_ms")),
        digits(ours.get("host_ms")),
        digits(floor.get("graph_ms")),
        ratio,
        digits(floor.get("one_by_one_ms")),
        digits(ours.get("memory_mib")),
        digits(floor.get("memory_mib")),
    ]


def score_cams(pieces: Mapping[str, Figures]) -> str:
    """Lay out Score-CAM of one image, a row for each network and precision that is known."""
    rows = []
    for network in SCORE_CAM:
        for piece in score_pieces("score-cam", network):
            ours, floor, peer = (
                pieces.get(piece.of_kind(kind).key, {})
                for kind in ("score-cam", "score-floor", "torchcam")
            )
            timing = ours.get("ms", {})
            if ours or floor or peer:
                rows.append(
                    (
                        network,
                        piece.precision,
                        str(ours.get("masks", floor.get("masks", "–"))),
                        digits(timing.get("median")),
                        digits(timing.get("maximum")),
                        digits(ours.get("forwards_ms")),
                        f"{ours['overhead']:.2f}" if ours else "–",
                        digits(floor.get("graph_ms")),
                        digits(peer.get("torchcam_ms")),
                        digits(floor.get("one_by_one_ms")),
                    )
                )
    return markdown_table(_SCORE_HEADER, rows) if rows else ""


def stages(pieces: Mapping[str, Figures]) -> str:
    """Lay out the stages of one image, launched one by one, a column for each precision."""
    columns = {
        f"{network}, {name}": figures
        for network in PRECISIONS
        for name in offered(network)
        if (figures := pieces.get(f"explain/{network}/{name}/1"))
    }
    names = dict.fromkeys(name for figures in columns.values() for name in figures["stages_ms"])
    rows = [
        (name, *(digits(figures["stages_ms"].get(name)) for figures in columns.values()))
        for name in names
    ]
    for title, key in (("warm-up", "warm_up_ms"), ("first call after it", "first_ms")):
        rows.append((title, *(digits(figures[key]) for figures in columns.values())))
    return markdown_table(("stage of one image, ms", *columns), rows) if columns else ""


def kernels(pieces: Mapping[str, Figures]) -> str:
    """Lay out the kernels as bench_kernels does."""
    columns = {
        f"{network}-{batch}": figures
        for network in PRECISIONS
        for batch in BATCHES
        if (figures := pieces.get(f"kernels/{network}/{batch}"))
    }
    return bench_kernels.table(columns) if columns else ""


def markdown(result: Mapping[str, Any]) -> str:
    """The tables, what they were measured on, what was left out, and the command."""
    facts, pieces = result["conditions"], result["results"]
    card = facts["gpu"] or {"name": "unknown GPU", "driver": "unknown"}
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        explanations(pieces),
        score_cams(pieces),
        stages(pieces),
        kernels(pieces),
        "`floor` is PyTorch's forward, gradient and masked forwards of as many images as one CUDA "
        "graph, in channels_last for fp16; `one forward a mask` is the same, eager and one by one. "
        "For Score-CAM these are the masked forwards alone, and `overhead` is over its own. "
        "Random weights, 224×224, from preprocessed arrays; medians.",
        "\n".join(f"- Left out: {key}: {reason}" for key, reason in result["left_out"].items()),
        f"{card['name']}, driver {card['driver']}, {facts['cores']} cores, "
        f"Python {facts['python']}, {versions}.\nMade by `{result['command']}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
