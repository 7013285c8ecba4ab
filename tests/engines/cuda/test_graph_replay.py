"""Work on a stream: captured when it comes again, and timed stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from ccam_deploy.engines.cuda.device import Device
from ccam_deploy.engines.cuda.graph_replay import Turns
from ccam_deploy.errors import BackendError


class Clock:
    """A device that counts marks as time, and captures by remembering."""

    def __init__(self, fails: bool = False) -> None:
        self.now = 0
        self.captures = 0
        self.fails = fails

    def mark(self) -> int:
        self.now += 1
        return self.now

    def seconds(self, start: int, end: int) -> float:
        return float(end - start)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.fails:
            raise BackendError("it cannot be")
        self.captures += 1
        work()
        return lambda: None


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def turns(self, device: Clock, replay: bool = True, capturable: bool = True) -> Turns:
        return Turns(cast(Device, device), replay, lambda: capturable, self.lines.append)


def work_of(turns: Turns, done: list[str]) -> Callable[[], None]:
    def work() -> None:
        turns.mark("inner")
        done.append("work")

    return work


def test_captures_the_second_time_and_replays_from_then_on() -> None:
    device, done, log = Clock(), list[str](), Log()
    turns = log.turns(device)
    work = work_of(turns, done)
    stages: list[list[str]] = []
    for _ in range(4):
        turns.run("key", "outer", work)
        turns.mark("")
        stages.append([name for name, _ in turns.stages()])
    assert stages == [["inner"], ["outer"], ["outer"], ["outer"]]
    assert device.captures == 1
    assert done == ["work", "work"]  # at once, and while it was captured
    assert not log.lines


def test_other_keys_are_other_work() -> None:
    device, done = Clock(), list[str]()
    turns = Log().turns(device)
    for key in ("a", "b", "a"):
        turns.run(key, "outer", work_of(turns, done))
    assert device.captures == 1


def test_nothing_is_captured_unless_asked_for() -> None:
    device, done = Clock(), list[str]()
    turns = Log().turns(device, replay=False)
    for _ in range(3):
        turns.run("key", "outer", work_of(turns, done))
    assert (device.captures, len(done)) == (0, 3)


@pytest.mark.parametrize(
    ("fails", "capturable", "reason"),
    [(True, True, "it cannot be"), (False, False, "the engine cannot be captured in one")],
)
def test_says_once_what_cannot_be_captured(fails: bool, capturable: bool, reason: str) -> None:
    device, done, log = Clock(fails), list[str](), Log()
    turns = log.turns(device, capturable=capturable)
    for _ in range(4):
        turns.run("key", "outer", work_of(turns, done))
    assert len(done) == 4
    assert log.lines == [f"no CUDA graphs: {reason}"]
    assert [name for name, _ in turns.stages()] == ["inner"] * 3


def test_keeps_a_limited_number_of_graphs() -> None:
    """What was not used for the longest is captured again when it comes back."""
    device, done = Clock(), list[str]()
    turns = Log().turns(device)
    for _ in range(2):
        for key in range(65):
            turns.run(key, "outer", work_of(turns, done))
    assert device.captures == 65
    turns.run(64, "outer", work_of(turns, done))
    assert device.captures == 65
    turns.run(0, "outer", work_of(turns, done))
    assert device.captures == 66


def test_stages_end_where_the_next_begins() -> None:
    turns = Log().turns(Clock())
    for stage in ("one", "two", "", "three", ""):
        turns.mark(stage)
    assert turns.stages() == [("one", 1.0), ("two", 1.0), ("three", 1.0)]
    assert turns.stages() == []


def test_marks_of_an_interrupted_run_are_forgotten() -> None:
    turns = Log().turns(Clock())
    turns.mark("interrupted")
    turns.forget()
    for stage in ("one", ""):
        turns.mark(stage)
    assert turns.stages() == [("one", 1.0)]
