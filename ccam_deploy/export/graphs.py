"""The graphs of a bundle as ONNX models that share one file of weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from ccam_deploy.errors import LayerError, LoweringError, brief
from ccam_deploy.export.autodiff import differentiate, differentiate_input, has_relu
from ccam_deploy.export.excitation import excite, why_not
from ccam_deploy.export.layers import TargetLayer
from ccam_deploy.export.program import Program, cast, module_of, quiet

_INLINE_BYTES = 1024
_ALIGNMENT = 4096


@dataclass(frozen=True)
class Graphs:
    """ONNX models of one precision.

    backbone: images [B, C, H, W] -> logits, feature_0.., residual_0..
    gradient: residual_0.., output_gradient [B, classes] -> gradient_0..
    classifier: images [B, C, H, W], masks [N, 1, H, W], owner [N] int64 -> logits [N, classes]
    head: features [N, C, h, w] of the last layer -> logits [N, classes]; only where it is wanted
    input_gradient, guided_gradient: images, output_gradient [B, classes] -> input_gradient
        [B, C, H, W]; the second with ReLUs that pass back positive gradients only.
    excitation: images, winners [B, classes], duals [B, classes] -> excitation_0.. [B, h, w]
    """

    backbone: ir.Model
    gradient: ir.Model
    classifier: ir.Model
    head: ir.Model | None = None
    input_gradient: ir.Model | None = None
    guided_gradient: ir.Model | None = None
    excitation: ir.Model | None = None

    def items(self) -> Iterator[tuple[str, ir.Model]]:
        """Each graph's name and model."""
        yield "backbone", self.backbone
        yield "gradient", self.gradient
        yield "classifier", self.classifier
        if self.head is not None:
            yield "head", self.head
        if self.input_gradient is not None:
            yield "input_gradient", self.input_gradient
        if self.guided_gradient is not None:
            yield "guided_gradient", self.guided_gradient
        if self.excitation is not None:
            yield "excitation", self.excitation


class MaskedClassifier(nn.Module):
    """Logits of masked images; each mask names the image that it belongs to."""

    def __init__(self, classifier: fx.GraphModule) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor, masks: Tensor, owner: Tensor) -> Tensor:
        """Images [B, C, H, W], masks [N, 1, H, W], owner [N] int64 -> logits [N, classes]."""
        (logits,) = self.classifier(images.index_select(0, owner) * masks)
        assert isinstance(logits, Tensor)
        return logits


def convert_graphs(
    program: Program,
    layers: Sequence[TargetLayer],
    dtype: torch.dtype = torch.float32,
    with_head: bool = False,
    with_gradients: bool = False,
) -> Graphs:
    """Build and convert the graphs of a classifier.

    with_gradients: those of the image's gradient too; no guided one for a classifier without ReLU.
        Where the classifier can have it, the excitation graph, which is in float32 alone.
    Raises LoweringError, naming operator and module, for what ONNX cannot express, LayerError
    where a head is wanted and the last layer is no cut through the classifier.
    """
    parts = differentiate(program, layers, dtype)
    batch, masks = Dim("batch"), Dim("masks")
    images = torch.zeros(2, *program.input_shape, dtype=dtype)
    with torch.no_grad():
        outputs = parts.backbone(images)
    residuals = list(outputs[1 + len(layers) :])
    feature_names = [f"feature_{index}" for index in range(len(layers))]
    residual_names = [f"residual_{index}" for index in range(len(residuals))]
    backbone = _to_onnx(
        parts.backbone,
        {"images": (images, {0: batch})},
        ["logits", *feature_names, *residual_names],
        program,
    )
    gradient_inputs = dict(zip(residual_names, ((r, {0: batch}) for r in residuals), strict=True))
    gradient_inputs["output_gradient"] = (torch.zeros_like(outputs[0]), {0: batch})
    gradient_names = [f"gradient_{index}" for index in range(len(layers))]
    gradient = _to_onnx(parts.gradient, gradient_inputs, gradient_names, program)
    classifier = _to_onnx(
        MaskedClassifier(_in_type(program.graph, dtype)),
        {
            "images": (images, {0: batch}),
            "masks": (torch.zeros(3, 1, *program.input_shape[1:], dtype=dtype), {0: masks}),
            "owner": (torch.zeros(3, dtype=torch.int64), {0: masks}),
        },
        ["logits"],
        program,
    )
    head = None
    if with_head:
        if parts.head is None:
            raise LayerError(
                f'the classifier has no head after layer "{layers[-1].name}": its logits depend '
                "on the image past that layer; export without a head, or with other layers"
            )
        features = {"features": (outputs[len(layers)].repeat(2, 1, 1, 1)[:3], {0: masks})}
        head = _to_onnx(parts.head, features, ["logits"], program)
    plain = _input_gradient(program, dtype) if with_gradients else None
    guided = excitation = None
    if with_gradients and has_relu(program):
        guided = _input_gradient(program, dtype, guided=True)
    if with_gradients and dtype == torch.float32 and not why_not(program, layers):
        excitation = _excitation(program, layers)
    return Graphs(backbone, gradient, classifier, head, plain, guided, excitation)


