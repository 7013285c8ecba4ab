"""Data sets in the layouts in which they are distributed, made small by the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from ccam_deploy.errors import CcamError, DatasetError, OptionError, TargetError
from ccam_deploy.examples import scenes
from ccam_deploy.quality.datasets import Dataset, ImageNet, Item, Scenes, open_dataset
from tests.quality.layouts import (
    BIRDS,
    LAND_USE,
    annotation,
    cub,
    image_folder,
    imagenet,
    manifest,
    picture,
    uc_merced,
)

PETS = manifest(("ant", "bee", "cat"))


def rows(dataset: Dataset) -> list[tuple[str, int | None, list[list[float]]]]:
    """Names, classes and boxes; names are known beforehand, and every image can be opened."""
    items = list(dataset)
    assert tuple(item.name for item in items) == dataset.names
    assert len(set(dataset.names)) == len(dataset) == len(items)
    assert dataset.has_boxes == any(len(item.boxes) for item in items)
    assert dataset.has_classes == any(item.target is not None for item in items)
    assert all(item.read().width >= 8 for item in items)
    assert all(item.boxes.dtype == np.float64 for item in items)
    return [(item.name, item.target, item.boxes.tolist()) for item in items]


def test_folder_of_classes(tmp_path: Path) -> None:
    """A class has a folder of its name or its number; what lies deeper in it is its too."""
    root = image_folder(tmp_path / "pets", ["cat", "0"], each=1)
    picture(root / "cat" / "more" / "a.jpg", 7)
    (root / "cat" / "notes.txt").write_text("no image")
    assert rows(open_dataset(str(root), PETS)) == [
        ("0/0.png", 0, []),
        ("cat/0.png", 2, []),
        ("cat/more/a.jpg", 2, []),
    ]


def test_folder_without_classes(tmp_path: Path) -> None:
    picture(tmp_path / "b.png", 1)
    picture(tmp_path / "a.webp", 2)
    assert rows(open_dataset(str(tmp_path), PETS)) == [("a.webp", None, []), ("b.png", None, [])]


@pytest.mark.parametrize("images", ["Data/CLS-LOC/val", "val", ""])
def test_imagenet(tmp_path: Path, images: str) -> None:
    """The first object's class is the image's; boxes of other classes are left out."""
    root = imagenet(tmp_path / "ILSVRC", images)
    expected = [
        ("ILSVRC2012_val_00000001", 1, [[3, 2, 11, 9]]),
        ("ILSVRC2012_val_00000002", 2, [[0, 0, 5, 6], [10, 4, 24, 20]]),
    ]
    assert rows(open_dataset(f"imagenet:{root}", manifest(classes=3))) == expected
    mapping = root / "LOC_synset_mapping.txt"
    mapping.write_text(mapping.read_text(), encoding="utf-8-sig")
    mapping.rename(tmp_path / "LOC_synset_mapping.txt")
    assert rows(ImageNet(root, manifest(classes=3))) == expected


def test_cub_has_splits(tmp_path: Path) -> None:
    """Its boxes are x, y, width, height; its classes count from 1."""
    root, birds = cub(tmp_path), manifest(classes=2)
    names = [f"{BIRDS[n // 2]}/Bird_{n:04}_{796 + n}.jpg" for n in range(4)]
    boxes = [[n, 2, n + 10, 10.5] for n in range(4)]
    test = [(names[n], n // 2, [boxes[n]]) for n in (1, 2)]
    assert rows(open_dataset(f"cub:{root}", birds)) == test
    assert rows(open_dataset(f"cub:{root}", birds, "test")) == test
    train = [(names[n], n // 2, [boxes[n]]) for n in (0, 3)]
    assert rows(open_dataset(f"cub:{root}", birds, "train")) == train


def test_uc_merced_by_name_and_by_alphabet(tmp_path: Path) -> None:
    """Images of several sizes are read; a class too few is no alphabet."""
    root = uc_merced(tmp_path)
    by_alphabet = rows(open_dataset(f"ucmerced:{root}", manifest(classes=3)))
    assert by_alphabet[3] == ("airplane/airplane01.tif", 1, [])
    assert [target for _, target, _ in by_alphabet] == [0, 0, 1, 1, 2, 2]
    turned = manifest(LAND_USE[::-1])
    by_name = rows(open_dataset(f"ucmerced:{root}", turned))
    assert [target for _, target, _ in by_name] == [2, 2, 1, 1, 0, 0]
    sizes = [item.read().size for item in open_dataset(f"ucmerced:{root}", turned)]
    assert sizes == [(24, 24), (22, 24)] * 3
    with pytest.raises(TargetError, match="has 3 classes, the bundle 4 without names"):
        open_dataset(f"ucmerced:{root}", manifest(classes=4))


@pytest.mark.parametrize("split", get_args(scenes.Split))
def test_scenes_are_the_generators(split: scenes.Split) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    for word, digits in (("scenes", "single"), ("scenes:several", "several")):
        dataset = open_dataset(word, manifest(classes=10), split)
        item = dataset[31]
        scene = scenes.make_scene(split, 31, digits)  # type: ignore[arg-type]
        assert (item.name, item.target) == (f"{split}-scene-31", scene.digits[0])
        assert item.boxes.tolist() == [list(box) for box in scene.boxes]
        np.testing.assert_array_equal(np.asarray(item.read()), scene.image)
    assert isinstance(dataset, Scenes)
    assert dataset.has_boxes
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(text.encode("utf-8", "surrogateescape"))


XML = "Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml"
BROKEN = [
    ("imagenet", remove(XML), "val_00000001.xml is missing, one of 1 annotation files"),
    ("imagenet", write(XML, "<annotation>"), "is not a readable annotation: no element found"),
    ("imagenet", write(XML, annotation([])), "00000001.xml names no object"),
    (
        "imagenet",
        write(XML, annotation([("n999", 1, 2, 3, 4)])),
        'names the unknown synset "n999"',
    ),
    (
        "imagenet",
        write(XML, "<a><object><name>n01440764</name></object></a>"),
        "is not a readable annotation: could not convert",
    ),
    (
        "imagenet",
        write(XML, '<?xml version="1.0" encoding="none"?><a/>'),
        "is not a readable annotation: unknown encoding",
    ),
    (
        "imagenet",
        write(XML, annotation([("n01440764", 7, 2, 7, 4)])),
        r"00000001.xml has the box \[7.0, 2.0, 7.0, 4.0\]",
    ),
    ("imagenet", write("LOC_synset_mapping.txt", "\0\udcff"), "mapping.txt is not a text in UTF-8"),
    ("imagenet", remove("LOC_synset_mapping.txt"), "has no LOC_synset_mapping.txt, nor has"),
    ("cub", remove("images.txt"), "images.txt cannot be read: No such file or directory$"),
    ("cub", remove("bounding_boxes.txt"), "bounding_boxes.txt cannot be read"),
    (
        "cub",
        write("bounding_boxes.txt", "1 2 3 4 5\n2 3 4\n"),
        r'bounding_boxes.txt, line 2, is "2 3 4"; it must have 5 words',
    ),
    ("cub", write("image_class_labels.txt", "1 1\n"), "labels.txt has no line for image 2"),
    (
        "cub",
        write("bounding_boxes.txt", "1 a b c d\n2 a b c d\n3 a b c d\n4 a b c d\n"),
        "has no usable class, box or split for image 1: could not convert",
    ),
    (
        "cub",
        write("image_class_labels.txt", "1 1\n2 0\n3 2\n4 2\n"),
        "for image 2: class 0; they count from 1",
    ),
    (
        "cub",
        write("bounding_boxes.txt", "1 0 0 5 5\n2 0 0 5 -5\n3 0 0 5 5\n4 0 0 5 5\n"),
        "for image 2: a box of 5x-5 pixels",
    ),
    ("cub", write("train_test_split.txt", "1 1\n2 0\n3 yes\n4 1\n"), "for image 3: 'yes'"),
    (
        "cub",
        remove(f"images/{BIRDS[1]}/Bird_0002_798.jpg"),
        "Bird_0002_798.jpg is missing, one of 1 image files",
    ),
    (
        "cub",
        write("train_test_split.txt", "1 1\n2 1\n3 1\n4 1\n"),
        "train_test_split.txt has no image of the test split",
    ),
]
MAKE: dict[str, Callable[[Path], Path]] = {"imagenet": imagenet, "cub": cub}


@pytest.mark.parametrize(("layout", "damage", "message"), BROKEN)
def test_bad_layouts_are_one_line(
    tmp_path: Path, layout: str, damage: Callable[[Path], object], message: str
) -> None:
    root = MAKE[layout](tmp_path)
    damage(root)
    with pytest.raises(DatasetError, match=message) as caught:
        list(open_dataset(f"{layout}:{root}", manifest(classes=3)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("imagenet", "has no ILSVRC2012_val_"),
        ("cub", "images.txt cannot be read"),
        ("ucmerced", "has no Images folder with a folder for each class"),
    ],
)
def test_another_layout_is_one_line(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"{word}:{tmp_path}", PETS)
    with pytest.raises(DatasetError, match=r"nowhere is not .*: there is no such folder"):
        open_dataset(f"{word}:nowhere", PETS)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no images"):
        open_dataset(str(tmp_path), PETS)
    root = image_folder(tmp_path, ["cat", "dog"])
    with pytest.raises(TargetError, match='class "dog" is not in the bundle; it has ant, bee, cat'):
        open_dataset(str(root), PETS)
    picture(root / "loose.png", 0)
    with pytest.raises(DatasetError, match="mixes images and folders"):
        open_dataset(str(root), PETS)


def test_classes_must_fit_the_bundle(tmp_path: Path) -> None:
    few = manifest(classes=1)
    with pytest.raises(TargetError, match=r"LOC_synset_mapping\.txt has 3 classes, the bundle 1"):
        open_dataset(f"imagenet:{imagenet(tmp_path / 'a')}", few)
    with pytest.raises(TargetError, match="has 2 classes, the bundle 1"):
        open_dataset(f"cub:{cub(tmp_path / 'b')}", few)
    with pytest.raises(TargetError, match="Images has 3 classes, the bundle 1 without names"):
        open_dataset(f"ucmerced:{uc_merced(tmp_path / 'c')}", few)
    with pytest.raises(TargetError, match="digits in scenes has 10 classes, the bundle 1"):
        open_dataset("scenes", few)


@pytest.mark.parametrize("word", ["coco", "scenes:two-classes", "cub:", "coco:/data"])
def test_unknown_names_are_one_line(word: str) -> None:
    with pytest.raises(OptionError, match=f'data set "{word}" is neither a folder nor known; '):
        open_dataset(word, PETS)


def test_a_split_goes_with_data_that_has_one(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    with pytest.raises(OptionError, match="has no split; scenes and cub have"):
        open_dataset(str(tmp_path), PETS, "train")


def test_scenes_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(OptionError, match=r"pip install 'ccam-deploy\[scenes\]'"):
        open_dataset("scenes", manifest(classes=10))


def test_item_is_read_when_asked(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    (item,) = open_dataset(str(tmp_path), PETS)
    assert isinstance(item, Item)
    with pytest.raises(CcamError, match=r"broken\.png is not an image"):
        item.read()
