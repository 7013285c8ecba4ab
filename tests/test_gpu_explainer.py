"""Explanations on a GPU, whole, against the CPU's; on a GPU alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.bundle.manifest import PrecisionName
from ccam_deploy.engines.tensorrt.build import build
from ccam_deploy.engines.tensorrt.library import FLAVOURS, Flavour, load_library
from ccam_deploy.errors import BackendError
from ccam_deploy.fidelity.similarity import spearman
from ccam_deploy.fidelity.verification import verify_bundle
from ccam_deploy.methods import RISE, GradCAM, GradCAMPlusPlus, LayerCAM, Method, ScoreCAM
from ccam_deploy.targets import Top
from tests.helpers import example_pictures

pytestmark = pytest.mark.gpu

PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "tf32", "fp16")
GPU_BACKENDS = (*FLAVOURS, "onnxruntime-cuda")


@pytest.fixture(scope="module", params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(backend: str, digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's bundle with plans for this GPU, where the backend needs them."""
    folder = tmp_path_factory.mktemp(backend) / "digits"
    shutil.copytree(digits_bundle, folder)
    try:
        if backend in FLAVOURS:
            flavour: Flavour = "tensorrt" if backend == "tensorrt" else "tensorrt-rtx"
            library = load_library(flavour)
            for precision in PRECISIONS:
                build(read_bundle(folder), library, precision)
        ccam.load(folder, backend=backend).close()
    except BackendError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture
def explainer(bundle: Path, backend: str) -> Iterator[ccam.Explainer]:
    with ccam.load(bundle, backend=backend, slots=2) as explainer:
        yield explainer


def test_gives_what_the_cpu_gives(explainer: ccam.Explainer, digits: ccam.Explainer) -> None:
    pictures = example_pictures()
    got, expected = explainer.explain(pictures, Top(2)), digits.explain(pictures, Top(2))
    assert got.targets.tolist() == expected.targets.tolist()
    np.testing.assert_allclose(got.logits, expected.logits, atol=0.05)
    ranks = [spearman(*maps) for maps in zip(got.saliency, expected.saliency, strict=True)]
    assert np.median(ranks) > 0.99


def test_half_precision_gives_nearly_what_the_cpu_gives(
    bundle: Path, backend: str, digits: ccam.Explainer
) -> None:
    pictures = example_pictures()
    expected = digits.explain(pictures)
    with ccam.load(bundle, backend=backend, precision="fp16") as explainer:
        got = explainer.explain(pictures)
    assert got.targets.tolist() == expected.targets.tolist()
    ranks = [spearman(*maps) for maps in zip(got.saliency, expected.saliency, strict=True)]
    assert np.median(ranks) > 0.95


def test_tf32_keeps_to_its_bounds_and_float32_to_its_own(bundle: Path, backend: str) -> None:
    opened = read_bundle(bundle)
    reports = {}
    for precision in ("fp32", "tf32"):
        with ccam.load(opened, backend=backend, precision=precision) as explainer:
            networks, explain = explainer.networks, explainer.explain
            reports[precision], broken = verify_bundle(opened, networks, precision, explain)
        assert broken == []
    assert reports["tf32"].logits > 10 * reports["fp32"].logits


@pytest.mark.parametrize(
    "method",
    [ScoreCAM(), RISE(masks=150), GradCAM(), GradCAMPlusPlus(), LayerCAM()],
    ids=lambda method: method.name,
)
def test_other_methods_give_what_the_cpu_gives(
    explainer: ccam.Explainer, digits: ccam.Explainer, method: Method
) -> None:
    pictures = example_pictures()
    for call in (pictures[:1], pictures, pictures[:1]):
        got, expected = (who.explain(call, Top(2), method=method) for who in (explainer, digits))
        assert got.targets.tolist() == expected.targets.tolist()
        ranks = [spearman(*maps) for maps in zip(got.saliency, expected.saliency, strict=True)]
        assert np.median(ranks) > 0.99


def test_cuda_graphs_give_the_same_bits(bundle: Path, backend: str) -> None:
    pictures = example_pictures()
    calls = [pictures[:1], pictures, pictures[:1], pictures, pictures[1:2], pictures]
    with (
        ccam.load(bundle, backend=backend) as replayed,
        ccam.load(bundle, backend=backend, cuda_graphs=False) as plain,
    ):
        for call in calls:
            got, expected = replayed.explain(call), plain.explain(call)
            assert got.raw_saliency.tobytes() == expected.raw_saliency.tobytes()
            assert got.logits.tobytes() == expected.logits.tobytes()
        assert plain.notes == replayed.notes == ()
        assert {"classifier", "combine"} <= set(replayed.explain(calls[0]).timings)


def test_threads_share_an_explainer(explainer: ccam.Explainer) -> None:
    """The same but for rounding: it depends on how many masks go through an engine at a time.

    The classifier begins with as many as the slot's last picture had.
    """
    pictures = example_pictures()
    expected = [explainer.explain([picture]).raw_saliency for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            results = list(pool.map(lambda picture: explainer.explain([picture]), pictures))
            for got, wanted in zip(results, expected, strict=True):
                np.testing.assert_allclose(got.raw_saliency, wanted, atol=1e-5 * wanted.max())


def test_memory_does_not_grow(explainer: ccam.Explainer) -> None:
    from numba import cuda

    pictures = example_pictures()
    for _ in range(3):
        explainer.explain(pictures)
    free, _ = cuda.current_context().get_memory_info()
    for _ in range(20):
        explainer.explain(pictures)
    assert cuda.current_context().get_memory_info()[0] >= free
