"""The classes that are to be explained: what a caller writes, as numbers for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.errors import ImageError, TargetError

Target = int | str
Targets = Sequence[Target | Sequence[Target]] | NDArray[np.integer] | Target | None
"""The classes to explain, by number or name: one for all images, or for each image one or several;
None for the class that the classifier predicts."""


def per_image(
    targets: Targets, images: int, manifest: Manifest
) -> Sequence[tuple[int, ...] | None]:
    """The classes wanted for each image; None for its best ones. targets: see Explainer.explain.

    Raises TargetError for classes that the bundle does not have, ImageError for no images.
    """
    if not images:
        raise ImageError("there are no images to explain")
    if targets is None:
        return [None] * images
    if not _is_list(targets):
        return [(_class_index(targets, manifest),)] * images
    if len(targets) != images:
        raise TargetError(f"there are {len(targets)} targets for {images} images")
    wanted = []
    for target in targets:
        several = target if _is_list(target) else [target]
        if not len(several):
            raise TargetError("an image has an empty list of targets; give at least one class")
        wanted.append(tuple(_class_index(one, manifest) for one in several))
    return wanted


def pairs_of(
    wanted: Sequence[tuple[int, ...] | None], top: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The image [P] int64 of each (image, class) pair, and its class, or -1 - r for the rank r.

    wanted: as `per_image` gives it.   top: how many of the best classes where an image wants those.
    """
    best = tuple(range(-1, -1 - top, -1))
    classes = [best if chosen is None else chosen for chosen in wanted]
    owner = np.repeat(np.arange(len(classes)), [len(chosen) for chosen in classes])
    return owner, np.concatenate(classes).astype(np.int64)


def classes_of(
    codes: NDArray[np.int64], owner: NDArray[np.int64], logits: NDArray[np.float32]
) -> NDArray[np.int64]:
    """The class [P] int64 of each pair, the ranks among its codes looked up in logits [B, classes].

    codes, owner: as `pairs_of` gives them.
    """
    if (codes >= 0).all():
        return codes
    order = np.argsort(-logits, axis=1, kind="stable")
    return np.where(codes < 0, order[owner, -1 - codes], codes)


def _is_list(targets: Any) -> TypeGuard[Sequence[Any]]:
    if isinstance(targets, np.ndarray):
        return targets.ndim > 0
    return isinstance(targets, Sequence) and not isinstance(targets, str)


def _class_index(target: Any, manifest: Manifest) -> int:
    if isinstance(target, bool) or not isinstance(target, int | str | np.integer):
        raise TargetError(f"a target is {target!r}; it must be the number or name of a class")
    return manifest.class_index(target if isinstance(target, str) else int(target))
