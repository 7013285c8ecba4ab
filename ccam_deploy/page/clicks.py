"""What happens when a visitor drops a picture, or asks for an explanation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ccam_deploy.errors import CcamError, ImageError
from ccam_deploy.page import markup
from ccam_deploy.page.viewer import Viewer
from ccam_deploy.page.worker import Worker
from ccam_deploy.render import Look

NOTHING = "nothing"
"""Stands in the second place for no method."""
WAITING = "The map of the chosen class appears here."
KEPT_S = 3600
"""Seconds for which a visitor's picture is kept."""
_ALONE = "Choose a method above to see its map beside the other."


@dataclass(frozen=True)
class Side:
    """One of the two methods side by side.

    Attributes:
        method: The list of methods.
        fields: The parts of the form, by method and option.
        groups: The fields of a method, of which one method's are shown.
        result: Where its map appears.
    """

    method: Any
    fields: Mapping[tuple[str, str], Any]
    groups: Mapping[str, Any]
    result: Any


@dataclass(frozen=True)
class Parts:
    """The page's parts.

    Attributes:
        content: Holds the bytes of the visitor's picture, on the server.
        picture: Where it is dropped.
        classes: The classes to choose from.
        other: Where another class is typed.
        button: Asks for an explanation.
        look: The color map and its opacity.
        message: Tells what went wrong.
        sides: The two methods.
    """

    content: Any
    picture: Any
    classes: Any
    other: Any
    button: Any
    look: tuple[Any, Any]
    message: Any
    sides: tuple[Side, ...]


class Clicks:
    """Answers the events of a page.

    Args:
        viewer: Explains.
        worker: Runs what takes its time.
        uploads: The folder in which pictures of visitors arrive.
        parts: The page's parts.
    """

    def __init__(self, viewer: Viewer, worker: Worker, uploads: Path, parts: Parts) -> None:
        self._viewer, self._worker = viewer, worker
        self._uploads = uploads.resolve()
        self._parts = parts

    def connect(self) -> None:
        """Tell Gradio which function answers which event; to be called inside of the page."""
        parts = self._parts
        results = [side.result for side in parts.sides]
        shown = [parts.message, *results]
        inputs = [parts.content, parts.classes, parts.other, *parts.look]
        for side in parts.sides:
            inputs += [side.method, *side.fields.values()]
        started = [parts.content, parts.classes, parts.other, *shown]
        quiet: dict[str, Any] = {"api_visibility": "private"}
        arrived = parts.picture.upload(
            self.take,
            parts.picture,
            started,
            preprocess=False,  # which would open the file before its size is known
            show_progress="minimal",
            **quiet,
        )
        explaining: dict[str, Any] = {"fn": self.explain, "inputs": inputs, "outputs": shown}
        explaining |= {"show_progress": "minimal", "show_progress_on": results, **quiet}
        arrived.success(**{**explaining, "fn": self.explain_arrived})
        parts.button.click(**explaining)
        parts.other.submit(**explaining)
        parts.classes.select(lambda: "", None, parts.other, show_progress="hidden", **quiet)
        parts.picture.clear(self.forget, None, started, **quiet)

    def forget(self) -> list[Any]:
        """Empty the page."""
        return [b"", gr.update(choices=[], value=None), "", "", *self._cleared]

    def take(self, upload: Any) -> list[Any]:
        """Read a picture that arrived, and rank its classes."""
        try:
            content = self._read(upload)
            viewer = self._viewer
            ranking = self._worker.call(lambda: viewer.ranking(viewer.picture(content)))
        except CcamError as error:
            content, classes, typed, _, *cleared = self.forget()
            return [content, classes, typed, markup.error(str(error)), *cleared]
        probable = self._viewer.has_probabilities
        choices = [(markup.choice(ranked, probable), str(ranked.number)) for ranked in ranking]
        classes = gr.update(choices=choices, value=choices[0][1])
        return [content, classes, "", "", *self._cleared]

    def explain(
        self, content: bytes, chosen: str, typed: str, colormap: str, opacity: float, *forms: Any
    ) -> Iterator[list[Any]]:
        """Explain with both methods, and show the first while the second runs."""
        shown = list(self._cleared)
        try:
            if not content:
                raise ImageError("there is no picture yet; drop one on the left")
            picture = self._viewer.picture(content)
            target = self._viewer.class_number(str(chosen or ""), str(typed or ""))
            look = Look(str(colormap), float(opacity))
            for place, (method, values) in enumerate(self._forms(forms)):
                shown[place] = self._result(picture, target, look, method, values)
                yield ["", *shown]
        except CcamError as error:
            yield [markup.error(str(error)), *shown]

    def explain_arrived(self, content: bytes, *forms: Any) -> Iterator[list[Any]]:
        """Explain a picture that just arrived; what was wrong with it stays on the page."""
        if content:
            yield from self.explain(content, *forms)
        else:
            yield [gr.skip() for _ in (self._parts.message, *self._parts.sides)]

    @property
    def _cleared(self) -> list[str]:
        return [markup.empty(WAITING) for _ in self._parts.sides]

    def _read(self, upload: Any) -> bytes:
        """The bytes of a file that a visitor sent, and of no other."""
        named = str(upload.get("path") if isinstance(upload, dict) else "")
        path = Path(os.path.realpath(named.replace("\0", "")))
        if not path.is_relative_to(self._uploads) or not path.is_file():
            raise ImageError("the picture did not arrive; drop it again")
        return path.read_bytes()

    def _forms(self, values: tuple[Any, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The method of each side, and the values of its options, of all parts of the forms."""
        rest = iter(values)
        for side in self._parts.sides:
            chosen = str(next(rest))
            form = {key: next(rest) for key in side.fields}
            yield chosen, {option: form[m, option] for m, option in form if m == chosen}

    def _result(
        self, picture: Image.Image, target: int, look: Look, method: str, values: dict[str, Any]
    ) -> str:
        """The HTML of one side."""
        if method == NOTHING:
            return markup.empty(_ALONE)
        viewer = self._viewer

        def work() -> str:
            view = viewer.explain(picture, target, method, values)
            return markup.result(view, look, viewer.has_probabilities, viewer.fields(method))

        return self._worker.call(work)
