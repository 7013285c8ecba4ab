"""The GPU's memory and stream, over a driver that only writes down what it is asked."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ccam_deploy.engines import cuda
from ccam_deploy.engines.cuda import Arena, CudaDevice
from ccam_deploy.engines.device import ALIGNMENT
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
        assert self.depth.value == 1
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
        return np.empty(shape, dtype)

    def memcpy_htod_async(self, address: int, values: Any, stream: Any) -> None:
        self.note(f"upload {values.nbytes}")


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
    monkeypatch.setattr(cuda, "_primary_context", lambda: (driver, driver))
    monkeypatch.setattr(cuda, "_numba", lambda: numba)
    return driver


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> FakeBindings:
    bindings = FakeBindings()
    monkeypatch.setattr(cuda, "_bindings", lambda: bindings)
    return bindings


def test_arena_hands_out_aligned_pieces_of_blocks() -> None:
    blocks: list[int] = []

    def allocate(size: int) -> int:
        blocks.append(size)
        return len(blocks) << 20

    arena = Arena(allocate, block=4096)
    taken = [arena.take(size) for size in (1, 0, 300, 5000, 2048, 2048)]
    assert blocks == [4096, 5120, 4096]
    assert [address - (1 << 20) for address in taken[:3]] == [0, 256, 512]
    assert taken[3] == 2 << 20
    assert taken[4] == (1 << 20) + 1024
    assert taken[5] == 3 << 20
    assert all(address % ALIGNMENT == 0 for address in taken)


def test_context_is_current_in_every_thread_that_works(
    driver: FakeDriver, bindings: FakeBindings
) -> None:
    """And in none of them afterwards: PyCUDA aborts where a thread ends with one."""
    device = CudaDevice()
    address = device.allocate(8)
    depths = []

    def work() -> None:
        device.upload(address, np.zeros(2, np.float32))
        device.wait()
        depths.append(driver.depth.value)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert depths == [0]
    device.close()
    device.close()
    assert driver.calls[0] == "stream 1"
    assert driver.calls[2:] == ["upload 8", "wait", "wait", "free"]
    assert driver.depth.value == 0


def test_driver_errors_are_told(driver: FakeDriver, bindings: FakeBindings) -> None:
    device = CudaDevice()
    driver.fault = DriverError("cuStreamSynchronize failed: an illegal address")
    with pytest.raises(BackendError, match="cuStreamSynchronize failed: an illegal address"):
        device.wait()
    assert driver.depth.value == 0


def test_events_are_used_again(driver: FakeDriver, bindings: FakeBindings) -> None:
    """None is made on the way once there are as many as are held at a time."""
    device = CudaDevice()
    for _ in range(3):
        start, end = device.mark(), device.mark()
        assert device.seconds(start, end) == pytest.approx(2.5e-3)
        del start, end
        gc.collect()
    assert driver.calls.count("event") == 2


def test_captured_work_is_replayed(driver: FakeDriver, bindings: FakeBindings) -> None:
    device = CudaDevice()
    done = []
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


@pytest.mark.parametrize("call", ["cuStreamEndCapture", "cuGraphInstantiate", "cuGraphLaunch"])
def test_failed_captures_are_told(driver: FakeDriver, bindings: FakeBindings, call: str) -> None:
    device = CudaDevice()
    bindings.fails = call
    with pytest.raises(BackendError, match="not permitted when stream is capturing"):
        device.capture(lambda: None)()
    assert driver.depth.value == 0


def test_capture_ends_where_its_work_fails(driver: FakeDriver, bindings: FakeBindings) -> None:
    device = CudaDevice()

    def work() -> None:
        raise BackendError("the plan cannot run")

    with pytest.raises(BackendError, match="the plan cannot run"):
        device.capture(work)
    assert bindings.calls == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphDestroy"]


def test_missing_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setattr(cuda, "_primary_context", cuda._primary_context.__wrapped__)
    with pytest.raises(BackendError, match=r"PyCUDA cannot be loaded .*ccam-deploy\[gpu\]"):
        CudaDevice()
