"""Plans on a device: a real library without a GPU, and a stand-in for one with a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.tensorrt.library import Library, load_library
from ccam_deploy.engines.tensorrt.runtime import PlanGraph, SharedPlan, _axis_name
from ccam_deploy.errors import BackendError

SHAPES = {
    "images": ((-1, 3), [(1, 3), (1, 3), (1, 3)], [(1, 3), (4, 3), (4, 3)]),
    "masks": ((-1, 1), [(1, 1), (24, 1), (64, 1)], [(1, 1), (96, 1), (96, 1)]),
}
TYPES = {"images": "HALF", "masks": "FLOAT", "logits": "HALF"}


class FakeContext:
    """An execution context that writes down what it is told."""

    error_recorder: Any = None
    fails: str | None = None

    def __init__(self, options: Any) -> None:
        self.options = options
        self.calls: list[tuple[Any, ...]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def told(self, *call: Any) -> bool:
        self.calls.append(call)
        if call[0] == self.fails:
            self.error_recorder.report_error(7, f"Error Code 7:\n{call[0]} will not do")
        return bool(call[0] != self.fails)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.told("shape", name, shape)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "logits"
        return (*self.shapes["masks"][:1], 5)

    def set_tensor_address(self, name: str, address: int) -> bool:
        return self.told("address", name, address)

    def set_device_memory(self, address: int, size: int) -> None:
        self.told("memory", address, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return self.told("profile", index, stream)

    def execute_async_v3(self, stream: int) -> bool:
        return self.told("run", stream)


class FakeEngine:
    """An engine as the classifier's plan gives, with one profile or two."""

    num_io_tensors = 3

    def __init__(self, profiles: int) -> None:
        self.num_optimization_profiles = profiles
        self.contexts: list[FakeContext] = []

    def get_tensor_name(self, index: int) -> str:
        return list(TYPES)[index]

    def get_tensor_location(self, name: str) -> str:
        return "DEVICE"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TYPES[name])

    def get_tensor_mode(self, name: str) -> str:
        return "OUTPUT" if name == "logits" else "INPUT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 5) if name == "logits" else SHAPES[name][0]

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return SHAPES[name][1 + profile]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return (0, 512)[profile]

    def create_execution_context(self, options: Any) -> FakeContext:
        self.contexts.append(FakeContext(options))
        return self.contexts[-1]


def library(engine: FakeEngine) -> Library:
    """A stand-in for `tensorrt`, whose runtime gives that engine."""

    class Base:
        pass

    module = SimpleNamespace(
        ILogger=Base,
        IErrorRecorder=Base,
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
        TensorLocation=SimpleNamespace(DEVICE="DEVICE"),
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
    )
    return Library("tensorrt", module)


class Slot:
    """Of a device, what a graph takes, and how much memory it asked for."""

    stream = 9

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self.held: list[object] = []

    def hold(self, thing: object) -> None:
        self.held.append(thing)

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def allocate(self, size: int) -> int:
        self.allocated.append(size)
        return 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "classifier.plan"
    file.write_bytes(b"not a plan " * 100)
    return file


def slot() -> Any:
    return Slot()


def tensors(masks: int, batch: int = 1, place: int = 0) -> dict[str, DeviceTensor]:
    return {
        "images": DeviceTensor(256, (batch, 3), np.dtype("float16")),
        "masks": DeviceTensor(512, (masks, 1), np.dtype("float32")),
        "logits": DeviceTensor(768 + 256 * place, (masks, 5), np.dtype("float16")),
    }


def test_library_tells_why_it_cannot_load_a_plan(path: Path) -> None:
    """TensorRT-RTX's own words, by way of the error recorder."""
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(BackendError, match=r"cannot load classifier\.plan: .*Error Code 1") as told:
        SharedPlan(load_library("tensorrt-rtx"), path, "8.9")
    assert "\n" not in str(told.value)


def test_plan_tells_its_tensors_and_limits(path: Path) -> None:
    plan = SharedPlan(library(FakeEngine(2)), path, "8.9")
    assert [(s.name, s.dtype, s.shape) for s in plan.inputs] == [
        ("images", np.dtype("float16"), ("batch", 3)),
        ("masks", np.dtype("float32"), ("masks", 1)),
    ]
    assert [(s.name, s.dtype, s.shape) for s in plan.outputs] == [
        ("logits", np.dtype("float16"), ("masks", 5))
    ]
    assert plan.profiles == ("latency", "throughput")
    assert plan.limits("latency") == {"batch": 1, "masks": 64}
    assert plan.limits("throughput") == {"batch": 4, "masks": 96}
    assert (plan.scratch_bytes("latency"), plan.scratch_bytes("throughput")) == (0, 512)


