"""A kernel and a machine, for tests of compiled code that need no GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from numba import cuda, types
from numba.cuda import dispatcher

from ccam_deploy.kernels.cuda import kept
from ccam_deploy.kernels.cuda.collectives import Array
from ccam_deploy.kernels.cuda.kernel_files import CodeFolder

ARGUMENTS = (types.float32[::1], types.int64)
HERE = "8.9"


def double(values: Array, count: int) -> None:
    """A kernel that compiles quickly."""
    place = cuda.threadIdx.x
    if place < count:
        values[place] *= 2


class Machine:
    """A machine whose device is only named.

    folder: of its user.   store: of the process that runs now.   refuses: whether the driver
    refuses code.   compiled: how often Numba compiled a kernel.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.store = kept.KernelStore(CodeFolder(folder))
        self.refuses = False
        self.compiled = 0

    def process(self) -> Any:
        """A new process: its store, and the kernel as it is declared there."""
        self.store = kept.KernelStore(CodeFolder(self.folder))
        return kept.kernel(double)

    def run(self) -> bytes:
        """The machine code that a new process launches."""
        kernel = self.process().compile(ARGUMENTS)
        assert kernel.argument_types == ARGUMENTS
        return bytes(kernel.library.get_cubin().code)

    def files(self) -> list[Path]:
        assert self.folder is not None
        return sorted(self.folder.iterdir())


def named_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Let Numba compile for a device that is not here, on a machine whose user has that folder."""
    found = Machine(folder)
    device = SimpleNamespace(compute_capability=(8, 9))
    context = SimpleNamespace(device=device)
    monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: device)
    monkeypatch.setattr("numba.cuda.cudadrv.devices.get_context", lambda: context)
    monkeypatch.setattr(kept, "store", lambda: found.store)
    compile_cuda = dispatcher.compile_cuda

    def compiling(function: Any, *others: Any, **options: Any) -> Any:
        found.compiled += 1
        return compile_cuda(function, *others, **options)

    def bind(kernel: Any) -> None:
        cubin = kernel.library.get_cubin()
        if found.refuses and not hasattr(kernel, "target_context"):  # as for those that were kept
            raise RuntimeError(f"no kernel image for {cubin}")

    monkeypatch.setattr(dispatcher, "compile_cuda", compiling)
    monkeypatch.setattr(dispatcher._Kernel, "bind", bind)
    return found
