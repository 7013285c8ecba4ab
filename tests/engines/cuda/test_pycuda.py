"""The GPU's memory and stream, over a driver that only writes down what it is asked."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ccam_deploy.engines.cuda import pycuda
from ccam_deploy.engines.cuda.graph_replay import StreamRunner
from ccam_deploy.engines.cuda.pycuda import CudaDevice
from ccam_deploy.errors import BackendError


class DriverError(Exception):
    pass


class FakeDriver:
    """PyCUDA's driver module and a context; memory is host memory.

    Every call but `push` must find the context current in its thread.
    """

    Error = DriverError

    def __init__(self) -> None:
        self.depth = threading.local()
        self.calls: list[str] = []
        self.freed = 0
        self.fault: Exception | None = None

    def push(self) -> None:
        self.depth.value = getattr(self.depth, "value", 0) + 1

    def pop(self) -> None:
        self.depth.value -= 1

    def note(self, call: str) -> None:
        assert self.depth.value >= 1
        if self.fault:
            raise self.fault
        self.calls.append(call)

    def Stream(self, flags: int) -> Any:  # noqa: N802
        self.note(f"stream {flags}")
        return SimpleNamespace(handle=7, synchronize=lambda: self.note("wait"))

    def Event(self) -> Any:  # noqa: N802
        self.note("event")
        return SimpleNamespace(record=lambda _: None, time_since=lambda _: 2.5)

    def mem_alloc(self, size: int) -> Any:
        self.note(f"allocate {size}")
        memory = np.zeros(size, np.uint8)
        self.keep = memory

        class Block:
            def __int__(self) -> int:
                return int(memory.ctypes.data)

            def free(block) -> None:  # noqa: N805
                self.note("free")

        return Block()

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        self.note("pinned")
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.ndarray(shape, dtype, Pinned(self, size))

    def memcpy_htod_async(self, address: int, values: Any, stream: Any) -> None:
        self.note(f"upload {values.nbytes}")


class Pinned(bytearray):
    """Pinned memory, which must be freed where the context is current."""

    def __init__(self, driver: FakeDriver, size: int) -> None:
        super().__init__(size)
        self.driver = driver

    def __del__(self) -> None:
        self.driver.calls.append(f"unpin {self.driver.depth.value}")


class FakeBindings:
    """What of cuda.bindings.driver captures graphs."""

    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUresult = SimpleNamespace(CUDA_SUCCESS=0)

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: str | None = None

    def CUstream(self, handle: int) -> int:  # noqa: N802
        return handle

    def cuGetErrorString(self, result: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"operation not permitted when stream is capturing"

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            failed = name == self.fails
            returns = name in ("cuStreamEndCapture", "cuGraphInstantiate")
            return (900 if failed else 0, *((None if failed else 5,) if returns else ()))

        return call


@contextmanager
def nothing() -> Iterator[None]:
    yield


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    numba = SimpleNamespace(external_stream=lambda handle: handle, defer_cleanup=nothing)
    monkeypatch.setattr(pycuda, "_primary_context", lambda: (driver, driver))
    monkeypatch.setattr(pycuda, "_numba", lambda: numba)
    return driver


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> FakeBindings:
    bindings = FakeBindings()
    monkeypatch.setattr(pycuda, "_bindings", lambda: bindings)
    return bindings


def test_context_is_current_only_inside(driver: FakeDriver, bindings: FakeBindings) -> None:
    """In every thread that works: PyCUDA aborts where a thread ends with one."""
    device = CudaDevice()
    with device.current():
        address = device.allocate(8)
    depths = []

    def work() -> None:
        with device.current():
            device.upload(address, np.zeros(2, np.float32))
            device.wait()
        depths.append(driver.depth.value)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert depths == [0]
    with device.current():
        device.free(address)
        device.allocate(16)
    device.close()
    device.close()
    assert driver.calls == [
        *("stream 1", "allocate 8", "upload 8", "wait", "wait", "free"),
        *("allocate 16", "wait", "free"),
    ]
    assert driver.depth.value == 0


def test_driver_errors_are_backend_errors(driver: FakeDriver, bindings: FakeBindings) -> None:
    device = CudaDevice()
    driver.fault = DriverError("cuMemAlloc failed: out of memory")
    with (
        pytest.raises(BackendError, match="failed to allocate 64 bytes: cuMemAlloc failed: out of"),
        device.current(),
    ):
        device.allocate(64)
    assert driver.depth.value == 0
    with pytest.raises(BackendError, match="a kernel would not launch"), device.current():
        raise DriverError("a kernel would not launch")


@pytest.mark.slow
def test_events_are_used_again(driver: FakeDriver, bindings: FakeBindings) -> None:
    """None is made on the way once there are as many as are held at a time."""
    device = CudaDevice()
    with device.current():
        for _ in range(3):
            start, end = device.mark(), device.mark()
            assert device.seconds(start, end) == pytest.approx(2.5e-3)
            del start, end
            gc.collect()
    assert driver.calls.count("event") == 2


@pytest.mark.slow
def test_pinned_memory_is_freed_where_the_context_is_current(
    driver: FakeDriver, bindings: FakeBindings
) -> None:
    """Not where the last reference is dropped, which may be in any thread."""
    device = CudaDevice()
    with device.current():
        array = device.pinned((2, 3), np.float32)
        assert device.pinned((0,), np.uint8).size == 0
    part = array[1:]
    del array
    gc.collect()
    assert "unpin 0" not in driver.calls
    del part
    gc.collect()
    assert driver.calls == ["stream 1", "pinned"]
    with device.current():
        device.pinned((1,), np.uint8)
    assert driver.calls[2:4] == ["unpin 1", "pinned"]


def test_captured_work_is_replayed(driver: FakeDriver, bindings: FakeBindings) -> None:
    device = CudaDevice()
    done = []
    with device.current():
        replay = device.capture(lambda: done.append(1))
        assert done == [1]
        replay()
    device.close()
    assert bindings.calls == [
        "cuStreamBeginCapture",
        "cuStreamEndCapture",
        "cuGraphInstantiate",
        "cuGraphDestroy",
        "cuGraphLaunch",
        "cuGraphExecDestroy",
    ]


def test_dropped_graphs_are_destroyed_at_the_next_capture(
    driver: FakeDriver, bindings: FakeBindings
) -> None:
    device = CudaDevice()
    with device.current():
        kept, dropped = (device.capture(lambda: None) for _ in range(2))
        del dropped
        gc.collect()
        assert "cuGraphExecDestroy" not in bindings.calls
        more = device.capture(lambda: None)
        assert bindings.calls.count("cuGraphExecDestroy") == 1
        kept()
    device.close()
    assert bindings.calls.count("cuGraphExecDestroy") == 3
    del kept, more


@pytest.mark.parametrize("call", ["cuStreamEndCapture", "cuGraphInstantiate", "cuGraphLaunch"])
def test_failed_captures_are_backend_errors(
    driver: FakeDriver, bindings: FakeBindings, call: str
) -> None:
    device = CudaDevice()
    bindings.fails = call
    with (
        device.current(),
        pytest.raises(BackendError, match="not permitted when stream is capturing"),
    ):
        device.capture(lambda: None)()
    assert driver.depth.value == 0


def test_capture_ends_where_its_work_fails(driver: FakeDriver, bindings: FakeBindings) -> None:
    device = CudaDevice()

    def work() -> None:
        raise BackendError("the plan cannot run")

    with device.current(), pytest.raises(BackendError, match="the plan cannot run"):
        device.capture(work)
    assert bindings.calls == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphDestroy"]


def cuda_error(reason: str) -> Exception:
    """What numba-cuda's kernel launches raise where the driver refuses them."""
    module = pytest.importorskip("cuda.core._utils.cuda_utils")
    error: Exception = module.CUDAError(reason)
    return error


