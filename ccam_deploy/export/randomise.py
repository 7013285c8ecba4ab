"""A trained classifier whose layers can be given random parameters, for sanity checks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx

from ccam_deploy.arrays import Floats
from ccam_deploy.errors import SourceError
from ccam_deploy.export.architecture import Model
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.preparation import prepare_model
from ccam_deploy.export.program import Program, module_of
from ccam_deploy.export.reference import TorchClassifier
from ccam_deploy.export.settings import ExportSettings

_PARAMETER, _BUFFER = "p_", "b_"
_LEARNT_BUFFERS = ("running_mean", "running_var", "weight", "bias")
"""Ends of the names of buffers that training sets; a frozen normalisation keeps all four so."""


class RandomisedClassifier(TorchClassifier):
    """A classifier in PyTorch, as it was traced, with layers to randomise.

    Random weights are drawn from a normal distribution of the variance 2 / fan-in (He et al. 2015);
    biases and means become 0, scales and variances 1.

    Attributes:
        parts: Names of the layers with weights, from the last one down; a normalisation's
            parameters and statistics belong to the layer before it.
        layers: Names of the target layers.
    """

    def __init__(self, program: Program, names: Sequence[str], seed: int = 0) -> None:
        """Take over a program.

        Args:
            program: Has its normalisation unfolded, and is used by nobody else.
            names: The target layers.
            seed: Of the random parameters.

        Raises:
            LayerError: A target layer is not in the program.
            SourceError: The program has no parameters.
        """
        target_layers = find_layers(program, names)
        super().__init__(program, target_layers)
        self.layers = tuple(layer.name for layer in target_layers)
        self._tensors = dict(program.graph.named_buffers())
        self._trained = {name: value.clone() for name, value in self._tensors.items()}
        self._groups = _groups(program)
        self._seed = seed
        self.parts = tuple(reversed(self._groups))
        if not self.parts:
            raise SourceError("the model has no parameters to randomise")

    def randomise(self, parts: Collection[str]) -> None:
        """Give some layers random parameters, and all others their trained ones.

        A layer's random values are the same every time.

        Args:
            parts: Names of the layers to randomise, of `self.parts`.
        """
        for name, value in self._trained.items():
            self._tensors[name].copy_(value)
        for number, (part, names) in enumerate(self._groups.items()):
            if part in parts:
                generator = torch.Generator().manual_seed(self._seed * len(self._groups) + number)
                for name in names:
                    self._tensors[name].copy_(_fresh(name, self._trained[name], generator))


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Limit the threads that PyTorch uses inside an operator; 0 keeps its number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_randomised(
    model: Model,
    input_size: tuple[int, int] | None = None,
    layers: Sequence[str] | None = None,
    settings: ExportSettings | None = None,
    seed: int = 0,
) -> tuple[RandomisedClassifier, Floats]:
    """Open a model so that its layers can be randomised.

    Args:
        model: The arguments are those of `export`; the model is left as it was.
        input_size: Height, width.
        layers: Names of the target layers.
        settings: The images, and how they become the model's input.
        seed: Of the random parameters.

    Returns:
        The classifier, and the images [B, C, H, W] float32.

    Raises:
        ExportError: The model cannot be traced.
        OptionError: A setting does not suit the model.
    """
    # Target layers as an export finds them: where normalisation is folded away.
    settings = settings or ExportSettings()
    prepared = prepare_model(model, input_size, layers, settings)
    unfolded = prepared.unfolded()
    return RandomisedClassifier(unfolded, prepared.layer_names, seed), prepared.images


def _groups(program: Program) -> dict[str, list[str]]:
    """The tensors of each layer, in the order in which they are used first."""
    groups: dict[str, list[str]] = {}
    current: list[str] = []
    seen: set[str] = set()
    for node in program.graph.graph.nodes:
        if node.op != "call_function":
            continue
        names = [name for name in map(_parameter, node.all_input_nodes) if name not in ("", *seen)]
        seen.update(names)
        if any(_has_weights(name, program.graph.get_buffer(name)) for name in names):
            current = groups.setdefault(module_of(node) or node.name, [])
        current += names
    return groups


def _parameter(node: fx.Node) -> str:
    """The name of the parameter or trained buffer that a node reads, "" for another node.

    Other buffers, such as a fixed mean of the input or a blur, stay as they are.
    """
    name = str(node.target) if node.op == "get_attr" else ""
    learnt = name.startswith(_PARAMETER) or (
        name.startswith(_BUFFER) and name.endswith(_LEARNT_BUFFERS)
    )
    return name if learnt else ""


def _has_weights(name: str, value: Tensor) -> bool:
    return name.startswith(_PARAMETER) and value.dim() > 1 and value.numel() > value.shape[0]


def _fresh(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if _has_weights(name, value):
        fan_in = value[0].numel()
        return torch.randn(value.shape, generator=generator) * math.sqrt(2 / fan_in)
    empty = name.endswith(("bias", "running_mean"))
    return torch.zeros_like(value) if empty else torch.ones_like(value)
