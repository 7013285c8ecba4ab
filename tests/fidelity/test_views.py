"""Views of images: enough of them, all different, none of other pixels."""

from __future__ import annotations

import numpy as np
import pytest

from ccam_deploy.fidelity.observation import checked_views
from tests.helpers import noise


@pytest.mark.parametrize(("images", "views"), [(1, 8), (2, 8), (3, 8), (8, 8), (16, 16)])
def test_views_are_the_images_and_others_of_the_same_pixels(images: int, views: int) -> None:
    given = noise(images, 3, 12, 9)
    seen = checked_views(given)
    assert seen.shape == (views, 3, 12, 9)
    assert seen.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(seen[:images], given)
    for place, view in enumerate(seen):
        source = given[place % images]
        np.testing.assert_array_equal(
            np.sort(view.reshape(3, -1), axis=1), np.sort(source.reshape(3, -1), axis=1)
        )
    assert len({view.tobytes() for view in seen}) == views


def test_views_by_hand() -> None:
    image = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    seen = checked_views(image)[:, 0].astype(int).tolist()
    assert seen[1] == [[2, 1, 0], [5, 4, 3], [8, 7, 6]]
    assert seen[2] == [[6, 7, 8], [3, 4, 5], [0, 1, 2]]
    assert seen[3] == [[8, 7, 6], [5, 4, 3], [2, 1, 0]]
    assert seen[4] == [[8, 6, 7], [2, 0, 1], [5, 3, 4]]
