"""8-bit classifier graphs: what is quantised, on which images, with which scales, and how well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import Bundle, read_bundle, unlisted_files
from ccam_deploy.bundle.manifest import GraphPrecision
from ccam_deploy.engines.onnxruntime import OnnxRuntimeEngine
from ccam_deploy.engines.tensorrt import plans
from ccam_deploy.engines.tensorrt.library import load_library
from ccam_deploy.errors import LoweringError, ToleranceError
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.graphs import convert_graphs
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from ccam_deploy.export.quantise import EightBitType, Feeds, masked_batches, quantise
from ccam_deploy.fidelity.comparison import relative_error
from ccam_deploy.fidelity.observation import observe
from ccam_deploy.fidelity.similarity import spearman
from ccam_deploy.fidelity.verification import verify_bundle
from tests.bundles import Bundles, export_recipe
from tests.helpers import DIGITS_LAYERS, noise
from tests.networks import Net, TinyNet, tiny
from tests.sweeps import nightly_but

pytestmark = pytest.mark.slow

SIZE = (32, 48)
TYPES = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}
LARGEST = {"int8": 127, "fp8": 448}


BOTH = pytest.mark.parametrize("precision", ["int8", "fp8"])
EXPORTED = pytest.mark.parametrize("precision", nightly_but(["int8"], ["int8", "fp8"]))
"""An export of the example in each type takes long, and its graphs are made alike."""


@pytest.fixture
def bundle(precision: EightBitType, bundles: Bundles) -> Bundle:
    """The example classifier with an 8-bit classifier graph."""
    return read_bundle(bundles.get(f"digits_{precision}"))


def half_classifier(model: torch.nn.Module) -> ir.Model:
    program = build_program(trace_model(model, (3, *SIZE)))
    found = find_layers(program, None)
    return convert_graphs(program, found, torch.float16).classifier


def batches(count: int = 2) -> Iterator[Feeds]:
    for seed in range(count):
        yield {
            "images": noise(1, 3, *SIZE, seed=seed).astype(np.float16),
            "masks": np.random.default_rng(seed).random((4, 1, *SIZE)).astype(np.float16),
            "owner": np.zeros(4, np.int64),
        }


@EXPORTED
def test_only_the_classifier_is_its_own(
    bundle: Bundle, precision: EightBitType, digits_bundle: Path
) -> None:
    """Backbone and gradient are the half-precision files, and the weights lie there already."""
    half, eight = bundle.precision("fp16"), bundle.precision(precision)
    assert list(bundle.manifest.precisions) == ["fp32", "fp16", precision]
    assert eight.graphs == {**half.graphs, "classifier": f"classifier.{precision}.onnx"}
    assert (eight.gradient_scale, eight.reference) == (half.gradient_scale, half.reference)
    assert not unlisted_files(bundle)
    weights = (bundle.folder / "weights.bin").read_bytes()
    assert weights == (digits_bundle / "weights.bin").read_bytes()


@EXPORTED
def test_every_product_but_the_outer_ones_is_quantised(
    bundle: Bundle, precision: EightBitType
) -> None:
    model = onnx.load(bundle.path(f"classifier.{precision}.onnx"))
    makers = {name: node for node in model.graph.node for name in node.output}
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(products) == 14
    for place, node in enumerate(products):
        for index, name in enumerate(node.input[:2]):
            outer = place in (0, len(products) - 1)
            assert (name in makers and makers[name].op_type == "DequantizeLinear") != outer
            if outer:
                continue
            back = makers[name]
            there = makers[back.input[0]]
            assert there.op_type == "QuantizeLinear"
            assert there.input[1:] == back.input[1:]
            scale, zero = (values[n] for n in there.input[1:])
            assert zero.data_type == TYPES[precision]
            assert not any(numpy_helper.to_array(zero).astype(np.float32).flat)
            assert scale.data_type == onnx.TensorProto.FLOAT16
            if index == 0:
                assert list(scale.dims) == []
                continue
            weights = numpy_helper.to_array(values[there.input[0]]).astype(np.float32)
            highest = np.abs(weights).reshape(len(weights), -1).max(1)
            np.testing.assert_allclose(
                numpy_helper.to_array(scale), highest / LARGEST[precision], rtol=1e-3, atol=1e-7
            )
    inputs = {tensor.name: tensor.type.tensor_type.elem_type for tensor in model.graph.input}
    assert inputs["images"] == inputs["masks"] == onnx.TensorProto.FLOAT16
    assert model.producer_name == "ccam-deploy"
    assert not model.metadata_props


@EXPORTED
def test_fidelity_is_recorded_and_verified(bundle: Bundle, precision: EightBitType) -> None:
    """Measured with the example classifier: masked logits off by 1.5 % and 2.1 %."""
    report, half = (bundle.precision(name).fidelity for name in (precision, "fp16"))
    assert 10 * half.masked_logits < report.masked_logits < {"int8": 0.03, "fp8": 0.05}[precision]
    assert (report.logits, report.features, report.gradients, report.partitions) == (
        half.logits,
        half.features,
        half.gradients,
        half.partitions,
    )
    assert report.saliency_rank > 0.998
    assert report.saliency_similarity > 0.99
    assert report.saliency_overlap > 0.95
    with ccam.load(bundle, backend="onnxruntime-cpu", precision=precision) as explainer:
        again, phrases = verify_bundle(bundle, explainer.networks, precision)
    assert phrases == []
    assert 1e-3 < again.masked_logits < {"int8": 0.03, "fp8": 0.06}[precision]


@EXPORTED
def test_explanations_are_those_of_float32(
    bundle: Bundle, precision: EightBitType, digits_images: list[np.ndarray]
) -> None:
    """On scenes that nothing was calibrated with."""
    images = np.stack(digits_images)
    with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
        expected = explainer.explain(images)
    with ccam.load(bundle, backend="onnxruntime-cpu", precision=precision) as explainer:
        got = explainer.explain(images)
    assert got.settings["precision"] == precision
    np.testing.assert_array_equal(got.targets, expected.targets)
    ranks = list(map(spearman, got.saliency, expected.saliency))
    assert np.median(ranks) > 0.99


@pytest.fixture(scope="module")
def digits_images() -> list[np.ndarray]:
    scenes = pytest.importorskip("ccam_deploy.examples.scenes")
    pytest.importorskip("sklearn")
    made = scenes.make_scenes("test", 6, seed=500)
    return [((s.image / 255 - 0.45) / 0.25).astype(np.float32).transpose(2, 0, 1) for s in made]


@EXPORTED
def test_calibration_sees_each_image_whole_and_under_its_masks(
    bundle: Bundle, digits_images: list[np.ndarray]
) -> None:
    images = np.stack(digits_images[:2])
    with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
        observed = observe(explainer.networks, images, DIGITS_LAYERS)
        masks = explainer.explain(images).masks
    found = list(masked_batches(observed, 5))
    assert max(len(feeds["masks"]) for feeds in found) == 5
    for row in range(2):
        own = [
            feeds for feeds in found if np.array_equal(feeds["images"][0], images[row].astype("f2"))
        ]
        got = np.concatenate([feeds["masks"][:, 0] for feeds in own])
        assert (got[0] == 1).all()
        expected = [mask for mask in masks[row] if mask.any()]
        np.testing.assert_allclose(got[1:], expected, atol=1e-3)
        assert all(not feeds["owner"].any() for feeds in own)


class Peaks(TinyNet):
    """A TinyNet without averages and biases, which would hide what rounding does."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.head(x.amax((2, 3)))  # type: ignore[no-any-return]


