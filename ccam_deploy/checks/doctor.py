"""Find out which backends work here, and what to do first about each that does not.

Every check imports the library and runs something small with it, in a fresh process, so that even a
library that crashes yields a line. `python -m ccam_deploy.checks.doctor NAME`
is that process.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np

from ccam_deploy.checks.compiling import missing_to_compile
from ccam_deploy.checks.imports import import_trouble
from ccam_deploy.checks.probe_graph import tiny_graph
from ccam_deploy.engines import onnxruntime
from ccam_deploy.engines.onnxruntime import Device
from ccam_deploy.engines.tensorrt import library
from ccam_deploy.engines.tensorrt.library import Flavour, Library
from ccam_deploy.errors import BackendError, brief
from ccam_deploy.extras import REPLACE_ONNXRUNTIME, Extra, install

PARTS = ("driver", "pycuda", "numba-cuda")
NEEDS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime-cpu": (),
    "onnxruntime-cuda": PARTS,
    "tensorrt": PARTS,
    "tensorrt-rtx": PARTS,
}
"""The backends, and the parts that each needs besides its own library."""

_OLDEST = (7, 5)
_MAJOR, _MINOR = 75, 76
_COMPILED_FOR = (8, 0)
_NO_DEVICE, _MISMATCH = 100, 803
_PATIENCE = 300


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: The backend or part.
        works: Whether it can be used.
        detail: One line that describes it, or says what is wrong with it.
        remedy: What to do first; empty where it works.
    """

    name: str
    works: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Gpu:
    """The first GPU and its driver.

    Attributes:
        name: As the driver calls it.
        capability: Its compute capability, major and minor.
        cuda: The CUDA version that the driver supports, major and minor.
    """

    name: str
    capability: tuple[int, int]
    cuda: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"{self.name}, compute capability {_dotted(self.capability)}, "
            f"driver for CUDA {_dotted(self.cuda)}"
        )


class TroubleError(Exception):
    """A check failed.

    Attributes:
        detail: What is wrong.
        remedy: The one thing to do first.
    """

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.remedy = remedy


def examine(
    examiner: Callable[[str], Finding] | None = None,
) -> tuple[list[Finding], list[Finding]]:
    """Try all backends and the parts that they need.

    Args:
        examiner: Tries one name; by default in a fresh process.

    Returns:
        The findings of the backends and those of the parts.
    """
    examine_name = examiner or in_fresh_process
    parts = {name: examine_name(name) for name in PARTS}
    return [_with_needs(examine_name(name), parts) for name in NEEDS], list(parts.values())


def _with_needs(backend: Finding, parts: Mapping[str, Finding]) -> Finding:
    """A backend's finding, or that of a broken part it needs; the driver comes before all else."""
    broken = [parts[need] for need in NEEDS[backend.name] if not parts[need].works]
    if not broken or (not backend.works and broken[0].name != "driver"):
        return backend
    first = broken[0]
    detail = f"{backend.detail}; {first.name}: {first.detail}"
    return Finding(backend.name, False, detail, first.remedy)


