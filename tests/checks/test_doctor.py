"""The doctor tries what is there, and has one line for whatever is broken."""

from __future__ import annotations

import ctypes
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ccam_deploy.checks import doctor, probe_graph
from ccam_deploy.checks.compiling import missing_to_compile
from ccam_deploy.checks.doctor import Finding
from ccam_deploy.engines import Backend

NO_DRIVER = "there is no NVIDIA driver (libcuda.so.1)"


class FakeDriver:
    """libcuda.so.1 of an H100, or one that fails."""

    def __init__(self, status: int = 0, capability: tuple[int, int] = (9, 0)) -> None:
        self._status = status
        self._capability = capability

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._status

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13000
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        name.value = b"NVIDIA H100"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self._capability[0 if attribute == doctor._MAJOR else 1]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a driver in place, or takes it away: the tests say the same with and without a GPU."""

    real = ctypes.CDLL

    def put(fake: FakeDriver | None) -> None:
        def load(name: str, *arguments: Any, **more: Any) -> Any:
            if name != "libcuda.so.1":
                return real(name, *arguments, **more)
            if fake is None:
                raise OSError(f"{name}: cannot open shared object file: No such file or directory")
            return fake

        monkeypatch.setattr(ctypes, "CDLL", load)

    put(None)
    return put


def test_tiny_graph_is_what_onnx_would_write() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "tiny", [x], [y])
    expected = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    model = onnx.load_model_from_string(probe_graph.tiny_graph())
    onnx.checker.check_model(model, full_check=True)
    assert model == expected


def test_attributes_are_the_driver_s() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is missing")
    attributes = bindings.CUdevice_attribute
    assert attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == doctor._MAJOR
    assert attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == doctor._MINOR
    errors = bindings.CUresult
    assert errors.CUDA_ERROR_NO_DEVICE == doctor._NO_DEVICE
    assert errors.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH == doctor._MISMATCH


def test_every_backend_is_tried() -> None:
    assert {name for name in get_args(Backend) if name != "auto"} <= set(doctor.NEEDS)
    assert set(doctor._CHECKS) == {*doctor.NEEDS, *doctor.PARTS}
    assert {need for needs in doctor.NEEDS.values() for need in needs} == set(doctor.PARTS)


@pytest.mark.usefixtures("driver")
def test_no_driver() -> None:
    found = doctor.try_name("driver")
    assert found == Finding(
        "driver", False, NO_DRIVER, "install the NVIDIA driver, on a machine with an NVIDIA GPU"
    )


def test_driver_describes_the_gpu(driver: Callable[..., None]) -> None:
    driver(FakeDriver())
    assert doctor.try_name("driver") == Finding(
        "driver", True, "NVIDIA H100, compute capability 9.0, driver for CUDA 13.0"
    )


@pytest.mark.parametrize(
    ("fake", "found", "remedy"),
    [
        (FakeDriver(100), "the driver sees no GPU", "CUDA_VISIBLE_DEVICES"),
        (FakeDriver(803), "kernel module differ in version", "restart the machine"),
        (FakeDriver(999), "cuInit failed with error 999", "nvidia-smi"),
        (FakeDriver(0, (6, 1)), "compute capability 6.1", "compute capability 7.5 or newer"),
    ],
)
def test_broken_driver(
    driver: Callable[..., None], fake: FakeDriver, found: str, remedy: str
) -> None:
    driver(fake)
    finding = doctor.try_name("driver")
    assert not finding.works
    assert found in finding.detail
    assert remedy in finding.remedy


def test_cpu_works_here() -> None:
    """In a process of its own, as the command tries it."""
    finding = doctor.in_fresh_process("onnxruntime-cpu")
    assert finding == Finding("onnxruntime-cpu", True, f"onnxruntime {onnxruntime.__version__}")


def missing(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As where a package was never installed."""
    for name in [name for name in sys.modules if name.split(".")[0] in modules]:
        monkeypatch.delitem(sys.modules, name)

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name.split(".")[0] in modules:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("onnxruntime-cpu", "onnxruntime", "cpu"),
        ("onnxruntime-cuda", "onnxruntime", "gpu-onnxruntime"),
        ("tensorrt", "tensorrt", "gpu"),
        ("tensorrt-rtx", "tensorrt_rtx", "rtx"),
        ("pycuda", "pycuda", "gpu"),
        ("numba-cuda", "numba_cuda", "cuda"),
    ],
)
def test_nothing_installed(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    missing(monkeypatch, module)
    monkeypatch.setattr(doctor, "missing_to_compile", dict)
    assert doctor.try_name(name) == Finding(
        name, False, "it is not installed", f"pip install 'ccam-deploy[{extra}]'"
    )


@pytest.mark.usefixtures("driver")
def test_pycuda_needs_a_compiler_and_headers_first(monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "pycuda")
    absent = {"nvcc on the PATH": "cuda-nvcc-13-0", "curand.h": "libcurand-dev-13-0"}
    monkeypatch.setattr(doctor, "missing_to_compile", lambda: absent)
    assert doctor.try_name("pycuda") == Finding(
        "pycuda",
        False,
        "it is not installed, and pip cannot compile it without nvcc on the PATH, curand.h",
        "apt-get install cuda-nvcc-13-0 libcurand-dev-13-0, then pip install 'ccam-deploy[gpu]'",
    )


def test_what_is_missing_to_compile_pycuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is there, then a compiler, then all of CUDA but one header, then all."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python"))
    everything = {
        *("build-essential", "python3-dev", "cuda-nvcc-13-0", "cuda-cudart-dev-13-0"),
        *("cuda-profiler-api-13-0", "libcurand-dev-13-0"),
    }
    assert set(missing_to_compile().values()) == everything

    def put(*names: str) -> set[str]:
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch(0o755)
        return set(missing_to_compile().values())

    assert put("bin/g++", "python/Python.h") == everything - {"build-essential", "python3-dev"}
    assert put("bin/nvcc", "include/cuda.h", "include/cudaProfiler.h") == {"libcurand-dev-13-0"}
    assert put("include/curand.h") == set()


