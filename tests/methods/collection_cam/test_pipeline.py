"""The whole of Collection-CAM on a device, in Numba's simulator, against the CPU's.

The engines are ONNX Runtime's on both sides; the simulator is slow, so the network is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba.cuda")

import ccam_deploy as ccam
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.errors import BackendError
from ccam_deploy.methods import CollectionCAM
from ccam_deploy.methods.collection_cam.sizes import padded
from ccam_deploy.targets import Top
from tests.bundles import Bundles, activated
from tests.engines.cuda.host_device import (
    Call,
    Job,
    Report,
    after_an_interrupt,
    k_max_refused,
    pinned_results,
    run,
)
from tests.helpers import noise
from tests.kernels.simulated_device import simulator
from tests.sweeps import nightly_but

pytestmark = pytest.mark.slow

Run = Callable[[Job], Report]
OPTIONS = CollectionCAM(k_max=3)


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Path:
    return bundles.get("pocket")


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    with simulator() as pool:
        yield pool


@pytest.fixture(scope="module")
def device(process: Executor) -> Run:
    return lambda job: process.submit(run, job).result()


def assert_same(actual: ccam.Explanation, expected: ccam.Explanation, tolerance: float) -> None:
    assert actual.targets.tolist() == expected.targets.tolist()
    assert actual.image_index.tolist() == expected.image_index.tolist()
    np.testing.assert_allclose(actual.logits, expected.logits, atol=tolerance)
    for layer, other in zip(actual.layers, expected.layers, strict=True):
        assert layer.name == other.name
        assert layer.labels.tolist() == other.labels.tolist()
        assert layer.count.tolist() == other.count.tolist()
        np.testing.assert_allclose(layer.quality, other.quality, atol=1e-5)
    for pair in range(len(expected)):
        np.testing.assert_allclose(actual.masks[pair], expected.masks[pair], atol=1e-5)
        np.testing.assert_allclose(actual.weights[pair], expected.weights[pair], atol=tolerance)
        np.testing.assert_allclose(actual.mic[pair], expected.mic[pair], atol=10 * tolerance)
    np.testing.assert_allclose(actual.raw_saliency, expected.raw_saliency, atol=tolerance)
    np.testing.assert_allclose(actual.saliency, expected.saliency, atol=10 * tolerance)


def test_matches_cpu(bundle: Path, device: Run) -> None:
    """Several images; several classes an image; ranks; both scores; chosen layers."""
    images = noise(3, 3, 16, 24)
    calls = (
        Call(images, None, OPTIONS),
        Call(images[:2], [[3, 1], 2], OPTIONS),
        Call(images[:1], Top(2), CollectionCAM(k_max=2, score="probability", theta=0.4)),
        Call(images[:1], 4, CollectionCAM(k_max=3, standardise=True, layers=("relu2",))),
    )
    report = device(Job(bundle, calls))
    with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
        for call, got in zip(calls, report.results, strict=True):
            expected = explainer.explain(call.images, call.targets, method=call.method)
            assert_same(got, expected, 1e-5)
            assert set(expected.timings) - {"preprocess"} <= set(got.timings) - {"upload"}
    assert report.notes == ()


@pytest.mark.parametrize("activation", nightly_but(["sigmoid"], ["sigmoid", "none"]))
def test_other_activations_match_the_cpu(
    bundle: Path, tmp_path: Path, device: Run, activation: Activation
) -> None:
    folder = activated(bundle, tmp_path / "copy", activation)
    options = CollectionCAM(k_max=2, score="probability")
    call = Call(noise(1, 3, 16, 24), [[0, 3]], options)
    got = device(Job(folder, (call,))).results[0]
    with ccam.load(folder, backend="onnxruntime-cpu") as explainer:
        assert_same(got, explainer.explain(call.images, call.targets, method=options), 1e-5)


def test_a_budget_is_kept_on_the_device(bundle: Path, device: Run) -> None:
    """Its calls are measured there; an hour is enough for all masks."""
    images = noise(1, 3, 16, 24)
    options = CollectionCAM(k_max=2)
    got = device(Job(bundle, (Call(images, None, options, budget_ms=3.6e6),))).results[0]
    with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
        assert_same(got, explainer.explain(images, method=options), 1e-5)
    told = got.settings["budget"]
    assert (told["ms"], told["k_max"], told["k_max_asked"]) == (3.6e6, 2, 2)
    assert 0 < told["predicted_ms"] < 3.6e6


def test_half_precision_matches_cpu(bundle: Path, device: Run) -> None:
    """The gradients are scaled, the images cast, and the masks written in half precision."""
    call = Call(noise(2, 3, 16, 24), None, OPTIONS)
    got = device(Job(bundle, (call,), "fp16")).results[0]
    with ccam.load(bundle, backend="onnxruntime-cpu", precision="fp16") as explainer:
        expected = explainer.explain(call.images, method=OPTIONS)
    assert got.targets.tolist() == expected.targets.tolist()
    for layer, other in zip(got.layers, expected.layers, strict=True):
        assert layer.labels.tolist() == other.labels.tolist()
    np.testing.assert_allclose(got.raw_saliency, expected.raw_saliency, atol=5e-3)


def test_tf32_changes_nothing_between_the_graphs(bundle: Path, device: Run) -> None:
    """The kernels compute in float32; this device's engines do too."""
    call = Call(noise(2, 3, 16, 24), None, OPTIONS)
    rounded, exact = (
        device(Job(bundle, (call,), precision)).results[0] for precision in ("tf32", "fp32")
    )
    assert rounded.settings == {**exact.settings, "precision": "tf32"}
    assert rounded.raw_saliency.tobytes() == exact.raw_saliency.tobytes()


