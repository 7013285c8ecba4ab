"""The doctor's line for a driver that works, is missing or is broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ccam_deploy.checks import doctor
from ccam_deploy.checks.doctor import Finding
from tests.checks.drivers import FakeDriver

NO_DRIVER = "there is no NVIDIA driver (libcuda.so.1)"


def test_attributes_are_the_driver_s() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is missing")
    attributes = bindings.CUdevice_attribute
    assert attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == doctor._MAJOR
    assert attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == doctor._MINOR
    errors = bindings.CUresult
    assert errors.CUDA_ERROR_NO_DEVICE == doctor._NO_DEVICE
    assert errors.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH == doctor._MISMATCH


@pytest.mark.usefixtures("driver")
def test_no_driver() -> None:
    found = doctor.try_name("driver")
    assert found == Finding(
        "driver", False, NO_DRIVER, "install the NVIDIA driver, on a machine with an NVIDIA GPU"
    )


def test_driver_describes_the_gpu(driver: Callable[..., None]) -> None:
    driver(FakeDriver())
    assert doctor.try_name("driver") == Finding(
        "driver", True, "NVIDIA H100, compute capability 9.0, driver for CUDA 13.0"
    )


@pytest.mark.parametrize(
    ("fake", "detail", "remedy"),
    [
        (FakeDriver(100), "the driver sees no GPU", "CUDA_VISIBLE_DEVICES"),
        (FakeDriver(803), "kernel module differ in version", "restart the machine"),
        (FakeDriver(999), "cuInit failed with error 999", "nvidia-smi"),
        (FakeDriver(0, (6, 1)), "compute capability 6.1", "compute capability 7.5 or newer"),
    ],
)
def test_broken_driver(
    driver: Callable[..., None], fake: FakeDriver, detail: str, remedy: str
) -> None:
    driver(fake)
    finding = doctor.try_name("driver")
    assert not finding.works
    assert detail in finding.detail
    assert remedy in finding.remedy
