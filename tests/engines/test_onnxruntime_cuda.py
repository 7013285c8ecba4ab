"""How graphs are opened and run on ONNX Runtime's CUDA provider, on a runtime that only listens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ccam_deploy.engines import onnxruntime as engine_module
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.onnxruntime import OnnxRuntimeGraph
from ccam_deploy.errors import BackendError

REFUSAL = (
    "This session cannot use the graph capture feature as requested by the user as all compute "
    "graph nodes have not been partitioned to the CUDAExecutionProvider"
)
Y = SimpleNamespace(name="y", type="tensor(float)", shape=["n", 2])


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class Runtime:
    """Sessions that refuse some options, and note with what they were opened and run.

    refuses: provider options that a session is not opened with.   type: of its inputs.   opened:
    each session's provider options.   left_out: the optimisers that it goes without.   runs: each
    run's binding and CUDA graph.
    """

    RunOptions = RunOptions

    def __init__(
        self,
        refuses: tuple[dict[str, str], ...] = (),
        error: str = REFUSAL,
        type: str = "tensor(float16)",  # noqa: A002
    ) -> None:
        self.refuses = refuses
        self.error = error
        self.type = type
        self.opened: list[dict[str, str]] = []
        self.left_out: list[set[str]] = []
        self.runs: list[tuple[Any, str | None]] = []

    def SessionOptions(self) -> Any:  # noqa: N802
        return SimpleNamespace(add_session_config_entry=lambda key, value: None)

    def InferenceSession(  # noqa: N802
        self,
        model: Path,
        options: Any,
        providers: Any,
        enable_fallback: int,
        disabled_optimizers: set[str],
    ) -> Any:
        (_, settings), _ = providers
        if any(refused.items() <= settings.items() for refused in self.refuses):
            raise RuntimeError(self.error)
        self.opened.append(settings)
        self.left_out.append(disabled_optimizers)

        def run(binding: Any, options: RunOptions) -> None:
            self.runs.append((binding, options.entries.get("gpu_graph_id")))

        return SimpleNamespace(
            get_providers=lambda: ["CUDAExecutionProvider"],
            get_inputs=lambda: [SimpleNamespace(name="x", type=self.type, shape=["n", 2])],
            get_outputs=lambda: [Y],
            io_binding=lambda: SimpleNamespace(
                bind_input=lambda *words: None, bind_output=lambda *words: None
            ),
            run_with_iobinding=run,
        )

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        pass

    def set_default_logger_severity(self, severity: int) -> None:
        pass


def open_graph(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> OnnxRuntimeGraph:
    monkeypatch.setattr(engine_module, "_import", lambda: runtime)
    return OnnxRuntimeGraph(Path("net.onnx"), "cuda", 77)


def tensors(rows: int) -> dict[str, DeviceTensor]:
    return {name: DeviceTensor(256, (rows, 2), np.dtype("float32")) for name in "xy"}


@pytest.mark.parametrize(
    ("refused", "layout", "captures"),
    [
        ((), "1", True),
        (({"prefer_nhwc": "1", "enable_cuda_graph": "1"},), None, True),
        (({"enable_cuda_graph": "1"},), "1", False),
    ],
)
def test_the_fastest_way_that_a_graph_allows(
    monkeypatch: pytest.MonkeyPatch,
    refused: tuple[dict[str, str], ...],
    layout: str | None,
    captures: bool,
) -> None:
    runtime = Runtime(refused)
    graph = open_graph(monkeypatch, runtime)
    (settings,) = runtime.opened
    assert settings.get("prefer_nhwc") == layout
    assert settings.get("enable_cuda_graph") == ("1" if captures else None)
    assert graph.replays_itself is captures
    assert not graph.capturable
    assert settings["user_compute_stream"] == "77"
    assert settings["use_tf32"] == "0"
    assert runtime.left_out == [{"ConvAddFusion"}]
    graph.bind(tensors(2))()
    assert [graph_id for _, graph_id in runtime.runs] == ["-1" if captures else None]


@pytest.mark.parametrize("captures", [True, False])
def test_channels_last_are_for_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, captures: bool
) -> None:
    """Exact products of float32 do not run on them; those in TF32 do."""
    refuses = () if captures else ({"enable_cuda_graph": "1"},)
    for tf32, layout in ((False, None), (True, "1")):
        runtime = Runtime(refuses, type="tensor(float)")
        monkeypatch.setattr(engine_module, "_import", lambda opens=runtime: opens)
        graph = OnnxRuntimeGraph(Path("net.onnx"), "cuda", 77, tf32)
        assert runtime.opened[-1].get("prefer_nhwc") == layout
        assert graph.replays_itself is captures


def test_other_errors_are_not_taken_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(({"enable_cuda_graph": "1"},), error="out of memory")
    with pytest.raises(BackendError, match=r"cannot load net\.onnx: out of memory"):
        open_graph(monkeypatch, runtime)
    assert runtime.opened == []


def test_each_binding_is_captured_once_it_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CUDA graph of its own; what is not bound is not captured."""
    runtime = Runtime()
    graph = open_graph(monkeypatch, runtime)
    two, three = graph.bind(tensors(2)), graph.bind(tensors(3))
    for run in (two, three, two, three, two):
        run()
    graph.launch(tensors(2))
    bindings, ids = zip(*runtime.runs, strict=True)
    assert list(ids) == ["-1", "-1", "1", "2", "1", "-1"]
    assert bindings[0] is bindings[2] is bindings[4]
    assert bindings[1] is bindings[3]


def test_nothing_is_captured_beside_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that several callers share are prepared for that one after the other."""
    runtime = Runtime()
    monkeypatch.setattr(engine_module, "_import", lambda: runtime)
    moments = iter([False, True])
    graph = OnnxRuntimeGraph(Path("net.onnx"), "cuda", 77, alone=lambda: next(moments))
    run = graph.bind(tensors(2))
    for _ in range(4):
        run()
    assert [graph_id for _, graph_id in runtime.runs] == ["-1", "-1", "1", "1"]


def test_what_is_captured_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime frees nothing that it captured before the session is closed."""
    monkeypatch.setattr(engine_module, "_MOST_CAPTURED", 2)
    runtime = Runtime()
    graph = open_graph(monkeypatch, runtime)
    for rows in (1, 2, 3):
        run = graph.bind(tensors(rows))
        run()
        run()
    assert [graph_id for _, graph_id in runtime.runs] == ["-1", "1", "-1", "2", "-1", "-1"]
