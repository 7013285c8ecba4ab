"""Which plans fit, on manifests made by hand: no TensorRT is needed to tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ccam_deploy.bundle.folder import Bundle, read_bundle
from ccam_deploy.bundle.manifest import WEIGHTS, Plan
from ccam_deploy.engines.tensorrt import slots
from ccam_deploy.engines.tensorrt.library import Library
from ccam_deploy.engines.tensorrt.select import fitting_plans
from ccam_deploy.errors import BackendError, OptionError

GRAPHS = ("backbone", "gradient", "classifier")


@pytest.fixture(scope="module")
def bare(tiny_bundle: Path) -> Bundle:
    return replace(read_bundle(tiny_bundle), folder=Path("engines/x"))


def plan(bundle: Bundle, graph: str, **changes: Any) -> Plan:
    files = bundle.manifest.files
    made = Plan(
        file=f"plans/{graph}.plan",
        graph=graph,
        precision="fp32",
        library="tensorrt-rtx",
        version="1.7.1",
        devices=("8.6", "8.9"),
        source=files[f"{graph}.onnx"].sha256,
        weights=files[WEIGHTS].sha256,
        max_batch=8,
    )
    return replace(made, **changes)


def having(bundle: Bundle, *builds: dict[str, Any]) -> Bundle:
    """The bundle with plans of each of some builds."""
    made = tuple(plan(bundle, graph, **changes) for changes in builds for graph in GRAPHS)
    return replace(bundle, manifest=replace(bundle.manifest, plans=made))


def refusal(bundle: Bundle, capability: str = "8.9", **options: Any) -> str:
    with pytest.raises(BackendError) as caught:
        fitting_plans(
            bundle,
            options.get("flavour", "tensorrt-rtx"),
            options.get("version", "1.7.1"),
            capability,
            "fp32",
            options.get("max_batch"),
        )
    return str(caught.value)


BUILD = "ccam-deploy build engines/x --library tensorrt-rtx --precision fp32"


def test_what_fits_is_given_by_graph(bare: Bundle) -> None:
    bundle = having(bare, {})
    found = fitting_plans(bundle, "tensorrt-rtx", "1.7.1", "8.9", "fp32", 8)
    assert list(found) == list(GRAPHS)
    assert tuple(found.values()) == bundle.manifest.plans


def test_plans_for_others_do_not_matter(bare: Bundle) -> None:
    others: tuple[dict[str, Any], ...] = (
        {"version": "1.6.0"},
        {"library": "tensorrt"},
        {"devices": ("12.0",)},
        {"source": "0" * 64},
        {"max_batch": 2, "devices": ("8.9", "12.0")},
    )
    bundle = having(bare, *others[:3], {"file": "this"}, *others[3:])
    found = fitting_plans(bundle, "tensorrt-rtx", "1.7.1", "8.9", "fp32", 4)
    assert {chosen.file for chosen in found.values()} == {"this"}


def test_the_plan_for_the_fewest_devices_is_taken_then_for_most_images(bare: Bundle) -> None:
    bundle = having(
        bare,
        {"file": "all", "devices": ("8.0", "8.6", "8.9"), "max_batch": 32},
        {"file": "few", "devices": ("8.9",), "max_batch": 4},
        {"file": "many", "devices": ("8.9",), "max_batch": 16},
    )
    for max_batch, file in ((None, "many"), (4, "many"), (16, "many"), (17, "all")):
        found = fitting_plans(bundle, "tensorrt-rtx", "1.7.1", "8.9", "fp32", max_batch)
        assert {chosen.file for chosen in found.values()} == {file}


def test_no_plans(bare: Bundle) -> None:
    assert refusal(bare) == f"engines/x has no fp32 plans for TensorRT-RTX: {BUILD}"
    for change in ({"library": "tensorrt"}, {"precision": "fp16"}):
        assert refusal(having(bare, change)).startswith("engines/x has no fp32 plans for")


def test_another_version_of_the_library(bare: Bundle) -> None:
    bundle = having(bare, {"version": "1.5.2"}, {"version": "1.6.0"})
    assert refusal(bundle) == (
        f"the plans of engines/x are for TensorRT-RTX 1.5.2, 1.6.0, 1.7.1 is installed: {BUILD}"
    )


def test_another_gpu(bare: Bundle) -> None:
    assert refusal(having(bare, {}, {"devices": ("8.9", "12.0")}), "8.0") == (
        "the plans of engines/x are for compute capability 8.6, 8.9, 12.0, "
        f"the GPU here has 8.0: {BUILD} --device 8.0"
    )


def test_another_gpu_for_a_library_that_builds_where_it_is(bare: Bundle) -> None:
    bundle = having(bare, {"library": "tensorrt", "version": "11.4", "devices": ("8.9",)})
    assert refusal(bundle, "9.0", flavour="tensorrt", version="11.4") == (
        "the plans of engines/x are for compute capability 8.9, the GPU here has 9.0: "
        "ccam-deploy build engines/x --library tensorrt --precision fp32"
    )


def test_a_gpu_that_must_be_named_to_be_built_for(bare: Bundle) -> None:
    assert refusal(bare, "7.5").endswith(f": {BUILD} --device 7.5")


def test_too_few_images(bare: Bundle) -> None:
    assert refusal(having(bare, {"max_batch": 4}, {"max_batch": 2}), max_batch=8) == (
        f"the plans of engines/x take at most 4 images, 8 were asked for: {BUILD}"
    )
    assert refusal(having(bare, {}), max_batch=9) == (
        f"the plans of engines/x take at most 8 images, 9 were asked for: {BUILD} --max-batch 9"
    )


def test_another_graph_or_other_weights(bare: Bundle) -> None:
    files = bare.manifest.files
    graph, weights = files["backbone.onnx"].sha256[:8], files[WEIGHTS].sha256[:8]
    assert refusal(having(bare, {"source": "ab" * 32})) == (
        "the backbone plan of engines/x was built from the graph abababab, "
        f"the bundle has {graph}: {BUILD}"
    )
    assert refusal(having(bare, {"weights": "ab" * 32})) == (
        "the backbone plan of engines/x was built from the weights abababab, "
        f"the bundle has {weights}: {BUILD}"
    )


def test_every_graph_needs_its_plan(bare: Bundle) -> None:
    bundle = having(bare, {})
    some = replace(bundle.manifest, plans=bundle.manifest.plans[:2])
    assert refusal(replace(bundle, manifest=some)).startswith("engines/x has no fp32 plans for")


def test_a_folder_with_a_space_is_quoted(bare: Bundle) -> None:
    assert "build '/tmp/my nets' --library" in refusal(replace(bare, folder=Path("/tmp/my nets")))


def test_a_precision_that_the_bundle_lacks(bare: Bundle) -> None:
    with pytest.raises(OptionError, match="the bundle has no fp16 graphs, only fp32"):
        fitting_plans(bare, "tensorrt-rtx", "1.7.1", "8.9", "fp16")


def test_rtx_refuses_a_gpu_whatever_plans_there_are(
    bare: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building some for it would not help."""
    capabilities = {f"SM{name}": name for name in ("80", "86", "89", "120", "121")}
    module = SimpleNamespace(
        __version__="1.7.1", ComputeCapability=SimpleNamespace(__members__=capabilities)
    )
    monkeypatch.setattr(slots, "load_library", lambda flavour: Library("tensorrt-rtx", module))
    monkeypatch.setattr(slots, "present_device", lambda: "9.0")
    with pytest.raises(BackendError) as caught:
        slots.tensorrt_slots(having(bare, {"devices": ("9.0",)}), "tensorrt-rtx", "fp32", 1)
    assert str(caught.value) == (
        "tensorrt-rtx 1.7.1 does not run on compute capability 9.0, only on 8.0, 8.6, 8.9, 12.0, "
        "12.1 and newer; use onnxruntime-cuda or tensorrt"
    )
