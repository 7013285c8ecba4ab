"""A node of an ONNX graph with the values of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Value = Tensor | Array
"""A tensor that PyTorch traces; or an array of sizes, constants among them, that Python computes
with. An array of objects holds sizes that depend on the batch."""
Result = Value | Sequence[Value]


@dataclass(frozen=True)
class Call:
    """A node with the values of its inputs.

    Attributes:
        kind: The operator, such as "Conv".
        name: The node's name.
        attributes: By name: numbers, strings, arrays, or lists of numbers.
        opset: The version of ONNX's operators.
        inputs: The values; None for those that are left out.
        outputs: How many outputs are used.
        batch: The batch that the file fixes, which the trace makes dynamic; 0 where it fixes none.
        constant: Whether all inputs are constants.
    """

    kind: str
    name: str
    attributes: Mapping[str, Any]
    opset: int
    inputs: Sequence[Value | None]
    outputs: int
    batch: int = 0
    constant: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)

    def value(self, place: int) -> Value | None:
        """Return an input, None where it is left out."""
        return self.inputs[place] if place < len(self.inputs) else None

    def tensor(self, place: int) -> Tensor:
        """Return an input as a tensor.

        Raises:
            ValueError: It is left out.
        """
        value = self.value(place)
        if value is None:
            raise ValueError(f"input {place} is missing")
        return as_tensor(value)

    def optional_tensor(self, place: int) -> Tensor | None:
        """Return an input as a tensor, None where it is left out."""
        return None if self.value(place) is None else self.tensor(place)

    def sizes(self, place: int, attribute: str = "") -> list[Any] | None:
        """Return whole numbers, of an input or, in older versions, an attribute; None for neither.

        Raises:
            NotImplementedError: They depend on the images.
        """
        value = self.value(place)
        if value is None:
            listed = self.get(attribute)
            return None if listed is None else list(listed)
        return [as_size(size) for size in self.known(place).reshape(-1)]

    def known(self, place: int) -> Array:
        """Return an input whose values are known while PyTorch traces.

        Raises:
            NotImplementedError: They depend on the images.
        """
        value = self.value(place)
        if not isinstance(value, np.ndarray):
            raise NotImplementedError(f"its input {place} depends on the images")
        return value

    def number(self, place: int, attribute: str = "", default: float | None = None) -> float | None:
        """Return a number, of an input or, in older versions, an attribute."""
        if self.value(place) is None:
            return self.get(attribute, default)  # type: ignore[no-any-return]
        return float(self.known(place).reshape(-1)[0])


Rule = Callable[[Call], Result]


def as_size(size: Any) -> Any:
    """Return a whole number as Python's, and a symbol as it is."""
    return size if isinstance(size, torch.SymInt) else int(size)


def as_array(sizes: Sequence[Any]) -> Array:
    """Make an array of sizes: of objects where one of them is a symbol, else int64."""
    if not any(isinstance(size, torch.SymInt) for size in sizes):
        return np.array([int(size) for size in sizes], np.int64)
    array = np.empty(len(sizes), object)
    array[:] = sizes
    return array


def as_tensor(value: Value) -> Tensor:
    """Make a tensor of a value."""
    if isinstance(value, Tensor):
        return value
    if value.dtype == object:
        flat = [torch.scalar_tensor(as_size(size), dtype=torch.int64) for size in value.flat]
        return torch.stack(flat).reshape(value.shape)
    if value.dtype == np.float64:
        value = value.astype(np.float32)
    return torch.from_numpy(np.array(value))


def is_symbolic(size: object) -> bool:
    """Tell whether a size depends on the batch."""
    return isinstance(size, torch.SymInt)


def size_at(size: Any, batch: int) -> int:
    """Return a size for a given batch."""
    if not is_symbolic(size):
        return int(size)
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def without_batch(shape: Sequence[Any], target: Sequence[Any], batch: int) -> list[Any]:
    """Free a shape, which was written for one batch, from it.

    Args:
        shape: Of the tensor to reshape.
        target: Sizes, one of which may be -1.
        batch: The batch that they were written for.

    Returns:
        The target, with -1 for the size that grows with the batch.

    Raises:
        NotImplementedError: No size does.
    """
    places = [place for place, size in enumerate(shape) if is_symbolic(size)]
    if not places or any(map(is_symbolic, target)):
        return list(target)
    total = math.prod(size_at(size, batch) for size in shape)
    others = math.prod(size for size in target if size != -1)
    whole = [total // max(others, 1) if size == -1 else size for size in target]
    grows = places[0]
    before, behind = math.prod(map(int, shape[:grows])), list(shape[grows + 1 :])
    step = size_at(shape[grows], 1)
    for place, size in enumerate(whole):  # the batch by itself
        done = math.prod(whole[:place])
        split_off = done == before * step and whole[place + 1 :] == behind
        if size == batch and (done == before or split_off):
            return [*whole[:place], -1, *whole[place + 1 :]]
    last = len(whole) - 1
    if last > 0 and math.prod(behind) > 1 and math.prod(whole[:last]) == before * batch:
        return [*whole[: last - 1], -1, whole[last]]  # merged with what stands before it
    for place, size in enumerate(whole):
        if math.prod(whole[:place]) == before and size and size % batch == 0:
            return [*whole[:place], -1, *whole[place + 1 :]]
    raise NotImplementedError(
        f"it makes {list(target)} of a batch of {batch}, which cannot be made dynamic; "
        "export the ONNX file with a dynamic batch"
    )
