"""Slots are lent to one caller at a time, opened as they are needed, closed in the end."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, cast

import pytest

from ccam_deploy.engines.cuda.device import Device
from ccam_deploy.engines.cuda.gpu_use import GpuUse
from ccam_deploy.engines.cuda.slot_thread import SlotThread
from ccam_deploy.engines.cuda.slots import Slot, Slots
from ccam_deploy.errors import BackendError, OptionError
from tests.engines.cuda.host_device import HostDevice


class FakeDevice:
    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.closed = 0
        self.users = 0
        self.waits = 0

    @contextmanager
    def current(self) -> Iterator[None]:
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def wait(self) -> None:
        assert self.users == 1
        self.waits += 1

    def close(self) -> None:
        self.closed += 1


class Bench:
    """Opens slots and remembers their devices."""

    def __init__(self) -> None:
        self.devices: list[FakeDevice] = []

    def open(self) -> Slot:
        self.devices.append(FakeDevice())
        return Slot(cast(Device, self.devices[-1]), {})


def device_of(slot: Slot) -> Any:
    return slot.device


def test_one_slot_serves_one_caller_after_the_other() -> None:
    bench = Bench()
    slots = Slots(bench.open, 3)
    for _ in range(5):
        with slots.take() as slot:
            assert device_of(slot).users == 1
    assert len(bench.devices) == 1
    slots.close()
    assert bench.devices[0].closed == 1


def test_as_many_slots_as_callers_but_no_more() -> None:
    bench = Bench()
    slots = Slots(bench.open, 2)
    both, done = threading.Barrier(3), threading.Event()

    def use() -> None:
        with slots.take():
            both.wait(10)
            done.wait(10)

    late_in = threading.Event()

    def late() -> None:
        with slots.take():
            late_in.set()

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    both.wait(10)
    third = threading.Thread(target=late)
    third.start()
    assert not late_in.wait(0.2)
    done.set()
    for thread in [*threads, third]:
        thread.join(10)
    assert late_in.is_set()
    assert len(bench.devices) == 2
    slots.close()


def test_a_slot_whose_engine_failed_is_given_up() -> None:
    bench = Bench()
    slots = Slots(bench.open, 1)
    with pytest.raises(BackendError), slots.take():
        raise BackendError("an illegal address")
    assert bench.devices[0].closed == 1
    with slots.take() as slot:
        assert device_of(slot) is bench.devices[1]


def test_other_errors_leave_the_slot() -> None:
    bench = Bench()
    slots = Slots(bench.open, 1)
    with pytest.raises(OptionError), slots.take():
        raise OptionError("no such option")
    assert bench.devices[0].waits == 1  # for what was on the stream already
    with slots.take() as slot:
        assert device_of(slot) is bench.devices[0]


class Buffer:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_what_is_kept_is_closed_when_it_is_pushed_out_and_with_the_slot() -> None:
    slot = Bench().open()
    buffers = [slot.keep(key, Buffer) for key in range(8)]
    assert slot.keep(0, Buffer) is buffers[0]
    slot.keep("new", Buffer)
    assert [buffer.closed for buffer in buffers] == [0, 1, 0, 0, 0, 0, 0, 0]
    slot.close()
    assert [buffer.closed for buffer in buffers] == [1] * 8


def test_what_is_kept_makes_room_for_more() -> None:
    slot = Bench().open()
    first = slot.keep("first", Buffer)

    def make() -> Buffer:
        if not first.closed:
            raise BackendError("out of memory")
        return Buffer()

    second = slot.keep("second", make)
    assert (first.closed, second.closed) == (1, 0)
    second.closed = first.closed = 0
    with pytest.raises(BackendError, match="out of memory"):
        slot.keep("third", make)
    assert second.closed == 1


def test_what_could_not_be_made_leaves_its_memory_to_the_next_attempt() -> None:
    device = HostDevice()
    slot = Slot(device, {})
    slot.scratch("old", 8)
    slot.keep("first", Buffer)
    before: list[int] = []

    def make() -> Buffer:
        before.append(len(device.blocks))
        device.allocate(64)
        slot.scratch("new", 8)
        raise BackendError("out of memory")

    with pytest.raises(BackendError, match="out of memory"):
        slot.keep("second", make)
    assert before == [1, 2]
    assert set(device.blocks) == {slot.scratch("old", 8), slot.scratch("new", 8)}


def test_a_slot_has_the_gpu_where_there_is_one_or_all_are_held() -> None:
    single = Slots(Bench().open, 1)
    assert not single.claim()  # nobody works
    with single.take():
        assert single.claim()
        assert single.claim()
    slots, told = Slots(Bench().open, 2, captures_alone=True), list[bool]()
    slots.run_on_each(lambda slot: told.append(slots.claim()))
    assert told == [True, True]
    with slots.take():
        assert not slots.claim()


def test_a_slot_has_no_gpu_where_others_work() -> None:
    one, other = Slots(Bench().open, 1), Slots(Bench().open, 1)
    with ThreadPoolExecutor(1) as pool:
        began, end = threading.Event(), threading.Event()
        work = pool.submit(borrow, other, began, end)
        assert began.wait(10)
        with one.take():
            assert not one.claim()
            end.set()
            work.result(10)
            assert one.claim()


def test_others_wait_until_the_only_slot_is_given_back() -> None:
    """To work, to open and to close."""
    one, other, last = (Slots(Bench().open, 1) for _ in range(3))
    began, end = threading.Event(), threading.Event()
    end.set()
    with ThreadPoolExecutor(3) as pool:
        with one.take():
            assert one.claim()
            calls = [pool.submit(borrow, other, began, end), pool.submit(last.close)]
            calls.append(pool.submit(lambda: Slots(Bench().open, 1).close()))
            assert wait(calls, 0.2).done == set()
            assert not began.is_set()
        assert wait(calls, 10).not_done == set()


def test_work_on_each_slot_waits_for_other_slots_and_they_for_it() -> None:
    one = Slots(Bench().open, 2, captures_alone=True)
    other = Slots(Bench().open, 2)
    began, again, end, inside, leave = (threading.Event() for _ in range(5))
    told = list[bool]()

    def prepare(slot: Slot) -> None:
        inside.set()
        told.append(one.claim())
        assert leave.wait(10)

    with ThreadPoolExecutor(3) as pool:
        before = pool.submit(borrow, other, began, end)
        assert began.wait(10)
        each = pool.submit(one.run_on_each, prepare)
        assert not inside.wait(0.2)
        after = pool.submit(borrow, other, again, end)
        end.set()
        before.result(10)
        assert inside.wait(10)
        assert not again.wait(0.2)
        leave.set()
        each.result(10)
        after.result(10)
    assert told == [True, True]


def test_work_on_each_slot_that_is_broken_off_leaves_a_claim() -> None:
    use, one, other, began = GpuUse(), object(), object(), threading.Event()

    def work() -> None:
        with use.work(other):
            began.set()

    with ThreadPoolExecutor(1) as pool:
        with use.work(one):
            assert use.claim(one)
            with pytest.raises(KeyboardInterrupt), use.sole(one):
                raise KeyboardInterrupt
            waiting = pool.submit(work)
            assert not began.wait(0.2)
        waiting.result(10)
    assert began.is_set()


def borrow(slots: Slots, began: threading.Event, end: threading.Event) -> None:
    """Hold a slot from one event, which is set, to the other."""
    with slots.take():
        began.set()
        assert end.wait(10)


def test_slots_close_though_one_of_them_fails() -> None:
    bench, shared = Bench(), list[int]()
    slots = Slots(bench.open, 3, lambda: shared.append(1))
    with slots.take(), slots.take(), slots.take():
        pass

    def lost() -> None:
        raise BackendError("context lost")

    bench.devices[1].close = lost  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="context lost"):
        slots.close()
    assert [device.closed for device in bench.devices] == [1, 0, 1]
    assert (slots.lent, shared) == (0, [1])


def test_what_slots_share_is_closed_last_and_once() -> None:
    bench, shared = Bench(), list[int]()
    slots = Slots(bench.open, 2, lambda: shared.append(bench.devices[0].closed))
    with slots.take():
        slots.close()
        assert shared == []
    assert shared == [1]


def test_closed_slots_are_not_lent() -> None:
    bench = Bench()
    slots = Slots(bench.open, 1)
    with slots.take():
        slots.close()
        assert [device.closed for device in bench.devices] == [0]
    assert [device.closed for device in bench.devices] == [1]
    with pytest.raises(BackendError, match="closed"), slots.take():
        pass


def test_slots_that_do_not_open_are_not_counted() -> None:
    """Eight threads at a time, half of which find that no slot can be opened."""
    bench, shared, numbers = Bench(), list[int](), itertools.count()

    def open_slot() -> Slot:
        if next(numbers) % 2:
            raise BackendError("no memory is left")
        return bench.open()

    slots = Slots(open_slot, 8, lambda: shared.append(1))
    errors: list[BackendError] = []

    def use() -> None:
        for _ in range(200):
            try:
                with slots.take():
                    raise BackendError("an illegal address")
            except BackendError as error:
                errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert {str(error) for error in errors} == {"no memory is left", "an illegal address"}
    assert slots.lent == 0
    slots.close()
    assert shared == [1]


def test_what_slots_share_is_closed_where_the_last_slot_does_not_open() -> None:
    """The slots are closed while a slot is being opened, which then fails."""
    bench, shared = Bench(), list[int]()
    slots = Slots(bench.open, 2, lambda: shared.append(1))

    def open_slot() -> Slot:
        slots.close()
        assert shared == []
        raise BackendError("no memory is left")

    with pytest.raises(BackendError, match="illegal"), slots.take():
        raise BackendError("an illegal address")
    slots._open = open_slot
    with pytest.raises(BackendError, match="no memory"), slots.take():
        pass
    assert slots.lent == 0
    assert shared == [1]
    slots.close()
    assert shared == [1]


def test_a_slot_with_a_thread_does_all_work_there() -> None:
    """Whichever thread borrows it; the device is current there, and errors come back."""
    device = FakeDevice()
    slot = Slot(cast(Device, device), {}, SlotThread("slot"))
    slots = Slots(lambda: slot, 1)
    current: list[tuple[int, int]] = []

    def work() -> int:
        current.append((threading.get_ident(), device.users))
        return len(current)

    def borrow() -> int:
        with slots.take() as taken:
            return taken.run(work)

    with ThreadPoolExecutor(1) as other:
        assert [borrow(), other.submit(borrow).result()] == [1, 2]
    (thread, users), again = current
    assert again == (thread, users)
    assert thread != threading.get_ident()
    assert users == 2  # the borrower's thread and the slot's
    with pytest.raises(OptionError, match="no"), slots.take() as taken:
        taken.run(fail)
    slots.close()
    assert (device.users, device.closed) == (0, 1)


def fail() -> None:
    raise OptionError("no")


def test_an_interrupted_borrower_waits_for_the_work() -> None:
    """The next borrower must not meet it."""
    slot = Slot(cast(Device, FakeDevice()), {}, SlotThread("slot"))
    started, arrived, go_on = threading.Event(), threading.Event(), threading.Event()
    done = list[str]()

    def work() -> None:
        started.set()
        go_on.wait(60)
        done.append("work")

    def interrupt() -> None:
        started.wait(60)
        # A signal that comes just before the main thread blocks does not wake it: send another.
        while not arrived.wait(0.05):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def arrive(*_: object) -> None:
        if not arrived.is_set():
            arrived.set()
            threading.Timer(0.05, go_on.set).start()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, arrive)
    sender = threading.Thread(target=interrupt)
    try:
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            slot.run(work)
        sender.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["work"]
    slot.close()
