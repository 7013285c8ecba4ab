"""The measured values of each image, in a file from which an interrupted run resumes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ccam_deploy.arrays import Doubles
from ccam_deploy.errors import OptionError, OutputError
from ccam_deploy.files import write_file
from ccam_deploy.quality.metrics import CurveName
from ccam_deploy.text import one_line

SETTINGS = "settings.json"
RESULTS = "results.csv"
CURVES: tuple[CurveName, CurveName] = ("deletion", "insertion")
_FACTS = ("index", "name", "method", "target", "probability")
_CURVE = "_curve"


@dataclass(frozen=True)
class Row:
    """The values of one image's map by one method.

    Attributes:
        index: The image's place in the data set.
        name: Its name in the data set; the file has it on one line, see one_line.
        method: The variant's name.
        target: The class that was explained; -1 where the image could not be read.
        probability: The probability of that class for the whole image.
        values: Percent by metric; NaN where the image has no boxes or could not be read.
        curves: [n] float64 probabilities along the deletion and the insertion curve, where they
            were measured.
    """

    index: int
    name: str
    method: str
    target: int
    probability: float
    values: dict[str, float]
    curves: dict[str, Doubles] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, str]:
        """The image and the method."""
        return self.index, self.method

    @property
    def was_read(self) -> bool:
        """Whether the image could be read; the row has no values otherwise."""
        return self.target >= 0


class Results:
    """The rows of an evaluation, kept in a folder as they come.

    The folder also keeps the settings that made them. The first use writes the settings, and later
    uses refuse others. Rows are added for a whole group of images and a method at a time; groups
    that a killed process left incomplete are dropped.

    Attributes:
        folder: Where the files lie.
        metrics: Names of the metrics, the columns of the file.
        rows: All rows by image and method, in the order of the file.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Open a folder, or begin one.

        Args:
            folder: Where the files lie or will lie.
            settings: All that the values depend on.
            metrics: Names of the metrics.

        Raises:
            OptionError: The folder holds an evaluation with other settings.
            OutputError: The folder cannot be used.
        """
        self.folder = folder
        self.metrics = tuple(metrics)
        self.rows: dict[tuple[int, str], Row] = {}
        self._path = folder / RESULTS
        self._columns = (*_FACTS, *metrics, *(f"{curve}{_CURVE}" for curve in CURVES))
        content = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        known = _read(folder / SETTINGS)
        if not known:
            if _read(self._path):
                raise OutputError(f"{self._path} exists without {SETTINGS}; give another --output")
            if folder.is_dir() and any(folder.iterdir()):
                raise OutputError(f"{folder} has files of something else; give another --output")
            write_file(folder / SETTINGS, content.encode("utf-8", "backslashreplace"))
        else:
            _require_same_settings(folder, known, json.loads(content))
            self.rows = {row.key: row for row in self._parse(_read(self._path))}

    def keep(self, groups: Collection[Sequence[tuple[int, str]]]) -> None:
        """Drop rows of incomplete groups, and write the others in the groups' order.

        Args:
            groups: For each group the keys of its rows, which are added together.
        """
        whole = [key for group in groups if all(k in self.rows for k in group) for key in group]
        self.rows = {key: self.rows[key] for key in whole}
        write_file(self._path, self._text(list(self.rows.values()), header=True))

    def add(self, rows: Sequence[Row]) -> None:
        """Append the rows of a group; raise OutputError where they cannot be written."""
        content = self._text(rows, header=False)
        try:
            with self._path.open("ab", buffering=0) as file:
                if file.write(content) != len(content):
                    raise OutputError(f"cannot write {self._path}: the disk is full")
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror or error}") from error
        self.rows.update((row.key, row) for row in rows)

    def _text(self, rows: Sequence[Row], header: bool) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if header:
            writer.writerow(self._columns)
        for row in rows:
            facts = (row.index, one_line(row.name), row.method, row.target, repr(row.probability))
            values = (_number(row.values[name]) for name in self.metrics)
            curves = (
                " ".join(map(repr, row.curves.get(curve, np.zeros(0)).tolist())) for curve in CURVES
            )
            writer.writerow((*facts, *values, *curves))
        return text.getvalue().encode()

    def _parse(self, content: bytes) -> list[Row]:
        """Read rows up to the last whole line."""
        text = content[: content.rfind(b"\n") + 1].decode("utf-8", "surrogateescape")
        try:
            lines = list(csv.reader(io.StringIO(text)))
            if lines and tuple(lines[0]) != self._columns:
                raise OutputError(f"{self._path} has other columns; give another --output")
            return [self._row(dict(zip(self._columns, line, strict=True))) for line in lines[1:]]
        except (csv.Error, ValueError) as error:
            raise OutputError(
                f"{self._path} was changed ({error}); give another --output"
            ) from error

    def _row(self, cells: Mapping[str, str]) -> Row:
        curves = {
            curve: np.array(cells[f"{curve}{_CURVE}"].split(), np.float64) for curve in CURVES
        }
        return Row(
            int(cells["index"]),
            cells["name"],
            cells["method"],
            int(cells["target"]),
            float(cells["probability"]),
            {name: float(cells[name] or "nan") for name in self.metrics},
            {curve: points for curve, points in curves.items() if len(points)},
        )


def _number(value: float) -> str:
    """Write a number with all its digits; nothing for NaN."""
    return "" if math.isnan(value) else repr(float(value))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from error


def _require_same_settings(folder: Path, content: bytes, settings: Mapping[str, Any]) -> None:
    """Raise OptionError for the first setting that differs from the folder's."""
    try:
        known = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{folder / SETTINGS} is not readable: {error}") from error
    if not isinstance(known, dict):
        raise OutputError(f"{folder / SETTINGS} has no settings; give another --output")
    if {**known, "digest": ""} == {**settings, "digest": ""} and known != settings:
        raise OptionError(
            f"{folder} holds an evaluation of the bundle as it was before it was exported again; "
            "give another --output"
        )
    for name in {**known, **settings}:
        if known.get(name) != settings.get(name):
            raise OptionError(
                f"{folder} holds an evaluation "
                f"{_difference(name, known.get(name), settings.get(name))}; to continue it, "
                "give the options that it was begun with; to begin another, give another --output"
            )


def _difference(name: str, known: Any, other: Any) -> str:
    """The first difference of two settings, however deep it lies, as it follows "evaluation"."""
    if name == "images":
        return f"of {known} images, and this command asks for {other}"
    if name in ("names_sha256", "root_sha256"):
        return "of other images"
    if not isinstance(known, dict) or not isinstance(other, dict):
        return f"with {name} {json.dumps(known)}, and this command has {json.dumps(other)}"
    if known.keys() != other.keys():
        return f"with {name} {', '.join(known)}, and this command has {', '.join(other)}"
    key = next(key for key in known if known[key] != other[key])
    return _difference(f"{name}.{key}", known[key], other[key])
