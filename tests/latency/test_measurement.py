"""The arithmetic of a latency measurement, on an explainer that takes the time it is told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

import ccam_deploy as ccam
from ccam_deploy.engines.cuda.slots import Slots
from ccam_deploy.errors import OptionError
from ccam_deploy.latency import measurement
from ccam_deploy.latency.cases import Case, floor_call, make_cases
from ccam_deploy.latency.measurement import measure_latency
from ccam_deploy.latency.report import WIDE, BatchLatency, ClockRange, doubts
from ccam_deploy.latency.settings import Deadlines, LatencySettings
from ccam_deploy.latency.timing import summarise
from tests.clock import FakeClock
from tests.helpers import example_pictures

MASKS = 4
FLAT = 1
CLASSES = 5
SLOWER_LAUNCHED = 1.5
ONE_ROUND = LatencySettings(duration=1e-9, warmup=0)


class FakeExplainer:
    """Explains pictures and arrays on a clock of its own; counts what its engines are given.

    Preprocessing takes 2 ms an image, the backbone 3, the gradient 5, and a masked forward 7 plus
    the image's brightness; what lies between them 10 ms a call.
    """

    batch_size = 6

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.networks = self
        self.backend = "onnxruntime-cpu"
        self.slots: Slots | None = None
        self.on_device: Any = None
        self.forwards: list[int] = []

    def preprocess(self, pictures: list[Image.Image]) -> tuple[Any, tuple[()]]:
        self.clock.time += 0.002 * len(pictures)
        values = [picture.getpixel((0, 0)) for picture in pictures]
        return np.array(values, np.float32)[:, None, None, None], ()

    def explain(self, images: Any) -> Any:
        started = self.clock.time
        timings: dict[str, float] = {}
        if not isinstance(images, np.ndarray):
            images, _ = self.preprocess(images)
            timings["preprocess"] = self.clock.time - started
        count = len(images)
        self.clock.time += 0.010 + 0.008 * count
        timings["passes"] = 0.008 * count
        before = self.clock.time
        self.masked_logits(images, np.ones((MASKS * count, 2, 2)), np.arange(count).repeat(MASKS))
        timings["classifier"] = self.clock.time - before
        masks = np.ones((MASKS + FLAT, 2, 2), np.float32)
        masks[0] = 0
        return SimpleNamespace(
            masks=[masks] * count,
            targets=np.full(count, 3),
            logits=np.zeros((count, CLASSES), np.float32),
            layers=[SimpleNamespace(name="deep", count=np.full(count, MASKS + FLAT))],
            timings=timings,
        )

    def warm_up(self, batch: int, progress: Callable[[str], None]) -> None:
        """Takes longer than any deadline."""
        progress(f"{batch} images")
        self.clock.time += 1000

    def backbone(self, images: Any) -> Any:
        self.clock.time += 0.003 * len(images)
        return images

    def gradients(self, activations: Any, one_hot: Any) -> None:
        assert one_hot.sum(axis=1).tolist() == [1] * len(activations)
        assert one_hot.argmax(axis=1).tolist() == [3] * len(activations)
        self.clock.time += 0.005 * len(activations)

    def masked_logits(self, images: Any, masks: Any, owner: Any) -> None:
        assert len(masks) == len(owner)
        assert masks.any(axis=(1, 2)).all()
        self.forwards.append(len(masks))
        self.clock.time += 0.007 * len(masks) + 0.001 * float(images[owner].sum())


def picture(brightness: int) -> Image.Image:
    return Image.new("L", (2, 2), brightness)


def measured(
    pictures: list[Image.Image], settings: LatencySettings, **peers: Any
) -> list[BatchLatency]:
    clock = FakeClock()
    explainer = cast(ccam.Explainer, FakeExplainer(clock))
    return measure_latency(explainer, pictures, settings, peers, now=clock)


def test_figures_by_hand() -> None:
    """One image: 10 + 3 + 5 + 4·7 = 46 ms from an array, 48 from an image, 36 of them the floor."""
    (report,) = measured([picture(0)], ONE_ROUND)
    assert report.latency_ms.calls == 3
    assert report.latency_ms.median == report.from_images_ms.median == pytest.approx(48)
    assert report.from_array_ms.median == pytest.approx(46)
    assert report.floor_ms.median == pytest.approx(36)
    assert report.overhead == pytest.approx(46 / 36, abs=1e-4)
    assert report.explanations_per_second == round(1 / 0.048, 3)
    assert report.masked_forwards_per_second == round(MASKS / 0.048, 3)
    assert report.masks == [MASKS]
    assert report.collections == {"deep": [MASKS + FLAT]}
    assert report.stages_ms == pytest.approx(
        {"preprocess": 2, "passes": 8, "classifier": 28, "between": 10}
    )
    assert report.host_share == round(10 / 48, 4)
    assert report.samples_ms["latency"] == [48, 48, 48]
    assert (report.gpu, report.gpu_clock_mhz) == (None, None)
    assert (report.device_ms, report.device_launched_ms, report.host_ms) == (None, None, None)


def test_batches() -> None:
    one, four = measured([picture(0)], LatencySettings((1, 4), duration=1e-9, warmup=0))
    assert (one.batch, four.batch) == (1, 4)
    assert four.latency_ms.median == pytest.approx(10 + 4 * 38)
    assert four.explanations_per_second == round(4 / 0.162, 3)
    assert four.masks == [4 * MASKS]
    assert four.floor_ms.median == pytest.approx(4 * 36)


def test_duration_and_warmup() -> None:
    (report,) = measured([picture(0)], LatencySettings(duration=1.0, warmup=1.0))
    assert report.latency_ms.calls == 21  # of 48 ms; the last one starts before the second is over
    rounds = -(-1000 // (48 + 46 + 36))
    assert report.floor_ms.calls == report.from_array_ms.calls == rounds


def test_every_image_is_measured() -> None:
    """Images of 48 and 88 ms: the spread of the figures is theirs, not the machine's."""
    (report,) = measured([picture(0), picture(10)], ONE_ROUND)
    assert report.samples_ms["latency"] == [48, 88] * 3
    assert report.samples_ms["floor"] == [36, 76] * 3
    assert report.latency_ms.spread > WIDE
    assert max(report.spreads.values()) < 1e-6
    assert report.masks == [MASKS, MASKS]
    assert report.collections == {"deep": [MASKS + FLAT] * 2}


