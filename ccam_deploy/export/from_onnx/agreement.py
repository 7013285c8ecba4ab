"""Compares a classifier that was made from an ONNX file with that file in ONNX Runtime."""

from __future__ import annotations

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


def require_agreement(file: OnnxFile, images: Floats, program: Program) -> float:
    """Compare a program with ONNX Runtime, which runs the user's own file on the CPU.

    They run the images, the images under fixed masks, and an image of zeros.

    Args:
        file: The file.
        images: [B, C, H, W] float32.
        program: What was made from the file.

    Returns:
        The relative error: the norm of the difference, divided by that of the file's outputs.

    Raises:
        ToleranceError: They differ, or the file does not run.
    """
    masked = images[:1] * fixed_masks(*program.input_shape[1:])[:, None]
    shown = np.concatenate([images, masked, np.zeros_like(images[:1])])
    with torch.no_grad():
        outputs: Floats = program.graph(torch.from_numpy(shown))[0].numpy()
    expected = run_file(file, shown).reshape(outputs.shape)
    size = float(np.linalg.norm(expected)) or 1.0
    error = float(np.linalg.norm(outputs - expected)) / size
    single = file.type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
    bound = _LARGEST_ERROR if single else _LARGEST_HALF_ERROR
    if not error <= bound:
        raise ToleranceError(
            f"the network made from {file.path} does not agree with it in ONNX Runtime: "
            f"outputs differ by {error:.1e}, more than {bound:g}"
        )
    return error


def run_file(file: OnnxFile, images: Floats) -> Floats:
    """Run an ONNX file as it is, in batches of its own size.

    Args:
        file: The file.
        images: [B, C, H, W] float32.

    Returns:
        [B, ...] float32, its output.

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
        session = onnxruntime.InferenceSession(
            str(file.path), options, providers=["CPUExecutionProvider"]
        )
        parts = []
        for start in range(0, len(shown), size):
            part = shown[start : start + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            (output,) = session.run([file.output], {file.input: filled.astype(dtype)})
            parts.append(np.asarray(output, np.float32)[: len(part)])
    except Exception as error:
        raise ToleranceError(f"{file.path} does not run in ONNX Runtime: {brief(error)}") from error
    return np.concatenate(parts)
