"""What a measurement says about the machine."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ccam_deploy.latency import conditions
from ccam_deploy.latency.conditions import Gpu

H100 = "NVIDIA H100 80GB HBM3, 580.95.05, 1980, 2619, 1234, 81559, 34, 71.52"


def test_conditions_name_versions_and_machine() -> None:
    machine = conditions.machine()
    assert {"numpy", "onnxruntime", "torch"} <= set(machine.versions)
    assert machine.processor
    assert machine.cores is not None
    assert machine.cores >= 1


@pytest.mark.slow
def test_peak_memory_is_this_process_s() -> None:
    """At least what is resident now, and grown by what is taken and given back."""
    before = conditions.peak_memory()
    assert before is not None
    assert before >= 0.95 * _resident()
    taken = bytearray(round((before + 100) * 2**20))
    del taken
    after = conditions.peak_memory()
    assert after is not None
    assert after >= before + 80


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.slow
def test_peak_memory_does_not_begin_with_the_parent_s() -> None:
    code = "from ccam_deploy.latency.conditions import peak_memory; print(peak_memory())"
    ballast = bytearray(400 * 2**20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300


def smi(folder: Path, script: str) -> None:
    """A program that stands in for nvidia-smi."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_gpu_is_read_field_by_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    smi(tmp_path, f'echo "{H100}"; echo "{H100}"; echo "$@" > {tmp_path}/asked')
    assert conditions.gpu() == Gpu(
        "NVIDIA H100 80GB HBM3", "580.95.05", 1980, 2619, 1234, 81559, 34, 71.52
    )
    asked = (tmp_path / "asked").read_text()
    assert "--query-gpu=name,driver_version,clocks.max.sm,clocks.mem,memory.used" in asked
    assert "--format=csv,noheader,nounits" in asked


def test_what_a_gpu_does_not_tell_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    smi(tmp_path, 'echo "Orin, 540.4, [N/A], [Not Supported], [N/A], [N/A], 50, [N/A]"')
    card = conditions.gpu()
    assert card == Gpu("Orin", "540.4", None, None, None, None, 50, None)


@pytest.mark.parametrize("script", ["exit 9", "echo nonsense", "true", r"printf '\351\n'"])
def test_no_gpu(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    smi(tmp_path, script)
    assert conditions.gpu() is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert conditions.gpu() is None


@pytest.mark.parametrize(
    ("visible", "asked"),
    [(None, "--id=0 "), ("3,1", "--id=3 "), ("GPU-8932f937, 0", "--id=GPU-8932f937 "), ("", "")],
)
def test_the_gpu_that_is_asked_is_cuda_s_first(
    visible: str | None, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "asked").touch()
    smi(tmp_path, f'echo "{H100}"; echo "$@" > {tmp_path}/asked')
    assert (conditions.gpu() is not None) == bool(asked)
    assert (tmp_path / "asked").read_text().startswith(asked)


def test_clocks_are_sampled_while_the_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that rises by 10 MHz from sample to sample, as many as there was time for."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    count = tmp_path / "count"
    count.write_text("")
    smi(tmp_path, f"echo x >> {count}; echo $((1000 + 10 * $(wc -l < {count})))")
    threads = threading.active_count()
    with conditions.gpu_clocks(0.001) as clocks:
        while len(clocks) < 3:
            time.sleep(0.001)
    assert clocks == [1000.0 + 10 * (place + 1) for place in range(len(clocks))]
    assert len(clocks) == len(count.read_text().split())
    assert threading.active_count() == threads  # none is left to sample


@pytest.mark.parametrize("script", ["exit 9", 'echo "[N/A]"'])
def test_no_clock(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    smi(tmp_path, script)
    with conditions.gpu_clocks(60) as clocks:
        pass
    assert clocks == []
