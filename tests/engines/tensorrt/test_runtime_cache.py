"""What TensorRT-RTX compiles for a plan is kept beside it, over a stand-in for its objects."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ccam_deploy.bundle.folder import read_bundle, record_files, unlisted_files, write_manifest
from ccam_deploy.bundle.manifest import Plan
from ccam_deploy.engines.tensorrt.library import Library
from ccam_deploy.engines.tensorrt.runtime import SharedPlan
from ccam_deploy.engines.tensorrt.runtime_cache import RuntimeCache
from tests.damage import flip, full_disk
from tests.engines.tensorrt.test_runtime import FakeEngine, library


class Kernels:
    """A cache of TensorRT-RTX, in which running a plan leaves kernels."""

    def __init__(self, driver: bytes) -> None:
        self.driver = driver
        self.kernels: set[bytes] = set()

    def deserialize(self, content: bytes) -> bool:
        driver, *kernels = content.split(b"|")
        if driver == self.driver:
            self.kernels.update(kernels)
        return driver == self.driver

    def serialize(self) -> bytes | None:
        return b"|".join([self.driver, *sorted(self.kernels)]) if self.kernels else None


class Config:
    """A plan's runtime configuration."""

    def __init__(self, driver: bytes = b"580") -> None:
        self.driver = driver

    def create_runtime_cache(self) -> Kernels:
        return Kernels(self.driver)

    def set_runtime_cache(self, cache: Kernels) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    file = tmp_path / "head.plan"
    file.write_bytes(b"plan")
    return file


def run(plan: Path, kernel: bytes, driver: bytes = b"580", capability: str = "8.9") -> set[bytes]:
    """What a process finds compiled, before it compiles a kernel itself."""
    cache, config = RuntimeCache(plan, capability), Config(driver)
    assert cache.attach(config)
    found = set(config.cache.kernels)
    config.cache.kernels.add(kernel)
    cache.keep()
    return found


def test_the_next_process_finds_the_kernels(plan: Path) -> None:
    assert run(plan, b"one") == set()
    assert run(plan, b"two") == {b"one"}
    assert run(plan, b"two") == {b"one", b"two"}
    assert sorted(path.name for path in plan.parent.iterdir()) == [
        "head.plan",
        "head.plan.8.9.runtime-cache",
    ]


def test_kernels_of_another_driver_are_replaced(plan: Path) -> None:
    run(plan, b"one")
    assert run(plan, b"two", b"590") == set()
    assert run(plan, b"two", b"590") == {b"two"}


def test_each_gpu_has_its_own(plan: Path) -> None:
    run(plan, b"one")
    assert run(plan, b"two", capability="12.0") == set()
    assert run(plan, b"two") == {b"one"}


@pytest.mark.parametrize("offset", [0, 31, 32, -1])
def test_damaged_kernels_are_replaced(plan: Path, offset: int) -> None:
    run(plan, b"one")
    flip(plan.with_name("head.plan.8.9.runtime-cache"), offset)
    assert run(plan, b"two") == set()
    assert run(plan, b"two") == {b"two"}


def test_what_did_not_change_is_not_written(plan: Path) -> None:
    run(plan, b"one")
    file = plan.with_name("head.plan.8.9.runtime-cache")
    before = file.stat().st_ino
    run(plan, b"one")
    assert file.stat().st_ino == before
    run(plan, b"two")
    assert file.stat().st_ino != before


def test_a_folder_that_cannot_be_written_is_silent(
    plan: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with full_disk(8):
        run(plan, b"one")
    assert [path.name for path in plan.parent.iterdir()] == ["head.plan"]
    shutil.rmtree(plan.parent)
    run(plan, b"one")
    assert not plan.parent.exists()
    assert capfd.readouterr() == ("", "")


def test_nothing_is_written_where_nothing_was_compiled(plan: Path) -> None:
    cache = RuntimeCache(plan, "8.9")
    cache.attach(Config())
    cache.keep()
    assert [path.name for path in plan.parent.iterdir()] == ["head.plan"]


def _rtx(config: Config) -> Library:
    """A stand-in for TensorRT-RTX, whose plans have that configuration."""
    engine: Any = FakeEngine(1)
    engine.create_runtime_config = lambda: config
    module = library(engine).module
    module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    module.CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
    return Library("tensorrt-rtx", module)


def test_a_plan_keeps_its_kernels_when_it_is_closed(plan: Path) -> None:
    first, second = Config(), Config()
    shared = SharedPlan(_rtx(first), plan, "8.9")
    assert first.cache.kernels == set()
    first.cache.kernels.add(b"one")
    shared.close()
    SharedPlan(_rtx(second), plan, "8.9")
    assert second.cache.kernels == {b"one"}


def test_a_plan_of_a_signed_bundle_leaves_nothing(plan: Path) -> None:
    config = Config()
    shared = SharedPlan(_rtx(config), plan, "8.9", writes=False)
    config.cache.kernels.add(b"one")
    shared.keep_compiled()
    shared.close()
    assert [path.name for path in plan.parent.iterdir()] == ["head.plan"]


def test_other_libraries_leave_nothing(plan: Path) -> None:
    SharedPlan(library(FakeEngine(1)), plan, "8.9").close()
    assert [path.name for path in plan.parent.iterdir()] == ["head.plan"]


def test_the_file_belongs_to_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    """It is expected beside a plan that the manifest lists, and nowhere else."""
    folder = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    manifest = read_bundle(folder).manifest
    file = folder / "plans" / "x" / "head.plan"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"plan")
    records = manifest.files | record_files(folder, ["plans/x/head.plan"])
    sha = "0" * 64
    listed = Plan("plans/x/head.plan", "head", "fp32", "tensorrt-rtx", "1", ("8.9",), sha, sha, 1)
    write_manifest(folder, replace(manifest, files=records, plans=(listed,)))
    run(file, b"one")
    (file.parent / "other.plan.8.9.runtime-cache").touch()
    (file.parent / "head.plan.8.9").touch()
    assert unlisted_files(read_bundle(folder)) == [
        "plans/x/head.plan.8.9",
        "plans/x/other.plan.8.9.runtime-cache",
    ]
