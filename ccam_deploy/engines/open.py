"""Open a bundle on a given backend, or on the best that works here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

from ccam_deploy.bundle.folder import Bundle
from ccam_deploy.engines.base import Engine
from ccam_deploy.engines.cuda.host_engine import HostedGraph
from ccam_deploy.engines.cuda.slots import Slots
from ccam_deploy.engines.networks import Networks
from ccam_deploy.engines.tensorrt.library import FLAVOURS
from ccam_deploy.errors import BackendError, IntegrityError, OptionError

_MOST_THREADS = 1024
MOST_SLOTS = 64
Backend = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-cpu"]


def available() -> list[Backend]:
    """List the backends that the installed packages offer, best first; a GPU may be missing."""
    from ccam_deploy.engines import onnxruntime

    backends: list[Backend] = [
        flavour for flavour, module in FLAVOURS.items() if importlib.util.find_spec(module)
    ]
    devices = onnxruntime.devices()
    if "cuda" in devices:
        backends.append("onnxruntime-cuda")
    if "cpu" in devices:
        backends.append("onnxruntime-cpu")
    return backends


def open_networks(
    bundle: Bundle, backend: str = "auto", precision: str = "fp32", threads: int = 0, slots: int = 1
) -> Networks:
    """Load a bundle's graphs on a backend.

    Args:
        bundle: The bundle.
        backend: A name, or "auto" for the first that works here; TensorRT counts where the bundle
            has plans for it.
        precision: One of the bundle's, or "tf32".
        threads: Threads inside an operator on a CPU; 0 lets the engine choose.
        slots: How many callers a GPU serves at a time; each has its own stream and buffers.

    Returns:
        The networks. With "auto", their notes say why better backends do not work.

    Raises:
        OptionError: A name is unknown, or a number out of range.
        BackendError: The backend does not work here, or with "auto" none does.
        IntegrityError: The graphs have other sizes than the manifest says.
    """
    choice = _choice(backend)
    if not 0 <= threads <= _MOST_THREADS:
        raise OptionError(f"threads is {threads}; it must be 0 to {_MOST_THREADS}")
    if not 1 <= slots <= MOST_SLOTS:
        raise OptionError(f"slots is {slots}; it must be 1 to {MOST_SLOTS}")
    if choice == "auto":
        networks = _open_best(bundle, precision, threads, slots)
    else:
        networks = _open(bundle, choice, precision, threads, slots)
    try:
        _require_sizes(bundle, networks.engines["backbone"])
    except IntegrityError:
        networks.close()
        raise
    return networks


def _require_sizes(bundle: Bundle, backbone: Engine) -> None:
    """Compare the sizes in the manifest, which memory is made for, with those of the graph."""
    manifest = bundle.manifest
    expected: dict[str, tuple[int, ...]] = {
        "images": manifest.input,
        "logits": (manifest.classes,),
    }
    for index, layer in enumerate(manifest.layers):
        expected[f"feature_{index}"] = (layer.channels, layer.height, layer.width)
    found = {spec.name: spec.shape[1:] for spec in (*backbone.inputs, *backbone.outputs)}
    features = sum(name.startswith("feature_") for name in found)
    if features != len(manifest.layers):
        raise IntegrityError(
            f"the manifest of {bundle.folder} has {len(manifest.layers)} layers, its graph "
            f"{features}; export the bundle again"
        )
    for name, sizes in expected.items():
        shape = found.get(name, ())
        fits = len(shape) == len(sizes) and all(
            not isinstance(side, int) or side == size
            for side, size in zip(shape, sizes, strict=True)
        )
        if not fits:
            raise IntegrityError(
                f"the manifest of {bundle.folder} has {name} of {_by(sizes)}, its graph "
                f"{_by(shape) or 'none'}; export the bundle again"
            )


def _by(sizes: Sequence[int | str]) -> str:
    return "x".join(map(str, sizes))


def _choice(backend: str) -> Backend:
    if backend not in get_args(Backend):
        names = ", ".join(get_args(Backend))
        raise OptionError(f'backend "{backend}" is unknown; there are {names}')
    return cast(Backend, backend)


def _open_best(bundle: Bundle, precision: str, threads: int, slots: int) -> Networks:
    """Open the first backend that works; its notes say why the better ones do not."""
    built_for = {plan.library for plan in bundle.manifest.plans}
    unplanned: list[str] = []
    reasons: list[str] = []
    for backend in available():
        if backend in FLAVOURS and backend not in built_for:
            unplanned.append(f"{backend}: the bundle has no plans; ccam-deploy build makes them")
            continue
        try:
            networks = _open(bundle, backend, precision, threads, slots)
        except BackendError as error:
            reasons.append(f"{backend}: {error}")
        else:
            # Where the GPU cannot be used either, plans would be of no use.
            on_gpu = networks.slots is not None
            networks.notes = (*unplanned, *reasons) if on_gpu else tuple(reasons)
            return networks
    raise BackendError("no backend works here: " + "; ".join(reasons))


def _open(bundle: Bundle, backend: Backend, precision: str, threads: int, slots: int) -> Networks:
    graphs = bundle.precision(precision)
    if backend == "tensorrt" or backend == "tensorrt-rtx":
        from ccam_deploy.engines.tensorrt.slots import tensorrt_slots

        plan_slots = tensorrt_slots(bundle, backend, precision, slots)
        return _on_slots(plan_slots, list(graphs.graphs), graphs.gradient_scale, backend)
    paths = {name: bundle.path(file) for name, file in graphs.graphs.items()}
    return load_networks(paths, graphs.gradient_scale, backend, threads, slots, precision == "tf32")


def load_networks(
    paths: Mapping[str, Path],
    gradient_scale: float,
    backend: Backend,
    threads: int = 0,
    slots: int = 1,
    tf32: bool = False,
) -> Networks:
    """Load ONNX graphs on ONNX Runtime.

    Args:
        paths: The files by graph.
        gradient_scale: The factor of the gradient graph's input.
        backend: "onnxruntime-cpu" or "onnxruntime-cuda".
        threads: See open_networks.
        slots: See open_networks.
        tf32: Whether to run in TF32.

    Returns:
        The networks.

    Raises:
        BackendError: The backend does not work here, or has no TF32.
    """
    if backend == "onnxruntime-cuda":
        from ccam_deploy.engines.cuda.onnxruntime_slots import onnxruntime_slots

        on_device = onnxruntime_slots(paths, slots, tf32)
        return _on_slots(on_device, list(paths), gradient_scale, backend)
    if tf32:
        raise BackendError(
            "tf32 does not run on a CPU, only on NVIDIA GPUs of compute capability 8.0 or newer, "
            "with onnxruntime-cuda, tensorrt or tensorrt-rtx; use fp32 here"
        )
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
