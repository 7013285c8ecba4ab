"""The installed TensorRT, and the GPUs that it builds for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ccam_deploy.errors import BackendError, OptionError, brief
from ccam_deploy.extras import Extra, install

Flavour = Literal["tensorrt", "tensorrt-rtx"]

FLAVOURS: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
TITLES: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
TURING = "7.5"
_OLDEST = {"fp8": ("8.9", "int8"), "tf32": ("8.0", "fp32")}
"""The precisions that older GPUs lack: the oldest compute capability, and what to use before."""


@dataclass(frozen=True)
class Library:
    """An installed TensorRT.

    Attributes:
        flavour: Which of the two packages it is.
        module: The package; typed as Any, because it may be either.
    """

    flavour: Flavour
    module: Any

    @property
    def title(self) -> str:
        """Its name as NVIDIA writes it."""
        return TITLES[self.flavour]

    @property
    def version(self) -> str:
        """The version of the package; a plan runs on no other."""
        return str(self.module.__version__)

    @property
    def capabilities(self) -> dict[str, Any]:
        """The compute capabilities that can be built for without a GPU, by name such as "8.9".

        Empty for a library that builds only for the GPU of this machine.
        """
        known = getattr(self.module, "ComputeCapability", None)
        members = {} if known is None else known.__members__
        return {
            f"{name[2:-1]}.{name[-1]}": value
            for name, value in members.items()
            if name.startswith("SM")
        }

    @property
    def times_kernels(self) -> bool:
        """Whether building measures kernels, so that a timing cache saves time.

        A library that builds without a GPU cannot measure any.
        """
        return not self.capabilities

    def why_not_on(self, capability: str) -> str:
        """Say that plans do not run on a GPU, though TensorRT-RTX would build some there.

        Newer GPUs than the newest that it knows are supported; TensorRT names none, it builds for
        the GPU that is here.

        Args:
            capability: The GPU's compute capability, such as "8.9".

        Returns:
            A sentence; empty where the library runs on the GPU.
        """
        known = list(self.capabilities)
        if not known or capability in known or _version(capability) > max(map(_version, known)):
            return ""
        return (
            f"{self.flavour} {self.version} does not run on compute capability {capability}, "
            f"only on {', '.join(known)} and newer"
        )

    def targets(self, devices: Sequence[str], precision: str = "fp32") -> tuple[str, ...]:
        """Resolve the compute capabilities to build for.

        Args:
            devices: Such as "8.9"; empty for all that the library supports, from 8.0 on. Turing,
                "7.5", has no float32 matrix products in TensorRT-RTX, so it must be asked for.
            precision: FP8 needs 8.9 or newer, TF32 8.0.

        Returns:
            The compute capabilities, in ascending order.

        Raises:
            OptionError: The library or the precision does not support one.
            BackendError: The library needs a GPU, and there is none.
        """
        known = self.capabilities
        if not known:
            here = present_device()
            if any(device != here for device in devices):
                raise OptionError(f"{self.flavour} builds for the GPU that is here, {here}, alone")
            devices = (here,)
            known = {here: None}
        for device in devices:
            if device not in known:
                raise OptionError(
                    f"{self.flavour} does not support compute capability {device}; "
                    f"it supports {', '.join(known)}"
                )
            if reason := why_without(device, precision):
                raise OptionError(reason)
        usual = [d for d in known if d != TURING and not why_without(d, precision)]
        return tuple(device for device in known if device in (devices or usual))


def why_without(device: str, precision: str) -> str:
    """Say what a GPU lacks for a precision.

    Args:
        device: Its compute capability, such as "8.9".
        precision: A precision.

    Returns:
        A sentence with what to use; empty where the GPU has the precision.
    """
    if precision not in _OLDEST:
        return ""
    oldest, substitute = _OLDEST[precision]
    if _version(device) >= _version(oldest):
        return ""
    return (
        f"compute capability {device} has no {precision.upper()}, which {oldest} and newer have; "
        f"use {substitute}"
    )


def _version(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def present_device() -> str:
    """Find the compute capability of the first GPU.

    Returns:
        Major and minor number, such as "8.9".

    Raises:
        BackendError: There is no GPU.
    """
    try:
        from numba import cuda

        device: Any = cuda.get_current_device()
        major, minor = device.compute_capability
    except Exception as error:
        raise BackendError(f"no NVIDIA GPU was found: {brief(error)}") from error
    return f"{major}.{minor}"


def load_library(flavour: Flavour) -> Library:
    """Import a flavour of TensorRT.

    Args:
        flavour: One of FLAVOURS.

    Returns:
        The library.

    Raises:
        BackendError: It is not installed.
    """
    try:
        return Library(flavour, importlib.import_module(FLAVOURS[flavour]))
    except ImportError as error:
        extra: Extra = "rtx" if flavour == "tensorrt-rtx" else "gpu"
        raise BackendError(f"{flavour} is not installed ({error}): {install(extra)}") from error