def test_the_last_batch_is_filled_up() -> None:
    explainer = cast(ccam.Explainer, FakeExplainer(FakeClock()))
    cases = make_cases(explainer, [picture(value) for value in (1, 2, 3)], 2)
    assert [case.images.ravel().tolist() for case in cases] == [[1, 2], [3, 1]]


def test_floor_of_many_images_is_cut_like_an_explanation() -> None:
    """With 4 masks an image and 6 at a time; of one image alone all go at once."""
    fake = FakeExplainer(FakeClock())
    explainer = cast(ccam.Explainer, fake)
    (case,) = make_cases(explainer, [picture(0)] * 4, 4)
    fake.forwards.clear()
    floor_call(explainer, case)()
    assert fake.forwards == [6, 6, 4]
    fake.batch_size = 3
    (case,) = make_cases(explainer, [picture(0)], 1)
    fake.forwards.clear()
    floor_call(explainer, case)()
    assert fake.forwards == [4]


def test_peers_are_compared_in_turn() -> None:
    clock = FakeClock()
    explainer = cast(ccam.Explainer, FakeExplainer(clock))

    def slow(case: Case) -> None:
        assert case.targets.tolist() == [3]
        clock.time += 0.092

    (report,) = measure_latency(explainer, [picture(0)], ONE_ROUND, {"slow": slow}, now=clock)
    assert report.compare["slow"].ratio == pytest.approx(2)
    assert report.compare["slow"].ms.median == pytest.approx(92)
    assert report.samples_ms["from_array_beside_slow"] == [46] * 3


