"""Explanations as Python users meet them: pairs taken out, pictures drawn, files written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ccam_deploy as ccam
from ccam_deploy import render
from ccam_deploy.arrays import Floats
from ccam_deploy.preprocess import restore_image
from tests.helpers import example_files, example_pictures


@pytest.fixture
def explanation(digits: ccam.Explainer) -> ccam.Explanation:
    """Two pictures, the first with two classes."""
    return digits.explain(example_pictures()[:2], [[ccam.Top(2)], 3])


def test_a_pair_taken_out_is_an_explanation(explanation: ccam.Explanation) -> None:
    last = explanation[-1]
    assert len(last) == len(last.logits) == len(last.source.images) == 1
    assert last.targets.tolist() == [3]
    assert last.image_index.tolist() == [0]
    np.testing.assert_array_equal(last.saliency[0], explanation.saliency[2])
    np.testing.assert_array_equal(last.logits[0], explanation.logits[1])
    np.testing.assert_array_equal(last.masks[0], explanation.masks[2])
    np.testing.assert_array_equal(last.weights[0], explanation.weights[2])
    np.testing.assert_array_equal(last.layers[1].labels[0], explanation.layers[1].labels[2])
    np.testing.assert_array_equal(last.on_original(), explanation.on_original(2))
    np.testing.assert_array_equal(last.overlay(), explanation.overlay(2))
    assert last.probability() == explanation.probability(2)
    assert last.settings == explanation.settings


def test_slices_and_iteration(explanation: ccam.Explanation) -> None:
    first = explanation[:2]
    assert (len(first), len(first.logits)) == (2, 1)
    assert first.image_index.tolist() == [0, 0]
    assert [pair.targets[0] for pair in explanation] == explanation.targets.tolist()
    assert len(explanation[3:]) == 0
    with pytest.raises(IndexError, match="pair 3 is out of range; the explanation has 3 pairs"):
        explanation[3]


def test_pictures_of_maps(explanation: ccam.Explanation) -> None:
    look = ccam.Look("viridis", 0.3)
    picture = example_pictures()[1].convert("RGB")
    saliency = explanation.on_original(2)
    expected = render.overlay(picture, saliency, "viridis", 0.3)
    np.testing.assert_array_equal(explanation.overlay(2, look), expected)
    np.testing.assert_array_equal(explanation.heatmap(2, look), render.heatmap(saliency, "viridis"))
    assert explanation.panel(0).width > explanation.panel(1).width
    with pytest.raises(ccam.OptionError, match="image is 2; the explanation has images 0 to 1"):
        explanation.panel(2)


def test_what_a_centre_crop_cut_off_stays_as_it_is(digits: ccam.Explainer) -> None:
    """The example classifier crops: of a wide picture it sees the middle."""
    pixels = np.random.default_rng(0).integers(0, 200, (96, 288, 3)).astype(np.uint8)
    result = digits.explain(Image.fromarray(pixels))
    left, top, right, bottom = result.geometries[0].seen_in((288, 96))
    assert 0 < left < right < 288
    assert left + right == pytest.approx(288, abs=1)
    shown = np.asarray(result.overlay())
    outside = np.ones((96, 288), np.bool_)
    outside[top:bottom, left:right] = False
    np.testing.assert_array_equal(shown[outside], pixels[outside])
    inside = np.s_[top + 1 : bottom - 1, left + 1 : right - 1]
    blended = np.asarray(render.overlay(Image.fromarray(pixels), result.on_original()))
    np.testing.assert_array_equal(shown[inside], blended[inside])
    assert not result.on_original()[outside].any()
    heat = np.asarray(result.heatmap())
    assert (heat[outside] == 224).all()
    np.testing.assert_array_equal(heat[inside], render.colours(result.on_original())[inside])
    lowest = render.colours(np.zeros((1, 1), np.float32))[0, 0]
    assert not (heat[outside] == lowest).all(axis=1).any()


def test_arrays_are_drawn_on_the_restored_picture(digits: ccam.Explainer) -> None:
    images, _ = digits.preprocess(example_pictures()[:1])
    result = digits.explain(images)
    how = digits.bundle.manifest.preprocessing
    restored = restore_image(images[0], how.mean, how.std).convert("RGB")
    np.testing.assert_array_equal(result.picture(), restored)
    expected = render.overlay(restored, result.saliency[0])
    np.testing.assert_array_equal(result.overlay(), expected)


def test_files_of_every_format(explanation: ccam.Explanation, tmp_path: Path) -> None:
    names = example_files()[:2]
    written = explanation.save(
        tmp_path / "sub", ("overlay", "heatmap", "panel", "npz", "json"), names=names
    )
    assert [len(paths) for paths in written] == [4, 5, 5]
    assert sorted(path for paths in written for path in paths) == sorted(
        (tmp_path / "sub").iterdir()
    )
    stem = f"{names[1].stem}-{explanation.labels[2]}"
    with Image.open(tmp_path / "sub" / f"{stem}.overlay.png") as picture:
        np.testing.assert_array_equal(picture, explanation.overlay(2))
    with np.load(tmp_path / "sub" / f"{stem}.npz") as arrays:
        np.testing.assert_array_equal(arrays["saliency"], explanation.saliency[2])
        np.testing.assert_array_equal(arrays["original"], explanation.on_original(2))
    facts = json.loads((tmp_path / "sub" / f"{stem}.json").read_text())
    assert facts["file"] == str(names[1])
    assert facts["probability"] == explanation.probability(2)


@pytest.mark.slow
def test_methods_in_one_folder_do_not_overwrite_each_other(
    digits: ccam.Explainer, tmp_path: Path
) -> None:
    images, _ = digits.preprocess(example_pictures()[:1])
    for method in ("collection-cam", "grad-cam"):
        shown = digits.explain(images, [1], method=method)
        shown.save(tmp_path, ("overlay", "panel", "json"), names=["a"])
    label = digits.bundle.manifest.labels[1]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"a-{label}.overlay.png",
        f"a-{label}.json",
        "a-panel.png",
        f"a-{label}-grad-cam.overlay.png",
        f"a-{label}-grad-cam.json",
        "a-grad-cam-panel.png",
    }


def test_masks_are_drawn_by_weight_as_the_classifier_gets_them(
    explanation: ccam.Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tiles show is computed from the masks alone; a grid of rows is left as it is."""
    rows: list[list[render.Tile]] = []

    def keep(tiles: list[list[render.Tile]]) -> Image.Image:
        rows.extend(tiles)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(render, "grid", keep)
    explanation.masks_panel(2)
    how = explanation.source.manifest.preprocessing
    masks, weights = explanation.masks[2], explanation.weights[2]
    assert len(rows) == len(explanation.layers)
    place = 0
    for layer, ((caption, part), *tiles) in zip(explanation.layers, rows, strict=True):
        count = int(layer.count[2])
        own = slice(place, place + count)
        assert caption == f"{layer.name}: {weights[own].sum():.3f}"
        assert len(tiles) == count
        shares = [float(words.partition(",")[0]) for words, _ in tiles]
        assert shares == sorted(shares, reverse=True)
        heaviest = place + int(np.argmax(weights[own]))
        channels = np.count_nonzero(layer.labels[2] == heaviest - place)
        assert tiles[0][0] == f"{weights[heaviest]:.3f}, {channels} ch."
        seen = explanation.geometries[1]
        picture = explanation.picture(2).resize(seen.scaled[::-1], Image.Resampling.BILINEAR)
        top, left = seen.corner
        box = (left, top, left + seen.size[1], top + seen.size[0])
        pixels = np.asarray(picture.crop(box), np.float64)
        grey = 255 * np.array(how.mean)
        expected = grey + (pixels - grey) * masks[heaviest][..., None]
        np.testing.assert_allclose(np.asarray(tiles[0][1], np.float64), expected, atol=1)
        total = np.einsum("n,nij->ij", weights[own], masks[own])
        base = Image.fromarray(pixels.astype(np.uint8))
        overlay = render.overlay(base, (total / total.max()).astype(np.float32))
        np.testing.assert_allclose(
            np.asarray(part, np.float64), np.asarray(overlay, np.float64), atol=4
        )
        place += count


