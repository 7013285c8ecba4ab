"""The watch over models: when it asks, when it loads a model again, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ccam_deploy.errors import ServerError, SignatureError
from ccam_deploy.serve.endpoint import Tensor
from ccam_deploy.serve.watch import Watch
from tests.clock import FakeClock
from tests.serve.fake_server import CONFIG

SERVER = 7


class Models:
    """A server of two models, "a" and "b", each a process."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.requests = {"a": (0, 0), "b": (0, 0)}
        self.processes = {10: "a", 11: "b"}
        self.living = {SERVER, 10, 11}
        self.broken: dict[str, Exception] = {}
        self.stillborn = False
        self.changed = False
        self.crowd: Exception | None = None
        self.did: list[str] = []
        self.said: list[str] = []

    def watch(self) -> Watch:
        return Watch(
            self, SERVER, ["a", "b"], self.said.append, self.require, self.clock,
            lambda _: self.processes, self.living.__contains__,
        )  # fmt: skip

    def after(self, watch: Watch, seconds: float) -> list[str]:
        """What a look does some time later."""
        self.clock.time += seconds
        self.did.clear()
        self.said.clear()
        watch.look()
        return self.did

    def require(self) -> None:
        if self.changed:
            raise SignatureError("weights.bin was changed")

    def ready(self) -> bool:
        return True

    def models(self) -> list[str]:
        return ["a", "b"]

    def config(self, model: str) -> dict[str, Any]:
        return CONFIG

    def counts(self, model: str) -> tuple[int, int]:
        return self.requests[model]

    def infer(self, model: str, inputs: Sequence[Tensor], outputs: Sequence[str]) -> str:
        self.did.append(f"ask {model}")
        if model in self.broken:
            raise self.broken[model]
        return ""

    def unload(self, model: str, timeout: float) -> bool:
        self.did.append(f"unload {model}")
        return True

    def load(self, model: str, timeout: float) -> None:
        self.did.append(f"load {model}")
        self.clock.time += 3
        if self.stillborn:
            raise ServerError("no memory")
        new = max(self.living) + 10
        self.processes = {n: name for n, name in self.processes.items() if name != model}
        self.processes[new] = model
        self.living.add(new)
        self.broken.pop(model, None)
        if self.crowd:
            self.broken[model] = self.crowd


@pytest.fixture
def models() -> Models:
    return Models()


def test_an_idle_model_is_asked_every_half_minute(models: Models) -> None:
    watch = models.watch()
    assert models.after(watch, 2) == []
    assert models.after(watch, 28) == ["ask a", "ask b"]
    assert models.after(watch, 2) == []


def test_a_model_at_work_is_not_asked(models: Models) -> None:
    watch = models.watch()
    watch.look()
    models.requests["a"] = (5, 3)
    assert models.after(watch, 31) == ["ask b"]


def test_failing_requests_raise_doubt(models: Models) -> None:
    watch = models.watch()
    watch.look()
    models.requests["a"] = (0, 1)
    assert models.after(watch, 2) == ["ask a"]
    assert models.said == []
    models.requests["a"] = (0, 2)
    models.broken["a"] = ServerError("Stub process 'a_0_0' is not healthy.")
    assert models.after(watch, 2) == ["ask a", "unload a", "load a", "ask a"]
    assert models.said == [
        "model \"a\" is dead: Stub process 'a_0_0' is not healthy.; loading it again",
        'model "a" answers again, after 3.0 s',
    ]


def test_a_dead_process_is_found_without_asking(models: Models) -> None:
    """Even where another instance of the model answers all the time."""
    models.processes[12] = "b"
    models.living.add(12)
    watch = models.watch()
    models.living.remove(12)
    models.requests["b"] = (9, 0)
    assert models.after(watch, 1) == ["unload b", "load b", "ask b"]
    assert models.said[0] == 'model "b" is dead: its process has ended; loading it again'
    assert models.after(watch, 1) == []


def test_two_that_die_together_are_both_found(models: Models) -> None:
    watch = models.watch()
    models.living -= {10, 11}
    models.processes.pop(11)
    assert models.after(watch, 1) == [
        f"{what} {model}" for model in "ab" for what in ("unload", "load", "ask")
    ]


def test_repeated_deaths_wait_longer_each_time(models: Models) -> None:
    watch = models.watch()
    waits = []
    for _ in range(4):
        models.living -= {number for number, name in models.processes.items() if name == "a"}
        waited = 1
        while "load a" not in models.after(watch, 1):
            waited += 1
        waits.append(waited)
    assert waits == [1, 2, 4, 8]
    models.clock.time += 1000
    models.living -= {number for number, name in models.processes.items() if name == "a"}
    assert "load a" in models.after(watch, 1)
    models.living -= {number for number, name in models.processes.items() if name == "a"}
    assert "load a" in models.after(watch, 2)  # it lived long, so patience begins anew


def test_a_model_that_cannot_be_loaded_is_tried_again(models: Models) -> None:
    watch = models.watch()
    models.living.remove(10)
    models.stillborn = True
    assert models.after(watch, 1) == ["unload a", "load a"]
    assert models.said[1] == 'model "a" stays dead: no memory; next try in 2 s'
    models.stillborn = False
    assert models.after(watch, 2) == ["unload a", "load a", "ask a"]


def test_a_model_that_is_busy_at_once_is_not_loaded_twice(models: Models) -> None:
    """Those who waited for it are answered first."""
    watch = models.watch()
    models.living.remove(10)
    models.crowd = TimeoutError()
    assert models.after(watch, 1) == ["unload a", "load a", "ask a"]
    assert models.said[1] == 'model "a" is loaded again, after 3.0 s'
    assert models.after(watch, 5) == []


def test_a_bundle_that_was_changed_is_not_loaded(models: Models) -> None:
    watch = models.watch()
    models.living.remove(10)
    models.changed = True
    assert models.after(watch, 1) == ["unload a"]
    assert models.said[1] == 'model "a" stays dead: weights.bin was changed; next try in 2 s'


def test_a_busy_model_is_left_alone(models: Models) -> None:
    """It is told once that it is silent; its time begins anew with its next answer."""
    models.broken["a"] = TimeoutError()
    watch = models.watch()
    assert models.after(watch, 30) == ["ask a", "ask b"]
    assert models.said == []
    assert models.after(watch, 30) == ["ask a", "ask b"]
    assert models.said == ['model "a" has answered nothing for 60 s: busy, or stuck']
    assert models.after(watch, 5) == []
    models.after(watch, 30)
    assert models.said == []
    models.requests["a"] = (1, 0)
    models.after(watch, 1)
    models.after(watch, 61)
    assert models.said == ['model "a" has answered nothing for 61 s: busy, or stuck']


def test_nothing_is_done_for_a_server_that_has_ended(models: Models) -> None:
    watch = models.watch()
    models.living.clear()
    assert models.after(watch, 1) == []
    assert models.said == []
