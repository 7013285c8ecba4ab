"""The doctor runs a small graph or kernel with each library, real or faked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ccam_deploy.checks import doctor, probe_graph
from ccam_deploy.checks.doctor import Finding
from tests.checks.drivers import FakeDriver


def fake_runtime(provider: str, answer: list[float], available: str = "CUDA") -> ModuleType:
    """An ONNX Runtime that gives one provider and one answer."""

    class Session:
        def __init__(
            self, graph: bytes, options: object, providers: list[Any], **options_beside: object
        ) -> None:
            assert preloaded == [True]
            assert graph == probe_graph.tiny_graph()
            assert providers[0][0] == "CUDAExecutionProvider"

        def get_providers(self) -> list[str]:
            return [f"{provider}ExecutionProvider"]

        def run(self, names: None, feeds: object) -> list[Any]:
            return [np.array(answer, np.float32)]

    class Options:
        def add_session_config_entry(self, key: str, value: str) -> None:
            pass

    preloaded: list[bool] = []
    module: Any = ModuleType("onnxruntime")
    module.preload_dlls = lambda: preloaded.append(True)
    module.set_default_logger_severity = lambda severity: None
    module.__version__ = "1.99"
    module.get_available_providers = lambda: [f"{available}ExecutionProvider"]
    module.SessionOptions = Options
    module.InferenceSession = Session
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("runtime", "detail", "remedy"),
    [
        (fake_runtime("CUDA", [0, 2]), "onnxruntime", ""),
        (fake_runtime("CPU", [0, 2]), "ONNX Runtime gave CPUEx", "install the CUDA and cuDNN"),
        (fake_runtime("CUDA", [9, 9]), "computes wrong values", "reinstall it: pip"),
        (
            fake_runtime("CPU", [0, 2], "CPU"),
            "was built without CUDAEx",
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install "
            "'ccam-deploy[gpu-onnxruntime]'",
        ),
    ],
)
def test_provider_must_be_the_one_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, runtime: ModuleType, detail: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    finding = doctor.try_name("onnxruntime-cuda")
    assert finding.works == (remedy == "")
    assert detail in finding.detail
    assert finding.remedy.startswith(remedy)


@pytest.mark.usefixtures("driver")
def test_tensorrt_rtx_makes_a_builder_without_a_gpu() -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is missing")
    assert doctor.try_name("tensorrt-rtx") == Finding(
        "tensorrt-rtx",
        True,
        f"tensorrt-rtx {library.__version__} builds plans; no GPU to run them on",
    )


def fake_tensorrt(broken: str = "") -> ModuleType:
    """A TensorRT in which one step fails."""

    def step(name: str, value: object) -> Callable[..., object]:
        return lambda *arguments: None if name == broken else value

    engine = SimpleNamespace(create_execution_context=step("context", object()))
    builder = SimpleNamespace(
        create_network=lambda flags: object(),
        create_builder_config=lambda: object(),
        build_serialized_network=step("build", b"plan"),
    )
    module: Any = ModuleType("tensorrt")
    module.__version__ = "11.4.0"
    module.Logger = type("Logger", (), {"INTERNAL_ERROR": 0, "__init__": lambda self, level: None})
    module.Builder = step("builder", builder)
    module.OnnxParser = lambda network, log: SimpleNamespace(
        parse=lambda graph: graph == probe_graph.tiny_graph() and broken != "parse"
    )
    module.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=step("open", engine))
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("broken", "detail", "remedy"),
    [
        ("", "tensorrt 11.4.0", ""),
        ("builder", "tensorrt 11.4.0 cannot make a builder", "update the NVIDIA driver"),
        ("parse", "tensorrt 11.4.0 cannot build for this GPU", "use a GPU and a driver that"),
        ("build", "tensorrt 11.4.0 cannot build for this GPU", "use a GPU and a driver that"),
        ("open", "tensorrt 11.4.0 cannot open a plan that it built", "update the NVIDIA driver"),
        ("context", "tensorrt 11.4.0 cannot open a plan that it built", "update the NVIDIA"),
    ],
)
def test_tensorrt_on_a_gpu(
    driver: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    detail: str,
    remedy: str,
) -> None:
    driver(FakeDriver())
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(broken))
    finding = doctor.try_name("tensorrt")
    assert (finding.works, finding.detail) == (not remedy, detail)
    assert finding.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("capability", "remedy"),
    [
        ((8, 9), ""),
        ((13, 0), ""),
        ((9, 0), "use another backend on this GPU: onnxruntime-cuda or tensorrt"),
        ((10, 0), "use another backend on this GPU: onnxruntime-cuda or tensorrt"),
    ],
)
def test_tensorrt_rtx_refuses_some_gpus(
    driver: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    remedy: str,
) -> None:
    """It builds plans on them too, but does not run there."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is missing")
    driver(FakeDriver(capability=capability))
    fake: Any = fake_tensorrt()
    fake.ComputeCapability = rtx.ComputeCapability
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    finding = doctor.try_name("tensorrt-rtx")
    assert (finding.works, finding.remedy) == (not remedy, remedy)
    if remedy:
        refused = f"does not run on compute capability {capability[0]}.{capability[1]}, only on"
        assert refused in finding.detail
        assert "8.0, 8.6, 8.9, 12.0, 12.1 and newer" in finding.detail


def test_calls_of_tensorrt_exist_in_the_real_one() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is missing")
    for owner, name in (
        (trt.Builder, "create_network"),
        (trt.Builder, "create_builder_config"),
        (trt.Builder, "build_serialized_network"),
        (trt.OnnxParser, "parse"),
        (trt.Runtime, "deserialize_cuda_engine"),
        (trt.ICudaEngine, "create_execution_context"),
        (trt.Logger, "INTERNAL_ERROR"),
    ):
        assert hasattr(owner, name)


@pytest.mark.slow
@pytest.mark.usefixtures("driver")
def test_kernels_compile_without_a_gpu() -> None:
    pytest.importorskip("numba_cuda", reason="numba-cuda is missing")
    from numba.core import config

    if config.ENABLE_CUDASIM:
        pytest.skip("NUMBA_ENABLE_CUDASIM is set")
    finding = doctor.try_name("numba-cuda")
    assert finding.works
    assert finding.detail.endswith("compiles kernels; no GPU to run them on")


def test_simulated_gpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba_cuda", reason="numba-cuda is missing")
    from numba.core import config

    monkeypatch.setattr(config, "ENABLE_CUDASIM", 1)
    finding = doctor.try_name("numba-cuda")
    assert (finding.works, finding.remedy) == (False, "unset NUMBA_ENABLE_CUDASIM")


def test_pycuda_takes_the_primary_context(
    driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def note(name: str, result: object = None) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            calls.append(name)
            return result

        return call

    context = SimpleNamespace(push=note("push"))
    device = SimpleNamespace(retain_primary_context=note("retain", context))
    fake: Any = ModuleType("pycuda.driver")
    fake.init = note("init")
    fake.Device = note("device", device)
    fake.mem_alloc = note("allocate", SimpleNamespace(free=note("free")))
    fake.Context = SimpleNamespace(pop=note("pop"))
    monkeypatch.setitem(sys.modules, "pycuda", ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", fake)
    driver(FakeDriver())
    assert doctor.try_name("pycuda").works
    assert calls == ["init", "device", "retain", "push", "allocate", "free", "pop"]
