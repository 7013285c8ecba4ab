"""An evaluation's numbers against PyTorch, and what it does when it is broken off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.errors import ImageError, OptionError
from ccam_deploy.methods import RISE
from ccam_deploy.quality.datasets import Dataset, ImageFolder, Item, open_dataset
from ccam_deploy.quality.evaluation import Evaluation, EvaluationSettings, draw_places
from ccam_deploy.quality.metrics import METRICS
from ccam_deploy.quality.results import RESULTS, Row
from ccam_deploy.quality.variants import Variant, make_variants
from tests.bundles import activated
from tests.networks import digits_model
from tests.quality.scorers import LinearScorer

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

TWO = (
    Variant("default", ccam.CollectionCAM()),
    Variant("few", ccam.CollectionCAM(k_max=3)),
)
BOXLESS = tuple(name for name in METRICS if not METRICS[name].boxes)


class Pictures(Dataset):
    """Pictures in memory; the class is that of their place, if there are classes."""

    def __init__(self, pictures: Sequence[Image.Image], classes: bool = True) -> None:
        self.names = tuple(f"picture {index}" for index in range(len(pictures)))
        self.has_classes = classes
        self._pictures = pictures

    def __getitem__(self, index: int) -> Item:
        return Item(self.names[index], lambda: self._pictures[index], index % 10)


@dataclass(frozen=True)
class GivenMap(Variant):
    """A map [H, W] that is the same for every image."""

    saliency: Floats = field(default_factory=lambda: np.zeros((16, 2), np.float32))

    def explain(self, explainer: Any, images: Floats, targets: Sequence[int]) -> Any:
        return SimpleNamespace(saliency=np.repeat(self.saliency[None], len(images), axis=0))


class Halves(Pictures):
    """Two columns of 16 pixels, the right one of which is the object."""

    has_boxes = True

    def __getitem__(self, index: int) -> Item:
        return Item(
            self.names[index], lambda: self._pictures[index], 1, np.array([[1.0, 0, 2, 16]])
        )


def sum_of_pixels(bundle: Path) -> Any:
    """Stands in for an explainer: a classifier of two classes on images of 16 × 2 ones.

    Each object's pixel adds log(3) / 16 to class 1's logit, each other one takes it away: 75 % for
    the object alone, 25 % without it, 50 % for all pixels or none.
    """
    share = np.log(3) / 16
    scorer = LinearScorer(np.stack([np.zeros(32), np.tile([-share, share], 16)]))
    whole = SimpleNamespace(to_input=lambda boxes: boxes)
    return SimpleNamespace(
        bundle=read_bundle(bundle),
        networks=SimpleNamespace(backend="by hand", masked_logits=scorer.masked_logits),
        precision="fp32",
        batch_size=4,
        preprocess=lambda pictures: (
            np.ones((len(pictures), 1, 16, 2), np.float32),
            (whole,) * len(pictures),
        ),
        require_method=lambda method: None,
    )


RIGHT = np.tile(np.array([0, 1], np.float32), (16, 1))


@pytest.mark.parametrize(
    ("saliency", "expected"),
    [
        (RIGHT, (0, 100, 37.5, 62.5, 25, 100, 100, 100)),
        (1 - RIGHT, (50, 0, 62.5, 37.5, -25, 0, 0, 100)),
        (np.ones_like(RIGHT), (0, 0, 50, 50, 0, 50, 0, 100)),
        (np.zeros_like(RIGHT), (0, 0, 50, 50, 0, 0, 0, 0)),
    ],
    ids=["perfect", "opposite", "constant", "zeros"],
)
def test_maps_have_the_values_worked_by_hand(
    saliency: Floats, expected: tuple[float, ...], tiny_bundle: Path, tmp_path: Path
) -> None:
    """Eq. 26 to 29 and the pointing game, in steps of 16 pixels.

    The perfect map deletes the object first, 50, 25, 50 %, and inserts it first, 50, 75, 50 %. Of
    equal pixels 8 rows go at a time, as many of the object as of the rest: 50 % throughout.
    """
    data = Halves([Image.new("L", (2, 16))] * 2)
    contender = GivenMap("given", ccam.CollectionCAM(), saliency=saliency)
    settings = EvaluationSettings(target="label")
    measured = Evaluation(sum_of_pixels(tiny_bundle), data, [contender], settings)
    rows = finished(measured, tmp_path)
    assert len(rows) == 2
    for row in rows:
        assert row.probability == pytest.approx(0.5)
        assert row.values == pytest.approx(dict(zip(METRICS, expected, strict=True)), abs=1e-4)


def test_outputs_that_are_no_logits_stand_for_themselves(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = activated(tiny_bundle, tmp_path / "copy", "none")
    contender = GivenMap("given", ccam.CollectionCAM(), saliency=RIGHT)
    settings = EvaluationSettings(target="label")
    data = Halves([Image.new("L", (2, 16))])
    measured = Evaluation(sum_of_pixels(folder), data, [contender], settings)
    (row,) = finished(measured, tmp_path / "results")
    assert row.probability == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(row.curves["deletion"], [0, -np.log(3), 0], atol=1e-6)
    np.testing.assert_allclose(row.curves["insertion"], [0, np.log(3), 0], atol=1e-6)


def make(explainer: ccam.Explainer, **settings: object) -> Evaluation:
    dataset = open_dataset("scenes", explainer.bundle.manifest)
    return Evaluation(explainer, dataset, TWO, EvaluationSettings(**settings))  # type: ignore[arg-type]


def finished(measured: Evaluation, folder: Path) -> list[Row]:
    results = measured.open(folder, "scenes")
    list(measured.run(results))
    return list(results.rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["paper", "rise"])
def test_numbers_are_pytorchs(digits: ccam.Explainer, tmp_path: Path, protocol: str) -> None:
    """Average drop, curves and boxes of a few scenes, worked out with the network in PyTorch."""
    measured = make(digits, limit=3, protocol=protocol, target="label")
    rows = finished(measured, tmp_path)
    assert [(row.index, row.method) for row in rows] == [
        (place, name) for name in ("default", "few") for place in measured.places
    ]
    model = digits_model()
    for row, item in zip(rows[:3], map(measured.dataset.__getitem__, measured.places), strict=True):
        images, _ = digits.preprocess([item.read()])
        assert (row.name, row.target) == (item.name, item.target)
        assert item.target is not None
        saliency = digits.explain(images, [item.target]).saliency[0]
        with torch.no_grad():
            whole = model(torch.from_numpy(images)).softmax(1)[0]
            masked = model(torch.from_numpy(images * saliency)).softmax(1)[0]
            zeros = model(torch.zeros(1, *images.shape[1:])).softmax(1)[0]
        y, o = float(whole[item.target]), float(masked[item.target])
        assert row.probability == pytest.approx(y, abs=1e-5)
        assert row.values["average-drop"] == pytest.approx(max(y - o, 0) / y * 100, abs=1e-3)
        assert row.values["average-increase"] == (100 if o > y else 0)
        followed = int(whole.argmax()) if protocol == "rise" else item.target
        assert row.curves["deletion"][0] == pytest.approx(float(whole[followed]), abs=1e-5)
        assert row.curves["deletion"][-1] == pytest.approx(float(zeros[followed]), abs=1e-5)
        assert row.curves["insertion"][-1] == pytest.approx(float(whole[followed]), abs=1e-5)
        if protocol == "paper":
            assert row.curves["insertion"][0] == pytest.approx(float(zeros[followed]), abs=1e-5)
        areas = {curve: 100 * np.trapezoid(points) / 12 for curve, points in row.curves.items()}
        assert row.values["deletion"] == pytest.approx(areas["deletion"])
        assert row.values["overall"] == pytest.approx(areas["insertion"] - areas["deletion"])
        left, top, right, bottom = item.boxes[0].astype(int)
        inside = saliency[top:bottom, left:right].sum() / saliency.sum()
        assert row.values["proportion"] == pytest.approx(100 * inside, rel=1e-5)


@pytest.mark.slow
def test_protocols_follow_their_class(digits: ccam.Explainer, tmp_path: Path) -> None:
    """Where the label is not the best class, only RISE's curves follow the best one."""
    picture = open_dataset("scenes", digits.bundle.manifest)[1].read()
    data = Pictures([picture] * 10)
    logits = digits.explain([picture]).logits[0].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    for protocol in ("paper", "rise"):
        settings = EvaluationSettings(("deletion",), protocol, target="label")
        measured = Evaluation(digits, data, TWO[:1], settings)
        results = measured.open(tmp_path / protocol, "pictures")
        list(measured.run(results))
        first = [row.curves["deletion"][0] for row in results.rows.values()]
        probabilities = expected if protocol == "paper" else np.full(10, expected.max())
        np.testing.assert_allclose(first, probabilities, atol=1e-5)
        assert [row.target for row in results.rows.values()] == list(range(10))


