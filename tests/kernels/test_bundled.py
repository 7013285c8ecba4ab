"""Kernels are compiled into a bundle without a GPU, recorded there, and found when it is loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("numba.cuda")

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import (
    Bundle,
    digest_without_plans,
    read_bundle,
    unlisted_files,
    write_manifest,
)
from ccam_deploy.engines import open_networks
from ccam_deploy.errors import BackendError, BundleError, IntegrityError, ManifestError
from ccam_deploy.kernels.cuda import ahead, bundled, kept, signatures
from ccam_deploy.kernels.cuda.ahead import compile_kernels
from ccam_deploy.kernels.cuda.bundled import add_kernels, offer_kernels
from ccam_deploy.kernels.cuda.kernel_files import Code, source_digest, unpack
from tests.damage import flip, full_disk
from tests.kernels.declared import ARGUMENTS, Machine


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return read_bundle(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Stand-ins instead of machine code; the calls that asked for them."""
    calls: list[tuple[str, list[str]]] = []

    def stand_in(capability: str, dtypes: list[str], progress: ahead.Progress) -> dict[str, Code]:
        calls.append((capability, dtypes))
        return {"a kernel": Code("entry", False, f"{capability} {len(calls)}".encode())}

    monkeypatch.setattr(bundled, "compile_kernels", stand_in)
    return calls


def test_kernels_are_recorded_and_kept(bundle: Bundle, compiled: list[Any]) -> None:
    before = bundle.manifest
    first = add_kernels(bundle, ["8.9", "12.0"])
    assert compiled == [("8.9", ["float32"]), ("12.0", ["float32"])]
    assert first.fresh
    assert [code.device for code in first.kernels] == ["8.9", "12.0"]
    assert {code.source for code in first.kernels} == {source_digest()}
    assert read_bundle(bundle.folder) == first.bundle
    assert not unlisted_files(first.bundle)
    for code in first.kernels:
        content = unpack(first.bundle.path(code.file).read_bytes())
        assert content["a kernel"].cubin.startswith(code.device.encode())
    again = add_kernels(first.bundle, ["12.0"])
    assert not again.fresh
    assert again.kernels == first.kernels[1:]
    assert len(compiled) == 2
    assert digest_without_plans(first.bundle.manifest) == digest_without_plans(before)


def test_kernels_of_other_sources_are_replaced(
    bundle: Bundle, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = add_kernels(bundle, ["8.9", "12.0"])
    monkeypatch.setattr(bundled, "source_digest", lambda: "1" * 64)
    second = add_kernels(first.bundle, ["8.9"])
    assert second.fresh
    found = read_bundle(bundle.folder)
    assert sorted((code.device, code.source[:2]) for code in found.manifest.compiled) == [
        ("12.0", source_digest()[:2]),
        ("8.9", "11"),
    ]
    assert not unlisted_files(found)
    assert len(list((bundle.folder / "kernels").iterdir())) == 2
    assert add_kernels(second.bundle, ["8.9"], force=True).fresh


def test_a_bundle_with_half_precision_has_kernels_of_both(
    headed_bundle: Path, tmp_path: Path, compiled: list[Any]
) -> None:
    folder = shutil.copytree(headed_bundle, tmp_path / "headed")
    add_kernels(read_bundle(folder), ["8.9"])
    assert compiled == [("8.9", ["float16", "float32"])]


def test_lost_kernels_are_left_out_and_changed_ones_refused(
    bundle: Bundle, compiled: list[Any]
) -> None:
    first = add_kernels(bundle, ["8.9", "12.0"])
    path, other = (first.bundle.path(code.file) for code in first.kernels)
    flip(path, -1)
    with pytest.raises(IntegrityError, match=r"8\.9-.*after the export; remove it and build it"):
        read_bundle(bundle.folder)
    path.unlink()
    assert [code.device for code in read_bundle(bundle.folder).manifest.compiled] == ["12.0"]
    other.unlink()
    left = read_bundle(bundle.folder).manifest
    assert left.files == bundle.manifest.files
    assert replace(left, digest="") == replace(bundle.manifest, digest="")


def test_the_manifest_must_list_the_file(bundle: Bundle, compiled: list[Any]) -> None:
    made = add_kernels(bundle, ["8.9"]).bundle
    (code,) = made.manifest.compiled
    files = {name: record for name, record in made.manifest.files.items() if name != code.file}
    write_manifest(made.folder, replace(made.manifest, files=files))
    with pytest.raises(ManifestError, match="which is not among the files"):
        read_bundle(made.folder)


def test_a_full_disk_leaves_the_bundle_as_it_was(bundle: Bundle, compiled: list[Any]) -> None:
    with full_disk(50), pytest.raises(BundleError, match="cannot write the kernels: "):
        add_kernels(bundle, ["8.9"])
    assert read_bundle(bundle.folder) == bundle
    assert not unlisted_files(bundle)
    assert not (bundle.folder / "kernels").exists()


def test_a_machine_without_a_cache_runs_what_was_compiled_elsewhere(
    machine: Machine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled by Numba and linked, for a device that is not here, and found by its name."""
    machine.folder = None
    kernel = machine.process()
    monkeypatch.setattr(signatures, "signatures", lambda dtype: {kernel: ARGUMENTS})
    steps: list[tuple[float, str]] = []
    made = add_kernels(
        bundle, ["8.9"], progress=lambda title, share, name: steps.append((share, name))
    ).bundle
    assert steps == [(0.0, "double"), (1.0, "")]
    kernel = machine.process()
    offer_kernels(read_bundle(made.folder))
    loaded = kernel.compile(ARGUMENTS)
    assert (machine.compiled, machine.store.found) == (0, 1)
    (code,) = unpack(made.path(made.manifest.compiled[0].file).read_bytes()).values()
    assert bytes(loaded.library.get_cubin().code) == code.cubin
    assert loaded.entry_name.encode() in code.cubin
    assert code.cubin.startswith(b"\x7fELF")


def test_kernels_of_other_sources_are_not_offered(
    machine: Machine, bundle: Bundle, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.process()
    made = add_kernels(bundle, ["8.9"]).bundle
    monkeypatch.setattr(bundled, "source_digest", lambda: "1" * 64)
    offer_kernels(made)
    assert machine.store.find("a kernel", "8.9") is None


def test_loading_for_a_gpu_offers_the_kernels(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[Bundle] = []
    networks = open_networks(bundle, "onnxruntime-cpu")
    monkeypatch.setattr("ccam_deploy.explainer.offer_kernels", offered.append)
    monkeypatch.setattr("ccam_deploy.explainer.open_networks", lambda *options: networks)
    with ccam.load(bundle):
        assert offered == []
    monkeypatch.setattr(networks, "slots", SimpleNamespace(close=lambda: None))
    with ccam.load(bundle):
        assert offered == [bundle]


def test_an_unknown_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"^kernels cannot be compiled for .* 3\.0 here: "):
        compile_kernels("3.0", ["float32"])


def test_the_compiler_is_left_as_it_was(machine: Machine) -> None:
    from numba.cuda import dispatcher

    before = dispatcher.get_current_device
    with pytest.raises(BackendError):
        compile_kernels("3.0", ["float32"])
    assert dispatcher.get_current_device is before


@pytest.mark.nightly
@pytest.mark.slow
def test_every_kernel_is_compiled() -> None:
    codes = compile_kernels("12.0", ["float16"])
    assert len({code.entry for code in codes.values()}) == len(codes) > 15
    from numba import types

    listed = signatures.signatures(types.float16).items()
    assert set(codes) == {kept.kept_name(kernel, arguments) for kernel, arguments in listed}
