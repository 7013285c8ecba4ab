"""TF32 on a CPU: graphs whose products round their factors as tensor cores do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from ccam_deploy.arrays import Floats

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SPLITTER = np.array(2**13 + 1, np.float32)


def round_factors(values: Floats) -> Floats:
    """Round float32 to 10 bits of mantissa, to the nearest; half-way cases go to the even one."""
    bits = values.view(np.uint32)
    kept = bits + 0xFFF + ((bits >> 13) & 1)
    return (kept & np.uint32(0xFFFFE000)).view(np.float32)


def emulated(paths: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Write graphs in which both factors of every product of float32 are rounded.

    paths: the graphs' files, by name.   folder: where to write.   Returns the files, by name.
    """
    made = {}
    for name, path in paths.items():
        model = onnx.load(path)
        nodes = list(model.graph.node)
        del model.graph.node[:]
        for index, node in enumerate(nodes):
            if node.op_type in PRODUCTS:
                for place in (0, 1):
                    *rounding, factor = _rounding(node.input[place], f"tf32_{index}_{place}")
                    model.graph.node.extend([*rounding, factor])
                    node.input[place] = factor.output[0]
            model.graph.node.append(node)
        model.graph.initializer.append(numpy_helper.from_array(_SPLITTER, "tf32_splitter"))
        made[name] = folder / f"{name}.onnx"
        onnx.save(model, made[name])
    return made


def _rounding(value: str, prefix: str) -> Iterator[NodeProto]:
    """Split a float32 after its upper 11 bits (Dekker 1971): c = 8193 x, then c - (c - x)."""
    scaled, rest, upper = (f"{prefix}_{part}" for part in ("scaled", "rest", "upper"))
    yield helper.make_node("Mul", [value, "tf32_splitter"], [scaled])
    yield helper.make_node("Sub", [scaled, value], [rest])
    yield helper.make_node("Sub", [scaled, rest], [upper])
