"""Digits in scenes: the same every time, with exact boxes, training apart from testing."""

from __future__ import annotations

from itertools import combinations
from typing import get_args

import numpy as np
import pytest

from ccam_deploy.errors import OptionError
from ccam_deploy.examples import scenes
from ccam_deploy.examples.scenes import SIZE, Box, Scene, SceneType, Split, make_scene, make_scenes

datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")

SCENE_TYPES = get_args(SceneType)
SPLITS = get_args(Split)


def equal(first: Scene, second: Scene) -> bool:
    same = first.digits == second.digits and first.boxes == second.boxes
    return same and np.array_equal(first.image, second.image)


@pytest.mark.parametrize("scene_type", SCENE_TYPES)
@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_the_same_every_time(split: Split, scene_type: SceneType) -> None:
    scene = make_scene(split, 7, scene_type)
    assert equal(scene, make_scene(split, 7, scene_type))
    assert not equal(scene, make_scene(split, 8, scene_type))
    assert scene.image.shape == (SIZE, SIZE, 3)
    assert scene.image.dtype == np.uint8


def test_scenes_do_not_depend_on_the_order() -> None:
    several = make_scenes("test", 5, seed=20)
    for seed, scene in reversed(list(enumerate(several, 20))):
        assert equal(scene, make_scene("test", seed))


def test_splits_differ_for_one_seed() -> None:
    for seed in range(5):
        assert not equal(make_scene("train", seed), make_scene("test", seed))


def test_a_scene_is_known_by_its_numbers() -> None:
    """Recorded once: another scene here is other data than what published numbers came from."""
    scene = make_scene("test", 1, "two-classes")
    assert scene.digits == (3, 4)
    assert scene.boxes == ((11, 28, 27, 56), (7, 57, 35, 96))


@pytest.mark.parametrize("split", SPLITS)
def test_kinds_have_their_classes(split: Split) -> None:
    for scene in make_scenes(split, 25, scene_type="single"):
        assert len(scene.digits) == 1
    for scene in make_scenes(split, 25, scene_type="two-classes"):
        assert len(scene.digits) == len(set(scene.digits)) == 2
    numbers = set()
    for scene in make_scenes(split, 25, scene_type="several"):
        assert len(set(scene.digits)) == 1
        numbers.add(len(scene.digits))
    assert numbers == {2, 3}


def test_every_class_is_drawn() -> None:
    drawn = {scene.digits[0] for scene in make_scenes("train", 80)}
    assert drawn == set(range(10))


@pytest.mark.parametrize("scene_type", SCENE_TYPES)
def test_boxes_lie_inside_and_apart(scene_type: SceneType) -> None:
    for scene in make_scenes("train", 40, scene_type=scene_type):
        assert len(scene.boxes) == len(scene.digits)
        for left, top, right, bottom in scene.boxes:
            assert 0 <= left < right <= SIZE
            assert 0 <= top < bottom <= SIZE
            assert (right - left) * (bottom - top) >= 80
        for first, second in combinations(scene.boxes, 2):
            assert not overlap(first, second)


def overlap(first: Box, second: Box) -> bool:
    covered = np.zeros((SIZE, SIZE), int)
    for left, top, right, bottom in (first, second):
        covered[top:bottom, left:right] += 1
    return bool((covered == 2).any())


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_are_tight_around_the_digit(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a black background, what is a third as light as the digit spans the box to a pixel."""
    black = np.zeros((SIZE, SIZE, 3), np.float32)
    monkeypatch.setattr(scenes, "_background", lambda stream, split: black.copy())
    for scene in make_scenes(split, 30):
        opacity = scene.image.max(axis=2) / scene.image.max()
        y, x = np.argwhere(opacity > 0.3).T
        measured = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        np.testing.assert_allclose(scene.boxes[0], measured, atol=1)


@pytest.mark.parametrize("scene_type", SCENE_TYPES)
def test_every_box_holds_a_light_digit(scene_type: SceneType) -> None:
    """A digit's colour has at least 190 of 255 in each channel and fills a part of its box."""
    for scene in make_scenes("test", 30, scene_type=scene_type):
        light = scene.image.min(axis=2) >= 190
        for left, top, right, bottom in scene.boxes:
            assert light[top:bottom, left:right].mean() > 0.15


def test_no_digit_is_in_both_splits() -> None:
    """The two splits hold all of the data set's images, and none of them twice."""
    train, test = (scenes._digits(split) for split in ("train", "test"))
    data = datasets.load_digits()
    np.testing.assert_array_equal(np.concatenate([train[0], test[0]]) * 16, data.images)
    np.testing.assert_array_equal(np.concatenate([train[1], test[1]]), data.target)
    in_training = {image.tobytes() for image in train[0]}
    assert not in_training & {image.tobytes() for image in test[0]}
    assert set(test[1]) == set(train[1]) == set(range(10))


def test_no_part_of_a_photograph_is_in_both_splits() -> None:
    """Left part and right part, side by side, are the whole photograph."""
    train, test = (scenes._photographs(split) for split in ("train", "test"))
    photographs = datasets.load_sample_images().images
    for left, right, whole in zip(train, test, photographs, strict=True):
        np.testing.assert_array_equal(np.hstack(list(map(np.asarray, (left, right)))), whole)
        assert min(*left.size, *right.size) > 80


def test_unknown_names_are_refused() -> None:
    with pytest.raises(OptionError, match='split "valid" is unknown; use train or test'):
        make_scene("valid", 0)  # type: ignore[arg-type]
    message = 'scene type "many" is unknown; use single, two-classes or several'
    with pytest.raises(OptionError, match=message):
        make_scene("train", 0, "many")  # type: ignore[arg-type]