def test_rows_of_the_head_are_counted_as_masks() -> None:
    """As the export names them."""
    for name in ("features", "logits"):
        assert _axis_name(name, ["features", "logits"]) == "masks"
    assert _axis_name("feature_0", ["images", "logits", "feature_0"]) == "batch"


def test_plan_without_a_profile_refuses_it(path: Path) -> None:
    plan = SharedPlan(library(FakeEngine(1)), path, "8.9")
    with pytest.raises(BackendError, match="no profile for throughput, only for latency"):
        PlanGraph(plan, slot(), 0, "throughput")


def test_unknown_types_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TYPES, "logits", "BF16")
    with pytest.raises(BackendError, match=r'has "logits" in BF16, not FLOAT'):
        SharedPlan(library(FakeEngine(1)), path, "8.9")


def test_latency_needs_no_change_of_profile(path: Path) -> None:
    engine = FakeEngine(2)
    PlanGraph(SharedPlan(library(engine), path, "8.9"), slot(), 4096).launch(tensors(3))
    (context,) = engine.contexts
    assert context.options == "user"
    assert context.calls == [
        ("shape", "images", (1, 3)),
        ("address", "images", 256),
        ("shape", "masks", (3, 1)),
        ("address", "masks", 512),
        ("address", "logits", 768),
        ("run", 9),
    ]


def test_throughput_takes_its_profile_and_scratch(path: Path) -> None:
    engine = FakeEngine(2)
    graph = PlanGraph(SharedPlan(library(engine), path, "8.9"), slot(), 4096, "throughput")
    graph.launch(tensors(3, 4))
    assert engine.contexts[0].calls[:2] == [("profile", 1, 9), ("memory", 4096, 512)]


def test_tensors_elsewhere_have_a_context_of_their_own(path: Path) -> None:
    """A context that is told anything else spoils the graphs that were captured from it."""
    engine = FakeEngine(2)
    graph = PlanGraph(SharedPlan(library(engine), path, "8.9"), slot(), 0)
    moved = {"masks": DeviceTensor(1024, (3, 1), np.dtype("float32"))}
    for given in (tensors(3), tensors(2), tensors(3), tensors(3) | moved, tensors(3)):
        graph.launch(given)
    assert [context.shapes["masks"] for context in engine.contexts] == [(3, 1), (2, 1), (3, 1)]
    assert [context.calls.count(("run", 9)) for context in engine.contexts] == [3, 1, 1]
    assert engine.contexts[0].calls[-2:] == [("run", 9), ("run", 9)]
    assert graph.capturable


def test_contexts_are_limited_and_captured_ones_held(path: Path) -> None:
    engine, device = FakeEngine(2), Slot()
    graph = PlanGraph(SharedPlan(library(engine), path, "8.9"), device, 0)  # type: ignore[arg-type]
    for place in range(70):
        graph.launch(tensors(3) | {"logits": tensors(3, place=place)["logits"]})
    assert len(engine.contexts) == 70
    graph.launch(tensors(3) | {"logits": tensors(3, place=69)["logits"]})
    assert len(engine.contexts) == 70
    graph.launch(tensors(3) | {"logits": tensors(3, place=0)["logits"]})
    assert len(engine.contexts) == 71
    assert len(device.held) == 72


def test_unfit_tensors_are_refused(path: Path) -> None:
    graph = PlanGraph(SharedPlan(library(FakeEngine(2)), path, "8.9"), slot(), 0)
    given = tensors(3)
    with pytest.raises(BackendError, match=r'"logits" of shape \[3, 5\], there is room for \[2, 5'):
        graph.launch(given | {"logits": tensors(2)["logits"]})
    with pytest.raises(BackendError, match='"masks" is float16, the plan has float32'):
        graph.launch(given | {"masks": DeviceTensor(0, (3, 1), np.dtype("float16"))})
    with pytest.raises(BackendError, match='tensor "images" is missing'):
        graph.launch({"masks": given["masks"]})
    graph.launch(given)


@pytest.mark.parametrize("call", ["shape", "address", "run"])
def test_refusals_carry_the_librarys_words(
    path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeContext, "fails", call)
    graph = PlanGraph(SharedPlan(library(FakeEngine(2)), path, "8.9"), slot(), 0)
    for _ in range(2):
        with pytest.raises(BackendError, match=f"Error Code 7: {call} will not do$"):
            graph.launch(tensors(3))


def test_slots_share_a_plan_and_not_a_context(path: Path) -> None:
    engine = FakeEngine(2)
    plan = SharedPlan(library(engine), path, "8.9")
    first, second = PlanGraph(plan, slot(), 0), PlanGraph(plan, slot(), 0)
    first.launch(tensors(3))
    second.launch(tensors(2))
    assert [context.shapes["masks"] for context in engine.contexts] == [(3, 1), (2, 1)]
