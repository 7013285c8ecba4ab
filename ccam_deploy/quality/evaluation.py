"""Measures methods on a data set, image by image, so that an interrupted run can go on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ccam_deploy import __version__
from ccam_deploy.arrays import Doubles, Floats
from ccam_deploy.bundle.folder import digest_without_plans
from ccam_deploy.engines.tensorrt import library
from ccam_deploy.errors import BackendError, DatasetError, ImageError, OptionError
from ccam_deploy.explainer import Explainer
from ccam_deploy.explanation import Explanation
from ccam_deploy.methods import METHODS, Method, make_method
from ccam_deploy.quality import metrics
from ccam_deploy.quality.datasets import Dataset, Item
from ccam_deploy.quality.metrics import METRICS, PROTOCOLS
from ccam_deploy.quality.results import CURVES, Results, Row

Target = Literal["predicted", "label"]


@dataclass(frozen=True)
class Variant:
    """A method with its options, and the name that results have for it."""

    name: str
    method: Method

    def explain(self, explainer: Explainer, images: Floats, targets: Sequence[int]) -> Explanation:
        """Explain a class for each of some preprocessed images."""
        return explainer.explain(images, targets, method=self.method)


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    metrics: names among METRICS; none for all that the data set allows.
    protocol: a name among PROTOCOLS.   limit: how many images, drawn at random; 0 for all.
    seed: of the draw, and of the intervals' bootstrap.
    target: the class that is explained, the classifier's best or the data set's.
    """

    metrics: tuple[str, ...] = ()
    protocol: str = "paper"
    limit: int = 0
    seed: int = 0
    target: Target = "predicted"


def variants(names: Sequence[str]) -> tuple[Variant, ...]:
    """Methods by name, with their defaults. Raises OptionError for an unknown one or none."""
    if not names:
        raise OptionError(f"there is no method to measure; there are {', '.join(METHODS)}")
    return tuple(Variant(name, make_method(name)) for name in dict.fromkeys(names))


@dataclass(frozen=True)
class _Opened:
    """An image that was read. image: [C, H, W].   boxes: of it, in the network's input."""

    place: int
    item: Item
    image: Floats
    boxes: Doubles


@dataclass(frozen=True)
class _Group:
    """Images that are measured together, with what all methods share.

    images: [B, C, H, W].   targets, predicted: [B].   before: [B], probabilities of the targets.
    """

    read: tuple[_Opened, ...]
    images: Floats
    targets: NDArray[np.int64]
    predicted: NDArray[np.int64]
    before: Doubles


