"""Kernels whose compiled code outlives the process.

Numba's own cache is not used: it does not see changes of functions that a kernel calls from other
files, unpickles what it reads, and fails where a file is damaged or no folder can be written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import cuda
from numba.cuda.core import config

from ccam_deploy.kernels.cuda.kernel_files import (
    Code,
    CodeFolder,
    source_digest,
    unpack,
    user_folder,
)

_LINKING = "lto", "link"
"""Options of the compiler that do not change what a kernel computes."""


class KernelStore:
    """Compiled kernels of other processes, for this one.

    Attributes:
        compiled: How many kernels this process has compiled.
        found: How many it has found compiled.
    """

    def __init__(self, folder: CodeFolder) -> None:
        """Begin with a folder, and without bundles.

        Args:
            folder: Where kernels that this process compiles are kept.
        """
        self.folder = folder
        self.compiled = 0
        self.found = 0
        self._files: dict[str, list[Path]] = {}
        self._codes: dict[Path, dict[str, Code]] = {}

    def offer(self, file: Path, capability: str) -> None:
        """Let kernels be taken from a bundle's file, which was verified.

        Args:
            file: Written by `pack`, from the sources that run here; it is read when needed.
            capability: Of the GPUs that it is for, such as "9.0".
        """
        files = self._files.setdefault(capability, [])
        if file not in files:
            files.append(file)

    def find(self, name: str, capability: str) -> Code | None:
        """Find a kernel's code in the bundles and in the folder."""
        for file in self._files.get(capability, ()):
            code = self._contents(file).get(name)
            if code is not None:
                return code
        return self.folder.read(name, capability)

    def _contents(self, file: Path) -> dict[str, Code]:
        if file not in self._codes:
            try:
                self._codes[file] = unpack(file.read_bytes())
            except OSError:  # the bundle was replaced or removed
                self._codes[file] = {}
        return self._codes[file]


@cache
def store() -> KernelStore:
    """The store of this process, which all of its kernels share."""
    return KernelStore(CodeFolder(user_folder(config.CACHE_DIR, source_digest())))


def kernel(function: Callable[..., None], most_threads: int = 0) -> Any:
    """Declare a kernel, as `numba.cuda.jit` does, whose compiled code is kept.

    Args:
        function: The kernel, in the Python that Numba compiles.
        most_threads: The most threads of a block, so many that the compiler must be told to leave
            each of them enough registers; 0 where it need not.
    """
    bounds = {"launch_bounds": most_threads} if most_threads and not config.ENABLE_CUDASIM else {}
    declared = cuda.jit(**bounds)(function)
    if hasattr(declared, "_cache"):  # Numba's simulator compiles nothing
        declared._cache = _KeptKernel(function, declared.targetoptions)
    return declared


class _KeptKernel:
    """What Numba's dispatcher asks before it compiles a kernel, and tells afterwards."""

    cache_path = None

    def __init__(self, function: Callable[..., None], options: dict[str, Any]) -> None:
        self._function = function
        self._options = {key: options[key] for key in sorted(options) if key not in _LINKING}

    def load_overload(self, signature: Any, context: Any) -> Any:
        """A kernel for some types on the current GPU; None where it must be compiled."""
        capability = present_capability()
        code = store().find(self.name(signature), capability)
        if code is None:
            return None
        try:
            loaded = _rebuilt(code, signature, capability)
            loaded.bind()
        # The driver refuses the code, or another Numba puts it together in another way; whatever
        # the reason is, compiling it here helps, or tells.
        except Exception:
            return None
        store().found += 1
        return loaded

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep a kernel that was compiled for some types on the current GPU."""
        store().compiled += 1
        if not compiled.launch_config_sensitive:  # which is right for one size of the grid alone
            name = self.name(signature)
            store().folder.write(name, present_capability(), code_of(compiled))

    def name(self, signature: Any) -> str:
        """A name that no other function, types or options share."""
        types = ", ".join(map(str, _argument_types(signature)))
        function = f"{self._function.__module__}.{self._function.__qualname__}"
        return f"{function.rpartition('cuda.')[2]}({types}) {self._options}"

    def enable(self) -> None:
        """Do nothing: it is always enabled."""

    def disable(self) -> None:
        """Do nothing: it is always enabled."""

    def flush(self) -> None:
        """Do nothing: other processes may use the files."""


def kept_name(declared: Any, types: tuple[Any, ...]) -> str:
    """The name by which a kernel is kept, for arguments of some types."""
    name: str = declared._cache.name(types)
    return name


def code_of(compiled: Any, architecture: tuple[int, int, str] | None = None) -> Code:
    """The machine code of a compiled kernel.

    Args:
        compiled: Numba's object.
        architecture: What to compile for; None for the current GPU.
    """
    cubin = compiled.library.get_cubin(cc=architecture)
    return Code(compiled.entry_name, bool(compiled.cooperative), bytes(cubin.code))


def architecture_of(capability: str) -> tuple[int, int, str]:
    """What Numba compiles for on GPUs of a compute capability such as "9.0"."""
    major, minor = map(int, capability.split("."))
    return major, minor, "a" if major >= 9 else ""


def present_capability() -> str:
    """The compute capability of the current GPU, such as "9.0"."""
    from numba.cuda.cudadrv import devices

    major, minor = devices.get_context().device.compute_capability
    return f"{major}.{minor}"


def _rebuilt(code: Code, signature: Any, capability: str) -> Any:
    """Numba's object for a kernel, as it is where Numba has compiled it."""
    from cuda.core import ObjectCode
    from numba import types
    from numba.cuda.codegen import CUDACodeLibrary
    from numba.cuda.dispatcher import _Kernel

    cubin = ObjectCode.from_cubin(code.cubin, name=code.entry)
    library = CUDACodeLibrary._rebuild(
        codegen=None,
        name=code.entry,
        entry_name=code.entry,
        llvm_strs=[],
        ptx_cache={},
        cubin_cache={architecture_of(capability): cubin},
        linkerinfo_cache={},
        max_registers=None,
        nvvm_options={},
        needs_cudadevrt=False,
        nrt=False,
        use_cooperative=code.cooperative,
        lto=False,
    )
    return _Kernel._rebuild(
        cooperative=code.cooperative,
        name=code.entry,
        signature=types.void(*_argument_types(signature)),
        codelibrary=library,
        debug=False,
        lineinfo=False,
        call_helper=None,
        extensions=[],
    )


def _argument_types(signature: Any) -> tuple[Any, ...]:
    from numba.cuda.core import sigutils

    types, _ = sigutils.normalize_signature(signature)
    return tuple(types)
