"""Work on a stream: captured when it comes again, and timed stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from ccam_deploy.engines.cuda import graph_replay
from ccam_deploy.engines.cuda.device import Device, DeviceGraph
from ccam_deploy.engines.cuda.graph_replay import RETRY_AFTER, Part, StreamRunner
from ccam_deploy.errors import BackendError


class Clock:
    """A device that counts marks as time, and captures by remembering."""

    def __init__(self, fails: bool = False) -> None:
        self.now = 0
        self.attempts = 0
        self.captures = 0
        self.fails = fails

    def mark(self) -> int:
        self.now += 1
        return self.now

    def seconds(self, start: int, end: int) -> float:
        return float(end - start)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.attempts += 1
        if self.fails:
            raise BackendError("it cannot be")
        self.captures += 1
        work()
        return lambda: None


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def runner(self, device: Clock, replay: bool = True, capturable: bool = True) -> StreamRunner:
        return StreamRunner(cast(Device, device), replay, lambda: capturable, self.lines.append)


def work_of(runner: StreamRunner, done: list[str]) -> Callable[[], None]:
    def work() -> None:
        runner.mark("inner")
        done.append("work")

    return work


def test_captures_the_second_time_and_replays_from_then_on() -> None:
    device, done, log = Clock(), list[str](), Log()
    runner = log.runner(device)
    work = work_of(runner, done)
    stages: list[list[str]] = []
    for _ in range(4):
        runner.run("key", "outer", work)
        runner.mark("")
        stages.append([name for name, _ in runner.stages()])
    assert stages == [["inner"], ["outer"], ["outer"], ["outer"]]
    assert device.captures == 1
    assert done == ["work", "work"]  # at once, and while it was captured
    assert not log.lines


def test_other_keys_are_other_work() -> None:
    device, done = Clock(), list[str]()
    runner = Log().runner(device)
    for key in ("a", "b", "a"):
        runner.run(key, "outer", work_of(runner, done))
    assert device.captures == 1


def test_nothing_is_captured_unless_asked_for() -> None:
    device, done = Clock(), list[str]()
    runner = Log().runner(device, replay=False)
    for _ in range(3):
        runner.run("key", "outer", work_of(runner, done))
    assert (device.captures, len(done)) == (0, 3)


@pytest.mark.parametrize(
    ("fails", "capturable", "line"),
    [
        (True, True, "a CUDA graph was not captured: it cannot be"),
        (False, False, "CUDA graphs are off: this engine cannot be captured"),
    ],
)
def test_says_once_what_cannot_be_captured(fails: bool, capturable: bool, line: str) -> None:
    device, done, log = Clock(fails), list[str](), Log()
    runner = log.runner(device, capturable=capturable)
    for key in ("key", "key", "key", "key", "other", "other"):
        runner.run(key, "outer", work_of(runner, done))
    assert len(done) == 6
    assert log.lines == [line]
    assert [name for name, _ in runner.stages()] == ["inner"] * 5


def test_a_failed_capture_is_tried_again_after_a_while() -> None:
    """Only the key that failed is launched piece by piece until then."""
    device, done, log = Clock(fails=True), list[str](), Log()
    runner = log.runner(device)
    for _ in range(2):
        runner.run("key", "outer", work_of(runner, done))
    device.fails = False
    for _ in range(2):
        runner.run("other", "outer", work_of(runner, done))
    assert (device.attempts, device.captures) == (2, 1)
    for _ in range(RETRY_AFTER - 1):
        runner.run("key", "outer", work_of(runner, done))
    assert device.attempts == 2
    for _ in range(3):
        runner.run("key", "outer", work_of(runner, done))
    assert (device.attempts, device.captures) == (3, 2)
    assert len(log.lines) == 1


def test_an_engine_that_refuses_several_keys_is_asked_no_more() -> None:
    device, done, asked = Clock(), list[str](), list[int]()

    def capturable() -> bool:
        asked.append(1)
        return False

    runner = StreamRunner(cast(Device, device), True, capturable, lambda _: None)
    for key in range(5):
        for _ in range(2 * RETRY_AFTER):
            runner.run(key, "outer", work_of(runner, done))
    # The first two keys are retried; the third refusal is the last.
    assert len(asked) == 2 * 2 + 1
    assert device.attempts == 0
    assert len(done) == 5 * 2 * RETRY_AFTER


def test_an_engine_that_becomes_capturable_is_captured() -> None:
    """Refusals count only in a row: one success starts the count anew."""
    device, answers = Clock(), iter([False, False, True, False, False, True])
    runner = StreamRunner(cast(Device, device), True, lambda: next(answers), lambda _: None)
    for key in range(6):
        for _ in range(2):
            runner.run(key, "outer", work_of(runner, []))
    assert device.captures == 2


def test_keeps_a_limited_number_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not used for the longest is launched piece by piece, and captured after a while."""
    monkeypatch.setattr(graph_replay, "_MOST_GRAPHS", 3)
    device, done = Clock(), list[str]()
    runner = Log().runner(device)
    for _ in range(2):
        for key in range(4):
            runner.run(key, "outer", work_of(runner, done))
    assert device.captures == 4
    runner.run(3, "outer", work_of(runner, done))
    for _ in range(RETRY_AFTER - 1):
        runner.run(0, "outer", work_of(runner, done))
    assert device.captures == 4
    runner.run(0, "outer", work_of(runner, done))
    assert device.captures == 5


def test_what_is_between_engines_is_captured_where_one_of_them_cannot_be() -> None:
    device, done, log = Clock(), list[str](), Log()
    fixed = cast(DeviceGraph, SimpleNamespace(replays_itself=False, capturable=False))
    runner = StreamRunner.of_graphs(cast(Device, device), True, [fixed], log.lines.append)
    parts = [
        Part("classifier", lambda: done.append("engine"), is_engine=True),
        Part("combine", lambda: done.append("kernel")),
    ]
    for _ in range(3):
        runner.put(("key",), "outer", lambda: parts)
    assert (device.captures, log.lines) == (1, [])
    assert done.count("engine") == 3
    runner.close()
    assert not runner._graphs


def test_stages_end_where_the_next_begins() -> None:
    runner = Log().runner(Clock())
    for stage in ("one", "two", "", "three", ""):
        runner.mark(stage)
    assert runner.stages() == [("one", 1.0), ("two", 1.0), ("three", 1.0)]
    assert runner.stages() == []


def test_marks_of_an_interrupted_run_are_forgotten() -> None:
    runner = Log().runner(Clock())
    runner.mark("interrupted")
    runner.forget()
    for stage in ("one", ""):
        runner.mark(stage)
    assert runner.stages() == [("one", 1.0)]
