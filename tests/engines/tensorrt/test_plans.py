"""TensorRT plans. TensorRT-RTX builds without a GPU, so its builder judges the graphs here."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ccam_deploy.bundle.folder import digest_without_plans, read_bundle, unlisted_files
from ccam_deploy.bundle.manifest import PrecisionName
from ccam_deploy.engines.tensorrt import library, plans
from ccam_deploy.engines.tensorrt.build import BuildSettings, build
from ccam_deploy.engines.tensorrt.select import fitting_plans
from ccam_deploy.errors import BackendError, BundleError, IntegrityError, OptionError

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def rtx() -> library.Library:
    return library.load_library("tensorrt-rtx")


@pytest.fixture
def folder(digits_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(digits_bundle, tmp_path / "digits")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_graph_becomes_a_plan(
    folder: Path, rtx: library.Library, precision: PrecisionName
) -> None:
    told: dict[str, list[tuple[float, str]]] = {}

    def progress(what: str, share: float, phase: str) -> None:
        told.setdefault(what, []).append((share, phase))

    done = build(read_bundle(folder), rtx, precision, BuildSettings(4, ("8.9",)), progress)
    made = done.bundle
    assert done.fresh
    assert list(told) == [f"{g} ({precision})" for g in ("backbone", "gradient", "classifier")]
    for steps in told.values():
        shares = [share for share, _ in steps]
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0, 1)
        assert len({phase for _, phase in steps}) > 3
    graphs = made.precision(precision).graphs
    assert [plan.graph for plan in made.manifest.plans] == list(graphs)
    assert done.plans == made.manifest.plans
    for plan in made.manifest.plans:
        assert plan.devices == ("8.9",)
        assert plan.version == rtx.version
        assert plan.source == made.manifest.files[graphs[plan.graph]].sha256
        assert made.manifest.files[plan.file].bytes == made.path(plan.file).stat().st_size > 1000
    assert not unlisted_files(made)
    fitting = fitting_plans(made, "tensorrt-rtx", rtx.version, "8.9", precision, 4)
    assert tuple(fitting.values()) == done.plans


@pytest.mark.slow
def test_a_plan_with_the_same_key_is_replaced(folder: Path, rtx: library.Library) -> None:
    first = build(read_bundle(folder), rtx, "fp32", BuildSettings(4, ("8.6",)))
    second = build(first.bundle, rtx, "fp32", BuildSettings(2, ("8.6",)))
    assert [plan.max_batch for plan in second.bundle.manifest.plans] == [2, 2, 2]
    other = build(second.bundle, rtx, "fp32", BuildSettings(2, ("12.0",)))
    assert len(other.bundle.manifest.plans) == 6
    assert not unlisted_files(other.bundle)
    assert len(list((folder / "plans").iterdir())) == 2


def test_plans_that_fit_are_kept(
    folder: Path, rtx: library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def fake(library: library.Library, graph: Path, *others: object) -> bytes:
        built.append(graph.stem)
        return f"{graph.stem} {len(built)}".encode()

    monkeypatch.setattr(plans, "build_plan", fake)
    settings = BuildSettings(4, ("8.9", "8.6"))
    first = build(read_bundle(folder), rtx, "fp32", settings)
    assert (first.fresh, len(built)) == (True, 3)
    assert first.plans[0].devices == ("8.6", "8.9")
    for same in (settings, BuildSettings(4, ("8.6", "8.9", "8.9"))):
        again = build(first.bundle, rtx, "fp32", same)
        assert (again.fresh, len(built)) == (False, 3)
        assert (again.plans, again.bundle) == (first.plans, first.bundle)
    forced = build(first.bundle, rtx, "fp32", BuildSettings(4, ("8.6", "8.9"), force=True))
    assert (forced.fresh, len(built)) == (True, 6)
    assert len(forced.bundle.manifest.plans) == 3
    assert len(list((folder / "plans").iterdir())) == 1
    assert not unlisted_files(forced.bundle)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1.0"},
        {"devices": ("8.6",)},
        {"source": "0" * 64},
        {"weights": "0" * 64},
        {"max_batch": 2},
        {"library": "tensorrt"},
        {"precision": "fp16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_plans_that_do_not_fit_are_built_anew(
    folder: Path, rtx: library.Library, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(plans, "build_plan", lambda library, graph, *others: graph.name.encode())
    settings = BuildSettings(4, ("8.9",))
    made = build(read_bundle(folder), rtx, "fp32", settings).bundle
    first, *others = made.manifest.plans
    altered = replace(made.manifest, plans=(replace(first, **change), *others))
    assert build(replace(made, manifest=altered), rtx, "fp32", settings).fresh


def test_a_full_disk_leaves_the_bundle_as_it_was(
    folder: Path, rtx: library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = read_bundle(folder)
    monkeypatch.setattr(plans, "build_plan", lambda library, graph, *others: graph.name.encode())
    monkeypatch.setattr("ccam_deploy.engines.tensorrt.build.write_manifest", full)
    with pytest.raises(BundleError, match="cannot write the plans: No space left on device"):
        build(before, rtx, "fp32", BuildSettings(4, ("8.9",)))
    assert read_bundle(folder) == before
    assert not unlisted_files(before)


@pytest.mark.parametrize("lost", ["backbone.plan", ""], ids=["one", "all"])
def test_lost_plans_are_built_again(
    folder: Path, rtx: library.Library, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """No graph is lost with them, so the bundle is as good as it was before they were built."""
    monkeypatch.setattr(plans, "build_plan", lambda library, graph, *others: graph.name.encode())
    settings = BuildSettings(4, ("8.9",))
    before = read_bundle(folder)
    made = build(before, rtx, "fp32", settings).bundle
    (place,) = (folder / "plans").iterdir()
    shutil.rmtree(place / lost) if not lost else (place / lost).unlink()
    left = read_bundle(folder)
    kept = {plan.graph for plan in left.manifest.plans}
    assert kept == ({"gradient", "classifier"} if lost else set())
    without = digest_without_plans(before.manifest)
    assert digest_without_plans(left.manifest) == without
    assert digest_without_plans(made.manifest) == without
    again = build(left, rtx, "fp32", settings)
    assert again.fresh
    found = read_bundle(folder).manifest
    assert again.bundle.manifest == found
    assert (set(found.plans), found.files) == (set(made.manifest.plans), made.manifest.files)


@pytest.mark.slow
def test_a_changed_plan_is_not_read(folder: Path, rtx: library.Library) -> None:
    made = build(read_bundle(folder), rtx, "fp32", BuildSettings(1, ("8.9",))).bundle
    path = made.path(made.manifest.plans[0].file)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="was changed after the export; remove it and build"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            BuildSettings(4, ("8.9", "9.9")),
            r"does not support compute capability 9\.9; it supports 7\.5, ",
        ),
        (BuildSettings(0), "max_batch is 0; it must be at least 1"),
        (
            BuildSettings(timing_cache=Path("times.bin")),
            r"tensorrt-rtx has no timing cache, it measures nothing while it builds; leave "
            r"times\.bin out",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_and_nothing_is_left(
    folder: Path, rtx: library.Library, settings: BuildSettings, message: str
) -> None:
    before = read_bundle(folder)
    with pytest.raises(OptionError, match=message):
        build(before, rtx, "fp32", settings)
    assert read_bundle(folder) == before
    assert not unlisted_files(before)


def test_a_rejected_graph_is_named(rtx: library.Library, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x08no graph")
    with pytest.raises(BackendError, match=r"tensorrt-rtx (rejects|cannot build) broken\.onnx"):
        plans.build_plan(rtx, broken, plans.profiles(1), ["8.9"])


def test_what_a_report_raises_ends_the_build(rtx: library.Library, digits_bundle: Path) -> None:
    """TensorRT itself would print it and go on."""
    told: list[str] = []

    def broken(share: float, phase: str) -> None:
        told.append(phase)
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    graph = digits_bundle / "classifier.onnx"
    with pytest.raises(BrokenPipeError):
        plans.build_plan(rtx, graph, plans.profiles(1), ["8.9"], report=broken)
    assert len(told) == 1


def test_profiles_for_latency_and_throughput() -> None:
    latency, throughput = plans.profiles(8)
    assert (latency.name, latency.batch) == ("latency", (1, 1, 1))
    assert (throughput.name, throughput.batch) == ("throughput", (1, 8, 8))
    assert latency.sizes("masks")[2] >= 40
    assert throughput.sizes("batch") == (1, 8, 8)
    assert len(plans.profiles(1)) == 1
    assert plans.profiles(100)[1].masks[2] == 100
    with pytest.raises(OptionError, match="max_batch is 0"):
        plans.profiles(0)


def test_all_capabilities_are_the_default(rtx: library.Library) -> None:
    """But for Turing, on which the library has no float32 matrix products."""
    assert {"7.5", "8.6", "8.9", "12.0"} <= set(rtx.capabilities)
    assert rtx.targets(()) == tuple(d for d in rtx.capabilities if d != "7.5")
    assert rtx.targets(("7.5",)) == ("7.5",)
    assert rtx.targets(("8.9", "8.6", "8.9")) == ("8.6", "8.9")


def test_fp8_is_built_for_gpus_that_have_it(rtx: library.Library) -> None:
    chosen = rtx.targets((), "fp8")
    assert {"8.9", "12.0"} <= set(chosen)
    assert not {"7.5", "8.0", "8.6"} & set(chosen)
    assert rtx.targets(("8.6",), "int8") == ("8.6",)
    with pytest.raises(
        OptionError, match=r"^compute capability 8\.6 has no FP8, which 8\.9 and new"
    ):
        rtx.targets(("8.9", "8.6"), "fp8")


def test_tf32_is_built_for_gpus_that_have_it(rtx: library.Library) -> None:
    assert rtx.targets((), "tf32") == rtx.targets(())
    with pytest.raises(OptionError, match=r"^compute capability 7\.5 has no TF32, which 8\.0 and"):
        rtx.targets(("7.5", "8.9"), "tf32")


@pytest.mark.slow
def test_tf32_makes_another_plan_of_the_same_graph(
    rtx: library.Library, digits_bundle: Path
) -> None:
    def contents(tf32: bool) -> bytes:
        graph = digits_bundle / "backbone.onnx"
        return plans.build_plan(rtx, graph, plans.profiles(1), ["8.9"], tf32=tf32)

    assert contents(False) != contents(True)


def test_plans_of_tf32_stand_beside_those_of_fp32(
    folder: Path, rtx: library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, bool]] = []

    def fake(library: library.Library, graph: Path, *others: Any) -> bytes:
        built.append((graph.name, others[-1]))
        return f"{graph.name} {others[-1]}".encode()

    monkeypatch.setattr(plans, "build_plan", fake)
    settings = BuildSettings(4, ("8.9",))
    exact = build(read_bundle(folder), rtx, "fp32", settings)
    with pytest.raises(BackendError, match=r"has no tf32 plans for .*--precision tf32"):
        fitting_plans(exact.bundle, "tensorrt-rtx", rtx.version, "8.9", "tf32")
    rounded = build(exact.bundle, rtx, "tf32", settings)
    names = ("backbone.onnx", "gradient.onnx", "classifier.onnx")
    assert built == [(name, tf32) for tf32 in (False, True) for name in names]
    assert rounded.bundle.manifest.plans == (*exact.plans, *rounded.plans)
    assert {plan.precision for plan in rounded.plans} == {"tf32"}
    assert {plan.source for plan in rounded.plans} == {plan.source for plan in exact.plans}
    assert not {plan.file for plan in rounded.plans} & {plan.file for plan in exact.plans}
    assert len(list((folder / "plans").iterdir())) == 2
    for precision, made in (("fp32", exact), ("tf32", rounded)):
        found = fitting_plans(rounded.bundle, "tensorrt-rtx", rtx.version, "8.9", precision)
        assert tuple(found.values()) == made.plans
    again = build(rounded.bundle, rtx, "tf32", settings)
    assert (again.fresh, again.plans) == (False, rounded.plans)


@pytest.mark.parametrize("tf32", [False, True])
def test_the_flag_is_set_or_cleared(tmp_path: Path, tf32: bool) -> None:
    """TensorRT sets it by default, so that float32 is exact only where it is cleared."""
    changed: list[tuple[str, str]] = []
    config = SimpleNamespace(
        set_flag=lambda flag: changed.append(("set", flag)),
        clear_flag=lambda flag: changed.append(("clear", flag)),
        progress_monitor=None,
    )
    builder = SimpleNamespace(
        create_network=lambda flags: SimpleNamespace(num_inputs=0),
        create_builder_config=lambda: config,
        build_serialized_network=lambda network, config: b"plan",
    )
    severities = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)
    module = SimpleNamespace(
        __version__="11.4.0",
        ILogger=type("ILogger", (), {"Severity": severities, "__init__": lambda self: None}),
        IProgressMonitor=type("IProgressMonitor", (), {"__init__": lambda self: None}),
        Builder=lambda log: builder,
        OnnxParser=lambda network, log: SimpleNamespace(parse_from_file=lambda path: True),
        NetworkDefinitionCreationFlag=SimpleNamespace(),
        BuilderFlag=SimpleNamespace(TF32="TF32"),
    )
    server = library.Library("tensorrt", module)
    assert plans.build_plan(server, tmp_path / "x.onnx", (), ["9.0"], tf32=tf32) == b"plan"
    assert changed == [("set" if tf32 else "clear", "TF32")]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> library.Library:
    """A TensorRT that builds for the GPU that is there, on a machine with one."""
    monkeypatch.setattr(library, "present_device", lambda: "9.0")
    return library.Library("tensorrt", SimpleNamespace(__version__="11.4.0"))


def test_a_server_builds_for_its_own_gpu(server: library.Library) -> None:
    assert server.targets(()) == server.targets(("9.0",)) == ("9.0",)
    with pytest.raises(OptionError, match=r"tensorrt builds for the GPU that is here, 9\.0, alone"):
        server.targets(("9.0", "8.9"))


def test_a_server_keeps_its_timings(
    folder: Path, server: library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def build_plan(library: library.Library, graph: Path, profiles: Any, *others: Any) -> bytes:
        given.append(others[1])
        return graph.name.encode()

    monkeypatch.setattr(plans, "build_plan", build_plan)
    file = folder.parent / "times.bin"
    build(read_bundle(folder), server, "fp32", BuildSettings(timing_cache=file))
    assert len(given) == 3
    assert all(timings is given[0] and timings.file == file for timings in given)


def test_missing_library_says_what_to_install() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(BackendError, match=r"pip install 'ccam-deploy\[gpu\]'"):
            library.load_library("tensorrt")
