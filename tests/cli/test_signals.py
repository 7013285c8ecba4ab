"""Ctrl-C and SIGTERM end a command in one line and leave nothing half-written."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from ccam_deploy.__main__ import main as entry
from ccam_deploy.cli.signals import held_signals, signals_as_exceptions
from ccam_deploy.termination import Terminated
from tests.damage import contents
from tests.helpers import ROOT
from tests.networks import tiny

STAGING = """
import signal, sys, time, click
from ccam_deploy.bundle.staging import staged_bundle
from ccam_deploy.cli.main import main

@main.command()
@click.argument("target")
def stage(target):
    with staged_bundle(target) as work:
        (work / "new").touch()
        print("ready", flush=True)
        time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
main(prog_name="ccam-deploy")
"""
EARLY = """
import runpy, signal, sys

class Interrupting:
    def find_spec(self, name, *rest):
        if name == sys.argv[1]:
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
runpy.run_module("ccam_deploy", run_name="__main__")
"""
ENDINGS = [
    (signal.SIGINT, 2, "error: interrupted; nothing was left half-written"),
    (signal.SIGTERM, 143, "error: terminated; nothing was left half-written"),
]


@pytest.mark.parametrize(("number", "code", "line"), ENDINGS)
def test_a_staged_bundle_is_removed(
    tmp_path: Path, number: signal.Signals, code: int, line: str
) -> None:
    """The folder that was there before stays as it was."""
    bundle = tmp_path / "tiny"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    before = contents(tmp_path)
    command = [sys.executable, "-c", STAGING, "stage", str(bundle)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(number)
        assert process.stderr.read().strip() == line  # click ends the line that ^C began
        assert process.wait(60) == code
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("module", ["ccam_deploy.cli", "click", "ccam_deploy.cli.verify"])
def test_before_the_command_is_imported(module: str) -> None:
    command = [sys.executable, "-c", EARLY, module]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == ENDINGS[0][2]


def test_the_script_waits_for_the_command_s_modules_in_the_same_way() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"ccam-deploy": f"{entry.__module__}:{entry.__name__}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "ending"),
    [
        ("converting", ENDINGS[1]),
        pytest.param("writing", ENDINGS[0], marks=pytest.mark.nightly),
    ],
)
def test_in_the_middle_of_an_export(
    tmp_path: Path, step: str, ending: tuple[signal.Signals, int, str]
) -> None:
    number, exit_code, line = ending
    weights = tmp_path / "tiny.pt"
    torch.save(tiny().state_dict(), weights)
    code = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "runpy.run_module('ccam_deploy', run_name='__main__')\n"
    )
    command: list[Any] = [sys.executable, "-c", code, "export", weights]
    command += ["--arch", "tests.networks:tiny", "--input-size", "32x48"]
    command += ["--output", tmp_path / "out" / "net"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        while not (told := process.stderr.readline()).startswith(step):
            assert told, "the export ended too early"
        process.send_signal(number)
        rest = process.stderr.read()
    assert (process.returncode, rest.splitlines()[-1]) == (exit_code, line)
    assert "Traceback" not in rest
    assert set(tmp_path.rglob("*")) <= {weights, tmp_path / "out"}


def test_sigterm_is_an_exit_once() -> None:
    """A second one does not cut the clean-up short; the handler before comes back."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as ended, signals_as_exceptions():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_run_without_handlers() -> None:
    reached = []

    def work() -> None:
        with signals_as_exceptions(), held_signals():
            reached.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [signal.getsignal(signal.SIGTERM)]


def test_a_held_interrupt_is_raised_where_asked() -> None:
    """Also where the exceptions of a handler would be swallowed."""
    with pytest.raises(KeyboardInterrupt), held_signals() as release:
        release()
        signal.raise_signal(signal.SIGINT)
        reached = True
        release()
        reached = False
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_held_signal_is_raised_at_the_end_of_the_block() -> None:
    reached = []
    with pytest.raises(Terminated), signals_as_exceptions(), held_signals():
        signal.raise_signal(signal.SIGTERM)
        reached.append("end")
    assert reached == ["end"]


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_signals() as release:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            release()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("name", "exception"), [("SIGTERM", Terminated), ("SIGINT", KeyboardInterrupt)]
)
def test_signals_wait_for_an_import(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    exception: type[BaseException],
) -> None:
    """A library that swallows what is raised while it is imported cannot swallow them."""
    (tmp_path / f"swallowing_{name}.py").write_text(
        "import os, signal\n"
        "raised = False\n"
        "try:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    [None for _ in range(1000)]\n"
        "except BaseException:\n"
        "    raised = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    raised: list[bool] = []
    numbers = signal.SIGALRM, signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(exception), signals_as_exceptions():
        raised.append(importlib.import_module(f"swallowing_{name}").raised)
        signal.pause()
    assert raised == [False]
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_alarm_that_comes_late_raises_nothing() -> None:
    with pytest.raises(Terminated), signals_as_exceptions():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGALRM)


@pytest.mark.parametrize(
    ("number", "exception"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_destructor_cannot_swallow_a_signal(
    number: signal.Signals, exception: type[BaseException]
) -> None:
    """Python prints what is raised there, and goes on."""
    reached = []

    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(number)
            reached.append("behind the signal")

    hook = sys.unraisablehook
    with pytest.raises(exception), signals_as_exceptions():
        dying = Dying()
        del dying
        reached.append("behind the destructor")
        signal.pause()
    assert reached == ["behind the destructor"]
    assert sys.unraisablehook is hook
