"""Sanity check of a method: do its maps change when the network's parameters are randomised?

Adebayo et al. 2018, "Sanity checks for saliency maps": cascading, from the last layer down, and of
each layer on its own. A map that stays alike shows the image, not what the network learned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ccam_deploy import render
from ccam_deploy.arrays import Floats
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
"""What the words of a result stand for."""


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
        """Give some layers random parameters, and all others what was trained."""
        ...


@dataclass(frozen=True)
class Stage:
    """How alike the maps of a randomised network are to the trained one's.

    mode: "cascading" where all layers from the last one down to `layer` are random, "independent"
        where `layer` alone is.
    spearman: mean over the images of the rank correlation's absolute value.   ssim, hog: means of
        the structural similarity, and of the correlation of histograms of oriented gradients.
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
    """What a check found, cascading stages first.

    targets: [B], the class explained of each image.
    trained: [B, H, W] float32 in [0, 1], the maps of the trained network.
    """

    targets: NDArray[np.int64]
    trained: Floats
    stages: tuple[Stage, ...]

    def of(self, mode: Mode) -> list[Stage]:
        """The stages of one mode, from the last layer down."""
        return [stage for stage in self.stages if stage.mode == mode]


def check(
    classifier: Randomisable,
    images: Floats,
    method: Method,
    limit: int | None = None,
    progress: Callable[[], None] = lambda: None,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> SanityCheck:
    """Explain images with the network as it is and in every stage of randomisation.

    images: [B, C, H, W] float32, preprocessed; each is explained for the class that the trained
        network gives it.
    limit: how many layers to randomise, from the last one down; all by default.
    progress: called after each stage, two for each layer.
    mean, std: per channel, that the images were normalised with.
    The classifier has what was trained afterwards.
    Raises OptionError for images smaller than the window of SSIM.
    """
    if min(images.shape[2:]) < WINDOW:
        height, width = images.shape[2:]
        raise OptionError(f"the input is {height}x{width}; SSIM needs {WINDOW}x{WINDOW} or more")

    def explain() -> Floats:
        """Each image's map for its class, [B, H, W] in [0, 1]."""
        activations = classifier.backbone(images)
        baseline = classifier.backbone(np.zeros_like(images[:1])).logits[0]
        owner = np.arange(len(images), dtype=np.int64)
        layers = classifier.layers
        batch = Batch(
            images, activations, owner, targets, layers, baseline, _CHUNK, mean=mean, std=std
        )
        return method.explain(classifier, batch, Stopwatch()).saliency

    targets: NDArray[np.int64] = classifier.backbone(images).logits.argmax(axis=1)
    trained = explain()
    parts = classifier.parts[:limit]
    wanted: list[tuple[Mode, str, tuple[str, ...]]] = [
        ("cascading", part, parts[: number + 1]) for number, part in enumerate(parts)
    ]
    wanted += [("independent", part, (part,)) for part in parts]
    stages = []
    try:
        for mode, layer, random in wanted:
            classifier.randomise(random)
            maps = explain()
            stages.append(Stage(mode, layer, *_agreement(maps, trained), maps))
            progress()
    finally:
        classifier.randomise(())
    return SanityCheck(targets, trained, tuple(stages))


def picture(
    result: SanityCheck, pictures: Sequence[Image.Image], captions: Sequence[str], look: Look
) -> Image.Image:
    """The maps of some images in a picture like the paper's Figure 8.

    pictures: the first images of the check, of the maps' size.   captions: one for each.
    Each image has two rows: trained, then each stage of cascading or of independent randomisation.
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
    pairs = list(zip(maps, trained, strict=True))
    return (
        float(np.mean([abs(spearman(one, other)) for one, other in pairs])),
        float(np.mean([ssim(one, other) for one, other in pairs])),
        float(np.mean([hog_similarity(one, other) for one, other in pairs])),
    )
