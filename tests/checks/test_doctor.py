"""The doctor tries what is there, and tells which of several broken parts to mend first."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import get_args

import onnxruntime
import pytest

from ccam_deploy.checks import doctor
from ccam_deploy.checks.doctor import Finding
from ccam_deploy.engines import Backend


def test_every_backend_is_tried() -> None:
    assert {name for name in get_args(Backend) if name != "auto"} <= set(doctor.NEEDS)
    assert set(doctor._CHECKS) == {*doctor.NEEDS, *doctor.PARTS}
    assert {need for needs in doctor.NEEDS.values() for need in needs} == set(doctor.PARTS)


def test_cpu_works_here() -> None:
    """In a process of its own, as the command tries it."""
    finding = doctor.in_fresh_process("onnxruntime-cpu")
    assert finding == Finding("onnxruntime-cpu", True, f"onnxruntime {onnxruntime.__version__}")


def examined(*broken: str) -> dict[str, Finding]:
    """The backends' findings where some names are broken."""
    backends, parts = doctor.examine(
        lambda name: Finding(
            name, name not in broken, f"<{name}>", f"mend {name}" * (name in broken)
        )
    )
    assert [part.name for part in parts] == list(doctor.PARTS)
    return {one.name: one for one in backends}


def test_everything_works() -> None:
    assert all(one.works and not one.remedy for one in examined().values())


def test_the_driver_comes_first() -> None:
    found = examined("driver", "tensorrt", "pycuda")
    assert found["onnxruntime-cpu"].works
    for name in ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx"):
        assert found[name] == Finding(name, False, f"<{name}>; driver: <driver>", "mend driver")


def test_the_library_comes_before_the_kernels() -> None:
    found = examined("tensorrt", "pycuda", "numba-cuda")
    assert found["tensorrt"].remedy == "mend tensorrt"
    assert found["tensorrt-rtx"].remedy == "mend pycuda"
    assert found["onnxruntime-cuda"].remedy == "mend pycuda"
    assert found["onnxruntime-cpu"].works
    assert examined("numba-cuda")["tensorrt"].remedy == "mend numba-cuda"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("raise ImportError('half of it is gone')", "it cannot be imported: half of it is gone"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it crashed with signal 11"),
        ("raise SystemExit('no licence')", "no licence"),
        ("raise SystemExit", "it gave no answer"),
        (r"import os; os.write(2, b'gel\xf6scht\n'); raise SystemExit(1)", "gel\ufffdscht"),
    ],
)
def test_package_that_breaks_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, detail: str
) -> None:
    """A real package that is in the way of the real one, in a real process."""
    (tmp_path / "onnxruntime.py").write_text(textwrap.dedent(code))
    path = [str(tmp_path), *(entry for entry in sys.path if entry)]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    finding = doctor.in_fresh_process("onnxruntime-cpu")
    assert finding == Finding(
        "onnxruntime-cpu",
        False,
        detail,
        "reinstall it: pip install --force-reinstall onnxruntime",
    )


@pytest.mark.slow
def test_library_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("import time; time.sleep(600)")
    path = [str(tmp_path), *(entry for entry in sys.path if entry)]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    monkeypatch.setattr(doctor, "_PATIENCE", 1)
    finding = doctor.in_fresh_process("onnxruntime-cpu")
    assert (finding.works, finding.detail) == (False, "it did not answer in 1 s")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    finding = doctor.in_fresh_process("driver")
    assert finding.works
    assert "compute capability" in finding.detail
