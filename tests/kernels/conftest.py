"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.kernels.declared import Machine
    from tests.kernels.simulated_device import Device


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose GPU is only named, and an empty cache folder."""
    from tests.kernels.declared import named_device

    return named_device(tmp_path / "cache" / "kernels", monkeypatch)


@pytest.fixture(scope="package")
def simulated() -> Iterator[Device]:
    from tests.kernels.simulated_device import Device, simulator

    with simulator() as pool:
        yield Device(pool)


@pytest.fixture(scope="package", params=["simulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """The simulator; and the GPU, where there is one."""
    from tests.kernels.simulated_device import Device

    if request.param == "gpu":
        return Device(None)
    chosen: Device = request.getfixturevalue("simulated")
    return chosen
