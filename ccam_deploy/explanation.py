"""The result of an explanation: maps, the masks and weights behind them, and pictures."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ccam_deploy import mask_pictures, render
from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.errors import ImageError, OptionError
from ccam_deploy.files import unused, write_file
from ccam_deploy.methods import LayerPartition, MaskSequence
from ccam_deploy.methods.base import no_masks
from ccam_deploy.methods.scores import probabilities
from ccam_deploy.preprocess import Geometry, Source
from ccam_deploy.render import Look, Tile

FORMATS = ("overlay", "heatmap", "panel", "masks", "npz", "json")
_PICTURES = ("overlay", "heatmap", "masks")


@dataclass(frozen=True)
class Explanation:
    """Saliency maps for P (image, class) pairs of B images, image by image.

    `explanation[3]` is the explanation of the fourth pair alone, `explanation[:2]` that of the
    first two; iterating gives the pairs one by one. A method's argument `pair` counts from 0.

    Only Collection-CAM gives layers, masks, weights and mic. Score-CAM gives the weight and the
    increase of confidence (mic) of each channel. Values that a method does not give have length 0.

    Attributes:
        saliency: [P, H, W] float32, each map scaled to [0, 1].
        raw_saliency: [P, H, W] float32, as the method defines it.
        targets: [P] int64, each map's class.
        image_index: [P] int64, each map's image; with one class per image, 0 to B - 1.
        logits: [B, classes] float32, of the images without a mask.
        layers: Each target layer's collections.
        masks: For each pair [N, H, W] float32 in [0, 1], its N masks, from the shallowest layer
            to the deepest.
        weights: For each pair [N] float32, the masks' weights α; 0 for a flat mask.
        mic: For each pair [N] float32, the masks' increase of confidence over the baseline.
        timings: Seconds in each stage.
        settings: The method, its options and the engine behind the result, and the budget of a
            call that had one; see methods.collection_cam.cost.Budget.
        source: The images that were explained, by reference.
    """

    saliency: Floats
    raw_saliency: Floats
    targets: Classes
    image_index: Classes
    logits: Floats
    layers: tuple[LayerPartition, ...]
    masks: MaskSequence
    weights: tuple[Floats, ...]
    mic: tuple[Floats, ...]
    timings: dict[str, float]
    settings: dict[str, Any]
    source: Source = field(repr=False)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, pairs: int | slice) -> Explanation:
        if isinstance(pairs, slice):
            return self._take(np.arange(len(self))[pairs])
        if not -len(self) <= pairs < len(self):
            raise IndexError(f"pair {pairs} is out of range; the explanation has {len(self)} pairs")
        return self._take(np.array([pairs % len(self)]))

    def __iter__(self) -> Iterator[Explanation]:
        return (self[pair] for pair in range(len(self)))

    @property
    def geometries(self) -> tuple[Geometry, ...]:
        """Where each image's input lies in its picture; empty for array input."""
        return self.source.geometries

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each pair's class, its number where the bundle has no names."""
        return tuple(self.source.manifest.label(int(target)) for target in self.targets)

    def probability(self, pair: int = 0) -> float:
        """Give the probability of a pair's class; the output itself if the activation is none."""
        logits = self.logits[self.image_index[pair]].astype(np.float64)
        activation = self.source.manifest.probabilities_by
        return float(probabilities(logits[None], activation)[0, self.targets[pair]])

    def on_original(self, pair: int = 0) -> Floats:
        """Bring a pair's saliency to the original image.

        Returns:
            [height, width] float32 of the picture, in [0, 1]; 0 where the network saw nothing.

        Raises:
            ImageError: The explanation was made from an array.
        """
        if not self.geometries:
            raise ImageError("the explanation was made from an array, which has no original image")
        return self.geometries[int(self.image_index[pair])].to_original(self.saliency[pair])

    def picture(self, pair: int = 0) -> Image.Image:
        """Give a pair's image as an RGB picture, restored where an array was explained."""
        return self.source.picture(int(self.image_index[pair]))

    def overlay(self, pair: int = 0, look: Look | None = None) -> Image.Image:
        """Draw a pair's map over its picture.

        What a centre crop cut off stays as it is, around a thin frame.

        Args:
            pair: Which pair.
            look: Color map, opacity and color bar; None for the defaults.

        Returns:
            An RGB picture, no side longer than 1,024 pixels (and the color bar).

        Raises:
            OptionError: The color map is unknown, or the opacity is out of range.
        """
        return _Drawing(self, pair, look or Look()).overlay

    def heatmap(self, pair: int = 0, look: Look | None = None) -> Image.Image:
        """Draw a pair's map alone, of the picture's size.

        What a centre crop cut off is light grey, around a thin frame.

        Args:
            pair: Which pair.
            look: Color map and color bar; None for the defaults.

        Returns:
            An RGB picture, no side longer than 1,024 pixels (and the color bar).

        Raises:
            OptionError: The color map is unknown.
        """
        return _Drawing(self, pair, look or Look()).heatmap

    def panel(self, image: int = 0, look: Look | None = None) -> Image.Image:
        """Draw an image beside the maps of all its classes, with names and probabilities.

        Args:
            image: Which image, 0 to B - 1.
            look: Color map, opacity and color bar; None for the defaults.

        Raises:
            OptionError: The explanation has no such image, the color map is unknown, or the
                opacity is out of range.
        """
        pairs = np.flatnonzero(self.image_index == image)
        if not len(pairs):
            raise OptionError(
                f"image is {image}; the explanation has images 0 to {len(self.logits) - 1}"
            )
        drawings = [_Drawing(self, int(pair), look or Look()) for pair in pairs]
        return self._panel(image, [drawing.tile for drawing in drawings])

    def masks_panel(self, pair: int = 0, look: Look | None = None) -> Image.Image:
        """Draw the masks of a pair on what the network saw, those of a layer in a row.

        A row starts with the layer's part of the map, captioned with the layer and the sum of its
        masks' weights. Then come its masks, the heaviest first: the image under the mask as the
        classifier gets it, with the mask's weight and how many channels it is made of.

        Args:
            pair: Which pair.
            look: Color map and opacity of the layers' parts; None for the defaults.

        Raises:
            OptionError: The method keeps no masks, the color map is unknown, or the opacity is out
                of range.
        """
        self.require_masks()
        image = self.source.network_input(int(self.image_index[pair]))
        how = self.source.manifest.preprocessing
        ends = np.cumsum([layer.count[pair] for layer in self.layers])[:-1]
        parts = zip(
            self.layers,
            np.split(self.masks[pair], ends),
            np.split(self.weights[pair], ends),
            strict=True,
        )
        rows = [
            mask_pictures.LayerMasks(layer.name, masks, weights, np.bincount(layer.labels[pair]))
            for layer, masks, weights in parts
        ]
        return mask_pictures.masks_grid(image, rows, how, look or Look())

    def require_masks(self) -> None:
        """Raise OptionError for an explanation by a method that keeps no masks."""
        if not self.layers:
            raise no_masks(str(self.settings["method"]))

    def save(
        self,
        folder: str | Path,
        formats: Sequence[str] = ("overlay",),
        look: Look | None = None,
        names: Sequence[str | Path] | None = None,
    ) -> list[list[Path]]:
        """Write files for each pair.

        Files are named IMAGE-CLASS.FORMAT, such as cat-tabby.overlay.png, and an image's panel
        IMAGE-panel.png. Images that share a name get a number from the second on; classes that
        share a name get the number of their class. Files from an earlier call are replaced.

        Args:
            folder: Where to write; a missing folder is made.
            formats: Some of "overlay", "heatmap", "panel", "masks", "npz" and "json".
            look: Color map, opacity and color bar; None for the defaults.
            names: File names of the images, after which the files are named; None for those of
                the PIL images' files, or "image-1" and so on.

        Returns:
            The paths written for each pair; an image's panel stands with its last pair.

        Raises:
            OptionError: A format is unknown, or the method keeps no masks to draw.
            OutputError: A file cannot be written.
        """
        return ExplanationWriter(folder, formats, look).write(self, names)

    def _panel(self, image: int, tiles: Sequence[Tile]) -> Image.Image:
        return render.panel([("image", render.thumbnail(self.source.picture(image))), *tiles])

    def _take(self, pairs: NDArray[np.intp]) -> Explanation:
        images, owner = np.unique(self.image_index[pairs], return_inverse=True)
        return replace(
            self,
            saliency=self.saliency[pairs],
            raw_saliency=self.raw_saliency[pairs],
            targets=self.targets[pairs],
            image_index=owner.astype(np.int64),
            logits=self.logits[images],
            layers=tuple(layer.take(pairs) for layer in self.layers),
            masks=self.masks.take(pairs),
            weights=tuple(self.weights[pair] for pair in pairs),
            mic=tuple(self.mic[pair] for pair in pairs),
            source=self.source.take(images.tolist()),
        )


