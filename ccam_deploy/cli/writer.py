"""Writes explanations to files."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ccam_deploy import files, image, render
from ccam_deploy.bundle import Manifest
from ccam_deploy.explainer import Explanation
from ccam_deploy.render import Floats, Look

_LARGEST_SIDE = 1024


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
        stems = [_unused(path.stem, self._stems) for path, _ in read]
        written: list[list[str]] = []
        for pair in range(len(result)):
            owner = int(result.image_index[pair])
            word = self._class_word(int(result.targets[pair]))
            name = _unused(f"{stems[owner]}-{word}", self._names)
            paths = [
                self._save(
                    f"{name}.{_SUFFIX[kind]}", self._content(kind, result, pair, read[owner])
                )
                for kind in self._kinds
                if kind != "panel"
            ]
            last = pair + 1 == len(result) or result.image_index[pair + 1] != owner
            if "panel" in self._kinds and last:
                content = self._panel(result, owner, read[owner][1])
                paths.append(self._save(f"{stems[owner]}-panel.png", content))
            written.append(paths)
        return written

    def _class_word(self, target: int) -> str:
        word = _word(self._manifest.label(target))
        return word if self._words[word] <= 1 else f"{word}-{target}"

    def _save(self, name: str, content: bytes) -> str:
        path = self._folder / name
        files.write(path, content)
        return str(path)

    def _content(
        self, kind: str, result: Explanation, pair: int, read: tuple[Path, Image.Image]
    ) -> bytes:
        if kind == "overlay":
            return _png(self._overlay(result, pair, read[1]))
        if kind == "heatmap":
            saliency = result.on_original(pair)
            return _png(render.heatmap(saliency, self._look.colormap, self._look.bar))
        if kind == "npz":
            return _npz(result, pair)
        return _json(result, pair, read[0], self._manifest)

    def _overlay(self, result: Explanation, pair: int, picture: Image.Image) -> Image.Image:
        shown, saliency = _shrunk(image.to_colours(picture, 3), result.on_original(pair))
        look = self._look
        return render.overlay(shown, saliency, look.colormap, look.opacity, look.bar)

    def _panel(self, result: Explanation, owner: int, picture: Image.Image) -> bytes:
        pairs = np.flatnonzero(result.image_index == owner)
        tiles = [("image", image.to_colours(picture, 3))]
        for pair in pairs:
            label = self._manifest.label(int(result.targets[pair]))
            caption = f"{label} {result.probability(int(pair)):.3f}"
            tiles.append((caption, self._overlay(result, int(pair), picture)))
        return _png(render.panel([(name, _thumbnail(tile)) for name, tile in tiles]))


_SUFFIX = {"overlay": "overlay.png", "heatmap": "heatmap.png", "npz": "npz", "json": "json"}


def _unused(name: str, taken: Counter[str]) -> str:
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


def _shrunk(picture: Image.Image, saliency: Floats) -> tuple[Image.Image, Floats]:
    """Picture and map, scaled down alike where a side is longer than 1,024 pixels."""
    small = _thumbnail(picture)
    if small.size == picture.size:
        return picture, saliency
    scaled = Image.fromarray(saliency).resize(small.size, Image.Resampling.BILINEAR)
    return small, np.asarray(scaled, dtype=np.float32)


def _thumbnail(picture: Image.Image) -> Image.Image:
    longest = max(picture.size)
    if longest <= _LARGEST_SIDE:
        return picture
    scale = _LARGEST_SIDE / longest
    return picture.resize(
        (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    )


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _npz(result: Explanation, pair: int) -> bytes:
    """All arrays of one pair; see Explanation for their meaning."""
    values: dict[str, Any] = {
        "saliency": result.saliency[pair],
        "raw_saliency": result.raw_saliency[pair],
        "original": result.on_original(pair),
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
    np.savez_compressed(buffer, allow_pickle=False, **values)
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
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
