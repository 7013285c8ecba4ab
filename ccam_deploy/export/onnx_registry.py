"""The operators that PyTorch's ONNX exporter knows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from ccam_deploy.export.program import quiet


@contextmanager
def shared_registry() -> Iterator[None]:
    """Let all conversions use one registry of ONNX operators: to build one takes a second.

    The registry is no public part of PyTorch; where it is not as it was, each builds its own.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        original = ONNXRegistry.__dict__["from_torchlib"]
    except (ImportError, KeyError):
        yield
        return
    build = ONNXRegistry.from_torchlib
    defaults = signature(build).parameters

    def shared(**options: Any) -> Any:
        values = {name: options.get(name, default.default) for name, default in defaults.items()}
        return _registry(build, **values)

    type.__setattr__(ONNXRegistry, "from_torchlib", staticmethod(shared))
    try:
        yield
    finally:
        type.__setattr__(ONNXRegistry, "from_torchlib", original)


@functools.cache
def _registry(build: Callable[..., Any], **options: Any) -> Any:
    with quiet():  # it warns of each operator of torchvision where that is not installed
        return build(**options)


def registered_operators() -> frozenset[str] | None:
    """Names of the ATen operators that have a conversion; None where PyTorch does not tell."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        with shared_registry():
            return frozenset(map(str, ONNXRegistry.from_torchlib().functions))
    except (ImportError, AttributeError):
        return None