class _Drawing:
    """Pictures of one pair, which share its map: enlarging that takes most of their time."""

    def __init__(self, explanation: Explanation, pair: int, look: Look) -> None:
        self.explanation = explanation
        self.pair = pair
        self.look = look

    @cached_property
    def map(self) -> Floats:
        """The map at the size of the picture that was explained."""
        if self.explanation.geometries:
            return self.explanation.on_original(self.pair)
        saliency: Floats = self.explanation.saliency[self.pair]
        return saliency

    @cached_property
    def shown(self) -> tuple[Image.Image, Floats]:
        """Picture and map, no side longer than 1,024 pixels."""
        return render.shrunk(self.explanation.picture(self.pair), self.map)

    @cached_property
    def overlay(self) -> Image.Image:
        """The map over the picture."""
        look = self.look
        return render.overlay(*self.shown, look.colormap, look.opacity, look.bar, self._seen)

    @property
    def heatmap(self) -> Image.Image:
        """The map alone."""
        return render.heatmap(self.shown[1], self.look.colormap, self.look.bar, self._seen)

    @property
    def tile(self) -> Tile:
        """The overlay in a panel, with the class and its probability."""
        label, probability = self.explanation.labels[self.pair], self.explanation.probability
        return f"{label} {probability(self.pair):.3f}", render.thumbnail(self.overlay)

    @property
    def _seen(self) -> render.Box | None:
        """The part of the shown picture that the network saw; None for all of it."""
        if not self.explanation.geometries:
            return None
        image = int(self.explanation.image_index[self.pair])
        return self.explanation.geometries[image].seen_in(self.shown[0].size)


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
        stems = [unused(Path(file).stem, self._stems) for file in files]
        written = []
        tiles: list[Tile] = []
        for pair, image in enumerate(map(int, explanation.image_index)):
            drawing = _Drawing(explanation, pair, self._look)
            name = unused(f"{stems[image]}-{_class_word(explanation, pair)}", self._names)
            paths = [
                self._save(f"{name}.{_suffix(form)}", _content(form, drawing, files[image]))
                for form in self._formats
                if form != "panel"
            ]
            if "panel" in self._formats:
                tiles.append(drawing.tile)
                if pair + 1 == len(explanation) or explanation.image_index[pair + 1] != image:
                    content = render.png(explanation._panel(image, tiles))
                    paths.append(self._save(f"{stems[image]}-panel.png", content))
                    tiles = []
            written.append(paths)
        return written

    def _save(self, name: str, content: bytes) -> Path:
        path = self._folder / name
        write_file(path, content)
        return path


def _suffix(form: str) -> str:
    return f"{form}.png" if form in _PICTURES else form


def _content(form: str, drawing: _Drawing, file: str) -> bytes:
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


def _class_word(explanation: Explanation, pair: int) -> str:
    """The class as part of a file name, with its number where another class has the same."""
    words = Counter(_word(label) for label in explanation.source.manifest.labels)
    word = _word(explanation.labels[pair])
    return word if words[word] <= 1 else f"{word}-{explanation.targets[pair]}"


def _word(label: str) -> str:
    """A label as part of a file name."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in label.lower())
    return "-".join(part for part in kept.split("-") if part)[:40] or "class"


def _npz(drawing: _Drawing) -> bytes:
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
