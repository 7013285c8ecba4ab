"""What callers give, as a network takes it, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.engines.cuda.parts import ImageParts
from ccam_deploy.errors import ImageError, TargetError
from ccam_deploy.methods import Stopwatch
from ccam_deploy.prefetch import prepared_ahead
from ccam_deploy.preprocess import Geometry, prepare_images
from ccam_deploy.row_threads import over_rows
from ccam_deploy.targets import pairs_of

Images = Floats | Sequence[Image.Image] | Image.Image
"""[B, C, H, W] float32, preprocessed; or one or more PIL images of any size and mode."""

Pictures = Floats | Sequence[Image.Image]
"""The same without a single image."""

Input = tuple[Floats, tuple[Geometry, ...]]
"""[B, C, H, W] float32, and the place of each in its picture; no places for an array."""

_DECODERS = 4
"""Threads that decode and scale pictures while a GPU works."""


@dataclass(frozen=True)
class BatchPlan:
    """The rows of a call that run together.

    Attributes:
        rows: Which of the call's images.
        owner: [P] int64, the image of each pair, counted from the batch's first.
        codes: [P] int64, the code of each pair; see targets.
    """

    rows: slice
    owner: Classes
    codes: Classes


class Inputs:
    """Prepares the batches of calls. Safe to call from several threads; close it when done.

    Args:
        manifest: Of the bundle that the inputs are for.
        batch_size: The most images of a batch.
        ahead: Whether a batch is prepared by threads while the one before it is worked on.
    """

    def __init__(self, manifest: Manifest, batch_size: int, ahead: bool) -> None:
        self._manifest = manifest
        self._batch_size = batch_size
        self._decoders = ThreadPoolExecutor(_DECODERS, "ccam-deploy-images") if ahead else None

    def plan(self, codes: Sequence[tuple[int, ...]]) -> list[BatchPlan]:
        """Cut a call into batches.

        Args:
            codes: The codes of each image's classes; see targets.
        """
        return [
            BatchPlan(rows, *pairs_of(codes[rows]))
            for rows in row_chunks(len(codes), self._batch_size)
        ]

    def batches(
        self, pictures: Pictures, plan: Sequence[BatchPlan], clock: Stopwatch
    ) -> Iterable[Input]:
        """Prepare the batches of a call, each when it is asked for or ahead of that.

        Args:
            pictures: All of the call's.
            plan: The batches.
            clock: Takes the seconds that it takes.

        Raises:
            ImageError: An image cannot be used.
        """

        def prepare(batch: BatchPlan) -> Input:
            with clock.stage("preprocess"):
                return self.preprocess(pictures[batch.rows])

        if self._decoders is None or len(plan) == 1:
            return map(prepare, plan)
        return prepared_ahead(prepare, plan)

    def preprocess(self, images: Pictures) -> Input:
        """Prepare PIL images, or validate an array that is an input already.

        Raises:
            ImageError: An image cannot be used.
        """
        size = self._manifest.input
        if not isinstance(images, np.ndarray):
            for picture in images:
                if not isinstance(picture, Image.Image):
                    raise ImageError(
                        f"an image is a {type(picture).__name__}; "
                        "give PIL images or one float32 array"
                    )
            how = self._manifest.preprocessing
            return prepare_images(images, size[1:], how, self._decoders)
        if images.dtype != np.float32 or images.shape[1:] != size:
            raise ImageError(
                f"images are {images.dtype}{list(images.shape)}; "
                f"the bundle takes float32[B, {', '.join(map(str, size))}]"
            )
        if not all(over_rows(self._decoders, lambda rows: _all_finite(images[rows]), images)):
            raise ImageError("the images have NaN or infinite pixels")
        return images, ()

    def close(self) -> None:
        """End the threads; what comes later is prepared without them."""
        decoders, self._decoders = self._decoders, None
        if decoders is not None:
            decoders.shutdown()


def _all_finite(images: Floats) -> bool:
    """Whether no pixel is NaN or infinite."""
    # An image at a time: what is found of each stays in the cache.
    return all(np.isfinite(image).all() for image in images)


def sequence_of(images: Images) -> Pictures:
    """Make a sequence of what may be a single image.

    Raises:
        ImageError: The images are a single number.
    """
    if isinstance(images, np.ndarray) and images.ndim == 0:
        raise ImageError("a single number is no image")
    return images if isinstance(images, np.ndarray | Sequence) else [images]


def require_fitting_parts(
    images: ImageParts, codes: Sequence[tuple[int, ...]], manifest: Manifest
) -> None:
    """Refuse images in parts that the network does not take, or that have several classes.

    Args:
        images: The images.
        codes: The codes of each image's classes; see targets.
        manifest: Of the bundle that the images are for.

    Raises:
        ImageError: They have another size.
        TargetError: An image has several classes.
    """
    for part in images.parts:
        if part.images.shape[1:] != manifest.input:
            raise ImageError(
                f"images are {list(part.images.shape)}; "
                f"the bundle takes [B, {', '.join(map(str, manifest.input))}]"
            )
    if any(len(of_image) != 1 for of_image in codes):
        raise TargetError("an image in parts has several targets; give it one class")
