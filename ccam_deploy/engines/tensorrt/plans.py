"""TensorRT plans: a bundle's graphs, built for certain GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccam_deploy.engines.tensorrt import messages, progress
from ccam_deploy.engines.tensorrt.library import Library
from ccam_deploy.engines.tensorrt.timing_cache import TimingCache
from ccam_deploy.errors import BackendError, OptionError

Shape = tuple[int, ...]
DEFAULT_MAX_BATCH = 8
_OPTIMUM_MASKS = 24
_LARGEST_MASKS = 64


@dataclass(frozen=True)
class Profile:
    """The sizes that a plan is tuned for.

    Attributes:
        name: Its name.
        batch: The smallest, the most likely and the largest number of images.
        masks: The same of masks.
    """

    name: str
    batch: tuple[int, int, int]
    masks: tuple[int, int, int]

    def sizes(self, axis: str) -> tuple[int, int, int]:
        """The sizes of a graph's dynamic axis, by the name that the export gave it."""
        return self.masks if axis == "masks" else self.batch


def profiles(max_batch: int) -> tuple[Profile, ...]:
    """A profile for one image and, where `max_batch` is larger, another for up to that many.

    Raises:
        OptionError: `max_batch` is below 1.
    """
    if max_batch < 1:
        raise OptionError(f"max_batch is {max_batch}; it must be at least 1")
    largest = max(_LARGEST_MASKS, max_batch)
    latency = Profile("latency", (1, 1, 1), (1, _OPTIMUM_MASKS, largest))
    if max_batch == 1:
        return (latency,)
    return latency, Profile("throughput", (1, max_batch, max_batch), (1, largest, largest))


def build_plan(
    library: Library,
    graph: Path,
    tuned_for: Sequence[Profile],
    devices: Sequence[str],
    timings: TimingCache | None = None,
    report: progress.Report = lambda share, phase: None,
    tf32: bool = False,
) -> bytes:
    """Build one ONNX graph into a plan.

    Args:
        library: The TensorRT that builds.
        graph: The ONNX file.
        tuned_for: The optimisation profiles.
        devices: Compute capabilities, from `Library.targets`.
        timings: Read, and extended by what the build measures.
        report: Called often while TensorRT builds. An exception that it raises, or
            KeyboardInterrupt, ends the build and is raised here.
        tf32: Whether products of float32 may round their factors to 10 bits of mantissa.

    Returns:
        The plan, as its file holds it.

    Raises:
        BackendError: TensorRT rejects the graph; the message has its reason.
    """
    trt = library.module
    log, monitor = messages.logger(trt), progress.monitor(trt, report)
    builder = trt.Builder(log)
    if builder is None:
        raise log.error(f"{library.flavour} cannot build here")
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        reasons = [problem.desc() for problem in map(parser.get_error, range(parser.num_errors))]
        raise BackendError(f"{library.flavour} rejects {graph.name}: {'; '.join(reasons[:2])}")
    config = builder.create_builder_config()
    _aim_at(library, config, devices)
    if tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # which is set by default
    if (flag := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        config.set_flag(flag)  # without it, TensorRT-RTX may allocate in a run that is captured
    for profile in tuned_for:
        _add_profile(builder, config, network, profile)
    if timings is not None:
        timings.attach(config, log)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    for failure in (log.failure, monitor.failure):
        if failure is not None:
            raise failure
    if plan is None:
        raise log.error(f"{library.flavour} cannot build {graph.name}")
    if timings is not None:
        timings.keep(config)
    return bytes(plan)


def _network_flags(trt: Any) -> int:
    """Strongly typed: the types in the ONNX graph hold. Newer versions know no other networks."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _aim_at(library: Library, config: Any, devices: Sequence[str]) -> None:
    known = library.capabilities
    if not known:
        return
    config.num_compute_capabilities = len(devices)
    for index, device in enumerate(devices):
        if not config.set_compute_capability(known[device], index):
            raise BackendError(f"{library.flavour} refuses to build for {', '.join(devices)}")


def _add_profile(builder: Any, config: Any, network: Any, profile: Profile) -> None:
    """Give each axis that varies its sizes; the export named it "batch" or "masks"."""
    added = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = [
            (size, size, size) if size >= 0 else profile.sizes(tensor.get_dimension_name(axis))
            for axis, size in enumerate(tensor.shape)
        ]
        added.set_shape(tensor.name, *zip(*sizes, strict=True))
    if config.add_optimization_profile(added) < 0:
        raise BackendError(f"TensorRT refuses the optimisation profile {profile}")
