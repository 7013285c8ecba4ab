"""Recipro-CAM on a device, in Numba's simulator, against the CPU's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba.cuda")

import ccam_deploy as ccam
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.methods import ReciproCAM
from ccam_deploy.targets import Top
from tests.engines.cuda.host_device import Call, Job
from tests.helpers import noise
from tests.methods.cuda.recorded import Run, assert_same

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", [ReciproCAM(), ReciproCAM(score="logit")], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_matches_cpu(bundle: Path, device: Run, method: ReciproCAM, precision: str) -> None:
    """One image, and several with several classes, in chunks that do not divide the places."""
    images = noise(3, 3, 16, 24)
    calls = Call(images[:1], None, method), Call(images, [[3, 1], 2, [Top(2), 0]], method)
    recorded = device(Job(bundle, calls, precision, masks=7))
    chunk = 6  # of 24 places in four parts, because the graph takes 7
    shown = 1 + 3 + 1  # the last image has more classes than the second run takes
    assert recorded.rows("head") == [chunk] * 4 * shown
    assert not recorded.rows("classifier")
    tolerance = 1e-6 if precision == "fp32" else 5e-4
    with ccam.load(bundle, backend="onnxruntime-cpu", precision=precision) as explainer:
        for call, got in zip(calls, recorded.report.results, strict=True):
            expected = explainer.explain(call.images, call.targets, method=method)
            assert got.targets.tolist() == expected.targets.tolist()
            difference = np.abs(got.raw_saliency - expected.raw_saliency).max(axis=(1, 2))
            assert (difference <= tolerance).all()
            # The probabilities of single places hardly differ, so scaling enlarges what does.
            enlarged = tolerance / np.ptp(expected.raw_saliency, axis=(1, 2))
            difference = np.abs(got.saliency - expected.saliency).max(axis=(1, 2))
            assert (difference <= 3 * enlarged).all()


@pytest.mark.parametrize("replays_itself", [False, True])
def test_no_call_after_the_warm_up_prepares_anything(
    bundle: Path, device: Run, replays_itself: bool
) -> None:
    images, method = noise(2, 3, 16, 24), ReciproCAM()
    calls = Call(images[:1], None, method), Call(images, [[0, 1, 2], Top(2)], method)
    job = Job(bundle, calls, masks=12, batch_size=2, replays_itself=replays_itself)
    warm = device(replace(job, warm_up=2)).report
    for counts in (warm.allocations, warm.bound, warm.captures):
        assert len(set(counts)) == 1
    assert warm.captured > 0
    plain = device(replace(job, cuda_graphs=False)).report
    for got, expected in zip(warm.results, plain.results, strict=True):
        assert_same(got, expected, 0)


def test_values_that_overflow_are_refused(bundle: Path, device: Run) -> None:
    huge = np.full((1, 3, 16, 24), 1e5, np.float32)
    with pytest.raises(BackendError, match="NaN or infinite"):
        device(Job(bundle, (Call(huge, 0, ReciproCAM()),), "fp16"))


def test_a_bundle_without_a_head_says_what_to_export(tiny_bundle: Path, device: Run) -> None:
    call = Call(noise(1, 3, 32, 48), 0, ReciproCAM())
    with pytest.raises(OptionError, match="has no head graph; export it with --head"):
        device(Job(tiny_bundle, (call,)))
