"""What of the server's log is shown, and what it tells of a failure."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest

from ccam_deploy.serve.log import ServerLog

STARTING = [
    'W1126 21:41:22.778499 25726 pinned_memory_manager.cc:273] "No pinned memory"\n',
    'E1126 21:41:22.778750 25726 server.cc:241] "CudaDriverHelper has not been initialized."\n',
    "+------------------+------+\n",
    "| Repository Agent | Path |\n",
]
FAILING = [
    "E1126 21:41:34.34 25726 model_lifecycle.cc:642] \"failed to load 'bad' version 1: Internal: "
    'ccam_deploy.errors.BundleError: no bundle here\\n\\nAt:\\n  /srv/1/model.py(5): init\\n"\n',
    "I1126 21:41:34.34 25726 model_lifecycle.cc:777] \"failed to load 'bad'\"\n",
    "error: creating server: Internal - failed to load all models\n",
]
SERVING = [
    'I1126 21:41:35.0 25726 http_server.cc:4713] "Started HTTPService"\n',
    'E1126 21:41:36.0 25726 pb_stub.cc:714] "Failed to process"\n',
    "printed by a model\n",
    "Signal (15) received.\n",
    "\n",
]


def read(
    lines: list[str], started: int | None = None, show: str = "serious"
) -> tuple[ServerLog, list[str]]:
    """The log after some lines, the server having started after so many; and what was said."""
    said: list[str] = []
    passed = threading.Event()
    output, end = os.pipe()
    log = ServerLog(os.fdopen(output), said.append, "all" if show == "all" else "serious")
    with os.fdopen(end, "w", buffering=1) as server:
        for index, line in enumerate(lines):
            if index == started:
                while len(log._recent) < index:
                    passed.wait(0.01)
                log.started()
            server.write(line)
    log.wait(10)
    return log, said


def test_only_news_is_shown() -> None:
    """Not what is no error on a machine without a GPU, nor tables."""
    _, said = read(STARTING + SERVING, len(STARTING))
    assert said == [SERVING[1].strip(), "printed by a model"]


def test_a_log_is_read_on_where_nobody_hears_it() -> None:
    """A full disk behind stderr, for one: the server would get SIGPIPE at its next line."""

    def say(line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output, end = os.pipe()
    log = ServerLog(os.fdopen(output), say, "all")
    with os.fdopen(end, "w", buffering=1) as server:
        for line in FAILING:
            server.write(line)
            while len(log._recent) <= FAILING.index(line):
                time.sleep(0.01)
    log.wait(10)
    assert log.failure() == 'model "bad" cannot be loaded: no bundle here'


def test_all_is_shown_on_request() -> None:
    _, said = read(STARTING, show="all")
    assert said == [line.strip() for line in STARTING]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (STARTING + FAILING, 'model "bad" cannot be loaded: no bundle here'),
        ([*STARTING, "error: unknown option\n"], "unknown option"),
        (STARTING, "CudaDriverHelper has not been initialized."),
        ([], "it wrote no reason to its log"),
    ],
)
def test_the_reason_of_a_failure(lines: list[str], told: str) -> None:
    log, said = read(lines)
    assert log.failure() == told
    assert said == []
