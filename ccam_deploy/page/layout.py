"""The page in Gradio: its parts, and where they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ccam_deploy.bundle.manifest import RANDOM_WEIGHTS
from ccam_deploy.page import markup
from ccam_deploy.page.clicks import KEPT_S, NOTHING, WAITING, Clicks, Parts, Side
from ccam_deploy.page.fields import Field
from ccam_deploy.page.viewer import Viewer
from ccam_deploy.page.worker import Worker
from ccam_deploy.render import COLORMAPS, Look

_FIRST, _SECOND = "collection-cam", "grad-cam"


def make_page(viewer: Viewer, worker: Worker, look: Look, uploads: Path) -> gr.Blocks:
    """Make the page.

    Args:
        viewer: Explains.
        worker: Runs what takes its time.
        look: How maps are drawn unless a visitor chooses otherwise.
        uploads: The folder in which pictures of visitors arrive.
    """
    manifest = viewer.explainer.bundle.manifest
    backend = viewer.explainer.networks.backend
    page = gr.Blocks(
        title=f"ccam-deploy: {manifest.name}",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(KEPT_S, KEPT_S),
    )
    with page:
        gr.HTML(markup.head(manifest.name, backend, _doubts(viewer), viewer.missing))
        parts = _parts(viewer, look)
        Clicks(viewer, worker, uploads, parts).connect()
    return page


def _doubts(viewer: Viewer) -> list[str]:
    manifest = viewer.explainer.bundle.manifest
    random = [f"{RANDOM_WEIGHTS.capitalize()}."]
    return [*manifest.doubts, *(random if manifest.random_weights else [])]


def _parts(viewer: Viewer, look: Look) -> Parts:
    """Put the picture and its classes on the left, and the two methods beside them."""
    content = gr.State(b"", time_to_live=KEPT_S)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=260):
            picture = gr.Image(
                label="Picture",
                sources=["upload", "clipboard"],
                type="filepath",
                height=190,
                elem_id="picture",
                buttons=[],
            )
            classes = gr.Radio([], label="Classes that fit best", elem_id="classes")
            other = gr.Textbox(
                label="Or another class", placeholder="name or number", elem_id="other"
            )
            button = gr.Button("Explain", variant="primary", elem_id="explain")
            with gr.Accordion("Colours", open=False):
                colormap = gr.Dropdown(list(COLORMAPS), value=look.colormap, label="Color map")
                opacity = gr.Slider(0, 1, look.opacity, step=0.05, label="Opacity of the map")
        with gr.Column(scale=9, min_width=520):
            message = gr.HTML("", elem_id="message")
            with gr.Row(equal_height=False):
                sides = tuple(_side(viewer, place) for place in (0, 1))
    return Parts(content, picture, classes, other, button, (colormap, opacity), message, sides)


def _side(viewer: Viewer, place: int) -> Side:
    """A method's list, its options, and the place of its result."""
    names = list(viewer.methods)
    chosen = (_FIRST, _SECOND)[place]
    if chosen not in names:
        chosen = NOTHING if place else names[0]
    with gr.Column(min_width=250):
        method = gr.Dropdown(
            [*names, NOTHING] if place else names,
            value=chosen,
            label=("Method", "Beside it")[place],
            elem_id=f"method-{place + 1}",
        )
        fields: dict[tuple[str, str], Any] = {}
        groups = {}
        with gr.Accordion("Options", open=False, elem_id=f"options-{place + 1}"):
            for name in names:
                with gr.Column(visible=name == chosen) as groups[name]:
                    for field in viewer.fields(name):
                        fields[name, field.name] = _part(field, f"{name}-{field.name}-{place + 1}")
        result = gr.HTML(markup.empty(WAITING), elem_id=f"result-{place + 1}")
    method.change(
        lambda name: [gr.update(visible=name == group) for group in names],
        method,
        list(groups.values()),
        show_progress="hidden",
        api_visibility="private",
    )
    return Side(method, fields, groups, result)


def _part(field: Field, elem_id: str) -> Any:
    """The part of the form for an option."""
    named: dict[str, Any] = {"label": field.name, "info": field.meaning, "elem_id": elem_id}
    if field.kind == "switch":
        return gr.Checkbox(field.default, **named)
    if field.kind in ("choice", "several"):
        choices = [(shown, word) for word, shown in field.choices]
        several = field.kind == "several"
        return gr.Dropdown(choices, value=field.default, multiselect=several, **named)
    return gr.Number(field.default, precision=0 if field.kind == "whole" else None, **named)
