"""The first steps of an export: a model becomes a program with target layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.export import ExportedProgram

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.manifest import Preprocessing
from ccam_deploy.errors import OptionError
from ccam_deploy.export.architecture import Model
from ccam_deploy.export.from_onnx.agreement import require_agreement, value_before_activation
from ccam_deploy.export.from_onnx.network import OnnxNetwork
from ccam_deploy.export.layers import TargetLayer, find_layers
from ccam_deploy.export.program import Program, decompose, program_from, trace_model
from ccam_deploy.export.scores import describe_scores, final_activation, with_logits
from ccam_deploy.export.settings import (
    INPUT_SIZE,
    ExportSettings,
    calibration_images,
    preprocessing_of,
    validate_settings,
)


@dataclass(frozen=True)
class PreparedModel:
    """A traced classifier whose settings and layers suit it.

    Attributes:
        functional: The model as it was traced, in functional operators.
        program: The same as a graph with its batch normalisation folded away.
        layers: The target layers in `program`, shallow ones first.
        preprocessing: How images become the model's input.
        images: [B, C, H, W] float32, the calibration images as the model's input.
    """

    functional: ExportedProgram
    program: Program
    layers: tuple[TargetLayer, ...]
    preprocessing: Preprocessing
    images: Floats

    @property
    def layer_names(self) -> list[str]:
        """Names of the target layers."""
        return [layer.name for layer in self.layers]

    def unfolded(self) -> Program:
        """Make the graph of the model as it was traced, before anything was folded."""
        return with_logits(program_from(self.functional, fold=False), self.program.activation)


def prepare_model(
    model: Model,
    input_size: tuple[int, int] | None,
    layers: Sequence[str] | None,
    settings: ExportSettings,
) -> PreparedModel:
    """Trace a model and find its target layers; the model is left as it was.

    Args:
        model: See `export`, like the others.
        input_size: Height, width; the default for a module, its own for a program.
        layers: Names of the target layers, found automatically by default.
        settings: Say what must suit the model.

    Returns:
        What an export or a sanity check starts from.

    Raises:
        ExportError: The model cannot be traced, or a layer is no feature map of it.
        OptionError: A setting does not suit the model.
    """
    settings.progress("tracing the model")
    exported = model
    if settings.constants and (isinstance(exported, OnnxNetwork | ExportedProgram)):
        raise OptionError(
            "constants bind inputs of a PyTorch module; export this model with one input"
        )
    if isinstance(exported, OnnxNetwork):
        exported = exported.trace(input_size or INPUT_SIZE)
    if not isinstance(exported, ExportedProgram):
        shape = len(settings.mean), *(input_size or INPUT_SIZE)
        exported = trace_model(exported, shape, settings.constants)
    functional = decompose(exported)
    traced = program_from(functional, keep=layers or ())
    end = final_activation(traced)
    program = with_logits(traced, settings.activation)
    if line := describe_scores(program, end):
        settings.progress(line)
    validate_settings(settings, program)
    own_size = program.input_shape[1:]
    if input_size and input_size != own_size:
        raise OptionError(f"input_size is {input_size}; the program takes {own_size}")
    preprocessing = preprocessing_of(settings, program)
    images = calibration_images(settings, program, preprocessing)
    if isinstance(model, OnnxNetwork):
        settings.progress(f"comparing with {model.file.path.name} in ONNX Runtime")
        plain = program_from(functional, fold=False)
        require_agreement(model.file, images, plain)
        if end and (name := value_before_activation(model.file)):
            require_agreement(model.file, images, with_logits(plain, program.activation), name)
    return PreparedModel(functional, program, find_layers(program, layers), preprocessing, images)
