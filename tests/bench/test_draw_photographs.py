"""The README's pictures show every photograph and method once."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import ccam_deploy as ccam
from bench import draw_photographs as drawing
from ccam_deploy.image_files import find_images, load_image

METHODS = {"Grad-CAM": ccam.GradCAM(), "CAM": ccam.CAM()}


@pytest.mark.slow
def test_pictures_have_a_tile_for_each_photograph_and_method(digits: ccam.Explainer) -> None:
    pictures = [drawing.square(load_image(path)) for path in find_images([drawing.PHOTOGRAPHS])]
    assert len(pictures) == 8
    assert all(picture.width == picture.height for picture in pictures)
    drawn = drawing.overview(digits, pictures)
    assert 4 * 200 < drawn.width < 4 * 220
    assert 2 * 200 < drawn.height < 2 * 240
    compared = drawing.comparison(digits, pictures[:3], METHODS)
    assert compared.height > 3 * 130
    assert 3 * 130 < compared.width < 3 * 170


def test_what_is_compared_exists() -> None:
    names = {path.stem for path in find_images([drawing.PHOTOGRAPHS])}
    assert set(drawing.COMPARED) <= names


def test_a_square_is_the_middle() -> None:
    wide = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 6))
    assert np.asarray(drawing.square(wide)).tolist() == [[2, 3], [8, 9]]


def test_jpeg_keeps_the_picture() -> None:
    picture = Image.new("RGB", (40, 30), (200, 30, 90))
    with Image.open(io.BytesIO(drawing.jpeg(picture))) as again:
        assert (again.format, again.size) == ("JPEG", (40, 30))
        assert np.abs(np.asarray(again, int) - np.asarray(picture, int)).max() <= 3
