"""What an explanation gives: maps, and the masks and weights behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ccam_deploy import mask_pictures, render
from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.errors import ImageError, OptionError
from ccam_deploy.explanation.drawing import Drawing, panel_of
from ccam_deploy.explanation.files import ExplanationWriter
from ccam_deploy.methods import LayerPartition, MaskSequence
from ccam_deploy.methods.base import no_masks
from ccam_deploy.methods.scores import probabilities
from ccam_deploy.preprocess import Geometry, Source
from ccam_deploy.render import Look, Tile


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
        return Drawing(self, pair, look or Look()).overlay

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
        return Drawing(self, pair, look or Look()).heatmap

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
        tiles = [Drawing(self, int(pair), look or Look()).tile for pair in pairs]
        return panel_of(self, image, tiles)

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
        return render.grid(list(self.mask_tiles(pair, look).values()))

    def mask_tiles(self, pair: int = 0, look: Look | None = None) -> dict[str, list[Tile]]:
        """Draw the pictures of `masks_panel` one by one, each with its caption, by layer.

        Args:
            pair: Which pair.
            look: Color map and opacity of the layers' parts; None for the defaults.

        Raises:
            OptionError: As `masks_panel`.
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
        return {
            layer.name: mask_pictures.mask_tiles(
                image,
                mask_pictures.LayerMasks(
                    layer.name, masks, weights, np.bincount(layer.labels[pair])
                ),
                how,
                look or Look(),
            )
            for layer, masks, weights in parts
        }

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
        IMAGE-panel.png. The name of another method than the default one follows IMAGE-CLASS, or
        IMAGE. Images that share a name get a number from the second on; classes that share a
        name get the number of their class. Files from an earlier call are replaced.

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
