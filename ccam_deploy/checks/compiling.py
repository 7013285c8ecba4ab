"""What pip needs to compile PyCUDA, which has no wheels."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

CUDA_HEADERS = {
    "cuda.h": "cuda-cudart-dev-13-0",
    "cudaProfiler.h": "cuda-profiler-api-13-0",
    "curand.h": "libcurand-dev-13-0",
}
"""The headers that PyCUDA includes, and the packages of NVIDIA's Debian and Ubuntu repositories
that bring them."""


def missing_to_compile() -> dict[str, str]:
    """List what is missing to compile PyCUDA.

    Returns:
        The package of Debian, Ubuntu or NVIDIA's repository for each missing thing, by its name.
    """
    missing = {}
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        missing["a C++ compiler"] = "build-essential"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing["Python.h"] = "python3-dev"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        missing["nvcc on the PATH (it is often in /usr/local/cuda/bin)"] = "cuda-nvcc-13-0"
    folder = None if nvcc is None else Path(nvcc).parent.parent / "include"
    for header, package in CUDA_HEADERS.items():
        if folder is None or not (folder / header).exists():
            missing[header] = package
    return missing