@pytest.mark.parametrize("precision", nightly_but(["fp32"], ["fp32", "fp16"]))
def test_small_batches_and_chunks_give_the_same(bundle: Path, device: Run, precision: str) -> None:
    """More images and pairs than a run takes, and masks that start where no engine reads."""
    call = Call(noise(3, 3, 16, 24), [[0, 1, 2], 3, [4, 0]], CollectionCAM(k_max=2))
    whole, split = (
        device(Job(bundle, (call,), precision, batch_size, masks)).results[0]
        for batch_size, masks in ((8, 64), (2, 3))
    )
    assert_same(split, whole, 1e-6 if precision == "fp32" else 1e-3)


def test_a_class_named_and_among_the_best_is_explained_once(bundle: Path, device: Run) -> None:
    """Ranks are looked up on the device, so a class that comes twice is dropped afterwards."""
    images = noise(2, 3, 16, 24)
    call = Call(images, [[Top(2), 0, 1, 2, 3, 4], Top(1)], OPTIONS)
    got = device(Job(bundle, (call,))).results[0]
    with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
        expected = explainer.explain(images, call.targets, method=OPTIONS)
    assert len(got) == len(got.masks) == len(got.weights) == 6
    assert_same(got, expected, 1e-5)


def test_cuda_graphs_give_the_same_bits(bundle: Path, device: Run) -> None:
    images, options = noise(2, 3, 16, 24), CollectionCAM(k_max=2)
    one, two = Call(images[:1], None, options), Call(images[1:], 2, options)
    several = Call(images[:1], [[2, 0]], options)
    calls = (one, one, one, two, several, several)
    report = device(Job(bundle, calls))
    plain = device(Job(bundle, calls, cuda_graphs=False))
    assert (plain.captured, plain.replayed) == (0, 0)
    assert report.captured >= 4
    assert report.replayed > report.captured
    for got, expected in zip(report.results, plain.results, strict=True):
        assert_same(got, expected, 0)
    assert {"explain", "classifier", "combine"} <= set(report.results[2].timings)


def test_stages_can_be_timed_while_engines_replay(bundle: Path, device: Run) -> None:
    """Engines that plan anew in other runs are bound once, as they are under load."""
    call = Call(noise(2, 3, 16, 24), None, CollectionCAM(k_max=2))
    job = Job(bundle, (call, call, call), replays_itself=True)
    report, staged = device(job), device(replace(job, cuda_graphs="engines"))
    assert report.captured and not staged.captured
    assert staged.bound == report.bound
    assert {"partition", "masks", "classifier"} <= set(staged.results[2].timings)
    assert_same(staged.results[2], report.results[2], 0)


def test_an_interrupt_leaves_nothing_to_the_next_call(bundle: Path, process: Executor) -> None:
    call = Call(noise(2, 3, 16, 24), None, CollectionCAM(k_max=2, theta=0.8))
    job = Job(bundle, (call,), cuda_graphs=False)
    before, after = process.submit(after_an_interrupt, job).result()
    assert_same(after, before, 0)


def test_a_lower_k_max_needs_no_new_memory(bundle: Path, device: Run) -> None:
    """A budget lowers it; results are those of a pipeline that was made for it.

    The last calls are replayed from the graph that the first ones captured.
    """
    images = noise(1, 3, 16, 24)
    ranges = [(2, 3), (2, 3), (1, 2), (2, 3)]
    calls = [Call(images, None, CollectionCAM(k_min=low, k_max=high)) for low, high in ranges]
    report = device(Job(bundle, tuple(calls)))
    assert len(set(report.allocations[1:])) == 1
    assert report.replayed >= 4
    assert_same(report.results[2], device(Job(bundle, (calls[2],))).results[0], 1e-6)
    assert_same(report.results[3], report.results[0], 0)


def test_a_k_max_that_is_refused_does_no_harm(bundle: Path, process: Executor) -> None:
    images = noise(1, 3, 16, 24)
    calls = tuple(Call(images, None, CollectionCAM(k_max=most)) for most in (2, 40, 2))
    told = process.submit(k_max_refused, Job(bundle, calls)).result()
    assert told == ["", "k_max is 40; the GPU kernels take at most 32", ""]


def test_graphs_that_cannot_be_captured_are_noted_once(bundle: Path, device: Run) -> None:
    call = Call(noise(1, 3, 16, 24), None, CollectionCAM(k_max=2))
    report = device(Job(bundle, (call, call, call), captures=False))
    assert report.notes == ("a CUDA graph was not captured: this device captures nothing",)
    assert_same(report.results[2], report.results[0], 0)


