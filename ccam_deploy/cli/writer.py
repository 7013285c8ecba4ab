"""Writes explanations to files."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ccam_deploy import render
from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.explanation import Explanation
from ccam_deploy.files import write_file
from ccam_deploy.preprocess import to_grey_or_rgb
from ccam_deploy.render import Look


@dataclass(frozen=True)
class _Pair:
    """An image and class, and what several kinds of files show of them."""

    result: Explanation
    index: int
    file: Path
    picture: Image.Image
    look: Look

    @cached_property
    def original(self) -> Floats:
        """The map on the original image."""
        return self.result.on_original(self.index)

    @cached_property
    def shown(self) -> tuple[Image.Image, Floats]:
        """Picture and map, no side longer than 1,024 pixels."""
        return render.shrunk(self.picture, self.original)

    @cached_property
    def overlay(self) -> Image.Image:
        """The map over the picture."""
        look = self.look
        return render.overlay(*self.shown, look.colormap, look.opacity, look.bar)


class Writer:
    """Writes the chosen kinds of files for each image and class.

    Names are FILE-CLASS.KIND. Images of one name in several folders get a number, classes of one
    name their own.
    """

    def __init__(self, folder: Path, kinds: Sequence[str], look: Look, manifest: Manifest) -> None:
        self._folder = folder
        self._kinds = kinds
        self._look = look
        self._manifest = manifest
        self._stems: Counter[str] = Counter()
        self._names: Counter[str] = Counter()
        self._words = Counter(_word(label) for label in manifest.labels)

    def write(
        self, result: Explanation, read: Sequence[tuple[Path, Image.Image]]
    ) -> list[list[str]]:
        """Write a batch; returns the paths written for each (image, class) pair."""
        stems = [unused(path.stem, self._stems) for path, _ in read]
        written: list[list[str]] = []
        tiles: list[tuple[str, Image.Image]] = []
        for index in range(len(result)):
            owner = int(result.image_index[index])
            file, picture = read[owner]
            pair = _Pair(result, index, file, to_grey_or_rgb(picture, 3), self._look)
            word = self._class_word(int(result.targets[index]))
            name = unused(f"{stems[owner]}-{word}", self._names)
            paths = [
                self._save(f"{name}.{_SUFFIX[kind]}", self._content(kind, pair))
                for kind in self._kinds
                if kind != "panel"
            ]
            if "panel" in self._kinds:
                tiles.append(self._tile(pair))
                if index + 1 == len(result) or result.image_index[index + 1] != owner:
                    content = render.png(
                        render.panel([("image", render.thumbnail(pair.picture)), *tiles])
                    )
                    paths.append(self._save(f"{stems[owner]}-panel.png", content))
                    tiles = []
            written.append(paths)
        return written

    def _class_word(self, target: int) -> str:
        word = _word(self._manifest.label(target))
        return word if self._words[word] <= 1 else f"{word}-{target}"

    def _save(self, name: str, content: bytes) -> str:
        path = self._folder / name
        write_file(path, content)
        return str(path)

    def _content(self, kind: str, pair: _Pair) -> bytes:
        if kind == "overlay":
            return render.png(pair.overlay)
        if kind == "heatmap":
            return render.png(render.heatmap(pair.shown[1], self._look.colormap, self._look.bar))
        if kind == "npz":
            return _npz(pair)
        return _json(pair.result, pair.index, pair.file, self._manifest)

    def _tile(self, pair: _Pair) -> tuple[str, Image.Image]:
        label = self._manifest.label(int(pair.result.targets[pair.index]))
        caption = f"{label} {pair.result.probability(pair.index):.3f}"
        return caption, render.thumbnail(pair.overlay)


_SUFFIX = {"overlay": "overlay.png", "heatmap": "heatmap.png", "npz": "npz", "json": "json"}


def unused(name: str, taken: Counter[str]) -> str:
    """The name, with a number where it was taken before."""
    free = name
    while taken[free]:
        taken[name] += 1
        free = f"{name}-{taken[name]}"
    taken[free] += 1
    return free


def _word(label: str) -> str:
    """A label as part of a file name."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in label.lower())
    return "-".join(part for part in kept.split("-") if part)[:40] or "class"


def _npz(shown: _Pair) -> bytes:
    """All arrays of one pair; see Explanation for their meaning."""
    result, pair = shown.result, shown.index
    values: dict[str, Any] = {
        "saliency": result.saliency[pair],
        "raw_saliency": result.raw_saliency[pair],
        "original": shown.original,
        "target": result.targets[pair],
        "logits": result.logits[result.image_index[pair]],
        "masks": result.masks[pair],
        "weights": result.weights[pair],
        "mic": result.mic[pair],
    }
    for layer in result.layers:
        values[f"labels.{layer.name}"] = layer.labels[pair]
        values[f"quality.{layer.name}"] = layer.quality[pair]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **values)
    return buffer.getvalue()


def _json(result: Explanation, pair: int, file: Path, manifest: Manifest) -> bytes:
    """Everything but the maps."""
    target = int(result.targets[pair])
    value = {
        "file": str(file),
        "target": target,
        "class": manifest.label(target),
        "probability": result.probability(pair),
        "logit": float(result.logits[result.image_index[pair], target]),
        "layers": {
            layer.name: {
                "collections": int(layer.count[pair]),
                "quality": [float(value) for value in layer.quality[pair]],
            }
            for layer in result.layers
        },
        "weights": [float(value) for value in result.weights[pair]],
        "mic": [float(value) for value in result.mic[pair]],
        "settings": result.settings,
    }
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )
