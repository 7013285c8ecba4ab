"""The page's worker: one call at a time, and nobody waits for it at the end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ccam_deploy.errors import BackendError
from ccam_deploy.page.worker import Worker
from tests.helpers import ROOT

LONG = """
import threading, time
from ccam_deploy.page.worker import Worker

worker = Worker()
threading.Timer(0.2, worker.end).start()
try:
    worker.call(lambda: time.sleep(60))
except Exception as error:
    print(error)
"""


def test_calls_never_overlap() -> None:
    worker = Worker()
    running = threading.Semaphore(1)

    def work(number: int) -> int:
        assert running.acquire(blocking=False)
        time.sleep(0.002)
        running.release()
        return number

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: worker.call(lambda: work(number)), range(40)))
    assert found == list(range(40))
    worker.end()


def test_what_a_call_raises_comes_back() -> None:
    worker = Worker()
    for error in (ValueError("bad"), TimeoutError("slow")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error), match=str(error)):
            worker.call(fail)
    assert worker.call(lambda: 3) == 3
    worker.end()
    with pytest.raises(BackendError, match="the page is ending"):
        worker.call(lambda: 3)


def test_the_process_ends_while_a_call_runs() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LONG], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "the page is ending\n"), done.stderr
    assert time.monotonic() - started < 45