@pytest.mark.parametrize("duration", [1.3, 1.5, 1.7, 1.9])
def test_peers_explain_the_same_images_in_the_same_turn(duration: float) -> None:
    """However many calls came before: images that take longer would make any ratio."""
    clock = FakeClock()
    fake = FakeExplainer(clock)

    def thrice(case: Case) -> None:
        started = clock.time
        fake.explain(case.images)
        clock.time += 2 * (clock.time - started)

    (report,) = measure_latency(
        cast(ccam.Explainer, fake),
        [picture(0), picture(10)],
        LatencySettings(duration=duration, warmup=0),
        {"thrice": thrice},
        now=clock,
    )
    assert report.compare["thrice"].ratio == pytest.approx(3)


def test_measured_calls_begin_with_the_first_images() -> None:
    """Spreads tell images apart by that, and a warm-up may end with any of them."""
    clock = FakeClock()
    explainer = cast(ccam.Explainer, FakeExplainer(clock))
    for warmup in (0.4, 0.45, 0.55, 0.7):
        settings = LatencySettings(duration=1e-9, warmup=warmup)
        (report,) = measure_latency(explainer, [picture(0), picture(10)], settings, now=clock)
        dark, bright = report.samples_ms["latency"][:2]
        assert dark < bright


def test_threads_share_the_explainer() -> None:
    """With the real clock: each of three threads makes its calls."""
    explainer = cast(ccam.Explainer, FakeExplainer(FakeClock()))
    settings = LatencySettings(concurrency=3, duration=1e-9, warmup=0)
    (report,) = measure_latency(explainer, [picture(0)], settings)
    assert report.concurrency == 3
    assert report.latency_ms.calls == 9


