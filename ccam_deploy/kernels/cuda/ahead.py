"""Kernels compiled ahead of their first launch, for GPUs that need not be here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from ccam_deploy.errors import BackendError, brief
from ccam_deploy.extras import install
from ccam_deploy.kernels.cuda.kernel_files import Code

Progress = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and what comes next."""

_ARGUMENTS_OF_ENTRY = re.compile(rb"\.nv\.constant0\.([\w$]+)")
"""The section of a cubin with the arguments of a kernel, which nothing but a kernel has."""


def compile_kernels(
    capability: str,
    dtypes: Sequence[str],
    progress: Progress = lambda share, name: None,
) -> dict[str, Code]:
    """Compile every kernel for GPUs of one compute capability.

    Args:
        capability: Such as "9.0".
        dtypes: Of features and masks, "float32" or "float16".
        progress: Called before each kernel. An exception that it raises ends the work, and is
            raised here.

    Returns:
        The kernels by the names that they are kept by.

    Raises:
        BackendError: The compiler does not work here, or does not know the compute capability.
    """
    try:
        from numba import types

        from ccam_deploy.kernels.cuda.kept import architecture_of, kept_name
        from ccam_deploy.kernels.cuda.signatures import signatures
    except ImportError as error:
        raise BackendError(
            f"numba-cuda cannot be loaded ({brief(error)}): {install('cuda')}"
        ) from error
    work = {
        kept_name(kernel, argument_types): (kernel, argument_types)
        for dtype in dtypes
        for kernel, argument_types in signatures(getattr(types, dtype)).items()
    }
    codes: dict[str, Code] = {}
    architecture = architecture_of(capability)
    for name, (kernel, argument_types) in work.items():
        progress(len(codes) / len(work), kernel.py_func.__name__)
        try:
            codes[name] = _compiled(kernel, argument_types, architecture)
        # Numba, NVVM and nvJitLink have errors of their own, most of them without public names.
        except Exception as error:
            raise BackendError(
                f"kernels cannot be compiled for compute capability {capability} here: "
                f"{brief(error)}"
            ) from error
    progress(1.0, "")
    return codes


def _compiled(
    kernel: Any, argument_types: tuple[Any, ...], architecture: tuple[int, int, str]
) -> Code:
    """Compile and link, as Numba's dispatcher does where nvJitLink is installed."""
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda, types

    signature = types.void(*argument_types)
    with _device(architecture[:2]):
        linkable, _ = cuda.compile(
            kernel.py_func,
            signature,
            device=False,
            cc=architecture,
            output="ltoir",
            abi="numba",
            launch_bounds=kernel.targetoptions["launch_bounds"],
        )
    options = LinkerOptions(arch="sm_{}{}{}".format(*architecture), link_time_optimization=True)
    cubin = bytes(Linker(ObjectCode.from_ltoir(linkable), options=options).link("cubin").code)
    (entry,) = set(_ARGUMENTS_OF_ENTRY.findall(cubin))
    return Code(entry.decode(), cooperative=False, cubin=cubin)


@contextmanager
def _device(capability: tuple[int, int]) -> Iterator[None]:
    """Let Numba find a device, which it asks what to compile a kernel's functions for.

    Numba's lock keeps other threads from compiling meanwhile.
    """
    from numba.cuda import dispatcher
    from numba.cuda.core.compiler_lock import global_compiler_lock

    found = dispatcher.get_current_device
    with global_compiler_lock:
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
        try:
            yield
        finally:
            dispatcher.get_current_device = found
