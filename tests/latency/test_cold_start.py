"""A cold start is a process of its own, and its parts fit into the whole."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import pytest
from msgspec import UNSET

from ccam_deploy.errors import BackendError
from ccam_deploy.latency import cold_start
from ccam_deploy.latency.cold_start import ColdStart, measure_cold_start
from ccam_deploy.latency.tables import _cold_starts
from tests.helpers import example_files

HOW = {"backend": "onnxruntime-cpu", "precision": "fp32", "batch_size": 16, "threads": 1}


@pytest.mark.slow
def test_parts_of_a_cold_start(tiny_bundle: Path) -> None:
    start = measure_cold_start(tiny_bundle, example_files()[:2], 3, HOW, limit=600)
    assert start
    assert start.batch == 3
    assert min(start.imports_ms, start.load_ms, start.first_ms, start.second_ms) > 0
    assert start.imports_ms + start.load_ms + start.first_ms < start.total_ms
    assert start.peak_memory_mib is not None
    assert 20 < start.peak_memory_mib < 1000
    assert start.device_memory_mib is None
    assert start.kernels is None
    assert msgspec.to_builtins(start) == {
        "batch": 3,
        "total_ms": start.total_ms,
        "imports_ms": start.imports_ms,
        "load_ms": start.load_ms,
        "first_ms": start.first_ms,
        "second_ms": start.second_ms,
        "peak_memory_mib": start.peak_memory_mib,
        "device_memory_mib": None,
    }


@pytest.mark.slow
def test_what_goes_wrong_in_the_process_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        measure_cold_start(tmp_path / "none", example_files()[:1], 1, HOW)
    message = str(caught.value)
    assert message.startswith("the cold start failed: ")
    assert "there is no such folder" in message
    assert "\n" not in message


def test_a_process_that_says_much_is_not_blocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that fills a pipe twice over before the first explanation."""
    noisy = tmp_path / "noisy.py"
    noisy.write_text(
        "import sys\n"
        "sys.stderr.write('x' * 2**17 + '\\nthe last words\\n')\n"
        "print('ready', flush=True)\n"
        "sys.exit(3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(cold_start, "__name__", "noisy")
    with pytest.raises(BackendError, match=r"^the cold start failed: the last words$"):
        measure_cold_start(tmp_path, example_files()[:1], 1, HOW)


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "print('ready', flush=True)\n"])
def test_a_process_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Before its first explanation, or before its second."""
    (tmp_path / "slow.py").write_text(f"import time\n{before}time.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(cold_start, "__name__", "slow")
    begun = time.perf_counter()
    assert measure_cold_start(tmp_path, example_files()[:1], 1, HOW, limit=0.5) is None
    assert 0.5 < time.perf_counter() - begun < 60


def cold(compiled: int, found: int) -> ColdStart:
    return ColdStart(
        batch=1,
        total_ms=2000.0,
        imports_ms=1.0,
        load_ms=2.0,
        first_ms=3.0,
        second_ms=4.0,
        peak_memory_mib=5.0,
        device_memory_mib=None,
        kernels_compiled=compiled,
        kernels_found=found,
    )


def test_the_kernels_cache_is_named() -> None:
    starts = [cold(0, 17), cold(1, 16), cold(17, 0)]
    assert [start.kernels for start in starts] == ["warm", "cold", "cold"]
    header, *rows = _cold_starts(starts)
    assert header[-2:] == ("peak MiB", "kernels")
    assert [row[-2:] for row in rows] == [("5", "warm"), ("5", "cold"), ("5", "cold")]


def test_kernels_are_counted_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba.cuda")
    from ccam_deploy.kernels.cuda import kept, kernel_files

    store = kept.KernelStore(kernel_files.CodeFolder(None))
    store.compiled, store.found = 3, 14
    monkeypatch.setattr(kept, "store", lambda: store)
    assert cold_start._kernel_counts() == (3, 14)
    monkeypatch.delitem(sys.modules, kept.__name__)
    assert cold_start._kernel_counts() == (UNSET, UNSET)
