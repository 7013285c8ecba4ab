"""Grad-CAM, Grad-CAM++ and Layer-CAM on a device, in Numba's simulator, against the CPU's.

The engines are ONNX Runtime's on both sides; the simulator is slow, so the network is small.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba.cuda")

import ccam_deploy as ccam
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.methods import GradCAM, GradCAMPlusPlus, LayerCAM, Method
from ccam_deploy.targets import Top
from tests.engines.cuda.host_device import Call, Job
from tests.helpers import noise
from tests.methods.cuda.recorded import Run, assert_close_in_half, assert_same, summed

pytestmark = pytest.mark.slow

BOTH = ("relu1", "relu2")
METHODS: dict[str, Method] = {
    "grad-cam": GradCAM(),
    "shallow": GradCAM(layer="relu1", relu=False),
    "grad-cam++": GradCAMPlusPlus(),
    "epsilon": GradCAMPlusPlus(layer="relu1", epsilon=1e-3),
    "layer-cam": LayerCAM(relu=False),
    "fused": LayerCAM(layers=BOTH),
    "all lifted": LayerCAM(layers=BOTH, scaling="all", gamma=3.0),
    "not lifted": LayerCAM(layers=BOTH, scaling="none"),
}


@pytest.mark.parametrize("name", METHODS)
def test_matches_cpu(bundle: Path, device: Run, name: str) -> None:
    """One image; several with several classes each; ranks, one of which is also named."""
    method, images = METHODS[name], noise(3, 3, 16, 24)
    calls = (
        Call(images[:1], None, method),
        Call(images, None, method),
        Call(images, [[3, 1], 2, [Top(2), 0]], method),
    )
    report = device(Job(bundle, calls)).report
    assert report.notes == ()
    with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
        for call, got in zip(calls, report.results, strict=True):
            expected = explainer.explain(call.images, call.targets, method=method)
            assert expected.raw_saliency.any()
            assert_same(got, expected, 1e-5)
            assert got.settings["options"] == expected.settings["options"]
            assert {"backbone", "gradient", "combine"} <= set(got.timings)


@pytest.mark.parametrize("name", ["grad-cam", "grad-cam++", "fused"])
def test_half_precision_is_close_to_cpu(bundle: Path, device: Run, name: str) -> None:
    """The images are cast, and the gradients are scaled."""
    assert_close_in_half(bundle, device, METHODS[name])


@pytest.mark.parametrize("replays_itself", [False, True])
def test_no_call_after_the_warm_up_prepares_anything(
    bundle: Path, device: Run, replays_itself: bool
) -> None:
    """No memory is allocated, nothing is bound or captured, whatever a call's sizes are."""
    images, method = noise(3, 3, 16, 24), METHODS["grad-cam"]
    calls = (
        Call(images[:1], None, method),
        Call(images, None, method),
        Call(images, [[0, 1, 2], 4, Top(2)], method),
        Call(images[:2], [0, [1, 2]], method),
    )
    job = Job(bundle, calls, replays_itself=replays_itself)
    warm = device(replace(job, warm_up=3)).report
    for counts in (warm.allocations, warm.bound, warm.captures):
        assert len(set(counts)) == 1
    assert warm.captured > 0
    assert warm.progress[:3] == ["one image", "2 images", "3 images"]
    assert {"one class", "2 classes", "4 classes"} == set(warm.progress[3:])
    for launches in warm.launches:
        assert {rows for _, rows in launches} <= {1, 2, 4}
        assert {name for name, _ in launches} == {"backbone", "gradient"}
    for got, expected in zip(warm.results, device(job).report.results, strict=True):
        assert_same(got, expected, 0)


def test_batches_and_company_change_no_bit(bundle: Path, device: Run) -> None:
    """Each pair by itself, in runs of two, and all at once."""
    images, method = noise(2, 3, 16, 24), METHODS["grad-cam++"]
    both = Call(images, [[2, 0], 1], method)
    alone = tuple(Call(images[i : i + 1], both.targets[i : i + 1], method) for i in (0, 1))
    whole = device(Job(bundle, (both, *alone))).report.results
    split = device(Job(bundle, (both,), batch_size=2)).report.results
    assert_same(split[0], whole[0], 0)
    for pair, (result, place) in enumerate(((1, 0), (1, 1), (2, 0))):
        got = whole[result]
        assert got.raw_saliency[place].tobytes() == whole[0].raw_saliency[pair].tobytes()


def test_cuda_graphs_give_the_same_bits(bundle: Path, device: Run) -> None:
    """The whole of a repeated call is replayed: the backbone, and what comes after it."""
    images, method = noise(2, 3, 16, 24), METHODS["grad-cam"]
    one, several = Call(images[:1], None, method), Call(images, [[1, 2], 3], method)
    calls = one, several, one, several, one
    recorded = device(Job(bundle, calls)).report
    plain = device(Job(bundle, calls, cuda_graphs=False)).report
    assert (plain.captured, plain.replayed) == (0, 0)
    assert (recorded.captured, recorded.replayed) == (4, 6)
    for got, expected in zip(recorded.results, plain.results, strict=True):
        assert_same(got, expected, 0)
    assert {"backbone", "explain"} <= set(recorded.results[-1].timings)


def test_results_do_not_depend_on_the_threads(bundle: Path, device: Run) -> None:
    call = Call(noise(1, 3, 16, 24), [[1, 2]], METHODS["fused"])
    few, many = (device(Job(bundle, (call,)), threads=n).report.results[0] for n in (32, 96))
    assert_same(many, few, 1e-6)


def test_values_that_overflow_are_refused(bundle: Path, device: Run) -> None:
    huge = np.full((1, 3, 16, 24), 1e5, np.float32)
    with pytest.raises(BackendError, match="NaN or infinite"):
        device(Job(bundle, (Call(huge, 0, GradCAM()),), "fp16"))


def test_an_infinite_sum_is_not_cut_off(pool: Executor) -> None:
    """Sums of minus infinity, or too large for a float32, are undefined as NaN is."""
    features = np.array([[[1, -np.inf, 3e38, 1, -1, 0]], [[1, 1, 1, 1, 1, 1]]], np.float32)
    slopes = np.array([[[1, 1, 2, np.nan, 1, 1]], [[2, -2, 0.5, 0, 1, 1]]], np.float32)
    found = pool.submit(summed, features, slopes).result()
    np.testing.assert_array_equal(found[0], [1, np.nan, np.nan, np.nan, 0, 0])
    np.testing.assert_array_equal(found[1], [2, 0, 0.5, 0, 1, 1])


def test_a_layer_that_is_not_there_is_refused(bundle: Path, device: Run) -> None:
    call = Call(noise(1, 3, 16, 24), 0, LayerCAM(layers=("relu9",)))
    with pytest.raises(OptionError, match='layer "relu9" is not in the bundle; it has relu1'):
        device(Job(bundle, (call,)))
