"""What a latency measurement is asked for, and when each of its parts must end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ccam_deploy.engines.open import MOST_SLOTS
from ccam_deploy.errors import OptionError

FIRST_CALLS_S = 15.0
"""Seconds for the first calls of a batch size, which learn the masks, on top of what is
measured; what they leave goes to the parts after them."""

STAGES_SHARE = 0.25
"""The share of a duration for which the stages are timed; twice on a GPU."""


@dataclass(frozen=True)
class LatencySettings:
    """What is measured.

    Attributes:
        batches: Images a call; each batch size is measured by itself.
        concurrency: Threads that call the one explainer; on a GPU it needs as many slots.
        duration: Seconds of steady load for each batch size, as many of taking turns with the
            floor, and as many with each peer.
        warmup: Seconds before each batch size is measured.

    Raises:
        OptionError: A value is outside its range.
    """

    batches: tuple[int, ...] = (1,)
    concurrency: int = 1
    duration: float = 10.0
    warmup: float = 2.0

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise OptionError(f"batch is {list(self.batches)}; it must be at least 1")
        if len(set(self.batches)) != len(self.batches):
            raise OptionError(f"batch is {list(self.batches)}; give each size once")
        if not 1 <= self.concurrency <= MOST_SLOTS:
            raise OptionError(f"concurrency is {self.concurrency}; it must be 1 to {MOST_SLOTS}")
        if not 0 < self.duration < float("inf"):
            raise OptionError(f"duration is {self.duration:g}; it must be above 0 seconds")
        if not 0 <= self.warmup < float("inf"):
            raise OptionError(f"warmup is {self.warmup:g}; it must be 0 seconds or more")


@dataclass(frozen=True)
class Deadlines:
    """When the parts of one batch size must end, on the clock that measures.

    A part that gets there is cut short. It ends with the calls in hand, which are one round where
    calls are timed in turn, and has timed one at least.

    Attributes:
        first_calls: The calls that learn the masks.
        load: The steady load.
        stages: The stages.
        replays: On a GPU, the stages as they are replayed.
        turns: The turns with the floor.
        peers: The turns with each peer, in the order in which they are measured.
    """

    first_calls: float
    load: float
    stages: float
    replays: float
    turns: float
    peers: Sequence[float]

    @classmethod
    def of(cls, settings: LatencySettings, peers: int, begun: float) -> Deadlines:
        """Plan one batch size with some number of peers that begins at some moment."""
        duration = settings.duration
        stages = STAGES_SHARE * duration
        parts = [FIRST_CALLS_S, settings.warmup + duration, stages, stages, duration]
        ends = accumulate([begun, *parts, *[duration] * peers])
        _, first_calls, load, stages_end, replays, turns, *peer_ends = ends
        return cls(first_calls, load, stages_end, replays, turns, peer_ends)

    @property
    def last(self) -> float:
        """When the whole must have ended."""
        return self.peers[-1] if self.peers else self.turns
