"""A driver for the doctor, whatever this machine has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from tests.checks.drivers import FakeDriver


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a driver in place, or takes it away: the tests say the same with and without a GPU."""

    real = ctypes.CDLL

    def put(fake: FakeDriver | None) -> None:
        def load(name: str, *arguments: Any, **more: Any) -> Any:
            if name != "libcuda.so.1":
                return real(name, *arguments, **more)
            if fake is None:
                raise OSError(f"{name}: cannot open shared object file: No such file or directory")
            return fake

        monkeypatch.setattr(ctypes, "CDLL", load)

    put(None)
    return put
