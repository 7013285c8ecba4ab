"""Score-CAM and RISE on a device, in Numba's simulator, against the CPU's.

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
from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.methods import RISE, Method, ScoreCAM
from ccam_deploy.targets import Top
from tests.bundles import activated
from tests.engines.cuda.host_device import Call, Job
from tests.helpers import noise
from tests.methods.cuda.recorded import Run, accumulated, assert_close_in_half, assert_same
from tests.sweeps import nightly_but

pytestmark = pytest.mark.slow

FEW = RISE(masks=7, cells=3, p=0.4, seed=4)


def rows_of(bundle: Path, images: Floats, method: ScoreCAM | RISE) -> int:
    """How many masked forwards some images need; channels that are flat have none."""
    if isinstance(method, RISE):
        return method.masks * len(images)
    with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
        features = explainer.networks.backbone(images).features[-1]
    return int(np.count_nonzero(np.ptp(features, axis=(2, 3))))


METHODS: dict[str, Method] = {
    "increase": ScoreCAM(),
    "probability": ScoreCAM(weights="probability"),
    "softmax": ScoreCAM(weights="softmax"),
    "shallow": ScoreCAM(layer="relu1"),
    "few channels": ScoreCAM(channels=3),
    "rise": FEW,
    "logit": RISE(masks=5, cells=2, seed=1, score="logit"),
}

LAUNCHED = [
    pytest.param(ScoreCAM(), False, id="score-cam"),
    pytest.param(FEW, True, id="rise, replayed"),
    pytest.param(ScoreCAM(), True, id="score-cam, replayed", marks=pytest.mark.nightly),
    pytest.param(FEW, False, id="rise", marks=pytest.mark.nightly),
]
"""A method, and whether the engines replay themselves."""


@pytest.mark.parametrize(
    "name", nightly_but(["increase", "softmax", "few channels", "rise"], METHODS)
)
def test_matches_cpu(bundle: Path, device: Run, name: str) -> None:
    """One image; several with several classes each; ranks, one of which is also named."""
    method, images = METHODS[name], noise(3, 3, 16, 24)
    calls = (
        Call(images[:1], None, method),
        Call(images, [[3, 1], 2, [Top(2), 0]], method),
        Call(images[:2], [[Top(2), 0, 1, 2, 3, 4], 1], method),
    )
    recorded = device(Job(bundle, calls))
    assert recorded.report.notes == ()
    with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
        for call, got in zip(calls, recorded.report.results, strict=True):
            expected = explainer.explain(call.images, call.targets, method=call.method)
            assert_same(got, expected, 1e-5)
            assert got.settings["options"] == expected.settings["options"]


@pytest.mark.parametrize("activation", nightly_but(["sigmoid"], ["sigmoid", "none"]))
@pytest.mark.parametrize("name", ["probability", "rise"])
def test_other_activations_match_the_cpu(
    bundle: Path, tmp_path: Path, device: Run, name: str, activation: Activation
) -> None:
    folder = activated(bundle, tmp_path / "copy", activation)
    call = Call(noise(1, 3, 16, 24), [[0, 3]], METHODS[name])
    got = device(Job(folder, (call,))).report.results[0]
    with ccam.load(folder, backend="onnxruntime-cpu") as explainer:
        expected = explainer.explain(call.images, call.targets, method=call.method)
    assert_same(got, expected, 1e-5)


@pytest.mark.parametrize("name", ["increase", "rise"])
def test_half_precision_is_close_to_cpu(bundle: Path, device: Run, name: str) -> None:
    assert_close_in_half(bundle, device, METHODS[name])


@pytest.mark.parametrize(("method", "replays_itself"), LAUNCHED)
def test_the_classifier_sees_one_shape_at_one_place(
    bundle: Path, device: Run, method: ScoreCAM | RISE, replays_itself: bool
) -> None:
    """Whatever the numbers of images, of classes and of masks; and no memory is allocated."""
    images = noise(3, 3, 16, 24)
    shown = ((images[:1], None), (images, None), (images[:2], [[0, 1, 2], 4]))
    calls = tuple(Call(part, targets, method) for part, targets in shown)
    recorded = device(Job(bundle, calls, masks=5, replays_itself=replays_itself))
    chunk = 4  # of 7 or 8 rows in two parts
    (binding,) = recorded.bound
    shapes = {name: shape for name, _, shape in binding}
    assert shapes == {
        "images": (4, 3, 16, 24),
        "masks": (chunk, 1, 16, 24),
        "owner": (chunk,),
        "logits": (chunk, 5),
    }
    rows = [rows_of(bundle, part, method) for part, _ in shown]
    assert recorded.rows("classifier") == [chunk] * sum(-(-count // chunk) for count in rows)
    assert recorded.rows("backbone") == [1, 4, 4]
    assert len(set(recorded.report.allocations[1:])) == 1


@pytest.mark.parametrize(("method", "replays_itself"), LAUNCHED)
def test_no_call_after_the_warm_up_prepares_anything(
    bundle: Path, device: Run, method: Method, replays_itself: bool
) -> None:
    """No memory is allocated, and neither engines nor kernels are prepared for new sizes."""
    images = noise(3, 3, 16, 24)
    calls = Call(images[:1], None, method), Call(images, [[0, 1, 2], 4, Top(2)], method)
    job = Job(bundle, calls, masks=4, replays_itself=replays_itself)
    warm = device(replace(job, warm_up=3)).report
    for counts in (warm.allocations, warm.bound, warm.captures):
        assert len(set(counts)) == 1
    assert warm.captured > 0
    assert warm.progress == ["one image", "3 images"]
    for got, expected in zip(warm.results, device(job).report.results, strict=True):
        assert_same(got, expected, 0)


@pytest.mark.parametrize("method", [ScoreCAM(), FEW], ids=["score-cam", "rise"])
def test_chunks_padding_and_company_change_no_bit(
    bundle: Path, device: Run, method: Method
) -> None:
    images = noise(2, 3, 16, 24)
    both = Call(images, [[2, 0], 1], method)
    alone = tuple(Call(images[i : i + 1], both.targets[i : i + 1], method) for i in (0, 1))
    whole = device(Job(bundle, (both, *alone))).report.results
    for masks in (1, 3, 5):
        split = device(Job(bundle, (both, *alone), masks=masks, batch_size=2)).report.results
        for got, expected in zip(split, whole, strict=True):
            assert_same(got, expected, 0)
    for pair, (result, place) in enumerate(((1, 0), (1, 1), (2, 0))):
        got = whole[result]
        assert got.raw_saliency[place].tobytes() == whole[0].raw_saliency[pair].tobytes()
        assert got.weights[place].tobytes() == whole[0].weights[pair].tobytes()


@pytest.mark.parametrize(
    "method", [pytest.param(ScoreCAM(), marks=pytest.mark.nightly), FEW], ids=["score-cam", "rise"]
)
def test_cuda_graphs_give_the_same_bits(bundle: Path, device: Run, method: Method) -> None:
    """Each piece of work is captured once, and one graph serves all chunks of all calls."""
    images = noise(3, 3, 16, 24)
    one, more = Call(images[:1], None, method), Call(images[1:], [[1, 2], 3], method)
    calls = one, more, one, more, one
    recorded = device(Job(bundle, calls, masks=4))
    plain = device(Job(bundle, calls, masks=4, cuda_graphs=False))
    assert (plain.report.captured, plain.report.replayed) == (0, 0)
    pieces = "backbone of one", "backbone of more", "chunk", "combine"
    assert recorded.report.captured == len(pieces)
    launches = [len(recorded.rows(graph)) for graph in ("backbone", "classifier")]
    assert launches == [len(plain.rows(graph)) for graph in ("backbone", "classifier")]
    # Each piece was launched once before it was captured.
    assert recorded.report.replayed == sum(launches) + len(calls) - len(pieces)
    for got, expected in zip(recorded.report.results, plain.report.results, strict=True):
        assert_same(got, expected, 0)
    assert {"backbone", "forwards", "combine"} <= set(recorded.report.results[-1].timings)
    assert {"masks", "classifier"} <= set(plain.report.results[-1].timings)


def test_graphs_that_cannot_be_captured_are_noted_once(bundle: Path, device: Run) -> None:
    call = Call(noise(1, 3, 16, 24), None, FEW)
    report = device(Job(bundle, (call, call, call), captures=False)).report
    assert report.notes == ("a CUDA graph was not captured: this device captures nothing",)
    assert_same(report.results[2], report.results[0], 0)


def test_grids_that_come_in_pieces_are_the_same(bundle: Path, device: Run) -> None:
    """Grids of two masks at a time; in every call they are drawn anew."""
    call = Call(noise(2, 3, 16, 24), [[2, 0], 1], FEW)
    expected = device(Job(bundle, (call,), masks=3)).report.results[0]
    recorded = device(Job(bundle, (call, call), masks=3), 2 * FEW.cells**2 + 1)
    for got in recorded.report.results:
        assert_same(got, expected, 0)


def test_flat_channels_have_no_forward(bundle: Path, device: Run) -> None:
    """A black picture makes flat maps in the first layer."""
    call = Call(np.zeros((1, 3, 16, 24), np.float32), 1, ScoreCAM("relu1", "softmax"))
    recorded = device(Job(bundle, (call, call)))
    assert not recorded.rows("classifier")
    for result in recorded.report.results:
        assert not result.raw_saliency.any()
        assert not np.any(result.weights)


@pytest.mark.parametrize("name", ["softmax", "rise"])
def test_results_do_not_depend_on_the_threads(bundle: Path, device: Run, name: str) -> None:
    call = Call(noise(1, 3, 16, 24), [[1, 2]], METHODS[name])
    few, many = (device(Job(bundle, (call,)), threads=n).report.results[0] for n in (32, 96))
    assert_same(many, few, 1e-7)


def test_rows_that_an_earlier_call_left_are_not_added(pool: Executor) -> None:
    """The scores of padding, and of other images' rows, may be anything."""
    masks = np.abs(noise(4, 40))
    scores = np.array([[0.5, np.nan, 2, np.nan], [np.nan, 3, np.nan, np.inf]], np.float32)
    owner, item = [0, 1, 0, 0], [0, 0, 1, -1]
    found = pool.submit(accumulated, scores, masks, owner, item).result()
    expected = np.stack([0.5 * masks[0] + 2 * masks[2], 3 * masks[1]])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_values_that_overflow_are_refused(bundle: Path, device: Run) -> None:
    huge = np.full((1, 3, 16, 24), 1e5, np.float32)
    for method in (ScoreCAM(), FEW):
        with pytest.raises(BackendError, match="NaN or infinite"):
            device(Job(bundle, (Call(huge, 0, method),), "fp16"))


def test_options_that_do_not_suit_are_refused(bundle: Path, device: Run) -> None:
    images = noise(1, 3, 16, 24)
    with pytest.raises(OptionError, match='layer "relu9" is not in the bundle; it has relu1'):
        device(Job(bundle, (Call(images, 0, ScoreCAM(layer="relu9")),)))
    with pytest.raises(OptionError, match="cells is 17; an input of 16x24 takes 16"):
        device(Job(bundle, (Call(images, 0, RISE(masks=2, cells=17)),)))


def test_masks_of_a_file_run_through_host_arrays(bundle: Path, device: Run, tmp_path: Path) -> None:
    masks = np.abs(noise(3, 16, 24)).clip(0, 1)
    np.save(tmp_path / "masks.npy", masks)
    call = Call(noise(1, 3, 16, 24), 2, RISE(file=str(tmp_path / "masks.npy")))
    recorded = device(Job(bundle, (call,)))
    assert not recorded.rows("classifier")
    with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
        expected = explainer.explain(call.images, 2, method=call.method)
    assert_same(recorded.report.results[0], expected, 0)
