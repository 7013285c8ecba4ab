"""Measures methods on a data set, image by image, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ccam_deploy import __version__
from ccam_deploy.bundle.folder import digest_without_plans
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.engines.tensorrt import library
from ccam_deploy.errors import DatasetError, ImageError, OptionError
from ccam_deploy.explainer import Explainer
from ccam_deploy.quality import metrics
from ccam_deploy.quality.datasets import Dataset
from ccam_deploy.quality.metrics import METRICS, PROTOCOLS
from ccam_deploy.quality.results import Results, Row
from ccam_deploy.quality.scoring import Group, OpenedImage, Scoring
from ccam_deploy.quality.variants import Variant, require_runnable

Target = Literal["predicted", "label"]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
        metrics: Names among METRICS; empty for all that the data set allows.
        protocol: A name among PROTOCOLS.
        limit: How many images, drawn at random; 0 for all.
        seed: Of the draw, and of the intervals' bootstrap.
        target: The class that is explained: the classifier's best, or the data set's label.
    """

    metrics: tuple[str, ...] = ()
    protocol: str = "paper"
    limit: int = 0
    seed: int = 0
    target: Target = "predicted"


class Evaluation:
    """Measures variants of methods on images of a data set.

    Images go in groups of the explainer's batch size, always the same ones: a resumed run gives,
    bit by bit, what an uninterrupted run gives on the same backend.

    Attributes:
        explainer: Explains and classifies.
        dataset: Where the images come from.
        variants: The methods that are measured.
        settings: What is measured.
        metrics: Names of the metrics that are measured.
        places: The images' places in the data set, in order.
    """

    def __init__(
        self,
        explainer: Explainer,
        dataset: Dataset,
        variants: Sequence[Variant],
        settings: EvaluationSettings,
    ) -> None:
        """Validate the settings, before anything is measured.

        Raises:
            OptionError: A setting is unknown, the data set does not allow it, or a method cannot
                run on the bundle.
        """
        self.explainer = explainer
        self.dataset = dataset
        self.variants = tuple(variants)
        self.settings = settings
        self.metrics = _select_metrics(settings, dataset)
        if settings.limit < 0:
            raise OptionError(f"limit is {settings.limit}; it must be at least 1, or 0 for all")
        if settings.target not in ("predicted", "label"):
            raise OptionError(f'target is "{settings.target}"; it must be predicted or label')
        if settings.target == "label" and not dataset.has_classes:
            raise OptionError(
                "the data set has no classes to explain; use --explain-class predicted"
            )
        self.places = draw_places(len(dataset), settings.limit, settings.seed)
        require_runnable(explainer, self.variants)

    @property
    def total(self) -> int:
        """How many rows there are to measure."""
        return len(self.places) * len(self.variants)

    def facts(self, dataset: str) -> dict[str, Any]:
        """Collect all that the values depend on.

        Args:
            dataset: How the user named the data set.

        Returns:
            Plain values for JSON.
        """
        explainer = self.explainer
        names = "\n".join(self.dataset.names[place] for place in self.places)
        root = self.dataset.root
        return {
            "version": __version__,
            "bundle": explainer.bundle.manifest.name,
            "backend": explainer.networks.backend,
            "precision": explainer.precision,
            "activation": self._activation,
            "batch_size": explainer.batch_size,
            "dataset": dataset,
            "methods": {variant.name: variant.describe() for variant in self.variants},
            "metrics": list(self.metrics),
            "protocol": self.settings.protocol,
            "target": self.settings.target,
            "seed": self.settings.seed,
            "images": len(self.places),
            "digest": self._digest,
            "names_sha256": _hash(names),
            "root_sha256": _hash(str(root.resolve())) if root else "",
        }

    def open(
        self, folder: Path, dataset: str, pass_over: Callable[[str], None] | None = None
    ) -> Results:
        """Open a folder's results of these settings to resume them, or begin them; see Results.

        Groups with an image that could not be read, and now can be, are measured again.

        Args:
            folder: Where the files lie or will lie.
            dataset: How the user named the data set.
            pass_over: Called with a line about each image that still cannot be read.
        """
        results = Results(folder, self.facts(dataset), self.metrics)
        groups = {group: [_keys(group, v) for v in self.variants] for group in self._groups}
        results.keep([keys for several in groups.values() for keys in several])
        unread = sorted({row.index for row in results.rows.values() if not row.was_read})
        opened = self._open_images(tuple(unread), pass_over or (lambda line: None))
        if mended := {entry.place for entry in opened}:
            whole = [several for group, several in groups.items() if mended.isdisjoint(group)]
            results.keep([keys for several in whole for keys in several])
        return results

    def run(
        self, results: Results, pass_over: Callable[[str], None] | None = None
    ) -> Iterator[int]:
        """Measure the rows that are missing, group by group; what was measured is kept.

        Args:
            results: Where rows are added.
            pass_over: Called with a line about each image that cannot be read, which then has a
                row without values; without it, such an image ends the run.

        Yields:
            How many rows were added.

        Raises:
            DatasetError: An annotation is unusable.
            ImageError: An image cannot be read.
            BackendError: An engine fails.
            OutputError: Rows cannot be written.
        """
        for places in self._groups:
            missing = [
                variant
                for variant in self.variants
                if any(key not in results.rows for key in _keys(places, variant))
            ]
            if missing:
                opened = self._open_images(places, pass_over)
                group = self._make_group(opened) if opened else None
                for variant in missing:
                    results.add(self._measure(places, group, variant))
                    yield len(places)

    @property
    def _activation(self) -> Activation:
        """What makes probabilities of logits."""
        return self.explainer.bundle.manifest.probabilities_by

    @property
    def _digest(self) -> str:
        """The digest of the files that values depend on; plans count where plans run."""
        manifest = self.explainer.bundle.manifest
        if self.explainer.networks.backend in library.FLAVOURS:
            return manifest.digest
        return digest_without_plans(manifest)

    @cached_property
    def _groups(self) -> list[tuple[int, ...]]:
        chunks = row_chunks(len(self.places), self.explainer.batch_size)
        return [self.places[rows] for rows in chunks]

    def _open_images(
        self, places: tuple[int, ...], pass_over: Callable[[str], None] | None
    ) -> list[OpenedImage]:
        """Open the images that can be read."""
        opened = []
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
                boxes = geometry.to_input(item.boxes)
                opened.append(OpenedImage(place, item, image[0], boxes))
        return opened

    def _make_group(self, opened: Sequence[OpenedImage]) -> Group:
        """Classify images, and choose the classes that are explained."""
        images = np.stack([entry.image for entry in opened])
        whole = np.ones((len(images), *images.shape[2:]), np.float32)
        logits = metrics.masked_logits(
            self.explainer.networks, images, whole, self.explainer.batch_size
        )
        predicted = logits.argmax(axis=1).astype(np.int64)
        targets = predicted
        if self.settings.target == "label":
            targets = np.array([entry.item.target for entry in opened], np.int64)
        before = metrics.class_probabilities(logits, targets, self._activation)
        return Group(tuple(opened), images, targets, predicted, before)

    def _measure(self, places: Sequence[int], group: Group | None, variant: Variant) -> list[Row]:
        """Measure a variant on a group; the rows of all places, in their order."""
        rows = {row.index: row for row in self._score(group, variant)} if group else {}
        return [rows.get(place) or self._unread_row(place, variant) for place in places]

    def _score(self, group: Group, variant: Variant) -> list[Row]:
        """Explain a group's images, and measure the maps."""
        explainer = self.explainer
        saliency = variant.explain(explainer, group.images, group.targets.tolist()).saliency
        protocol = PROTOCOLS[self.settings.protocol]
        scoring = Scoring(
            explainer.networks, self.metrics, protocol, explainer.batch_size, self._activation
        )
        values, curves = scoring.score(group, saliency)
        return [
            Row(
                index=entry.place,
                name=entry.item.name,
                method=variant.name,
                target=int(group.targets[row]),
                probability=float(group.before[row]),
                values={name: float(values[name][row]) for name in self.metrics},
                curves={curve: points[row] for curve, points in curves.items()},
            )
            for row, entry in enumerate(group.opened)
        ]

    def _unread_row(self, place: int, variant: Variant) -> Row:
        """Make the row of an image that could not be read."""
        nothing = float("nan")
        values = dict.fromkeys(self.metrics, nothing)
        return Row(place, self.dataset.names[place], variant.name, -1, nothing, values)


def draw_places(size: int, limit: int, seed: int) -> tuple[int, ...]:
    """Draw images without replacement.

    Args:
        size: How many images there are.
        limit: How many are drawn; 0 for all.
        seed: Of the draw.

    Returns:
        Their places in 0..size-1, in rising order.
    """
    if not limit or limit >= size:
        return tuple(range(size))
    places = np.random.default_rng(seed).choice(size, limit, replace=False)
    return tuple(sorted(map(int, places)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _keys(places: Sequence[int], variant: Variant) -> list[tuple[int, str]]:
    return [(place, variant.name) for place in places]


def _select_metrics(settings: EvaluationSettings, dataset: Dataset) -> tuple[str, ...]:
    """Select the metrics to measure; raise OptionError for one that the data set does not allow."""
    metrics.reject_unknown(settings.metrics, settings.protocol)
    possible = [name for name in METRICS if dataset.has_boxes or not METRICS[name].boxes]
    for name in settings.metrics:
        if name not in possible:
            raise OptionError(f"{name} needs boxes, which the data set does not have")
    return tuple(name for name in possible if not settings.metrics or name in settings.metrics)
