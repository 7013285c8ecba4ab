"""Small data sets on disk, laid out as the real ones are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ccam_deploy.bundle.manifest import Manifest, Preprocessing


def manifest(labels: Sequence[str] = (), classes: int = 0) -> Manifest:
    """A manifest of which only the classes matter."""
    how = Preprocessing("crop", (8, 8), "bilinear", (0.5,) * 3, (0.25,) * 3)
    return Manifest(
        format=1,
        name="made-up",
        input=(3, 8, 8),
        preprocessing=how,
        classes=classes or len(labels),
        labels=tuple(labels),
        layers=(),
        precisions={},
        random_weights=True,
        source="",
        tools={},
        files={},
    )


def picture(path: Path, seed: int, size: tuple[int, int] = (24, 20)) -> Path:
    """Write an image of noise, width and height given; the suffix chooses the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def image_folder(root: Path, classes: Sequence[str], each: int = 2) -> Path:
    """root/CLASS/N.png."""
    for number, name in enumerate(classes):
        for index in range(each):
            picture(root / name / f"{index}.png", 10 * number + index)
    return root


SYNSETS = ("n01440764", "n01443537", "n01484850")
_OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def annotation(objects: Sequence[tuple[str, int, int, int, int]]) -> str:
    rows = "".join(_OBJECT.format(*thing) for thing in objects)
    size = "<size><width>24</width><height>20</height><depth>3</depth></size>"
    return f"<annotation><folder>val</folder>{size}<segmented>0</segmented>{rows}</annotation>"


def imagenet(root: Path, images: str = "Data/CLS-LOC/val") -> Path:
    """Two validation images: one object of class 1; two of class 2 and one of another class."""
    places = root / "Annotations" / "CLS-LOC" / "val"
    places.mkdir(parents=True)
    contents = (
        [("n01443537", 3, 2, 11, 9)],
        [("n01484850", 0, 0, 5, 6), ("n01484850", 10, 4, 24, 20), ("n01440764", 1, 1, 2, 2)],
    )
    for number, objects in enumerate(contents, 1):
        stem = f"ILSVRC2012_val_{number:08}"
        picture(root / images / f"{stem}.JPEG", number)
        (places / f"{stem}.xml").write_text(annotation(objects))
    lines = ("tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark")
    text = "\n".join(map(" ".join, zip(SYNSETS, lines, strict=True)))
    (root / "LOC_synset_mapping.txt").write_text(text + "\n")
    return root


BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross")


def cub(root: Path) -> Path:
    """Four birds of two classes; images 2 and 3 are the test split."""
    names = [f"{BIRDS[n // 2]}/Bird_{n:04}_{796 + n}.jpg" for n in range(4)]
    for number, name in enumerate(names):
        picture(root / "images" / name, number)
    tables = {
        "images.txt": names,
        "classes.txt": BIRDS,
        "image_class_labels.txt": ["1", "1", "2", "2"],
        "bounding_boxes.txt": [f"{n}.0 2.0 10.0 8.5" for n in range(4)],
        "train_test_split.txt": ["1", "0", "0", "1"],
    }
    for file, rows in tables.items():
        text = "".join(f"{number} {row}\n" for number, row in enumerate(rows, 1))
        (root / file).write_text(text)
    return root


LAND_USE = ("agricultural", "airplane", "beach")


def uc_merced(root: Path) -> Path:
    """Two TIFF images of each of three classes, the second one narrower."""
    for number, name in enumerate(LAND_USE):
        for index, width in enumerate((24, 22)):
            path = root / "Images" / name / f"{name}{index:02}.tif"
            picture(path, 10 * number + index, (width, 24))
    return root
