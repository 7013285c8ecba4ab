"""Images to measure explanations on, in the layouts in which data sets are distributed."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.errors import DatasetError, OptionError, TargetError
from ccam_deploy.examples import scenes
from ccam_deploy.examples.scenes import Split
from ccam_deploy.image_files import IMAGE_SUFFIXES, find_images, is_hidden, is_image, load_image

Boxes = NDArray[np.float64]

_EDGES = ("bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")
_CUB_TABLES = ("image_class_labels.txt", "bounding_boxes.txt", "train_test_split.txt")
_SPLITS: dict[str, Split] = {"1": "train", "0": "test"}

_FARTHEST = 1e9
"""The largest coordinate of a box, in pixels."""

SCENES = 10_000
"""The number of digits in scenes, which could be any."""


def no_boxes() -> Boxes:
    """Make the boxes [0, 4] of an image that has none."""
    return np.zeros((0, 4))


@dataclass(frozen=True)
class Item:
    """One image of a data set.

    Attributes:
        name: Unique in its data set.
        read: Opens the image, upright.
        target: Its class in the bundle; None where the data set has no classes.
        boxes: [K, 4] float64 of the objects of that class: left, top, right, bottom in pixels of
            the image, right and bottom exclusive.
    """

    name: str
    read: Callable[[], Image.Image]
    target: int | None = None
    boxes: Boxes = field(default_factory=no_boxes)


class Dataset(ABC):
    """Images in a fixed order.

    Attributes:
        names: The images' names, known without opening them.
        has_classes: Whether images have a class.
        has_boxes: Whether images have boxes.
        root: The folder that they lie in; None where they are in none.
    """

    names: tuple[str, ...]
    root: Path | None = None
    has_classes = True
    has_boxes = False

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    @abstractmethod
    def __getitem__(self, index: int) -> Item:
        """Return the item at a place; raise DatasetError where its annotation is unusable."""


class ImageFolder(Dataset):
    """A folder of images without classes, or of folders named like the bundle's classes.

    A class's folder may also be named by its number, and may have subfolders.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        _require_folder(root, "an image folder")
        self.root = root
        inside = sorted(root.iterdir())
        folders = [path for path in inside if path.is_dir() and not is_hidden(path, root)]
        loose = [path for path in inside if is_image(path, root)]
        if folders and loose:
            raise DatasetError(
                f"{root} mixes images and folders; put all in folders of their class, or none"
            )
        if not folders and not loose:
            raise DatasetError(f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        self.has_classes = bool(folders)
        self._files: list[tuple[Path, int | None]] = [(path, None) for path in loose]
        for folder in folders:
            target = manifest.class_index(folder.name, partial=False)
            self._files += [(path, target) for path in find_images([folder])]
        self.names = tuple(path.relative_to(root).as_posix() for path, _ in self._files)

    def __getitem__(self, index: int) -> Item:
        path, target = self._files[index]
        return Item(self.names[index], partial(load_image, path), target)


class ImageNet(Dataset):
    """The validation images of ILSVRC 2012 (CLS-LOC), with the boxes of their objects.

    The root folder has Data/CLS-LOC/val (or val, or the images themselves) and
    Annotations/CLS-LOC/val. LOC_synset_mapping.txt lies in it or beside it; the line of a synset is
    its class, as in torchvision's networks. The numbers of an annotation are taken as the box's
    edges. Boxes of other classes than the first object's are left out.
    """

    has_boxes = True
    _MAPPING = "LOC_synset_mapping.txt"

    def __init__(self, root: Path, manifest: Manifest) -> None:
        _require_folder(root, "ImageNet")
        self.root = root
        places = (root / "Data" / "CLS-LOC" / "val", root / "val", root)
        lists = (sorted(place.glob("ILSVRC2012_val_*.JPEG")) for place in places)
        self._files = next((files for files in lists if files), [])
        if not self._files:
            raise DatasetError(
                f"{root} has no ILSVRC2012_val_*.JPEG in Data/CLS-LOC/val, in val or in itself"
            )
        self._boxes = root / "Annotations" / "CLS-LOC" / "val"
        if not self._boxes.is_dir():
            raise DatasetError(f"{root} has no Annotations/CLS-LOC/val with the validation boxes")
        _require_files([self._boxes / f"{path.stem}.xml" for path in self._files], "annotation")
        beside = (folder / self._MAPPING for folder in (root, root.parent))
        mapping = next((path for path in beside if path.is_file()), None)
        if mapping is None:
            raise DatasetError(f"{root} has no {self._MAPPING}, nor has the folder above it")
        synsets = [line.split()[0] for line in _lines(mapping)]
        _require_classes(manifest, len(synsets), str(mapping))
        self._classes = {synset: index for index, synset in enumerate(synsets)}
        self.names = tuple(path.stem for path in self._files)

    def __getitem__(self, index: int) -> Item:
        annotation = self._boxes / f"{self.names[index]}.xml"
        try:
            objects = ElementTree.parse(annotation).getroot().findall("object")
            synsets = [str(thing.findtext("name")) for thing in objects]
            corners = [[float(thing.findtext(edge, "")) for edge in _EDGES] for thing in objects]
        except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
            # LookupError for an encoding that does not exist.
            raise DatasetError(f"{annotation} is not a readable annotation: {error}") from error
        if not objects or synsets[0] not in self._classes:
            named = f'the unknown synset "{synsets[0]}"' if objects else "no object"
            raise DatasetError(f"{annotation} names {named}")
        for left, top, right, bottom in corners:
            box = [left, top, right, bottom]
            if not (left < right and top < bottom and _is_finite(box)):
                raise DatasetError(f"{annotation} has the box {box}")
        boxes = [box for box, synset in zip(corners, synsets, strict=True) if synset == synsets[0]]
        return Item(
            self.names[index],
            partial(load_image, self._files[index]),
            self._classes[synsets[0]],
            np.array(boxes, np.float64),
        )


class CUB(Dataset):
    """Caltech-UCSD Birds 200 (2011): one box an image, and a split in training and test.

    The root folder has images.txt, the other tables and images. Classes are taken by number: the
    first one, "001.Black_footed_Albatross", is the bundle's class 0.
    """

    has_boxes = True

    def __init__(self, root: Path, manifest: Manifest, split: Split = "test") -> None:
        _require_folder(root, "CUB-200-2011")
        self.root = root
        files = _table(root / "images.txt", 1)
        tables = [_table(root / file, 4 if "boxes" in file else 1) for file in _CUB_TABLES]
        self._rows: list[tuple[Path, int, Boxes]] = []
        names = []
        for key, (name,) in files.items():
            for file, table in zip(_CUB_TABLES, tables, strict=True):
                if key not in table:
                    raise DatasetError(f"{root / file} has no line for image {key} of images.txt")
            (number,), corners, (training,) = (table[key] for table in tables)
            try:
                target, box = _bird(number, corners)
                in_split = _SPLITS[training] == split
            except (KeyError, ValueError) as error:
                raise DatasetError(
                    f"{root} has no usable class, box or split for image {key}: {error}"
                ) from error
            if not _leads_inside(name):
                raise DatasetError(f'{root / "images.txt"} leads outside of images: "{name}"')
            if in_split:
                names.append(name)
                self._rows.append((root / "images" / name, target, box))
        if not names:
            raise DatasetError(f"{root / 'train_test_split.txt'} has no image of the {split} split")
        _require_files([path for path, _, _ in self._rows], "image")
        _require_classes(manifest, 1 + max(target for _, target, _ in self._rows), str(root))
        self.names = tuple(names)

    def __getitem__(self, index: int) -> Item:
        path, target, box = self._rows[index]
        return Item(self.names[index], partial(load_image, path), target, box)


class UCMerced(Dataset):
    """UC Merced land use: aerial images, Images/CLASS/CLASS00.tif.

    Classes are found by name; in a bundle without names, which must have as many, their order is
    the alphabet's. Some images are a few pixels smaller than the others' 256×256.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        _require_folder(root, "UC Merced")
        self.root = root
        images = root / "Images"
        folders = sorted(path for path in images.glob("*") if path.is_dir())
        if not folders:
            raise DatasetError(f"{root} has no Images folder with a folder for each class")
        if not manifest.labels and len(folders) != manifest.classes:
            # With a folder too few, all classes after it would be another's.
            raise TargetError(
                f"{images} has {len(folders)} classes, the bundle {manifest.classes} without names"
            )
        self._files: list[tuple[Path, int]] = []
        for place, folder in enumerate(folders):
            files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tif")
            if not files:
                raise DatasetError(f"{folder} has no .tif images")
            named = bool(manifest.labels)
            target = manifest.class_index(folder.name, partial=False) if named else place
            self._files += [(path, target) for path in files]
        self.names = tuple(path.relative_to(images).as_posix() for path, _ in self._files)

    def __getitem__(self, index: int) -> Item:
        path, target = self._files[index]
        return Item(self.names[index], partial(load_image, path), target)


class Scenes(Dataset):
    """The project's digits in scenes, made on demand."""

    has_boxes = True

    def __init__(
        self,
        manifest: Manifest,
        split: Split = "test",
        digits: Literal["single", "several"] = "single",
    ) -> None:
        scenes.require_scikit_learn()
        _require_classes(manifest, scenes.CLASSES, "digits in scenes")
        self._split = split
        self._digits: Literal["single", "several"] = digits
        self.names = tuple(f"{split}-scene-{seed}" for seed in range(SCENES))

    def __getitem__(self, index: int) -> Item:
        scene = scenes.make_scene(self._split, range(SCENES)[index], self._digits)
        picture = Image.fromarray(scene.image)
        return Item(
            self.names[index], lambda: picture, scene.digits[0], np.array(scene.boxes, np.float64)
        )


FORMS = (
    "scenes",
    "scenes:several",
    "imagenet:FOLDER",
    "cub:FOLDER",
    "ucmerced:FOLDER",
    "a folder of images",
)


def open_dataset(word: str, manifest: Manifest, split: str | None = None) -> Dataset:
    """Open a data set.

    Args:
        word: In one of FORMS.
        manifest: Of the bundle whose classes the images have.
        split: "train" or "test", for scenes and cub alone; test by default.

    Returns:
        The data set; its images are not opened yet.

    Raises:
        OptionError: The word is unknown, the data set has no split, or scikit-learn, which scenes
            need, is missing.
        DatasetError: The folder is not laid out like the data set.
        TargetError: The data set's classes are not the bundle's.
    """
    name, _, rest = word.partition(":")
    part: Split = "train" if split == "train" else "test"
    if name == "scenes" and rest in ("", "several"):
        return Scenes(manifest, part, "several" if rest else "single")
    if name == "cub" and rest:
        return CUB(Path(rest), manifest, part)
    if split is not None:
        raise OptionError(f'data set "{word}" has no split; scenes and cub have')
    if name == "imagenet" and rest:
        return ImageNet(Path(rest), manifest)
    if name == "ucmerced" and rest:
        return UCMerced(Path(rest), manifest)
    if not Path(word).is_dir():
        raise OptionError(
            f'data set "{word}" is neither a folder nor known; there are {", ".join(FORMS)}'
        )
    return ImageFolder(Path(word), manifest)


def _require_folder(root: Path, data_set: str) -> None:
    if not root.is_dir():
        raise DatasetError(f"{root} is not {data_set}: there is no such folder")


def _require_files(paths: Sequence[Path], content: str) -> None:
    """Raise DatasetError where files are missing, before any is measured."""
    missing = [path for path in paths if not os.path.isfile(path)]  # noqa: PTH113 (never raises)
    if missing:
        raise DatasetError(f"{missing[0]} is missing, one of {len(missing)} {content} files")


def _require_classes(manifest: Manifest, count: int, where: str) -> None:
    if manifest.classes < count:
        raise TargetError(f"{where} has {count} classes, the bundle {manifest.classes}")


def _bird(number: str, corners: Sequence[str]) -> tuple[int, Boxes]:
    """Read a class and a box [1, 4] of CUB's tables; raise ValueError for unusable values."""
    left, top, width, height = map(float, corners)
    if int(number) < 1:
        raise ValueError(f"class {number}; they count from 1")
    if not (width > 0 and height > 0):
        raise ValueError(f"a box of {width:g}x{height:g} pixels")
    box = [left, top, left + width, top + height]
    if not _is_finite(box):
        raise ValueError(f"the box {box}")
    return int(number) - 1, np.array([box])


def _is_finite(box: Sequence[float]) -> bool:
    """Whether a box can be scaled and moved without overflow."""
    return all(math.isfinite(edge) and abs(edge) < _FARTHEST for edge in box)


def _leads_inside(name: str) -> bool:
    """Whether a path from a table stays in the folder that it starts from."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not a text in UTF-8; save it as one") from error


def _table(path: Path, columns: int) -> dict[str, list[str]]:
    """Read the words of each line by its first; raise DatasetError for a line of other length."""
    words_by_key = {}
    for number, line in enumerate(_lines(path), 1):
        key, *words = line.split()
        if len(words) != columns:
            raise DatasetError(
                f'{path}, line {number}, is "{line}"; it must have {columns + 1} words'
            )
        words_by_key[key] = words
    return words_by_key
