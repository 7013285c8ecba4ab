"""Crops of photographs: reproducible, inside of their photograph, and sure ones only."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from bench import photographs
from bench.photographs import FILES, SMALLEST, Crop, Photographs, draw_crops, photograph_of
from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.explainer import Explainer

pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("matplotlib", reason="Matplotlib is not installed")


@pytest.mark.parametrize("name", FILES)
def test_every_photograph_is_installed(name: str) -> None:
    picture = photographs.photograph(name)
    assert picture.mode == "RGB"
    assert min(picture.size) >= SMALLEST
    assert np.asarray(picture).std() > 10


def test_crops_lie_inside_and_follow_from_the_seed() -> None:
    crops = draw_crops("china", 50, 0)
    width, height = photographs.photograph("china").size
    assert crops[0].box == (0, 0, width, height)
    assert len({crop.box for crop in crops}) == 50
    for crop in crops:
        left, top, right, bottom = crop.box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert min(right - left, bottom - top) >= SMALLEST
    assert draw_crops("china", 20, 0) == crops[:20]
    assert draw_crops("china", 20, 1)[1:] != crops[1:20]
    assert [c.box for c in draw_crops("coffee", 20, 0)] != [c.box for c in crops[:20]]


def test_items_are_named_by_their_photograph() -> None:
    crop = Crop("chelsea", (100, 50, 300, 200))
    data = Photographs([crop])
    assert data.names == ("chelsea 100,50,300,200",)
    assert photograph_of(data.names[0]) == "chelsea"
    assert (data.has_classes, data.has_boxes) == (False, False)
    whole = np.asarray(photographs.photograph("chelsea"))
    np.testing.assert_array_equal(data[0].read(), whole[50:200, 100:300])


class Brightness:
    """Two classes, whose logits are the mean of an image's pixels and zero."""

    backend = "fake"

    def masked_logits(self, images: Floats, masks: Floats, owner: Classes) -> Floats:
        """See Classifier."""
        means = images[owner].mean((1, 2, 3))
        return np.stack([means, np.zeros_like(means)], axis=1)


def explainer() -> Explainer:
    """What the choice of crops needs: pixels of 0 to 20, so that a white crop is sure of itself."""

    def preprocess(pictures: list[Any]) -> tuple[Floats, tuple[()]]:
        small = [np.asarray(picture.resize((8, 8)), np.float32) for picture in pictures]
        return np.stack(small).transpose(0, 3, 1, 2) * np.float32(20 / 255), ()

    fake = SimpleNamespace(networks=Brightness(), preprocess=preprocess, batch_size=7)
    return cast(Explainer, fake)


def test_only_sure_crops_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones that are drawn, at most so many, whatever the batch; none of a dark one."""
    monkeypatch.setattr(photographs, "FILES", {name: FILES[name] for name in ("china", "rocket")})

    def is_sure(crop: Crop) -> bool:
        mean = float(np.asarray(crop.read().resize((8, 8)), np.float64).mean()) * 20 / 255
        return bool(1 / (1 + np.exp(-mean)) >= 0.9999)

    drawn = [crop for name in ("china", "rocket") for crop in draw_crops(name, 60, 3)]
    expected = [crop for crop in drawn if is_sure(crop)]
    counts = Counter(crop.photograph for crop in expected)
    assert 5 < counts["china"] < 60
    chosen = photographs.sure_crops(explainer(), 60, 0.9999, seed=3, tries=60)
    assert chosen == expected
    few = photographs.sure_crops(explainer(), 5, 0.9999, seed=3, tries=60)
    assert [crop for crop in few if crop.photograph == "china"] == expected[:5]
