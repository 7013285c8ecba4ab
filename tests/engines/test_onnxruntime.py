"""The ONNX Runtime engine and the choice of a backend."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ccam_deploy.bundle.folder import Bundle, read_bundle
from ccam_deploy.engines import TensorSpec, available, load_networks, open_networks
from ccam_deploy.engines import onnxruntime as engine_module
from ccam_deploy.engines import open as open_module
from ccam_deploy.engines.cuda import onnxruntime_slots
from ccam_deploy.engines.cuda.slots import Slot, Slots
from ccam_deploy.engines.onnxruntime import (
    OnnxRuntimeEngine,
    OnnxRuntimeGraph,
    devices,
    open_session,
)
from ccam_deploy.errors import BackendError, OptionError
from tests.engines.cuda.host_device import HostDevice
from tests.helpers import ROOT, noise

without_cuda = pytest.mark.skipif(
    "cuda" in devices(), reason="the installed ONNX Runtime has the CUDA provider"
)


def write_graph(path: Path, element_type: int = TensorProto.FLOAT, operator: str = "Add") -> Path:
    """A graph of one operator: a [n, 3], b [n, 3] -> total, first, in that order."""
    tensors = {
        name: helper.make_tensor_value_info(name, element_type, ["n", 3])
        for name in ("a", "b", "total", "first")
    }
    nodes = [
        helper.make_node(operator, ["a", "b"], ["total"]),
        helper.make_node("Identity", ["a"], ["first"]),
    ]
    graph = helper.make_graph(
        nodes, "test", [tensors["a"], tensors["b"]], [tensors["total"], tensors["first"]]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "sum.onnx")


def test_outputs_are_named_and_right(graph: Path) -> None:
    a, b = noise(4, 3), noise(4, 3, seed=1)
    with OnnxRuntimeEngine(graph) as engine:
        values = engine.run({"b": b, "a": a})
    assert list(values) == ["total", "first"]
    np.testing.assert_allclose(values["total"], a + b, rtol=1e-6)
    np.testing.assert_array_equal(values["first"], a)


@pytest.mark.parametrize(
    ("element_type", "dtype"),
    [
        (TensorProto.FLOAT, np.float32),
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.INT64, np.int64),
    ],
)
def test_specs_are_the_graphs(tmp_path: Path, element_type: int, dtype: type[np.generic]) -> None:
    engine = OnnxRuntimeEngine(write_graph(tmp_path / "sum.onnx", element_type))
    assert engine.inputs == tuple(TensorSpec(n, np.dtype(dtype), ("n", 3)) for n in "ab")
    assert [spec.name for spec in engine.outputs] == ["total", "first"]
    ones = np.ones((1, 3), dtype)
    np.testing.assert_array_equal(engine.run({"a": ones, "b": ones})["total"], [[2, 2, 2]])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, 'input "b" is missing'),
        (noise(4, 2), r'input "b" is float32\[4, 2\], the graph takes float32\[\'n\', 3\]'),
        (noise(4, 3, 1), r'input "b" is float32\[4, 3, 1\], the graph takes'),
        (noise(4, 3).astype(np.float64), r'input "b" is float64\[4, 3\], the graph takes'),
    ],
    ids=["missing", "shape", "rank", "dtype"],
)
def test_unfit_inputs_are_named(graph: Path, value: Any, message: str) -> None:
    feeds = {"a": noise(4, 3)} | ({} if value is None else {"b": value})
    with OnnxRuntimeEngine(graph) as engine, pytest.raises(BackendError, match=message):
        engine.run(feeds)


def test_what_the_runtime_reports_is_passed_on(graph: Path) -> None:
    """Sizes that the specs leave open, and that the operator cannot bring together."""
    with (
        OnnxRuntimeEngine(graph) as engine,
        pytest.raises(BackendError, match=r"ONNX Runtime failed on .*sum\.onnx: .*"),
    ):
        engine.run({"a": noise(4, 3), "b": noise(5, 3)})


def test_closed_engine_says_so(graph: Path) -> None:
    engine = OnnxRuntimeEngine(graph)
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="the engine was closed"):
        engine.run({"a": noise(1, 3), "b": noise(1, 3)})


@pytest.mark.parametrize("content", [b"", b"rubbish", None], ids=["empty", "rubbish", "missing"])
def test_broken_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot load .*bad\.onnx: .+"):
        OnnxRuntimeEngine(path)


def test_unknown_operator_is_named(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "odd.onnx", operator="Frobnicate")
    with pytest.raises(BackendError, match=r"cannot load .*odd\.onnx: .*Frobnicate"):
        OnnxRuntimeEngine(path)


def test_foreign_types_are_named(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "wide.onnx", TensorProto.DOUBLE)
    message = r'"a" is a tensor\(double\); graphs may hold tensor\(float\), '
    with pytest.raises(BackendError, match=message):
        OnnxRuntimeEngine(path)


@without_cuda
def test_cuda_is_refused_without_its_provider(graph: Path) -> None:
    message = "has no CUDAExecutionProvider: pip uninstall onnxruntime onnxruntime-gpu, then pip"
    with pytest.raises(BackendError, match=message):
        OnnxRuntimeEngine(graph, "cuda")


def test_cuda_is_preloaded_once_and_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever any thread prints meanwhile is lost, so it must not come with every session."""
    loaded = []

    def preload() -> None:
        loaded.append("libcudnn.so.9")
        print("there is no libcudnn.so.9")

    runtime: Any = ModuleType("onnxruntime")
    runtime.preload_dlls = preload
    for _ in range(3):
        engine_module._load_cuda(runtime)
    assert len(loaded) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_asked_of_the_cuda_provider(
    monkeypatch: pytest.MonkeyPatch, graph: Path, tf32: bool
) -> None:
    """In float32 it is refused: ONNX Runtime's default is to use it."""
    given: list[Any] = []

    class Session:
        def __init__(
            self, model: Path, options: object, providers: list[Any], **options_beside: object
        ) -> None:
            given.extend(providers)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

        def get_inputs(self) -> list[Any]:
            return []

        get_outputs = get_inputs

    runtime: Any = ModuleType("onnxruntime")
    runtime.SessionOptions = onnxruntime.SessionOptions
    runtime.RunOptions = onnxruntime.RunOptions
    runtime.InferenceSession = Session
    runtime.get_available_providers = lambda: ["CUDAExecutionProvider"]
    runtime.preload_dlls = lambda: None
    runtime.set_default_logger_severity = lambda severity: None
    monkeypatch.setattr(engine_module, "_import", lambda: runtime)
    OnnxRuntimeGraph(graph, "cuda", 7, tf32)
    *_, (name, options), _ = given
    assert name == "CUDAExecutionProvider"
    assert options["use_tf32"] == ("1" if tf32 else "0")
    assert options["user_compute_stream"] == "7"


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True)])
def test_tf32_reaches_the_graphs_of_a_slot(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, precision: str, tf32: bool
) -> None:
    """They are those of fp32. The only slot has the GPU while it works."""
    opened: list[tuple[str, bool]] = []
    asked: list[Callable[[], bool]] = []

    def graph(
        path: Path, device: str, stream: int, tf32: bool, alone: Callable[[], bool]
    ) -> OnnxRuntimeGraph:
        opened.append((path.name, tf32))
        asked.append(alone)
        return OnnxRuntimeGraph(path, "cpu", 0)

    monkeypatch.setattr(onnxruntime_slots, "CudaDevice", HostDevice)
    monkeypatch.setattr(onnxruntime_slots, "OnnxRuntimeGraph", graph)
    monkeypatch.setattr(onnxruntime_slots, "require_provider", lambda device: None)
    monkeypatch.setattr(onnxruntime_slots, "present_device", lambda: "8.0")
    networks = open_networks(read_bundle(tiny_bundle), "onnxruntime-cuda", precision)
    assert networks.slots is not None
    with networks.slots.take():
        assert all(alone() for alone in asked)
    assert not any(alone() for alone in asked)
    networks.close()
    graphs = ("backbone", "gradient", "classifier")
    assert opened == [(f"{name}.onnx", tf32) for name in graphs]


