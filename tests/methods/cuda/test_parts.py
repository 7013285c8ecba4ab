"""Images in device memory give the maps of images on the host, and their maps stay there too."""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import pytest

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.engines.cuda.parts import ImagePart, ImageParts
from ccam_deploy.errors import ImageError, OptionError, TargetError
from ccam_deploy.methods import Method
from tests.engines.cuda.host_device import Call, Job, opened
from tests.engines.cuda.test_parts import parts_of, read
from tests.helpers import noise
from tests.sweeps import nightly_but

COUNTS = [(1, True), (1, False), (3, True)]
TARGETS = [2, 0, -1, 1, 2]


def explained(job: Job) -> list[tuple[ccam.Explanation, ccam.Explanation, list[Floats]]]:
    """Each call as an array and in parts, and the maps of the parts in device memory."""
    results = []
    with opened(job) as (explainer, devices, _):
        device = devices[0]
        for call in job.calls:
            before = set(device.blocks)
            targets = [ccam.Top() if target < 0 else target for target in call.targets]
            images = parts_of(device, call.images, COUNTS)
            held = set(device.blocks) - before
            found = explainer.explain_parts(images, targets, method=call.method)
            maps = [read(device, part.maps) for part in images.parts if part.maps]
            for address in held:
                device.free(address)
            whole = explainer.explain(call.images, targets, method=call.method)
            results.append((whole, found, maps))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", nightly_but([2], [2, 8]))
def test_maps_are_the_same_to_the_bit(bundle: Path, pool: Executor, batch_size: int) -> None:
    """Of Collection-CAM, of a method on the slots' passes, and of one that goes by the host."""
    methods: list[Method] = [ccam.CollectionCAM(k_max=2), ccam.GradCAM(), ccam.CAM()]
    images = noise(5, 3, 16, 24)
    calls = tuple(Call(images, TARGETS, method) for method in methods for _ in range(3))
    job = Job(bundle, calls, batch_size=batch_size)
    for whole, found, (first, last) in pool.submit(explained, job).result():
        assert (found.saliency == whole.saliency).all()
        assert found.targets.tolist() == whole.targets.tolist()
        assert (found.logits == whole.logits).all()
        assert (first == whole.saliency[:1]).all()
        assert (last == whole.saliency[2:]).all()
        with pytest.raises(ImageError, match="the images were in a GPU's memory for the time"):
            found.picture()


def refused(job: Job) -> list[str]:
    lines = []
    with opened(job) as (explainer, devices, _):
        held = set(devices[0].blocks)
        small = parts_of(devices[0], noise(1, 3, 16, 16), [(1, True)])
        good = parts_of(devices[0], noise(1, 3, 16, 24), [(1, True)])
        cases: list[tuple[ImageParts, int | ccam.Top]] = [(small, 0), (good, ccam.Top(2))]
        for images, target in cases:
            try:
                explainer.explain_parts(images, target)
            except (ImageError, TargetError) as error:
                lines.append(str(error))
        for address in set(devices[0].blocks) - held:
            devices[0].free(address)
    return lines


@pytest.mark.slow
def test_parts_that_cannot_be_explained(bundle: Path, pool: Executor) -> None:
    lines = pool.submit(refused, Job(bundle, ())).result()
    assert lines == [
        "images are [1, 3, 16, 16]; the bundle takes [B, 3, 16, 24]",
        "an image in parts has several targets; give it one class",
    ]


def test_parts_need_a_gpu(tiny_bundle: Path) -> None:
    parts = ImageParts((ImagePart(np.zeros((1, 3, 32, 48), np.float32)),))
    with (
        ccam.load(tiny_bundle) as explainer,
        pytest.raises(OptionError, match="in a GPU's memory, and onnxruntime-cpu is not"),
    ):
        explainer.explain_parts(parts)
