"""Finds pictures in pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image


def place_of(tile: Image.Image, panel: Image.Image) -> tuple[int, int]:
    """left, top of a picture inside a larger one; it must be there exactly once."""
    found = places_of(tile, panel)
    assert len(found) == 1
    return found[0]


def places_of(tile: Image.Image, panel: Image.Image) -> list[tuple[int, int]]:
    """left, top of each copy of a picture inside a larger one, from the top down."""
    small, large = np.asarray(tile), np.asarray(panel)
    height, width = small.shape[:2]
    corners = np.argwhere((large == small[0, 0]).all(axis=2)).tolist()
    return [
        (x, y) for y, x in corners if np.array_equal(large[y : y + height, x : x + width], small)
    ]