@pytest.mark.slow
def test_a_run_that_goes_on_gives_the_same_file(digits_bundle: Path, tmp_path: Path) -> None:
    """Broken off after any group, also in the middle of one."""
    with ccam.load(digits_bundle, batch_size=4) as explainer:
        measured = make(explainer, limit=7, metrics=("average-drop", "deletion"))
        rows = finished(measured, tmp_path / "whole")
        whole = (tmp_path / "whole" / RESULTS).read_bytes()
        assert len(rows) == measured.total == 14
        for groups in range(4):
            folder = tmp_path / f"broken-{groups}"
            assert sum(islice(measured.run(measured.open(folder, "scenes")), groups)) < 14
            with (folder / RESULTS).open("ab") as file:
                file.write(b"4,test-sc")
            results = make(explainer, limit=7, metrics=("average-drop", "deletion")).open(
                folder, "scenes"
            )
            assert len(results.rows) == (0, 4, 8, 11)[groups]
            list(measured.run(results))
            assert (folder / RESULTS).read_bytes() == whole
        again = measured.open(tmp_path / "whole", "scenes")
        assert list(measured.run(again)) == []


def test_what_numbers_depend_on_may_not_change(
    digits: ccam.Explainer, digits_bundle: Path, tmp_path: Path
) -> None:
    make(digits, limit=3).open(tmp_path, "scenes")
    make(digits, limit=3).open(tmp_path, "scenes")
    for changed, message in (
        ({"limit": 4}, "an evaluation of 3 images, and this command asks for 4"),
        ({"limit": 3, "seed": 2}, "with seed 0, and this command has 2"),
        ({"limit": 3, "protocol": "rise"}, 'with protocol "paper", and this command has "rise"'),
        ({"limit": 3, "target": "label"}, 'with target "predicted", and this command has "label"'),
        ({"limit": 3, "metrics": ("deletion",)}, "with metrics "),
    ):
        with pytest.raises(OptionError, match=message):
            make(digits, **changed).open(tmp_path, "scenes")
    with (
        ccam.load(digits_bundle, batch_size=3) as other,
        pytest.raises(OptionError, match="with batch_size 16, and this command has 3"),
    ):
        make(other, limit=3).open(tmp_path, "scenes")