class Evaluation:
    """Measures some variants of methods on some images of a data set.

    Images go in groups of the explainer's batch size, always the same ones, so that a run that
    goes on gives to the bit what one without a break would have given on the same backend.
    """

    def __init__(
        self,
        explainer: Explainer,
        dataset: Dataset,
        contenders: Sequence[Variant],
        settings: EvaluationSettings,
    ) -> None:
        """Raises OptionError for settings that are unknown or that the data set does not allow.

        So it does, before anything is measured, for methods that cannot run on the bundle.
        """
        self.explainer = explainer
        self.dataset = dataset
        self.contenders = tuple(contenders)
        self.settings = settings
        self.metrics = _metrics(settings, dataset)
        if settings.limit < 0:
            raise OptionError(f"limit is {settings.limit}; it must be at least 1, or 0 for all")
        if settings.target not in ("predicted", "label"):
            raise OptionError(f'target is "{settings.target}"; it must be predicted or label')
        if settings.target == "label" and not dataset.has_classes:
            raise OptionError("the data set has no classes to explain; use --target predicted")
        self.places = drawn(len(dataset), settings.limit, settings.seed)
        check_methods(explainer, self.contenders)

    @property
    def total(self) -> int:
        """How many rows there are to measure."""
        return len(self.places) * len(self.contenders)

    def facts(self, dataset: str) -> dict[str, Any]:
        """All that the numbers depend on. dataset: how it was named."""
        explainer = self.explainer
        names = "\n".join(self.dataset.names[place] for place in self.places)
        return {
            "version": __version__,
            "bundle": explainer.bundle.manifest.name,
            "backend": explainer.networks.backend,
            "precision": explainer.precision,
            "batch_size": explainer.batch_size,
            "dataset": dataset,
            "methods": {one.name: _described(one) for one in self.contenders},
            "metrics": list(self.metrics),
            "protocol": self.settings.protocol,
            "target": self.settings.target,
            "seed": self.settings.seed,
            "images": len(self.places),
            "digest": self._digest,
            "names_sha256": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
        }

    def open(self, folder: Path, dataset: str) -> Results:
        """The folder's results of these settings, to go on with; see Results."""
        results = Results(folder, self.facts(dataset), self.metrics)
        results.keep([self._keys(g, one) for g in self._groups for one in self.contenders])
        return results

    def run(
        self, results: Results, pass_over: Callable[[str], None] | None = None
    ) -> Iterator[int]:
        """Measure what is missing; gives how many rows were added, group by group.

        pass_over: called with a line about each image that cannot be read, which then has a row
            without values; without it, such an image ends the run.
        Raises what reading an image, explaining it or writing rows raises; what was measured
        until then is kept.
        """
        for places in self._groups:
            missing = [
                one
                for one in self.contenders
                if any(key not in results.rows for key in self._keys(places, one))
            ]
            if missing:
                read = self._read(places, pass_over)
                group = self._group(read) if read else None
                for one in missing:
                    rows = {row.index: row for row in self._measure(group, one)} if group else {}
                    results.add([rows.get(place) or self._unread(place, one) for place in places])
                    yield len(places)

    @property
    def _digest(self) -> str:
        """Of all in the bundle that the numbers depend on; plans count where plans run."""
        manifest = self.explainer.bundle.manifest
        if self.explainer.networks.backend in library.FLAVOURS:
            return manifest.digest
        return digest_without_plans(manifest)

    @cached_property
    def _groups(self) -> list[tuple[int, ...]]:
        size = self.explainer.batch_size
        return [self.places[start : start + size] for start in range(0, len(self.places), size)]

    def _keys(self, places: Sequence[int], one: Variant) -> list[tuple[int, str]]:
        return [(place, one.name) for place in places]

    def _read(
        self, places: tuple[int, ...], pass_over: Callable[[str], None] | None
    ) -> list[_Opened]:
        """Those images that can be read."""
        found = []
        for place in places:
            try:
                item = self.dataset[place]
                image, (geometry,) = self.explainer.preprocess([item.read()])
            except (DatasetError, ImageError) as error:
                line = f"{self.dataset.names[place]}: {error}"
                if pass_over is None:
                    raise type(error)(line) from error
                pass_over(line)
            else:
                found.append(_Opened(place, item, image[0], geometry.to_input(item.boxes)))
        return found

    def _group(self, read: Sequence[_Opened]) -> _Group:
        images = np.stack([one.image for one in read])
        whole = np.ones((len(images), *images.shape[2:]), np.float32)
        logits = metrics.masked_logits(
            self.explainer.networks, images, whole, self.explainer.batch_size
        )
        predicted = logits.argmax(axis=1).astype(np.int64)
        targets = predicted
        if self.settings.target == "label":
            targets = np.array([one.item.target for one in read], np.int64)
        before = metrics.probabilities(logits, targets)
        return _Group(tuple(read), images, targets, predicted, before)

    def _unread(self, place: int, one: Variant) -> Row:
        """The row of an image that could not be read."""
        nothing = float("nan")
        values = dict.fromkeys(self.metrics, nothing)
        return Row(place, self.dataset.names[place], one.name, -1, nothing, values)

    def _measure(self, group: _Group, one: Variant) -> list[Row]:
        """The rows of a group and a method."""
        saliency = one.explain(self.explainer, group.images, group.targets.tolist()).saliency
        values = self._masked(group, saliency)
        curves = self._curves(group, saliency)
        areas = {kind: 100 * metrics.area(points) for kind, points in curves.items()}
        if len(areas) == 2:
            areas["overall"] = areas["insertion"] - areas["deletion"]
        values |= areas | self._localised(group, saliency)
        return [
            Row(
                opened.place,
                opened.item.name,
                one.name,
                int(group.targets[row]),
                float(group.before[row]),
                {name: float(values[name][row]) for name in self.metrics},
                {kind: points[row] for kind, points in curves.items()},
            )
            for row, opened in enumerate(group.read)
        ]

    def _masked(self, group: _Group, saliency: Floats) -> dict[str, Doubles]:
        if not {"average-drop", "average-increase"} & set(self.metrics):
            return {}
        chunk = self.explainer.batch_size
        logits = metrics.masked_logits(self.explainer.networks, group.images, saliency, chunk)
        after = metrics.probabilities(logits, group.targets)
        return {
            "average-drop": metrics.average_drop(group.before, after),
            "average-increase": metrics.average_increase(group.before, after),
        }

    def _curves(self, group: _Group, saliency: Floats) -> dict[str, Doubles]:
        """The curves that the metrics need."""
        protocol = PROTOCOLS[self.settings.protocol]
        return {
            kind: metrics.curves(
                self.explainer.networks,
                group.images,
                saliency,
                group.predicted if protocol.predicted else group.targets,
                protocol,
                kind,
                self.explainer.batch_size,
            )
            for kind in CURVES
            if {kind, "overall"} & set(self.metrics)
        }

    def _localised(self, group: _Group, saliency: Floats) -> dict[str, Doubles]:
        pairs = [(one, read.boxes) for one, read in zip(saliency, group.read, strict=True)]
        near = f"pointing-{metrics.TOLERANCE}"
        return {
            "proportion": np.array([metrics.proportion(*pair) for pair in pairs]),
            "pointing": np.array([metrics.pointing(*pair) for pair in pairs]),
            near: np.array([metrics.pointing(*pair, metrics.TOLERANCE) for pair in pairs]),
        }


