"""TensorRT plans on a GPU; `tensorrt` and `tensorrt_rtx` alike.

Features that only one of the two has are probed for. TensorRT works on the primary context of the
first GPU wherever no other is current, as `CudaDevice` does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ccam_deploy.engines.base import TensorSpec
from ccam_deploy.engines.cuda.device import Device, DeviceTensor
from ccam_deploy.engines.tensorrt import messages
from ccam_deploy.engines.tensorrt.library import Library
from ccam_deploy.engines.tensorrt.runtime_cache import RuntimeCache
from ccam_deploy.errors import BackendError

ProfileName = Literal["latency", "throughput"]

_TYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "BOOL": "bool"}
_MOST_CONTEXTS = 64


class SharedPlan:
    """A plan in device memory, which all slots of the process share.

    Attributes:
        name: The file's name.
        flavour: Which TensorRT built it.
        profiles: The names of its optimisation profiles.
        inputs: See DeviceGraph.
        outputs: See DeviceGraph.
    """

    def __init__(self, library: Library, path: Path, capability: str, writes: bool = True) -> None:
        """Load a plan; call this inside of Device.current.

        Args:
            library: The version of TensorRT that built the plan.
            path: The plan's file.
            capability: The GPU's compute capability, such as "8.9".
            writes: Whether what TensorRT-RTX compiles is kept in a file beside the plan.

        Raises:
            BackendError: TensorRT cannot load it here; the message has its reason.
        """
        self.name = path.name
        self.flavour = library.flavour
        self._trt = trt = library.module
        self._writes = writes
        self._lock = threading.Lock()
        self._log = messages.logger(trt)
        self._recorder = self.new_recorder()
        self._runtime = trt.Runtime(self._log)
        # Without a driver the runtime may be an empty shell, which no method call survives.
        if self._log.first_error:
            raise BackendError(f"{library.flavour} cannot run here: {self._log.first_error}")
        self._runtime.error_recorder = self._recorder
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise self._recorder.error(f"{library.flavour} cannot load {path.name}")
        self._compiled = RuntimeCache(path, capability)
        self._config = self._context_options()
        self.profiles = get_args(ProfileName)[: self._engine.num_optimization_profiles]
        self.inputs, self.outputs = self._tensors()

    @property
    def compiles(self) -> bool:
        """Whether kernels are compiled where the plan runs, as TensorRT-RTX does."""
        return hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy")

    def index(self, profile: ProfileName) -> int:
        """Find the number of a profile.

        Args:
            profile: The profile's name.

        Returns:
            Its index in the plan.

        Raises:
            BackendError: The plan does not have it.
        """
        if profile not in self.profiles:
            raise BackendError(
                f"{self.name} has no profile for {profile}, only for {', '.join(self.profiles)}; "
                "build it with a larger --max-batch"
            )
        return self.profiles.index(profile)

    def limits(self, profile: ProfileName) -> dict[str, int]:
        """The largest size of each axis that varies."""
        limits: dict[str, int] = {}
        for spec in self.inputs:
            shapes = self._engine.get_tensor_profile_shape(spec.name, self.index(profile))
            for axis, size in zip(spec.shape, shapes[-1], strict=True):
                if isinstance(axis, str):
                    limits[axis] = min(int(size), limits.get(axis, int(size)))
        return limits

    def scratch_bytes(self, profile: ProfileName) -> int:
        """How much memory a run needs beside its tensors."""
        return int(self._engine.get_device_memory_size_for_profile_v2(self.index(profile)))

    def context(self) -> Any:
        """A new execution context, whose memory its user provides."""
        with self._lock:
            context = self._engine.create_execution_context(self._config)
        if context is None:
            raise self._recorder.error(f"{self.flavour} cannot prepare {self.name} to run")
        return context

    def new_recorder(self) -> Any:
        """A recorder of TensorRT's errors; see `messages.recorder`."""
        return messages.recorder(self._trt)

    def keep_compiled(self) -> None:
        """Write what TensorRT-RTX has compiled for this plan to the file beside it, if it may."""
        if self.compiles and self._writes:
            self._compiled.keep()

    def close(self) -> None:
        """Keep what was compiled, and free the plan, after its graphs are closed."""
        self.keep_compiled()
        self._config = self._engine = self._runtime = None

    def _context_options(self) -> Any:
        """The argument that creates contexts: a strategy, or an object that holds it and more."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.compiles:
            return strategy
        kernels = self._trt.DynamicShapesKernelSpecializationStrategy
        # TensorRT-RTX compiles kernels for each shape. It must do so at once: kernels that are
        # swapped later would change results, and a captured graph would miss them. StreamRunner
        # captures the CUDA graphs. Slots share the compiled kernels through the cache.
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED
        if not self._compiled.attach(config):
            raise self._recorder.error(f"{self.flavour} takes no cache for {self.name}")
        self._recorder.clear()  # it may hold why an older cache was refused
        return config

    def _tensors(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        for name in names:
            if engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
                raise BackendError(f'{self.name} takes "{name}" from host memory; build it again')
            dtype = engine.get_tensor_dtype(name).name
            if dtype not in _TYPES:
                raise BackendError(f'{self.name} has "{name}" in {dtype}, not {", ".join(_TYPES)}')
            shape = tuple(
                _axis_name(name, names) if size == -1 else int(size)
                for size in engine.get_tensor_shape(name)
            )
            mode = engine.get_tensor_mode(name)
            group = inputs if mode == self._trt.TensorIOMode.INPUT else outputs
            group.append(TensorSpec(name, np.dtype(_TYPES[dtype]), shape))
        return tuple(inputs), tuple(outputs)


class PlanGraph:
    """A plan with one profile on a device; see DeviceGraph.

    Each set of addresses and shapes has its own execution context, because a captured graph is
    valid only while its context does not change.
    """

    def __init__(
        self, plan: SharedPlan, device: Device, scratch: int, profile: ProfileName = "latency"
    ) -> None:
        """Prepare to run; call this inside of Device.current.

        Args:
            plan: The plan.
            device: The device that it was loaded on.
            scratch: The address of `plan.scratch_bytes(profile)` bytes on that device. Graphs that
                run one after the other on its stream may share them.
            profile: The optimisation profile.
        """
        self.inputs, self.outputs = plan.inputs, plan.outputs
        self.limits: Mapping[str, int] = plan.limits(profile)
        self._device = device
        self._new_context = partial(_Context, plan, profile, scratch, device.stream)
        self._contexts: dict[tuple[DeviceTensor, ...], _Context] = {}

    replays_itself = False

    @property
    def capturable(self) -> bool:
        """See DeviceGraph."""
        return all(context.capturable for context in self._contexts.values())

    def bind(self, tensors: Mapping[str, DeviceTensor]) -> Callable[[], None]:
        """See DeviceGraph. Contexts are kept by their tensors already."""
        return partial(self.launch, dict(tensors))

    def launch(self, tensors: Mapping[str, DeviceTensor]) -> None:
        """See DeviceGraph."""
        bound = tuple(_checked(spec, tensors) for spec in self.inputs + self.outputs)
        context = self._contexts.pop(bound, None) or self._new_context(tensors)
        self._contexts[bound] = context
        if len(self._contexts) > _MOST_CONTEXTS:
            self._contexts.pop(next(iter(self._contexts)))
        context.launch()
        self._device.hold(context)

    def close(self) -> None:
        """See DeviceGraph."""
        self._contexts.clear()


class _Context:
    """An execution context on some tensors, which it keeps."""

    def __init__(
        self,
        plan: SharedPlan,
        profile: ProfileName,
        scratch: int,
        stream: int,
        tensors: Mapping[str, DeviceTensor],
    ) -> None:
        self._plan = plan
        self._stream = stream
        self._recorder = plan.new_recorder()
        self._context = plan.context()
        self._context.error_recorder = self._recorder
        index, size = plan.index(profile), plan.scratch_bytes(profile)
        if index and not self._context.set_optimization_profile_async(index, stream):
            raise self._error(f"cannot take the profile for {profile}")
        if size:
            self._context.set_device_memory(scratch, size)
        for spec in plan.inputs:
            shape = tensors[spec.name].shape
            if not self._context.set_input_shape(spec.name, shape):
                raise self._error(f'does not take "{spec.name}" of shape {list(shape)}')
            self._bind(spec.name, tensors[spec.name])
        for spec in plan.outputs:
            written = tuple(self._context.get_tensor_shape(spec.name))
            shape = tensors[spec.name].shape
            if shape != written:
                raise BackendError(
                    f'{plan.name} writes "{spec.name}" of shape {list(written)}, '
                    f"there is room for {list(shape)}"
                )
            self._bind(spec.name, tensors[spec.name])

    @property
    def capturable(self) -> bool:
        """Whether launches may be captured, after the first one."""
        probe = getattr(self._context, "is_stream_capturable", None)
        return True if probe is None else bool(probe(self._stream))

    def launch(self) -> None:
        """Put a run on the stream."""
        if not self._context.execute_async_v3(self._stream):
            raise self._error("cannot run")

    def _bind(self, name: str, tensor: DeviceTensor) -> None:
        if not self._context.set_tensor_address(name, tensor.address):
            raise self._error(f'does not take the memory of "{name}"')

    def _error(self, problem: str) -> BackendError:
        error: BackendError = self._recorder.error(
            f"{self._plan.flavour}: {self._plan.name} {problem}"
        )
        return error


def _axis_name(tensor: str, tensors: Sequence[str]) -> str:
    """The name of the axis that varies, which plans do not keep.

    In a graph that takes masks, or feature maps for the head, all tensors but the images have a row
    for each of them.
    """
    by_mask = "masks" in tensors or "features" in tensors
    return "masks" if by_mask and tensor != "images" else "batch"


def _checked(spec: TensorSpec, tensors: Mapping[str, DeviceTensor]) -> DeviceTensor:
    tensor = tensors.get(spec.name)
    if tensor is None:
        raise BackendError(f'tensor "{spec.name}" is missing')
    if tensor.dtype != spec.dtype:
        raise BackendError(f'tensor "{spec.name}" is {tensor.dtype}, the plan has {spec.dtype}')
    return tensor
