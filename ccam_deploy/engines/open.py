"""Open a bundle on a backend, the one that is named or the best that works here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from ccam_deploy.bundle.folder import Bundle
from ccam_deploy.engines.base import Engine
from ccam_deploy.engines.cuda.host_engine import HostedGraph
from ccam_deploy.engines.cuda.slots import Slots
from ccam_deploy.engines.networks import Networks
from ccam_deploy.engines.tensorrt.library import FLAVOURS
from ccam_deploy.errors import BackendError, OptionError

_MOST_THREADS = 1024
MOST_SLOTS = 64
Backend = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-cpu"]


def available() -> list[Backend]:
    """The backends that the installed packages offer, best first; a GPU may still be missing."""
    from ccam_deploy.engines import onnxruntime

    found: list[Backend] = [
        flavour for flavour, module in FLAVOURS.items() if importlib.util.find_spec(module)
    ]
    names: dict[str, Backend] = {"cuda": "onnxruntime-cuda", "cpu": "onnxruntime-cpu"}
    built_for = onnxruntime.devices()
    return found + [name for device, name in names.items() if device in built_for]


def open_networks(
    bundle: Bundle, backend: str = "auto", precision: str = "fp32", threads: int = 0, slots: int = 1
) -> Networks:
    """Load a bundle's graphs on a backend.

    backend: "auto" takes the first that works here, TensorRT where the bundle has plans for it; a
        name takes that one or fails.
    threads: threads inside an operator on a CPU; 0 lets the engine choose.
    slots: how many callers a GPU serves at a time; each takes a stream and buffers of its own.
    Raises OptionError for an unknown name, BackendError where no engine can be had.
    """
    named = next((known for known in get_args(Backend) if known == backend), None)
    if named is None:
        known = ", ".join(get_args(Backend))
        raise OptionError(f'backend "{backend}" is unknown; there are {known}')
    if not 0 <= threads <= _MOST_THREADS:
        raise OptionError(f"threads is {threads}; it must be 0 to {_MOST_THREADS}")
    if not 1 <= slots <= MOST_SLOTS:
        raise OptionError(f"slots is {slots}; it must be 1 to {MOST_SLOTS}")
    if named != "auto":
        return _open(bundle, named, precision, threads, slots)
    reasons: list[str] = []
    built = {plan.library for plan in bundle.manifest.plans}
    for candidate in available():
        if candidate in FLAVOURS and candidate not in built:
            continue
        try:
            networks = _open(bundle, candidate, precision, threads, slots)
            networks.notes = tuple(reasons)
            return networks
        except BackendError as error:
            reasons.append(f"{candidate}: {error}")
    raise BackendError("no backend works here: " + "; ".join(reasons))


def _open(bundle: Bundle, backend: Backend, precision: str, threads: int, slots: int) -> Networks:
    chosen = bundle.precision(precision)
    if backend == "tensorrt" or backend == "tensorrt-rtx":
        from ccam_deploy.engines.tensorrt.slots import tensorrt_slots

        opened = tensorrt_slots(bundle, backend, precision, slots)
        return _on_slots(opened, list(chosen.graphs), chosen.gradient_scale, backend)
    paths = {name: bundle.path(file) for name, file in chosen.graphs.items()}
    return load_networks(paths, chosen.gradient_scale, backend, threads, slots)


def load_networks(
    paths: Mapping[str, Path],
    gradient_scale: float,
    backend: Backend,
    threads: int = 0,
    slots: int = 1,
) -> Networks:
    """Load ONNX graphs by name on ONNX Runtime; see open_networks. Raises BackendError."""
    if backend == "onnxruntime-cuda":
        from ccam_deploy.engines.cuda.onnxruntime_slots import onnxruntime_slots

        return _on_slots(onnxruntime_slots(paths, slots), list(paths), gradient_scale, backend)
    from ccam_deploy.engines.onnxruntime import OnnxRuntimeEngine

    engines: dict[str, Engine] = {}
    try:
        for name, path in paths.items():
            engines[name] = OnnxRuntimeEngine(path, "cpu", threads)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    return Networks(engines, gradient_scale, backend)


def _on_slots(slots: Slots, graphs: list[str], gradient_scale: float, backend: str) -> Networks:
    """Networks whose engines take host arrays to whichever slot is free."""
    try:
        engines = {name: HostedGraph(slots, name) for name in graphs}
        return Networks(engines, gradient_scale, backend, slots)
    except BaseException:
        slots.close()
        raise
