"""The page's HTML: results with their pictures inside, so that no file is served."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from ccam_deploy import render
from ccam_deploy.explanation import Explanation
from ccam_deploy.methods import METHODS
from ccam_deploy.page.fields import Field
from ccam_deploy.page.viewer import RankedClass, View, options_told
from ccam_deploy.render import Look, Tile
from ccam_deploy.text import one_line

_TILE_SIDE = 208
"""Pixels of a mask's picture, about twice those that it is shown with."""
_LONGEST_LINE = 400

STYLE = """
.ccam-result figure { margin: 0; }
.ccam-result img { display: block; max-width: 100%; border-radius: 4px; }
.ccam-result img.ccam-overlay { max-height: 420px; margin: 0 auto; }
.ccam-result figcaption { margin: 6px 0 10px; line-height: 1.35; }
.ccam-result figcaption b { font-size: 1.05em; }
.ccam-quiet { color: var(--body-text-color-subdued); font-size: 0.9em; }
.ccam-result h4 { margin: 10px 0 4px; font-size: 0.95em; display: flex; gap: 8px; }
.ccam-share { flex: 1; align-self: center; height: 6px; border-radius: 3px;
  background: var(--border-color-primary); }
.ccam-share i { display: block; height: 100%; border-radius: 3px; background: #d9480f; }
.ccam-tiles { display: flex; flex-wrap: wrap; gap: 6px; }
.ccam-tiles figure { width: 88px; }
.ccam-tiles figcaption { margin: 2px 0 0; font-size: 0.72em; line-height: 1.2; }
.ccam-error { margin: 0; padding: 8px 12px; border-radius: 6px; border: 1px solid #c92a2a;
  background: #fff5f5; color: #862e2e; }
.ccam-empty { padding: 60px 16px; text-align: center; border-radius: 6px;
  border: 1px dashed var(--border-color-primary); color: var(--body-text-color-subdued); }
.ccam-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; }
.ccam-head h1 { margin: 0; font-size: 1.3em; }
.ccam-head p { margin: 0; }
.ccam-head > .ccam-error { flex-basis: 100%; padding: 4px 12px; }
#message:not(:has(p)) { display: none; }
#classes .wrap { flex-direction: column; align-items: stretch; gap: 4px; }
#classes label { padding: 3px 8px; }
.gradio-container .main { padding-top: 10px; padding-bottom: 10px; }
"""


def error(line: str) -> str:
    """Make the line that tells what went wrong."""
    text = one_line(line)
    shown = text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE - 1]}…"
    return f'<p class="ccam-error" role="alert">{escape(shown)}</p>'


def empty(text: str) -> str:
    """Make what stands in the place of a result."""
    return f'<div class="ccam-empty">{escape(text)}</div>'


def head(name: str, backend: str, doubts: Sequence[str], missing: Mapping[str, str]) -> str:
    """Make the page's title.

    Args:
        name: The network's name.
        backend: What runs it.
        doubts: What makes its explanations doubtful, a line each.
        missing: For each method that cannot run, by name, why.
    """
    lines = [f"<h1>{escape(one_line(name))}</h1>"]
    lines.append(
        f'<p class="ccam-quiet">Which parts of a picture speak for a class? Runs on '
        f"{escape(backend)}.</p>"
    )
    lines += [error(doubt) for doubt in doubts]
    if missing:
        reasons = "".join(
            f"<li><b>{escape(method)}</b>: {escape(one_line(why))}</li>"
            for method, why in missing.items()
        )
        lines.append(
            f'<details class="ccam-quiet"><summary>{len(missing)} of {len(METHODS)} methods '
            f"cannot run with this bundle</summary><ul>{reasons}</ul></details>"
        )
    return f'<div class="ccam-head">{"".join(lines)}</div>'


def score(value: float, has_probabilities: bool) -> str:
    """Write a class's score: a probability in percent, or the output itself."""
    return f"{value:.1%}" if has_probabilities else f"output {value:.3g}"


def choice(ranked: RankedClass, has_probabilities: bool) -> str:
    """Write a class of a ranking with its score."""
    return f"{one_line(ranked.label)} · {score(ranked.score, has_probabilities)}"


def result(view: View, look: Look, has_probabilities: bool, fields: Sequence[Field]) -> str:
    """Make a result: the overlay, what it shows, and the masks of each layer.

    Args:
        view: The explanation.
        look: How maps are drawn.
        has_probabilities: Whether the scores of classes are probabilities.
        fields: Those of the method's options.

    Raises:
        OptionError: The color map is unknown, or the opacity is out of range.
    """
    explanation = view.explanation
    method = str(explanation.settings["method"])
    label = escape(one_line(explanation.labels[0]))
    facts = [method, *options_told(view, fields), f"{view.seconds * 1000:.0f} ms"]
    count = len(explanation.weights[0]) if explanation.layers else 0
    facts += [f"{count} masks"] if count else []
    overlay = _png(explanation.overlay(0, look))
    caption = (
        f"<b>{label}</b> · {score(explanation.probability(), has_probabilities)}<br>"
        f'<span class="ccam-quiet">{escape(" · ".join(facts))}</span>'
    )
    parts = [
        f'<figure><img class="ccam-overlay" alt="map of {label} by {escape(method)}" '
        f'src="{overlay}"><figcaption>{caption}</figcaption></figure>'
    ]
    if explanation.layers:
        parts.append(_masks(explanation.mask_tiles(0, look), _shares(explanation)))
    return f'<div class="ccam-result">{"".join(parts)}</div>'


def _shares(explanation: Explanation) -> list[float]:
    """The sum of each layer's weights; those of all layers add up to 1."""
    ends = np.cumsum([layer.count[0] for layer in explanation.layers])[:-1]
    return [float(weights.sum()) for weights in np.split(explanation.weights[0], ends)]


def _masks(tiles: Mapping[str, Sequence[Tile]], shares: Sequence[float]) -> str:
    """The layers, the deepest first, each with its share of all weights and its masks."""
    parts = []
    for (layer, (whole, *masks)), share in reversed(list(zip(tiles.items(), shares, strict=True))):
        parts.append(
            f"<h4>{escape(one_line(layer))} "
            f'<span class="ccam-share"><i style="width:{share:.1%}"></i></span> '
            f"weight {share:.3f}</h4>"
        )
        shown = [_tile(("part of the map", whole[1])), *map(_tile, masks)]
        parts.append(f'<div class="ccam-tiles">{"".join(shown)}</div>')
    return "".join(parts)


def _tile(tile: Tile) -> str:
    caption, picture = tile
    return (
        f'<figure><img alt="" src="{_jpeg(picture)}">'
        f"<figcaption>{escape(caption.replace(' ch.', ' channels'))}</figcaption></figure>"
    )


def _png(picture: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(render.png(picture)).decode()}"


def _jpeg(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_TILE_SIDE, _TILE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