def test_on_a_gpu_stages_come_from_a_run_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed graph is one stage: it tells what the device took, the other run tells on what."""
    clock = FakeClock()
    replaying, plain = FakeExplainer(clock), FakeExplainer(clock)
    replaying.slots = cast(Slots, object())
    replaying.backend = "tensorrt"
    monkeypatch.setattr(measurement, "stage_by_stage", lambda explainer: plain)
    floors: list[Any] = []

    def passes(images: Any, options: object) -> Callable[[], None]:
        floors.append(images)
        return clock.taking([1] * 99)

    replaying.on_device = SimpleNamespace(passes=passes)
    one_stage, launched = replaying.explain, plain.explain

    def explain(images: Any) -> Any:
        result = one_stage(images)
        timings = result.timings
        on_device = (timings["passes"] + timings["classifier"]) / SLOWER_LAUNCHED
        result.timings = {"preprocess": 0.0, "explain": on_device}
        return result

    def in_pieces(images: Any) -> Any:
        result = launched(images)
        passes = result.timings.pop("passes")
        result.timings |= {"upload": passes / 4, "passes": passes / 2, "download": passes / 4}
        return result

    monkeypatch.setattr(replaying, "explain", explain)
    monkeypatch.setattr(plain, "explain", in_pieces)
    explainer = cast(ccam.Explainer, replaying)
    monkeypatch.setattr(measurement, "gpu_clocks", lambda: nullcontext([1980.0, 1755.0, 1900.0]))
    lines: list[str] = []
    (report,) = measure_latency(explainer, [picture(0)], ONE_ROUND, None, lines.append, clock)
    assert lines[:3] == ["preparing the GPU", "1 images", "batch 1: first explanations"]
    assert report.stages_ms == pytest.approx(
        {
            "preprocess": 2,
            "upload": 2,
            "passes": 4,
            "download": 2,
            "classifier": 28,
            "between": 10,
        }
    )
    # Calls of 46 ms on arrays, 2 ms less than on images: preprocessing is not the host's part.
    assert (report.device_ms, report.without_transfers_ms) == (24, 20)
    assert (report.device_launched_ms, report.host_ms) == (36, 22)
    assert report.host_share == round(22 / 46, 4)
    assert doubts([report], None)[-1] == (
        "batch 1: launched one by one the stages take 150% of the time that they take replayed, "
        "so they measure launches"
    )
    assert report.gpu_clock_mhz == ClockRange(1755, 1900, 1980)
    assert report.floor_ms.median == pytest.approx(1000)
    assert [images.shape for images in floors] == [(1, 1, 1, 1)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batches": (1, 0)}, "batch is [1, 0]; it must be at least 1"),
        ({"batches": ()}, "batch is []; it must be at least 1"),
        ({"batches": (2, 2)}, "batch is [2, 2]; give each size once"),
        ({"concurrency": 0}, "concurrency is 0; it must be 1 to 64"),
        ({"concurrency": 65}, "concurrency is 65; it must be 1 to 64"),
        ({"duration": 0.0}, "duration is 0; it must be above 0 seconds"),
        ({"duration": float("nan")}, "duration is nan; it must be above 0 seconds"),
        ({"duration": float("inf")}, "duration is inf; it must be above 0 seconds"),
        ({"warmup": -1.0}, "warmup is -1; it must be 0 seconds or more"),
    ],
)
def test_settings_that_cannot_be_measured(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        LatencySettings(**wrong)
    assert str(caught.value) == message


@pytest.mark.parametrize("count", [0, 65])
def test_too_few_or_many_images(count: int) -> None:
    explainer = cast(ccam.Explainer, FakeExplainer(FakeClock()))
    with pytest.raises(OptionError, match=f"there are {count} images; give 1 to 64"):
        make_cases(explainer, [picture(0)] * count, 1)


def doubts_of(load: float | None = 0.0, **changes: Any) -> list[str]:
    (report,) = measured([picture(0)], LatencySettings(duration=6.0, warmup=0))
    return doubts([replace(report, **changes)], load)


def test_a_steady_measurement_is_not_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert doubts_of() == doubts_of(2.0) == doubts_of(None) == []
    assert doubts_of(spreads={"latency": 0.1}) == []
    assert doubts_of(device_ms=1.1, device_launched_ms=1.3, host_ms=1.0) == []


def test_doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert doubts_of(2.5) == [
        "the machine was busy before: load average 2.5 on 4 cores; measure on an idle one"
    ]
    assert doubts_of(spreads={"latency": 0.2, "floor": 0.05, "torch": 0.11}) == [
        "batch 1: the middle half is wider than 10% of the median: latency 20%, torch 11%"
    ]
    assert doubts_of(device_ms=1.1, device_launched_ms=1.2, host_ms=1.5) == [
        "batch 1: the host takes 1.500 ms beside the device's 1.100 ms, "
        "so the host is what was measured"
    ]
    assert doubts_of(latency_ms=summarise([0.1] * 99 + [0.31])) == [
        "batch 1: the slowest call took over 3 times the median: latency 310 of 100 ms"
    ]
    assert doubts_of(latency_ms=summarise([0.1] * 99 + [0.3])) == []
    (short,) = measured([picture(0)], ONE_ROUND)
    assert doubts([short], None) == [
        "batch 1: p99 is of 3 calls, fewer than 100; give a longer --duration"
    ]


def slow_calls(monkeypatch: pytest.MonkeyPatch, seconds: float) -> tuple[ccam.Explainer, FakeClock]:
    """An explainer whose every explanation, and every run of the floor, takes some seconds."""
    clock = FakeClock()
    fake = FakeExplainer(clock)
    explain = fake.explain

    def slow(images: Any) -> Any:
        started = clock.time
        result = explain(images)
        clock.time = started + seconds
        return result

    def floor(explainer: object, case: object) -> Callable[[], None]:
        return clock.taking([seconds] * 999)

    monkeypatch.setattr(fake, "explain", slow)
    monkeypatch.setattr(measurement, "floor_call", floor)
    return cast(ccam.Explainer, fake), clock


@pytest.mark.parametrize("seconds", [0.5, 2.0, 9.0, 100.0])
@pytest.mark.parametrize("pictures", [1, 64])
def test_the_whole_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, seconds: float, pictures: int
) -> None:
    """But for the calls in hand: one for the masks, one or a round for each part and its warm-up.

    By hand, each batch size has 15 + (1 + 4) + 2 * 1 + 4 + 4 = 30 seconds.
    """
    explainer, clock = slow_calls(monkeypatch, seconds)

    def peer(case: Case) -> None:
        clock.time += seconds

    settings = LatencySettings((1, 2), duration=4.0, warmup=1.0)
    lines: list[str] = []
    begun = clock.time
    every = [picture(0)] * pictures
    reports = measure_latency(explainer, every, settings, {"peer": peer}, lines.append, clock)
    in_hand = 1 + 2 + 1 + 3 + 2
    assert clock.time - begun <= 2 * (30 + in_hand * seconds)
    assert Deadlines.of(settings, 1, 0.0).last == 30
    for report in reports:
        assert report.latency_ms.median == pytest.approx(1000 * seconds)
        assert report.compare["peer"].ratio == pytest.approx(1)
    if seconds == 100:
        said = "\n".join(doubts(reports, None, pictures))
        assert (
            "batch 1: there was no time for 3 turns of each batch of images with floor, pe" in said
        )
        limit = "there was time for 1 of 64 batches of images; give --limit"
        assert (limit in said) == any("there is time for 1 of 64" in line for line in lines)
        assert (limit in said) == (pictures == 64)


def test_each_part_is_told_as_soon_as_it_is_known() -> None:
    clock = FakeClock()
    explainer = cast(ccam.Explainer, FakeExplainer(clock))
    lines: list[tuple[float, str]] = []

    def peer(case: Case) -> None:
        clock.time += 0.092

    def tell(line: str) -> None:
        lines.append((clock.time, line))

    measure_latency(explainer, [picture(0)], ONE_ROUND, {"torch": peer}, tell, clock)
    assert [line for _, line in lines] == [
        "batch 1: first explanations",
        "batch 1: warming up for 0 s",
        "batch 1: 1 thread for 1e-09 s",
        "batch 1: latency 48 ms, slowest of 3 calls 48 ms",
        "batch 1: stages",
        "batch 1: preprocess 2, passes 8, classifier 28, between 10 ms; "
        "the host's share of a call 20.8%",
        "batch 1: from images, from array and floor in turn for 1e-09 s",
        "batch 1: floor 36 ms, overhead 1.278",
        "batch 1: from array and torch in turn for 1e-09 s",
        "batch 1: torch 92 ms, 2.00 times as long",
    ]
    moments = [moment for moment, _ in lines]
    assert moments[3] < moments[5] < moments[7] < moments[9]


def test_floor_runs_the_passes_of_an_explanation(digits: ccam.Explainer) -> None:
    """On real engines: the same masks give the same logits as the explanation weighed."""
    (case,) = make_cases(digits, example_pictures()[:2], 2)
    result = digits.explain(example_pictures()[:2])
    assert case.targets.tolist() == result.targets.tolist()
    scores = digits.networks.masked_logits(case.images, case.masks, case.owner)
    for image in range(2):
        own_scores = scores[case.owner == image, case.targets[image]]
        counted = result.weights[image] > 0
        base = digits.bundle.precision("fp32").baseline_logits[case.targets[image]]
        np.testing.assert_allclose(own_scores - base, result.mic[image][counted], atol=1e-4)
    floor_call(digits, case)()
