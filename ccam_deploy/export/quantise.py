"""The classifier graph in 8 bits: its convolutions and matrix products between Q and DQ nodes.

ONNX Runtime's static quantiser puts the nodes in and finds the range of each tensor. It starts from
the half-precision graph, so that everything else stays in half precision: TensorRT would have to
convert back and forth between 8-bit products and float32, and moves half as many bytes. Zero points
are 0; activations have one scale a tensor, weights one for each output channel. Weights keep their
half-precision values in front of their Q nodes, where an engine folds them: those lie in the
bundle's file of weights already. The first product, which reads the image's few channels, and the
last, which gives the logits, stay as they are: they are a small part of the work and a large part
of FP8's error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ccam_deploy.engines.base import Array
from ccam_deploy.errors import BackendError, LoweringError
from ccam_deploy.export.tensor_cores import WIDER
from ccam_deploy.extras import install
from ccam_deploy.fidelity.observation import Observation
from ccam_deploy.kernels import cpu
from ccam_deploy.methods import CollectionCAM

EightBitType = Literal["int8", "fp8"]
EIGHT_BIT_TYPES: tuple[EightBitType, ...] = get_args(EightBitType)

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_LARGEST: dict[EightBitType, float] = {"int8": 127.0, "fp8": 448.0}
_SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)
_SKIP_PREPARATION = {"onnx.quant.pre_process": "onnxruntime.quant"}

Feeds = dict[str, Array]


def masked_batches(observed: Observation, chunk: int = 8) -> Iterator[Feeds]:
    """Make what the classifier graph gets at run time: images under Collection-CAM's masks.

    Args:
        observed: Feature maps and gradients, not their summary.
        chunk: The most masks at a time.

    Yields:
        Inputs of the half-precision graph: one image [1, C, H, W] and its masks, the first of
        which leaves the image whole.
    """
    for row in range(len(observed.images)):
        image = observed.images[row : row + 1].astype(np.float16)
        masks = _masks(observed, row).astype(np.float16)
        for start in range(0, len(masks), chunk):
            part = masks[start : start + chunk, None]
            yield {"images": image, "masks": part, "owner": np.zeros(len(part), np.int64)}


def _masks(observed: Observation, row: int) -> NDArray[np.float32]:
    """One image's masks [N, H, W], the first of them all ones."""
    height, width = observed.images.shape[2:]
    masks = [np.ones((1, height, width), np.float32)]
    for index, labels in enumerate(observed.labels):
        sums = cpu.collection_sums(
            observed.features[index][row],
            observed.gradients[index][row],
            labels[row],
            int(labels[row].max()) + 1,
            final=index == len(observed.labels) - 1,
        )
        rendered, flat = cpu.render_masks(sums, (height, width), CollectionCAM().theta)
        masks.append(rendered[~flat])
    return np.concatenate(masks)


def quantise(
    classifier: ir.Model, batches: Iterable[Feeds], eight_bit_type: EightBitType
) -> ir.Model:
    """Put Q and DQ nodes into a copy of a half-precision classifier graph.

    Args:
        classifier: The graph, which is left as it was.
        batches: Inputs to measure the ranges of activations on.
        eight_bit_type: "int8", or "fp8" for float8e4m3fn.

    Returns:
        The quantised graph, with its weights in memory.

    Raises:
        LoweringError: The graph has nothing to quantise.
        BackendError: ONNX Runtime is not installed.
    """
    products = [node for node in classifier.graph if _is_product(node)]
    inner = products[1:-1]
    if not inner:
        raise LoweringError(
            f"the model has {len(products)} convolutions and matrix products; the first and the "
            f"last stay in half precision, which leaves none for {eight_bit_type}"
        )
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise BackendError(
            f"{eight_bit_type} graphs need ONNX Runtime: {install('cpu')}"
        ) from error
    with tempfile.TemporaryDirectory(prefix="ccam-deploy-") as folder:
        source, target = Path(folder) / "half.onnx", Path(folder) / "quantised.onnx"
        prepared = ir.Model(
            classifier.graph,
            ir_version=classifier.ir_version,
            metadata_props=dict(_SKIP_PREPARATION),
        )
        ir.save(prepared, source, external_data="half.bin")
        quantization.quantize_static(
            source,
            target,
            _Reader(batches),
            quant_format=quantization.QuantFormat.QDQ,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=list(_PRODUCTS),
            nodes_to_exclude=[node.name for node in classifier.graph if node not in inner],
            use_external_data_format=True,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "AddQDQPairToWeight": True,
                "MatMulConstBOnly": True,
                "OpTypesToExcludeOutputQuantization": list(_PRODUCTS),
            },
        )
        quantised = ir.load(target)
        ir.external_data.load_to_model(quantised)
    quantised.metadata_props.clear()
    quantised.producer_name, quantised.producer_version = classifier.producer_name, None
    _set_scales(quantised, _LARGEST[eight_bit_type])
    if eight_bit_type == "fp8":
        _to_float8(quantised)
    return quantised


def _is_product(node: ir.Node) -> bool:
    """Whether a node multiplies by weights."""
    if node.op_type not in _PRODUCTS:
        return False
    weights = node.inputs[1]
    return weights is not None and weights.const_value is not None and weights.name != WIDER


class _Reader:
    """Hands calibration data to the quantiser."""

    def __init__(self, batches: Iterable[Feeds]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Feeds | None:
        """The next inputs, None after the last."""
        return next(self._batches, None)


def _set_scales(model: ir.Model, largest: float) -> None:
    """Let the largest value of each tensor, or of each channel of weights, become `largest`.

    Weights are measured here: some versions of the quantiser take a scale that is subnormal in
    half precision for 0, and write 1 in its place.
    """
    for node in model.graph:
        if node.op_type != "QuantizeLinear":
            continue
        values, scale, _ = node.inputs
        assert values is not None and scale is not None and scale.const_value is not None
        if values.const_value is None:
            exact = scale.const_value.numpy().astype(np.float32) * (_LARGEST["int8"] / largest)
        else:
            weights = np.abs(values.const_value.numpy().astype(np.float32))
            axis = node.attributes.get_int("axis", 1) % weights.ndim
            others = tuple(a for a in range(weights.ndim) if a != axis and scale.shape != ())
            exact = weights.max(axis=others or None) / largest
        rounded = np.maximum(exact, _SMALLEST_SCALE).astype(np.float16)
        scale.const_value = ir.tensor(rounded, name=scale.name)


def _to_float8(model: ir.Model) -> None:
    """Turn 8-bit integers into float8e4m3fn."""
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = node.inputs[2]
            assert zero is not None and zero.const_value is not None
            float8_zero = np.zeros(zero.const_value.numpy().shape, ml_dtypes.float8_e4m3fn)
            zero.const_value = ir.tensor(float8_zero, name=zero.name)
            zero.dtype = ir.DataType.FLOAT8E4M3FN
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = ir.DataType.FLOAT8E4M3FN