def test_tf32_is_refused_on_a_gpu_that_lacks_it(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would run as float32 there."""
    monkeypatch.setattr(onnxruntime_slots, "require_provider", lambda device: None)
    monkeypatch.setattr(onnxruntime_slots, "present_device", lambda: "7.5")
    message = r"^compute capability 7\.5 has no TF32, which 8\.0 and newer have; use fp32$"
    with pytest.raises(BackendError, match=message):
        open_networks(read_bundle(tiny_bundle), "onnxruntime-cuda", "tf32")


@without_cuda
@pytest.mark.parametrize(
    ("backend", "start"),
    [("onnxruntime-cpu", ""), ("auto", "no backend works here: onnxruntime-cpu: ")],
)
def test_a_cpu_says_where_tf32_runs(tiny_bundle: Path, backend: str, start: str) -> None:
    with pytest.raises(BackendError) as caught:
        open_networks(read_bundle(tiny_bundle), backend, "tf32")
    assert str(caught.value) == (
        f"{start}tf32 does not run on a CPU, only on NVIDIA GPUs of compute capability 8.0 or "
        "newer, with onnxruntime-cuda, tensorrt or tensorrt-rtx; use fp32 here"
    )


class FakeRuntime(ModuleType):
    """ONNX Runtime with a CUDA provider, whose sessions run where `used` says."""

    def __init__(self, used: str) -> None:
        super().__init__("onnxruntime")
        self.used = used
        self.severities: list[int] = []
        self.keywords: list[dict[str, Any]] = []
        self.SessionOptions = MagicMock
        self.set_default_logger_severity = self.severities.append

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        pass

    def InferenceSession(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: N802
        self.keywords.append(keywords)
        return SimpleNamespace(get_providers=lambda: [self.used], get_inputs=list)


def test_the_default_logger_is_silenced_once_cuda_has_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once for the process: what the caller sets later stays."""
    runtime = FakeRuntime("CUDAExecutionProvider")
    monkeypatch.setattr(engine_module, "_import", lambda: runtime)
    for _ in range(2):
        open_session(b"", "cuda")
    assert runtime.severities == [4]
    assert [words["enable_fallback"] for words in runtime.keywords] == [0, 0]


def test_the_reason_why_cuda_does_not_load_is_not_silenced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = FakeRuntime("CPUExecutionProvider")
    monkeypatch.setattr(engine_module, "_import", lambda: runtime)
    with pytest.raises(BackendError, match="gave CPUExecutionProvider where CUDAExecution"):
        open_session(b"", "cuda")
    assert runtime.severities == []


def test_silence_is_the_default_loggers() -> None:
    """A session's option that is set twice is a warning of that logger, not of a session's."""
    code = (
        "import onnxruntime\n"
        "from ccam_deploy.engines.onnxruntime import _silence_default_logger\n"
        "def say(name):\n"
        "    options = onnxruntime.SessionOptions()\n"
        "    options.add_session_config_entry(name, '1')\n"
        "    options.add_session_config_entry(name, '2')\n"
        "say('before'); _silence_default_logger(onnxruntime); say('after')\n"
        "onnxruntime.set_default_logger_severity(2); _silence_default_logger(onnxruntime)\n"
        "say('again')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = [name for name in ("before", "after", "again") if f"[{name}]" in done.stderr]
    assert said == ["before", "again"]


@without_cuda
def test_cuda_does_not_fall_back(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="has no CUDAExecutionProvider"):
        open_networks(read_bundle(tiny_bundle), "onnxruntime-cuda")


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_reach_the_sessions(tiny_bundle: Path, threads: int) -> None:
    networks = open_networks(read_bundle(tiny_bundle), "onnxruntime-cpu", threads=threads)
    try:
        assert networks.engines.keys() == {"backbone", "gradient", "classifier"}
        for engine in networks.engines.values():
            assert isinstance(engine, OnnxRuntimeEngine)
            assert engine._session.get_session_options().intra_op_num_threads == threads
            assert engine._session.get_providers() == ["CPUExecutionProvider"]
    finally:
        networks.close()


@without_cuda
def test_auto_takes_the_cpu_here(tiny_bundle: Path) -> None:
    assert available()[-1] == "onnxruntime-cpu"
    assert "onnxruntime-cuda" not in available()
    networks = open_networks(read_bundle(tiny_bundle))
    assert networks.backend == "onnxruntime-cpu"
    assert networks.notes == ()
    networks.close()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_auto_says_that_plans_are_missing_where_they_would_serve(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    bundle = read_bundle(tiny_bundle)
    opened = open_networks(bundle, "onnxruntime-cpu")
    opened.slots = Slots(lambda: cast(Slot, None), 1) if on_gpu else None
    monkeypatch.setattr(open_module, "available", lambda: ["tensorrt", "onnxruntime-cuda"])
    monkeypatch.setattr(open_module, "_open", lambda *_: opened)
    line = "tensorrt: the bundle has no plans; ccam-deploy build makes them"
    assert open_networks(bundle).notes == ((line,) if on_gpu else ())


def test_unknown_settings(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    with pytest.raises(
        OptionError, match='backend "openvino" is unknown; there are auto, tensorrt, '
    ):
        open_networks(bundle, "openvino")
    with pytest.raises(OptionError, match="threads is -1; it must be 0 to 1024"):
        open_networks(bundle, threads=-1)
    with pytest.raises(OptionError, match="slots is 0; it must be 1 to 64"):
        open_networks(bundle, slots=0)
    with pytest.raises(OptionError, match="the bundle has no int8 graphs, only fp32"):
        open_networks(bundle, precision="int8")


def test_auto_says_why_nothing_works(tiny_bundle: Path, tmp_path: Path) -> None:
    """A bundle whose files went away after it was read."""
    bundle = read_bundle(tiny_bundle)
    message = "no backend works here: .*onnxruntime-cpu: ONNX Runtime cannot load .*backbone"
    with pytest.raises(BackendError, match=message):
        open_networks(Bundle(tmp_path, bundle.manifest))


def test_engines_are_closed_where_one_fails(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Path] = []
    close = OnnxRuntimeEngine._close_impl

    def noted(engine: OnnxRuntimeEngine) -> None:
        closed.append(engine._path)
        close(engine)

    monkeypatch.setattr(OnnxRuntimeEngine, "_close_impl", noted)
    with pytest.raises(BackendError, match=r"none\.onnx"):
        load_networks({"one": graph, "other": tmp_path / "none.onnx"}, 1.0, "onnxruntime-cpu")
    assert closed == [graph]


def test_gpu_extras_bring_the_libraries_of_cuda() -> None:
    """Without these extras of its own, onnxruntime-gpu finds neither cuDNN nor cuFFT."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text("utf-8"))["project"]["optional-dependencies"]
    for extra in ("gpu", "gpu-onnxruntime"):
        (requirement,) = (line for line in extras[extra] if line.startswith("onnxruntime-gpu"))
        assert requirement.startswith("onnxruntime-gpu[cuda,cudnn]>=")


USING = """
import os, sys
import ccam_deploy
with ccam_deploy.load(sys.argv[1], backend="onnxruntime-cpu") as explainer:
    explainer.warm_up()
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("own", "kept"), [(None, "1"), ("0", "0")])
def test_nothing_is_reported_unless_the_user_lets_it(
    tiny_bundle: Path, tmp_path: Path, own: str | None, kept: str
) -> None:
    """ONNX Runtime's reporting would leave the file of its session behind."""
    others = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    environment = {**others, "TMPDIR": str(tmp_path)}
    if own is not None:
        environment["ORT_DISABLE_TELEMETRY"] = own
    command = [sys.executable, "-c", USING, str(tiny_bundle)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [kept], done.stderr
    if own is None:
        assert not list(tmp_path.iterdir())