def test_masks_of_an_array_and_of_a_method_without_any(
    digits: ccam.Explainer, tmp_path: Path
) -> None:
    images: Floats = digits.preprocess(example_pictures()[:1])[0]
    result = digits.explain(images)
    (paths,) = result.save(tmp_path, ("masks",))
    assert [path.name for path in paths] == [f"image-1-{result.labels[0]}.masks.png"]
    with Image.open(paths[0]) as picture:
        np.testing.assert_array_equal(picture, result.masks_panel())
    other = digits.explain(images, method="grad-cam")
    message = "method grad-cam keeps no masks to draw; collection-cam does"
    with pytest.raises(ccam.OptionError, match=message):
        other.masks_panel()
    with pytest.raises(ccam.OptionError, match=message):
        other.save(tmp_path / "none", ("overlay", "masks"))
    assert not (tmp_path / "none").exists()


def test_files_without_names_are_numbered(digits: ccam.Explainer, tmp_path: Path) -> None:
    images: Floats = digits.preprocess(example_pictures()[:2])[0]
    written = digits.explain(images, 4).save(tmp_path, ("npz",))
    assert [paths[0].name for paths in written] == ["image-1-4.npz", "image-2-4.npz"]
    with np.load(written[0][0]) as arrays:
        assert "original" not in arrays


def test_what_cannot_be_written_is_refused(explanation: ccam.Explanation, tmp_path: Path) -> None:
    with pytest.raises(ccam.OptionError, match='format "gif" is unknown; there are overlay, heat'):
        explanation.save(tmp_path, ("gif",))
    with pytest.raises(ccam.OptionError, match="there are 1 names for 2 images"):
        explanation.save(tmp_path, names=["one.png"])
    assert not list(tmp_path.iterdir())
