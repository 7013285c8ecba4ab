"""Which backends work here, and what to do first about each that does not.

Nothing is guessed: every check imports the library and runs something small with it, in a process
of its own, so that even a library that crashes gives one line. Run as
`python -m ccam_deploy.checks.doctor NAME`, this module is that process.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np

from ccam_deploy.checks.probe_graph import tiny_graph
from ccam_deploy.engines import onnxruntime
from ccam_deploy.engines.onnxruntime import Device
from ccam_deploy.engines.tensorrt import library
from ccam_deploy.engines.tensorrt.library import Flavour
from ccam_deploy.errors import BackendError, brief

PARTS = ("driver", "pycuda", "numba-cuda")
NEEDS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime-cpu": (),
    "onnxruntime-cuda": PARTS,
    "tensorrt": PARTS,
    "tensorrt-rtx": PARTS,
}
"""The backends, and what each needs beside its own library."""

_OLDEST = (7, 5)
_MAJOR, _MINOR = 75, 76
_COMPILED_FOR = (8, 0)
_NO_DEVICE, _MISMATCH = 100, 803
_PATIENCE = 300


@dataclass(frozen=True)
class Finding:
    """What a check found. found: one line.   remedy: what to do first; empty where it works."""

    name: str
    works: bool
    found: str
    remedy: str = ""


class TroubleError(Exception):
    """A check failed. found: what is wrong.   remedy: the one thing to do first."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.found = found
        self.remedy = remedy


def examine(
    check: Callable[[str], Finding] | None = None,
) -> tuple[list[Finding], list[Finding]]:
    """Try everything. Returns the backends' findings and those of the parts they need.

    check: how one name is tried; in a process of its own by default.
    """
    tried = check or in_own_process
    parts = {name: tried(name) for name in PARTS}
    return [_with_needs(tried(name), parts) for name in NEEDS], list(parts.values())


def _with_needs(own: Finding, parts: Mapping[str, Finding]) -> Finding:
    """A backend's finding, where what it needs is missing too: the driver is the first of all."""
    broken = [parts[need] for need in NEEDS[own.name] if not parts[need].works]
    if not broken or (not own.works and broken[0].name != "driver"):
        return own
    first = broken[0]
    return Finding(own.name, False, f"{own.found}; {first.name}: {first.found}", first.remedy)


