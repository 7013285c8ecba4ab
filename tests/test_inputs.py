"""What callers give, prepared for a network."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.errors import ImageError
from ccam_deploy.inputs import Inputs
from tests.helpers import example_pictures


def test_pictures_are_prepared_without_threads_once_these_have_ended(digits_bundle: Path) -> None:
    manifest = read_bundle(digits_bundle).manifest
    pictures = example_pictures()[:2]
    inputs = Inputs(manifest, 2, ahead=True)
    expected, places = inputs.preprocess(pictures)
    inputs.close()
    inputs.close()
    got, others = inputs.preprocess(pictures)
    np.testing.assert_array_equal(got, expected)
    assert others == places


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("pixel", [np.nan, np.inf, -np.inf])
def test_no_pixel_may_be_nan_or_infinite(digits_bundle: Path, pixel: float, ahead: bool) -> None:
    """In whatever part of a large array it is, and no value is too large."""
    manifest = read_bundle(digits_bundle).manifest
    inputs = Inputs(manifest, 2, ahead)
    many = (4 << 20) // math.prod(manifest.input)
    images = np.full((many, *manifest.input), 3e38, np.float32)
    assert inputs.preprocess(images)[0] is images
    for image in (0, many // 2, many - 1):
        spoilt = images.copy()
        spoilt[image, 0, -1, -1] = pixel
        with pytest.raises(ImageError, match="NaN or infinite pixels"):
            inputs.preprocess(spoilt)
    inputs.close()