def peaks() -> Peaks:
    model = Peaks()
    model.load_state_dict(tiny().state_dict())
    with torch.no_grad():
        model.head.bias.zero_()
        model.conv2.bias.zero_()  # type: ignore[union-attr]
    return model.eval()


def rounded(values: Tensor, scale: Tensor, precision: EightBitType) -> Tensor:
    """To the nearest number that 8 bits hold, by PyTorch."""
    if precision == "fp8":
        return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return (values / scale).round().clamp(-128, 127) * scale


def first_convolution(masked: Tensor) -> Tensor:
    """That of Peaks with its normalisation, on weights in half precision."""
    model = peaks()
    with torch.no_grad():
        bias = model.norm1(model.conv1(torch.zeros(1, 3, 5, 5)))[:, :, 1, 1]
        scale = model.norm1.weight / (model.norm1.running_var + model.norm1.eps).sqrt()  # type: ignore[operator, union-attr]
        weights = (model.conv1.weight * scale[:, None, None, None]).half().float()
        return F.conv2d(masked, weights, bias[0].half().float(), 2, 1)


def emulated(model: ir.Model, masked: Tensor, precision: EightBitType) -> Tensor:
    """What a quantised Peaks gives, by PyTorch, with the graph's weights and activations' scale."""
    values = {
        name: torch.tensor(value.const_value.numpy()).float()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT16
    }
    scale = next(
        values[str(node.inputs[1].name)]  # type: ignore[union-attr]
        for node in model.graph
        if node.op_type == "QuantizeLinear" and node.inputs[0].const_value is None  # type: ignore[union-attr]
    )
    x = first_convolution(masked).half().float().relu()
    assert 0.9 * x.max() < scale * LARGEST[precision] < 1.5 * x.max()
    weights = peaks().conv2.weight.half().float()
    highest = weights.abs().amax((1, 2, 3), keepdim=True)
    weights = rounded(weights, (highest / LARGEST[precision]).half().float(), precision)
    x = F.conv2d(rounded(x, scale, precision), weights, None, 2, 1).relu()
    return peaks().head(x.half().float().amax((2, 3)))  # type: ignore[no-any-return]