def in_own_process(name: str) -> Finding:
    """Try one name in a fresh process, which may crash or hang."""
    command = [sys.executable, "-m", __name__, name]
    again = f"reinstall it: pip install --force-reinstall {_package(name)}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"it did not answer in {_PATIENCE} s", again)
    if done.returncode < 0:
        return Finding(name, False, f"it crashed with signal {-done.returncode}", again)
    try:
        return Finding(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        last = done.stderr.strip().splitlines()[-1:] or ["it gave no answer"]
        return Finding(name, False, last[0], again)


def try_one(name: str) -> Finding:
    """Try one backend or part in this process. Whatever is raised becomes the finding."""
    try:
        return Finding(name, True, _CHECKS[name]())
    except TroubleError as trouble:
        return Finding(name, False, trouble.found, trouble.remedy)
    except Exception as error:
        words = f"{type(error).__name__}: {brief(error)}"
        again = f"reinstall it: pip install --force-reinstall {_package(name)}"
        return Finding(name, False, words, again)


def _package(name: str) -> str:
    """The distribution that a name is part of."""
    known = {"onnxruntime-cpu": "onnxruntime", "onnxruntime-cuda": "onnxruntime-gpu"}
    return known.get(name, name)


def _import(module: str, name: str, extra: str) -> Any:
    """Import a module. Raises TroubleError where it is missing, or misses something itself."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and missing == module.split(".")[0]:
            raise TroubleError(
                "it is not installed", f"pip install 'ccam-deploy[{extra}]'"
            ) from error
        library = re.search(r"[\w.+-]+\.so[.\d]*|[\w.+-]+\.dll", str(error))
        if library and "cannot open shared object" in str(error):
            remedy = f"install {library[0]}, or name its folder in LD_LIBRARY_PATH"
        else:
            remedy = f"reinstall it: pip install --force-reinstall {_package(name)}"
        raise TroubleError(f"it cannot be imported: {brief(error)}", remedy) from error


def _version(*distributions: str) -> str:
    """Names and versions of those that are installed."""
    found = []
    for name in distributions:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _driver() -> str:
    """The driver and the first GPU, through the driver's own library."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        raise TroubleError(
            f"there is no NVIDIA driver ({library})",
            "install the NVIDIA driver, on a machine with an NVIDIA GPU",
        ) from error
    status = cuda.cuInit(0)
    if status == _NO_DEVICE:
        raise TroubleError(
            "the driver sees no GPU",
            "let this process see one: CUDA_VISIBLE_DEVICES, or the container's --gpus option",
        )
    if status == _MISMATCH:
        raise TroubleError(
            "the driver's library is not of the version of its kernel module",
            "restart the machine, or give the container the host's driver",
        )
    if status:
        raise TroubleError(
            f"cuInit failed with error {status}", "see what nvidia-smi says; reinstall the driver"
        )
    version, device, major, minor = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(256)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    capability = major.value, minor.value
    found = (
        f"{name.value.decode(errors='replace')}, compute capability {major.value}.{minor.value}, "
        f"driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    )
    if capability < _OLDEST:
        raise TroubleError(found, "use a GPU of compute capability 7.5 or newer")
    return found


def _has_gpu() -> bool:
    try:
        _driver()
    except TroubleError:
        return False
    return True


def _pycuda() -> str:
    """Take the primary context through PyCUDA, and some memory."""
    driver = _import("pycuda.driver", "pycuda", "gpu")
    found = _version("pycuda")
    if not _has_gpu():
        return f"{found}; no GPU to try it on"
    driver.init()
    context = driver.Device(0).retain_primary_context()
    context.push()
    try:
        driver.mem_alloc(256).free()
    finally:
        driver.Context.pop()
    return found


def _numba_cuda() -> str:
    """Compile a kernel, and run it where there is a GPU."""
    _import("numba_cuda", "numba-cuda", "cuda")
    cuda = _import("numba.cuda", "numba-cuda", "cuda")
    found = _version("numba-cuda")
    if importlib.import_module("numba.core.config").ENABLE_CUDASIM:
        raise TroubleError(f"{found}, but it simulates GPUs", "unset NUMBA_ENABLE_CUDASIM")

    def double(values: Any) -> None:
        place = cuda.grid(1)
        if place < values.size:
            values[place] *= 2

    if not _has_gpu():
        cuda.compile_ptx(double, "void(float32[:])", cc=_COMPILED_FOR)
        return f"{found} compiles kernels; no GPU to run them on"
    values = cuda.to_device(np.arange(4, dtype=np.float32))
    cuda.jit(double)[1, 32](values)
    if values.copy_to_host().tolist() != [0, 2, 4, 6]:
        raise TroubleError(f"{found} computes nonsense", "update the NVIDIA driver")
    return found


def _onnxruntime(backend: str) -> str:
    """Run a graph of one operator on the provider, and see that it was that provider."""
    device: Device = "cpu" if backend == "onnxruntime-cpu" else "cuda"
    again = f"reinstall it: pip install --force-reinstall {_package(backend)}"
    runtime = _import("onnxruntime", backend, "cpu" if device == "cpu" else "gpu")
    found = _version("onnxruntime", "onnxruntime-gpu") or f"onnxruntime {runtime.__version__}"
    if device not in onnxruntime.devices():
        raise TroubleError(
            f"{found} was built without {onnxruntime.PROVIDERS[device]}",
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu",
        )
    try:
        session = onnxruntime.open_session(tiny_graph(), device)
    except BackendError as error:
        libraries = "install the CUDA and cuDNN that it was built for, where the loader finds them"
        raise TroubleError(f"{found}: {error}", again if device == "cpu" else libraries) from error
    (values,) = session.run(None, {"x": np.array([-1, 2], np.float32)})
    if values.tolist() != [0, 2]:
        raise TroubleError(f"{found} computes nonsense", again)
    return found


def _tensorrt(flavour: Flavour) -> str:
    """Make a builder; where there is a GPU, build a plan of one operator and open it."""
    extra = "rtx" if flavour == "tensorrt-rtx" else "gpu"
    trt = _import(library.FLAVOURS[flavour], flavour, extra)
    found = f"{flavour} {trt.__version__}"
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    if builder is None or not builder:
        raise TroubleError(f"{found} cannot make a builder", "update the NVIDIA driver")
    if not _has_gpu():
        return f"{found} builds plans; no GPU to run them on"
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    plan = None
    if parser.parse(tiny_graph()):
        plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise TroubleError(
            f"{found} cannot build for this GPU",
            f"use a GPU and a driver that {flavour} {trt.__version__} supports",
        )
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None or engine.create_execution_context() is None:
        raise TroubleError(f"{found} cannot open a plan that it built", "update the NVIDIA driver")
    return found


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
    found = try_one(sys.argv[1])
    print(json.dumps(vars(found)), flush=True)


if __name__ == "__main__":
    main()
