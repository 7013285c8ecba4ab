"""A batch: parts of the input go through Ray Data, and the driver keeps what was written."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ccam_deploy.engines.base import row_chunks
from ccam_deploy.errors import BackendError
from ccam_deploy.scale.cluster import Layout, plain_error
from ccam_deploy.scale.inputs import Item
from ccam_deploy.scale.parts import Output
from ccam_deploy.scale.work import Done, Job, PartExplainer, prepare
from ccam_deploy.text import one_line

PART_SIZE = 64
"""The most images of a part."""
_PART_BYTES = 2**26
_RESTARTS = 3
"""How often a process that was killed is started anew."""
_MOST_BLOCKS = 4096
_FLOAT_BYTES = 4


@dataclass
class Tally:
    """How far a run is.

    Attributes:
        images: Images whose rows this run has kept.
        rows: Their rows.
        failed: Those among them with an error.
        backends: The engines that explained them.
        notes: What processes had to say of their engines, each once.
        ready: When the first process could begin, in seconds since the epoch; 0 before.
        ended: When the last part was written.
    """

    images: int = 0
    rows: int = 0
    failed: int = 0
    backends: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ready: float = 0.0
    ended: float = 0.0

    def add(self, done: Done) -> None:
        """Count a part."""
        self.images += done.images
        self.rows += done.rows
        self.failed += done.failed
        if done.backend not in self.backends:
            self.backends.append(done.backend)
        self.notes += [note for note in done.notes if note not in self.notes]
        self.ready = min(self.ready or done.ready, done.ready)
        self.ended = max(self.ended, done.ended)

    @property
    def images_per_second(self) -> float:
        """Images a second, from the moment that the first process could begin."""
        spent = self.ended - self.ready
        return self.images / spent if spent > 0 else 0.0


def remaining(items: Sequence[Item], output: Output) -> list[Item]:
    """The images whose rows are not in the output."""
    return [item for item in items if one_line(item.key) not in output.finished]


def cut(items: Sequence[Item], size: Sequence[int], most: int | None = None) -> list[list[Item]]:
    """Cut images into parts.

    Args:
        items: The images.
        size: Channels, height and width of the network's input.
        most: Images of a part; None for PART_SIZE, or fewer where inputs are large.
    """
    if most is None:
        channels, height, width = size
        fit = _PART_BYTES // (channels * height * width * _FLOAT_BYTES)
        most = max(1, min(PART_SIZE, fit))
    return [list(items[rows]) for rows in row_chunks(len(items), most)]


def run(
    job: Job, parts: Sequence[Sequence[Item]], layout: Layout, output: Output
) -> Iterator[Done]:
    """Explain parts on the cluster that this process has joined.

    A part is kept when its file is whole. However the run ends, what was kept stays, and
    `remaining` gives the rest to the next run.

    Args:
        job: What is explained, and how.
        parts: The images, in parts.
        layout: The processes.
        output: Where rows go.

    Yields:
        What is told of each part that was kept.

    Raises:
        BackendError: Ray cannot go on.
        CcamError: What a process raised.
    """
    kept = 0
    try:
        with closing(_results(job, parts, layout)) as results:
            for done in results:
                output.keep(done.draft)
                kept += done.images
                yield done
    except Exception as error:  # Ray has no root of its errors
        plain = plain_error(error)
        if plain is error:
            raise
        raise plain from error
    if missing := sum(map(len, parts)) - kept:
        raise BackendError(f"Ray lost {missing} images; the same command explains them")


def _results(
    job: Job, parts: Sequence[Sequence[Item]], layout: Layout
) -> Generator[Done, None, None]:
    """Yield what is told of each part, in the order in which they are written."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    # A part is a row, and a row a block: the processes take one as soon as they are free.
    DataContext.get_current().target_max_block_size = 1
    DataContext.get_current().target_min_block_size = 1
    rows = [{"part": pickle.dumps(list(part))} for part in parts]
    data = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS))
    with warnings.catch_warnings():  # there is no other way yet to bound the restarts
        warnings.simplefilter("ignore", DeprecationWarning)
        done = data.map(_decode, fn_kwargs={"job": job}).map_batches(
            _Worker,
            fn_constructor_kwargs={"job": job},
            batch_size=1,
            compute=ActorPoolStrategy(size=min(layout.processes, len(rows))),
            num_cpus=layout.cpus,
            num_gpus=layout.gpus,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )
    for row in done.iter_rows():
        yield pickle.loads(row["done"])


def _decode(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """The part of the work that needs no engine, on a row of Ray Data."""
    prepared = prepare(job, pickle.loads(row["part"]))
    return {"prepared": pickle.dumps(prepared, protocol=pickle.HIGHEST_PROTOCOL)}


class _Worker:
    """A process that explains, as Ray Data has it."""

    def __init__(self, job: Job) -> None:
        self._explainer = PartExplainer(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [self._explainer.run(pickle.loads(part)) for part in batch["prepared"]]
        return {"done": [pickle.dumps(value) for value in done]}
