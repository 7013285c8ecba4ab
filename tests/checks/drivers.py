"""Stands in for an NVIDIA driver."""

from __future__ import annotations

from typing import Any

from ccam_deploy.checks import doctor


class FakeDriver:
    """libcuda.so.1 of an H100, or one that fails."""

    def __init__(self, status: int = 0, capability: tuple[int, int] = (9, 0)) -> None:
        self._status = status
        self._capability = capability

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._status

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13000
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        name.value = b"NVIDIA H100"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self._capability[0 if attribute == doctor._MAJOR else 1]
        return 0
