"""The benchmarks of serving: what is measured in turn, tables, memory, and what is left."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

import ccam_deploy as ccam
from bench import bench_serving as bench
from bench import soak_serving as soak
from bench.serving import memory_of
from ccam_deploy.errors import OptionError
from ccam_deploy.serve.client import Answer


class Near:
    """A client that has the explainer at hand, as far as the benchmarks ask."""

    def __init__(self, explainer: ccam.Explainer, wrong: float = 0.0) -> None:
        self._explainer = explainer
        self._wrong = wrong
        self.calls = 0

    def explain(self, images: Any, targets: Any = None) -> Answer:
        self.calls += 1
        if not np.isfinite(images).all():
            raise OptionError("not finite")
        wanted = None if targets is None else [ccam.Top() if t < 0 else t for t in targets]
        own = self._explainer.explain(images, wanted)
        scores = np.zeros((len(images), 1), np.float32)
        return Answer(own.saliency + np.float32(self._wrong), scores, own.targets.astype(np.int32))

    def explain_file(self, image: bytes) -> None:
        assert image.startswith(b"\xff\xd8")


@pytest.mark.slow
def test_requests_are_timed_in_turn_with_the_explainer(tiny_bundle: Path) -> None:
    with ccam.load(tiny_bundle) as explainer:
        clients: dict[str, Any] = {"http": Near(explainer), "grpc": Near(explainer)}
        images = np.zeros((1, *explainer.bundle.manifest.input), np.float32)
        figures = bench.measure_overhead(explainer, clients, images, rounds=3)
    assert list(figures) == ["alone", "http", "grpc"]
    assert [client.calls for client in clients.values()] == [5, 5]  # with two rounds of warm-up
    assert all(each["ms"]["calls"] == 3 for each in figures.values())
    assert figures["alone"]["ratio"] == 1
    json.dumps(figures)


def test_clients_ask_at_the_same_time() -> None:
    """Each by a connection of its own, which is closed at the end."""
    together = threading.Barrier(3)
    closed = []

    class Meeting:
        met = False

        def __enter__(self) -> Meeting:
            return self

        def __exit__(self, *_: object) -> None:
            closed.append(self)

        def explain(self, images: Any) -> None:
            if not self.met:
                together.wait(10)
            self.met = True

    meeting: Any = Meeting
    figures = bench.measure_clients(meeting, np.zeros(1, np.float32), 3, 0.01)
    assert figures["clients"] == 3
    assert figures["ms"]["calls"] >= 3
    assert len(set(closed)) == 3


def test_tables() -> None:
    ms = {"median": 50.0, "p99": 60.0, "spread": 0.01}
    result = {
        "command": "python -m bench.bench_serving",
        "conditions": {"processor": "A processor", "cores": 2},
        "network": "resnet18, random weights",
        "results": {
            "overhead": {"alone": {"ms": ms, "ratio": 1.0}, "http": {"ms": ms, "ratio": 1.021}},
            "alone": [{"rate": 18.0, "ms": ms}, {"rate": 22.0, "ms": ms}],
            "load": [{"clients": 4, "rate": 25.0, "ms": ms}],
        },
    }
    text = bench.markdown(result)
    assert "|http|50.0|60.0|1%|1.021|" in text.replace(" ", "")
    assert "|theexplaineralone|20.00|50.0|60.0|1.000|" in text.replace(" ", "")
    assert "|4|25.00|50.0|60.0|1.250|" in text.replace(" ", "")
    assert "A processor, 2 cores" in text


def test_memory_is_that_of_the_process() -> None:
    """As psutil adds it up. Who else has its libraries takes some megabytes off, or adds them."""
    before = memory_of(os.getpid())
    kept = np.ones(2**25)  # 256 MiB
    assert memory_of(os.getpid()) - before == pytest.approx(256, abs=24)
    expected = psutil.Process().memory_full_info().pss / 2**20
    assert memory_of(os.getpid()) == pytest.approx(expected, rel=0.02)
    assert kept.size


@pytest.mark.parametrize(
    ("memory", "warm_up", "grown"),
    [
        ([50, 90, *[100] * 8, 103, 103], 2, 0.03),
        ([200, 200, *[100] * 10], 2, 0.0),
        ([200, 200, *[100] * 10], 0, -0.5),
        ([100] * 5 + [110] * 5 + [99, 99], 0, -0.01),
    ],
)
def test_growth_is_between_the_beginning_and_the_end(
    memory: list[float], warm_up: float, grown: float
) -> None:
    samples = [(float(second), float(value)) for second, value in enumerate(memory)]
    first, last = soak.first_and_last(samples, warm_up)
    assert last / first - 1 == pytest.approx(grown)


@pytest.mark.slow
def test_a_wrong_answer_ends_the_soak(tiny_bundle: Path) -> None:
    with ccam.load(tiny_bundle) as explainer:
        asker = soak.Asker(Near(explainer), explainer, 0)  # type: ignore[arg-type]
        for turn in range(22):
            asker.ask(turn)
        assert sum(asker.counts.values()) - asker.counts["compared"] == 22
        assert min(asker.counts.values()) > 1
        wrong = soak.Asker(Near(explainer, wrong=1e-4), explainer, 0)  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match="the saliency differs by"):
            wrong.ask(0)


def test_the_soak_s_result_in_words() -> None:
    result = {
        "command": "python -m bench.soak_serving",
        "conditions": {"processor": "A processor", "cores": 2},
        "minutes": 10.0,
        "results": {
            "asked": {"arrays": 10, "refused": 2},
            "memory_mib": [200.0, 201.0],
            "growth": 0.005,
            "left": [],
        },
    }
    text = soak.markdown(result)
    assert "10 minutes with 4 clients: 10 arrays, 2 refused." in text
    assert "200 MiB, at the end 201 MiB (+0.5%); left behind: nothing." in text


def test_ways_to_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []
    monkeypatch.setattr(bench, "Client", lambda url, memory="wire": made.append((url, memory)))
    server: Any = SimpleNamespace(http="127.0.0.1:1", grpc="127.0.0.1:2")
    for way in bench.WAYS:
        bench.client_of(server, way)
    assert made == [
        ("http://127.0.0.1:1", "wire"),
        ("grpc://127.0.0.1:2", "wire"),
        ("grpc://127.0.0.1:2", "system"),
    ]