class Broken:
    """Makes a module's import fail."""

    def __init__(self, module: str, error: Exception) -> None:
        self._module = module
        self._error = error

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self._module:
            raise self._error


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            OSError("libcudnn.so.9: cannot open shared object file: No such file or directory"),
            "install libcudnn.so.9, or add its folder to LD_LIBRARY_PATH",
        ),
        (
            ImportError("libcublasLt.so.13: cannot open shared object file"),
            "install libcublasLt.so.13, or add its folder to LD_LIBRARY_PATH",
        ),
        (
            ImportError("cannot import name 'InferenceSession' from 'onnxruntime'"),
            "reinstall it: pip install --force-reinstall onnxruntime-gpu",
        ),
        (
            ModuleNotFoundError("No module named 'flatbuffers'", name="flatbuffers"),
            "reinstall it: pip install --force-reinstall onnxruntime-gpu",
        ),
        (
            RuntimeError("multi\nline"),
            "reinstall it: pip install --force-reinstall onnxruntime-gpu",
        ),
    ],
)
def test_broken_install(monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str) -> None:
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "meta_path", [Broken("onnxruntime", error), *sys.meta_path])
    finding = doctor.try_name("onnxruntime-cuda")
    assert not finding.works
    assert str(error).splitlines()[0] in finding.detail
    assert "\n" not in finding.detail
    assert finding.remedy == remedy


def fake_runtime(got: str, answer: list[float], available: str = "CUDA") -> ModuleType:
    """An ONNX Runtime that gives one provider and one answer."""

    class Session:
        def __init__(self, graph: bytes, options: object, providers: list[Any]) -> None:
            assert preloaded == [True]
            assert graph == probe_graph.tiny_graph()
            assert providers[0][0] == "CUDAExecutionProvider"

        def get_providers(self) -> list[str]:
            return [f"{got}ExecutionProvider"]

        def run(self, names: None, feeds: object) -> list[Any]:
            return [np.array(answer, np.float32)]

    class Options:
        def add_session_config_entry(self, key: str, value: str) -> None:
            pass

    preloaded: list[bool] = []
    module: Any = ModuleType("onnxruntime")
    module.preload_dlls = lambda: preloaded.append(True)
    module.__version__ = "1.99"
    module.get_available_providers = lambda: [f"{available}ExecutionProvider"]
    module.SessionOptions = Options
    module.InferenceSession = Session
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("runtime", "found", "remedy"),
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
    monkeypatch: pytest.MonkeyPatch, runtime: ModuleType, found: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    finding = doctor.try_name("onnxruntime-cuda")
    assert finding.works == (remedy == "")
    assert found in finding.detail
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
    ("broken", "found", "remedy"),
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
    found: str,
    remedy: str,
) -> None:
    driver(FakeDriver())
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(broken))
    finding = doctor.try_name("tensorrt")
    assert (finding.works, finding.detail) == (not remedy, found)
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


def examined(*broken: str) -> dict[str, Finding]:
    """The backends' findings where some names are broken."""
    backends, parts = doctor.examine(
        lambda name: Finding(
            name, name not in broken, f"<{name}>", f"mend {name}" * (name in broken)
        )
    )
    assert [part.name for part in parts] == list(doctor.PARTS)
    return {one.name: one for one in backends}


def test_everything_works() -> None:
    assert all(one.works and not one.remedy for one in examined().values())


def test_the_driver_comes_first() -> None:
    found = examined("driver", "tensorrt", "pycuda")
    assert found["onnxruntime-cpu"].works
    for name in ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx"):
        assert found[name] == Finding(name, False, f"<{name}>; driver: <driver>", "mend driver")


def test_the_library_comes_before_the_kernels() -> None:
    found = examined("tensorrt", "pycuda", "numba-cuda")
    assert found["tensorrt"].remedy == "mend tensorrt"
    assert found["tensorrt-rtx"].remedy == "mend pycuda"
    assert found["onnxruntime-cuda"].remedy == "mend pycuda"
    assert found["onnxruntime-cpu"].works
    assert examined("numba-cuda")["tensorrt"].remedy == "mend numba-cuda"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("raise ImportError('half of it is gone')", "it cannot be imported: half of it is gone"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it crashed with signal 11"),
        ("raise SystemExit('no licence')", "no licence"),
        ("raise SystemExit", "it gave no answer"),
    ],
)
def test_package_that_breaks_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, found: str
) -> None:
    """A real package that is in the way of the real one, in a real process."""
    (tmp_path / "onnxruntime.py").write_text(textwrap.dedent(code))
    path = [str(tmp_path), *(entry for entry in sys.path if entry)]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    finding = doctor.in_fresh_process("onnxruntime-cpu")
    assert finding == Finding(
        "onnxruntime-cpu",
        False,
        found,
        "reinstall it: pip install --force-reinstall onnxruntime",
    )


def test_library_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("import time; time.sleep(600)")
    path = [str(tmp_path), *(entry for entry in sys.path if entry)]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    monkeypatch.setattr(doctor, "_PATIENCE", 3)
    finding = doctor.in_fresh_process("onnxruntime-cpu")
    assert (finding.works, finding.detail) == (False, "it did not answer in 3 s")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    finding = doctor.in_fresh_process("driver")
    assert finding.works
    assert "compute capability" in finding.detail
