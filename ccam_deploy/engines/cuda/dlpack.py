"""Tensors in device memory from and for other libraries, by DLPack's C structures.

DLPack: Open In Memory Tensor Structure, version 0 of its ABI, as Triton's Python backend speaks it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.errors import ImageError

HOST, CUDA = 1, 2
"""DLPack's numbers for the memory of a CPU and of a GPU."""
_TYPES = {np.dtype(np.int32): (0, 32, 1), np.dtype(np.float32): (2, 32, 1)}
"""DLPack's code, bits and lanes of the types that are read and given."""
_FRESH = b"dltensor"
"""The name of a capsule whose tensor nobody has taken."""


class _Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("number", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("dimensions", ctypes.c_int32),
        ("type", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [
    ("tensor", _Tensor),
    ("context", ctypes.c_void_p),
    ("deleter", _Deleter),
]
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of Python's C interface; those of ctypes.pythonapi keep the interpreter's lock."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_new = _function(
    "PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)
_pointer = _function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
# A destructor's capsule has no references left: it must not be made a Python object again.
_dying_pointer = _function(
    "PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p
)
_dying_is_valid = _function("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)

_given: dict[int, tuple[Any, Callable[[], None]]] = {}
"""What was given away and not let go yet, by the address of its structure."""


def tensor_of(capsule: Any, kind: int = CUDA) -> DeviceTensor:
    """Read where a tensor of another library lies; its memory stays the capsule's.

    Args:
        capsule: A fresh DLPack capsule, of float32 or int32 without gaps.
        kind: The memory that it must be in, HOST or CUDA.

    Raises:
        ImageError: It is in other memory, on another GPU than the first, or of another type.
    """
    found = ctypes.cast(_pointer(capsule, _FRESH), ctypes.POINTER(_Managed)).contents.tensor
    shape = tuple(found.shape[axis] for axis in range(found.dimensions))
    if (found.device.kind, found.device.number) != (kind, 0):
        raise ImageError(
            f"a tensor is on device {found.device.number} of DLPack's kind {found.device.kind}; "
            f"it must be on the first of kind {kind}"
        )
    described = found.type.code, found.type.bits, found.type.lanes
    dtype = next((dtype for dtype, numbers in _TYPES.items() if numbers == described), None)
    if dtype is None:
        raise ImageError("a tensor in device memory is of another type than float32 and int32")
    if found.strides:
        strides = [found.strides[axis] for axis in range(len(shape))]
        dense = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        if any(s != d for s, d, n in zip(strides, dense, shape, strict=True) if n > 1):
            raise ImageError("a tensor in device memory has gaps; make it contiguous")
    return DeviceTensor((found.data or 0) + found.offset, shape, dtype)


def capsule_of(tensor: DeviceTensor, release: Callable[[], None], kind: int = CUDA) -> Any:
    """Give a tensor to another library, as a DLPack capsule.

    Args:
        tensor: Of float32 or int32.
        release: Called once, when nobody reads the tensor any more; from any thread.
        kind: The memory that it is in, HOST or CUDA.
    """
    shape = (ctypes.c_int64 * len(tensor.shape))(*tensor.shape)
    managed = _Managed()
    managed.tensor = _Tensor(
        tensor.address,
        _Device(kind, 0),
        len(tensor.shape),
        _Type(*_TYPES[tensor.dtype]),
        ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
        None,
        0,
    )
    managed.deleter = _deleter
    address = ctypes.addressof(managed)
    _given[address] = (managed, shape), release
    return _new(address, _FRESH, ctypes.cast(_destructor, ctypes.c_void_p))


def _let_go(managed: Any) -> None:
    _, release = _given.pop(ctypes.addressof(managed.contents))
    release()


def _drop(capsule: int) -> None:
    """Let go of a tensor whose capsule nobody took."""
    if _dying_is_valid(capsule, _FRESH):
        _, release = _given.pop(_dying_pointer(capsule, _FRESH))
        release()


_deleter = _Deleter(_let_go)
_destructor = _Destructor(_drop)