@BOTH
def test_a_graph_computes_with_8_bits(precision: EightBitType, tmp_path: Path) -> None:
    """ONNX Runtime's result is that of rounded values, far from that of whole ones."""
    model = quantise(half_classifier(peaks()), batches(), precision)
    ir.save(model, tmp_path / "classifier.onnx")
    feeds = next(batches())
    masked = torch.from_numpy((feeds["images"] * feeds["masks"]).astype(np.float32))
    with torch.no_grad():
        whole = peaks()(masked).numpy()
        expected = emulated(model, masked, precision).numpy()
    with OnnxRuntimeEngine(tmp_path / "classifier.onnx") as engine:
        got = engine.run(feeds)["logits"]
    error = relative_error(got, whole)
    assert error > {"int8": 3e-3, "fp8": 3e-2}[precision]
    assert relative_error(got, expected) < error / 2


@BOTH
def test_small_weights_keep_their_8_bits(precision: EightBitType, tmp_path: Path) -> None:
    """Scales below half precision's normal numbers are no zeros."""
    model = tiny()
    with torch.no_grad():
        model.conv2.weight.mul_(1e-3)
        model.conv2.bias.mul_(1e-3)  # type: ignore[union-attr]
        model.head.weight.mul_(1e3)
    ir.save(quantise(half_classifier(model), batches(), precision), tmp_path / "c.onnx")
    feeds = next(batches())
    masked = torch.from_numpy((feeds["images"] * feeds["masks"]).astype(np.float32))
    with OnnxRuntimeEngine(tmp_path / "c.onnx") as engine, torch.no_grad():
        error = relative_error(engine.run(feeds)["logits"], model(masked).numpy())
    assert error < {"int8": 0.02, "fp8": 0.06}[precision]


def test_a_network_without_inner_products_is_refused() -> None:
    with pytest.raises(LoweringError, match=r"has 2 convolutions and matrix products; the first"):
        quantise(half_classifier(Net()), batches(), "int8")


@EXPORTED
def test_a_broken_tolerance_is_named(precision: GraphPrecision, tmp_path: Path) -> None:
    settings = ExportSettings(tolerance={precision: {"masked_logits": 0}})
    with pytest.raises(
        ToleranceError, match=rf"^the {precision} graphs .+: masked_logits .+ above 0; half"
    ):
        export(TinyNet().eval(), tmp_path / "tiny", SIZE, None, precision, settings)
    assert not list(tmp_path.iterdir())


def build(bundle: Bundle, precision: EightBitType) -> bytes:
    library = load_library("tensorrt-rtx")
    path = bundle.path(bundle.precision(precision).graphs["classifier"])
    targets = library.targets((), precision)
    assert ("8.6" in targets) == (precision == "int8")
    return plans.build_plan(library, path, plans.profiles(4), targets)


@EXPORTED
def test_tensorrt_takes_the_graph(bundle: Bundle, precision: EightBitType) -> None:
    """A strongly typed network, for every compute capability that has the type."""
    pytest.importorskip("tensorrt_rtx")
    assert len(build(bundle, precision)) > 1000


@pytest.mark.nightly
@BOTH
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_recipes_quantise_and_build(name: str, precision: EightBitType, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    export_recipe(name, tmp_path / name, precision, random_weights=True)
    assert len(build(read_bundle(tmp_path / name), precision)) > 1_000_000