def drawn(size: int, limit: int, seed: int) -> tuple[int, ...]:
    """The places of `limit` of `size` images, drawn without replacement, in order; 0 for all."""
    if not limit or limit >= size:
        return tuple(range(size))
    chosen = np.random.default_rng(seed).choice(size, limit, replace=False)
    return tuple(sorted(map(int, chosen)))


def _metrics(settings: EvaluationSettings, dataset: Dataset) -> tuple[str, ...]:
    metrics.check_metrics(settings.metrics, settings.protocol)
    possible = [name for name in METRICS if dataset.has_boxes or not METRICS[name].boxes]
    for name in settings.metrics:
        if name not in possible:
            raise OptionError(f"{name} needs boxes, which the data set does not have")
    return tuple(name for name in possible if not settings.metrics or name in settings.metrics)


def refused(explainer: Explainer, contenders: Sequence[Variant]) -> dict[str, str]:
    """Why those methods that cannot run on a bundle cannot, by name."""
    found = {}
    for one in contenders:
        try:
            explainer.require_method(one.method)
        except (OptionError, BackendError) as error:
            found[one.name] = str(error)
    return found


def check_methods(explainer: Explainer, contenders: Sequence[Variant]) -> None:
    """Raise OptionError with all methods that cannot run on a bundle, and what each needs."""
    by_reason: dict[str, list[str]] = {}
    for name, why in refused(explainer, contenders).items():
        by_reason.setdefault(why, []).append(name)
    if by_reason:
        reasons = (f"{', '.join(names)} ({why})" for why, names in by_reason.items())
        raise OptionError(f"some methods cannot run here: {', '.join(reasons)}")


def _described(one: Variant) -> dict[str, Any]:
    return {"method": one.method.name, "options": dataclasses.asdict(one.method)}