def test_images_without_boxes_or_classes(digits: ccam.Explainer, tmp_path: Path) -> None:
    data = Pictures([Image.new("RGB", (120, 96), "teal"), Image.new("L", (96, 200), 99)], False)
    measured = Evaluation(digits, data, TWO[:1], EvaluationSettings())
    assert measured.metrics == BOXLESS
    results = measured.open(tmp_path, "pictures")
    list(measured.run(results))
    assert [row.index for row in results.rows.values()] == [0, 1]
    with pytest.raises(OptionError, match="has no classes to explain; use --explain-class pre"):
        Evaluation(digits, data, TWO, EvaluationSettings(target="label"))
    with pytest.raises(OptionError, match="proportion needs boxes, which the data set does not"):
        Evaluation(digits, data, TWO, EvaluationSettings(("deletion", "proportion")))


def test_boxes_that_are_cut_off_are_not_measured(digits: ccam.Explainer, tmp_path: Path) -> None:
    class Wide(Pictures):
        """The box lies in the left part, which the crop takes away."""

        has_boxes = True

        def __getitem__(self, index: int) -> Item:
            item = super().__getitem__(index)
            return Item(item.name, item.read, 0, np.array([[0.0, 0, 40, 96]]))

    data = Wide([Image.new("RGB", (300, 96), "navy")])
    measured = Evaluation(digits, data, TWO[:1], EvaluationSettings(("proportion", "pointing")))
    results = measured.open(tmp_path, "wide")
    list(measured.run(results))
    (row,) = results.rows.values()
    assert all(np.isnan(value) for value in row.values.values())
    assert row.curves == {}


def test_an_image_that_cannot_be_read_ends_the_run(digits_bundle: Path, tmp_path: Path) -> None:
    """What was measured before stays; passed over, it has a row of its own."""

    class Broken(Pictures):
        def __getitem__(self, index: int) -> Item:
            def read() -> Image.Image:
                raise ImageError("two.png is no image")

            item = super().__getitem__(index)
            return item if index < 2 else Item(item.name, read, 0)

    with ccam.load(digits_bundle, batch_size=2) as explainer:
        data = Broken([Image.new("RGB", (96, 96), "navy")] * 3)
        measured = Evaluation(explainer, data, TWO[:1], EvaluationSettings(("average-drop",)))
        results = measured.open(tmp_path, "broken")
        with pytest.raises(ImageError, match=r"^picture 2: two\.png is no image"):
            list(measured.run(results))
        results = measured.open(tmp_path, "broken")
        assert len(results.rows) == 2
        lines: list[str] = []
        assert list(measured.run(results, lines.append)) == [1]
        assert lines == ["picture 2: two.png is no image"]
        assert [row.was_read for row in results.rows.values()] == [True, True, False]