def _input_gradient(program: Program, dtype: torch.dtype, guided: bool = False) -> ir.Model:
    batch = Dim("batch")
    inputs = {
        "images": (torch.zeros(2, *program.input_shape, dtype=dtype), {0: batch}),
        "output_gradient": (torch.zeros(2, program.classes, dtype=dtype), {0: batch}),
    }
    module = differentiate_input(program, dtype, guided)
    return _to_onnx(module, inputs, ["input_gradient"], program)


def _excitation(program: Program, layers: Sequence[TargetLayer]) -> ir.Model:
    batch = Dim("batch")
    # A tensor for each: the exporter makes one input of those that are the same tensor.
    inputs = {
        "images": (torch.zeros(2, *program.input_shape), {0: batch}),
        "winners": (torch.zeros(2, program.classes), {0: batch}),
        "duals": (torch.zeros(2, program.classes), {0: batch}),
    }
    names = [f"excitation_{index}" for index in range(len(layers))]
    return _to_onnx(excite(program, layers), inputs, names, program)


def _in_type(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    if dtype == torch.float32:
        return module
    twin = copy.deepcopy(module)
    for name, value in module.named_buffers():
        setattr(twin, name, cast(value, dtype))
    return twin


def _to_onnx(
    module: nn.Module,
    inputs: Mapping[str, tuple[Tensor, dict[int, Dim]]],
    outputs: Sequence[str],
    program: Program,
) -> ir.Model:
    """Export a module as an ONNX model held in memory. inputs: name -> (example, dynamic axes)."""
    examples = tuple(example for example, _ in inputs.values())
    shapes = tuple(axes for _, axes in inputs.values())
    with torch.no_grad(), quiet():
        try:
            exported = torch.export.export(module, examples, dynamic_shapes=shapes)
            converted = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=list(outputs),
            )
        except Exception as error:
            raise LoweringError(_culprit(error, program)) from error
    assert converted is not None
    _clean(converted.model, inputs)
    return converted.model


def _culprit(error: BaseException, program: Program) -> str:
    """Name the operator, and its module, that the conversion to ONNX stops at.

    The exporter's own message names an operator after decomposition, which no longer says where
    it came from; so each kind of operator in the model is converted by itself.
    """
    kinds: dict[object, fx.Node] = {}
    for node in program.graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            kinds.setdefault(node.target, node)
    for node in kinds.values():
        if not _converts(node):
            where = module_of(node) or "the model itself"
            return f'operator {node.target} in module "{where}" has no ONNX equivalent'
    while error.__cause__ is not None:
        error = error.__cause__
    return f"the model's gradient cannot be converted to ONNX: {brief(error)}"


def _converts(node: fx.Node) -> bool:
    """Whether one operator, on inputs of the shapes that it has in the model, becomes ONNX."""
    graph = fx.Graph()
    copies, examples = {}, []
    for source in node.all_input_nodes:
        value = source.meta["val"]
        if not isinstance(value, Tensor):
            return True
        copies[source] = graph.placeholder(source.name)
        sizes = [size if isinstance(size, int) else 2 for size in value.shape]
        examples.append(torch.zeros(sizes, dtype=value.dtype))
    graph.output(graph.node_copy(node, lambda n: copies[n]))
    try:
        torch.onnx.export(
            fx.GraphModule(nn.Module(), graph),
            tuple(examples),
            dynamo=True,
            verbose=False,
            optimize=False,
        )
    except torch.onnx.OnnxExporterError:
        return False
    return True


def _clean(model: ir.Model, inputs: Mapping[str, tuple[Tensor, dict[int, Dim]]]) -> None:
    """Give dynamic axes their names, and drop what tells of the tools and folders of the export."""
    names = {}
    for value, (_, axes) in zip(model.graph.inputs, inputs.values(), strict=True):
        assert value.shape is not None
        for axis, dim in axes.items():
            names[value.shape[axis]] = dim.__name__
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([names.get(size, size) for size in value.shape])
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "ccam-deploy", None


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


class WeightFile:
    """One file that holds the weights of several models, each distinct tensor once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._places: dict[bytes, tuple[int, int]] = {}

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def move_weights(self, model: ir.Model) -> None:
        """Write a model's large initializers to the file and refer to them there."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_BYTES:
                continue
            offset, length = self._place(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                self._path.name,
                offset,
                length,
                tensor.dtype,
                shape=tensor.shape,  # type: ignore[arg-type]
                name=str(value.name),
                base_dir=self._path.parent,
            )

    def _place(self, content: bytes) -> tuple[int, int]:
        digest = hashlib.sha256(content).digest()
        if digest not in self._places:
            position = self._file.tell()
            self._file.write(bytes(-position % _ALIGNMENT))
            self._places[digest] = (self._file.tell(), len(content))
            self._file.write(content)
        return self._places[digest]


def write_graphs(
    graphs: Iterable[tuple[str, ir.Model]], folder: Path, weights: WeightFile, suffix: str = ""
) -> dict[str, str]:
    """Write named models into a folder; returns graph name -> file name."""
    files = {}
    for name, model in graphs:
        files[name] = f"{name}{suffix}.onnx"
        weights.move_weights(model)
        ir.save(model, folder / files[name])
    return files
