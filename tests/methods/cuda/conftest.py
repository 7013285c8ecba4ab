"""Fixtures of methods on a device: a small bundle, and a process in which kernels are simulated."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

import pytest

from ccam_deploy.methods.cuda.rise import MOST_CELLS
from tests.bundles import Bundles
from tests.engines.cuda.host_device import Job
from tests.kernels.simulated_device import simulator
from tests.methods.cuda.recorded import Recorded, Run, run_recorded


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Path:
    return bundles.get("pocket")


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with simulator() as executor:
        yield executor


@pytest.fixture(scope="module")
def device(pool: Executor) -> Run:
    def run(job: Job, most_cells: int = MOST_CELLS, threads: int = 32) -> Recorded:
        return pool.submit(run_recorded, job, most_cells, threads).result()

    return run