def test_images_of_another_folder_are_other_images(digits: ccam.Explainer, tmp_path: Path) -> None:
    """Though they have the same names, as damaged copies of a data set do."""
    for name, color in (("clean", "navy"), ("noisy", "teal")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (96, 96), color).save(tmp_path / name / "one.png")
    manifest = digits.bundle.manifest
    clean, noisy = (ImageFolder(tmp_path / name, manifest) for name in ("clean", "noisy"))
    settings = EvaluationSettings(("average-drop",))
    Evaluation(digits, clean, TWO, settings).open(tmp_path / "out", "val")
    Evaluation(digits, clean, TWO, settings).open(tmp_path / "out", "val")
    with pytest.raises(OptionError, match="holds an evaluation of other images"):
        Evaluation(digits, noisy, TWO, settings).open(tmp_path / "out", "val")


def test_masks_of_a_file_may_not_change(digits: ccam.Explainer, tmp_path: Path) -> None:
    file, out = tmp_path / "masks.npy", tmp_path / "out"
    masks = np.full((2, *digits.bundle.manifest.input[1:]), 0.25, np.float32)
    np.save(file, masks)
    data = Pictures([Image.new("RGB", (96, 96))])
    rise = Variant("rise", RISE(file=str(file)))
    measured = Evaluation(digits, data, [rise], EvaluationSettings(("average-drop",)))
    measured.open(out, "pictures")
    measured.open(out, "pictures")
    np.save(file, 2 * masks)
    with pytest.raises(OptionError, match=r"with methods\.rise\.options\.file_sha256 "):
        measured.open(out, "pictures")


def test_an_image_that_was_mended_is_measured(digits_bundle: Path, tmp_path: Path) -> None:
    """With its group, so that numbers are those of a run that found it whole."""
    place = tmp_path / "images"
    place.mkdir()
    for name, color in (("1.png", "navy"), ("2.png", "teal"), ("3.png", "red")):
        Image.new("RGB", (96, 96), color).save(place / name)
    whole = (place / "1.png").read_bytes()
    with ccam.load(digits_bundle, batch_size=2) as explainer:
        data = ImageFolder(place, explainer.bundle.manifest)
        measured = Evaluation(explainer, data, TWO, EvaluationSettings(("average-drop",)))
        finished(measured, tmp_path / "whole")
        (place / "1.png").write_bytes(whole[:50])
        results = measured.open(tmp_path / "out", "scenes", pytest.fail)
        assert sum(measured.run(results, lambda line: None)) == 6
        lines: list[str] = []
        results = measured.open(tmp_path / "out", "scenes", lines.append)
        assert (len(results.rows), len(lines)) == (6, 1)
        assert lines[0].startswith("1.png: ")
        (place / "1.png").write_bytes(whole)
        results = measured.open(tmp_path / "out", "scenes", pytest.fail)
        assert list(results.rows) == [(2, variant.name) for variant in TWO]
        assert sum(measured.run(results, pytest.fail)) == 4
        found = (tmp_path / "out" / RESULTS).read_text().splitlines()
        assert sorted(found) == sorted((tmp_path / "whole" / RESULTS).read_text().splitlines())


def test_images_are_drawn_once_each() -> None:
    assert draw_places(5, 0, 0) == draw_places(5, 9, 0) == (0, 1, 2, 3, 4)
    places = draw_places(1000, 40, 1)
    assert len(set(places)) == 40
    assert list(places) == sorted(places)
    assert places == draw_places(1000, 40, 1)
    assert places != draw_places(1000, 40, 2)
    assert max(places) < 1000


def test_methods_by_name() -> None:
    names = ["collection-cam", "collection-cam"]
    assert make_variants(names) == (Variant("collection-cam", ccam.CollectionCAM()),)
    with pytest.raises(OptionError, match='method "x-cam" is unknown; there are collection-cam'):
        make_variants(["x-cam"])
    with pytest.raises(OptionError, match="there is no method to measure"):
        make_variants([])


def test_settings_are_checked(digits: ccam.Explainer) -> None:
    with pytest.raises(OptionError, match="limit is -1; it must be at least 1, or 0 for all"):
        make(digits, limit=-1)
    with pytest.raises(OptionError, match='target is "best"; it must be predicted or label'):
        make(digits, target="best")
