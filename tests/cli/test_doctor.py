"""`ccam-deploy doctor`: a table, JSON, and an exit code for scripts."""

from __future__ import annotations

import json

import pytest

from ccam_deploy.checks import doctor
from ccam_deploy.checks.doctor import Finding
from tests.command import run, success

CPU = Finding("onnxruntime-cpu", True, "onnxruntime 1.32.0")
CUDA = Finding("onnxruntime-cuda", False, "there is no driver", "install the driver")
PART = Finding("driver", False, "there is no driver", "install the driver")


def examine_gives(monkeypatch: pytest.MonkeyPatch, *backends: Finding) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: (list(backends), [PART]))


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    examine_gives(monkeypatch, CPU, CUDA)
    assert success("doctor").stdout.splitlines() == [
        "backend           works  details",
        "onnxruntime-cpu   yes    onnxruntime 1.32.0",
        "onnxruntime-cuda  no     there is no driver",
        "",
        "needed for a GPU  works  details",
        "driver            no     there is no driver",
        "",
        "to fix:",
        "  onnxruntime-cuda, driver",
        "    install the driver",
    ]


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    examine_gives(monkeypatch, CPU, CUDA)
    assert json.loads(success("doctor", "--json").stdout) == {
        "backends": [vars(CPU), vars(CUDA)],
        "parts": [vars(PART)],
    }


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_exit_code_where_nothing_works(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    examine_gives(monkeypatch, CUDA)
    result = run("doctor", *words)
    assert result.exit_code == 1
    assert "install the driver" in result.stdout
    assert not result.stderr


@pytest.mark.slow
def test_this_machine() -> None:
    """The CPU's engine is installed wherever the tests run."""
    backends = json.loads(success("doctor", "--json").stdout)["backends"]
    assert [one["name"] for one in backends] == list(doctor.NEEDS)
    assert backends[0]["works"]
    for one in backends:
        assert bool(one["remedy"]) != one["works"]
        assert "Traceback" not in one["detail"]
