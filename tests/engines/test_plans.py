"""TensorRT plans. TensorRT-RTX builds without a GPU, so its builder judges the graphs here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ccam_deploy import bundle as bundles
from ccam_deploy.engines import build as builder
from ccam_deploy.engines import plans
from ccam_deploy.errors import BackendError, IntegrityError, OptionError

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def rtx() -> plans.Library:
    return plans.load_library("tensorrt-rtx")


@pytest.fixture
def folder(digits_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(digits_bundle, tmp_path / "digits")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_graph_becomes_a_plan(
    folder: Path, rtx: plans.Library, precision: bundles.PrecisionName
) -> None:
    lines: list[str] = []
    made = builder.build(bundles.read(folder), rtx, precision, 4, ["8.9"], lines.append)
    assert lines == [f"building {g} ({precision})" for g in ("backbone", "gradient", "classifier")]
    graphs = made.manifest.precisions[precision].graphs
    assert [plan.graph for plan in made.manifest.plans] == list(graphs)
    for plan in made.manifest.plans:
        assert plan.devices == ("8.9",)
        assert plan.version == rtx.version
        assert plan.source == made.manifest.files[graphs[plan.graph]].sha256
        assert made.manifest.files[plan.file].bytes == made.path(plan.file).stat().st_size > 1000
    assert not bundles.unlisted(made)


def test_a_plan_with_the_same_key_is_replaced(folder: Path, rtx: plans.Library) -> None:
    first = builder.build(bundles.read(folder), rtx, "fp32", 4, ["8.6"])
    second = builder.build(first, rtx, "fp32", 2, ["8.6"])
    assert [plan.max_batch for plan in second.manifest.plans] == [2, 2, 2]
    other = builder.build(second, rtx, "fp32", 2, ["12.0"])
    assert len(other.manifest.plans) == 6
    assert not bundles.unlisted(other)
    assert len(list((folder / "plans").iterdir())) == 2


def test_a_changed_plan_is_not_read(folder: Path, rtx: plans.Library) -> None:
    made = builder.build(bundles.read(folder), rtx, "fp32", 1, ["8.9"])
    path = made.path(made.manifest.plans[0].file)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="was changed after the export"):
        bundles.read(folder)


def test_unknown_device_is_refused_and_nothing_is_left(folder: Path, rtx: plans.Library) -> None:
    before = bundles.read(folder)
    with pytest.raises(OptionError, match=r"does not support compute capability 9\.9; it supports"):
        builder.build(before, rtx, "fp32", 4, ["8.9", "9.9"])
    assert bundles.read(folder) == before
    assert not bundles.unlisted(before)


def test_a_rejected_graph_is_named(rtx: plans.Library, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x08no graph")
    with pytest.raises(BackendError, match=r"tensorrt-rtx (rejects|cannot build) broken\.onnx"):
        plans.build_plan(rtx, broken, plans.profiles(1), ["8.9"])


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


def test_all_capabilities_are_the_default(rtx: plans.Library) -> None:
    """But for Turing, on which the library has no float32 matrix products."""
    assert {"7.5", "8.6", "8.9", "12.0"} <= set(rtx.capabilities)
    assert rtx.targets(()) == tuple(d for d in rtx.capabilities if d != "7.5")
    assert rtx.targets(("7.5",)) == ("7.5",)


def test_missing_library_says_what_to_install() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(BackendError, match=r"pip install ccam-deploy\[gpu\]"):
            plans.load_library("tensorrt")
