"""What pip needs to compile PyCUDA, and which of it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccam_deploy.checks.compiling import missing_to_compile


def test_what_is_missing_to_compile_pycuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is there, then a compiler, then all of CUDA but one header, then all."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python"))
    everything = {
        *("build-essential", "python3-dev", "cuda-nvcc-13-0", "cuda-cudart-dev-13-0"),
        *("cuda-profiler-api-13-0", "libcurand-dev-13-0"),
    }
    assert set(missing_to_compile().values()) == everything

    def put(*names: str) -> set[str]:
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch(0o755)
        return set(missing_to_compile().values())

    assert put("bin/g++", "python/Python.h") == everything - {"build-essential", "python3-dev"}
    assert put("bin/nvcc", "include/cuda.h", "include/cudaProfiler.h") == {"libcurand-dev-13-0"}
    assert put("include/curand.h") == set()
