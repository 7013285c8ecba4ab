"""The package's extras, and the command that adds some to an installation."""

from __future__ import annotations

from typing import Literal

Extra = Literal[
    "cpu",
    "cuda",
    "demo",
    "export",
    "gpu",
    "gpu-onnxruntime",
    "imagenet",
    "peers",
    "plot",
    "proposals",
    "rtx",
    "sanity",
    "scale",
    "scenes",
    "serve",
    "sign",
    "xrai",
    "zoo",
]
"""The extras that an error may ask for."""

REPLACE_ONNXRUNTIME = (
    "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'ccam-deploy[gpu-onnxruntime]'"
)
"""What gives ONNX Runtime CUDA where the package for CPUs, whose files it shares, may be."""


def install(*extras: Extra) -> str:
    """Give the command that adds extras.

    pip finds the package in the environment, be it installed from a checkout or from a wheel, so
    this needs neither the sources nor an index that has the package.
    """
    return f"pip install 'ccam-deploy[{','.join(extras)}]'"
