"""Fixtures, and what tests marked `gpu` need. Light to import: many tests need no PyTorch."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

import ccam_deploy as ccam
from tests.bundles import EXPORTS, Bundles

settings.register_profile("shared", deadline=None)  # other work may take the machine's time
settings.load_profile("shared")


@cache
def _why_no_gpu() -> str:
    """What is missing for the tests that need a GPU; empty where they can run."""
    from ccam_deploy.engines.cuda.pycuda import CudaDevice
    from ccam_deploy.errors import BackendError

    try:
        CudaDevice().close()
    except BackendError as error:
        return str(error)
    return ""


SLOW_FIXTURES = {
    "digits_result",
    "gradients_bundle",
    "lite0_bundle",
    "resnet18_bundle",
    "wide_bundle",
}
"""Whatever needs one of these is slow."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bundles",
        type=Path,
        metavar="FOLDER",
        help="bundles that were exported before, by `python -m tests.bundles NAME FOLDER/NAME`; "
        "for environments without PyTorch",
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    fixtures = item.fixturenames if isinstance(item, pytest.Function) else ()
    if item.get_closest_marker("nightly") or SLOW_FIXTURES.intersection(fixtures):
        item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported: it took a sixth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Free what large networks left in cycles, whose weights the collector does not count."""
    if item.get_closest_marker("nightly"):
        gc.collect()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and _why_no_gpu():
        pytest.skip(_why_no_gpu())
    if item.get_closest_marker("serve") and not find_spec("pytriton"):
        pytest.skip("Triton is not installed here; make test-serve runs this")


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C is taken as in a terminal, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """The bundles that the tests of a run share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    shared = Bundles(request.config.getoption("--bundles") or folder / "bundles")
    fixtures = {
        name for item in request.session.items for name in getattr(item, "fixturenames", ())
    }
    shared.expect(name for name in EXPORTS if f"{name}_bundle" in fixtures)
    return shared


@pytest.fixture(scope="session")
def digits_bundle(bundles: Bundles) -> Path:
    """The example classifier's bundle, with both precisions. Do not change it: copy it."""
    return bundles.get("digits")


@pytest.fixture(scope="session")
def gradients_bundle(bundles: Bundles) -> Path:
    """The same with the graphs of the image's gradient. Do not change it: copy it."""
    return bundles.get("gradients")


@pytest.fixture(scope="session")
def tiny_bundle(bundles: Bundles) -> Path:
    """A small network's bundle, 32 × 48 pixels. Do not change it: copy it."""
    return bundles.get("tiny")


@pytest.fixture(scope="session")
def headed_bundle(bundles: Bundles) -> Path:
    """The small network's bundle with all graphs, in both precisions. Do not change it: copy it."""
    return bundles.get("headed")


@pytest.fixture(scope="session")
def lite0_bundle(bundles: Bundles) -> Path:
    """EfficientNet-Lite0 with its trained weights. Do not change it: copy it."""
    return bundles.get("lite0")


@pytest.fixture(scope="session")
def resnet18_bundle(bundles: Bundles) -> Path:
    """ResNet-18 with random weights, all graphs and both precisions. Do not change it: copy it."""
    return bundles.get("resnet18")


@pytest.fixture
def digits(digits_bundle: Path) -> Iterator[ccam.Explainer]:
    with ccam.load(digits_bundle) as explainer:
        yield explainer


@pytest.fixture
def differentiable(gradients_bundle: Path) -> Iterator[ccam.Explainer]:
    with ccam.load(gradients_bundle) as explainer:
        yield explainer
