"""What all methods share: the lazy masks and the batch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Activations
from ccam_deploy.methods import Batch, MaskSequence
from tests.helpers import noise


class Drawing:
    """Draws maps of one value and notes which were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, value: int) -> Floats:
        self.asked.append(value)
        return np.full((value, 2, 3), value, np.float32)

    def sequence(self, *values: int) -> MaskSequence:
        return MaskSequence([partial(self, value) for value in values])


def test_masks_are_drawn_only_when_asked_for() -> None:
    drawing = Drawing()
    masks = drawing.sequence(1, 2, 3)
    joined = masks[1:] + masks
    assert (len(masks), len(joined)) == (3, 5)
    assert drawing.asked == []
    assert masks[2].shape == (3, 2, 3)
    assert (masks[-1] == 3).all()
    assert drawing.asked == [3, 3]


def test_masks_are_a_sequence() -> None:
    masks = Drawing().sequence(5, 6, 7)
    assert [len(value) for value in masks] == [5, 6, 7]
    assert [len(value) for value in reversed(masks)] == [7, 6, 5]
    assert [len(value) for value in masks[::2]] == [5, 7]
    assert isinstance(masks[:0], MaskSequence)
    assert len(masks[:0]) == 0
    with pytest.raises(IndexError):
        masks[3]


def test_joined_masks_keep_their_own_drawing() -> None:
    one, other = Drawing(), Drawing()
    joined = one.sequence(1) + other.sequence(2)
    assert [len(value) for value in joined] == [1, 2]
    assert (one.asked, other.asked) == ([1], [2])


def test_batch_knows_its_size() -> None:
    images = noise(2, 3, 32, 48)
    activations = Activations(noise(2, 5), (noise(2, 6, 8, 12),), {})
    pairs = np.zeros(1, np.int64)
    batch = Batch(images, activations, pairs, pairs, ("relu1",), noise(5), 4)
    assert batch.size == (32, 48)


def test_activations_of_chosen_rows() -> None:
    activations = Activations(noise(3, 5), (noise(3, 6, 8, 12),), {"r": noise(3, 4, seed=2)})
    rows = np.array([2, 0, 2])
    taken = activations.take(rows)
    np.testing.assert_array_equal(taken.logits, activations.logits[rows])
    np.testing.assert_array_equal(taken.features[0], activations.features[0][rows])
    np.testing.assert_array_equal(taken.residuals["r"], activations.residuals["r"][rows])
    assert activations.take(np.arange(3)) is activations
    assert len(activations.take(np.arange(2)).logits) == 2
