"""Batches to measure, and the floor: the engines' passes that no explanation can do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from PIL import Image

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.errors import OptionError
from ccam_deploy.explainer import Explainer
from ccam_deploy.latency.timing import Call
from ccam_deploy.methods import CollectionCAM

MOST_IMAGES = 64


@dataclass(frozen=True)
class Case:
    """A batch that is explained, and what its explanation needs of the engines.

    Attributes:
        pictures: B images.
        images: [B, C, H, W] float32, the same preprocessed.
        targets: [B] int64, the class that is explained of each image.
        logits: [B, classes] float32.
        masks: [N, H, W] float32 in [0, 1], all masks that are not flat.
        owner: [N] int64, the image of each mask.
        collections: How many collections each layer has in each image, by layer.
    """

    pictures: Sequence[Image.Image]
    images: Floats
    targets: Classes
    logits: Floats
    masks: Floats
    owner: Classes
    collections: Mapping[str, list[int]]


Peer = Callable[[Case], object]
"""Explains a case's preprocessed images in another way."""


def make_cases(
    explainer: Explainer,
    pictures: Sequence[Image.Image],
    batch: int,
    enough: Callable[[], bool] = lambda: False,
) -> list[Case]:
    """Cut pictures into batches, the last one filled up from the start.

    Args:
        explainer: Explains each batch once, to learn its masks.
        pictures: 1 to MOST_IMAGES images.
        batch: Images in a batch, at least 1.
        enough: Asked after each case; the cases end where it returns True.

    Returns:
        One case at least. Together they hold every picture, if there was never enough.

    Raises:
        OptionError: There are no or too many pictures.
        ImageError: A picture cannot be preprocessed.
    """
    if not 1 <= len(pictures) <= MOST_IMAGES:
        raise OptionError(f"there are {len(pictures)} images; give 1 to {MOST_IMAGES}")
    endless = cycle(pictures)
    cases: list[Case] = []
    for _ in range(count_cases(len(pictures), batch)):
        cases.append(_make_case(explainer, [next(endless) for _ in range(batch)]))
        if enough():
            break
    return cases


def count_cases(pictures: int, batch: int) -> int:
    """Count the batches that hold some number of pictures."""
    return -(-pictures // batch)


def _make_case(explainer: Explainer, pictures: Sequence[Image.Image]) -> Case:
    images, _ = explainer.preprocess(pictures)
    result = explainer.explain(images)
    masks = [sequence[sequence.any(axis=(1, 2))] for sequence in result.masks]
    return Case(
        pictures,
        images,
        result.targets,
        result.logits,
        np.concatenate(masks),
        np.repeat(np.arange(len(images)), [len(kept) for kept in masks]),
        {layer.name: [int(count) for count in layer.count] for layer in result.layers},
    )


def floor_call(explainer: Explainer, case: Case) -> Call:
    """Make a call that runs one backbone and one gradient pass, and the classifier on the masks.

    The classifier takes one image's masks at a time, or as many as the explainer's batch size if
    that is more. On a GPU it takes them as an explanation does, without copies to or from the
    device.
    """
    if explainer.on_device is not None:
        return explainer.on_device.passes(case.images, CollectionCAM())
    networks = explainer.networks
    one_hot = np.zeros_like(case.logits)
    one_hot[np.arange(len(case.images)), case.targets] = 1
    size = max(explainer.batch_size, *np.bincount(case.owner, minlength=2).tolist())
    chunks = list(row_chunks(len(case.masks), size))

    def run() -> None:
        networks.gradients(networks.backbone(case.images), one_hot)
        for chunk in chunks:
            networks.masked_logits(case.images, case.masks[chunk], case.owner[chunk])

    return run
