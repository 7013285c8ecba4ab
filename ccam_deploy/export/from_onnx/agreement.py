"""Compares a classifier that was made from an ONNX file with that file in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch

from ccam_deploy.arrays import Floats
from ccam_deploy.engines.onnxruntime import keep_usage_private
from ccam_deploy.errors import ToleranceError, brief
from ccam_deploy.export.from_onnx.onnx_file import OnnxFile
from ccam_deploy.export.program import Program
from ccam_deploy.fidelity.observation import fixed_masks

_LARGEST_ERROR = 1e-4
_LARGEST_HALF_ERROR = 1e-2
"""Of a file that computes in half precision itself."""
_ACTIVATIONS = ("Softmax", "LogSoftmax", "Sigmoid")
_AS_THEY_ARE = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze")
_WEIGHTS = "session.model_external_initializers_file_folder_path"
"""Where a model that is given as bytes finds its weights."""


def require_agreement(file: OnnxFile, images: Floats, program: Program, output: str = "") -> float:
    """Compare a program with ONNX Runtime, which runs the user's own file on the CPU.

    They run the images, the images under fixed masks, and an image of zeros.

    Args:
        file: The file.
        images: [B, C, H, W] float32.
        program: What was made from the file.
        output: The value of the file that the program gives; by default its output.

    Returns:
        The relative error: the norm of the difference, divided by that of the file's outputs.

    Raises:
        ToleranceError: They differ, or the file does not run.
    """
    masked = images[:1] * fixed_masks(*program.input_shape[1:])[:, None]
    shown = np.concatenate([images, masked, np.zeros_like(images[:1])])
    with torch.no_grad():
        outputs: Floats = program.graph(torch.from_numpy(shown))[0].numpy()
    if program.single:  # the two logits of one
        outputs = outputs[:, 1:]
    expected = run_file(file, shown, output)
    if expected.size != outputs.size:
        raise ToleranceError(
            f"{file.path} gives {list(expected.shape)} for {len(shown)} images in ONNX Runtime; "
            f"the network made from it gives {list(outputs.shape)}"
        )
    expected = expected.reshape(outputs.shape)
    size = float(np.linalg.norm(expected)) or 1.0
    error = float(np.linalg.norm(outputs - expected)) / size
    bound = _LARGEST_HALF_ERROR if file.half else _LARGEST_ERROR
    if not error <= bound:
        raise ToleranceError(
            f"the network made from {file.path} does not agree with it in ONNX Runtime: "
            f"outputs differ by {error:.1e}, more than {bound:g}"
        )
    return error


def value_before_activation(file: OnnxFile) -> str:
    """Find the logits of a file that ends in a softmax or a sigmoid; "" where there are none.

    Where that is sure of its answer, its outputs are the same to all digits for many logits.
    """
    graph = onnx.load_model(file.path, load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    name = file.output
    while (node := makers.get(name)) is not None and node.op_type in _AS_THEY_ARE:
        name = node.input[0]
    if node is None or node.op_type not in _ACTIVATIONS or node.input[0] not in makers:
        return ""
    return str(node.input[0])


def run_file(file: OnnxFile, images: Floats, output: str = "") -> Floats:
    """Run an ONNX file as it is, in batches of its own size.

    Args:
        file: The file.
        images: [B, C, H, W] float32.
        output: The value to return; by default its output.

    Returns:
        [B, n] float32.

    Raises:
        ToleranceError: The file does not run.
    """
    keep_usage_private()
    import onnxruntime

    dtype = onnx.helper.tensor_dtype_to_np_dtype(file.type)
    shown = images.transpose(0, 2, 3, 1) if file.channels_last else images
    size = file.batch or 1
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry(_WEIGHTS, str(file.path.parent))
        session = onnxruntime.InferenceSession(
            _with_output(file.path, output) if output else str(file.path),
            options,
            providers=["CPUExecutionProvider"],
        )
        parts = []
        for start in range(0, len(shown), size):
            part = shown[start : start + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            feeds = {file.input: filled.astype(dtype)}
            (values,) = session.run([output or file.output], feeds)
            # A file for one image may leave the batch out.
            parts.append(np.asarray(values, np.float32).reshape(size, -1)[: len(part)])
    except Exception as error:
        raise ToleranceError(f"{file.path} does not run in ONNX Runtime: {brief(error)}") from error
    return np.concatenate(parts)


def _with_output(path: Path, name: str) -> bytes:
    """A file with one more output."""
    model = onnx.load_model(path, load_external_data=False)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    content: bytes = model.SerializeToString()
    return content
