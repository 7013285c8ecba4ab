"""Files of explanations: their names, and what is in them."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ccam_deploy import render
from ccam_deploy.errors import OptionError
from ccam_deploy.explanation.drawing import Drawing, panel_of
from ccam_deploy.files import short_stem, unused, write_file
from ccam_deploy.methods import DEFAULT_METHOD
from ccam_deploy.render import Look, Tile

if TYPE_CHECKING:
    from ccam_deploy.explanation.result import Explanation

FORMATS = ("overlay", "heatmap", "panel", "masks", "npz", "json")
_PICTURES = ("overlay", "heatmap", "masks")


class ExplanationWriter:
    """Writes files of the chosen formats for each image and class.

    Files are named as Explanation.save says; names are told apart across calls of `write`.

    Args:
        folder: Where files are written.
        formats: Some of FORMATS.
        look: Color map, opacity and color bar; None for the defaults.

    Raises:
        OptionError: A format is unknown.
    """

    def __init__(
        self, folder: str | Path, formats: Sequence[str] = ("overlay",), look: Look | None = None
    ) -> None:
        for name in formats:
            if name not in FORMATS:
                raise OptionError(f'format "{name}" is unknown; there are {", ".join(FORMATS)}')
        self._folder = Path(folder)
        self._formats = tuple(formats)
        self._look = look or Look()
        self._stems: Counter[str] = Counter()
        self._names: Counter[str] = Counter()

    def write(
        self, explanation: Explanation, names: Sequence[str | Path] | None = None
    ) -> list[list[Path]]:
        """Write the files of an explanation.

        Args:
            explanation: What to write.
            names: The images' file names; None for those of the PIL images' files.

        Returns:
            The paths written for each pair; an image's panel stands with its last pair.

        Raises:
            OptionError: There are not as many names as images, or the method keeps no masks.
            OutputError: A file cannot be written.
        """
        files = _file_names(explanation) if names is None else list(map(str, names))
        if len(files) != len(explanation.logits):
            raise OptionError(f"there are {len(files)} names for {len(explanation.logits)} images")
        if "masks" in self._formats:
            explanation.require_masks()
        stems = [unused(short_stem(file), self._stems) for file in files]
        method = _method_word(explanation)
        written = []
        tiles: list[Tile] = []
        for pair, image in enumerate(map(int, explanation.image_index)):
            drawing = Drawing(explanation, pair, self._look)
            name = f"{stems[image]}-{_class_word(explanation, pair)}{method}"
            name = unused(name, self._names)
            paths = [
                self._save(f"{name}.{_suffix(form)}", _content(form, drawing, files[image]))
                for form in self._formats
                if form != "panel"
            ]
            if "panel" in self._formats:
                tiles.append(drawing.tile)
                if pair + 1 == len(explanation) or explanation.image_index[pair + 1] != image:
                    content = render.png(panel_of(explanation, image, tiles))
                    paths.append(self._save(f"{stems[image]}{method}-panel.png", content))
                    tiles = []
            written.append(paths)
        return written

    def _save(self, name: str, content: bytes) -> Path:
        path = self._folder / name
        write_file(path, content)
        return path


def _suffix(form: str) -> str:
    return f"{form}.png" if form in _PICTURES else form


def _content(form: str, drawing: Drawing, file: str) -> bytes:
    """The content of a pair's file in one of FORMATS but "panel"."""
    if form == "overlay":
        return render.png(drawing.overlay)
    if form == "heatmap":
        return render.png(drawing.heatmap)
    if form == "masks":
        return render.png(drawing.explanation.masks_panel(drawing.pair, drawing.look))
    if form == "npz":
        return _npz(drawing)
    return _json(drawing.explanation, drawing.pair, file)


def _file_names(explanation: Explanation) -> list[str]:
    images = explanation.source.images
    return [
        getattr(image, "filename", "") or f"image-{number + 1}"
        for number, image in enumerate(images)
    ]


def _method_word(explanation: Explanation) -> str:
    """What tells files of another method than the default one from its files."""
    method = explanation.settings.get("method", DEFAULT_METHOD)
    return "" if method == DEFAULT_METHOD else f"-{method}"


def _class_word(explanation: Explanation, pair: int) -> str:
    """The class as part of a file name, with its number where another class has the same."""
    words = Counter(_word(label) for label in explanation.source.manifest.labels)
    word = _word(explanation.labels[pair])
    return word if words[word] <= 1 else f"{word}-{explanation.targets[pair]}"


def _word(label: str) -> str:
    """A label as part of a file name."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in label.lower())
    return "-".join(part for part in kept.split("-") if part)[:40] or "class"


def _npz(drawing: Drawing) -> bytes:
    """All arrays of one pair; see Explanation for their meaning."""
    explanation, pair = drawing.explanation, drawing.pair
    values: dict[str, Any] = {
        "saliency": explanation.saliency[pair],
        "raw_saliency": explanation.raw_saliency[pair],
        "target": explanation.targets[pair],
        "logits": explanation.logits[explanation.image_index[pair]],
        "masks": explanation.masks[pair],
        "weights": explanation.weights[pair],
        "mic": explanation.mic[pair],
    }
    if explanation.geometries:
        values["original"] = drawing.map
    for layer in explanation.layers:
        values[f"labels.{layer.name}"] = layer.labels[pair]
        values[f"quality.{layer.name}"] = layer.quality[pair]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **values)
    return buffer.getvalue()


def _json(explanation: Explanation, pair: int, file: str) -> bytes:
    """Everything but the maps."""
    target = int(explanation.targets[pair])
    value = {
        "file": file,
        "target": target,
        "class": explanation.labels[pair],
        "probability": explanation.probability(pair),
        "logit": float(explanation.logits[explanation.image_index[pair], target]),
        "layers": {
            layer.name: {
                "collections": int(layer.count[pair]),
                "quality": [float(value) for value in layer.quality[pair]],
            }
            for layer in explanation.layers
        },
        "weights": [float(value) for value in explanation.weights[pair]],
        "mic": [float(value) for value in explanation.mic[pair]],
        "settings": explanation.settings,
    }
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )
