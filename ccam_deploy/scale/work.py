"""What processes of a batch do: read and prepare a part's images, explain them, write the rows."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.errors import CcamError, ImageError, NotFiniteError
from ccam_deploy.explainer import Explainer, load
from ccam_deploy.explanation import Explanation
from ccam_deploy.image_files import load_image
from ccam_deploy.methods import Method
from ccam_deploy.preprocess import prepare_images
from ccam_deploy.scale.inputs import Content, Input, Item
from ccam_deploy.scale.parts import Row, part_name, write_draft
from ccam_deploy.targets import Target


@dataclass(frozen=True)
class Engine:
    """How each process opens the bundle; see `ccam_deploy.load`."""

    backend: str = "auto"
    precision: str = "fp32"
    batch_size: int = 16
    threads: int = 0
    require_signature: Path | None = None


@dataclass(frozen=True)
class Job:
    """What is explained, and how.

    Attributes:
        bundle: The bundle's folder, which every process can read.
        manifest: The bundle's manifest.
        source: The images.
        method: The method with its options.
        targets: The classes to explain of each image.
        engine: How processes open the bundle.
        output: The folder for the rows, to which every process can write.
        token: Of the run; see parts.Output.
    """

    bundle: Path
    manifest: Manifest
    source: Input
    method: Method
    targets: tuple[Target, ...]
    engine: Engine
    output: Path
    token: str


@dataclass(frozen=True)
class Prepared:
    """A part's images, as the network takes them.

    Attributes:
        contents: The part's images, without their bytes, and why some of them are unusable.
        inputs: [N, C, H, W] float32, of the N usable ones.
    """

    contents: tuple[Content, ...]
    inputs: Floats


@dataclass(frozen=True)
class Done:
    """What is told of a part whose rows are written.

    Attributes:
        draft: The name of its file; see parts.Output.keep.
        images: How many images it has.
        rows: How many rows, at least one an image.
        failed: How many images have an error.
        backend: The engine that explained them.
        notes: What the process has to say of its engine.
        ready: When the process could begin, in seconds since the epoch.
        ended: When the file was written, in seconds since the epoch.
    """

    draft: str
    images: int
    rows: int
    failed: int
    backend: str
    notes: tuple[str, ...]
    ready: float
    ended: float


def prepare(job: Job, items: Sequence[Item]) -> Prepared:
    """Read a part's images, decode them, and bring them to the network's input."""
    contents, inputs = [], []
    size, how = job.manifest.input, job.manifest.preprocessing
    for content in job.source.read(items):
        problem = content.problem
        if not problem:
            try:
                picture = load_image(content.content, content.path)
                inputs.append(prepare_images([picture], size[1:], how)[0])
            except ImageError as error:
                problem = str(error)
        contents.append(Content(content.item, content.path, problem=problem))
    empty = np.zeros((0, *size), np.float32)
    return Prepared(tuple(contents), np.concatenate([empty, *inputs]))


class PartExplainer:
    """Explains parts in a process of its own.

    A bundle that cannot be opened is an error of the first part: what a constructor raises in
    another process reaches the caller as text only.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._explainer: Explainer | None = None
        self._refusal: CcamError | None = None
        engine = job.engine
        try:
            self._explainer = load(
                job.bundle,
                backend=engine.backend,
                precision=engine.precision,
                batch_size=engine.batch_size,
                threads=engine.threads,
                require_signature=engine.require_signature,
            )
        except CcamError as error:
            self._refusal = error
        self._ready = time.time()

    def run(self, part: Prepared) -> Done:
        """Explain a part's images and write their rows to a draft.

        Raises:
            CcamError: The bundle cannot be opened here, the method does not suit it, or the engine
                fails.
            OutputError: The rows cannot be written.
        """
        if self._explainer is None:
            assert self._refusal is not None
            raise self._refusal
        rows = self._rows(self._explainer, part)
        name = part_name([content.item.key for content in part.contents])
        size = self._job.manifest.input[1:]
        draft = write_draft(self._job.output, name, self._job.token, rows, size)
        return Done(
            draft=draft,
            images=len(part.contents),
            rows=len(rows),
            failed=sum(row.error is not None for row in rows),
            backend=self._explainer.networks.backend,
            notes=_notes(self._explainer),
            ready=self._ready,
            ended=time.time(),
        )

    def _rows(self, explainer: Explainer, part: Prepared) -> list[Row]:
        """The rows of all images, in their order."""
        usable = [content for content in part.contents if not content.problem]
        explained: dict[str, list[Row]] = {}
        for chunk in row_chunks(len(usable), explainer.batch_size):
            explained |= self._explain(explainer, usable[chunk], part.inputs[chunk])
        rows: list[Row] = []
        for content in part.contents:
            if content.problem:
                rows.append(Row(content.path, content.item.key, error=content.problem))
            else:
                rows += explained[content.item.key]
        return rows

    def _explain(
        self, explainer: Explainer, contents: Sequence[Content], images: Floats
    ) -> dict[str, list[Row]]:
        """The rows of some images by their keys; a row with the error for one that has no map."""
        targets = [self._job.targets] * len(images)
        try:
            result = explainer.explain(images, targets, method=self._job.method)
        except NotFiniteError as error:
            if len(contents) == 1:
                (content,) = contents
                return {content.item.key: [Row(content.path, content.item.key, error=str(error))]}
            explained: dict[str, list[Row]] = {}
            for place, content in enumerate(contents):
                explained |= self._explain(explainer, [content], images[place : place + 1])
            return explained
        return _rows_by_key(contents, result)


def _notes(explainer: Explainer) -> tuple[str, ...]:
    """What an explainer has to say of its engine, as other commands print it."""
    skipped = len(explainer.networks.notes)
    return tuple(
        f"skipped {note}" if place < skipped else note for place, note in enumerate(explainer.notes)
    )


def _rows_by_key(contents: Sequence[Content], result: Explanation) -> dict[str, list[Row]]:
    """The rows of an explanation's images, by their keys."""
    settings = json.dumps(result.settings, sort_keys=True)
    explained: dict[str, list[Row]] = {}
    for pair, target in enumerate(result.targets.tolist()):
        content = contents[int(result.image_index[pair])]
        row = Row(
            path=content.path,
            key=content.item.key,
            class_index=target,
            class_name=result.source.manifest.label(target),
            score=result.probability(pair),
            saliency=result.saliency[pair].astype(np.float16),
            settings=settings,
        )
        explained.setdefault(content.item.key, []).append(row)
    return explained
