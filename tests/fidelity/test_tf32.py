"""TF32, emulated on the CPU by rounding both factors of every product: how far it may be off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ccam_deploy.bundle.folder import Bundle, read_bundle
from ccam_deploy.engines import Networks, load_networks
from ccam_deploy.engines.onnxruntime import OnnxRuntimeEngine
from ccam_deploy.errors import OptionError
from ccam_deploy.fidelity.tolerance import RANDOM_TOLERANCE, TOLERANCE, Tolerance, broken_bounds
from ccam_deploy.fidelity.verification import verify_bundle
from tests.helpers import noise
from tests.tf32 import emulated, round_factors


@pytest.fixture
def rounded(digits_bundle: Path, tmp_path: Path) -> Iterator[Networks]:
    """The example classifier with rounded factors."""
    bundle = read_bundle(digits_bundle)
    entry = bundle.precision("tf32")
    paths = {name: bundle.path(file) for name, file in entry.graphs.items()}
    networks = load_networks(emulated(paths, tmp_path), entry.gradient_scale, "onnxruntime-cpu")
    yield networks
    networks.close()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, 1.0),
        (1 + 2**-10, 1 + 2**-10),
        (1 + 2**-11, 1.0),
        (1 + 3 * 2**-11, 1 + 2**-9),
        (1 + 2**-11 + 2**-23, 1 + 2**-10),
        (-(2 - 2**-12), -2.0),
        (3e-30, None),
    ],
)
def test_ten_bits_are_kept(value: float, expected: float | None) -> None:
    (got,) = round_factors(np.array([value], np.float32))
    if expected is None:  # the exponent is float32's, unlike half precision's
        assert got == pytest.approx(value, rel=2**-11)
    else:
        assert got == expected


def test_graphs_round_both_factors_and_add_in_float32(tmp_path: Path) -> None:
    names: dict[str, list[str | int]] = {"a": ["n", 40], "b": [40, 3], "y": ["n", 3]}
    tensors = {k: helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in names.items()}
    product = helper.make_node("MatMul", ["a", "b"], ["y"])
    graph = helper.make_graph([product], "test", [tensors["a"], tensors["b"]], [tensors["y"]])
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "p.onnx")
    (tmp_path / "out").mkdir()
    paths = emulated({"p": tmp_path / "p.onnx"}, tmp_path / "out")
    a, b = noise(5, 40), noise(40, 3, seed=1)
    with OnnxRuntimeEngine(paths["p"]) as engine:
        got = engine.run({"a": a, "b": b})["y"]
    wide = [round_factors(factor).astype(np.float64) for factor in (a, b)]
    np.testing.assert_allclose(got, wide[0] @ wide[1], atol=1e-5)
    assert np.abs(got - a.astype(np.float64) @ b).max() > 1e-4


@pytest.mark.slow
def test_the_bounds_are_for_tf32(digits_bundle: Path, rounded: Networks) -> None:
    """It keeps to its own with room to spare, and breaks those of float32."""
    bundle = read_bundle(digits_bundle)
    report, broken = verify_bundle(bundle, rounded, "tf32")
    assert broken == []
    assert 1e-5 < report.logits < TOLERANCE["tf32"].bounds()["logits"] / 10
    assert 1e-4 < max(report.gradients) < TOLERANCE["tf32"].bounds()["gradients"] / 10
    layers = [layer.name for layer in bundle.manifest.layers]
    assert any("logits" in phrase for phrase in broken_bounds(report, TOLERANCE["fp32"], layers))
    _, exact = verify_bundle(bundle, rounded, "fp32")
    assert exact


@pytest.mark.slow
def test_a_wrong_gradient_breaks_them(
    digits_bundle: Path, rounded: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rounded.engines["gradient"]
    right = engine.run
    monkeypatch.setattr(
        engine, "run", lambda feeds: {name: values / 2 for name, values in right(feeds).items()}
    )
    report, broken = verify_bundle(read_bundle(digits_bundle), rounded, "tf32")
    assert report.gradients == pytest.approx([0.5] * 4, abs=0.01)
    assert [phrase.split()[0] for phrase in broken] == ["gradients"] * 4


def test_float32_may_not_be_held_tighter_in_tf32() -> None:
    tolerance = Tolerance(logits=0.01, features=0.01, saliency_rank=0.95, saliency_overlap=0.9)
    accepted = {"logits": 0.05, "features": 1e-4, "saliency_rank": 0.5, "saliency_overlap": 0.99}
    assert tolerance.widened({**accepted, "gradients": 0.3}).bounds() == {
        "logits": 0.05,
        "features": 0.01,
        "saliency_rank": 0.5,
        "saliency_overlap": 0.9,
    }


@pytest.mark.slow
@pytest.mark.parametrize("random_weights", [False, True])
def test_random_weights_have_wider_bounds(
    digits_bundle: Path, rounded: Networks, random_weights: bool
) -> None:
    """The report is the same; a bound of zero for one of the two tells which was taken."""
    bundle = read_bundle(digits_bundle)
    manifest = dataclasses.replace(bundle.manifest, random_weights=random_weights)
    tables: list[dict[Any, Tolerance]] = [TOLERANCE, RANDOM_TOLERANCE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tables[random_weights], "tf32", Tolerance(logits=1e-9))
        _, broken = verify_bundle(Bundle(bundle.folder, manifest), rounded, "tf32")
    assert [phrase.split()[0] for phrase in broken] == ["logits"]


def test_tf32_needs_the_graphs_of_fp32(digits_bundle: Path) -> None:
    bundle = read_bundle(digits_bundle)
    assert bundle.precision("tf32") == bundle.precision("fp32")
    half = {"fp16": bundle.manifest.precisions["fp16"]}
    manifest = dataclasses.replace(bundle.manifest, precisions=half)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="the bundle has no fp32 graphs, only fp16; export with"):
        Bundle(bundle.folder, manifest).precision("tf32")
