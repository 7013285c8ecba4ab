"""The doctor's lines for packages that are missing, or whose import fails."""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType

import numpy as np
import pytest

from ccam_deploy.checks import doctor
from ccam_deploy.checks.doctor import Finding


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


PYCUDA = "/usr/lib/python3/dist-packages/pycuda/_driver.cpython-312-x86_64-linux-gnu.so"


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("message", "detail", "remedy"),
    [
        (
            f"{PYCUDA}: undefined symbol: cuCtxCreate_v4",
            "libcuda.so.1 has no cuCtxCreate_v4",
            "update the NVIDIA driver: pycuda was compiled for a newer libcuda.so.1",
        ),
        (
            f"{PYCUDA}: undefined symbol: curandGetProperty",
            "libcurand.so has no curandGetProperty",
            "install the libcurand.so of the CUDA that pycuda was compiled with",
        ),
        (
            f"{PYCUDA}: undefined symbol: cudaGetDeviceProperties_v2, version libcudart.so.12",
            "libcudart.so has no cudaGetDeviceProperties_v2",
            "install the libcudart.so of the CUDA that pycuda was compiled with",
        ),
        (
            f"{PYCUDA}: undefined symbol: _ZN5boost6detail12set_tss_dataEPKvPFvPFvPvES3_ES5_S3_b",
            "no library has _ZN5boost6detail12set_tss_dataEPKvPFvPFvPvES3_ES5_S3_b",
            "compile it for the libraries that are here: "
            "pip install --force-reinstall --no-cache-dir pycuda",
        ),
        (
            "libcurand.so.10: cannot open shared object file: No such file or directory",
            "libcurand.so.10: cannot open shared object file: No such file or directory",
            "install libcurand.so.10, or add its folder to LD_LIBRARY_PATH",
        ),
    ],
)
def test_what_pycuda_misses_is_named(
    monkeypatch: pytest.MonkeyPatch, message: str, detail: str, remedy: str
) -> None:
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    broken = Broken("pycuda", ImportError(message))
    monkeypatch.setattr(sys, "meta_path", [broken, *sys.meta_path])
    monkeypatch.setattr(doctor, "missing_to_compile", lambda: {"nvcc on the PATH": "cuda-nvcc"})
    finding = doctor.try_name("pycuda")
    assert finding == Finding("pycuda", False, f"it cannot be imported: {detail}", remedy)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("error", "detail", "remedy"),
    [
        (
            ImportError("Numba needs NumPy 2.1 or less. Got NumPy 2.5."),
            "numba 0.61.0 needs numpy 2.1 or less, 2.5.2 is installed",
            "pip install --upgrade numba, or where that is not enough 'numpy==2.1.*'",
        ),
        (
            ImportError("Numba needs NumPy 1.20 or less"),
            "numba 0.61.0 needs numpy 1.20 or less, 2.5.2 is installed",
            "pip install --upgrade numba, or where that is not enough 'numpy==1.20.*'",
        ),
        (
            ImportError("Numba needs NumPy 3.1 or greater. Got NumPy 2.5."),
            "numba 0.61.0 needs numpy 3.1 or greater, 2.5.2 is installed",
            "pip install --upgrade numpy",
        ),
        (
            AttributeError("module 'numpy' has no attribute 'trapz'"),
            "numba 0.61.0 does not work with numpy 2.5.2: module 'numpy' has no attribute 'trapz'",
            "pip install --upgrade numba",
        ),
    ],
)
def test_numba_and_numpy_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, error: Exception, detail: str, remedy: str
) -> None:
    """Reinstalling numba-cuda, which sits on both, would change nothing."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("numba", "numba_cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba_cuda", ModuleType("numba_cuda"))
    monkeypatch.setattr(sys, "meta_path", [Broken("numba", error), *sys.meta_path])
    monkeypatch.setattr(metadata, "version", {"numba": "0.61.0"}.__getitem__)
    monkeypatch.setattr(np, "__version__", "2.5.2")
    assert doctor.try_name("numba-cuda") == Finding("numba-cuda", False, detail, remedy)
