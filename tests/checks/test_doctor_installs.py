"""The doctor's lines for packages that are missing, or whose import fails."""

from __future__ import annotations

import sys

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
