"""The smallest ONNX graph that shows whether an engine runs, without the package onnx.

The fields are those of onnx.proto; a message is its fields, each a key and a value.
"""

from __future__ import annotations

_IR_VERSION, _OPSET = 8, 13
_FLOAT = 1


def tiny_graph() -> bytes:
    """Serialise a model that computes y = max(x, 0).

    Returns:
        An ONNX file's bytes; x and y are [2] float32.
    """
    node = _text(1, "x") + _text(2, "y") + _text(4, "Relu")
    graph = _message(1, node) + _text(2, "tiny")
    graph += _message(11, _tensor("x")) + _message(12, _tensor("y"))
    opset = _text(1, "") + _number(2, _OPSET)
    return _number(1, _IR_VERSION) + _message(7, graph) + _message(8, opset)


def _tensor(name: str) -> bytes:
    """ValueInfoProto of a float32 tensor of 2 values."""
    shape = _message(1, _number(1, 2))
    tensor_type = _message(1, _number(1, _FLOAT) + _message(2, shape))
    return _text(1, name) + _message(2, tensor_type)


def _number(field: int, value: int) -> bytes:
    """A varint field; numbers below 128 take one byte."""
    return bytes([field << 3, value])


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _message(field: int, content: bytes) -> bytes:
    """A field of fewer than 128 bytes, after their number."""
    return bytes([field << 3 | 2, len(content)]) + content
