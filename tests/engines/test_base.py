"""What all engines share: runs of more rows than a graph takes, over graphs of a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ccam_deploy.engines.base import Array, Engine, TensorSpec, row_chunks
from ccam_deploy.errors import BackendError
from tests.helpers import noise


def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


class Recording(Engine):
    """Notes the sizes of every input that it runs."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self.limits = limits
        self.runs: list[tuple[int, ...]] = []
        super().__init__()

    def _run_impl(self, feeds: Mapping[str, Array]) -> list[Array]:
        self.runs.append(tuple(len(values) for values in feeds.values()))
        return self._outputs(feeds)

    def _outputs(self, feeds: Mapping[str, Array]) -> list[Array]:
        raise NotImplementedError

    def _close_impl(self) -> None:
        pass


class Affine(Recording):
    """a + b and whether that is positive, row by row, and times a factor for all rows."""

    def _load_impl(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        shape = "batch", 3
        inputs = (
            spec("factors", "float32", "factors"),
            spec("a", "float32", *shape),
            spec("b", "float32", *shape),
        )
        return inputs, (spec("sum", "float32", *shape), spec("positive", "bool", *shape))

    def _outputs(self, feeds: Mapping[str, Array]) -> list[Array]:
        total = (feeds["a"] + feeds["b"]) * feeds["factors"].sum()
        return [total, total > 0]


class Gather(Recording):
    """images[owner] times masks."""

    def _load_impl(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        inputs = (
            spec("images", "float32", "batch", 3),
            spec("masks", "float32", "masks", 1),
            spec("owner", "int64", "masks"),
        )
        return inputs, (spec("logits", "float32", "masks", 3),)

    def _outputs(self, feeds: Mapping[str, Array]) -> list[Array]:
        return [feeds["images"][feeds["owner"]] * feeds["masks"]]


def affine_feeds(rows: int) -> dict[str, Array]:
    return {
        "a": noise(rows, 3),
        "b": noise(rows, 3, seed=1),
        "factors": np.array([2, 0.5], np.float32),
    }


def gather_feeds(images: int, owner: NDArray[np.int64]) -> dict[str, Array]:
    return {"images": noise(images, 3), "masks": noise(len(owner), 1, seed=1), "owner": owner}


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 6, 8])
def test_rows_beyond_the_limit_run_in_parts(rows: int) -> None:
    limited, free = Affine({"batch": 3}), Affine({})
    feeds = affine_feeds(rows)
    values, expected = limited.run(feeds), free.run(feeds)
    assert list(values) == ["sum", "positive"]
    for name, value in expected.items():
        np.testing.assert_array_equal(values[name], value)
        assert values[name].dtype == value.dtype
    sizes = [chunk.stop - chunk.start for chunk in row_chunks(rows, 3)] or [0]
    assert limited.runs == [(2, size, size) for size in sizes]
    assert free.runs == [(2, rows, rows)]


@pytest.mark.parametrize("masks", [0, 1, 4, 5, 9])
@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_images_that_masks_belong_to_have_a_limit_too(images: int, masks: int) -> None:
    limits = {"batch": 2, "masks": 4}
    owner = np.random.default_rng(masks).integers(0, images, masks)
    limited, free = Gather(limits), Gather({})
    feeds = gather_feeds(images, owner)
    np.testing.assert_array_equal(limited.run(feeds)["logits"], free.run(feeds)["logits"])
    assert all(run[0] <= 2 and run[1] == run[2] <= 4 for run in limited.runs)
    assert sum(run[1] for run in limited.runs) == masks


def test_images_without_masks_are_not_run() -> None:
    engine = Gather({"batch": 2, "masks": 4})
    engine.run(gather_feeds(7, np.array([6, 2, 6])))
    assert engine.runs == [(2, 1, 1), (1, 2, 2)]


def test_an_axis_that_rows_do_not_share_cannot_be_split() -> None:
    with pytest.raises(BackendError, match='"factors" is 2; the engine takes at most 1'):
        Affine({"factors": 1}).run(affine_feeds(1))


@pytest.mark.parametrize("owner", [[0, 3], [-1, 0]])
def test_masks_of_no_image_are_refused(owner: list[int]) -> None:
    with pytest.raises(BackendError, match=r'input "owner" has rows .+ of "batch", which has 3'):
        Gather({"batch": 2}).run(gather_feeds(3, np.array(owner)))


def test_inputs_that_disagree_are_refused() -> None:
    feeds: dict[str, Any] = affine_feeds(3) | {"b": noise(2, 3)}
    with pytest.raises(BackendError, match='"batch" is 2 in input "b", 3 in another one'):
        Affine({"batch": 3}).run(feeds)
