"""What callers give, prepared for a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ccam_deploy.bundle.folder import read_bundle
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
