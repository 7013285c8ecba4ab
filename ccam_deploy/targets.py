"""The classes to explain: from a caller's targets to a class for each (image, class) pair.

Targets become codes first. A code is a class number, or -1 - r for the class of rank r among an
image's logits, which is known once the backbone has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.errors import ImageError, TargetError


@dataclass(frozen=True)
class Top:
    """An image's best classes, the highest logit first.

    Attributes:
        count: How many classes, at least 1 and at most as many as the classifier has.
    """

    count: int = 1


Target = int | str | Top
"""A class by its number or name, or an image's best classes."""
Targets = Sequence[Target | Sequence[Target]] | NDArray[np.integer] | Target | None
"""What to explain: None for each image's best class, one target for all images, or a target or a
list of targets for each image."""


def target_codes(targets: Targets, images: int, manifest: Manifest) -> list[tuple[int, ...]]:
    """Translate targets into the codes of each image.

    Args:
        targets: As `Explainer.explain` takes them.
        images: How many images there are.
        manifest: The bundle's manifest, which knows the classes.

    Returns:
        The codes of each image, without duplicates.

    Raises:
        ImageError: There are no images.
        TargetError: A class is not the bundle's, or the targets do not fit the images.
    """
    if not images:
        raise ImageError("there are no images to explain")
    if targets is None:
        targets = Top()
    if not _is_list(targets):
        return [_codes(targets, manifest)] * images
    if len(targets) != images:
        raise TargetError(f"there are {len(targets)} targets for {images} images")
    codes = []
    for target in targets:
        image_targets = target if _is_list(target) else [target]
        if not len(image_targets):
            raise TargetError("an image has an empty list of targets; give at least one class")
        codes.append(
            tuple(dict.fromkeys(code for item in image_targets for code in _codes(item, manifest)))
        )
    return codes


def pairs_of(codes: Sequence[tuple[int, ...]]) -> tuple[Classes, Classes]:
    """List the (image, class) pairs of some images.

    Args:
        codes: As `target_codes` returns them.

    Returns:
        The image [P] int64 of each pair, in ascending order, and its code [P] int64.
    """
    owner = np.repeat(np.arange(len(codes)), [len(image_codes) for image_codes in codes])
    return owner, np.concatenate(codes).astype(np.int64)


def classes_of(owner: Classes, codes: Classes, logits: Floats) -> Classes:
    """Look up the class [P] int64 of each pair.

    Args:
        owner: [P] int64, the image of each pair.
        codes: [P] int64, the code of each pair.
        logits: [B, classes] float32.
    """
    if (codes >= 0).all():
        return codes
    order = np.argsort(-logits, axis=1, kind="stable")
    return np.where(codes < 0, order[owner, -1 - codes], codes)


def first_occurrences(owner: Classes, targets: Classes) -> NDArray[np.intp]:
    """List the rows of pairs that no earlier row has, in ascending order.

    So a class that is named and is also among the image's best classes is explained once.

    Args:
        owner: [P] int64, the image of each pair.
        targets: [P] int64, the class of each pair.
    """
    first: dict[tuple[int, int], int] = {}
    for row, pair in enumerate(zip(owner.tolist(), targets.tolist(), strict=True)):
        first.setdefault(pair, row)
    return np.array(list(first.values()), np.intp)


def _is_list(targets: Any) -> TypeGuard[Sequence[Any]]:
    if isinstance(targets, np.ndarray):
        return targets.ndim > 0
    return isinstance(targets, Sequence) and not isinstance(targets, str)


def _codes(target: Any, manifest: Manifest) -> tuple[int, ...]:
    if isinstance(target, Top):
        if not _is_integer(target.count) or not 1 <= target.count <= manifest.classes:
            raise TargetError(f"top is {target.count!r}; it must be 1 to {manifest.classes}")
        return tuple(range(-1, -1 - target.count, -1))
    if not isinstance(target, str) and not _is_integer(target):
        raise TargetError(
            f"a target is {target!r}; it must be the number or name of a class, or Top(n)"
        )
    return (manifest.class_index(target if isinstance(target, str) else int(target)),)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
