"""Looks after a server's models: one whose process died is loaded again.

The server itself does not notice: it goes on to report such a model as ready, and answers every
request to it with an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ccam_deploy.errors import CcamError, ServerError
from ccam_deploy.serve.probe import Endpoint, ask
from ccam_deploy.serve.stubs import alive, stubs_of

LOAD_SECONDS = 600.0
"""How long a model may take to load: its engines are built and warm before it is ready."""

_UNLOAD_SECONDS = 2.0
_SHORT_LIFE_SECONDS = 300.0
_LONGEST_WAIT_SECONDS = 300.0
_IDLE_SECONDS = 30.0
_SILENCE_SECONDS = 60.0


class Manageable(Endpoint, Protocol):
    """A server whose models may be loaded and unloaded."""

    def counts(self, model: str) -> tuple[int, int]:
        """Return how many requests a model has answered and failed."""

    def load(self, model: str, timeout: float) -> None:
        """Load a model, and wait for it."""

    def unload(self, model: str, timeout: float) -> bool:
        """Unload a model, and wait until it is gone."""


@dataclass
class _Record:
    """What is known of a model from earlier looks."""

    counts: tuple[int, int] | None = None
    heard: float = 0.0
    asked: float = 0.0
    loaded: float = 0.0
    deaths: int = 0
    waits_until: float = 0.0
    told: bool = False
    processes: set[int] = field(default_factory=set)


class Watch:
    """Looks at each model in turn, and loads again what is dead.

    A model is dead where one of its processes has ended, or where it fails at a request. It gets
    one where clients' requests failed and none was answered since the last look, and else every
    half minute, as each costs the machine an explanation; not where it has answered a client
    meanwhile. One that does not answer in time may be busy: that is told, and nothing is done.

    Args:
        endpoint: The server.
        server: Its process number.
        models: Its models, all of which have answered.
        say: Called with a line for whatever happens.
        require: Called before a model is loaded again; an error of it keeps it from that.
        now: Seconds on a clock that only goes forward.
        processes: Lists the processes of models, by number; for tests.
        lives: Tells whether a process runs; for tests.
    """

    def __init__(
        self,
        endpoint: Manageable,
        server: int,
        models: Sequence[str],
        say: Callable[[str], None],
        require: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
        processes: Callable[[int], Mapping[int, str]] = stubs_of,
        lives: Callable[[int], bool] = alive,
    ) -> None:
        self._endpoint = endpoint
        self._server = server
        self._say = say
        self._require = require
        self._now = now
        self._processes = processes
        self._lives = lives
        self._records = {
            model: _Record(heard=now(), loaded=now(), processes=self._processes_of(model))
            for model in models
        }

    def look(self) -> None:
        """Look at each model once; at none where the server itself has ended."""
        for model, record in self._records.items():
            trouble = self._trouble(model, record)
            if not self._lives(self._server):
                return
            if trouble and self._now() >= record.waits_until:
                self._revive(model, record, trouble)

    def _trouble(self, model: str, record: _Record) -> str:
        """Say what is wrong with a model; nothing where it lives, or may only be busy."""
        if any(not self._lives(process) for process in record.processes):
            return "its process has ended"
        try:
            if not self._in_doubt(model, record):
                return ""
            record.asked = self._now()
            health = ask(self._endpoint, model)
        except TimeoutError:
            self._tell_silence(model, record)
            return ""
        if health.alive:
            record.heard, record.told = self._now(), False
        return "" if health.alive else health.detail

    def _in_doubt(self, model: str, record: _Record) -> bool:
        """Whether to ask a model, by what has become of requests since the last look."""
        try:
            counts = self._endpoint.counts(model)
        except ServerError:  # it is not loaded, which asking it will tell
            return True
        before, record.counts = record.counts or counts, counts
        if counts[0] > before[0]:
            record.heard, record.told = self._now(), False
            return False
        quiet = self._now() - max(record.heard, record.asked)
        return counts[1] > before[1] or quiet >= _IDLE_SECONDS

    def _tell_silence(self, model: str, record: _Record) -> None:
        silent = self._now() - record.heard
        if silent >= _SILENCE_SECONDS and not record.told:
            record.told = True
            self._say(f'model "{model}" has answered nothing for {silent:.0f} s: busy, or stuck')

    def _revive(self, model: str, record: _Record, trouble: str) -> None:
        """Load a model again; one that soon dies again waits longer each time."""
        begun = self._now()
        lived = begun - record.loaded
        record.deaths = 1 if lived >= _SHORT_LIFE_SECONDS else record.deaths + 1
        self._say(f'model "{model}" is dead: {trouble}; loading it again')
        try:
            self._endpoint.unload(model, _UNLOAD_SECONDS)
            self._require()
            self._endpoint.load(model, LOAD_SECONDS)
            outcome, does = self._first_answer(model)
        except (CcamError, TimeoutError) as error:
            outcome, does = str(error), ""
        ended = self._now()
        pause = min(2.0**record.deaths, _LONGEST_WAIT_SECONDS)
        record.loaded, record.waits_until = ended, ended + pause
        record.counts, record.heard, record.told = None, ended, False
        record.processes = self._processes_of(model)
        if outcome:
            self._say(f'model "{model}" stays dead: {outcome}; next try in {pause:.0f} s')
        else:
            self._say(f'model "{model}" {does} again, after {ended - begun:.1f} s')

    def _first_answer(self, model: str) -> tuple[str, str]:
        """What is wrong with a model that was loaded, and what it does where nothing is."""
        try:
            health = ask(self._endpoint, model)
        except TimeoutError:  # it answers those who waited for it
            return "", "is loaded"
        return "" if health.alive else health.detail, "answers"

    def _processes_of(self, model: str) -> set[int]:
        return {number for number, name in self._processes(self._server).items() if name == model}
