"""Sanity check of a method: do its maps change when the network's parameters are randomised?

Adebayo et al. 2018, "Sanity checks for saliency maps": cascading, from the last layer down, and
each layer alone. A map that stays alike shows the image, not what the network learned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from ccam_deploy import render
from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.engines import Classifier
from ccam_deploy.errors import OptionError
from ccam_deploy.fidelity.similarity import WINDOW, hog_similarity, spearman, ssim
from ccam_deploy.methods import Batch, Method, Stopwatch
from ccam_deploy.render import Look, Tile

Mode = Literal["cascading", "independent"]
_TILE = 128
_CHUNK = 8

DEFINITIONS = {
    "maps": "of the class that the trained network gives an image, scaled to [0, 1]",
    "cascading": "all layers from the last one down to this one are random, as in Adebayo et al. "
    "2018, whose first stage is the classifier's layer",
    "independent": "this layer alone is random",
    "random": "weights from a normal distribution of the variance 2 / fan-in (He et al. 2015); "
    "biases and running means 0, scales and running variances 1",
    "spearman": "mean over the images of the absolute value of Spearman's rank correlation with "
    "the trained network's map: a map turned upside down counts as the same. (Adebayo et al. take "
    "absolute values of the maps instead)",
    "ssim": "mean structural similarity (Wang et al. 2004), 7×7 uniform window, data range 1",
    "hog": "mean correlation of histograms of oriented gradients: 9 orientations, cells of 16×16 "
    "pixels, smaller on small maps, blocks of 3×3 cells",
}
"""The meaning of the words in a result."""


class Randomisable(Classifier, Protocol):
    """A classifier whose layers can be randomised."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the layers with parameters, from the last one down."""
        ...

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the target layers."""
        ...

    def randomise(self, parts: Collection[str]) -> None:
        """Give some layers random parameters, and all others their trained ones."""
        ...


@dataclass(frozen=True)
class Stage:
    """The similarity of a randomised network's maps to the trained network's.

    Attributes:
        mode: "cascading" where all layers from the last one down to `layer` are random,
            "independent" where `layer` alone is.
        layer: The layer's name.
        spearman: Mean over the images of the absolute rank correlation, in [0, 1].
        ssim: Mean structural similarity, in [-1, 1].
        hog: Mean correlation of histograms of oriented gradients, in [-1, 1].
        maps: [B, H, W] float32 in [0, 1].
    """

    mode: Mode
    layer: str
    spearman: float
    ssim: float
    hog: float
    maps: Floats


@dataclass(frozen=True)
class SanityCheck:
    """The result of a sanity check.

    Attributes:
        targets: [B] int64, the class explained of each image.
        trained: [B, H, W] float32 in [0, 1], the maps of the trained network.
        stages: Every stage, cascading ones first.
    """

    targets: Classes
    trained: Floats
    stages: tuple[Stage, ...]

    def of(self, mode: Mode) -> list[Stage]:
        """Select the stages of one mode, from the last layer down."""
        return [stage for stage in self.stages if stage.mode == mode]


def compare_randomised(
    classifier: Randomisable,
    images: Floats,
    method: Method,
    limit: int | None = None,
    progress: Callable[[], None] = lambda: None,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    activation: Activation = "softmax",
) -> SanityCheck:
    """Explain images with the trained network and in every stage of randomisation.

    The classifier has its trained parameters again afterwards.

    Args:
        classifier: The network.
        images: [B, C, H, W] float32, preprocessed; each is explained for the class that the
            trained network gives it.
        method: The explanation method.
        limit: How many layers to randomise, from the last one down; None for all.
        progress: Called after each stage, twice for each layer.
        mean: Per channel, as the images were normalised.
        std: Per channel, as the images were normalised.
        activation: What makes probabilities of the logits.

    Returns:
        The trained network's maps and every stage.

    Raises:
        OptionError: The images are smaller than the window of SSIM.
    """
    if min(images.shape[2:]) < WINDOW:
        height, width = images.shape[2:]
        raise OptionError(f"the input is {height}x{width}; SSIM needs {WINDOW}x{WINDOW} or more")

    def explain() -> Floats:
        """Explain each image for its class: [B, H, W] in [0, 1]."""
        activations = classifier.backbone(images)
        baseline = classifier.backbone(np.zeros_like(images[:1])).logits[0]
        owner = np.arange(len(images), dtype=np.int64)
        layers = classifier.layers
        facts = activations, owner, targets, layers, baseline
        batch = Batch(images, *facts, _CHUNK, mean, std, activation)
        return method.explain(classifier, batch, Stopwatch()).saliency

    targets: Classes = classifier.backbone(images).logits.argmax(axis=1)
    trained = explain()
    stages = []
    try:
        for mode, layer, random in _plan(classifier.parts[:limit]):
            classifier.randomise(random)
            maps = explain()
            stages.append(Stage(mode, layer, *_agreement(maps, trained), maps))
            progress()
    finally:
        classifier.randomise(())
    return SanityCheck(targets, trained, tuple(stages))


def _plan(parts: Sequence[str]) -> list[tuple[Mode, str, tuple[str, ...]]]:
    """Each stage's mode, layer and all layers that are random in it."""
    plan: list[tuple[Mode, str, tuple[str, ...]]] = [
        ("cascading", part, tuple(parts[: number + 1])) for number, part in enumerate(parts)
    ]
    return [*plan, *(("independent", part, (part,)) for part in parts)]


def picture(
    result: SanityCheck, pictures: Sequence[Image.Image], captions: Sequence[str], look: Look
) -> Image.Image:
    """Draw the maps of images in a grid like the paper's Figure 8.

    Args:
        result: The check.
        pictures: The first images of the check, of the maps' size.
        captions: One for each picture.
        look: The maps' colours.

    Returns:
        Two rows for each image: the trained network's map, then each stage of cascading and of
        independent randomisation.
    """
    rows = []
    for number, (shown, caption) in enumerate(zip(pictures, captions, strict=True)):
        for mode in ("cascading", "independent"):
            stages = result.of(mode)
            maps = [("trained", result.trained), *((s.layer, s.maps) for s in stages)]
            row: list[Tile] = [(f"{caption}, {mode}", shown)]
            for name, values in maps:
                tile = render.overlay(shown, values[number], look.colormap, look.opacity)
                row.append((name, tile))
            rows.append(row)
    return render.grid(rows, _TILE)


def _agreement(maps: Floats, trained: Floats) -> tuple[float, float, float]:
    """The mean similarities of maps; see Stage."""
    pairs = list(zip(maps, trained, strict=True))
    return (
        float(np.mean([abs(spearman(*pair)) for pair in pairs])),
        float(np.mean([ssim(*pair) for pair in pairs])),
        float(np.mean([hog_similarity(*pair) for pair in pairs])),
    )
