"""Pictures of an explanation's maps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from PIL import Image

from ccam_deploy import render
from ccam_deploy.arrays import Floats
from ccam_deploy.render import Look, Tile

if TYPE_CHECKING:
    from ccam_deploy.explanation.result import Explanation


class Drawing:
    """Pictures of one pair, which share its map: enlarging that takes most of their time.

    Args:
        explanation: What the pair belongs to.
        pair: Which of its pairs.
        look: Color map, opacity and color bar.
    """

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


def panel_of(explanation: Explanation, image: int, tiles: Sequence[Tile]) -> Image.Image:
    """Draw an image beside pictures of its maps.

    Args:
        explanation: What it belongs to.
        image: Which image, 0 to B - 1.
        tiles: The pictures; see Drawing.
    """
    shown = render.thumbnail(explanation.source.picture(image))
    return render.panel([("image", shown), *tiles])