def test_failed_kernel_launches_are_backend_errors(
    driver: FakeDriver, bindings: FakeBindings
) -> None:
    device = CudaDevice()
    reason = "CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    with (
        pytest.raises(BackendError, match=f"the GPU failed: {reason}; use a smaller batch_size"),
        device.current(),
    ):
        raise cuda_error(reason)
    assert driver.depth.value == 0


@pytest.mark.parametrize("name", ["CudaDriverError", "NvvmError", "NvvmSupportError"])
def test_errors_of_numba_and_its_compilers_are_backend_errors(
    driver: FakeDriver, bindings: FakeBindings, name: str
) -> None:
    errors = pytest.importorskip("numba.cuda.cudadrv.error")
    device = CudaDevice()
    with pytest.raises(BackendError, match="the GPU failed: no such thing"), device.current():
        raise getattr(errors, name)("no such thing")


def test_errors_of_python_code_stay_what_they_are(
    driver: FakeDriver, bindings: FakeBindings
) -> None:
    device = CudaDevice()
    with pytest.raises(ZeroDivisionError), device.current():
        raise ZeroDivisionError


def test_a_launch_that_fails_while_it_is_captured_is_done_piece_by_piece(
    driver: FakeDriver, bindings: FakeBindings
) -> None:
    device, notes, launched = CudaDevice(), list[str](), list[int]()
    runner = StreamRunner(device, True, lambda: True, notes.append)

    def work() -> None:
        if device._capturing:
            raise cuda_error("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: not permitted")
        launched.append(1)

    with device.current():
        for _ in range(3):
            runner.run("key", "all", work)
    assert len(launched) == 3
    (note,) = notes
    assert "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in note
    assert bindings.calls == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphDestroy"]


def test_missing_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setattr(pycuda, "_primary_context", pycuda._primary_context.__wrapped__)
    with pytest.raises(BackendError, match=r"PyCUDA cannot be loaded .*ccam-deploy\[gpu\]"):
        CudaDevice()


def test_a_warning_before_a_failing_import_is_left_to_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda" / "__init__.py").touch()
    (tmp_path / "pycuda" / "driver.py").write_text(
        "import warnings\nwarnings.warn('headers')\nraise ImportError('no cuMemAlloc_v2')\n"
    )
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)  # so that the import is undone
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match=r"PyCUDA cannot be loaded \(no cuMemAlloc_v2\)"):
        pycuda._primary_context.__wrapped__()


@pytest.mark.slow
def test_numba_warns_of_nothing() -> None:
    """Neither when it is loaded, nor of small grids, nor of what its compiler noted."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is missing")
    code = (
        "import os, sys, warnings\n"
        "sys.setdlopenflags(sys.getdlopenflags() | os.RTLD_GLOBAL)\n"  # of which it warns
        "from ccam_deploy.engines.cuda import pycuda\n"
        "pycuda._numba()\n"
        "from numba.cuda import dispatcher\n"
        "from numba.cuda.cudadrv.error import NvvmWarning\n"
        "assert dispatcher.config.CUDA_LOW_OCCUPANCY_WARNINGS == 0\n"
        "warnings.warn('a note', NvvmWarning)\n"
    )
    words = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
