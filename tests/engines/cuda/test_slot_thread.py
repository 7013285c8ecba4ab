"""A slot's thread does work one after the other, keeps nothing of it, and always ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from ccam_deploy.engines.cuda.slot_thread import SlotThread

_PROCESS = """
import threading, time
from ccam_deploy.engines.cuda.slot_thread import SlotThread

thread = SlotThread("slot")
assert thread.run(lambda: 3) == 3
started = threading.Event()

def work():
    started.set()
    time.sleep(0.2)
    print("worked", flush=True)

if {busy}:
    threading.Thread(target=thread.run, args=(work,), daemon=True).start()
    started.wait(60)
"""


class Thing:
    pass


def slot_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "a slot's"]


def test_all_work_is_done_in_one_thread_whoever_asks() -> None:
    thread = SlotThread("a slot's")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: thread.run(lambda: (n, threading.get_ident())), range(200)))
    assert [number for number, _ in found] == list(range(200))
    (ident,) = {ident for _, ident in found}
    assert [other.ident for other in slot_threads()] == [ident]
    thread.close()
    thread.close()
    assert not slot_threads()
    with pytest.raises(RuntimeError, match="ended"):
        thread.run(lambda: 3)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_errors_come_back_with_their_traceback(kind: type[BaseException]) -> None:
    thread = SlotThread("a slot's")

    def broken() -> None:
        raise kind("no")

    with pytest.raises(kind, match="no") as caught:
        thread.run(broken)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == "broken"
    assert thread.run(lambda: 3) == 3
    thread.close()


def test_results_work_and_errors_go_when_their_caller_drops_them() -> None:
    """Without a garbage collection: results may be memory that others wait for."""
    thread, gone = SlotThread("a slot's"), list[weakref.ref[Thing]]()

    def work(fails: bool, of_work: Thing) -> Thing:
        of_result = Thing()
        gone.extend([weakref.ref(of_work), weakref.ref(of_result)])
        if fails:
            raise ValueError("no")
        return of_result

    gc.disable()
    try:
        thread.run(partial(work, False, Thing()))
        with pytest.raises(ValueError, match="no"):
            thread.run(partial(work, True, Thing()))
        thread.run(lambda: None)
        assert [thing() for thing in gone] == [None] * 4
    finally:
        gc.enable()
        thread.close()


def test_the_thread_ends_when_nobody_has_it_any_more() -> None:
    thread = SlotThread("a slot's")
    assert len(slot_threads()) == 1
    del thread
    assert not slot_threads()


@pytest.mark.parametrize("busy", [False, True])
def test_a_process_ends_with_its_thread_once_the_work_is_done(busy: bool) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _PROCESS.format(busy=busy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (ended.stdout, ended.stderr) == ("worked\n" if busy else "", "")
