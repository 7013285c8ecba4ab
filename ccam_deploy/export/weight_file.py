"""The file of weights that all graphs of a bundle share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

_INLINE_BYTES = 1024
_ALIGNMENT = 4096


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