def test_values_that_overflow_are_refused(bundle: Path, device: Run) -> None:
    huge = Call(np.full((1, 3, 16, 24), 1e5, np.float32), 0, OPTIONS)
    with pytest.raises(BackendError, match="NaN or infinite"):
        device(Job(bundle, (huge,), "fp16"))


def test_passes_are_those_of_an_explanation(bundle: Path, device: Run) -> None:
    """Backbone, gradient and classifier on the same rows, in chunks as the engine takes them."""
    call = Call(noise(3, 3, 16, 24), None, CollectionCAM(k_max=2))
    report = device(Job(bundle, (call,), batch_size=2, masks=5, cuda_graphs=False, passes=2))
    masks = [len(weights) for weights in report.results[0].weights]
    expected: list[tuple[str, int]] = []
    for images, count in ((2, masks[0] + masks[1]), (1, masks[2])):
        expected += [("backbone", images), ("gradient", images)]
        expected += [("classifier", rows) for rows in chunks_of(count, 5)]
    assert report.passes == expected * 2


def chunks_of(masks: int, size: int) -> list[int]:
    """How many rows the classifier is given at a time, where it knows one size."""
    return [size] * -(-masks // size)


@pytest.mark.parametrize("replays_itself", nightly_but([False], [False, True]))
def test_a_warm_explainer_prepares_nothing_in_a_call(
    bundle: Path, device: Run, replays_itself: bool
) -> None:
    """No memory, no new binding and no other number of rows, whatever the calls' sizes are."""
    images = noise(3, 3, 16, 24)
    calls = (
        Call(images[:1], None, OPTIONS),
        Call(images, None, OPTIONS),
        Call(images[:1], [[1, 3]], OPTIONS),
        Call(images[1:], [[0, 1], [4, 2]], OPTIONS),
    )
    job = Job(bundle, calls, batch_size=2, masks=16)
    cold = device(job)
    assert cold.bound[0] < cold.bound[1]
    warm = device(replace(job, replays_itself=replays_itself, warm_up=2))
    assert len(set(warm.allocations)) == len(set(warm.bound)) == 1
    assert warm.progress[0] == "one image"
    assert {"2 images", "4 masks", "6 masks", "12 masks"} <= set(warm.progress)
    for launches in warm.launches:
        assert {rows for name, rows in launches if name != "classifier"} <= {1, 2}
        assert {rows for name, rows in launches if name == "classifier"} <= {4, 6, 12}
    for result, expected in zip(warm.results, cold.results, strict=True):
        assert_same(result, expected, 0)


def test_results_are_copied_only_where_users_keep_many(bundle: Path, process: Executor) -> None:
    """Two runs' results may be held as they came; nothing is pinned for those that come after."""
    images = noise(4, 3, 16, 24)
    calls = tuple(Call(images[i : i + 1], None, CollectionCAM(k_max=2)) for i in range(4))
    kept, dropped = (
        process.submit(pinned_results, Job(bundle, calls), kept=kept).result()
        for kept in (True, False)
    )
    assert [shared for shared, _ in dropped] == [True] * 4
    assert [shared for shared, _ in kept] == [True, True, False, False]
    assert len({pinned for _, pinned in (*kept, *dropped)}) == 1


def test_the_classifier_begins_before_the_masks_are_counted(bundle: Path, device: Run) -> None:
    """With as many as last time; what was too few is added, and what was too many is nobody's."""
    images = noise(6, 3, 16, 24, seed=3)
    calls = [Call(images[i : i + 1], None, CollectionCAM(k_max=3)) for i in range(6)]
    calls[3] = Call(images[3:4], None, CollectionCAM(k_min=1, k_max=1))
    report = device(Job(bundle, tuple(calls)))
    counts = [len(result.weights[0]) for result in report.results]
    before = 0
    for launches, count in zip(report.launches, counts, strict=True):
        rows = [rows for name, rows in launches if name == "classifier"]
        assert rows[: before > 0] == [padded(before, (4, 6))] * (before > 0)
        assert count <= sum(rows) < max(count, before) + 4
        before = count
    assert min(counts) < max(counts)
    with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
        for call, result in zip(calls, report.results, strict=True):
            assert_same(result, explainer.explain(call.images, method=call.method), 1e-5)


def test_engines_that_replay_themselves_are_launched_between_the_kernels(
    bundle: Path, device: Run
) -> None:
    """What is captured then are the kernels alone; the bits are the same."""
    images = noise(2, 3, 16, 24)
    call = Call(images, None, CollectionCAM(k_max=2))
    whole, parts = (
        device(Job(bundle, (call,) * 4, replays_itself=replays)) for replays in (False, True)
    )
    assert parts.notes == whole.notes == ()
    assert parts.captured > 2
    assert parts.replayed > parts.captured
    for launches in parts.launches:
        assert [name for name, _ in launches][:2] == ["backbone", "gradient"]
    for result, expected in zip(parts.results, whole.results, strict=True):
        assert_same(result, expected, 0)