def in_fresh_process(name: str) -> Finding:
    """Try one name in a fresh process, which may crash or hang."""
    command = [sys.executable, "-m", __name__, name]
    again = f"reinstall it: pip install --force-reinstall {_package(name)}"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"it did not answer in {_PATIENCE} s", again)
    if done.returncode < 0:
        return Finding(name, False, f"it crashed with signal {-done.returncode}", again)
    try:
        return Finding(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        last = done.stderr.strip().splitlines()[-1:] or ["it gave no answer"]
        return Finding(name, False, last[0], again)


def try_name(name: str) -> Finding:
    """Try one backend or part in this process; any exception becomes the finding."""
    try:
        return Finding(name, True, _CHECKS[name]())
    except TroubleError as trouble:
        return Finding(name, False, trouble.detail, trouble.remedy)
    except Exception as error:
        words = f"{type(error).__name__}: {brief(error)}"
        again = f"reinstall it: pip install --force-reinstall {_package(name)}"
        return Finding(name, False, words, again)


def _package(name: str) -> str:
    """The distribution that a name is part of."""
    known = {"onnxruntime-cpu": "onnxruntime", "onnxruntime-cuda": "onnxruntime-gpu"}
    return known.get(name, name)


def _import(module: str, name: str, extra: Extra) -> Any:
    """Import a module. Raises TroubleError where it is missing, or misses something itself."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, AttributeError) as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and missing == module.split(".")[0]:
            raise TroubleError("it is not installed", install(extra)) from error
        raise TroubleError(*import_trouble(error, _package(name))) from error


def _version(*distributions: str) -> str:
    """Names and versions of the distributions that are installed."""
    versions = []
    for name in distributions:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(versions)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _driver() -> str:
    """Describe the first GPU. Raises TroubleError where the kernels do not run on it."""
    gpu = _gpu()
    if gpu.capability < _OLDEST:
        raise TroubleError(str(gpu), f"use a GPU of compute capability {_dotted(_OLDEST)} or newer")
    return str(gpu)


def _gpu() -> Gpu:
    """Ask the driver's own library for the first GPU. Raises TroubleError where there is none."""
    file = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(file)
    except OSError as error:
        raise TroubleError(
            f"there is no NVIDIA driver ({file})",
            "install the NVIDIA driver, on a machine with an NVIDIA GPU",
        ) from error
    status = cuda.cuInit(0)
    if status == _NO_DEVICE:
        raise TroubleError(
            "the driver sees no GPU",
            "check CUDA_VISIBLE_DEVICES, or the --gpus option of the container",
        )
    if status == _MISMATCH:
        raise TroubleError(
            "the driver's library and its kernel module differ in version",
            "restart the machine, or give the container the host's driver",
        )
    if status:
        raise TroubleError(
            f"cuInit failed with error {status}",
            "run nvidia-smi, which may say more; reinstall the driver",
        )
    version, device, major, minor = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(256)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Gpu(
        name.value.decode(errors="replace"),
        (major.value, minor.value),
        (version.value // 1000, version.value % 1000 // 10),
    )


def _usable_gpu() -> Gpu | None:
    """The first GPU, or None where no kernel can run."""
    try:
        gpu = _gpu()
    except TroubleError:
        return None
    return gpu if gpu.capability >= _OLDEST else None


def _pycuda() -> str:
    """Take the primary context through PyCUDA, and some memory."""
    try:
        driver = _import("pycuda.driver", "pycuda", "gpu")
    except TroubleError as trouble:
        missing = missing_to_compile()
        if trouble.remedy != install("gpu") or not missing:
            raise
        raise TroubleError(
            f"{trouble.detail}, and pip cannot compile it without {', '.join(missing)}",
            f"apt-get install {' '.join(missing.values())}, then {trouble.remedy}",
        ) from trouble
    version = _version("pycuda")
    if _usable_gpu() is None:
        return f"{version}; no GPU to try it on"
    driver.init()
    context = driver.Device(0).retain_primary_context()
    context.push()
    try:
        driver.mem_alloc(256).free()
    finally:
        driver.Context.pop()
    return version


def _numba_cuda() -> str:
    """Compile a kernel, and run it where there is a GPU."""
    _import("numba_cuda", "numba-cuda", "cuda")
    cuda = _import("numba.cuda", "numba-cuda", "cuda")
    version = _version("numba-cuda")
    if importlib.import_module("numba.core.config").ENABLE_CUDASIM:
        raise TroubleError(f"{version}, but it simulates GPUs", "unset NUMBA_ENABLE_CUDASIM")

    def double(values: Any) -> None:
        place = cuda.grid(1)
        if place < values.size:
            values[place] *= 2

    if _usable_gpu() is None:
        cuda.compile_ptx(double, "void(float32[:])", cc=_COMPILED_FOR)
        return f"{version} compiles kernels; no GPU to run them on"
    values = cuda.to_device(np.arange(4, dtype=np.float32))
    cuda.jit(double)[1, 32](values)
    if values.copy_to_host().tolist() != [0, 2, 4, 6]:
        raise TroubleError(f"{version} computes wrong values", "update the NVIDIA driver")
    return version


def _onnxruntime(backend: str) -> str:
    """Run a graph of one operator on the provider that was asked for."""
    device: Device = "cpu" if backend == "onnxruntime-cpu" else "cuda"
    again = f"reinstall it: pip install --force-reinstall {_package(backend)}"
    runtime = _import("onnxruntime", backend, "cpu" if device == "cpu" else "gpu-onnxruntime")
    version = _version("onnxruntime", "onnxruntime-gpu") or f"onnxruntime {runtime.__version__}"
    if device not in onnxruntime.devices():
        raise TroubleError(
            f"{version} was built without {onnxruntime.PROVIDERS[device]}",
            REPLACE_ONNXRUNTIME,
        )
    try:
        session = onnxruntime.open_session(tiny_graph(), device)
    except BackendError as error:
        libraries = (
            f"install the CUDA and cuDNN that it was built for: {install('gpu-onnxruntime')}"
        )
        remedy = again if device == "cpu" else libraries
        raise TroubleError(f"{version}: {error}", remedy) from error
    (values,) = session.run(None, {"x": np.array([-1, 2], np.float32)})
    if values.tolist() != [0, 2]:
        raise TroubleError(f"{version} computes wrong values", again)
    return version


def _tensorrt(flavour: Flavour) -> str:
    """Make a builder; where there is a GPU, build a plan of one operator and open it."""
    extra: Extra = "rtx" if flavour == "tensorrt-rtx" else "gpu"
    trt = _import(library.FLAVOURS[flavour], flavour, extra)
    version = f"{flavour} {trt.__version__}"
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    if builder is None or not builder:
        raise TroubleError(f"{version} cannot make a builder", "update the NVIDIA driver")
    gpu = _usable_gpu()
    if gpu is None:
        return f"{version} builds plans; no GPU to run them on"
    if reason := Library(flavour, trt).why_not_on(_dotted(gpu.capability)):
        raise TroubleError(reason, "use another backend on this GPU: onnxruntime-cuda or tensorrt")
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    plan = None
    if parser.parse(tiny_graph()):
        plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise TroubleError(
            f"{version} cannot build for this GPU",
            f"use a GPU and a driver that {flavour} {trt.__version__} supports",
        )
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None or engine.create_execution_context() is None:
        raise TroubleError(
            f"{version} cannot open a plan that it built", "update the NVIDIA driver"
        )
    return version


_CHECKS: Mapping[str, Callable[[], str]] = {
    "driver": _driver,
    "pycuda": _pycuda,
    "numba-cuda": _numba_cuda,
    "onnxruntime-cpu": partial(_onnxruntime, "onnxruntime-cpu"),
    "onnxruntime-cuda": partial(_onnxruntime, "onnxruntime-cuda"),
    "tensorrt": partial(_tensorrt, "tensorrt"),
    "tensorrt-rtx": partial(_tensorrt, "tensorrt-rtx"),
}


def main() -> None:
    """Try the name that is the process's argument; print the finding as JSON."""
    print(json.dumps(vars(try_name(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
