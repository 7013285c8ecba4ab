"""Compiled kernels are kept for the next process, and never served where they may be wrong.

No GPU is needed: Numba compiles for a device that is only named, and nothing is launched.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba.cuda")

from numba import types
from numba.cuda import dispatcher

from ccam_deploy.kernels import cuda as package
from ccam_deploy.kernels.cuda import kept, kernel_files
from ccam_deploy.kernels.cuda.kernel_files import Code, digest_of, pack, unpack
from ccam_deploy.kernels.cuda.signatures import signatures
from tests.bundles import Bundles
from tests.damage import flip, full_disk
from tests.engines.cuda.launched import launched
from tests.kernels.declared import ARGUMENTS, HERE, Machine, double
from tests.kernels.simulated_device import simulator


def test_a_kernel_is_compiled_once(machine: Machine) -> None:
    first = machine.run()
    assert (machine.store.compiled, machine.store.found) == (1, 0)
    (file,) = machine.files()
    assert "double-8.9-" in file.name
    again = machine.run()
    assert (machine.store.compiled, machine.store.found) == (0, 1)
    assert machine.compiled == 1
    assert again == first
    assert first.startswith(b"\x7fELF")


def test_other_types_and_options_are_other_kernels(machine: Machine) -> None:
    machine.run()
    machine.process().compile((types.float64[::1], types.int64))
    assert machine.compiled == 2
    assert len(machine.files()) == 2
    names = [
        kept._KeptKernel(double, options).name(ARGUMENTS)
        for options in ({"opt": True, "lto": True}, {"opt": True, "lto": False}, {"opt": False})
    ]
    assert names[0] == names[1] != names[2]


def test_another_device_has_code_of_its_own(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.run()
    monkeypatch.setattr(kept, "present_capability", lambda: "9.0")
    assert kept.present_capability() != HERE
    assert machine.store.find(kept.kept_name(machine.process(), ARGUMENTS), "9.0") is None
    machine.process().compile(ARGUMENTS)
    assert machine.compiled == 2


@pytest.mark.parametrize("size", [0, 10, 40, 500, 5000])
def test_a_cut_file_is_replaced(machine: Machine, size: int) -> None:
    machine.run()
    (file,) = machine.files()
    file.write_bytes(file.read_bytes()[:size])
    code = machine.run()
    assert machine.compiled == 2
    assert machine.run() == code
    assert machine.compiled == 2


@pytest.mark.parametrize("offset", [0, 30, 60, -1])
def test_a_changed_file_is_replaced(machine: Machine, offset: int) -> None:
    machine.run()
    (file,) = machine.files()
    flip(file, offset)
    machine.run()
    assert machine.compiled == 2
    machine.run()
    assert machine.compiled == 2


def test_code_that_the_driver_refuses_is_replaced(machine: Machine) -> None:
    machine.run()
    machine.refuses = True
    machine.run()
    assert (machine.compiled, machine.store.found) == (2, 0)


def _nowhere(machine: Machine) -> None:
    machine.folder = None


def _a_file_in_the_way(machine: Machine) -> None:
    assert machine.folder is not None
    machine.folder.parent.mkdir()
    machine.folder.touch()


def _a_folder_without_a_place(machine: Machine) -> None:
    machine.folder = Path("/proc/no such place")


@pytest.mark.parametrize("spoil", [_nowhere, _a_file_in_the_way, _a_folder_without_a_place])
def test_a_folder_that_cannot_be_written_is_silent(
    machine: Machine, spoil: Callable[[Machine], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Warnings are errors in tests, so there was none either."""
    spoil(machine)
    machine.run()
    machine.run()
    assert machine.compiled == 2
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_silent(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    process = machine.process()
    with full_disk(100):
        process.compile(ARGUMENTS)
    assert machine.compiled == 1
    assert not machine.files()
    assert capfd.readouterr() == ("", "")


def test_a_bundle_goes_before_the_folder(machine: Machine, tmp_path: Path) -> None:
    machine.run()
    name = kept.kept_name(machine.process(), ARGUMENTS)
    theirs = Code("entry", False, b"their code")
    file = tmp_path / "8.9.kernels"
    file.write_bytes(pack({name: theirs}))
    store = machine.store
    store.offer(file, HERE)
    assert store.find(name, HERE) == theirs
    mine = store.find("another name", HERE)
    assert mine is None
    file.unlink()
    assert store.find(name, HERE) == theirs, "a file is read once"


def test_a_bundle_that_is_gone_is_silent(machine: Machine, tmp_path: Path) -> None:
    kernel = machine.process()
    machine.store.offer(tmp_path / "gone", HERE)
    kernel.compile(ARGUMENTS)
    assert machine.compiled == 1


def test_any_source_changes_the_digest() -> None:
    """Also a source whose functions kernels of other files call."""
    sources, versions = kernel_files._sources(), kernel_files.compiler_versions()
    assert {f"{module.name}.py" for module in pkgutil.iter_modules(package.__path__)} < set(sources)
    whole = digest_of(sources, versions)
    assert kernel_files.source_digest() == whole
    changed = {digest_of(sources | {name: b"changed"}, versions) for name in sources}
    renamed = digest_of({f"x{name}": text for name, text in sources.items()}, versions)
    others = {whole, *changed, renamed, digest_of(sources, versions + "0")}
    assert len(others) == len(sources) + 3
    assert digest_of({}, versions) == ""


def test_versions_name_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.import_module("numba_cuda").__version__
    assert f"numba-cuda {version}" in kernel_files.compiler_versions()
    monkeypatch.setattr(kernel_files, "_COMPILERS", ("numba-cuda", "no-such-package"))
    assert kernel_files.compiler_versions() == ""


def test_the_digest_chooses_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kernel_files.user_folder
    one, other = "1" * 64, "2" * 64
    assert folder(str(tmp_path), one) == tmp_path / "ccam-deploy" / f"kernels-{one[:16]}"
    assert folder(str(tmp_path), one) != folder(str(tmp_path), other)
    assert folder(str(tmp_path), "") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder("", one) == folder(str(tmp_path / "xdg"), one)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder("", one) == folder(str(tmp_path / ".cache"), one)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert folder("", one) is None


def test_files_hold_what_was_packed() -> None:
    codes = {"a": Code("entry", True, bytes(range(256))), "b": Code("other", False, b"")}
    assert unpack(pack(codes)) == codes
    assert unpack(b"") == {}
    assert unpack(pack(codes) + b"x") == {}


def _declared() -> Iterator[Any]:
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, dispatcher.CUDADispatcher) and not value.targetoptions["device"]:
                yield value


def test_every_kernel_is_kept_and_has_its_types_listed() -> None:
    declared = set(_declared())
    assert len(declared) > 15
    assert all(isinstance(kernel._cache, kept._KeptKernel) for kernel in declared)
    for dtype in (types.float32, types.float16):
        assert set(signatures(dtype)) == declared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [pytest.param("fp32", "float32", marks=pytest.mark.nightly), ("fp16", "float16")],
)
def test_kernels_are_launched_with_the_types_listed(
    bundles: Bundles, precision: str, dtype: str
) -> None:
    with simulator() as pool:
        seen = pool.submit(launched, bundles.get("pocket"), precision).result()
    found = {
        (name, tuple(dispatcher.typeof(value, dispatcher.Purpose.argument) for value in values))
        for name, values in seen
    }
    listed = {(k.py_func.__name__, t) for k, t in signatures(getattr(types, dtype)).items()}
    # Some are for larger layers, or for the other type. `gather` copies rows in words of 8 bytes,
    # but for odd sizes such as this small network's.
    assert {name for name, _ in listed - found} <= {"cast", "gather", "merge", "relink"}
    assert {name for name, _ in found - listed} <= {"gather"}
