"""What the GPU modules call exists in the packages that they call.

The names are read from the source: an attribute of a variable that holds one of the packages'
objects. `tensorrt_lean` has the runtime classes of `tensorrt`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ccam_deploy import engines

FOLDER = Path(engines.__file__).parent
OF_TENSORRT = {
    "trt": "",
    "self._trt": "",
    "self._runtime": "Runtime",
    "self._engine": "ICudaEngine",
    "engine": "ICudaEngine",
    "config": "IRuntimeConfig",
    "self._context": "IExecutionContext",
    "kernels": "DynamicShapesKernelSpecializationStrategy",
}
ONLY_RTX = {
    "CudaGraphStrategy",
    "CudaGraphStrategy.DISABLED",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IExecutionContext.is_stream_capturable",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
}
OF_RUNTIME_CACHE = {
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
}


def used(file: str, receivers: dict[str, str]) -> set[str]:
    """Dotted names below a package, of all that a module takes from the receivers."""
    found = set()
    for node in ast.walk(ast.parse((FOLDER / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            assert isinstance(node.args[1], ast.Constant)
            name = f"{ast.unparse(node.args[0])}.{node.args[1].value!s}"
        else:
            continue
        for receiver, holder in receivers.items():
            if name.startswith(receiver + ".") and "(" not in name[len(receiver) :]:
                rest = name.removeprefix(receiver + ".")
                found.add(f"{holder}.{rest}" if holder else rest)
    return found


def missing(package: ModuleType, names: set[str]) -> set[str]:
    absent = set()
    for name in names:
        value: Any = package
        for part in name.split("."):
            value = getattr(value, part, None)
        # A property without documentation is None on no class, so this tells what is there.
        if value is None:
            absent.add(name)
    return absent


def test_runtime_classes_have_what_is_used() -> None:
    rtx, lean = map(pytest.importorskip, ("tensorrt_rtx", "tensorrt_lean"))
    names = used("tensorrt/runtime.py", OF_TENSORRT)
    assert len(names) > 30
    assert "IExecutionContext.execute_async_v3" in names
    assert missing(rtx, names) == set()
    assert missing(lean, names) == ONLY_RTX


def test_runtime_cache_has_what_is_used() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    receivers = {"config": "IRuntimeConfig", "self._cache": "IRuntimeCache"}
    names = used("tensorrt/runtime_cache.py", receivers)
    assert names == OF_RUNTIME_CACHE
    assert missing(rtx, names) == set()


@pytest.mark.parametrize("package", ["tensorrt_rtx", "tensorrt_lean"])
def test_error_recorder_answers_every_call(package: str) -> None:
    from ccam_deploy.engines.tensorrt.messages import recorder

    trt = pytest.importorskip(package)
    errors = recorder(trt)
    for name in vars(trt.IErrorRecorder):
        if callable(getattr(trt.IErrorRecorder, name)) and not name.startswith("_"):
            assert name in vars(type(errors)), name
    code = trt.ErrorCodeTRT.FAILED_EXECUTION
    for number in range(20):
        errors.report_error(code, f"error\n{number}")
    assert errors.num_errors() < 20
    assert errors.has_overflowed()
    assert (errors.get_error_code(0), errors.get_error_desc(0)) == (code, "error\n0")
    assert str(errors.error("the plan")) == "the plan: error 0"
    assert errors.num_errors() == 0
    assert str(errors.error("the plan")) == "the plan: no reason was given"


def test_cuda_bindings_have_what_is_used() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver")
    names = used("cuda/pycuda.py", {"bindings": ""})
    assert "cuStreamBeginCapture" in names
    assert missing(bindings, names) == set()


def test_numba_has_what_is_used() -> None:
    pytest.importorskip("numba.cuda")
    names = used("cuda/pycuda.py", {"_numba()": "numba.cuda", "numba_cuda": "numba.cuda"})
    assert names == {
        "numba.cuda.as_cuda_array",
        "numba.cuda.defer_cleanup",
        "numba.cuda.external_stream",
    }
    assert missing(importlib.import_module("numba.cuda"), {n[11:] for n in names}) == set()
    dispatcher = importlib.import_module("numba.cuda.dispatcher")
    assert hasattr(dispatcher.config, "CUDA_LOW_OCCUPANCY_WARNINGS")


def test_pycuda_has_what_is_used() -> None:
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("pycuda is not installed")
    driver = pytest.importorskip("pycuda.driver", exc_type=ImportError)
    holders = {"self._driver": "", "driver": "", "self._context": "Context"}
    names = used("cuda/pycuda.py", holders | {"driver.Device(0)": "Device"})
    assert "memcpy_htod_async" in names
    assert missing(driver, names) == set()
